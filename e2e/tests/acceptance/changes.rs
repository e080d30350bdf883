//! A18, A20, A21: what serves goes on serving while rules and pods come and go, or when a rule is wrong.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use e2e::{http::Client, mesh::Mesh, workload::Workload};
use tokio::task::JoinHandle;

use super::{
    routing::{ALL_RULES, reviews_to},
    support::{Sidecar, Stars, ask, bookinfo, eventually, on_both, stars},
};

on_both!(
    a18_a_subset_that_is_not_there_is_named,
    a20_routes_flip_without_a_failure,
    a21_pods_come_and_go_without_a_failure,
);

/// Requests of `reviews` through a sidecar, one after the other on each of some connections.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    connections: Vec<JoinHandle<BTreeMap<String, usize>>>,
}

impl Load {
    /// `each` is the time between two requests of a connection.
    fn start(proxy: &str, connections: usize, each: Duration) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicUsize::new(0));
        let connection = || {
            let (stop, answered) = (stop.clone(), answered.clone());
            let url = format!("{proxy}/reviews/0");
            tokio::spawn(async move {
                let client = Client::new();
                let mut answers = BTreeMap::new();
                while !stop.load(Ordering::Relaxed) {
                    let answer = match client.get_with(&url, &[("host", "reviews:9080")]).await {
                        Ok(response) if response.status == 200 => "200".to_owned(),
                        Ok(response) => format!("{}: {}", response.status, response.text()),
                        Err(error) => format!("{error:#}"),
                    };
                    *answers.entry(answer).or_default() += 1;
                    answered.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(each).await;
                }
                answers
            })
        };
        Load {
            connections: (0..connections).map(|_| connection()).collect(),
            stop,
            answered,
        }
    }

    /// Waits for so many answers from now on.
    async fn more(&self, answers: usize) -> anyhow::Result<()> {
        let wanted = self.answered.load(Ordering::Relaxed) + answers;
        eventually(Duration::from_secs(20), async || {
            let answered = self.answered.load(Ordering::Relaxed);
            anyhow::ensure!(answered >= wanted, "{answered} of {wanted} answers");
            Ok(())
        })
        .await
    }

    /// All the different answers there were, with how often.
    async fn stop(self) -> anyhow::Result<BTreeMap<String, usize>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = BTreeMap::new();
        for connection in self.connections {
            for (answer, times) in connection.await? {
                *all.entry(answer).or_default() += times;
            }
        }
        Ok(all)
    }
}

/// What `reviews` shows now; every answer must be the same.
async fn shown(client: &Client, mesh: &Mesh) -> anyhow::Result<Stars> {
    let from = mesh.instance("productpage-v1-0")?;
    let mut seen = Vec::new();
    for _ in 0..6 {
        let response = ask(client, from, "reviews:9080", "/reviews/0", &[]).await?;
        assert_eq!(response.status, 200, "{}", response.text());
        seen.push(stars(&response));
    }
    seen.dedup();
    anyhow::ensure!(seen.len() == 1, "different versions: {seen:?}");
    Ok(seen[0])
}

async fn a18_a_subset_that_is_not_there_is_named(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.options() else {
        return Ok(());
    };
    let (mut mesh, client) = bookinfo(options).await?;
    mesh.apply("destination-rules.yaml", ALL_RULES).await?;
    mesh.apply("reviews.yaml", &reviews_to("v2", "")).await?;
    assert_eq!(shown(&client, &mesh).await?, Stars::Black);
    let applied = mesh.apply("reviews.yaml", &reviews_to("v9", "")).await;
    let state = mesh.generation().await?.to_string();
    let said = match applied {
        Ok(()) => state,
        Err(error) => format!("{error:#}"),
    };
    assert!(said.contains("reviews.yaml:"), "no file and line: {said}");
    assert!(said.contains("v9"), "{said}");
    assert_eq!(shown(&client, &mesh).await?, Stars::Black, "the old route");
    mesh.apply("reviews.yaml", &reviews_to("v3", "")).await?;
    assert_eq!(shown(&client, &mesh).await?, Stars::Red);
    Ok(())
}

async fn a20_routes_flip_without_a_failure(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.options() else {
        return Ok(());
    };
    let (mut mesh, client) = bookinfo(options).await?;
    let proxy = mesh.instance("productpage-v1-0")?.http_proxy();
    let load = Load::start(&proxy, 8, Duration::from_millis(40));
    let subset = |version: &str| {
        format!(
            "apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: {{ name: reviews }}
spec:
  host: reviews
  subsets: [{{ name: {version}, labels: {{ version: {version} }} }}]
"
        )
    };
    let folder = mesh.config_dir().to_owned();
    let write = |name: &str, yaml: &str| -> std::io::Result<()> {
        let temporary = folder.join(format!(".{name}.new"));
        std::fs::write(&temporary, yaml)?;
        std::fs::rename(&temporary, folder.join(name))
    };
    mesh.apply("subset.yaml", &subset("v1")).await?;
    for round in 0..30 {
        let (version, expected) = [("v2", Stars::Black), ("v1", Stars::None)][round % 2];
        // The rule and what it needs come in any order, and Pilot may see one without the other.
        let mut files = [
            ("subset.yaml", subset(version)),
            ("route.yaml", reviews_to(version, "")),
        ];
        if round % 3 == 0 {
            files.reverse();
        }
        for (name, yaml) in &files {
            write(name, yaml)?;
            tokio::time::sleep(Duration::from_millis(20 * (round as u64 % 4))).await;
        }
        eventually(Duration::from_secs(10), async || {
            let stars = shown(&client, &mesh).await?;
            anyhow::ensure!(stars == expected, "round {round}: {stars:?}");
            Ok(())
        })
        .await?;
    }
    let answers = load.stop().await?;
    assert_eq!(answers.keys().collect::<Vec<_>>(), ["200"], "{answers:?}");
    assert!(answers["200"] > 100, "{answers:?}");
    Ok(())
}

async fn a21_pods_come_and_go_without_a_failure(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.options() else {
        return Ok(());
    };
    let (mut mesh, _) = bookinfo(options).await?;
    let proxy = mesh.instance("productpage-v1-0")?.http_proxy();
    let load = Load::start(&proxy, 8, Duration::from_millis(40));
    for version in ["v1", "v2", "v3"] {
        let old = format!("reviews-{version}-0");
        let old_workload = mesh.instance(&old)?.workload.clone();
        let new = Workload {
            name: format!("reviews-{version}-1"),
            ..old_workload
        };
        mesh.add(new, true)?;
        mesh.ready().await?;
        load.more(40).await?;
        mesh.remove(&old)?;
        load.more(40).await?;
    }
    mesh.ready().await?;
    let answers = load.stop().await?;
    assert_eq!(answers.keys().collect::<Vec<_>>(), ["200"], "{answers:?}");
    assert!(answers["200"] > 100, "{answers:?}");
    Ok(())
}
