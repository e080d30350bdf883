//! Who writes to a cluster, and what, against an API server in process.
#![cfg(test)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lateen_kubernetes::testing::ApiServer;
use lateen_kubernetes::{BundleMetrics, Bundles, Candidate, ClusterArgs, WebhookKind};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// A lease runs out after 15 s, and is looked at every 2 s.
const SOON: Duration = Duration::from_secs(40);

struct Cluster {
    server: ApiServer,
    args: ClusterArgs,
    _folder: TempDir,
}

impl Cluster {
    async fn start() -> Self {
        let server = ApiServer::start().await;
        let folder = tempfile::tempdir().unwrap();
        let args = ClusterArgs {
            kubeconfig: Some(server.kubeconfig(folder.path())),
            ..ClusterArgs::default()
        };
        Self {
            server,
            args,
            _folder: folder,
        }
    }

    fn holder(&self) -> Option<String> {
        let lease = self
            .server
            .object("coordination.k8s.io", "leases", "mesh", "leader")?;
        Some(lease["spec"]["holderIdentity"].as_str()?.to_owned())
    }
}

/// One of several programs.
struct Program {
    identity: String,
    leading: Gauge,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Program {
    /// `at_work` counts those that work at this moment, `most` remembers the most there ever were.
    async fn start(cluster: &Cluster, at_work: &Arc<AtomicUsize>, most: &Arc<AtomicUsize>) -> Self {
        let leading = Gauge::default();
        let candidate = Candidate::new(&cluster.args, "mesh", "leader", "p", leading.clone())
            .await
            .unwrap()
            .unwrap();
        let identity = candidate.identity().to_owned();
        let stop = CancellationToken::new();
        let (stopping, at_work, most) = (stop.clone(), at_work.clone(), most.clone());
        let task = tokio::spawn(async move {
            let work = || async {
                let _place = Place::take(&at_work, &most);
                std::future::pending::<()>().await;
            };
            candidate.lead(stopping, work).await;
        });
        Self {
            identity,
            leading,
            stop,
            task,
        }
    }
}

/// Somebody at work; leaves when dropped.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(at_work: &Arc<AtomicUsize>, most: &AtomicUsize) -> Self {
        let now = at_work.fetch_add(1, Ordering::SeqCst) + 1;
        most.fetch_max(now, Ordering::SeqCst);
        Self(at_work.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn until(what: impl Fn() -> bool) -> Duration {
    let begun = Instant::now();
    let met = async {
        while !what() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(SOON, met).await.expect("in time");
    begun.elapsed()
}

#[tokio::test]
async fn one_works_and_the_next_takes_over() {
    let cluster = Cluster::start().await;
    let (at_work, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut programs = Vec::new();
    for _ in 0..3 {
        programs.push(Program::start(&cluster, &at_work, &most).await);
    }
    let leader = |programs: &[Program]| programs.iter().position(|one| one.leading.get() == 1);
    until(|| leader(&programs).is_some()).await;
    let first = programs.remove(leader(&programs).unwrap());
    assert_eq!(cluster.holder().as_ref(), Some(&first.identity));

    // It stops in order: the lease is given back, and the next has it after its next look.
    first.stop.cancel();
    first.task.await.unwrap();
    assert_eq!(first.leading.get(), 0);
    assert!(until(|| leader(&programs).is_some()).await < Duration::from_secs(5));
    let second = programs.remove(leader(&programs).unwrap());
    assert_eq!(cluster.holder().as_ref(), Some(&second.identity));

    // It dies: the lease has to run out.
    second.task.abort();
    let waited = until(|| leader(&programs).is_some()).await;
    assert!(waited > Duration::from_secs(12), "{waited:?}");
    assert_eq!(cluster.holder().as_ref(), Some(&programs[0].identity));
    assert_eq!(most.load(Ordering::SeqCst), 1, "never two at once");
    let lease = cluster
        .server
        .object("coordination.k8s.io", "leases", "mesh", "leader")
        .unwrap();
    assert_eq!(lease["spec"]["leaseTransitions"], 2);
    assert_eq!(lease["spec"]["leaseDurationSeconds"], 15);
}

#[tokio::test]
async fn who_cannot_renew_stops_before_others_begin() {
    let cluster = Cluster::start().await;
    let (at_work, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let program = Program::start(&cluster, &at_work, &most).await;
    until(|| at_work.load(Ordering::SeqCst) == 1).await;
    cluster.server.stop();
    let waited = until(|| at_work.load(Ordering::SeqCst) == 0).await;
    assert!(waited < Duration::from_secs(15), "{waited:?}");
    assert_eq!(program.leading.get(), 0);
    // And it works again when the API server does: nobody took the lease meanwhile.
    cluster.server.restart().await;
    until(|| program.leading.get() == 1).await;

    // Somebody takes it away, as `kubectl edit` can.
    let mut lease = cluster
        .server
        .object("coordination.k8s.io", "leases", "mesh", "leader")
        .unwrap();
    lease["spec"]["holderIdentity"] = json!("another");
    cluster.server.apply(lease);
    let waited = until(|| at_work.load(Ordering::SeqCst) == 0).await;
    assert!(waited < Duration::from_secs(5), "{waited:?}");
    program.stop.cancel();
    program.task.await.unwrap();
    assert_eq!(cluster.holder().as_deref(), Some("another"));
}

#[tokio::test]
async fn webhooks_are_checked_by_the_newest_roots() {
    let cluster = Cluster::start().await;
    let configuration = |kind: &str, name: &str| {
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": {"name": name},
            "webhooks": [
                {"name": "a", "clientConfig": {"service": {"name": "p"}}, "sideEffects": "None"},
                {"name": "b", "clientConfig": {"url": "https://p", "caBundle": "b2xk"}},
            ],
        })
    };
    let configurations = vec![
        (WebhookKind::Mutating, "injector".to_owned()),
        (WebhookKind::Validating, "validator".to_owned()),
    ];
    let mut registry = Registry::default();
    let metrics = BundleMetrics::new(&mut registry);
    let bundles = Bundles::new(&cluster.args, configurations, metrics)
        .await
        .unwrap()
        .unwrap();
    let (roots, kept) = watch::channel(None);
    let task = tokio::spawn(async move { bundles.keep(kept).await });
    let server = &cluster.server;
    server.apply(configuration("ValidatingWebhookConfiguration", "validator"));
    // Another's is left alone.
    server.apply(configuration("ValidatingWebhookConfiguration", "another"));
    let found = |plural: &str, name: &str| {
        let group = "admissionregistration.k8s.io";
        let object = server
            .object(group, plural, "", name)
            .unwrap_or(Value::Null);
        [0, 1].map(|at| object["webhooks"][at]["clientConfig"]["caBundle"].clone())
    };
    roots.send_replace(Some("one".to_owned()));
    until(|| {
        found("validatingwebhookconfigurations", "validator") == [json!("b25l"), json!("b25l")]
    })
    .await;
    // One that comes later, and one that is applied anew, without what was written.
    server.apply(configuration("MutatingWebhookConfiguration", "injector"));
    server.apply(configuration("ValidatingWebhookConfiguration", "validator"));
    for plural in [
        "mutatingwebhookconfigurations",
        "validatingwebhookconfigurations",
    ] {
        let name = if plural.starts_with('m') {
            "injector"
        } else {
            "validator"
        };
        until(|| found(plural, name) == [json!("b25l"), json!("b25l")]).await;
    }
    let injector = server
        .object(
            "admissionregistration.k8s.io",
            "mutatingwebhookconfigurations",
            "",
            "injector",
        )
        .unwrap();
    assert_eq!(
        injector["webhooks"][0]["sideEffects"], "None",
        "all else stays"
    );
    // The roots change: at once, not at the next round.
    let writes = || {
        server
            .requests()
            .iter()
            .filter(|one| one.starts_with("PATCH"))
            .count()
    };
    let before = writes();
    roots.send_replace(Some("two".to_owned()));
    let waited = until(|| {
        found("mutatingwebhookconfigurations", "injector") == [json!("dHdv"), json!("dHdv")]
    })
    .await;
    assert!(waited < Duration::from_secs(3), "{waited:?}");
    until(|| found("validatingwebhookconfigurations", "validator")[0] == json!("dHdv")).await;
    // Another round later nothing more is written: two configurations, a write each.
    let looks = || {
        server
            .requests()
            .iter()
            .filter(|one| one.ends_with("/injector"))
            .count()
    };
    let so_far = looks();
    until(|| looks() >= so_far + 2).await;
    assert_eq!(writes() - before, 2);
    assert_eq!(
        found("validatingwebhookconfigurations", "another"),
        [Value::Null, json!("b2xk")]
    );
    task.abort();
}
