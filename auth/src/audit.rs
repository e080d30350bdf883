//! What happened, for those who must answer for it: one line in the log target `audit` and one count for
//! each request, written by the same call so that they cannot disagree.
//!
//! Fields (stable): `event` (`issued`, `refused`), `peer`, `method`, `identity`, `serial`, `not_after`,
//! `key_sha256`, `stage`, `reason`.

use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::ca::Ca;
use crate::serve::Refusal;
use crate::sign::Issued;

/// Log and metrics of issuance.
#[derive(Clone, Debug, Default)]
pub(crate) struct Audit {
    requests: Counter,
    issued: Counter,
    authentication_failed: Counter,
    csr_refused: Counter,
    authorization_failed: Counter,
    signing_failed: Counter,
    overloaded: Counter,
    root_expiry: Gauge,
}

impl Audit {
    /// Registers the metrics; names as Istio's where Istio has one.
    pub(crate) fn new(registry: &mut Registry, ca: &Ca) -> Self {
        let audit = Self::default();
        for (name, help, counter) in [
            (
                "citadel_server_csr_count",
                "Certificate requests",
                &audit.requests,
            ),
            (
                "citadel_server_success_cert_issuance_count",
                "Certificates issued",
                &audit.issued,
            ),
            (
                "citadel_server_authentication_failure_count",
                "Requests refused because nobody could be authenticated",
                &audit.authentication_failed,
            ),
            (
                "citadel_server_csr_parsing_err_count",
                "Requests refused for their CSR or life",
                &audit.csr_refused,
            ),
            (
                "auth_authorization_failure_count",
                "Requests refused although the caller was authenticated",
                &audit.authorization_failed,
            ),
            (
                "citadel_server_csr_sign_err_count",
                "Requests that could not be signed",
                &audit.signing_failed,
            ),
            (
                "auth_overload_count",
                "Requests refused because too many were under way",
                &audit.overloaded,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
        registry.register(
            "citadel_server_root_cert_expiry_timestamp",
            "Unix time at which the signing certificate ends",
            audit.root_expiry.clone(),
        );
        audit
            .root_expiry
            .set(i64::try_from(unix(ca.not_after())).unwrap_or(i64::MAX));
        audit
    }

    pub(crate) fn issued(
        &self,
        peer: Option<SocketAddr>,
        method: &str,
        issued: &Issued,
        key_hash: &str,
    ) {
        self.requests.inc();
        self.issued.inc();
        tracing::info!(
            target: "audit",
            event = "issued",
            peer = peer.map(tracing::field::display),
            method,
            identity = %issued.identity,
            serial = issued.serial,
            not_after = unix(issued.not_after),
            key_sha256 = key_hash,
            "certificate issued",
        );
    }

    pub(crate) fn refused(&self, peer: Option<SocketAddr>, refusal: &Refusal) {
        self.requests.inc();
        let (stage, counter) = match refusal {
            Refusal::Overload => ("serve", &self.overloaded),
            Refusal::Authenticate(_) => ("authenticate", &self.authentication_failed),
            Refusal::Csr(_) => ("csr", &self.csr_refused),
            Refusal::Ttl(_) => ("ttl", &self.csr_refused),
            Refusal::Authorize(_) => ("authorize", &self.authorization_failed),
            Refusal::Sign(_) => ("sign", &self.signing_failed),
        };
        counter.inc();
        tracing::warn!(
            target: "audit",
            event = "refused",
            peer = peer.map(tracing::field::display),
            stage,
            reason = refusal.reason(),
            "certificate refused",
        );
    }
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}
