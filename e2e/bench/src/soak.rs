//! `make soak`: mixed traffic while configuration is pushed every second, endpoints come and go, certificates
//! rotate and upstreams are killed. Nothing may fail that stock Envoy would not fail (run it with
//! `--proxy .venv/envoy` to see what that is), and memory must stay where it was.
//!
//! Configuration comes by ADS: listeners, clusters, routes, endpoints and secrets.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    ads,
    bootstrap::{self, Http, address, http, http2_options, listener},
    certificates::{self, Authority, Key},
    compare::median,
    load::{self, Extent, Live, Outcome, Pace, Plan, Protocol},
    process::{LOAD_CPU, PROXY_CPU, Running, use_processor},
    upstream::{self, Kind},
};

/// Upstream programs that are killed in turn.
const UPSTREAMS: usize = 4;
/// Seconds between two kills; the victim comes back after a third of them.
const KILL_EVERY: u64 = 6;
/// Seconds between two certificates.
const ROTATE_EVERY: u64 = 3;
/// The version that the proxy starts with.
const FIRST: u64 = 1;
/// Memory of the last quarter may exceed the first one's by this part and this much.
const GROWTH: (f64, f64) = (0.10, 3.0);

/// What to do.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) proxy: PathBuf,
    pub(crate) seconds: u64,
}

/// Upstream programs' ports.
#[derive(Clone, Copy, Debug)]
struct Place {
    http1: SocketAddr,
    grpc: SocketAddr,
}

/// One kind of traffic.
#[derive(Debug)]
struct Traffic {
    name: &'static str,
    live: Arc<Live>,
    thread: JoinHandle<anyhow::Result<Outcome>>,
}

/// Ports of the proxy.
#[derive(Clone, Copy, Debug)]
struct Entries {
    plain: SocketAddr,
    tls: SocketAddr,
    mutual: SocketAddr,
    tcp: SocketAddr,
    extra: SocketAddr,
    admin: SocketAddr,
}

fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// A DiscoveryResponse.
fn response(version: u64, kind: &str, resources: Vec<Value>) -> Value {
    let kind = format!("type.googleapis.com/envoy.{kind}");
    let resources: Vec<_> = resources
        .into_iter()
        .map(|mut resource| {
            resource["@type"] = json!(kind);
            resource
        })
        .collect();
    json!({"version_info": version.to_string(), "resources": resources, "type_url": kind})
}

fn source() -> Value {
    json!({"resource_api_version": "V3", "ads": {}})
}

/// Makes every version of the configuration.
#[derive(Debug)]
struct Configuration {
    folder: PathBuf,
    ads: SocketAddr,
    entries: Entries,
    places: Vec<Place>,
    echo: SocketAddr,
    upgrade: SocketAddr,
    authority: Authority,
}

