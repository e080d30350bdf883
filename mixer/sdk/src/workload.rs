//! The workload view: who runs where, as the control plane knows it.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

/// One running copy of a workload (in Kubernetes: a pod).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// `kubernetes://POD.NAMESPACE`.
    pub uid: String,
    /// Its address.
    pub ip: Option<IpAddr>,
    /// Address of its machine.
    pub host_ip: Option<IpAddr>,
    /// Name of the pod.
    pub name: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Labels of the pod.
    pub labels: BTreeMap<String, String>,
    /// Service account it runs as.
    pub service_account: String,
    /// Name of what owns it in the end (a Deployment), or its own.
    pub workload_name: String,
    /// Namespace of what owns it.
    pub workload_namespace: String,
    /// `kubernetes://apis/apps/v1/namespaces/NS/deployments/NAME`.
    pub owner: String,
    /// Services that select it.
    pub services: Vec<String>,
    /// What runs in it.
    pub containers: Vec<Container>,
}

/// A container of a workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// Ports it listens on.
    pub ports: Vec<u16>,
}

impl Workload {
    /// `istio://NAMESPACE/workloads/NAME`.
    pub fn workload_uid(&self) -> String {
        format!(
            "istio://{}/workloads/{}",
            self.workload_namespace, self.workload_name
        )
    }

    /// Name of the container that listens on `port`.
    pub fn container_on(&self, port: i64) -> Option<&str> {
        self.containers
            .iter()
            .find(|c| c.ports.iter().any(|p| i64::from(*p) == port))
            .map(|c| c.name.as_str())
    }
}

/// Looks workloads up. Lookups never block.
pub trait Workloads: Send + Sync {
    /// The workload with this uid.
    fn by_uid(&self, uid: &str) -> Option<Arc<Workload>>;
    /// The workload with this address.
    fn by_ip(&self, ip: IpAddr) -> Option<Arc<Workload>>;
}

/// A view of nothing.
#[derive(Clone, Copy, Debug)]
pub struct NoWorkloads;

impl Workloads for NoWorkloads {
    fn by_uid(&self, _uid: &str) -> Option<Arc<Workload>> {
        None
    }

    fn by_ip(&self, _ip: IpAddr) -> Option<Arc<Workload>> {
        None
    }
}
