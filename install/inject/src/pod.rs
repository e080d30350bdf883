//! What is added to a pod.

use serde_json::{Map, Value, json};

use crate::{
    INIT, InjectError, PROXY, STATUS,
    annotation::{self, Annotations},
    merge::merge,
    probe,
    settings::Settings,
    template::{self, Values},
    workload::Found,
};

/// Port on which the sidecar says whether it is ready.
const READY_PORT: u16 = 15021;
/// Longest value of a label.
const LABEL: usize = 63;

/// What the workload asks for, taken together.
struct Wishes {
    annotations: Annotations,
    config: Value,
    mode: String,
    native: bool,
    hold: bool,
    rewrite: bool,
    status_port: u16,
}

/// Adds the sidecar.
pub(crate) fn inject(found: Found<'_>, settings: &Settings) -> Result<(), InjectError> {
    let mut wishes = wishes(&found, settings)?;
    let mut pod = found.pod.clone();
    let own = take_own(&mut pod);
    let applications = names(&pod, "containers");
    if applications.is_empty() {
        // A pod must have a container that is none of those that come first.
        wishes.native = false;
    }
    let mut probers = Map::new();
    if wishes.rewrite && wishes.status_port != 0 {
        rewrite_probes(&mut pod, wishes.status_port, &mut probers)?;
    }
    let values = values(&found, &pod, &wishes, settings, probers)?;
    let mut added = json!({});
    let templates = wishes.annotations.text("inject.istio.io/templates");
    for name in templates.as_deref().unwrap_or("sidecar").split(',') {
        merge(
            &mut added,
            &template::render(name.trim(), settings, &values)?,
        );
    }
    adapt(&mut added, &wishes, &own)?;
    let status = status(&added, wishes.native, settings);
    place(&mut pod, added, &wishes);
    pod["metadata"]["annotations"][STATUS] = Value::String(status);
    check(&pod)?;
    *found.pod = pod;
    Ok(())
}

fn wishes(found: &Found<'_>, settings: &Settings) -> Result<Wishes, InjectError> {
    let annotations = Annotations::of(found.pod);
    let mut config = settings.default_config.clone();
    merge(&mut config, &annotations.proxy_config()?);
    let configured = |name: &str| config.get(name).and_then(Value::as_str).map(str::to_owned);
    let mode = annotations
        .text("sidecar.istio.io/interceptionMode")
        .or_else(|| configured("interceptionMode"))
        .unwrap_or_else(|| settings.interception_mode.clone());
    if !matches!(mode.as_str(), "REDIRECT" | "TPROXY" | "NONE") {
        return Err(InjectError::Annotation {
            name: "sidecar.istio.io/interceptionMode".to_owned(),
            reason: format!("{mode:?} is none of REDIRECT, TPROXY, NONE"),
        });
    }
    let native = annotations
        .flag("sidecar.istio.io/nativeSidecar")?
        .or(settings.native_sidecar)
        // A container that does not end would keep a Job from ending.
        .unwrap_or_else(|| found.is_job());
    let hold = config.get("holdApplicationUntilProxyStarts");
    let hold = hold
        .and_then(Value::as_bool)
        .unwrap_or(settings.hold_application_until_proxy_starts);
    let rewrite = annotations
        .flag("sidecar.istio.io/rewriteAppHTTPProbers")?
        .unwrap_or(settings.rewrite_app_http_probers);
    const STATUS_PORT: &str = "status.sidecar.istio.io/port";
    let status_port = match annotations.number(STATUS_PORT)? {
        None => settings.status_port,
        Some(port) => u16::try_from(port).map_err(|_| InjectError::Annotation {
            name: STATUS_PORT.to_owned(),
            reason: format!("{port} is no port"),
        })?,
    };
    Ok(Wishes {
        annotations,
        config,
        mode,
        native,
        hold,
        rewrite,
        status_port,
    })
}

/// Takes out the containers that say what is to be different about ours.
fn take_own(pod: &mut Value) -> Vec<Value> {
    let mut own = Vec::new();
    for list in ["containers", "initContainers"] {
        let Some(containers) = pod["spec"].get_mut(list).and_then(Value::as_array_mut) else {
            continue;
        };
        let is_own = |container: &Value| {
            matches!(
                container.get("name").and_then(Value::as_str),
                Some(PROXY | INIT)
            )
        };
        own.extend(containers.iter().filter(|c| is_own(c)).cloned());
        containers.retain(|container| !is_own(container));
    }
    for container in &mut own {
        if let Some(map) = container.as_object_mut() {
            // Istio: "auto" stands for the template's image.
            if map.get("image").and_then(Value::as_str) == Some("auto") {
                map.remove("image");
            }
        }
    }
    own
}

