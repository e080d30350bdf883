//! What is measured, how it is configured, and what it should reach.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::ClientConfig;
use serde_json::{Value, json};

use crate::{
    bootstrap::{self, Http, bootstrap, cluster, http, listener},
    certificates::{self, Authority, Key},
    load::{Plan, Protocol},
    upstream::{self, Kind},
};

/// A body that is large.
const MIB: usize = 1 << 20;
/// Clusters of the scenario about them.
const CLUSTERS: usize = 10_000;

/// What a scenario's cost is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Request,
    Byte,
}

/// Ports of the upstream, and files; made once for all scenarios.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) folder: PathBuf,
    pub(crate) http1: SocketAddr,
    http1_mib: SocketAddr,
    pub(crate) http2: SocketAddr,
    http2_mib: SocketAddr,
    grpc: SocketAddr,
    authorization: SocketAddr,
    echo: SocketAddr,
    source: SocketAddr,
    sink: SocketAddr,
    pub(crate) tls: Arc<ClientConfig>,
    mutual: Arc<ClientConfig>,
}

impl Site {
    /// Makes the certificates and starts the upstream on a thread of its own.
    pub(crate) fn open(folder: &Path) -> anyhow::Result<Site> {
        let authority = Authority::new(folder)?;
        authority.sign(folder, "ecdsa", Key::P256)?;
        authority.sign(folder, "rsa", Key::Rsa2048)?;
        authority.sign(folder, "client", Key::P256)?;
        let mut ports = Vec::new();
        let mut bind = |kind| {
            let (listener, address) = upstream::bind(0)?;
            ports.push((listener, kind));
            anyhow::Ok(address)
        };
        let site = Site {
            folder: folder.to_owned(),
            http1: bind(Kind::Http1(128))?,
            http1_mib: bind(Kind::Http1(MIB))?,
            http2: bind(Kind::Http2(128))?,
            http2_mib: bind(Kind::Http2(MIB))?,
            grpc: bind(Kind::Grpc(64))?,
            authorization: bind(Kind::Authorization)?,
            echo: bind(Kind::Echo)?,
            source: bind(Kind::Source)?,
            sink: bind(Kind::Sink)?,
            tls: certificates::client(folder, None, "http/1.1")?,
            mutual: certificates::client(folder, Some("client"), "http/1.1")?,
        };
        std::thread::Builder::new()
            .name("upstream".to_owned())
            .spawn(|| {
                if let Err(error) = upstream::serve(ports) {
                    eprintln!("the upstream ended: {error:#}");
                }
            })?;
        Ok(site)
    }
}

/// Where one proxy (or pair) of a scenario listens.
#[derive(Clone, Debug)]
pub(crate) struct Ports {
    pub(crate) entry: SocketAddr,
    /// Between the two proxies of a pair.
    pub(crate) middle: SocketAddr,
    pub(crate) admin: [SocketAddr; 2],
    /// Where its access log goes.
    pub(crate) log: PathBuf,
}

/// Makes the bootstraps of a scenario's proxies, the entry's first.
pub(crate) type Bootstraps = Box<dyn Fn(&Ports) -> Vec<Value>>;

/// Something to measure.
pub(crate) struct Scenario {
    /// What `--scenario` says.
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) unit: Unit,
    pub(crate) plan: Plan,
    /// Plain traffic of the same protocol for the relay, and its upstream.
    pub(crate) relay: Option<(Plan, SocketAddr)>,
    /// At most so much of Envoy's CPU.
    pub(crate) envoy_goal: f64,
    /// At most so much of the relay's CPU.
    pub(crate) relay_goal: Option<f64>,
    /// At most so much of Envoy's added median latency; measured only where there is a goal.
    pub(crate) latency_goal: Option<f64>,
    /// Where the load goes to when no proxy is between.
    pub(crate) direct: SocketAddr,
    /// Bootstraps, the entry's first.
    pub(crate) bootstraps: Bootstraps,
}

