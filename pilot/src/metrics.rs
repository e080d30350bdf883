//! Pilot's metrics, under Istio's names.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::encode::Kind;

/// The label `type`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TypeLabel {
    r#type: &'static str,
}

/// Labels of `pilot_xds`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct VersionLabel {
    version: &'static str,
}

/// All families; clones count into the same.
#[derive(Clone, Debug)]
pub struct Metrics {
    xds: Family<VersionLabel, Gauge>,
    pushes: Family<TypeLabel, Counter>,
    cds_reject: Counter,
    eds_reject: Counter,
    lds_reject: Counter,
    rds_reject: Counter,
    total_rejects: Family<TypeLabel, Counter>,
    expired_nonce: Family<TypeLabel, Counter>,
    write_timeout: Counter,
    refused_streams: Family<TypeLabel, Counter>,
    convergence_time: Histogram,
    push_time: Histogram,
    send_time: Histogram,
    snapshot_time: Histogram,
    debounce_time: Histogram,
    inbound_updates: Family<TypeLabel, Counter>,
    services: Gauge,
    virtual_services: Gauge,
    generation: Gauge<u64, AtomicU64>,
    problems: Gauge,
    no_ip: Gauge,
    eds_no_instances: Gauge,
    conflicts: Gauge,
    config_size_bytes: Family<TypeLabel, Counter>,
}

const SECONDS: [f64; 12] = [
    0.001, 0.005, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 3.0, 5.0, 10.0, 30.0,
];