impl Configuration {
    fn bootstrap(&self) -> Value {
        json!({
            "node": {"id": "soak", "cluster": "soak"},
            "admin": {"address": address(self.entries.admin)},
            "dynamic_resources": {
                "lds_config": source(),
                "cds_config": source(),
                "ads_config": {
                    "api_type": "GRPC", "transport_api_version": "V3",
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}],
                },
            },
            "static_resources": {"clusters": [ads::cluster(self.ads)]},
        })
    }

    fn listeners(&self, version: u64) -> Value {
        let manager = || {
            let routes = json!({"route_config_name": "routes", "config_source": source()});
            let mut filter = http(Http {
                more: vec![
                    ("rds", routes),
                    ("upgrade_configs", json!([{"upgrade_type": "websocket"}])),
                ],
                ..Http::default()
            });
            if let Some(fields) = filter["typed_config"].as_object_mut() {
                fields.remove("route_config");
            }
            filter
        };
        let secret = |name: &str| json!({"name": name, "sds_config": source()});
        let tls = |mutual: bool| {
            let mut common = json!({
                "tls_certificate_sds_secret_configs": [secret("leaf")],
                "alpn_protocols": ["http/1.1"],
            });
            if mutual {
                common["validation_context_sds_secret_config"] = secret("trust");
            }
            json!({
                "name": "envoy.transport_sockets.tls",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                    "require_client_certificate": mutual,
                    "common_tls_context": common,
                },
            })
        };
        let Entries {
            plain,
            tls: tls_at,
            mutual,
            tcp,
            extra,
            ..
        } = self.entries;
        let mut all = vec![
            listener(plain, &manager(), None),
            listener(tls_at, &manager(), Some(&tls(false))),
            listener(mutual, &manager(), Some(&tls(true))),
            listener(tcp, &bootstrap::tcp_proxy(), None),
        ];
        // One that comes and goes.
        if version.is_multiple_of(2) {
            all.push(listener(extra, &manager(), None));
        }
        response(version, "config.listener.v3.Listener", all)
    }

    fn routes(&self, version: u64) -> Value {
        let retry = json!({
            "retry_on": "connect-failure,refused-stream,reset",
            "num_retries": 5,
            "retry_host_predicate": [{
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
            }],
            "host_selection_retry_max_attempts": 5,
        });
        let route = |prefix: &str, cluster: &str| {
            json!({
                "match": {"prefix": prefix},
                "route": {"cluster": cluster, "timeout": "10s", "retry_policy": retry},
                "response_headers_to_add": [{"header": {"key": "x-version", "value": version.to_string()}}],
            })
        };
        let table = json!({
            "name": "routes",
            "virtual_hosts": [{
                "name": "all", "domains": ["*"],
                "routes": [
                    {"match": {"prefix": "/socket"}, "route": {"cluster": "sockets", "timeout": "0s"}},
                    route("/soak.Service/", "calls"),
                    route("/", "web"),
                ],
            }],
        });
        response(version, "config.route.v3.RouteConfiguration", vec![table])
    }

    fn clusters(&self, version: u64) -> Value {
        let discovered = |name: &str| {
            json!({
                "name": name, "type": "EDS", "connect_timeout": "1s",
                // A kill sends everything that was under way again at once.
                "circuit_breakers": {"thresholds": [{"max_retries": 1000}]},
                "eds_cluster_config": {"eds_config": source()},
            })
        };
        let mut calls = discovered("calls");
        calls["typed_extension_protocol_options"] = http2_options();
        let mut all = vec![
            discovered("web"),
            calls,
            bootstrap::cluster("sockets", self.upgrade, false, None),
            bootstrap::cluster("up", self.echo, false, None),
        ];
        all.extend((0..version % 7).map(|number| {
            bootstrap::cluster(&format!("passing-{number}"), self.echo, false, None)
        }));
        response(version, "config.cluster.v3.Cluster", all)
    }

    /// All endpoints but one, a different one each time.
    fn endpoints(&self, version: u64) -> Value {
        let missing = version as usize % self.places.len();
        let assignment = |cluster: &str, of: fn(&Place) -> SocketAddr| {
            let endpoints: Vec<_> = self
                .places
                .iter()
                .enumerate()
                .filter(|(index, _)| *index != missing)
                .map(|(_, place)| json!({"endpoint": {"address": address(of(place))}}))
                .collect();
            json!({"cluster_name": cluster, "endpoints": [{"lb_endpoints": endpoints}]})
        };
        response(
            version,
            "config.endpoint.v3.ClusterLoadAssignment",
            vec![
                assignment("web", |place| place.http1),
                assignment("calls", |place| place.grpc),
            ],
        )
    }

    /// The secrets, with a new certificate now and then.
    fn secrets(&self, version: u64) -> anyhow::Result<Value> {
        if version.is_multiple_of(ROTATE_EVERY) || version == FIRST {
            self.authority.sign(&self.folder, "leaf", Key::P256)?;
        }
        let inline = |file: &str| -> anyhow::Result<Value> {
            Ok(json!({"inline_string": fs::read_to_string(self.folder.join(file))?}))
        };
        let leaf = json!({"name": "leaf", "tls_certificate": {
            "certificate_chain": inline("leaf.pem")?, "private_key": inline("leaf.key")?,
        }});
        let trust =
            json!({"name": "trust", "validation_context": {"trusted_ca": inline("root.pem")?}});
        Ok(response(
            version,
            "extensions.transport_sockets.tls.v3.Secret",
            vec![leaf, trust],
        ))
    }

    /// Everything, in the order in which it must be pushed.
    fn all(&self, version: u64) -> anyhow::Result<[Value; 5]> {
        Ok([
            self.clusters(version),
            self.endpoints(version),
            self.secrets(version)?,
            self.listeners(version),
            self.routes(version),
        ])
    }
}

fn start_upstream(folder: &Path, index: usize, place: Place) -> anyhow::Result<Running> {
    let arguments = [
        "upstream".to_owned(),
        place.http1.port().to_string(),
        place.grpc.port().to_string(),
    ];
    let log = folder.join(format!("upstream-{index}.log"));
    let program = std::env::current_exe()?;
    let mut upstream = Running::start(&program, &arguments, LOAD_CPU, log)?;
    upstream.listens(place.http1, Duration::from_secs(10))?;
    Ok(upstream)
}

