//! `lateen up bookinfo`: the whole mesh on one machine, until Ctrl-C.

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::ValueEnum;
use e2e::{
    http::Client,
    mesh::{Mesh, Options as MeshOptions},
};
use tokio::signal::unix::{SignalKind, signal};

use crate::terminal::{bold, doing, done};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The application to run.
    #[arg(value_enum)]
    application: Application,
    /// Folder of YAML to watch, of one mesh at a time; what is missing in it is put there, and it stays.
    /// Default: a temporary one.
    #[arg(long)]
    config_dir: Option<PathBuf>,
    /// Run this stock Envoy as every workload's sidecar.
    #[arg(long, value_name = "PATH")]
    envoy: Option<PathBuf>,
    /// Leave again as soon as the first page has been served.
    #[arg(long)]
    once: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Application {
    /// productpage, details, reviews v1 v2 v3, ratings.
    Bookinfo,
}

/// First page at the latest this long after everything is ready.
const FIRST_PAGE: Duration = Duration::from_secs(10);

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let started = Instant::now();
    let Application::Bookinfo = options.application;
    println!("{}", bold("Lateen: a mesh with Bookinfo on this machine"));
    let config_dir = options
        .config_dir
        .map(|dir| {
            std::fs::create_dir_all(&dir)
                .with_context(|| format!("cannot make the folder {}", dir.display()))?;
            dir.canonicalize().context("cannot resolve --config-dir")
        })
        .transpose()?;
    let _held = config_dir.as_deref().map(hold).transpose()?;
    let start = async {
        doing("auth, pilot, mixer");
        let mut mesh = Mesh::start(MeshOptions {
            config_dir,
            envoy: options.envoy,
            own_group: true,
            ..MeshOptions::default()
        })
        .await?;
        done("auth, pilot and mixer are ready; each has its certificate");
        doing("productpage, details, reviews v1 v2 v3, ratings, each behind its proxy");
        mesh.add_bookinfo()?;
        mesh.ready().await?;
        done("six workloads and the ingress gateway run, every proxy has its configuration");
        doing("first page");
        let page = first_page(&mut mesh).await?;
        done(&format!(
            "first page after {:.1} s: {page}",
            started.elapsed().as_secs_f32()
        ));
        anyhow::Ok(mesh)
    };
    let mut mesh = tokio::select! {
        mesh = start => mesh?,
        _ = interrupt.recv() => return Ok(()),
        _ = terminate.recv() => return Ok(()),
    };
    if options.once {
        mesh.stop();
        return Ok(());
    }
    introduce(&mesh)?;
    let mut look = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            _ = look.tick() => {
                for ended in mesh.restart_ended()? {
                    println!("{ended}; started it again");
                }
            }
        }
    }
    println!("\nstopping …");
    mesh.stop();
    println!("all programs have ended; nothing is left behind");
    Ok(())
}

/// Two meshes in one folder would overwrite each other's Pods.
fn hold(config_dir: &Path) -> anyhow::Result<File> {
    let folder = File::open(config_dir)?;
    folder.try_lock().map_err(|_| {
        anyhow::anyhow!(
            "another mesh runs from {}; use another --config-dir",
            config_dir.display()
        )
    })?;
    Ok(folder)
}

async fn first_page(mesh: &mut Mesh) -> anyhow::Result<String> {
    let client = Client::new();
    let url = format!("{}/productpage", mesh.gateway_url());
    let deadline = Instant::now() + FIRST_PAGE;
    loop {
        match client.get(&url).await {
            Ok(response) if response.status == 200 => return Ok(url),
            other if Instant::now() > deadline => {
                let said = match other {
                    Ok(response) => format!("status {}: {}", response.status, response.text()),
                    Err(error) => format!("{error:#}"),
                };
                anyhow::bail!("{url} does not answer with 200 after {FIRST_PAGE:?}: {said}");
            }
            _ => {
                mesh.check()?;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

fn introduce(mesh: &Mesh) -> anyhow::Result<()> {
    let gateway = mesh.gateway_url();
    let folder = mesh.config_dir().display();
    println!(
        "
{}  {gateway}/productpage

{}
  reload the page: reviews come from v1, v2 or v3 at random (no stars, black, red)
  everyone to v1, jason to v2:     cp install/samples/bookinfo/reviews-jason-v2.yaml {folder}/
  log in as jason in the browser, or:
                                   curl -s -H 'cookie: session=jason' {gateway}/productpage | grep -o '<font[^>]*>[^<]*'
  everyone to all versions again:  rm {folder}/reviews-jason-v2.yaml
  v3 may not ask ratings:          cp install/samples/bookinfo/deny-reviews-v3.yaml {folder}/
                                   (instead of red stars: ratings are unavailable)
  break a file and look:           echo 'kind: [' > {folder}/broken.yaml; curl -s {}/debug/generation
  which proxy has what:            lateen proxy-status --pilot {}
  metrics of every hop:            curl -s {} | grep istio_requests_total

{}
  configuration   {folder}  (edit it; changes are live within a second)
  logs            {}/logs",
        bold("Bookinfo is at"),
        bold("Try"),
        mesh.pilot_url(),
        mesh.pilot_url(),
        mesh.mixer_metrics_url(),
        bold("Where things are"),
        mesh.folder().display(),
    );
    for (name, url) in [
        ("pilot", mesh.pilot_url()),
        ("mixer", mesh.mixer_url()),
        ("gateway admin", mesh.gateway_admin()),
    ] {
        println!("  {name:<15} {url}");
    }
    for instance in mesh.instances() {
        println!(
            "  {:<15} {}  (admin {})",
            instance.workload.deployment,
            instance.address.ip,
            instance.admin()
        );
    }
    println!("\nCtrl-C stops everything.");
    Ok(())
}
