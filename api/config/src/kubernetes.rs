//! The parts of Kubernetes kinds a mesh reads. Fields we do not read are skipped without a word:
//! these objects are other programs' business as well.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::mesh::MeshConfig;
use crate::object::Labels;

macro_rules! kinds {
    ($( $(#[$meta:meta])* $name:ident { $( $(#[$field_meta:meta])* $field:ident : $type:ty, )* } )*) => {$(
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default, rename_all = "camelCase")]
        pub struct $name { $( $(#[$field_meta])* pub $field: $type, )* }
    )*};
}

kinds! {
    /// A Service's spec.
    Service {
        /// Ports.
        ports: Vec<ServicePort>,
        /// Labels of its pods; empty: none.
        selector: Labels,
        /// Virtual address, `None` for headless.
        #[serde(rename = "clusterIP")] cluster_ip: String,
        /// All virtual addresses.
        #[serde(rename = "clusterIPs")] cluster_ips: Vec<String>,
        /// `ClusterIP`, `NodePort`, `LoadBalancer`, `ExternalName`.
        #[serde(rename = "type")] service_type: String,
        /// Target of an `ExternalName`.
        external_name: String,
        /// Further addresses it answers at.
        #[serde(rename = "externalIPs")] external_ips: Vec<String>,
        /// Addresses of its load balancer, from its status: IP addresses, or names.
        #[serde(skip)] load_balancer: Vec<String>,
        /// `PreferClose`, `PreferSameZone` or `PreferSameNode`.
        traffic_distribution: String,
    }

    /// A Service's port.
    ServicePort {
        /// Name; may be empty if it is the only one.
        name: String,
        /// Number.
        port: u16,
        /// `TCP` or `UDP`.
        protocol: String,
        /// Application protocol.
        app_protocol: Option<String>,
        /// Number or name on the pod; unset: the same number.
        target_port: Option<IntOrString>,
    }

    /// Who answers for a service, as Kubernetes found out.
    EndpointSlice {
        /// Addresses.
        endpoints: Vec<SliceEndpoint>,
        /// Ports, by name of the service's.
        ports: Vec<SlicePort>,
    }

    /// Addresses of one pod, or the like.
    SliceEndpoint {
        /// IP addresses.
        addresses: Vec<String>,
        /// Its state.
        conditions: SliceConditions,
        /// Machine.
        node_name: String,
        /// Zone it is in.
        zone: String,
    }

    /// State of an endpoint.
    SliceConditions {
        /// Unset: ready.
        ready: Option<bool>,
    }

    /// A port that is answered.
    SlicePort {
        /// Name of the service's port; empty for the only one.
        name: String,
        /// Number on the pod.
        port: Option<u16>,
    }

    /// A Deployment's spec.
    Deployment {
        /// Pods wanted.
        replicas: Option<u32>,
        /// Which pods are its own.
        selector: LabelSelector,
        /// Its pods.
        template: PodTemplate,
    }

    /// Labels that must match.
    LabelSelector {
        /// All of them.
        match_labels: Labels,
    }

    /// What a Deployment makes pods of.
    PodTemplate {
        /// Labels and annotations.
        metadata: TemplateMetadata,
        /// The pod.
        spec: PodSpec,
    }

    /// Metadata of a template.
    TemplateMetadata {
        /// Labels.
        labels: Labels,
        /// Annotations.
        annotations: Labels,
    }

    /// A pod: spec, status and owners.
    Pod {
        /// Spec.
        spec: PodSpec,
        /// Status.
        status: PodStatus,
        /// From its metadata.
        owner_references: Vec<OwnerReference>,
    }

    /// A pod's spec.
    PodSpec {
        /// Containers.
        containers: Vec<Container>,
        /// Account.
        service_account_name: String,
        /// Old name of the same.
        service_account: String,
        /// Machine.
        node_name: String,
        /// Whether it lives in the machine's network.
        host_network: bool,
    }

    /// A container.
    Container {
        /// Name.
        name: String,
        /// Image.
        image: String,
        /// Ports.
        ports: Vec<ContainerPort>,
        /// Environment.
        env: Vec<EnvironmentVariable>,
        /// Command.
        command: Vec<String>,
        /// Arguments.
        args: Vec<String>,
    }

    /// A container's port.
    ContainerPort {
        /// Name.
        name: String,
        /// Number.
        container_port: u16,
        /// `TCP` or `UDP`.
        protocol: String,
    }

    /// An environment variable with a plain value.
    EnvironmentVariable {
        /// Name.
        name: String,
        /// Value.
        value: String,
    }

    /// A pod's status.
    PodStatus {
        /// Address.
        #[serde(rename = "podIP")] pod_ip: String,
        /// All addresses.
        #[serde(rename = "podIPs")] pod_ips: Vec<PodIp>,
        /// `Running` and so on.
        phase: String,
        /// Conditions.
        conditions: Vec<PodCondition>,
    }

    /// One of a pod's addresses.
    PodIp {
        /// The address.
        ip: String,
    }

    /// A condition of a pod.
    PodCondition {
        /// `Ready` and so on.
        #[serde(rename = "type")] condition_type: String,
        /// `True`, `False`, `Unknown`.
        status: String,
    }

    /// Who made an object.
    OwnerReference {
        /// Version.
        api_version: String,
        /// Kind.
        kind: String,
        /// Name.
        name: String,
    }

    /// A machine; only its name and labels matter.
    Node {}

    /// A ServiceAccount; only its name matters.
    ServiceAccount {}

    /// A Namespace; only its name and labels matter.
    Namespace {}

    /// A ConfigMap.
    ConfigMap {
        /// Its texts.
        data: BTreeMap<String, String>,
        /// Key `mesh` of the ConfigMap `istio`, read.
        #[serde(skip)] mesh: Option<Box<MeshConfig>>,
    }
}

impl PodSpec {
    /// The account, `default` unless named.
    #[must_use]
    pub fn account(&self) -> &str {
        match (
            self.service_account_name.as_str(),
            self.service_account.as_str(),
        ) {
            ("", "") => "default",
            ("", old) => old,
            (name, _) => name,
        }
    }
}

impl Pod {
    /// Whether it runs and is ready; a pod without a Ready condition is taken as ready once it runs.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let ready = self
            .status
            .conditions
            .iter()
            .find(|condition| condition.condition_type == "Ready");
        matches!(self.status.phase.as_str(), "Running" | "")
            && ready.is_none_or(|condition| condition.status == "True")
            && !self.status.pod_ip.is_empty()
    }
}

/// A port by number or name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum IntOrString {
    /// Number.
    Int(u16),
    /// Name (or a number in quotes).
    String(String),
}
