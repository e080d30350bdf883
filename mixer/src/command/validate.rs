//! `mixer validate`: configuration checked as Mixer would, without running anything.

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use lateen_adapter::Clock;
use lateen_config::{ConfigSet, Folder, Object, check_references, parse_file, validate};
use lateen_service::prometheus_client::registry::Registry;
use tokio_util::task::TaskTracker;

use crate::{
    adapter::{Inventory, prometheus::Exposition, rbac::PolicyView},
    config::{Builder, Problem, Snapshot, folder},
    handler::World,
    metrics::Metrics,
    workloads::WorkloadView,
};

/// `mixer validate`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// YAML files and folders, taken together.
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Namespace whose rules apply everywhere.
    #[arg(long, value_name = "NAMESPACE", default_value = "istio-system")]
    pub config_namespace: String,
}

/// Prints what is wrong.
///
/// # Errors
/// Something is refused, or cannot be read.
pub fn run(options: &Options, out: &mut impl Write) -> anyhow::Result<()> {
    let set = read(&options.paths)?;
    let snapshot = snapshot(&set, &options.config_namespace);
    let mut refused = 0;
    for problem in &snapshot.problems {
        let mark = if problem.is_refused {
            "error"
        } else {
            "warning"
        };
        writeln!(out, "{mark}: {problem}")?;
        refused += usize::from(problem.is_refused);
    }
    anyhow::ensure!(refused == 0, "{refused} errors");
    writeln!(
        out,
        "{} objects, {} rules",
        set.objects.len(),
        snapshot.rules.len()
    )?;
    Ok(())
}

/// The objects of files and folders.
///
/// # Errors
/// One cannot be read.
pub fn read(paths: &[PathBuf]) -> anyhow::Result<ConfigSet> {
    let mut set = ConfigSet::default();
    for path in paths {
        if path.is_dir() {
            let folder = Folder::open(path.as_path())
                .with_context(|| format!("cannot read {}", path.display()))?;
            let read = folder.current();
            let mut problems = read.problems.clone();
            for problem in &mut problems {
                problem.file = shown(path, &problem.file);
            }
            set.problems.extend(problems);
            set.objects.extend(read.objects.iter().map(|object| {
                let mut object = (**object).clone();
                object.origin.file = shown(path, &object.origin.file);
                Arc::new(object)
            }));
            continue;
        }
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let (objects, problems) = parse_file(&path.display().to_string(), &text);
        set.problems.extend(problems);
        for object in objects {
            let found = validate(&object);
            if !found.iter().any(lateen_config::Problem::is_error) {
                set.objects.push(Arc::new(object));
            }
            set.problems.extend(found);
        }
    }
    let plain: Vec<Object> = set
        .objects
        .iter()
        .map(|object| (**object).clone())
        .collect();
    set.problems.extend(check_references(&plain));
    set.problems.sort();
    set.problems.dedup();
    Ok(set)
}

fn shown(folder: &Path, file: &str) -> Arc<str> {
    Arc::from(folder.join(file).display().to_string())
}

/// What Mixer would make of `set`.
pub fn snapshot(set: &ConfigSet, config_namespace: &str) -> Snapshot {
    let clock = Clock::real();
    let world = World {
        clock: clock.clone(),
        workloads: Arc::new(WorkloadView::default()),
        tracker: TaskTracker::new(),
        metrics: Metrics::register(&mut Registry::default()),
    };
    let policies = PolicyView::default();
    let inventory = Inventory::built_in(Arc::new(Exposition::new(clock)), policies.clone());
    let mut update = folder::update(set);
    let (_, wrong): (bool, Vec<Problem>) = policies.take(&mut update.objects);
    update.problems.extend(wrong);
    Builder::new(inventory, world, config_namespace, 1)
        .dry()
        .build(update, false)
}
