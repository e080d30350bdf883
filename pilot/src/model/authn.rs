//! Whether a workload demands mesh mTLS: PeerAuthentication, and the older Policy and MeshPolicy; and which tokens
//! of end users the older kinds demand.
//!
//! Workload before namespace before mesh; at each level the oldest wins; a port's mode is that of the
//! workload's policy alone. Where no PeerAuthentication says anything, the older kinds are asked.

use std::collections::BTreeMap;
use std::sync::Arc;

use lateen_config::security::{AuthenticationPolicy, MutualTlsMode, PeerAuthentication};
use lateen_config::{MeshConfig, Object, Spec};

use super::service::{Labels, Service, Target, selects};

/// All policies about peers, by scope.
#[derive(Debug, Default)]
pub(super) struct Policies {
    mesh: Option<MutualTlsMode>,
    namespaces: BTreeMap<String, MutualTlsMode>,
    workloads: BTreeMap<String, Vec<Arc<Object>>>,
    old_mesh: Option<Arc<Object>>,
    old_namespaces: BTreeMap<String, Arc<Object>>,
    old_services: BTreeMap<String, Vec<Arc<Object>>>,
}

impl Policies {
    pub(super) fn read(objects: &[Arc<Object>], mesh: &MeshConfig) -> Self {
        let mut all = Self::default();
        for object in objects {
            let namespace = object.key.namespace.to_string();
            match &object.spec {
                Spec::PeerAuthentication(policy) => match policy.labels() {
                    // With a selector in the root namespace it is for nobody (Istio).
                    Some(_) if namespace == mesh.root_namespace => {}
                    Some(_) => all
                        .workloads
                        .entry(namespace)
                        .or_default()
                        .push(object.clone()),
                    None if namespace == mesh.root_namespace => {
                        all.mesh.get_or_insert(policy.mode());
                    }
                    None => {
                        all.namespaces.entry(namespace).or_insert(policy.mode());
                    }
                },
                Spec::AuthenticationPolicy(policy) => {
                    if namespace.is_empty() || &*object.key.kind == "MeshPolicy" {
                        all.old_mesh.get_or_insert_with(|| object.clone());
                    } else if policy.targets.is_empty() {
                        all.old_namespaces
                            .entry(namespace)
                            .or_insert_with(|| object.clone());
                    } else {
                        all.old_services
                            .entry(namespace)
                            .or_default()
                            .push(object.clone());
                    }
                }
                _ => {}
            }
        }
        all
    }

    /// The mode of one port of one workload; `services` are those that select it.
    pub(super) fn mode(
        &self,
        namespace: &str,
        labels: &Labels,
        workload_port: u16,
        services: impl FnOnce() -> Vec<Arc<Service>>,
    ) -> MutualTlsMode {
        let own = self.own_policy(namespace, labels);
        let said = [
            own.and_then(|policy| policy.port_level_mtls.get(&workload_port))
                .map(|tls| tls.mode),
            own.map(PeerAuthentication::mode),
            self.namespaces.get(namespace).copied(),
            self.mesh,
        ];
        if let Some(mode) = said
            .into_iter()
            .flatten()
            .find(|mode| *mode != MutualTlsMode::Unset)
        {
            return mode;
        }
        self.old_policy(namespace, Some(workload_port), services)
            .map_or(MutualTlsMode::Permissive, |(_, policy)| policy.mode())
    }

    /// Ports for which a workload's own policy says a mode.
    pub(super) fn own_ports(&self, namespace: &str, labels: &Labels) -> Vec<u16> {
        self.own_policy(namespace, labels)
            .into_iter()
            .flat_map(|policy| &policy.port_level_mtls)
            .filter(|(_, tls)| tls.mode != MutualTlsMode::Unset)
            .map(|(port, _)| *port)
            .collect()
    }

    fn own_policy(&self, namespace: &str, labels: &Labels) -> Option<&PeerAuthentication> {
        self.workloads
            .get(namespace)?
            .iter()
            .find_map(|object| match &object.spec {
                Spec::PeerAuthentication(policy)
                    if policy
                        .labels()
                        .is_some_and(|selector| selects(selector, labels)) =>
                {
                    Some(policy)
                }
                _ => None,
            })
    }

    /// The older Policy or MeshPolicy that holds for a port of a workload; without a port, for any of them.
    pub(super) fn old_policy(
        &self,
        namespace: &str,
        workload_port: Option<u16>,
        services: impl FnOnce() -> Vec<Arc<Service>>,
    ) -> Option<(&Object, &AuthenticationPolicy)> {
        let of_service = self.old_services.get(namespace).and_then(|policies| {
            let services = services();
            policies.iter().find(|object| match &object.spec {
                Spec::AuthenticationPolicy(policy) => services
                    .iter()
                    .any(|service| targets(policy, service, workload_port)),
                _ => false,
            })
        });
        let object = of_service
            .or_else(|| self.old_namespaces.get(namespace))
            .or(self.old_mesh.as_ref())?;
        match &object.spec {
            Spec::AuthenticationPolicy(policy) => Some((object, policy)),
            _ => None,
        }
    }
}

/// Whether a Policy is for the port of a service that leads to that port of the workload.
fn targets(policy: &AuthenticationPolicy, service: &Service, workload_port: Option<u16>) -> bool {
    policy
        .targets
        .iter()
        .filter(|target| target.name == service.name)
        .any(|target| {
            target.ports.is_empty()
                || target.ports.iter().any(|wanted| {
                    service.ports.iter().any(|port| {
                        let leads = match port.target {
                            Target::Number(number) => {
                                workload_port.is_none_or(|workload_port| number == workload_port)
                            }
                            // Not resolved here; the safe reading is that it is meant.
                            Target::Named(_) => true,
                        };
                        leads
                            && (wanted.number == Some(port.number)
                                || wanted.name.as_deref().is_some_and(|name| name == port.name))
                    })
                })
        })
}
