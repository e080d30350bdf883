//! What the rows share.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use e2e::{
    http::{Client, Response},
    mesh::{Instance, Mesh, Options},
    workload::Workload,
};

/// What stands beside every workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sidecar {
    Lateen,
    Envoy,
}

impl Sidecar {
    /// `None` when this row cannot run here; says so.
    pub(crate) fn options(self) -> Option<Options> {
        let envoy = match self {
            Sidecar::Lateen => None,
            Sidecar::Envoy => match std::env::var_os("ENVOY_BIN") {
                Some(path) => Some(PathBuf::from(path)),
                None => {
                    eprintln!(
                        "SKIPPED: ENVOY_BIN is not set; `make test` installs Envoy and sets it"
                    );
                    return None;
                }
            },
        };
        Some(Options {
            envoy,
            ..Options::default()
        })
    }

    /// The same with such a gateway too.
    pub(crate) fn everywhere(self) -> Option<Options> {
        Some(Options {
            envoy_gateway: self == Sidecar::Envoy,
            ..self.options()?
        })
    }
}

/// Makes one test with our proxy and one with stock Envoy as every sidecar.
macro_rules! on_both {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            use super::super::support::Sidecar;

            #[tokio::test]
            async fn lateen() -> anyhow::Result<()> {
                super::$name(Sidecar::Lateen).await
            }

            #[tokio::test]
            async fn envoy() -> anyhow::Result<()> {
                super::$name(Sidecar::Envoy).await
            }
        }
    )+};
}
pub(crate) use on_both;

/// A mesh with Bookinfo that is ready, and a client.
pub(crate) async fn bookinfo(options: Options) -> anyhow::Result<(Mesh, Client)> {
    let mut mesh = Mesh::start(options).await?;
    mesh.add_bookinfo()?;
    mesh.ready().await?;
    Ok((mesh, Client::new()))
}

/// A mesh with the control plane and gateway only.
pub(crate) async fn empty() -> anyhow::Result<(Mesh, Client)> {
    Ok((Mesh::start(Options::default()).await?, Client::new()))
}

/// Adds a workload that sends only, with a sidecar: `sleep` of Istio's samples.
pub(crate) fn add_sleep(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mut sleep = Workload::new("sleep", &[("app", "sleep"), ("version", "v1")], 80);
    sleep.service_account = "sleep".to_owned();
    mesh.add(sleep, false).map(drop)
}

/// Sends as the application of `instance` would: through its sidecar's HTTP proxy.
pub(crate) async fn ask(
    client: &Client,
    instance: &Instance,
    host: &str,
    path: &str,
    headers: &[(&str, &str)],
) -> anyhow::Result<Response> {
    let mut all = vec![("host", host)];
    all.extend_from_slice(headers);
    client
        .get_with(&format!("{}{path}", instance.http_proxy()), &all)
        .await
}

/// The page, as `user` or anonymous.
pub(crate) async fn page(
    client: &Client,
    mesh: &Mesh,
    user: Option<&str>,
) -> anyhow::Result<Response> {
    let url = format!("{}/productpage", mesh.gateway_url());
    match user {
        Some(user) => {
            let cookie = format!("session={user}");
            client.get_with(&url, &[("cookie", &cookie)]).await
        }
        None => client.get(&url).await,
    }
}

/// What the reviews on a page (or in an answer of `reviews`) look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stars {
    None,
    Black,
    Red,
}

pub(crate) fn stars(response: &Response) -> Stars {
    let text = response.text();
    let shows = |color: &str| {
        text.contains(&format!("color=\"{color}\""))
            || text.contains(&format!("\"color\":\"{color}\""))
    };
    match (shows("black"), shows("red")) {
        (true, false) => Stars::Black,
        (false, true) => Stars::Red,
        (false, false) => Stars::None,
        (true, true) => panic!("black and red on one page:\n{text}"),
    }
}

/// Whether `hits` of `total` agree with probability `share` (four standard deviations: 1 in 16,000).
#[track_caller]
pub(crate) fn assert_share(hits: usize, total: usize, share: f64) {
    let (hits_, total_) = (hits as f64, total as f64);
    let expected = total_ * share;
    let tolerance = 4.0 * (total_ * share * (1.0 - share)).sqrt();
    assert!(
        (hits_ - expected).abs() <= tolerance,
        "{hits} of {total} is not {share} (expected {expected} ± {tolerance:.0})"
    );
}

/// Looks until `probe` gives something; an error with its last word after `limit`.
pub(crate) async fn eventually<T>(
    limit: Duration,
    mut probe: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match probe().await {
            Ok(found) => return Ok(found),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("still so after {limit:?}")));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(25)).await,
        }
    }
}

/// A counter or gauge of a proxy; 0 when it does not exist.
pub(crate) async fn stat(client: &Client, admin: &str, name: &str) -> anyhow::Result<u64> {
    let stats = client.get(&format!("{admin}/stats")).await?.text();
    Ok(stats
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")?.parse().ok())
        .unwrap_or(0))
}

/// One sample of a Prometheus exposition.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) value: f64,
}

/// Everything Mixer's prometheus adapter exposes.
pub(crate) async fn metrics(client: &Client, mesh: &Mesh) -> anyhow::Result<Vec<Sample>> {
    let text = client.get(&mesh.mixer_metrics_url()).await?.text();
    Ok(text.lines().filter_map(sample).collect())
}

fn sample(line: &str) -> Option<Sample> {
    if line.starts_with('#') {
        return None;
    }
    let (series, value) = line.rsplit_once(' ')?;
    let (name, rest) = series.split_once('{').unwrap_or((series, ""));
    let mut labels = BTreeMap::new();
    let mut rest = rest.trim_end_matches('}');
    while let Some((key, after)) = rest.split_once("=\"") {
        let end = after.find('"')?;
        labels.insert(
            key.trim_start_matches(',').to_owned(),
            after[..end].to_owned(),
        );
        rest = &after[end + 1..];
    }
    Some(Sample {
        name: name.to_owned(),
        labels,
        value: value.parse().ok()?,
    })
}

impl Sample {
    pub(crate) fn label(&self, name: &str) -> &str {
        self.labels.get(name).map(String::as_str).unwrap_or("")
    }
}
