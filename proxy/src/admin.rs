//! Envoy's admin interface: what an operator asks and orders. Runs on the main runtime, is bounded,
//! and shows no secrets.

mod clusters;
mod stats;

use std::{
    convert::Infallible,
    fmt, io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use regex::Regex;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{Notify, Semaphore},
    task::JoinSet,
    time::Instant,
};

use crate::{
    bootstrap::Bootstrap,
    control::{Control, Phase, dump},
    logging::Logging,
    secret::{Certificate, Trust},
    tls::peer::PeerCertificate,
};

/// Connections served at once; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;
/// Request line and headers.
const MAX_HEAD_BYTES: usize = 32 << 10;
/// A client must send its request within this time; idle connections live as long.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// A client that reads too slowly is cut off.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(600);
/// A filter's compiled size.
const MAX_REGEX_BYTES: usize = 1 << 20;

/// What admin shows and moves.
pub struct Admin {
    /// Configuration.
    pub control: Arc<Control>,
    /// As read at the start.
    pub bootstrap: Arc<Bootstrap>,
    /// The flags, for `/server_info`.
    pub options: Value,
    /// Begin of this process.
    pub started: Instant,
    /// Notified when the process is to end.
    pub quit: Arc<Notify>,
    /// The log level's handle.
    pub logging: Logging,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Admin")
    }
}

/// An answer.
struct Reply {
    status: StatusCode,
    kind: &'static str,
    body: String,
}

const TEXT: &str = "text/plain; charset=UTF-8";
const JSON: &str = "application/json";

impl Reply {
    fn text(body: impl Into<String>) -> Reply {
        Reply {
            status: StatusCode::OK,
            kind: TEXT,
            body: body.into(),
        }
    }

    /// Indented by one space, as Envoy's pages are.
    fn json(value: &Value) -> Reply {
        let mut body = Vec::new();
        let style = serde_json::ser::PrettyFormatter::with_indent(b" ");
        let mut writer = serde_json::Serializer::with_formatter(&mut body, style);
        // A value of JSON can be written, and memory is no device that fails.
        let written = serde::Serialize::serialize(value, &mut writer).is_ok();
        debug_assert!(written);
        body.push(b'\n');
        Reply {
            status: StatusCode::OK,
            kind: JSON,
            body: String::from_utf8(body).unwrap_or_default(),
        }
    }

    fn bad(reason: impl Into<String>) -> Reply {
        Reply {
            status: StatusCode::BAD_REQUEST,
            ..Reply::text(reason)
        }
    }
}

/// Every path with what `/help` says about it; those marked change something and need POST.
const PATHS: &[(&str, bool, &str)] = &[
    ("/certs", false, "print certs on machine"),
    ("/clusters", false, "upstream cluster status (format=json)"),
    (
        "/config_dump",
        false,
        "dump current configs (resource=, name_regex=, include_eds)",
    ),
    (
        "/drain_listeners",
        true,
        "drain listeners (graceful, inboundonly are accepted)",
    ),
    (
        "/healthcheck/fail",
        true,
        "cause the server to fail health checks",
    ),
    (
        "/healthcheck/ok",
        true,
        "cause the server to pass health checks",
    ),
    ("/help", false, "print out list of admin commands"),
    ("/listeners", false, "print listener info (format=json)"),
    ("/logging", true, "query/change logging levels (level=)"),
    ("/memory", false, "print current allocation/heap usage"),
    ("/quitquitquit", true, "exit the server"),
    (
        "/ready",
        false,
        "print server state, return 200 if LIVE, otherwise return 503",
    ),
    ("/reopen_logs", true, "reopen access logs"),
    ("/runtime", false, "print runtime values"),
    (
        "/runtime_modify",
        true,
        "change runtime values (KEY=VALUE; an empty value takes the change back)",
    ),
    (
        "/server_info",
        false,
        "print server version/status information",
    ),
    (
        "/stats",
        false,
        "print server stats (format=json|prometheus, filter=, usedonly)",
    ),
    (
        "/stats/prometheus",
        false,
        "print server stats in prometheus format",
    ),
];

/// The query of a request.
struct Query(Vec<(String, String)>);