impl Metrics {
    /// Makes the families and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Arc<Self> {
        let seconds = || Histogram::new(SECONDS);
        let metrics = Self {
            xds: Family::default(),
            pushes: Family::default(),
            cds_reject: Counter::default(),
            eds_reject: Counter::default(),
            lds_reject: Counter::default(),
            rds_reject: Counter::default(),
            total_rejects: Family::default(),
            expired_nonce: Family::default(),
            write_timeout: Counter::default(),
            refused_streams: Family::default(),
            convergence_time: seconds(),
            push_time: seconds(),
            send_time: seconds(),
            snapshot_time: seconds(),
            debounce_time: seconds(),
            inbound_updates: Family::default(),
            services: Gauge::default(),
            virtual_services: Gauge::default(),
            generation: Gauge::default(),
            problems: Gauge::default(),
            no_ip: Gauge::default(),
            eds_no_instances: Gauge::default(),
            conflicts: Gauge::default(),
            config_size_bytes: Family::default(),
        };
        let m = &metrics;
        registry.register(
            "pilot_xds",
            "Endpoints connected to this pilot using XDS",
            m.xds.clone(),
        );
        registry.register(
            "pilot_xds_pushes",
            "Responses sent, by type",
            m.pushes.clone(),
        );
        registry.register(
            "pilot_xds_cds_reject",
            "CDS responses refused by proxies",
            m.cds_reject.clone(),
        );
        registry.register(
            "pilot_xds_eds_reject",
            "EDS responses refused by proxies",
            m.eds_reject.clone(),
        );
        registry.register(
            "pilot_xds_lds_reject",
            "LDS responses refused by proxies",
            m.lds_reject.clone(),
        );
        registry.register(
            "pilot_xds_rds_reject",
            "RDS responses refused by proxies",
            m.rds_reject.clone(),
        );
        registry.register(
            "pilot_total_xds_rejects",
            "Responses refused by proxies, by type",
            m.total_rejects.clone(),
        );
        registry.register(
            "pilot_xds_expired_nonce",
            "Requests with an outdated nonce",
            m.expired_nonce.clone(),
        );
        registry.register(
            "pilot_xds_write_timeout",
            "Streams closed because the client did not read",
            m.write_timeout.clone(),
        );
        registry.register(
            "pilot_xds_refused_streams",
            "Streams refused, by reason",
            m.refused_streams.clone(),
        );
        registry.register(
            "pilot_proxy_convergence_time",
            "Seconds from a change to its acknowledgement by a proxy",
            m.convergence_time.clone(),
        );
        registry.register(
            "pilot_xds_push_time",
            "Seconds to compute one proxy's resources",
            m.push_time.clone(),
        );
        registry.register(
            "pilot_xds_send_time",
            "Seconds to hand one response to the stream",
            m.send_time.clone(),
        );
        registry.register(
            "pilot_pushcontext_init_seconds",
            "Seconds to build a snapshot",
            m.snapshot_time.clone(),
        );
        registry.register(
            "pilot_debounce_time",
            "Seconds changes waited for quiet",
            m.debounce_time.clone(),
        );
        registry.register(
            "pilot_inbound_updates",
            "Changes received from the sources",
            m.inbound_updates.clone(),
        );
        registry.register("pilot_services", "Services known", m.services.clone());
        registry.register(
            "pilot_virt_services",
            "Virtual services known",
            m.virtual_services.clone(),
        );
        registry.register(
            "pilot_config_generation",
            "Generation of the configuration in use",
            m.generation.clone(),
        );
        registry.register(
            "pilot_config_problems",
            "Problems found in the configuration",
            m.problems.clone(),
        );
        registry.register("pilot_no_ip", "Pods without an address", m.no_ip.clone());
        registry.register(
            "pilot_eds_no_instances",
            "Service ports without endpoints",
            m.eds_no_instances.clone(),
        );
        registry.register(
            "pilot_conflicts",
            "Conflicts between configuration objects",
            m.conflicts.clone(),
        );
        registry.register(
            "pilot_xds_config_size_bytes",
            "Bytes of resources sent, by type",
            m.config_size_bytes.clone(),
        );
        Arc::new(metrics)
    }

    pub(crate) fn connected(&self) {
        self.xds
            .get_or_create(&VersionLabel {
                version: env!("CARGO_PKG_VERSION"),
            })
            .inc();
    }

    pub(crate) fn disconnected(&self) {
        self.xds
            .get_or_create(&VersionLabel {
                version: env!("CARGO_PKG_VERSION"),
            })
            .dec();
    }

    pub(crate) fn refused(&self, reason: &'static str) {
        self.refused_streams
            .get_or_create(&TypeLabel { r#type: reason })
            .inc();
    }

    pub(crate) fn sent(&self, kind: &Kind, bytes: usize, seconds: f64) {
        self.pushes.get_or_create(&label(kind)).inc();
        self.config_size_bytes
            .get_or_create(&label(kind))
            .inc_by(bytes as u64);
        self.send_time.observe(seconds);
    }

    pub(crate) fn write_timed_out(&self) {
        self.write_timeout.inc();
    }

    pub(crate) fn rejected(&self, kind: &Kind) {
        self.total_rejects.get_or_create(&label(kind)).inc();
        match kind {
            Kind::Cluster => _ = self.cds_reject.inc(),
            Kind::Endpoint => _ = self.eds_reject.inc(),
            Kind::Listener => _ = self.lds_reject.inc(),
            Kind::Route => _ = self.rds_reject.inc(),
            Kind::Secret | Kind::Extension | Kind::Generic(_) => {}
        }
    }

    pub(crate) fn stale(&self, kind: &Kind) {
        self.expired_nonce.get_or_create(&label(kind)).inc();
    }

    pub(crate) fn converged(&self, seconds: f64) {
        self.convergence_time.observe(seconds);
    }

    pub(crate) fn translated(&self, seconds: f64) {
        self.push_time.observe(seconds);
    }

    pub(crate) fn changed(&self) {
        self.inbound_updates
            .get_or_create(&TypeLabel { r#type: "config" })
            .inc();
    }

    pub(crate) fn debounced(&self, seconds: f64) {
        self.debounce_time.observe(seconds);
    }

    pub(crate) fn built(&self, snapshot: &crate::model::Snapshot, problems: usize, seconds: f64) {
        self.snapshot_time.observe(seconds);
        self.generation.set(snapshot.generation);
        self.services.set(count(snapshot.services().count()));
        self.virtual_services
            .set(count(snapshot.virtual_services().count()));
        self.problems.set(count(problems));
        self.no_ip
            .set(count(snapshot.status().pods_without_address));
        self.eds_no_instances
            .set(count(snapshot.status().ports_without_endpoints.len()));
        self.conflicts.set(count(snapshot.status().conflicts.len()));
    }
}

fn count(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Generic kinds share one label: clients choose their names.
fn label(kind: &Kind) -> TypeLabel {
    TypeLabel {
        r#type: match kind {
            Kind::Cluster => "cds",
            Kind::Endpoint => "eds",
            Kind::Listener => "lds",
            Kind::Route => "rds",
            Kind::Secret => "sds",
            Kind::Extension => "ecds",
            Kind::Generic(_) => "generic",
        },
    }
}
