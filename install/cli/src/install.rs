//! `lateen install`, `upgrade` and `uninstall`.
//!
//! Values → objects ([`lateen_render`]) → checks ([`crate::check`]) → server-side apply, in order, each object named in the
//! [inventory](crate::cluster::inventory) before it is made → what is no longer wanted goes → wait until all is well.

mod uninstall;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lateen_render::{Chart, Release, values};
use serde_json::{Value, json};

pub(crate) use uninstall::{Options as UninstallOptions, run as uninstall};

use crate::check::{self, after, before, has_failed};
use crate::cluster::inventory::{Inventory, NAMESPACE};
use crate::cluster::{self, Cluster, Key, is_established, is_ours};
use crate::output::Format;
use crate::terminal::{doing, done};

/// Install the mesh in a cluster.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Options {
    /// minimal, default, demo or production [upgrade: the one that is installed].
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
    /// YAML file with values over the profile; repeatable, later ones win.
    #[arg(short = 'f', long, value_name = "FILE")]
    values: Vec<PathBuf>,
    /// One value; repeatable.
    #[arg(long, value_name = "PATH=VALUE")]
    set: Vec<String>,
    /// One value, which is text whatever it looks like.
    #[arg(long, value_name = "PATH=TEXT")]
    set_string: Vec<String>,
    /// A second Pilot of this name beside the installation.
    #[arg(long, value_name = "NAME", default_value = "")]
    revision: String,
    /// Print what would be applied, and ask no cluster.
    #[arg(long)]
    dry_run: bool,
    /// Leave definitions of kinds as they are in the cluster.
    #[arg(long)]
    skip_crds: bool,
    /// Go on although a check before it fails.
    #[arg(long)]
    skip_checks: bool,
    /// Take over fields that somebody else set.
    #[arg(long)]
    force_conflicts: bool,
    /// Do not wait until everything runs.
    #[arg(long)]
    no_wait: bool,
    /// Wait this long, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    /// With --dry-run: how objects are printed [default: yaml]. Else: print what was done.
    #[arg(short = 'o', long, value_enum)]
    output: Option<Format>,
    #[command(flatten)]
    cluster: cluster::Options,
}

/// Bring an installation to this version, or to other values: those it was made with, and these over them.
#[derive(Debug, clap::Args)]
pub(crate) struct UpgradeOptions {
    /// Forget the values it was made with.
    #[arg(long)]
    reset_values: bool,
    #[command(flatten)]
    install: Options,
}

/// Definitions of kinds, and all objects of the chart, in the order in which they are applied.
pub(crate) fn objects(
    chart: &Chart,
    values: &Value,
    is_upgrade: bool,
) -> anyhow::Result<Vec<Value>> {
    let release = Release {
        name: "lateen".to_owned(),
        // Not where the objects are, so that the chart brings their namespace.
        namespace: "default".to_owned(),
        is_upgrade,
    };
    let rendered = chart.objects(&release, values)?;
    // A revision is served by the kinds that are there.
    let with_kinds = values["revision"].as_str().unwrap_or_default().is_empty();
    let mut objects = Vec::new();
    if with_kinds {
        objects.extend(lateen_config::definitions());
    }
    objects.extend(rendered);
    // The inventory must have a place before anything else is made.
    objects.sort_by_key(|object| object["kind"] != "Namespace");
    Ok(objects)
}

/// `lateen install`.
pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let chart = Chart::ours()?;
    let chosen = chosen(&options)?;
    let profile = options
        .profile
        .clone()
        .unwrap_or_else(|| "default".to_owned());
    if options.dry_run {
        return print(&options, &chart, &profile, &[chosen], false);
    }
    let mut cluster = Cluster::connect(&options.cluster).await?;
    if let Some(there) = Inventory::read(&mut cluster, &options.revision).await? {
        anyhow::bail!(
            "version {} is installed already (profile {}); lateen upgrade changes it",
            there.version,
            there.profile
        );
    }
    if !options.revision.is_empty() && Inventory::read(&mut cluster, "").await?.is_none() {
        anyhow::bail!(
            "a revision stands beside an installation, and there is none; lateen install first"
        );
    }
    let next = Inventory {
        version: chart.version().to_owned(),
        revision: options.revision.clone(),
        profile,
        values: chosen,
        objects: Vec::new(),
    };
    bring(&options, &chart, cluster, None, next).await
}

