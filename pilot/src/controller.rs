//! What Pilot does in a cluster beside reading it. One of several Pilots, by a lease, writes: statuses of objects
//! ([`status`]) and the roots by which API servers check the webhooks (`lateen_kubernetes::Bundles`). Every one counts the
//! pods without a sidecar ([`naked`]), for that only reads.

pub mod naked;
pub mod status;

use std::sync::Arc;

use lateen_kubernetes::{
    BundleMetrics, Bundles, Candidate, ClusterArgs, ConnectError, Observed, Statuses, WebhookKind,
};
use lateen_service::prometheus_client::metrics::gauge::Gauge;
use lateen_service::prometheus_client::registry::Registry;
use lateen_service::shutdown::Drain;
use tokio::sync::watch;

use crate::push::Source;
use crate::serve::Served;

/// Flags.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ControllerArgs {
    /// Write to the cluster: statuses of objects, and the roots of the webhooks to their configurations. Of several Pilots
    /// the one that holds the lease does.
    #[arg(long)]
    pub controllers: bool,
    /// The lease.
    #[arg(
        long,
        value_name = "NAMESPACE/NAME",
        default_value = "lateen-system/lateen-leader",
        value_parser = lease
    )]
    pub lease: Lease,
    /// MutatingWebhookConfiguration of /inject.
    #[arg(long, value_name = "NAME", default_value = "lateen-sidecar-injector")]
    pub injector_configuration: String,
    /// ValidatingWebhookConfiguration of /validate.
    #[arg(long, value_name = "NAME", default_value = "lateen-validator")]
    pub validator_configuration: String,
}

/// Which lease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lease {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

fn lease(text: &str) -> Result<Lease, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Ok(Lease {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }),
        _ => Err(format!("{text:?} is not NAMESPACE/NAME")),
    }
}

/// What the leader writes, and from what.
#[derive(Debug)]
pub struct Controllers {
    candidate: Candidate,
    bundles: Bundles,
    /// `None`: this Pilot serves no webhooks.
    roots: Option<watch::Receiver<Option<String>>>,
    statuses: Statuses,
    observed: Observed,
}

impl Controllers {
    /// By the flags. `None` if they ask for none, or name no cluster.
    ///
    /// # Errors
    /// The cluster's credentials cannot be used; nothing is asked yet.
    pub async fn new(
        args: &ControllerArgs,
        cluster: &ClusterArgs,
        observed: Observed,
        roots: Option<watch::Receiver<Option<String>>>,
        registry: &mut Registry,
    ) -> Result<Option<Self>, ConnectError> {
        if !args.controllers {
            return Ok(None);
        }
        let leading = Gauge::default();
        registry.register(
            "pilot_leader",
            "1 while this Pilot is the one that writes to the cluster, else 0",
            leading.clone(),
        );
        let Lease { namespace, name } = &args.lease;
        let candidate = Candidate::new(cluster, namespace, name, &program(), leading).await?;
        let configurations = vec![
            (WebhookKind::Mutating, args.injector_configuration.clone()),
            (
                WebhookKind::Validating,
                args.validator_configuration.clone(),
            ),
        ];
        let bundles = Bundles::new(cluster, configurations, BundleMetrics::new(registry)).await?;
        let statuses =
            Statuses::new(cluster, observed.clone(), &status::CONTROLLERS, registry).await?;
        Ok(candidate
            .zip(bundles)
            .zip(statuses)
            .map(|((candidate, bundles), statuses)| Self {
                candidate,
                bundles,
                roots,
                statuses,
                observed,
            }))
    }

    /// Works until the drain stops, and hands over then.
    pub fn run(self, source: Source, served: watch::Receiver<Option<Arc<Served>>>, drain: &Drain) {
        let stop = drain.token();
        drain.spawn(async move {
            let this = &self;
            let work = || async {
                let bundles = async {
                    match &this.roots {
                        Some(roots) => this.bundles.keep(roots.clone()).await,
                        None => std::future::pending().await,
                    }
                };
                let (source, served) = (source.clone(), served.clone());
                let statuses = status::keep(&this.statuses, &this.observed, source, served);
                // Boxed, and so is the whole: requests of `kube` make large futures.
                tokio::join!(Box::pin(bundles), Box::pin(statuses));
            };
            Box::pin(this.candidate.lead(stop, work)).await;
        });
    }
}

/// The pod's name, which is its host's.
fn program() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "pilot".to_owned(),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_has_two_names() {
        let found = lease("mesh/leader").unwrap();
        assert_eq!((&*found.namespace, &*found.name), ("mesh", "leader"));
        for bad in ["", "leader", "/leader", "mesh/"] {
            assert!(lease(bad).is_err(), "{bad}");
        }
    }
}