/// `bench upstream HTTP1-PORT GRPC-PORT`: what is killed.
pub(crate) fn upstream(http1: u16, grpc: u16) -> anyhow::Result<()> {
    upstream::serve(vec![
        (upstream::bind(http1)?.0, Kind::Http1(128)),
        (upstream::bind(grpc)?.0, Kind::Grpc(64)),
    ])
}

fn traffic(name: &'static str, to: SocketAddr, rate: f64, plan: Plan) -> anyhow::Result<Traffic> {
    let live = Arc::new(Live::default());
    let extent = Extent::Told(live.clone());
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || load::run(to, &plan, Pace::Rate(rate), &extent, &[]))?;
    Ok(Traffic { name, live, thread })
}

fn all_traffic(configuration: &Configuration) -> anyhow::Result<Vec<Traffic>> {
    let Entries {
        plain,
        tls,
        mutual,
        tcp,
        ..
    } = configuration.entries;
    let folder = &configuration.folder;
    let server_only = certificates::client(folder, None, "http/1.1")?;
    let with_client = certificates::client(folder, Some("client"), "http/1.1")?;
    let over = |connections, tls| Plan {
        tls: Some(tls),
        ..Plan::new(Protocol::Http1, connections, 1)
    };
    let call = Plan {
        path: "/soak.Service/Method".to_owned(),
        body: 64,
        answer: 64 + 5,
        ..Plan::new(Protocol::Grpc, 4, 8)
    };
    let fresh = Plan {
        fresh: true,
        ..over(4, with_client.clone())
    };
    let message = |protocol| Plan {
        path: "/socket".to_owned(),
        body: 256,
        ..Plan::new(protocol, 8, 1)
    };
    // Posts are buffered, so that they can be sent again as well.
    let post = Plan {
        body: 2000,
        ..Plan::new(Protocol::Http1, 8, 1)
    };
    Ok(vec![
        traffic("h1", plain, 300.0, Plan::new(Protocol::Http1, 16, 1))?,
        traffic("h1 post", plain, 100.0, post)?,
        traffic("grpc", plain, 300.0, call)?,
        traffic("websocket", plain, 100.0, message(Protocol::WebSocket))?,
        traffic("tcp", tcp, 100.0, message(Protocol::Messages))?,
        traffic("tls", tls, 100.0, over(8, server_only))?,
        traffic("mtls", mutual, 100.0, over(8, with_client))?,
        traffic("mtls fresh", mutual, 10.0, fresh)?,
    ])
}

/// Counters of the proxy by name.
fn counters(admin: SocketAddr) -> anyhow::Result<Vec<(String, u64)>> {
    let mut stream = TcpStream::connect(admin)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET /stats HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n")?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text)
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(": ")?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        })
        .collect())
}

fn sum(counters: &[(String, u64)], end: &str) -> u64 {
    counters
        .iter()
        .filter(|(name, _)| name.ends_with(end))
        .map(|(_, value)| value)
        .sum()
}