impl Query {
    fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    fn regex(&self, name: &str) -> Result<Option<Regex>, Reply> {
        let Some(text) = self.get(name).filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let built = regex::RegexBuilder::new(text)
            .size_limit(MAX_REGEX_BYTES)
            .build();
        built
            .map(Some)
            .map_err(|e| Reply::bad(format!("Invalid regex: \"{e}\"\n")))
    }
}

impl Admin {
    /// Binds `address` and serves until the returned future is dropped.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn bind(
        self: Arc<Admin>,
        address: SocketAddr,
    ) -> io::Result<(SocketAddr, impl Future<Output = ()> + Send + 'static)> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        Ok((address, self.serve(listener)))
    }

    async fn serve(self: Arc<Admin>, listener: TcpListener) {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        // Dropped together with this future, which ends all connections.
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let Ok(slot) = slots.clone().acquire_owned().await else {
                return;
            };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, mostly: wait for some to be freed instead of spinning.
                    tracing::warn!(%error, "admin cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let admin = self.clone();
            connections.spawn(async move {
                let _slot = slot;
                let service = service_fn(move |request| {
                    let admin = admin.clone();
                    async move { Ok::<_, Infallible>(admin.answer(&request)) }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_TIMEOUT)
                    .max_buf_size(MAX_HEAD_BYTES)
                    .serve_connection(TokioIo::new(stream), service);
                match tokio::time::timeout(MAX_CONNECTION_AGE, connection).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(%error, "admin connection ended"),
                    Err(_) => tracing::debug!("admin connection cut off"),
                }
            });
        }
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let scope = self.control.shared().stats.scope("http.admin.");
        scope.counter("downstream_rq_total").inc();
        let path = request.uri().path();
        let query =
            url::form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes());
        let query = Query(query.into_owned().collect());
        let known = PATHS
            .iter()
            .find(|(known, ..)| *known == path || (*known == "/help" && path == "/"));
        let reply = match known {
            None => Reply {
                status: StatusCode::NOT_FOUND,
                ..Reply::text(format!("invalid path. {}", help()))
            },
            Some((_, true, _)) if request.method() != Method::POST => Reply {
                status: StatusCode::METHOD_NOT_ALLOWED,
                ..Reply::text(format!(
                    "Method {} not allowed, POST required.\n",
                    request.method()
                ))
            },
            Some((known, ..)) => self.run(known, &query).unwrap_or_else(|reply| reply),
        };
        scope
            .counter(&format!("downstream_rq_{}xx", reply.status.as_u16() / 100))
            .inc();
        let mut response = Response::new(Full::new(Bytes::from(reply.body)));
        *response.status_mut() = reply.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(reply.kind));
        headers.insert(
            CACHE_CONTROL,
            HeaderValue::from_static("no-cache, max-age=0"),
        );
        headers.insert(
            "x-content-type-options",
            HeaderValue::from_static("nosniff"),
        );
        headers.insert("server", HeaderValue::from_static("lateen"));
        if reply.status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(ALLOW, HeaderValue::from_static("POST"));
        }
        response
    }

    /// `Err` is an answer too, made on the way.
    fn run(&self, path: &str, query: &Query) -> Result<Reply, Reply> {
        let shared = self.control.shared();
        Ok(match path {
            "/certs" => Reply::json(&self.certs()),
            "/clusters" if query.get("format") == Some("json") => {
                Reply::json(&clusters::json(&self.control))
            }
            "/clusters" => Reply::text(clusters::text(&self.control)),
            "/config_dump" => {
                let selection = dump::Selection {
                    resource: query.get("resource").map(str::to_owned),
                    name: query.regex("name_regex")?,
                    include_eds: query.has("include_eds"),
                };
                let bootstrap = dump::bootstrap(self.bootstrap.encoded(), self.started_at());
                Reply::json(&self.control.dump(bootstrap, &selection))
            }
            "/drain_listeners" => {
                shared.drain.start();
                self.control.workers().drain_all();
                Reply::text("OK\n")
            }
            "/healthcheck/fail" => {
                shared.drain.set_health_check_failing(true);
                Reply::text("OK\n")
            }
            "/healthcheck/ok" => {
                shared.drain.set_health_check_failing(false);
                Reply::text("OK\n")
            }
            "/listeners" => self.listeners(query.get("format") == Some("json")),
            "/logging" => self.change_logging(query)?,
            "/memory" => Reply::json(&memory()),
            "/quitquitquit" => {
                self.quit.notify_one();
                Reply::text("OK\n")
            }
            "/reopen_logs" => {
                crate::access_log::reopen();
                Reply::text("OK\n")
            }
            "/runtime" => Reply::json(&shared.layers.dump()),
            "/runtime_modify" => match shared.layers.modify(&query.0) {
                Ok(()) => Reply::text("OK\n"),
                Err(reason) => Reply {
                    status: StatusCode::SERVICE_UNAVAILABLE,
                    ..Reply::text(format!("{reason}\n"))
                },
            },
            "/ready" => {
                let state = self.state();
                let status = match state {
                    "LIVE" => StatusCode::OK,
                    _ => StatusCode::SERVICE_UNAVAILABLE,
                };
                Reply {
                    status,
                    ..Reply::text(format!("{state}\n"))
                }
            }
            "/server_info" => Reply::json(&self.server_info()),
            "/stats/prometheus" => self.stats("prometheus", query)?,
            "/stats" => self.stats(query.get("format").unwrap_or("text"), query)?,
            _ => Reply::text(help()),
        })
    }

    /// Envoy's name of what we are doing.
    pub fn state(&self) -> &'static str {
        state(&self.control)
    }

    fn started_at(&self) -> SystemTime {
        SystemTime::now()
            .checked_sub(self.started.elapsed())
            .unwrap_or(SystemTime::UNIX_EPOCH)
    }

    fn stats(&self, format: &str, query: &Query) -> Result<Reply, Reply> {
        let shared = self.control.shared();
        shared
            .stats
            .scope("server.")
            .gauge("uptime")
            .set(self.started.elapsed().as_secs());
        self.count_late();
        let selection = stats::Selection {
            filter: query.regex("filter")?,
            used_only: query.has("usedonly"),
        };
        Ok(match format {
            "text" => Reply::text(stats::text(&shared.stats, &selection)),
            "json" => Reply::json(&stats::json(&shared.stats, &selection)),
            "prometheus" => Reply {
                kind: "text/plain; version=0.0.4; charset=utf-8",
                ..Reply::text(stats::prometheus(&shared.stats, &selection))
            },
            other => {
                return Err(Reply::bad(format!(
                    "unknown format {other:?}; use text, json or prometheus\n"
                )));
            }
        })
    }

    fn listeners(&self, json: bool) -> Reply {
        let active = self.control.active_listeners();
        if json {
            let statuses: Vec<Value> = active
                .iter()
                .map(|(name, listener)| {
                    let address = listener.address;
                    json!({
                        "name": name,
                        "local_address": {
                            "socket_address": {"address": address.ip().to_string(), "port_value": address.port()},
                        },
                    })
                })
                .collect();
            return Reply::json(&json!({ "listener_statuses": statuses }));
        }
        Reply::text(active.iter().fold(String::new(), |text, (name, listener)| {
            text + &format!("{name}::{}\n", listener.address)
        }))
    }

    fn change_logging(&self, query: &Query) -> Result<Reply, Reply> {
        let level = query
            .get("level")
            .or(query.0.first().map(|(_, level)| level.as_str()));
        if let Some(level) = level.filter(|level| !level.is_empty()) {
            self.logging
                .set(level)
                .map_err(|e| Reply::bad(format!("error: {e}\n")))?;
        }
        Ok(Reply::text(format!(
            "active loggers:\n  all: {}\n",
            self.logging.level()
        )))
    }

    fn server_info(&self) -> Value {
        let uptime = format!("{}s", self.started.elapsed().as_secs());
        let node = lateen_protocols::json::to_json(&self.bootstrap.node).unwrap_or(Value::Null);
        json!({
            "version": version(),
            "state": self.state(),
            "uptime_current_epoch": uptime,
            "uptime_all_epochs": uptime,
            "hot_restart_version": "disabled",
            "command_line_options": self.options,
            "node": node,
        })
    }

    /// Brings up to date what is only counted when somebody looks.
    fn count_late(&self) {
        let shared = self.control.shared();
        crate::access_log::count(&shared.stats);
        let scope = shared.stats.scope("server.");
        let open = self.control.workers().active();
        scope.gauge("total_connections").set(open);
        scope
            .gauge("memory_physical_size")
            .set(memory_pages().get(1).copied().unwrap_or(0) * PAGE);
        let slots = shared.secrets.held();
        let ends = slots.iter().flat_map(|slot| {
            let chain = slot.certificate().map(|c| c.facts.not_after);
            let roots = slot.trust().into_iter().flat_map(|trust| {
                let read = |der| PeerCertificate::read(der).ok();
                let all: Vec<_> = trust.authorities.iter().filter_map(read).collect();
                all.into_iter().map(|facts| facts.not_after)
            });
            chain.into_iter().chain(roots).collect::<Vec<_>>()
        });
        // Without certificates nothing expires. Envoy: the largest number there is.
        let days = ends.min().map_or(u64::from(u32::MAX), |end| {
            let left = end.duration_since(SystemTime::now()).unwrap_or_default();
            left.as_secs() / 86_400
        });
        scope.gauge("days_until_first_cert_expiring").set(days);
        shared.layers.count(&shared.stats.scope("runtime."));
    }

    fn certs(&self) -> Value {
        let slots = self.control.shared().secrets.held();
        let entries = slots.iter().filter(|slot| slot.is_ready()).map(|slot| {
            let chain = slot
                .certificate()
                .map(|c| vec![chain_details(&c)])
                .unwrap_or_default();
            let roots = slot.trust().map(|t| root_details(&t)).unwrap_or_default();
            json!({"ca_cert": roots, "cert_chain": chain})
        });
        json!({ "certificates": entries.collect::<Vec<_>>() })
    }
}

