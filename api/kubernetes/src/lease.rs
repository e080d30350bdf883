//! One of several: who holds a Lease (coordination.k8s.io/v1) works, the others wait.
//!
//! As Kubernetes' own components do it: a candidate takes a lease that nobody holds, or that it has not seen renewed for
//! as long as its holder promised to renew it, by its own clock; machines need not agree on the time. Updates carry the
//! resourceVersion they are based on, so of two that try only one succeeds. A holder that cannot renew stops its work
//! well before others may begin theirs.

use std::future::Future;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use prometheus_client::metrics::gauge::Gauge;
use rand::Rng as _;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::client::{ClusterArgs, ConnectError, Failure, within};

/// How long a holder that does not renew keeps others waiting. As client-go's users have it, like the next two.
const DURATION: Duration = Duration::from_secs(15);
/// A holder that could not renew for so long stops working; the rest of [`DURATION`] is for its work to end.
const RENEW_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks, of holder and candidates alike.
const RETRY: Duration = Duration::from_secs(2);

/// A candidate for one lease.
pub struct Candidate {
    leases: Api<Lease>,
    name: String,
    identity: String,
    leading: Gauge,
}

impl std::fmt::Debug for Candidate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Candidate")
            .field("name", &self.name)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// What a candidate has seen of somebody else's lease.
struct Seen {
    version: Option<String>,
    since: Instant,
}

/// What one try came to.
enum Try {
    Held(Box<Lease>),
    /// By whom, if that is known.
    Others(Option<String>),
}

impl Candidate {
    /// `program` is a name for people; who it is for the lease is made unique. `None` when no flag names a cluster.
    ///
    /// # Errors
    /// The cluster's credentials cannot be used; nothing is asked yet.
    pub async fn new(
        args: &ClusterArgs,
        namespace: &str,
        name: &str,
        program: &str,
        leading: Gauge,
    ) -> Result<Option<Self>, ConnectError> {
        // A program that was killed and started again must not take itself for its predecessor, whose work may still be
        // under way at the API server.
        let number: u64 = rand::rng().random();
        let client = args.client().await?;
        Ok(client.map(|client| Self {
            leases: Api::namespaced(client, namespace),
            name: name.to_owned(),
            identity: format!("{program}_{number:016x}"),
            leading,
        }))
    }

    /// Who it is in the lease's `holderIdentity`.
    #[must_use]
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Runs `work` whenever it holds the lease; `work` is dropped when it does not any more. Until `stop`, when it gives
    /// the lease back, so that the next takes over at once.
    pub async fn lead<F, W>(&self, stop: CancellationToken, mut work: W)
    where
        F: Future<Output = ()>,
        W: FnMut() -> F,
    {
        while let Some(mut held) = stop.run_until_cancelled(self.acquire()).await {
            info!(lease = self.name, identity = self.identity, "leading");
            self.leading.set(1);
            let is_stopping = tokio::select! {
                // Dropping the others in the middle is what losing the lease means.
                () = stop.cancelled() => true,
                () = self.renew(&mut held) => false,
                () = forever(work()) => false,
            };
            self.leading.set(0);
            if is_stopping {
                self.release(held).await;
                return;
            }
            warn!(
                lease = self.name,
                "the lease could not be renewed in time; no longer leading"
            );
        }
    }

    /// Tries until it holds the lease.
    async fn acquire(&self) -> Lease {
        let mut seen = Seen {
            version: None,
            since: Instant::now(),
        };
        let mut complaint = None;
        loop {
            match self.attempt(&mut seen).await {
                Ok(Try::Held(lease)) => return *lease,
                Ok(Try::Others(holder)) => {
                    complaint = None;
                    debug!(lease = self.name, ?holder, "somebody else leads");
                }
                Err(error) if complaint.as_ref() == Some(&error) => {}
                Err(error) => {
                    warn!(lease = self.name, %error, "the lease cannot be had; trying again");
                    complaint = Some(error);
                }
            }
            let pause = RETRY.mul_f64(rand::rng().random_range(0.8..1.2));
            sleep(pause).await;
        }
    }

