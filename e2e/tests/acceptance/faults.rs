//! Each control-plane program killed under load, refused updates, malformed files, rotation.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use e2e::{
    http::Client,
    mesh::{Mesh, Options},
};

use super::routing::{ALL_RULES, reviews_to};
use super::support::{Stars, bookinfo, eventually, page, stars, stat};

/// Requests per second of the load.
const RATE: u64 = 200;

/// Open-loop load on the path productpage → details until stopped; what failed.
struct Load {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<Vec<String>>,
}

impl Load {
    fn start(mesh: &Mesh) -> anyhow::Result<Load> {
        let url = format!(
            "{}/details/0",
            mesh.instance("productpage-v1-0")?.http_proxy()
        );
        let (stop, sent) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, counter) = (stop.clone(), sent.clone());
        let task = tokio::spawn(async move {
            let client = Client::new();
            let mut ticks = tokio::time::interval(Duration::from_micros(1_000_000 / RATE));
            let mut requests = tokio::task::JoinSet::new();
            while !stopped.load(Ordering::SeqCst) {
                ticks.tick().await;
                let (client, url) = (client.clone(), url.clone());
                counter.fetch_add(1, Ordering::SeqCst);
                requests.spawn(async move {
                    match client.get_with(&url, &[("host", "details:9080")]).await {
                        Ok(response) if response.status == 200 => None,
                        Ok(response) => Some(format!("{}: {}", response.status, response.text())),
                        Err(error) => Some(format!("{error:#}")),
                    }
                });
            }
            requests.join_all().await.into_iter().flatten().collect()
        });
        Ok(Load { stop, sent, task })
    }

    /// Waits until this many more requests have been sent.
    async fn pass(&self, requests: u64) -> anyhow::Result<()> {
        let goal = self.sent.load(Ordering::SeqCst) + requests;
        eventually(Duration::from_secs(30), async || {
            anyhow::ensure!(
                self.sent.load(Ordering::SeqCst) >= goal,
                "the load is stuck"
            );
            Ok(())
        })
        .await
    }

    async fn finish(self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        let failed = self.task.await?;
        let sent = self.sent.load(Ordering::SeqCst);
        anyhow::ensure!(
            failed.is_empty(),
            "{} of {sent} requests failed, e.g. {:?}",
            failed.len(),
            &failed[..failed.len().min(3)]
        );
        Ok(())
    }
}

#[tokio::test]
async fn killing_each_control_plane_program_loses_no_request() -> anyhow::Result<()> {
    let (mut mesh, _) = bookinfo(Options::default()).await?;
    let load = Load::start(&mesh)?;
    load.pass(RATE).await?;
    for name in ["pilot", "mixer", "auth"] {
        let process = match name {
            "pilot" => &mut mesh.pilot,
            "mixer" => &mut mesh.mixer,
            _ => &mut mesh.auth,
        };
        process.crash()?;
        load.pass(2 * RATE).await?;
        process.restart()?;
        load.pass(2 * RATE).await?;
    }
    load.finish().await?;
    // State is recovered: a change still reaches every proxy, and Mixer.
    mesh.ready().await?;
    mesh.apply("destination-rules.yaml", ALL_RULES).await?;
    mesh.apply("reviews.yaml", &reviews_to("v3", "")).await?;
    assert_eq!(stars(&page(&Client::new(), &mesh, None).await?), Stars::Red);
    Ok(())
}

#[tokio::test]
async fn a_malformed_file_is_refused_with_its_line_and_changes_nothing() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    mesh.apply("destination-rules.yaml", ALL_RULES).await?;
    mesh.apply("reviews.yaml", &reviews_to("v3", "")).await?;
    for broken in [
        "apiVersion: networking.istio.io/v1alpha3\nkind: VirtualService\nmetadata: { name: reviews\n",
        "apiVersion: networking.istio.io/v1alpha3\nkind: VirtualService\nmetadata: { name: reviews }\nspec:\n  hosts: [reviews]\n  http: [{ rout: [] }]\n",
        &reviews_to("v3", "    timeout: soon\n"),
    ] {
        let error = mesh
            .apply("reviews.yaml", broken)
            .await
            .expect_err("Pilot took a broken file")
            .to_string();
        assert!(error.contains("reviews.yaml:"), "no file and line: {error}");
        assert_eq!(stars(&page(&client, &mesh, None).await?), Stars::Red);
    }
    mesh.apply("reviews.yaml", &reviews_to("v2", "")).await?;
    assert_eq!(stars(&page(&client, &mesh, None).await?), Stars::Black);
    Ok(())
}

#[tokio::test]
async fn a_route_to_an_undefined_subset_keeps_the_old_route() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    mesh.apply("destination-rules.yaml", ALL_RULES).await?;
    mesh.apply("reviews.yaml", &reviews_to("v3", "")).await?;
    let error = mesh
        .apply("reviews.yaml", &reviews_to("v9", ""))
        .await
        .expect_err("a route to nowhere was taken")
        .to_string();
    assert!(
        error.contains("v9") && error.contains("reviews.yaml:"),
        "{error}"
    );
    assert_eq!(stars(&page(&client, &mesh, None).await?), Stars::Red);
    Ok(())
}

#[tokio::test]
async fn certificates_rotate_under_load_without_a_failed_request() -> anyhow::Result<()> {
    let (mesh, client) = bookinfo(Options {
        workload_ttl: Some(Duration::from_secs(6)),
        ..Options::default()
    })
    .await?;
    let admin = mesh.instance("details-v1-0")?.admin();
    let serial = async || {
        let certs = client.get(&format!("{admin}/certs")).await?.json()?;
        let chains = certs["certificates"].as_array().into_iter().flatten();
        let mut serials = chains.filter_map(|c| c["cert_chain"][0]["serial_number"].as_str());
        serials
            .next()
            .map(str::to_owned)
            .ok_or_else(|| anyhow::anyhow!("no certificate: {certs}"))
    };
    let load = Load::start(&mesh)?;
    let mut seen = vec![serial().await?];
    while seen.len() < 4 {
        let next = eventually(Duration::from_secs(20), async || {
            let next = serial().await?;
            anyhow::ensure!(!seen.contains(&next), "the certificate is still {next}");
            Ok(next)
        })
        .await?;
        seen.push(next);
    }
    load.finish().await?;
    assert!(stat(&client, &admin, "server.live").await? == 1);
    Ok(())
}