impl std::fmt::Debug for Scenario {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// Connections that do nothing.
#[derive(Debug)]
pub(crate) struct Idle {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    /// The scenario whose configuration and load it takes.
    pub(crate) of: &'static str,
    pub(crate) envoy_goal: f64,
}

/// Idle connections to be weighed.
pub(crate) const IDLE: [Idle; 3] = [
    Idle {
        name: "idle-h1",
        title: "Idle HTTP/1.1 connection",
        of: "h1",
        envoy_goal: 0.08,
    },
    Idle {
        name: "idle-tls",
        title: "Idle TLS connection",
        of: "tls",
        envoy_goal: 0.40,
    },
    Idle {
        name: "idle-h2",
        title: "Idle HTTP/2 connection",
        of: "h2",
        envoy_goal: 0.15,
    },
];

/// Names of what is measured by neither CPU per request nor idle connections.
pub(crate) const MEMORY: &str = "memory";
pub(crate) const CLUSTERS_NAME: &str = "clusters";
/// Memory of 10,000 clusters, and CPU until the first answer, as parts of Envoy's.
pub(crate) const CLUSTERS_GOALS: (f64, f64) = (0.06, 0.03);
/// Memory at rest and under load, as parts of Envoy's.
pub(crate) const MEMORY_GOAL: f64 = 0.20;

/// One proxy to one cluster.
fn single(
    to: SocketAddr,
    http2: bool,
    tls: Option<Value>,
    options: impl Fn(&Ports) -> Http + 'static,
) -> Bootstraps {
    Box::new(move |ports| {
        vec![bootstrap(
            ports.admin[0],
            &[listener(ports.entry, &http(options(ports)), tls.as_ref())],
            &[cluster("up", to, http2, None)],
        )]
    })
}

/// A that originates mutual TLS, B that terminates it.
fn pair(site: &Site, to: SocketAddr, http2: bool) -> Bootstraps {
    let protocol = if http2 { "h2" } else { "http/1.1" };
    let origin = bootstrap::upstream_tls(&site.folder, protocol);
    let end = bootstrap::downstream_tls(&site.folder, "ecdsa", true, &[protocol]);
    Box::new(move |ports| {
        let plain = http(Http::default());
        vec![
            bootstrap(
                ports.admin[0],
                &[listener(ports.entry, &plain, None)],
                &[cluster("up", ports.middle, http2, Some(&origin))],
            ),
            bootstrap(
                ports.admin[1],
                &[listener(ports.middle, &plain, Some(&end))],
                &[cluster("up", to, http2, None)],
            ),
        ]
    })
}

fn tcp(to: SocketAddr) -> Bootstraps {
    Box::new(move |ports| {
        vec![bootstrap(
            ports.admin[0],
            &[listener(ports.entry, &bootstrap::tcp_proxy(), None)],
            &[cluster("up", to, false, None)],
        )]
    })
}

/// 1,000 hosts with 10 routes each; the load asks for the last.
pub(crate) fn many_routes() -> Http {
    let host = |number: usize| format!("svc-{number}.ns-{}", number % 37);
    Http {
        virtual_hosts: (0..1000)
            .map(|number| {
                let name = host(number);
                let routes: Vec<_> = (0..10)
                    .map(|version| {
                        json!({
                            "match": {"prefix": format!("/api/v{version}/")},
                            "route": {"cluster": "up"},
                        })
                    })
                    .collect();
                json!({
                    "name": name,
                    "domains": [format!("{name}.svc.cluster.local"), format!("{name}.svc"), name],
                    "routes": routes,
                })
            })
            .collect(),
        ..Http::default()
    }
}

/// The request that only the last of [`many_routes`] takes.
pub(crate) fn last_route(plan: Plan) -> Plan {
    Plan {
        host: format!("svc-999.ns-{}.svc.cluster.local", 999 % 37),
        path: "/api/v9/items".to_owned(),
        ..plan
    }
}

/// Options of a sidecar's inbound side.
pub(crate) fn inbound(log: &Path) -> Http {
    Http {
        filters: vec![bootstrap::rbac(&json!({
            "authenticated": {"principal_name": {"prefix": "spiffe://cluster.local/ns/default/"}},
        }))],
        more: vec![
            ("access_log", bootstrap::access_log(log, true)),
            ("forward_client_cert_details", json!("SANITIZE_SET")),
            (
                "set_current_client_cert_details",
                json!({"uri": true, "subject": true}),
            ),
        ],
        ..Http::default()
    }
}

/// 10,000 clusters with circuit breakers, as a mesh without scoping would push them.
pub(crate) fn many_clusters(site: &Site) -> Bootstraps {
    let to = site.http1;
    Box::new(move |ports| {
        let mut clusters = vec![cluster("up", to, false, None)];
        clusters.extend((0..CLUSTERS).map(|number| {
            let name = format!(
                "outbound|8080||svc-{number}.ns-{}.svc.cluster.local",
                number % 37
            );
            let mut cluster = cluster(&name, to, false, None);
            cluster["circuit_breakers"] = json!({"thresholds": [{
                "max_connections": 4096, "max_pending_requests": 4096, "max_requests": 4096,
            }]});
            cluster
        }));
        vec![bootstrap(
            ports.admin[0],
            &[listener(ports.entry, &http(Http::default()), None)],
            &clusters,
        )]
    })
}

/// Every scenario of CPU time, in the order of the table.
pub(crate) fn all(site: &Site) -> Vec<Scenario> {
    let plain = |_: &Ports| Http::default();
    let h1 = Plan::new(Protocol::Http1, 64, 1);
    let h2 = Plan::new(Protocol::Http2, 16, 4);
    let h2_single = Plan::new(Protocol::Http2, 64, 1);
    let grpc = Plan {
        path: "/bench.Service/Method".to_owned(),
        body: 64,
        // The message and its prefix.
        answer: 64 + 5,
        ..Plan::new(Protocol::Grpc, 16, 4)
    };
    let over = |plan: &Plan, tls: &Arc<ClientConfig>| Plan {
        tls: Some(tls.clone()),
        ..plan.clone()
    };
    let fresh = |tls| Plan {
        fresh: true,
        ..over(&Plan::new(Protocol::Http1, 16, 1), tls)
    };
    let down = Plan {
        answer: MIB,
        ..Plan::new(Protocol::Http1, 8, 1)
    };
    let up = Plan {
        body: MIB,
        ..Plan::new(Protocol::Http1, 8, 1)
    };
    let h2_down = Plan {
        answer: MIB,
        ..Plan::new(Protocol::Http2, 4, 2)
    };
    let messages = Plan {
        body: 64,
        ..Plan::new(Protocol::Messages, 64, 1)
    };
    let download = Plan::new(Protocol::Download, 4, 1);
    let upload = Plan::new(Protocol::Upload, 4, 1);
    let both = ["h2", "http/1.1"];
    let ends_tls = |leaf| Some(bootstrap::downstream_tls(&site.folder, leaf, false, &both));
    let ends_mutual = || {
        Some(bootstrap::downstream_tls(
            &site.folder,
            "ecdsa",
            true,
            &both,
        ))
    };
    let new = |name, title, plan: &Plan, envoy_goal, bootstraps| Scenario {
        name,
        title,
        unit: Unit::Request,
        plan: plan.clone(),
        relay: None,
        envoy_goal,
        relay_goal: None,
        latency_goal: None,
        direct: site.http1,
        bootstraps,
    };
    // The relay carries the scenario's protocol in plain text.
    let against = |scenario: Scenario, plan: &Plan, to, goal| Scenario {
        relay: Some((plan.clone(), to)),
        relay_goal: Some(goal),
        ..scenario
    };
    let per_byte = |scenario: Scenario| Scenario {
        unit: Unit::Byte,
        ..scenario
    };
    let timed = |scenario: Scenario, goal| Scenario {
        latency_goal: Some(goal),
        ..scenario
    };
    let (http1, http2) = (site.http1, site.http2);
    let authz = {
        let to = site.authorization;
        Box::new(move |ports: &Ports| {
            let options = Http {
                filters: vec![bootstrap::ext_authz()],
                ..Http::default()
            };
            vec![bootstrap(
                ports.admin[0],
                &[listener(ports.entry, &http(options), None)],
                &[
                    cluster("up", http1, false, None),
                    cluster("authz", to, true, None),
                ],
            )]
        })
    };
    let logged = |ports: &Ports| Http {
        more: vec![("access_log", bootstrap::access_log(&ports.log, false))],
        ..Http::default()
    };
    vec![
        timed(
            against(
                new(
                    "h1",
                    "HTTP/1.1 keep-alive, 64 connections",
                    &h1,
                    0.25,
                    single(http1, false, None, plain),
                ),
                &h1,
                http1,
                1.20,
            ),
            0.62,
        ),
        against(
            new(
                "h2",
                "HTTP/2, 16 connections × 4 streams",
                &h2,
                0.13,
                single(http2, true, None, plain),
            ),
            &h2,
            http2,
            1.1,
        ),
        against(
            new(
                "h2-single",
                "HTTP/2, 64 connections × 1 stream",
                &h2_single,
                0.15,
                single(http2, true, None, plain),
            ),
            &h2_single,
            http2,
            0.75,
        ),
        against(
            new(
                "grpc",
                "gRPC unary, 16 × 4",
                &grpc,
                0.13,
                single(site.grpc, true, None, plain),
            ),
            &grpc,
            site.grpc,
            1.1,
        ),
        against(
            new(
                "tls",
                "TLS 1.3 keep-alive, HTTP/1.1",
                &over(&h1, &site.tls),
                0.28,
                single(http1, false, ends_tls("ecdsa"), plain),
            ),
            &h1,
            http1,
            1.6,
        ),
        timed(
            against(
                new(
                    "mtls-pair",
                    "mTLS pair, HTTP/1.1, both proxies",
                    &h1,
                    0.24,
                    pair(site, http1, false),
                ),
                &h1,
                http1,
                3.3,
            ),
            0.42,
        ),
        against(
            new(
                "mtls-pair-grpc",
                "mTLS pair, gRPC, both proxies",
                &grpc,
                0.16,
                pair(site, site.grpc, true),
            ),
            &grpc,
            site.grpc,
            3.3,
        ),
        against(
            new(
                "inbound",
                "Inbound sidecar: mTLS, RBAC, XFCC, JSON log",
                &over(&h1, &site.mutual),
                0.25,
                single(http1, false, ends_mutual(), |ports| inbound(&ports.log)),
            ),
            &h1,
            http1,
            1.8,
        ),
        against(
            new(
                "ext-authz",
                "ext_authz, a gRPC check per request",
                &h1,
                0.17,
                authz,
            ),
            &h1,
            http1,
            1.8,
        ),
        against(
            new(
                "routes",
                "1,000 hosts × 10 routes, the last",
                &last_route(h1.clone()),
                0.20,
                single(http1, false, None, |_| many_routes()),
            ),
            &h1,
            http1,
            1.35,
        ),
        against(
            new(
                "access-log",
                "Access log to a file",
                &h1,
                0.20,
                single(http1, false, None, logged),
            ),
            &h1,
            http1,
            1.35,
        ),
        new(
            "handshake-ecdsa",
            "Handshake, ECDSA P-256",
            &fresh(&site.tls),
            0.45,
            single(http1, false, ends_tls("ecdsa"), plain),
        ),
        new(
            "handshake-mutual",
            "Handshake, mutual, ECDSA P-256",
            &fresh(&site.mutual),
            0.48,
            single(http1, false, ends_mutual(), plain),
        ),
        new(
            "handshake-rsa",
            "Handshake, RSA-2048",
            &fresh(&site.tls),
            0.45,
            single(http1, false, ends_tls("rsa"), plain),
        ),
        against(
            new(
                "tcp-messages",
                "TCP, 64-byte messages",
                &messages,
                0.60,
                tcp(site.echo),
            ),
            &messages,
            site.echo,
            1.05,
        ),
        per_byte(against(
            new(
                "tcp-down",
                "TCP bulk, to the client",
                &download,
                0.42,
                tcp(site.source),
            ),
            &download,
            site.source,
            0.55,
        )),
        per_byte(against(
            new(
                "tcp-up",
                "TCP bulk, to the upstream",
                &upload,
                0.42,
                tcp(site.sink),
            ),
            &upload,
            site.sink,
            0.55,
        )),
        per_byte(new(
            "body-down",
            "1 MiB responses, HTTP/1.1",
            &down,
            0.60,
            single(site.http1_mib, false, None, plain),
        )),
        // Counted by request: the load sees no bytes of a request's body come back.
        new(
            "body-up",
            "1 MiB requests, HTTP/1.1",
            &up,
            0.60,
            single(http1, false, None, plain),
        ),
        per_byte(new(
            "body-tls",
            "1 MiB responses, TLS",
            &over(&down, &site.tls),
            0.52,
            single(site.http1_mib, false, ends_tls("ecdsa"), plain),
        )),
        per_byte(new(
            "body-h2",
            "1 MiB responses, HTTP/2",
            &h2_down,
            0.65,
            single(site.http2_mib, true, None, plain),
        )),
    ]
}
