//! Auth and two Pilots on the API server that `KUBECONFIG` names, with exactly the rights and the webhook configurations of
//! `docs/operations/kubernetes.md`: what a person sees with kubectl.
//!
//! Nothing needs to run in the cluster, and nothing does: pods are objects. The programs run here; the API server must
//! reach this machine's own address, for it calls the webhooks. Where `KUBECONFIG` is not set or there is no kubectl, it
//! says so and does nothing.
#![cfg(test)]

mod kubectl;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use e2e::process::{Process, Spec, program};
use serde_json::{Value, json};
use tempfile::TempDir;

use kubectl::Kubectl;

/// Longer than anything here takes: a lease that runs out takes 20 s.
const PATIENCE: Duration = Duration::from_secs(60);
/// Namespaces of the test. If they are there without its label they are somebody's, and the test does not run.
const NAMESPACES: [&str; 4] = ["lateen-system", "istio-system", "shop", "plain"];
const LABEL: &str = "lateen.io/test";
/// Short, so that certificates are renewed while the test runs.
const LIFE: &str = "30s";

struct Mesh {
    kubectl: Kubectl,
    folder: TempDir,
    auth: Process,
    pilots: Vec<(Process, u16)>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The YAML blocks of the page.
fn documented() -> Vec<Value> {
    let page = std::fs::read_to_string(root().join("docs/operations/kubernetes.md")).unwrap();
    page.split("```yaml\n")
        .skip(1)
        .flat_map(|rest| rest.split("```").next().unwrap().split("---\n"))
        .map(|document| serde_saphyr::from_str(document).unwrap())
        .collect()
}

fn of_kind<'a>(all: &'a [Value], kinds: &'a [&str]) -> impl Iterator<Item = &'a Value> {
    all.iter()
        .filter(|one| kinds.contains(&one["kind"].as_str().unwrap()))
}

/// Binds a documented role to the account of its program.
fn binding(role: &Value) -> Value {
    let name = role["metadata"]["name"].as_str().unwrap();
    let account = match name.starts_with("lateen-auth") {
        true => "lateen-auth",
        false => "lateen-pilot",
    };
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": format!("{}Binding", role["kind"].as_str().unwrap()),
        "metadata": role["metadata"],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": role["kind"], "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": "lateen-system"}],
    })
}

