//! Configuration: objects of a source become a [`Snapshot`] that requests read.
//!
//! One task owns the [`Builder`] and is the only writer. A bad object never takes a good one's place: each
//! object that is refused leaves its last good version in force, and a rule in force keeps what it uses, even
//! when that is deleted, until the rule itself is changed or deleted.

pub mod ads;
pub mod builder;
pub mod folder;
pub mod object;
mod output;
pub mod names;
pub mod remote;
pub mod vendor;
pub mod api_spec;
pub mod instance;
pub mod sent;
pub mod recipe;
pub mod annotation;
pub mod sampling;
pub mod rule;
pub mod doubts;
pub mod snapshot;

pub use builder::Builder;
pub use object::{Key, Problem, Source};
pub use snapshot::Snapshot;

use std::sync::Arc;

use arc_swap::ArcSwap;
use lateen_adapter::workload::Workload;
use tokio::sync::{mpsc, oneshot};

use crate::{adapter::rbac::PolicyView, metrics::Metrics, workloads::WorkloadView};

/// Everything a source knows at one moment.
#[derive(Debug, Default)]
pub struct Update {
    /// All objects of Mixer's kinds.
    pub objects: Vec<Source>,
    /// What the source itself found wrong: files that are no YAML, fields out of place.
    pub problems: Vec<Problem>,
    /// All workloads.
    pub workloads: Vec<Workload>,
    /// Quotas that proxies are told to ask for, and who says so.
    pub wanted_quotas: Vec<(String, Source)>,
    /// Wants to hear what was found wrong.
    pub reply: Option<oneshot::Sender<Vec<Problem>>>,
}

/// Takes updates and publishes snapshots until the source is gone. Building one may take its time (ten thousand rules,
/// a guest to compile) and is done where it keeps no request waiting.
pub async fn run(
    mut updates: mpsc::Receiver<Update>,
    mut builder: Builder,
    snapshot: Arc<ArcSwap<Snapshot>>,
    workloads: WorkloadView,
    policies: PolicyView,
    metrics: Arc<Metrics>,
    applied: impl Fn(),
) {
    while let Some(mut update) = updates.recv().await {
        // Only the newest matters; whoever waits for the verdict on an older one gets that of the newest.
        let mut replies: Vec<_> = update.reply.take().into_iter().collect();
        while let Ok(newer) = updates.try_recv() {
            update = newer;
            replies.extend(update.reply.take());
        }
        let has_moved = workloads.replace(std::mem::take(&mut update.workloads));
        let (has_changed, wrong) = policies.take(&mut update.objects);
        update.problems.extend(wrong);
        let build = move || {
            let next = builder.build(update, has_moved || has_changed);
            (builder, next)
        };
        let next;
        (builder, next) = match tokio::task::spawn_blocking(build).await {
            Ok(built) => built,
            // What was good is lost with the builder; the process ends and starts anew.
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_stopping) => return,
        };
        let old = snapshot.load_full();
        if next.generation != old.generation {
            tracing::info!(
                generation = next.generation,
                rules = next.rules.len(),
                problems = next.problems.len(),
                "configuration in force"
            );
        }
        for problem in next.problems.iter().filter(|p| !old.problems.contains(p)) {
            if problem.is_refused {
                tracing::error!(%problem, "configuration refused");
            } else {
                tracing::warn!(%problem, "configuration doubtful");
            }
        }
        metrics
            .generation
            .set(i64::try_from(next.generation).unwrap_or(i64::MAX));
        metrics.rules.set(next.rules.len() as i64);
        metrics.problems.set(next.problems.len() as i64);
        metrics
            .refused
            .set(objects(&next.problems, |p| p.is_refused));
        metrics.held.set(objects(&next.problems, |p| p.is_held));
        metrics.workloads.set(workloads.len() as i64);
        for reply in replies {
            // Whoever asked may have gone.
            drop(reply.send(next.problems.clone()));
        }
        let names: std::collections::HashSet<_> = next
            .rules
            .iter()
            .map(|rule| Arc::clone(&rule.name))
            .collect();
        snapshot.store(Arc::new(next));
        drop(old);
        metrics.configured.retain(|name| names.contains(name));
        applied();
    }
}

/// How many objects have a problem that `is_such`.
fn objects(problems: &[Problem], is_such: impl Fn(&Problem) -> bool) -> i64 {
    let such = problems.iter().filter(|p| is_such(p));
    let names: std::collections::BTreeSet<&str> = such.map(|p| p.object.as_str()).collect();
    i64::try_from(names.len()).unwrap_or(i64::MAX)
}
