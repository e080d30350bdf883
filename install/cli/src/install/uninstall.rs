//! `lateen uninstall`: takes away what the inventory names, and what the programs made while they ran.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::cluster::inventory::{self, Inventory, NAMESPACE};
use crate::cluster::{self, Cluster, Key};
use crate::output::Format;
use crate::terminal::{doing, done};

/// As whom Auth writes root certificates to namespaces.
const AUTH: &str = "lateen-auth";
const ROOTS: &str = "istio-ca-root-cert";
/// What Pilots hold; a revision's has the revision behind it.
const LEASE: &str = "lateen-leader";

/// Take away what `lateen install` applied, and nothing else.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// This revision only.
    #[arg(long, value_name = "NAME", default_value = "")]
    revision: String,
    /// Leave the definitions of kinds, and with them the configuration of the mesh.
    #[arg(long, conflicts_with = "delete_configuration")]
    keep_crds: bool,
    /// Delete the definitions although there is configuration, which goes with them.
    #[arg(long)]
    delete_configuration: bool,
    /// Say what would go.
    #[arg(long)]
    dry_run: bool,
    /// Wait this long for everything to be gone, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
    /// Print what went as YAML or JSON.
    #[arg(short = 'o', long, value_enum)]
    output: Option<Format>,
    #[command(flatten)]
    cluster: cluster::Options,
}

/// Does it.
pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let mut cluster = Cluster::connect(&options.cluster).await?;
    let there = Inventory::read(&mut cluster, &options.revision)
        .await?
        .context("nothing is installed by this program (Helm's: helm uninstall)")?;
    if options.revision.is_empty() {
        let all = Inventory::all(&mut cluster).await?;
        let revisions: Vec<_> = all.into_iter().map(|one| one.revision).collect();
        let others = revisions
            .into_iter()
            .filter(|revision| !revision.is_empty());
        let others = others.collect::<Vec<_>>().join(", ");
        anyhow::ensure!(
            others.is_empty(),
            "these revisions live on the installation: {others}; take them away first (--revision)"
        );
    }
    let mut going = there.objects.clone();
    if options.keep_crds {
        going.retain(|key| key.kind != "CustomResourceDefinition");
    } else if !options.delete_configuration {
        let left = configuration(&mut cluster, &going).await?;
        if let Some(first) = left.first() {
            anyhow::bail!(
                "there are {} objects of the mesh's kinds, as {first}, which would go with the kinds; --keep-crds leaves them, --delete-configuration deletes them",
                left.len()
            );
        }
    }
    let mut made = Vec::new();
    if options.revision.is_empty() {
        made.extend(roots(&mut cluster).await?);
    }
    made.push(Key {
        api_version: "coordination.k8s.io/v1".to_owned(),
        kind: "Lease".to_owned(),
        namespace: NAMESPACE.to_owned(),
        name: match options.revision.as_str() {
            "" => LEASE.to_owned(),
            revision => format!("{LEASE}-{revision}"),
        },
    });
    let mut gone = Vec::new();
    // The namespace last: what else the inventory names must be gone before, or nobody would know of it.
    let (namespaces, others): (Vec<Key>, Vec<Key>) =
        going.into_iter().partition(|key| key.kind == "Namespace");
    let mut order: Vec<Key> = others.into_iter().rev().collect();
    // After the programs that write them.
    order.extend(made);
    if options.dry_run {
        order.push(inventory::key(&options.revision));
        order.extend(namespaces);
        match options.output {
            Some(format) => format.print(&json!({ "removed": order }))?,
            None => order.iter().for_each(|key| println!("{key}")),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let deadline = Instant::now() + Duration::from_secs(options.timeout);
    for (at, key) in order.iter().enumerate() {
        if options.output.is_none() {
            doing(&format!("{} of {}: {key}", at + 1, order.len()));
        }
        if cluster.delete(key).await? {
            gone.push(key.clone());
        }
    }
    wait(&mut cluster, &gone, deadline).await?;
    for key in std::iter::once(inventory::key(&options.revision)).chain(namespaces) {
        if cluster.delete(&key).await? {
            wait(&mut cluster, std::slice::from_ref(&key), deadline).await?;
            gone.push(key);
        }
    }
    match options.output {
        Some(format) => format.print(&json!({ "removed": gone }))?,
        None => done(&format!("{} objects are gone", gone.len())),
    }
    Ok(ExitCode::SUCCESS)
}

async fn wait(cluster: &mut Cluster, keys: &[Key], deadline: Instant) -> anyhow::Result<()> {
    for key in keys {
        anyhow::ensure!(
            cluster
                .wait(key, deadline, |object| object.is_none())
                .await?,
            "{key} is still there; does something hold it (finalizers), or is nobody there to end it?"
        );
    }
    Ok(())
}

/// Objects of the kinds that `going` defines, which are not themselves among `going`.
async fn configuration(cluster: &mut Cluster, going: &[Key]) -> anyhow::Result<Vec<Key>> {
    let mut left = Vec::new();
    for key in going
        .iter()
        .filter(|key| key.kind == "CustomResourceDefinition")
    {
        let Some(definition) = cluster.get(key).await? else {
            continue;
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let spec = &definition["spec"];
        let versions = spec["versions"].as_array().into_iter().flatten();
        let stored = versions.filter(|version| version["storage"] == true);
        for version in stored {
            let kind = Key {
                api_version: format!("{}/{}", text(&spec["group"]), text(&version["name"])),
                kind: text(&spec["names"]["kind"]),
                namespace: String::new(),
                name: String::new(),
            };
            let all = cluster.list(&kind).await?;
            left.extend(all.iter().map(Key::of).filter(|key| !going.contains(key)));
        }
    }
    Ok(left)
}

/// Root certificates that Auth wrote to namespaces.
async fn roots(cluster: &mut Cluster) -> anyhow::Result<Vec<Key>> {
    let any = inventory::key("");
    let maps = cluster.list(&any).await?;
    let ours = maps.iter().filter(|map| {
        let entries = map["metadata"]["managedFields"].as_array();
        map["metadata"]["name"] == ROOTS
            && entries.is_some_and(|all| all.iter().any(|entry| entry["manager"] == AUTH))
    });
    Ok(ours.map(Key::of).collect())
}
