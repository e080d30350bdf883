//! What a folder of Kubernetes YAML asks to run: each replica of a Deployment is one workload instance.

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::address::PodAddress;

/// The application listens this much above the port that the world sees; the sidecar has that one.
const APP_PORT_OFFSET: u16 = 10_000;

/// One replica of a Deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Name of the instance, e.g. `reviews-v1-0`.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Name of the Deployment.
    pub deployment: String,
    /// Pod labels.
    pub labels: BTreeMap<String, String>,
    /// Pod annotations.
    pub annotations: BTreeMap<String, String>,
    /// Service account.
    pub service_account: String,
    /// Ports of its containers, with their names if they have any.
    pub ports: Vec<(Option<String>, u16)>,
    /// Image of the first container.
    pub image: String,
    /// Environment of the first container.
    pub env: Vec<(String, String)>,
    /// Whether it gets a sidecar.
    pub sidecar: bool,
}

impl Workload {
    /// An instance that no Deployment describes, e.g. a test's application on `port`.
    pub fn new(name: &str, labels: &[(&str, &str)], port: u16) -> Workload {
        Workload {
            name: format!("{name}-0"),
            namespace: "default".to_owned(),
            deployment: name.to_owned(),
            labels: labels
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            annotations: BTreeMap::new(),
            service_account: "default".to_owned(),
            ports: vec![(None, port)],
            image: String::new(),
            env: Vec::new(),
            sidecar: true,
        }
    }

    /// All replicas of all Deployments in a YAML text.
    ///
    /// # Errors
    /// The text is not YAML, or a Deployment lacks what makes it runnable.
    pub fn from_yaml(text: &str) -> anyhow::Result<Vec<Workload>> {
        let documents: Vec<Value> = serde_saphyr::from_multiple(text).context("not YAML")?;
        let mut all = Vec::new();
        for document in documents.iter().filter(|d| d["kind"] == "Deployment") {
            let name = document["metadata"]["name"]
                .as_str()
                .context("a Deployment has no metadata.name")?;
            all.extend(
                replicas(name, document)
                    .with_context(|| format!("Deployment {name} is incomplete"))?,
            );
        }
        Ok(all)
    }

    /// Where the application itself listens for what comes in on `port`.
    pub fn app_port(&self, port: u16) -> u16 {
        if self.sidecar {
            port.saturating_add(APP_PORT_OFFSET)
        } else {
            port
        }
    }

    /// Its SPIFFE ID.
    pub fn identity(&self) -> String {
        format!(
            "spiffe://cluster.local/ns/{}/sa/{}",
            self.namespace, self.service_account
        )
    }

    /// The Pod object that tells Pilot where this instance is.
    pub fn pod(&self, ip: Ipv4Addr) -> Value {
        let mut labels = self.labels.clone();
        if self.sidecar {
            labels.insert("security.istio.io/tlsMode".to_owned(), "istio".to_owned());
        }
        let ports: Vec<_> = self
            .ports
            .iter()
            .map(|(name, port)| match name {
                Some(name) => json!({"containerPort": port, "name": name}),
                None => json!({"containerPort": port}),
            })
            .collect();
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name,
                "namespace": self.namespace,
                "labels": labels,
                "annotations": self.annotations,
                "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "Deployment", "name": self.deployment,
                    "uid": self.deployment, "controller": true,
                }],
            },
            "spec": {
                "serviceAccountName": self.service_account,
                "containers": [{"name": "app", "image": self.image, "ports": ports}],
            },
            "status": {
                "phase": "Running",
                "podIP": ip.to_string(),
                "podIPs": [{"ip": ip.to_string()}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        })
    }

    /// The arguments and environment of the local program that stands for its image.
    ///
    /// # Errors
    /// The image is none of ours.
    pub fn program(&self, address: PodAddress, http_proxy_port: u16) -> anyhow::Result<Program> {
        let image = self.image.rsplit('/').next().unwrap_or_default();
        let image = image.split([':', '@']).next().unwrap_or_default();
        let service = image
            .strip_prefix("examples-bookinfo-")
            .and_then(|rest| rest.split('-').next())
            .filter(|s| ["productpage", "details", "reviews", "ratings"].contains(s))
            .with_context(|| {
                format!(
                    "no local program stands for the image {:?} of {}; there are examples-bookinfo-{{productpage,details,reviews,ratings}}-VERSION",
                    self.image, self.name
                )
            })?;
        let (_, port) = self.ports.first().context("the workload has no port")?;
        let mut env = vec![
            ("BIND".to_owned(), address.ip.to_string()),
            ("PORT".to_owned(), self.app_port(*port).to_string()),
        ];
        if let Some(version) = self.labels.get("version") {
            env.push(("SERVICE_VERSION".to_owned(), version.clone()));
        }
        if self.sidecar {
            env.push((
                "HTTP_PROXY".to_owned(),
                format!("http://{}:{http_proxy_port}", address.outbound),
            ));
        }
        env.extend(self.env.iter().cloned());
        Ok(Program {
            name: "bookinfo",
            args: vec![service.to_owned()],
            env,
        })
    }
}

