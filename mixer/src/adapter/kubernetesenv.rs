//! Says who is at the two ends of a request: from uid or address to the workload's names and labels.
//!
//! It reads the workload view that Mixer gets with its configuration; it never calls a Kubernetes API
//! server, so Istio's parameters for that are accepted and have no effect.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock, Weak},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, Env, GenerateHandler, Handler, HandlerError, Info,
    Output, Value,
    instance::{GenerateInstance, Kubernetes},
    params, template, value,
    workload::{Workload, Workloads},
};
use serde::Deserialize;

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct KubernetesEnv;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[allow(dead_code, reason = "accepted so that Istio's configuration loads")]
struct Params {
    #[serde(alias = "kubeconfig_path")]
    kubeconfig_path: String,
    #[serde(
        alias = "cache_refresh_duration",
        deserialize_with = "params::duration"
    )]
    cache_refresh_duration: Duration,
    #[serde(alias = "cluster_registries_namespace")]
    cluster_registries_namespace: String,
}

impl Adapter for KubernetesEnv {
    fn info(&self) -> Info {
        Info {
            name: "kubernetesenv",
            description: "looks up the workloads at both ends of a request",
            templates: const { &[&template::KUBERNETES] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        params::parse::<Params>(candidate.params)
            .err()
            .into_iter()
            .collect()
    }

    fn build(&self, _candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        Ok(Handler::new().with_generate(Arc::new(Lookup {
            workloads: Arc::clone(env.workloads()),
            described: RwLock::default(),
        })))
    }
}

/// Workloads whose description is kept; beyond it, all are described anew.
const MAX_DESCRIBED: usize = 20_000;

struct Lookup {
    workloads: Arc<dyn Workloads>,
    /// By address of the workload. The weak reference keeps that address from being another's.
    described: RwLock<HashMap<usize, Described>>,
}

/// A workload as either end of a request.
#[derive(Clone)]
struct Described {
    workload: Weak<Workload>,
    as_source: Arc<[(&'static str, Value)]>,
    as_destination: Arc<[(&'static str, Value)]>,
}

impl GenerateHandler for Lookup {
    fn generate<'a>(
        &'a self,
        instance: GenerateInstance,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Output, HandlerError>> {
        async move {
            let GenerateInstance::Kubernetes(instance) = instance else {
                return Err(HandlerError::invalid("kubernetesenv takes kubernetes only"));
            };
            Ok(self.both_ends(&instance))
        }
        .boxed()
    }
}

impl Lookup {
    fn both_ends(&self, instance: &Kubernetes) -> Output {
        let mut output = Output::new();
        if let Some(source) = self.find(&instance.source_uid, instance.source_ip.as_ref()) {
            output.extend_from_slice(&self.described(&source).as_source);
        }
        if let Some(destination) =
            self.find(&instance.destination_uid, instance.destination_ip.as_ref())
        {
            output.extend_from_slice(&self.described(&destination).as_destination);
            if let Some(container) = destination.container_on(instance.destination_port) {
                output.push(("destination_container_name", value::string(container)));
            }
        }
        output
    }

    fn described(&self, workload: &Arc<Workload>) -> Described {
        let key = Arc::as_ptr(workload) as usize;
        {
            let known = self
                .described
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            if let Some(described) = known.get(&key) {
                return described.clone();
            }
        }
        let all_of = |end: &End| {
            let mut output = Output::new();
            describe(end, workload, &mut output);
            Arc::from(output)
        };
        let described = Described {
            workload: Arc::downgrade(workload),
            as_source: all_of(&SOURCE),
            as_destination: all_of(&DESTINATION),
        };
        let mut known = self
            .described
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_DESCRIBED {
            known.retain(|_, described| described.workload.strong_count() > 0);
        }
        if known.len() >= MAX_DESCRIBED {
            known.clear();
        }
        known.insert(key, described.clone());
        described
    }

    fn find(&self, uid: &str, ip: Option<&Value>) -> Option<Arc<Workload>> {
        if !uid.is_empty()
            && let Some(found) = self.workloads.by_uid(uid)
        {
            return Some(found);
        }
        self.workloads
            .by_ip(ip.and_then(value::ip).filter(|ip| !ip.is_unspecified())?)
    }
}

/// The names of one end's outputs.
struct End {
    pod_uid: &'static str,
    pod_ip: &'static str,
    pod_name: &'static str,
    labels: &'static str,
    namespace: &'static str,
    service_account_name: &'static str,
    host_ip: &'static str,
    workload_uid: &'static str,
    workload_name: &'static str,
    workload_namespace: &'static str,
    owner: &'static str,
}

const SOURCE: End = End {
    pod_uid: "source_pod_uid",
    pod_ip: "source_pod_ip",
    pod_name: "source_pod_name",
    labels: "source_labels",
    namespace: "source_namespace",
    service_account_name: "source_service_account_name",
    host_ip: "source_host_ip",
    workload_uid: "source_workload_uid",
    workload_name: "source_workload_name",
    workload_namespace: "source_workload_namespace",
    owner: "source_owner",
};

const DESTINATION: End = End {
    pod_uid: "destination_pod_uid",
    pod_ip: "destination_pod_ip",
    pod_name: "destination_pod_name",
    labels: "destination_labels",
    namespace: "destination_namespace",
    service_account_name: "destination_service_account_name",
    host_ip: "destination_host_ip",
    workload_uid: "destination_workload_uid",
    workload_name: "destination_workload_name",
    workload_namespace: "destination_workload_namespace",
    owner: "destination_owner",
};

fn describe(end: &End, workload: &Workload, output: &mut Output) {
    let mut text = |name: &'static str, text: &str| {
        if !text.is_empty() {
            output.push((name, value::string(text)));
        }
    };
    text(end.pod_uid, &workload.uid);
    text(end.pod_name, &workload.name);
    text(end.namespace, &workload.namespace);
    text(end.service_account_name, &workload.service_account);
    if !workload.workload_name.is_empty() {
        text(end.workload_uid, &workload.workload_uid());
    }
    text(end.workload_name, &workload.workload_name);
    text(end.workload_namespace, &workload.workload_namespace);
    text(end.owner, &workload.owner);
    let mut address = |name: &'static str, ip: Option<IpAddr>| {
        output.extend(ip.map(|ip| (name, value::address(ip))));
    };
    address(end.pod_ip, workload.ip);
    address(end.host_ip, workload.host_ip);
    output.push((
        end.labels,
        value::string_map(
            workload
                .labels
                .iter()
                .map(|(k, v)| (k.as_str(), v.as_str())),
        ),
    ));
}