fn names(pod: &Value, list: &str) -> Vec<String> {
    let containers = pod["spec"].get(list).and_then(Value::as_array);
    let names = containers.into_iter().flatten();
    names
        .filter_map(|container| Some(container.get("name")?.as_str()?.to_owned()))
        .collect()
}

fn rewrite_probes(
    pod: &mut Value,
    status_port: u16,
    probers: &mut Map<String, Value>,
) -> Result<(), InjectError> {
    for list in ["containers", "initContainers"] {
        let containers = pod["spec"].get_mut(list).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            probe::rewrite(container, status_port, probers)?;
        }
    }
    Ok(())
}

/// What templates may name.
fn values(
    found: &Found<'_>,
    pod: &Value,
    wishes: &Wishes,
    settings: &Settings,
    probers: Map<String, Value>,
) -> Result<Values, InjectError> {
    let annotations = &wishes.annotations;
    let labels = |name: &str| pod.pointer("/metadata/labels")?.get(name)?.as_str();
    let first = |names: [&str; 3]| names.into_iter().find_map(labels);
    let text = |text: &str| Value::String(text.to_owned());
    let label = |text: &str| Value::String(text.chars().take(LABEL).collect());
    let applications = names(pod, "containers");
    let namespace = match found.namespace.as_str() {
        "" => &settings.namespace,
        named => named,
    };
    let owner = format!(
        "kubernetes://apis/{}/namespaces/{namespace}/{}s/{}",
        found.api_version,
        found.kind.to_lowercase(),
        found.name
    );
    let mut config = wishes.config.clone();
    if config.get("discoveryAddress").is_none() {
        config["discoveryAddress"] = text(&settings.discovery_address);
    }
    let tproxy = wishes.mode == "TPROXY";
    let interception =
        annotation::interception(annotations, settings, &wishes.mode, wishes.status_port)?;
    let image = annotations
        .text("sidecar.istio.io/proxyImage")
        .unwrap_or_else(|| settings.image.clone());
    let log_level = annotations
        .text("sidecar.istio.io/logLevel")
        .unwrap_or_else(|| settings.log_level.clone());
    let secrets = settings.image_pull_secrets.iter();
    let secrets: Vec<Value> = secrets.map(|name| json!({"name": name})).collect();
    Ok(Values::from([
        ("appContainers", text(&applications.join(","))),
        ("caAddress", text(&settings.ca_address)),
        (
            "canonicalName",
            label(
                first([
                    "service.istio.io/canonical-name",
                    "app.kubernetes.io/name",
                    "app",
                ])
                .unwrap_or(&found.name),
            ),
        ),
        (
            "canonicalRevision",
            label(
                first([
                    "service.istio.io/canonical-revision",
                    "app.kubernetes.io/version",
                    "version",
                ])
                .unwrap_or("latest"),
            ),
        ),
        (
            "capabilities",
            match tproxy {
                true => json!({"add": ["NET_ADMIN"], "drop": ["ALL"]}),
                false => json!({"drop": ["ALL"]}),
            },
        ),
        ("clusterId", text(&settings.cluster_id)),
        (
            "firstContainer",
            applications.first().map_or(Value::Null, |name| text(name)),
        ),
        ("image", text(&image)),
        (
            "imagePullPolicy",
            match settings.image_pull_policy.as_str() {
                "" => Value::Null,
                policy => text(policy),
            },
        ),
        (
            "imagePullSecrets",
            match secrets.is_empty() {
                true => Value::Null,
                false => Value::Array(secrets),
            },
        ),
        ("interceptionArgs", json!(interception)),
        ("interceptionMode", text(&wishes.mode)),
        ("lifecycle", lifecycle(wishes)),
        ("logLevel", text(&log_level)),
        ("meshId", text(&settings.mesh_id)),
        ("owner", text(&owner)),
        ("podPorts", text(&pod_ports(pod))),
        (
            "probers",
            match probers.is_empty() {
                true => Value::Null,
                false => Value::String(Value::Object(probers).to_string()),
            },
        ),
        ("proxyConfig", Value::String(config.to_string())),
        ("readinessProbe", readiness(wishes)?),
        ("resources", annotations.resources(settings)),
        ("revision", text(&settings.revision)),
        ("runAsNonRoot", Value::Bool(!tproxy)),
        // A transparent socket takes a capability, which another user than root would not have.
        ("runAsUser", if tproxy { json!(0) } else { json!(1337) }),
        (
            "startupProbe",
            match wishes.native {
                // What comes after it in the order of the pod waits for this.
                true => json!({
                    "httpGet": {"path": "/healthz/ready", "port": READY_PORT},
                    "periodSeconds": 1, "timeoutSeconds": 3, "failureThreshold": 600,
                }),
                false => Value::Null,
            },
        ),
        ("statusPort", text(&wishes.status_port.to_string())),
        ("trustDomain", text(&settings.trust_domain)),
        ("workload", text(&found.name)),
    ]))
}

