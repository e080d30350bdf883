//! From the newest configuration to the newest generation that is served: waits for quiet, builds the
//! snapshot, publishes it. One task owns this; streams follow what it publishes.

use std::sync::Arc;
use std::time::Duration;

use lateen_config::ConfigSet;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::{error, info, warn};

use crate::encode::Encoder;
use crate::generic;
use crate::metrics::Metrics;
use crate::model::Snapshot;
use crate::serve::ledger::Ledger;
use crate::serve::{EndpointChanges, Served};

/// Changes are taken together until none has come for this long: an editor's or `kubectl`'s burst is one
/// generation.
const QUIET: Duration = Duration::from_millis(20);

/// A change waits no longer than this for quiet: traffic follows within a second.
const PATIENCE: Duration = Duration::from_millis(500);

/// Between two looks whether Mixers have acknowledged the newest rules.
const LOOK: Duration = Duration::from_millis(50);

/// Where configuration comes from: a stream of whole, validated sets, newest only. Generation 0 is none yet.
pub type Source = watch::Receiver<Arc<ConfigSet>>;

/// Publishes a generation for each change of `source`, until the source ends; and once more when Mixers have
/// acknowledged its rules, for proxies may then stop asking where only older rules mattered.
pub async fn run(
    mut source: Source,
    encoder: Arc<Encoder>,
    metrics: Arc<Metrics>,
    ledger: Arc<Ledger>,
    out: watch::Sender<Option<Arc<Served>>>,
) {
    // Half of what there is would be a wrong configuration.
    if source.wait_for(|set| set.generation > 0).await.is_err() {
        return;
    }
    let mut changed_at = Instant::now();
    let mut confirmed = false;
    loop {
        let config = source.borrow_and_update().clone();
        let before = out.borrow().clone();
        let started = Instant::now();
        let work = {
            let encoder = encoder.clone();
            move || build(&config, before.as_deref(), confirmed, &encoder, changed_at)
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(served) => {
                publish(&out, served, &metrics, started);
            }
            Err(e) => {
                error!(error = %e, "the model cannot be built; the last good configuration stays")
            }
        }
        let unsettled = out
            .borrow()
            .as_ref()
            .map(|served| served.snapshot.clone())
            .filter(|snapshot| !snapshot.reach().is_settled());
        confirmed = false;
        tokio::select! {
            // Cancel-safe: a change not seen here is seen by the next call.
            changed = source.changed() => if changed.is_err() { return },
            () = rules_are_confirmed(&ledger, unsettled.as_deref()) => {
                confirmed = true;
                continue;
            }
        }
        changed_at = Instant::now();
        metrics.changed();
        wait_for_quiet(&mut source, changed_at).await;
        metrics.debounced(changed_at.elapsed().as_secs_f64());
    }
}

fn publish(
    out: &watch::Sender<Option<Arc<Served>>>,
    served: Served,
    metrics: &Metrics,
    started: Instant,
) {
    let snapshot = &served.snapshot;
    metrics.built(
        snapshot,
        served.problems.len(),
        started.elapsed().as_secs_f64(),
    );
    for problem in &served.problems {
        warn!("{problem}");
    }
    info!(
        generation = snapshot.generation,
        objects = snapshot.objects().len(),
        services = snapshot.services().count(),
        workloads = snapshot.workloads().count(),
        problems = served.problems.len(),
        "configuration in use"
    );
    for conflict in &snapshot.status().conflicts {
        warn!("{conflict}");
    }
    out.send_replace(Some(Arc::new(served)));
}

/// Waits until every Mixer has the rules of a snapshot; for ever if there is none to wait for.
async fn rules_are_confirmed(ledger: &Ledger, snapshot: Option<&Snapshot>) {
    let Some(snapshot) = snapshot else {
        return std::future::pending().await;
    };
    let mut changes = ledger.subscribe();
    let root = snapshot.mesh().root_namespace.as_str();
    while !ledger.rules_are_confirmed(snapshot.generation, root) {
        if changes.changed().await.is_err() {
            return std::future::pending().await;
        }
        // Thousands of proxies may be answering.
        tokio::time::sleep(LOOK).await;
    }
}

pub(crate) fn build(
    config: &ConfigSet,
    before: Option<&Served>,
    confirmed: bool,
    encoder: &Encoder,
    changed_at: Instant,
) -> Served {
    let before_ = before.map(|before| &*before.snapshot);
    // What was confirmed was the configuration before, unless this is the same.
    let confirmed = confirmed && before_.is_some_and(|b| b.generation == config.generation);
    let snapshot = Snapshot::build(config).with_reach(before_, confirmed);
    let objects = generic::object_generations(
        before.map(|before| (&*before.snapshot, &before.object_generations)),
        &snapshot,
    );
    let revision = before.map_or(0, |before| before.revision) + 1;
    let endpoints = EndpointChanges::after(before, &snapshot, revision);
    Served {
        generic: generic::catalogs(&snapshot, encoder),
        object_generations: objects,
        problems: config.problems.clone(),
        snapshot: Arc::new(snapshot),
        changed_at,
        revision,
        endpoints,
    }
}

async fn wait_for_quiet(source: &mut Source, since: Instant) {
    let limit = since + PATIENCE;
    loop {
        let quiet = (Instant::now() + QUIET).min(limit);
        tokio::select! {
            // Cancel-safe: a change not seen here is seen by the next call.
            changed = source.changed() => if changed.is_err() { return },
            () = sleep_until(quiet) => return,
        }
    }
}