/// Envoy's name of what a process is doing.
pub fn state(control: &Control) -> &'static str {
    let drain = &control.shared().drain;
    match *control.phase().borrow() {
        _ if drain.is_health_check_failing() => "DRAINING",
        Phase::Clusters => "PRE_INITIALIZING",
        Phase::Listeners => "INITIALIZING",
        Phase::Live => "LIVE",
    }
}

/// As `--version` and `/server_info` say it.
pub fn version() -> String {
    format!("lateen/{}", env!("CARGO_PKG_VERSION"))
}

fn help() -> String {
    PATHS.iter().fold(
        "admin commands are:\n".to_owned(),
        |text, (path, post, what)| {
            let post = if *post { " (POST)" } else { "" };
            text + &format!("  {path}{post}: {what}\n")
        },
    )
}

fn chain_details(certificate: &Certificate) -> Value {
    details(&certificate.facts, &certificate.path)
}

fn root_details(trust: &Trust) -> Vec<Value> {
    let read = trust
        .authorities
        .iter()
        .filter_map(|der| PeerCertificate::read(der).ok());
    read.map(|facts| details(&facts, &trust.path)).collect()
}

fn details(facts: &PeerCertificate, path: &str) -> Value {
    let names = facts.uri_sans.iter().map(|uri| json!({ "uri": &**uri }));
    let names = names.chain(facts.dns_sans.iter().map(|dns| json!({ "dns": &**dns })));
    let names = names.chain(
        facts
            .ip_sans
            .iter()
            .map(|ip| json!({ "ip_address": ip.to_string() })),
    );
    let left = facts
        .not_after
        .duration_since(SystemTime::now())
        .unwrap_or_default();
    json!({
        "path": path,
        "serial_number": &*facts.serial,
        "subject_alt_names": names.collect::<Vec<_>>(),
        "days_until_expiration": (left.as_secs() / 86_400).to_string(),
        "valid_from": dump::time(facts.not_before),
        "expiration_time": dump::time(facts.not_after),
    })
}

/// Bytes of a page, on all Linux targets we build for.
const PAGE: u64 = 4096;

/// `/proc/self/statm`.
fn memory_pages() -> Vec<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let numbers = statm.split_whitespace().filter_map(|n| n.parse().ok());
    numbers.collect()
}

/// From the kernel's view of this process, in Envoy's fields.
fn memory() -> Value {
    let pages = memory_pages();
    let at = |index: usize| (pages.get(index).copied().unwrap_or(0) * PAGE).to_string();
    json!({
        "allocated": at(1),
        "heap_size": at(5),
        "pageheap_unmapped": "0",
        "pageheap_free": "0",
        "total_thread_cache": "0",
        "total_physical_bytes": at(1),
    })
}