fn lifecycle(wishes: &Wishes) -> Value {
    match wishes.hold && !wishes.native {
        // Kubernetes starts containers in their order, and the next only when this has returned.
        true => json!({"postStart": {"exec": {"command": ["proxy", "wait"]}}}),
        false => Value::Null,
    }
}

fn readiness(wishes: &Wishes) -> Result<Value, InjectError> {
    if wishes.status_port == 0 {
        return Ok(Value::Null);
    }
    let mut probe = json!({
        "httpGet": {"path": "/healthz/ready", "port": READY_PORT},
        "periodSeconds": 15, "timeoutSeconds": 3, "failureThreshold": 4,
    });
    for field in ["initialDelaySeconds", "periodSeconds", "failureThreshold"] {
        let name = format!("readiness.status.sidecar.istio.io/{field}");
        if let Some(seconds) = wishes.annotations.number(&name)? {
            probe[field] = json!(seconds);
        }
    }
    Ok(probe)
}

/// The containers' ports, as Istio writes them into node metadata.
fn pod_ports(pod: &Value) -> String {
    let containers = pod["spec"].get("containers").and_then(Value::as_array);
    let ports = containers
        .into_iter()
        .flatten()
        .filter_map(|container| container.get("ports")?.as_array())
        .flatten();
    Value::Array(ports.cloned().collect()).to_string()
}

/// Makes the template's pod what this workload needs.
fn adapt(added: &mut Value, wishes: &Wishes, own: &[Value]) -> Result<(), InjectError> {
    if wishes.mode == "NONE" {
        remove(added, "initContainers", INIT);
    }
    let metadata = wishes
        .config
        .get("proxyMetadata")
        .and_then(Value::as_object);
    for (name, value) in metadata.into_iter().flatten() {
        let value = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        for container in [PROXY, INIT] {
            if let Some(container) = container_mut(added, container) {
                merge(container, &json!({"env": [{"name": name, "value": value}]}));
            }
        }
    }
    for (name, mut mount) in wishes
        .annotations
        .things("sidecar.istio.io/userVolumeMount")?
    {
        mount["name"] = json!(name);
        if let Some(container) = container_mut(added, PROXY) {
            merge(container, &json!({"volumeMounts": [mount]}));
        }
    }
    for (name, mut volume) in wishes.annotations.things("sidecar.istio.io/userVolume")? {
        volume["name"] = json!(name);
        merge(&mut added["spec"], &json!({"volumes": [volume]}));
    }
    for container in own {
        let name = container.get("name").and_then(Value::as_str).unwrap_or("");
        if let Some(present) = container_mut(added, name) {
            merge(present, container);
        }
    }
    Ok(())
}

fn remove(pod: &mut Value, list: &str, name: &str) -> Option<Value> {
    let containers = pod.get_mut("spec")?.get_mut(list)?.as_array_mut()?;
    let at = containers
        .iter()
        .position(|container| container.get("name").and_then(Value::as_str) == Some(name))?;
    Some(containers.remove(at))
}

fn container_mut<'a>(pod: &'a mut Value, name: &str) -> Option<&'a mut Value> {
    let spec = pod.get_mut("spec")?.as_object_mut()?;
    spec.iter_mut()
        .filter(|(list, _)| matches!(list.as_str(), "containers" | "initContainers"))
        .filter_map(|(_, containers)| containers.as_array_mut())
        .flatten()
        .find(|container| container.get("name").and_then(Value::as_str) == Some(name))
}