/// `lateen upgrade`.
pub(crate) async fn upgrade(options: UpgradeOptions) -> anyhow::Result<ExitCode> {
    let reset = options.reset_values;
    let options = options.install;
    let chart = Chart::ours()?;
    let mut cluster = Cluster::connect(&options.cluster).await?;
    let there = Inventory::read(&mut cluster, &options.revision)
        .await?
        .context("nothing is installed (or Helm did it: helm upgrade); lateen install first")?;
    let mut values = if reset {
        json!({})
    } else {
        there.values.clone()
    };
    // Nulls stay: they take away what the profile has.
    keep(&mut values, &chosen(&options)?);
    let profile = options
        .profile
        .clone()
        .unwrap_or_else(|| there.profile.clone());
    if options.dry_run {
        return print(&options, &chart, &profile, &[values], true);
    }
    let next = Inventory {
        version: chart.version().to_owned(),
        revision: options.revision.clone(),
        profile,
        values,
        objects: Vec::new(),
    };
    bring(&options, &chart, cluster, Some(there), next).await
}

/// As [`values::overlay`], but a null is kept.
fn keep(base: &mut Value, over: &Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (name, value) in over {
                keep(base.entry(name.clone()).or_insert(json!({})), value);
            }
        }
        (base, over) => *base = over.clone(),
    }
}

/// What the command line chooses, as one overlay.
fn chosen(options: &Options) -> anyhow::Result<Value> {
    let mut all = json!({});
    for file in &options.values {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}", file.display()))?;
        let values: Value = serde_saphyr::from_str(&text)
            .with_context(|| format!("{} is not YAML", file.display()))?;
        anyhow::ensure!(
            values.is_object() || values.is_null(),
            "{} is no map of values",
            file.display()
        );
        if values.is_object() {
            keep(&mut all, &values);
        }
    }
    for argument in &options.set {
        keep(&mut all, &values::set(argument, false)?);
    }
    for argument in &options.set_string {
        keep(&mut all, &values::set(argument, true)?);
    }
    if !options.revision.is_empty() {
        keep(&mut all, &json!({ "revision": options.revision }));
    }
    let named = all["revision"].as_str().unwrap_or_default();
    anyhow::ensure!(named == options.revision, "name a revision by --revision");
    Ok(all)
}