/// Runs it and says what became of it.
pub(crate) fn run(settings: &Settings) -> anyhow::Result<()> {
    anyhow::ensure!(
        settings.seconds >= 8,
        "a soak of less than 8 s shows nothing"
    );
    use_processor(LOAD_CPU)?;
    let folder = tempfile::tempdir()?;
    let authority = Authority::new(folder.path())?;
    authority.sign(folder.path(), "client", Key::P256)?;
    let (echo_listener, echo) = upstream::bind(0)?;
    let (upgrade_listener, upgrade) = upstream::bind(0)?;
    std::thread::spawn(|| {
        let ports = vec![
            (echo_listener, Kind::Echo),
            (upgrade_listener, Kind::Http1(128)),
        ];
        if let Err(error) = upstream::serve(ports) {
            eprintln!("the echo ended: {error:#}");
        }
    });
    let places = (0..UPSTREAMS)
        .map(|_| {
            anyhow::Ok(Place {
                http1: free_port()?,
                grpc: free_port()?,
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut upstreams = Vec::new();
    for (index, place) in places.iter().enumerate() {
        upstreams.push(Some(start_upstream(folder.path(), index, *place)?));
    }
    let (ads_listener, ads_at) = upstream::bind(0)?;
    let server = ads::Server::start(ads_listener)?;
    let configuration = Configuration {
        folder: folder.path().to_owned(),
        ads: ads_at,
        entries: Entries {
            plain: free_port()?,
            tls: free_port()?,
            mutual: free_port()?,
            tcp: free_port()?,
            extra: free_port()?,
            admin: free_port()?,
        },
        places,
        echo,
        upgrade,
        authority,
    };
    server.push(&configuration.all(FIRST)?)?;
    let file = folder.path().join("bootstrap.json");
    fs::write(&file, serde_json::to_vec(&configuration.bootstrap())?)?;
    let arguments = [
        "-c".to_owned(),
        file.display().to_string(),
        "--concurrency".to_owned(),
        "1".to_owned(),
        "-l".to_owned(),
        "error".to_owned(),
        "--base-id".to_owned(),
        (std::process::id() % 20_000).to_string(),
    ];
    let log = folder.path().join("proxy.log");
    let mut proxy = Running::start(&settings.proxy, &arguments, PROXY_CPU, log)?;
    for entry in [
        configuration.entries.plain,
        configuration.entries.tls,
        configuration.entries.mutual,
        configuration.entries.tcp,
    ] {
        proxy.listens(entry, Duration::from_secs(20))?;
    }
    let traffic = all_traffic(&configuration)?;

    let mut resident = Vec::new();
    let started = Instant::now();
    let (mut kills, mut shown) = (0, 0);
    for second in FIRST + 1..settings.seconds + FIRST + 1 {
        let next = started + Duration::from_secs(second - FIRST);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        proxy.check()?;
        server.push(&configuration.all(second)?)?;
        let victim = (second / KILL_EVERY) as usize % UPSTREAMS;
        match second % KILL_EVERY {
            0 => {
                upstreams[victim] = None;
                kills += 1;
            }
            moment if moment == KILL_EVERY / 3 && upstreams[victim].is_none() => {
                let place = configuration.places[victim];
                upstreams[victim] = Some(start_upstream(folder.path(), victim, place)?);
            }
            _ => {}
        }
        resident.push(proxy.memory()?.resident as f64 / 1024.0);
        for one in &traffic {
            let mut problems = one
                .live
                .problems
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            for problem in problems.drain(..) {
                if shown < 50 {
                    shown += 1;
                    let problem: Vec<_> = problem.lines().collect();
                    eprintln!("{second} s, {}: {}", one.name, problem.join(" | "));
                }
            }
            anyhow::ensure!(!one.thread.is_finished(), "the load of {} ended", one.name);
        }
        if second % 10 == 0 {
            let count = |of: fn(&Live) -> &AtomicU64| -> u64 {
                traffic
                    .iter()
                    .map(|one| of(&one.live).load(Ordering::Relaxed))
                    .sum()
            };
            eprintln!(
                "{second} s: {} good, {} failed, {kills} kills, {:.1} MiB",
                count(|live| &live.good),
                count(|live| &live.bad),
                resident.last().copied().unwrap_or_default()
            );
        }
    }
    let counters = counters(configuration.entries.admin)?;
    let mut verdict = Vec::new();
    for one in traffic {
        let stop: &AtomicBool = &one.live.stop;
        stop.store(true, Ordering::Relaxed);
        let outcome = one
            .thread
            .join()
            .map_err(|_| anyhow::anyhow!("the load of {} panicked", one.name))??;
        println!(
            "{:<12} {:>9} good {:>6} failed",
            one.name, outcome.good, outcome.bad
        );
        if outcome.bad > 0 {
            verdict.push(format!("{}: {} failed", one.name, outcome.bad));
        }
        if outcome.good == 0 {
            verdict.push(format!("{}: nothing was answered", one.name));
        }
    }
    for (what, end) in [
        ("listeners", "lds.update_success"),
        ("clusters", "cds.update_success"),
        ("routes", "rds.routes.update_success"),
    ] {
        let updates = sum(&counters, end);
        println!("{what:<12} {updates:>9} updates");
        if updates < settings.seconds / 2 {
            verdict.push(format!("{what}: only {updates} updates were taken"));
        }
    }
    println!(
        "{:<12} {:>9} responses",
        "acknowledged",
        server.acknowledged()
    );
    for refusal in server.refusals() {
        verdict.push(format!("refused {refusal}"));
    }
    let quarter = resident.len() / 4;
    let (first, last) = (
        median(&resident[..quarter]),
        median(&resident[resident.len() - quarter..]),
    );
    println!("memory       {first:>9.1} MiB in the first quarter, {last:.1} MiB in the last");
    if last > first * (1.0 + GROWTH.0) + GROWTH.1 {
        verdict.push(format!("memory grew from {first:.1} to {last:.1} MiB"));
    }
    anyhow::ensure!(verdict.is_empty(), "{}", verdict.join("; "));
    println!(
        "{} s, {kills} kills: nothing failed, memory is flat",
        settings.seconds
    );
    Ok(())
}