/// This machine's address towards others; nothing is sent.
fn own_address() -> IpAddr {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket
        .connect("192.0.2.1:9")
        .expect("a route to other machines");
    socket.local_addr().unwrap().ip()
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

impl Mesh {
    /// Definitions, accounts, rights, and one object that is wrong, from before there was a webhook.
    fn start(kubectl: Kubectl) -> Self {
        for namespace in NAMESPACES {
            kubectl.apply(&json!({
                "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": {LABEL: "true"}},
            }));
        }
        let crds = root().join("install/manifests/crds.yaml");
        let crds = crds.to_str().unwrap();
        kubectl.run(&[
            "apply",
            "--server-side",
            "--force-conflicts",
            "--validate=false",
            "-f",
            crds,
        ]);
        kubectl.run(&[
            "wait",
            "--for=condition=Established",
            "--timeout=60s",
            "-f",
            crds,
        ]);
        for (kind, plural, is_namespaced) in [
            ("GatewayClass", "gatewayclasses", false),
            ("Gateway", "gateways", true),
            ("HTTPRoute", "httproutes", true),
        ] {
            let definition = gateway_api(kind, plural, is_namespaced);
            let name = definition["metadata"]["name"].as_str().unwrap().to_owned();
            if kubectl.get("crd", "", &name).is_null() {
                kubectl.apply(&definition);
                kubectl.run(&[
                    "wait",
                    "--for=condition=Established",
                    "--timeout=60s",
                    &format!("crd/{name}"),
                ]);
            }
        }
        for role in of_kind(&documented(), &["Role", "ClusterRole"]) {
            kubectl.apply(role);
            kubectl.apply(&binding(role));
        }
        for account in ["lateen-auth", "lateen-pilot"] {
            kubectl.apply(&json!({
                "apiVersion": "v1", "kind": "ServiceAccount",
                "metadata": {"name": account, "namespace": "lateen-system"},
            }));
        }
        kubectl.apply(&rule("wrong", wrong()));
        // Made before its namespace asks for sidecars.
        kubectl.apply(&pod("early", "shop", json!({})));

        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let flags = |all: &[&str]| {
            all.iter()
                .map(|flag| (*flag).to_owned())
                .collect::<Vec<_>>()
        };
        for account in ["lateen-auth", "lateen-pilot"] {
            kubectl.kubeconfig_of(account, &folder.path().join(account));
        }
        let token = kubectl.token("lateen-pilot", Some("istio-ca"));
        std::fs::write(folder.path().join("token"), token).unwrap();
        let ports: Vec<u16> = (0..2).map(|_| free_port()).collect();
        let auth = Spec {
            name: "auth".into(),
            path: program("auth").unwrap(),
            args: flags(&[
                "--state",
                &path("state"),
                "--bind",
                "127.0.0.1",
                "--port",
                &ports[0].to_string(),
                "--admin-port",
                &ports[1].to_string(),
                "--kubeconfig",
                &path("lateen-auth"),
                "--publish-roots",
                "--workload-ttl",
                LIFE,
                "--dns-names-of",
                "lateen-system/lateen-pilot=lateen-pilot.lateen-system.svc",
            ]),
            env: Vec::new(),
            own_group: false,
        };
        let auth = Process::start(auth, folder.path()).unwrap();
        let mut mesh = Self {
            kubectl,
            folder,
            auth,
            pilots: Vec::new(),
        };
        until("auth is ready", || ready(ports[1]).then_some(()));
        let mut webhooks = Vec::new();
        for number in 0..2 {
            let [grpc, tls, http, webhook] = [(); 4].map(|()| free_port());
            webhooks.push(webhook);
            let path = |name: &str| mesh.folder.path().join(name).to_str().unwrap().to_owned();
            let pilot = Spec {
                name: format!("pilot-{number}"),
                path: program("pilot").unwrap(),
                args: flags(&[
                    "--kubeconfig",
                    &path("lateen-pilot"),
                    "--grpc-port",
                    &grpc.to_string(),
                    "--tls-port",
                    &tls.to_string(),
                    "--http-port",
                    &http.to_string(),
                    "--webhook-port",
                    &webhook.to_string(),
                    "--webhooks",
                    "--controllers",
                    "--auth-address",
                    &format!("127.0.0.1:{}", ports[0]),
                    "--auth-root",
                    &path("state/public/root-cert.pem"),
                    "--join-token-file",
                    &path("token"),
                ]),
                env: Vec::new(),
                own_group: false,
            };
            let pilot = Process::start(pilot, mesh.folder.path()).unwrap();
            mesh.pilots.push((pilot, http));
            until("pilot is ready", || {
                let (pilot, http) = mesh.pilots.last_mut().unwrap();
                pilot.check().unwrap();
                ready(*http).then_some(())
            });
        }
        mesh.serve(&webhooks);
        mesh
    }

    /// The Service that the webhook configurations name, and where it leads: no controller does that here.
    fn serve(&self, ports: &[u16]) {
        self.kubectl.apply(&json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "lateen-pilot", "namespace": "lateen-system"},
            "spec": {"ports": [{"name": "webhooks", "port": 15017, "protocol": "TCP"}]},
        }));
        let address = own_address().to_string();
        let subsets: Vec<Value> = ports
            .iter()
            .map(|port| json!({"addresses": [{"ip": address}], "ports": [{"name": "webhooks", "port": port, "protocol": "TCP"}]}))
            .collect();
        self.kubectl.apply(&json!({
            "apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "lateen-pilot", "namespace": "lateen-system"},
            "subsets": subsets,
        }));
        for configuration in of_kind(
            &documented(),
            &[
                "MutatingWebhookConfiguration",
                "ValidatingWebhookConfiguration",
            ],
        ) {
            self.kubectl.apply(configuration);
        }
        for (kind, name) in [
            ("mutatingwebhookconfiguration", "lateen-sidecar-injector"),
            ("validatingwebhookconfiguration", "lateen-validator"),
        ] {
            until("the caBundle is written", || {
                let found = self.kubectl.get(kind, "", name);
                found["webhooks"][0]["clientConfig"]["caBundle"]
                    .as_str()
                    .map(drop)
            });
        }
    }

    fn metric(&self, pilot: usize, name: &str) -> Option<i64> {
        let page = page(self.pilots[pilot].1, "/metrics")?;
        let line = page
            .lines()
            .find(|line| line.starts_with(&format!("{name} ")))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    /// The number of the one that leads.
    fn leader(&self) -> usize {
        until("one leads", || {
            (0..self.pilots.len()).find(|number| self.metric(*number, "pilot_leader") == Some(1))
        })
    }

    fn accepted(&self, name: &str) -> Option<Value> {
        let rule = self.kubectl.get("destinationrule", "shop", name);
        let conditions = rule["status"]["conditions"].as_array()?.clone();
        conditions.into_iter().find(|one| one["type"] == "Accepted")
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for process in self.pilots.iter().map(|pilot| &pilot.0).chain([&self.auth]) {
                eprintln!("--- {}\n{}", process.name(), process.output());
            }
        }
        // Else nothing can be made there any more.
        self.kubectl.clean();
    }
}