/// `--dry-run`.
fn print(
    options: &Options,
    chart: &Chart,
    profile: &str,
    chosen: &[Value],
    is_upgrade: bool,
) -> anyhow::Result<ExitCode> {
    let values = chart.values(profile, chosen)?;
    let mut objects = objects(chart, &values, is_upgrade)?;
    if options.skip_crds {
        objects.retain(|object| object["kind"] != "CustomResourceDefinition");
    }
    match options.output {
        Some(Format::Json) => {
            let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
            Format::Json.print(&list)?;
        }
        _ => {
            let text = lateen_render::chart::text(&objects)?;
            std::io::stdout().lock().write_all(text.as_bytes())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes the cluster what `next` says, starting from `there`.
async fn bring(
    options: &Options,
    chart: &Chart,
    mut cluster: Cluster,
    there: Option<Inventory>,
    mut next: Inventory,
) -> anyhow::Result<ExitCode> {
    let quiet = options.output.is_some();
    let say = |text: &str| {
        if !quiet {
            done(text);
        }
    };
    let values = chart.values(&next.profile, std::slice::from_ref(&next.values))?;
    let mut objects = objects(chart, &values, there.is_some())?;
    if options.skip_crds {
        objects.retain(|object| object["kind"] != "CustomResourceDefinition");
    }
    let findings = before(&mut cluster, &objects, there.as_ref()).await?;
    if has_failed(&findings) {
        eprint!("{}", check::table(&findings));
        if !options.skip_checks {
            eprintln!("Nothing was changed. --skip-checks goes on all the same.");
            return Ok(ExitCode::from(check::FAILED));
        }
    } else {
        say("the cluster is fit for it");
    }

    // Namespace and definitions that are somebody else's are used, and stay theirs.
    let mut used = Vec::new();
    let mut wanted = Vec::new();
    for object in objects {
        let key = Key::of(&object);
        let is_shared = ["CustomResourceDefinition", "Namespace"].contains(&key.kind.as_str());
        let was_ours = there
            .as_ref()
            .is_some_and(|there| there.objects.contains(&key));
        let others =
            is_shared && !was_ours && cluster.get(&key).await?.is_some_and(|o| !is_ours(&o));
        match others {
            true => used.push(key),
            false => wanted.push(object),
        }
    }
    let (namespaces, wanted): (Vec<_>, Vec<_>) = wanted
        .into_iter()
        .partition(|object| object["kind"] == "Namespace");
    let deadline = Instant::now() + Duration::from_secs(options.timeout);
    for namespace in &namespaces {
        cluster.apply(namespace, options.force_conflicts).await?;
    }

    // Until all is applied, the inventory names what was there and what comes: whatever happens now, it can be taken away.
    next.objects = namespaces.iter().chain(&wanted).map(Key::of).collect();
    let gone: Vec<Key> = there
        .iter()
        .flat_map(|there| there.objects.clone())
        .collect();
    let gone: Vec<Key> = gone
        .into_iter()
        .filter(|key| !next.objects.contains(key))
        .collect();
    let mut both = next.clone();
    both.objects.extend(gone.iter().cloned());
    both.write(&mut cluster).await?;

    let (definitions, others): (Vec<_>, Vec<_>) = wanted
        .into_iter()
        .partition(|object| object["kind"] == "CustomResourceDefinition");
    for (at, definition) in definitions.iter().enumerate() {
        if !quiet {
            doing(&format!("kinds: {} of {}", at + 1, definitions.len()));
        }
        cluster.apply(definition, options.force_conflicts).await?;
    }
    for key in definitions.iter().map(Key::of) {
        let is_served = cluster.wait(&key, deadline, is_established).await?;
        anyhow::ensure!(is_served, "{key} is not served after {} s", options.timeout);
    }
    cluster.forget_missing();
    if !definitions.is_empty() {
        say(&format!("{} kinds are served", definitions.len()));
    }
    if !used.is_empty() {
        say(&format!(
            "{} objects were there and stay as they are: {}",
            used.len(),
            list(&used)
        ));
    }
    for (at, object) in others.iter().enumerate() {
        if !quiet {
            doing(&format!("objects: {} of {}", at + 1, others.len()));
        }
        cluster.apply(object, options.force_conflicts).await?;
    }
    say(&format!(
        "{} objects are applied in {NAMESPACE}",
        others.len() + namespaces.len()
    ));
    for key in gone.iter().rev() {
        cluster.delete(key).await?;
    }
    if !gone.is_empty() {
        say(&format!(
            "{} objects that are no longer wanted are gone: {}",
            gone.len(),
            list(&gone)
        ));
    }
    next.write(&mut cluster).await?;

    let mut code = ExitCode::SUCCESS;
    if !options.no_wait {
        for key in next.objects.iter().filter(|key| key.kind == "Deployment") {
            if !quiet {
                doing(&format!("waiting for {key}"));
            }
            let is_there = |object: Option<&Value>| object.is_some_and(check::is_ready);
            cluster.wait(key, deadline, is_there).await?;
        }
        let findings = after(&mut cluster, &next).await?;
        if has_failed(&findings) {
            eprint!("\n{}", check::table(&findings));
            code = ExitCode::from(check::FAILED);
        } else {
            say("everything runs");
        }
    }
    if let Some(format) = options.output {
        format.print(&json!({ "version": next.version, "profile": next.profile, "applied": next.objects, "removed": gone }))?;
    }
    Ok(code)
}

fn list(keys: &[Key]) -> String {
    const SHOWN: usize = 5;
    let mut names: Vec<String> = keys.iter().take(SHOWN).map(Key::to_string).collect();
    if keys.len() > SHOWN {
        names.push("…".to_owned());
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_laid_over_each_other_and_nulls_are_kept() {
        let mut base = json!({"a": {"b": 1}, "c": 2});
        keep(
            &mut base,
            &json!({"a": {"b": null, "d": {"e": 3}}, "f": null}),
        );
        assert_eq!(
            base,
            json!({"a": {"b": null, "d": {"e": 3}}, "c": 2, "f": null})
        );
    }

    #[test]
    fn the_namespace_comes_first_and_webhooks_last() {
        let chart = Chart::ours().unwrap();
        let values = chart.values("default", &[]).unwrap();
        let objects = objects(&chart, &values, false).unwrap();
        let kind = |at: usize| objects[at]["kind"].as_str().unwrap();
        assert_eq!(kind(0), "Namespace");
        assert_eq!(kind(1), "CustomResourceDefinition");
        assert_eq!(kind(objects.len() - 1), "ValidatingWebhookConfiguration");
        let values = chart
            .values("default", &[json!({"revision": "canary"})])
            .unwrap();
        let revision = super::objects(&chart, &values, false).unwrap();
        assert!(
            revision
                .iter()
                .all(|object| object["kind"] != "CustomResourceDefinition")
        );
    }
}