/// A local program that stands for a container image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// File name of the program.
    pub name: &'static str,
    /// Arguments.
    pub args: Vec<String>,
    /// Environment.
    pub env: Vec<(String, String)>,
}

fn replicas(name: &str, deployment: &Value) -> anyhow::Result<Vec<Workload>> {
    let template = &deployment["spec"]["template"];
    let container = &template["spec"]["containers"][0];
    let ports = container["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|port| {
            let number = port["containerPort"]
                .as_u64()
                .and_then(|n| u16::try_from(n).ok())
                .filter(|n| *n > 0)
                .context("containerPort is not a port")?;
            anyhow::Ok((port["name"].as_str().map(str::to_owned), number))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let annotations = strings(&template["metadata"]["annotations"]);
    let sidecar = annotations
        .get("sidecar.istio.io/inject")
        .is_none_or(|value| value != "false");
    let base = Workload {
        name: String::new(),
        namespace: deployment["metadata"]["namespace"]
            .as_str()
            .unwrap_or("default")
            .to_owned(),
        deployment: name.to_owned(),
        labels: strings(&template["metadata"]["labels"]),
        annotations,
        service_account: template["spec"]["serviceAccountName"]
            .as_str()
            .or(template["spec"]["serviceAccount"].as_str())
            .unwrap_or("default")
            .to_owned(),
        ports,
        image: container["image"]
            .as_str()
            .context("the first container has no image")?
            .to_owned(),
        env: container["env"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|v| {
                Some((
                    v["name"].as_str()?.to_owned(),
                    v["value"].as_str()?.to_owned(),
                ))
            })
            .collect(),
        sidecar,
    };
    let count = deployment["spec"]["replicas"].as_u64().unwrap_or(1);
    Ok((0..count)
        .map(|index| Workload {
            name: format!("{name}-{index}"),
            ..base.clone()
        })
        .collect())
}

fn strings(map: &Value) -> BTreeMap<String, String> {
    map.as_object()
        .into_iter()
        .flatten()
        .filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())))
        .collect()
}

/// The hostnames of the Services in Kubernetes YAML.
///
/// # Errors
/// The text is not YAML.
pub fn services(text: &str) -> anyhow::Result<Vec<String>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).context("not YAML")?;
    let services = documents.iter().filter(|d| d["kind"] == "Service");
    Ok(services
        .filter_map(|service| {
            let metadata = &service["metadata"];
            let namespace = metadata["namespace"].as_str().unwrap_or("default");
            Some(format!(
                "{}.{namespace}.svc.cluster.local",
                metadata["name"].as_str()?
            ))
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn bookinfo_is_six_workloads_that_can_run_here() {
        let all = Workload::from_yaml(samples::BOOKINFO).unwrap();
        let names: Vec<_> = all.iter().map(|w| w.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "details-v1-0",
                "ratings-v1-0",
                "reviews-v1-0",
                "reviews-v2-0",
                "reviews-v3-0",
                "productpage-v1-0"
            ]
        );
        let address = PodAddress {
            ip: Ipv4Addr::new(127, 2, 3, 11),
            outbound: Ipv4Addr::new(127, 2, 3, 131),
        };
        let program = all[4].program(address, 15002).unwrap();
        assert_eq!(program.args, ["reviews"]);
        let env: BTreeMap<_, _> = program.env.into_iter().collect();
        assert_eq!(env["PORT"], "19080");
        assert_eq!(env["SERVICE_VERSION"], "v3");
        assert_eq!(env["HTTP_PROXY"], "http://127.2.3.131:15002");
    }
}