fn page(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: pilot\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer.split_once("\r\n\r\n")?.1.to_owned())
}

fn ready(port: u16) -> bool {
    page(port, "/healthz/ready").is_some_and(|text| text.ends_with("ok\n"))
}

fn rule(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": name, "namespace": "shop"}, "spec": spec,
    })
}

/// A definition for clusters without the Gateway API. Its own has CEL rules, which not every API server has.
fn gateway_api(kind: &str, plural: &str, is_namespaced: bool) -> Value {
    let any = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{plural}.gateway.networking.k8s.io"),
            "annotations": {"api-approved.kubernetes.io": "unapproved, experimental-only"},
        },
        "spec": {
            "group": "gateway.networking.k8s.io", "scope": if is_namespaced { "Namespaced" } else { "Cluster" },
            "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase()},
            "versions": [{
                "name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": any, "status": any}}},
            }],
        },
    })
}

fn gateway_object(kind: &str, namespace: &str, name: &str, spec: Value) -> Value {
    let mut metadata = json!({"name": name});
    if !namespace.is_empty() {
        metadata["namespace"] = json!(namespace);
    }
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": kind, "metadata": metadata, "spec": spec})
}

/// What a definition's schema lets in, and Pilot does not.
fn wrong() -> Value {
    json!({"host": "cart", "trafficPolicy": {"outlierDetection": {"interval": "100us"}}})
}

fn pod(name: &str, namespace: &str, annotations: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "annotations": annotations},
        // Said, because not every API server has its admission plug-in for accounts on.
        "spec": {"serviceAccountName": "default", "containers": [{"name": "app", "image": "app:1"}]},
    })
}