    async fn attempt(&self, seen: &mut Seen) -> Result<Try, Failure> {
        let found = within(self.leases.get_opt(&self.name)).await?;
        let Some(lease) = found else {
            let mut lease = Lease::default();
            lease.metadata.name = Some(self.name.clone());
            lease.spec = Some(self.spec(None));
            return match within(self.leases.create(&PostParams::default(), &lease)).await {
                Ok(held) => Ok(Try::Held(Box::new(held))),
                // Another was faster.
                Err(error) if error.code == 409 => Ok(Try::Others(None)),
                Err(error) => Err(error),
            };
        };
        if seen.version != lease.metadata.resource_version {
            seen.version.clone_from(&lease.metadata.resource_version);
            seen.since = Instant::now();
        }
        let spec = lease.spec.clone().unwrap_or_default();
        let is_free = spec.holder_identity.as_deref().unwrap_or("").is_empty();
        let promised = spec
            .lease_duration_seconds
            .and_then(|s| u64::try_from(s).ok());
        let promised = promised.map_or(DURATION, Duration::from_secs);
        if !is_free && seen.since.elapsed() < promised {
            return Ok(Try::Others(spec.holder_identity));
        }
        match self.replace(&lease, self.spec(Some(&spec))).await {
            Ok(held) => Ok(Try::Held(Box::new(held))),
            Err(error) if error.code == 409 => Ok(Try::Others(None)),
            Err(error) => Err(error),
        }
    }

    /// Renews until that has failed for too long, or somebody else has the lease.
    async fn renew(&self, held: &mut Lease) {
        let mut good_until = Instant::now() + RENEW_LIMIT;
        loop {
            sleep(RETRY).await;
            let spec = held.spec.clone().unwrap_or_default();
            let attempt = self.replace(held, self.spec(Some(&spec)));
            let begun = Instant::now();
            let done = tokio::select! {
                done = attempt => done,
                () = sleep_until(good_until) => return,
            };
            match done {
                Ok(renewed) => {
                    *held = renewed;
                    good_until = begun + RENEW_LIMIT;
                }
                Err(error) => {
                    debug!(lease = self.name, %error, "the lease is not renewed");
                    // What came of a write without an answer is only to be seen.
                    match within(self.leases.get_opt(&self.name)).await {
                        Ok(Some(now)) if self.is_mine(&now) => *held = now,
                        // Taken, or deleted: whoever did that does not wait for us.
                        Ok(_) => return,
                        Err(_) if Instant::now() >= good_until => return,
                        Err(_) => {}
                    }
                }
            }
        }
    }

    fn is_mine(&self, lease: &Lease) -> bool {
        let holder = lease
            .spec
            .as_ref()
            .and_then(|spec| spec.holder_identity.as_ref());
        holder == Some(&self.identity)
    }

    /// Gives it back. If that fails, the others wait until it has run out.
    async fn release(&self, held: Lease) {
        let mut spec = held.spec.clone().unwrap_or_default();
        spec.holder_identity = Some(String::new());
        spec.lease_duration_seconds = Some(1);
        let mut given = self.replace(&held, spec.clone()).await;
        if matches!(&given, Err(error) if error.code == 409) {
            // A renewal that was under way has gone through.
            given = match within(self.leases.get(&self.name)).await {
                Ok(now) if self.is_mine(&now) => self.replace(&now, spec).await,
                Ok(_) => return,
                Err(error) => Err(error),
            };
        }
        match given {
            Ok(_) => info!(lease = self.name, "the lease is given back"),
            Err(error) => {
                warn!(lease = self.name, %error, "the lease is not given back; it runs out")
            }
        }
    }

    async fn replace(&self, lease: &Lease, spec: LeaseSpec) -> Result<Lease, Failure> {
        let mut lease = lease.clone();
        lease.spec = Some(spec);
        within(
            self.leases
                .replace(&self.name, &PostParams::default(), &lease),
        )
        .await
    }

    fn spec(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = Some(MicroTime(Timestamp::now()));
        let is_ours = before.and_then(|spec| spec.holder_identity.as_ref()) == Some(&self.identity);
        let transitions = before.and_then(|spec| spec.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: match before.filter(|_| is_ours) {
                Some(before) => before.acquire_time.clone(),
                None => now.clone(),
            },
            renew_time: now,
            lease_transitions: Some(match is_ours || before.is_none() {
                true => transitions,
                false => transitions.saturating_add(1),
            }),
            ..LeaseSpec::default()
        }
    }
}

/// The work of a leader has no end of its own: if it ends all the same, the lease is kept.
async fn forever(work: impl Future<Output = ()>) {
    work.await;
    std::future::pending().await
}