/// Value of the annotation that tells what was added, as Istio writes it.
fn status(added: &Value, native: bool, settings: &Settings) -> String {
    let listed = |list: &str| -> Vec<&str> {
        let items = added["spec"].get(list).and_then(Value::as_array);
        let names = items.into_iter().flatten();
        names
            .filter_map(|item| item.get("name")?.as_str())
            .collect()
    };
    let mut first = listed("initContainers");
    let mut others = listed("containers");
    if native {
        first.extend(others.iter().filter(|name| **name == PROXY));
        others.retain(|name| *name != PROXY);
    }
    let or_null = |names: Vec<&str>| match names.is_empty() {
        true => Value::Null,
        false => json!(names),
    };
    json!({
        "initContainers": or_null(first), "containers": or_null(others),
        "volumes": or_null(listed("volumes")), "imagePullSecrets": or_null(listed("imagePullSecrets")),
        "revision": settings.revision,
    })
    .to_string()
}

/// Puts what is added where it belongs.
fn place(pod: &mut Value, mut added: Value, wishes: &Wishes) {
    let proxy = remove(&mut added, "containers", PROXY);
    let init = remove(&mut added, "initContainers", INIT);
    // What the pod says of itself stays.
    for part in ["labels", "annotations"] {
        let mut said = added["metadata"]
            .get(part)
            .cloned()
            .unwrap_or_else(|| json!({}));
        if let Some(own) = pod["metadata"].get(part) {
            merge(&mut said, own);
        }
        pod["metadata"][part] = said;
    }
    if let Some(spec) = added.get("spec") {
        let own = pod["spec"].clone();
        let mut merged = spec.clone();
        // Its own containers and volumes first; for all else its word counts.
        for list in [
            "containers",
            "initContainers",
            "volumes",
            "imagePullSecrets",
        ] {
            let mut items = own.get(list).cloned().unwrap_or_else(|| json!([]));
            if let Some(more) = merged.get(list) {
                let mut both = json!({list: items});
                merge(&mut both, &json!({list: more}));
                items = both[list].take();
            }
            merged[list] = items;
        }
        let mut rest = own;
        if let Some(rest) = rest.as_object_mut() {
            for list in [
                "containers",
                "initContainers",
                "volumes",
                "imagePullSecrets",
            ] {
                rest.remove(list);
            }
        }
        merge(&mut merged, &rest);
        pod["spec"] = merged;
    }
    let lists = ["containers", "initContainers"];
    if let Some(spec) = pod["spec"].as_object_mut() {
        let mut put = |list: &str, item: Option<Value>, first: bool| {
            let items = spec.entry(list).or_insert_with(|| json!([]));
            if let (Some(items), Some(item)) = (items.as_array_mut(), item) {
                items.insert(if first { 0 } else { items.len() }, item);
            }
        };
        if wishes.native {
            let proxy = proxy.map(|mut proxy| {
                proxy["restartPolicy"] = json!("Always");
                proxy
            });
            // Redirect, then the proxy, then whatever else comes before the application.
            put(lists[1], proxy, true);
            put(lists[1], init, true);
        } else {
            put(lists[0], proxy, wishes.hold);
            // Other init containers run before the proxy does, so their traffic is not redirected.
            put(lists[1], init, false);
        }
        for list in ["initContainers", "volumes", "imagePullSecrets"] {
            if spec
                .get(list)
                .and_then(Value::as_array)
                .is_some_and(Vec::is_empty)
            {
                spec.remove(list);
            }
        }
    }
}

/// Names of containers are unique in a pod, and there is one that is no init container.
fn check(pod: &Value) -> Result<(), InjectError> {
    let mut seen = Vec::new();
    for name in names(pod, "containers")
        .into_iter()
        .chain(names(pod, "initContainers"))
    {
        if seen.contains(&name) {
            return Err(InjectError::Result(format!(
                "two containers would be named {name}"
            )));
        }
        seen.push(name);
    }
    match names(pod, "containers").is_empty() {
        true => Err(InjectError::Result("no container would be left".to_owned())),
        false => Ok(()),
    }
}