#[test]
fn what_a_person_sees_with_kubectl() {
    let Some(kubectl) = Kubectl::found() else {
        return;
    };
    for name in NAMESPACES {
        let namespace = kubectl.get("namespace", "", name);
        let is_ours = namespace.is_null() || namespace["metadata"]["labels"][LABEL] == "true";
        assert!(
            is_ours,
            "this cluster has a namespace {name} that is not the test's"
        );
    }
    kubectl.clean();
    let mut mesh = Mesh::start(kubectl);
    let kubectl = mesh.kubectl.clone();

    // Validation: refused with the reason, doubts are warnings, what is good gets its status.
    let said = kubectl.try_apply(&rule("bad", wrong())).unwrap_err();
    assert!(
        said.contains("spec.trafficPolicy.outlierDetection.interval: 100us is less than 1ms"),
        "{said}"
    );
    let doubtful = json!({"host": "cart", "trafficPolicy": {"proxyProtocol": {"version": "V2"}}});
    let said = kubectl.try_apply(&rule("cart", doubtful)).unwrap();
    assert!(
        said.contains("Warning: spec.trafficPolicy.proxyProtocol: not supported"),
        "{said}"
    );
    kubectl.run(&[
        "wait",
        "-n",
        "shop",
        "--for=condition=Accepted",
        "--timeout=30s",
        "destinationrule/cart",
    ]);
    kubectl.apply(&rule("cart", json!({"host": "cart2"})));
    until("the status is about the newest generation", || {
        let rule = kubectl.get("destinationrule", "shop", "cart");
        (rule["status"]["observedGeneration"] == rule["metadata"]["generation"]).then_some(())
    });
    // From before the webhook.
    let wrong = until("it is told that it is wrong", || mesh.accepted("wrong"));
    assert_eq!(
        (&wrong["status"], &wrong["reason"]),
        (&json!("False"), &json!("Invalid"))
    );
    let handler = json!({
        "apiVersion": "config.istio.io/v1alpha2", "kind": "handler", "metadata": {"name": "h", "namespace": "shop"},
        "spec": {"compiledAdapter": "denier", "params": {}},
    });
    kubectl.apply(&handler);
    until("Mixer's kinds have a status, too", || {
        let found = kubectl.get("handlers.config.istio.io", "shop", "h");
        (found["status"]["conditions"][0]["type"] == "Accepted").then_some(())
    });

    // Gateway API: the class is ours, the gateway and its route are told what became of them.
    let class = json!({"controllerName": "istio.io/gateway-controller"});
    kubectl.apply(&gateway_object("GatewayClass", "", "lateen-test", class));
    let gateway = json!({
        "gatewayClassName": "lateen-test",
        "listeners": [{"name": "http", "port": 80, "protocol": "HTTP", "allowedRoutes": {"namespaces": {"from": "Same"}}}],
    });
    kubectl.apply(&gateway_object("Gateway", "shop", "edge", gateway));
    let route = json!({
        "parentRefs": [{"name": "edge"}],
        "rules": [{"backendRefs": [{"name": "nobody", "port": 80}]}],
    });
    kubectl.apply(&gateway_object("HTTPRoute", "shop", "cart", route));
    for what in ["gatewayclass/lateen-test", "gateway/edge"] {
        let what = what.replace('/', ".gateway.networking.k8s.io/");
        kubectl.run(&[
            "wait",
            "-n",
            "shop",
            "--for=condition=Accepted",
            "--timeout=30s",
            &what,
        ]);
    }
    let resolved = until("the route is told", || {
        let route = kubectl.get("httproute", "shop", "cart");
        let parent = route["status"]["parents"].as_array()?.first()?.clone();
        let all = parent["conditions"].as_array()?.clone();
        all.into_iter().find(|one| one["type"] == "ResolvedRefs")
    });
    assert_eq!(
        (&resolved["status"], &resolved["observedGeneration"]),
        (&json!("False"), &json!(1)),
        "{resolved}"
    );

    // Injection: where the namespace asks for it.
    kubectl.run(&[
        "label",
        "namespace",
        "shop",
        "istio-injection=enabled",
        "--overwrite",
    ]);
    kubectl.apply(&pod("cart", "shop", json!({})));
    let containers = |name: &str, namespace: &str| {
        let pod = kubectl.get("pod", namespace, name);
        let all = pod["spec"]["containers"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        all.iter()
            .map(|one| one["name"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(containers("cart", "shop"), ["app", "istio-proxy"]);
    kubectl.apply(&pod("cart", "plain", json!({})));
    assert_eq!(containers("cart", "plain"), ["app"]);
    let mut copy = kubectl.get("pod", "shop", "cart");
    copy["metadata"] = json!({
        "name": "copy", "namespace": "shop", "annotations": copy["metadata"]["annotations"], "labels": copy["metadata"]["labels"],
    });
    kubectl.apply(&copy);
    assert_eq!(
        containers("copy", "shop"),
        ["app", "istio-proxy"],
        "once is enough"
    );
    let magic = pod(
        "magic",
        "shop",
        json!({"sidecar.istio.io/interceptionMode": "MAGIC"}),
    );
    let said = kubectl.try_apply(&magic).unwrap_err();
    assert!(
        said.contains("no sidecar can be made for pod shop/magic: annotation sidecar.istio.io/interceptionMode"),
        "{said}"
    );
    for number in 0..2 {
        until("the early pod is found", || {
            (mesh.metric(number, "pilot_pods_without_sidecar") == Some(1)).then_some(())
        });
    }
    let listed = page(mesh.pilots[0].1, "/debug/injection").unwrap();
    assert!(
        listed.contains("\"early\"") && !listed.contains("\"cart\""),
        "{listed}"
    );

    // Auth's part: roots in every namespace.
    until("the roots are there", || {
        let map = kubectl.get("configmap", "shop", "istio-ca-root-cert");
        map["data"]["root-cert.pem"].as_str().map(drop)
    });

    // One leads. It dies, and the other goes on.
    let leader = mesh.leader();
    assert_eq!(mesh.metric(1 - leader, "pilot_leader"), Some(0));
    let before = kubectl.get("lease", "lateen-system", "lateen-leader");
    mesh.pilots[leader].0.crash().unwrap();
    let (survivor, _) = (&mesh.pilots[1 - leader], mesh.pilots[leader].0.id());
    let http = survivor.1;
    let died = Instant::now();
    until("the other leads", || {
        page(http, "/metrics")?
            .contains("\npilot_leader 1\n")
            .then_some(())
    });
    eprintln!("took over after {:?}", died.elapsed());
    let after = kubectl.get("lease", "lateen-system", "lateen-leader");
    assert_ne!(
        before["spec"]["holderIdentity"],
        after["spec"]["holderIdentity"]
    );
    assert_eq!(after["spec"]["leaseTransitions"], 1);

    // Renewed certificates: those from the start have ended meanwhile. (The dead one's address is tried first or not; the
    // API server goes on to the next.)
    let renewed = |http: u16| -> Option<()> {
        let page = page(http, "/metrics")?;
        let line = page
            .lines()
            .find(|line| line.starts_with("identity_certificates_received_total"))?;
        (line.rsplit(' ').next()?.parse::<u32>().ok()? >= 3).then_some(())
    };
    until("certificates are renewed", || renewed(http));
    until("the webhook is asked with the renewed certificate", || {
        let said = kubectl.try_apply(&rule("cart", json!({"host": "cart3"})));
        said.is_ok().then_some(())
    });
    until("the status follows", || {
        let rule = kubectl.get("destinationrule", "shop", "cart");
        (rule["status"]["observedGeneration"] == rule["metadata"]["generation"]).then_some(())
    });

    // Rights: nothing was asked for that is not in the page, and nothing else would have been granted.
    for process in [&mesh.auth, &mesh.pilots[0].0, &mesh.pilots[1].0] {
        let output = process.output();
        assert!(
            !output.contains("forbidden"),
            "{}: {output}",
            process.name()
        );
    }
    for (who, verb, what) in [
        ("lateen-pilot", "create", "pods"),
        ("lateen-pilot", "get", "secrets"),
        (
            "lateen-pilot",
            "patch",
            "destinationrules.networking.istio.io",
        ),
        ("lateen-pilot", "delete", "leases.coordination.k8s.io"),
        (
            "lateen-pilot",
            "list",
            "mutatingwebhookconfigurations.admissionregistration.k8s.io",
        ),
        ("lateen-auth", "list", "secrets"),
        ("lateen-auth", "delete", "configmaps"),
    ] {
        assert!(!kubectl.may(who, verb, what), "{who} may {verb} {what}");
    }
    assert!(kubectl.may("lateen-pilot", "list", "pods"));
}
