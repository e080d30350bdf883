//! Active health checking: hosts are asked again and again, on the main runtime, whether they are well.
//! Envoy: `HealthCheckerImplBase` and its kinds for HTTP, gRPC and TCP.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lateen_protocols::envoy::{
    envoy::{
        config::core::v3::{
            HealthCheck as Proto, RequestMethod,
            health_check::{
                self, HealthChecker, Payload as PayloadProto, payload::Payload as PayloadKind,
            },
        },
        r#type::v3::{CodecClientType, Int64Range},
    },
    google::protobuf as pb,
};
use prost::Message;
use rand::Rng as _;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    Address, Cluster, Host, Transport,
    host::{ActiveHealth, HostState},
};
use crate::{
    config_error::ConfigError,
    proto::{duration, invalid, optional_duration},
    stats::{Counter, Gauge, Scope},
};

/// Envoy: `no_traffic_interval` "defaults to 60 seconds".
const NO_TRAFFIC: Duration = Duration::from_secs(60);
/// Most bytes of an answer that are read.
const MAX_ANSWER: usize = 64 * 1024;

/// One compiled `health_checks` entry.
#[derive(Debug)]
pub(super) struct Checker {
    ask: Ask,
    timeout: Duration,
    interval: Duration,
    interval_jitter: Duration,
    interval_jitter_percent: u32,
    initial_jitter: Duration,
    unhealthy_interval: Option<Duration>,
    unhealthy_edge_interval: Option<Duration>,
    healthy_edge_interval: Option<Duration>,
    no_traffic_interval: Duration,
    no_traffic_healthy_interval: Option<Duration>,
    unhealthy_threshold: u32,
    healthy_threshold: u32,
    alt_port: Option<u16>,
    alpn: Vec<Vec<u8>>,
    log_failures: bool,
    stats: Stats,
}

/// What a host is asked.
#[derive(Debug)]
enum Ask {
    Http(Box<HttpAsk>),
    Grpc {
        service: String,
        authority: Option<String>,
    },
    Tcp {
        send: Bytes,
        receive: Vec<Bytes>,
    },
}

#[derive(Debug)]
struct HttpAsk {
    method: http::Method,
    path: String,
    host: Option<String>,
    headers: http::HeaderMap,
    send: Bytes,
    receive: Vec<Bytes>,
    expected: Vec<(u16, u16)>,
    retriable: Vec<(u16, u16)>,
    http2: bool,
}

/// `cluster.NAME.health_check.*`.
#[derive(Debug)]
struct Stats {
    attempt: Counter,
    success: Counter,
    failure: Counter,
    network_failure: Counter,
    healthy: Gauge,
    degraded: Gauge,
}

/// What came of asking once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Well,
    Degraded,
    /// The host itself says that it is not well: no need to ask again.
    Unwell,
    /// It said something that may be a passing trouble.
    Retriable,
    /// It could not be asked.
    Unreachable,
}

impl Checker {
    pub(super) fn compile(proto: &Proto, scope: &Scope) -> Result<Checker, ConfigError> {
        let unsupported = [
            (
                "transport_socket_match_criteria",
                proto.transport_socket_match_criteria.is_some(),
            ),
            ("event_service", proto.event_service.is_some()),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
            return Err(invalid(*field, "not supported"));
        }
        let required = |field: &str, value: Option<&pb::Duration>| {
            let value = value.ok_or_else(|| invalid(field, "is required"))?;
            duration(field, value)
        };
        let threshold = |field: &str, value: Option<&pb::UInt32Value>| match value {
            Some(value) if value.value > 0 => Ok(value.value),
            Some(_) => Err(invalid(field, "is 0")),
            None => Err(invalid(field, "is required")),
        };
        let optional = |field: &str, value: Option<&pb::Duration>| optional_duration(field, value);
        let scope = scope.scope("health_check.");
        Ok(Checker {
            ask: Ask::compile(proto)?,
            timeout: required("timeout", proto.timeout.as_ref())?,
            interval: required("interval", proto.interval.as_ref())?,
            interval_jitter: optional("interval_jitter", proto.interval_jitter.as_ref())?
                .unwrap_or_default(),
            interval_jitter_percent: proto.interval_jitter_percent,
            initial_jitter: optional("initial_jitter", proto.initial_jitter.as_ref())?
                .unwrap_or_default(),
            unhealthy_interval: optional("unhealthy_interval", proto.unhealthy_interval.as_ref())?,
            unhealthy_edge_interval: optional(
                "unhealthy_edge_interval",
                proto.unhealthy_edge_interval.as_ref(),
            )?,
            healthy_edge_interval: optional(
                "healthy_edge_interval",
                proto.healthy_edge_interval.as_ref(),
            )?,
            no_traffic_interval: optional(
                "no_traffic_interval",
                proto.no_traffic_interval.as_ref(),
            )?
            .unwrap_or(NO_TRAFFIC),
            no_traffic_healthy_interval: optional(
                "no_traffic_healthy_interval",
                proto.no_traffic_healthy_interval.as_ref(),
            )?,
            unhealthy_threshold: threshold(
                "unhealthy_threshold",
                proto.unhealthy_threshold.as_ref(),
            )?,
            healthy_threshold: threshold("healthy_threshold", proto.healthy_threshold.as_ref())?,
            alt_port: match proto.alt_port.as_ref() {
                None => None,
                Some(port) => Some(
                    u16::try_from(port.value)
                        .map_err(|_| invalid("alt_port", "is greater than 65535"))?,
                ),
            },
            alpn: proto.tls_options.as_ref().map_or_else(Vec::new, |tls| {
                tls.alpn_protocols
                    .iter()
                    .map(|protocol| protocol.clone().into_bytes())
                    .collect()
            }),
            log_failures: proto.always_log_health_check_failures,
            stats: Stats {
                attempt: scope.counter("attempt"),
                success: scope.counter("success"),
                failure: scope.counter("failure"),
                network_failure: scope.counter("network_failure"),
                healthy: scope.gauge("healthy"),
                degraded: scope.gauge("degraded"),
            },
        })
    }
}

impl Ask {
    fn compile(proto: &Proto) -> Result<Ask, ConfigError> {
        match proto.health_checker.as_ref() {
            Some(HealthChecker::HttpHealthCheck(http)) => http_ask(http)
                .map(|ask| Ask::Http(Box::new(ask)))
                .map_err(|error| error.within("http_health_check")),
            Some(HealthChecker::TcpHealthCheck(tcp)) => Ok(Ask::Tcp {
                send: match tcp.send.as_ref() {
                    None => Bytes::new(),
                    Some(send) => {
                        payload(send).map_err(|error| error.within("tcp_health_check.send"))?
                    }
                },
                receive: tcp
                    .receive
                    .iter()
                    .map(payload)
                    .collect::<Result<_, _>>()
                    .map_err(|error| error.within("tcp_health_check.receive"))?,
            }),
            Some(HealthChecker::GrpcHealthCheck(grpc)) => {
                if !grpc.initial_metadata.is_empty() {
                    return Err(invalid(
                        "grpc_health_check.initial_metadata",
                        "not supported",
                    ));
                }
                Ok(Ask::Grpc {
                    service: grpc.service_name.clone(),
                    authority: Some(grpc.authority.clone()).filter(|name| !name.is_empty()),
                })
            }
            Some(HealthChecker::CustomHealthCheck(custom)) => Err(invalid(
                "custom_health_check",
                format!("{} is not supported", custom.name),
            )),
            None => Err(invalid("health_checker", "is required")),
        }
    }
}

fn http_ask(proto: &health_check::HttpHealthCheck) -> Result<HttpAsk, ConfigError> {
    let unsupported = [
        ("service_name_matcher", proto.service_name_matcher.is_some()),
        (
            "response_buffer_size",
            proto.response_buffer_size.as_ref().is_some_and(|size| {
                usize::try_from(size.value).is_ok_and(|size| size > MAX_ANSWER)
            }),
        ),
    ];
    if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
        return Err(invalid(*field, "not supported"));
    }
    if !proto.path.starts_with('/') {
        return Err(invalid("path", "does not begin with '/'"));
    }
    let method = match proto.method() {
        RequestMethod::MethodUnspecified | RequestMethod::Get => http::Method::GET,
        RequestMethod::Connect => return Err(invalid("method", "CONNECT is not allowed")),
        other => http::Method::from_bytes(other.as_str_name().as_bytes())
            .map_err(|_| invalid("method", "is not known"))?,
    };
    let mut headers = http::HeaderMap::new();
    headers.insert("user-agent", http::HeaderValue::from_static("Envoy/HC"));
    headers.insert("x-forwarded-proto", http::HeaderValue::from_static("http"));
    for option in &proto.request_headers_to_add {
        let Some(header) = option.header.as_ref() else {
            continue;
        };
        let name = http::HeaderName::from_bytes(header.key.as_bytes()).map_err(|_| {
            invalid(
                "request_headers_to_add",
                format!("'{}' is no name", header.key),
            )
        })?;
        let value = http::HeaderValue::from_str(&header.value).map_err(|_| {
            invalid(
                "request_headers_to_add",
                format!("the value of '{}' cannot be sent", header.key),
            )
        })?;
        headers.append(name, value);
    }
    for name in &proto.request_headers_to_remove {
        headers.remove(name.as_str());
    }
    Ok(HttpAsk {
        method,
        path: proto.path.clone(),
        host: Some(proto.host.clone()).filter(|host| !host.is_empty()),
        headers,
        send: match proto.send.as_ref() {
            None => Bytes::new(),
            Some(send) => payload(send).map_err(|error| error.within("send"))?,
        },
        receive: proto
            .receive
            .iter()
            .map(payload)
            .collect::<Result<_, _>>()
            .map_err(|error| error.within("receive"))?,
        expected: match proto.expected_statuses.as_slice() {
            [] => vec![(200, 201)],
            ranges => statuses("expected_statuses", ranges)?,
        },
        retriable: statuses("retriable_statuses", &proto.retriable_statuses)?,
        http2: match proto.codec_client_type() {
            CodecClientType::Http1 => false,
            CodecClientType::Http2 => true,
            CodecClientType::Http3 => {
                return Err(invalid("codec_client_type", "HTTP/3 is not supported"));
            }
        },
    })
}

/// Half-open ranges of statuses.
fn statuses(field: &str, ranges: &[Int64Range]) -> Result<Vec<(u16, u16)>, ConfigError> {
    ranges
        .iter()
        .map(
            |range| match (u16::try_from(range.start), u16::try_from(range.end)) {
                (Ok(start), Ok(end))
                    if (100..600).contains(&start) && start < end && end <= 600 =>
                {
                    Ok((start, end))
                }
                _ => Err(invalid(
                    field,
                    format!("[{}, {}) is no range of statuses", range.start, range.end),
                )),
            },
        )
        .collect()
}

fn payload(proto: &PayloadProto) -> Result<Bytes, ConfigError> {
    match proto.payload.as_ref() {
        Some(PayloadKind::Binary(bytes)) => Ok(bytes.clone().into()),
        Some(PayloadKind::Text(hex)) => {
            let digits = hex.as_bytes();
            let byte = |pair: &[u8]| {
                let text = std::str::from_utf8(pair).ok()?;
                u8::from_str_radix(text, 16).ok()
            };
            let bytes: Option<Vec<u8>> = digits.chunks(2).map(byte).collect();
            match bytes {
                Some(bytes) if digits.len() % 2 == 0 && !bytes.is_empty() => Ok(bytes.into()),
                _ => Err(invalid("text", format!("'{hex}' is not hexadecimal"))),
            }
        }
        None => Err(invalid("payload", "is required")),
    }
}

/// Checks the hosts of a cluster until it is gone.
pub(super) async fn watch(cluster: Weak<Cluster>, checkers: Arc<[Checker]>) {
    let Some(mut changes) = cluster.upgrade().map(|cluster| cluster.watch_hosts()) else {
        return;
    };
    let mut running: HashMap<Address, (Arc<HostState>, JoinSet<()>)> = HashMap::new();
    loop {
        let Some(hosts) = cluster
            .upgrade()
            .map(|cluster| cluster.hosts().hosts.clone())
        else {
            return;
        };
        running.retain(|address, (state, _)| {
            hosts
                .iter()
                .any(|host| host.address == *address && Arc::ptr_eq(&host.state, state))
        });
        for host in hosts {
            if running.contains_key(&host.address) {
                continue;
            }
            let mut tasks = JoinSet::new();
            for index in 0..checkers.len() {
                tasks.spawn(check(
                    cluster.clone(),
                    host.clone(),
                    checkers.clone(),
                    index,
                ));
            }
            running.insert(host.address.clone(), (host.state.clone(), tasks));
        }
        // Ends with the cluster, which owns the sender.
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Asks one host again and again.
async fn check(cluster: Weak<Cluster>, host: Arc<Host>, checkers: Arc<[Checker]>, index: usize) {
    let Some(checker) = checkers.get(index) else {
        return;
    };
    sleep(random_up_to(checker.initial_jitter)).await;
    let mut counted = Counted::new(checker);
    loop {
        checker.stats.attempt.inc();
        let asked = {
            let Some(cluster) = cluster.upgrade() else {
                return;
            };
            ask(&cluster, &host, checker).await
        };
        let answer = match asked {
            Ok(answer) => answer,
            Err(error) => {
                tracing::debug!(host = %host.address, %error, "health check failed");
                Answer::Unreachable
            }
        };
        match answer {
            Answer::Well | Answer::Degraded => checker.stats.success.inc(),
            Answer::Unwell | Answer::Retriable => checker.stats.failure.inc(),
            Answer::Unreachable => {
                checker.stats.failure.inc();
                checker.stats.network_failure.inc();
            }
        }
        if checker.log_failures && !matches!(answer, Answer::Well | Answer::Degraded) {
            tracing::warn!(host = %host.address, ?answer, "health check failed");
        }
        let changed = counted.take(answer);
        let Some(cluster) = cluster.upgrade() else {
            return;
        };
        if let Some(health) = changed {
            host.state.set_active_health(index, health);
            cluster.active_health_changed(&host, health);
        }
        let traffic = cluster.stats.upstream_cx_total.value() > 0;
        drop(cluster);
        sleep(counted.wait(traffic, changed.is_some())).await;
    }
}

fn random_up_to(most: Duration) -> Duration {
    if most.is_zero() {
        return most;
    }
    most.mul_f64(rand::rng().random())
}

/// Answers of one host so far, and how it stands with the gauges.
struct Counted<'a> {
    checker: &'a Checker,
    health: ActiveHealth,
    first: bool,
    in_row: u32,
}

impl<'a> Counted<'a> {
    fn new(checker: &'a Checker) -> Counted<'a> {
        Counted {
            checker,
            health: ActiveHealth::Failed,
            first: true,
            in_row: 0,
        }
    }

    /// Takes an answer; what the host is now, if that is new.
    fn take(&mut self, answer: Answer) -> Option<ActiveHealth> {
        let was = self.health;
        let well = match answer {
            Answer::Well => Some(ActiveHealth::Passed),
            Answer::Degraded => Some(ActiveHealth::Degraded),
            _ => None,
        };
        let now = match (well, was) {
            (Some(now), ActiveHealth::Failed) => {
                self.in_row += 1;
                // The first answer decides; later the host must prove itself.
                if self.first || self.in_row >= self.checker.healthy_threshold {
                    now
                } else {
                    was
                }
            }
            (Some(now), _) => {
                self.in_row = 0;
                now
            }
            (None, ActiveHealth::Failed) => {
                self.in_row = 0;
                was
            }
            (None, _) => {
                self.in_row += 1;
                let at_once = answer == Answer::Unwell;
                if at_once || self.in_row >= self.checker.unhealthy_threshold {
                    ActiveHealth::Failed
                } else {
                    was
                }
            }
        };
        let told = self.first || now != was;
        self.first = false;
        if now != was {
            self.in_row = 0;
            self.gauge(was, -1);
            self.gauge(now, 1);
            self.health = now;
        }
        told.then_some(now)
    }

    fn gauge(&self, health: ActiveHealth, n: i64) {
        match health {
            ActiveHealth::Passed => self.checker.stats.healthy.add(n),
            ActiveHealth::Degraded => {
                self.checker.stats.healthy.add(n);
                self.checker.stats.degraded.add(n);
            }
            ActiveHealth::Failed => {}
        }
    }

    /// How long to wait before asking again. Envoy: `HealthCheckerImplBase::interval`.
    fn wait(&self, traffic: bool, changed: bool) -> Duration {
        let checker = self.checker;
        let failing = self.health == ActiveHealth::Failed;
        let base = match (traffic, failing, self.in_row > 0 || changed) {
            (true, false, false) => checker.interval,
            // On its way to be unhealthy.
            (true, false, true) => checker.unhealthy_interval.filter(|_| !changed).unwrap_or(
                checker
                    .healthy_edge_interval
                    .filter(|_| changed)
                    .unwrap_or(checker.interval),
            ),
            (true, true, true) if changed => checker
                .unhealthy_edge_interval
                .or(checker.unhealthy_interval)
                .unwrap_or(checker.interval),
            (true, true, _) => checker.unhealthy_interval.unwrap_or(checker.interval),
            (false, false, _) => checker
                .no_traffic_healthy_interval
                .unwrap_or(checker.no_traffic_interval),
            (false, true, _) => checker.no_traffic_interval,
        };
        let percent = base.mul_f64(f64::from(checker.interval_jitter_percent) / 100.0);
        base + random_up_to(percent) + random_up_to(checker.interval_jitter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.gauge(self.health, -1);
    }
}

async fn ask(cluster: &Cluster, host: &Host, checker: &Checker) -> io::Result<Answer> {
    match timeout(checker.timeout, ask_in_time(cluster, host, checker)).await {
        Ok(answer) => answer,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

async fn ask_in_time(cluster: &Cluster, host: &Host, checker: &Checker) -> io::Result<Answer> {
    match &host.address {
        Address::Ip(address) => {
            let mut address = *address;
            if let Some(port) = checker.alt_port {
                address.set_port(port);
            }
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            secured(cluster, host, checker, stream).await
        }
        Address::Pipe(path) => {
            secured(cluster, host, checker, UnixStream::connect(&**path).await?).await
        }
    }
}

async fn secured<S>(
    cluster: &Cluster,
    host: &Host,
    checker: &Checker,
    stream: S,
) -> io::Result<Answer>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + Into<crate::net::Transport> + 'static,
{
    match cluster.transports.get(host.transport) {
        Transport::Plain => asked(cluster, checker, stream).await,
        Transport::Tls(context) => {
            let alpn = (!checker.alpn.is_empty()).then_some(checker.alpn.as_slice());
            let (stream, _) = context.connect(stream.into(), None, alpn).await?;
            asked(cluster, checker, crate::net::Transport::from(stream)).await
        }
    }
}

async fn asked<S>(cluster: &Cluster, checker: &Checker, stream: S) -> io::Result<Answer>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    match &checker.ask {
        Ask::Http(ask) => http(cluster, ask, stream).await,
        Ask::Grpc { service, authority } => {
            let authority = authority.as_deref().unwrap_or(&cluster.name);
            grpc(service, authority, stream).await
        }
        Ask::Tcp { send, receive } => tcp(send, receive, stream).await,
    }
}

async fn tcp<S>(send: &[u8], receive: &[Bytes], mut stream: S) -> io::Result<Answer>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(send).await?;
    stream.flush().await?;
    let mut read = BytesMut::new();
    while !contains_all(&read, receive) {
        if read.len() > MAX_ANSWER || stream.read_buf(&mut read).await? == 0 {
            return Ok(Answer::Retriable);
        }
    }
    Ok(Answer::Well)
}

/// Whether all pieces are in `text`, in order, perhaps with others between. Envoy: "fuzzy" match.
fn contains_all(text: &[u8], pieces: &[Bytes]) -> bool {
    let mut rest = text;
    pieces.iter().all(|piece| {
        match rest
            .windows(piece.len())
            .position(|window| window == &piece[..])
        {
            Some(at) => {
                rest = &rest[at + piece.len()..];
                true
            }
            None => false,
        }
    })
}

type Request = http::Request<Full<Bytes>>;

async fn exchange<S>(
    stream: S,
    http2: bool,
    request: Request,
) -> io::Result<http::Response<hyper::body::Incoming>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let io = TokioIo::new(stream);
    if http2 {
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
                .await
                .map_err(io::Error::other)?;
        // Errors reach whoever waits for the answer.
        tokio::spawn(async move { drop(connection.await) });
        sender.send_request(request).await.map_err(io::Error::other)
    } else {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io)
            .await
            .map_err(io::Error::other)?;
        tokio::spawn(async move { drop(connection.await) });
        sender.send_request(request).await.map_err(io::Error::other)
    }
}

async fn http<S>(cluster: &Cluster, ask: &HttpAsk, stream: S) -> io::Result<Answer>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let host = ask.host.as_deref().unwrap_or(&cluster.name);
    let mut request = Request::new(Full::new(ask.send.clone()));
    *request.method_mut() = ask.method.clone();
    *request.headers_mut() = ask.headers.clone();
    let uri = if ask.http2 {
        format!("http://{host}{}", ask.path)
    } else {
        request.headers_mut().insert(
            http::header::HOST,
            http::HeaderValue::from_str(host).map_err(io::Error::other)?,
        );
        ask.path.clone()
    };
    *request.uri_mut() = uri.parse().map_err(io::Error::other)?;
    let response = exchange(stream, ask.http2, request).await?;
    let status = response.status().as_u16();
    let within = |ranges: &[(u16, u16)]| ranges.iter().any(|(a, b)| (*a..*b).contains(&status));
    let degraded = response.headers().contains_key("x-envoy-degraded");
    if within(&ask.retriable) && !within(&ask.expected) {
        return Ok(Answer::Retriable);
    }
    if !within(&ask.expected) {
        return Ok(Answer::Unwell);
    }
    if !ask.receive.is_empty() {
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(io::Error::other)?
            .to_bytes();
        if !contains_all(&body, &ask.receive) {
            return Ok(Answer::Unwell);
        }
    }
    Ok(if degraded {
        Answer::Degraded
    } else {
        Answer::Well
    })
}

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, PartialEq, Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`; 1 is SERVING.
#[derive(Clone, PartialEq, Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// Asks by `grpc.health.v1`.
pub(crate) async fn grpc<S>(service: &str, authority: &str, stream: S) -> io::Result<Answer>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    const SERVING: i32 = 1;
    const PREFIX: usize = 5;
    let message = HealthCheckRequest {
        service: service.to_owned(),
    }
    .encode_to_vec();
    let mut body = vec![0];
    body.extend_from_slice(&u32::try_from(message.len()).unwrap_or(0).to_be_bytes());
    body.extend_from_slice(&message);
    let request = http::Request::post(format!("http://{authority}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "Envoy/HC")
        .body(Full::new(Bytes::from(body)))
        .map_err(io::Error::other)?;
    let response = exchange(stream, true, request).await?;
    if response.status() != http::StatusCode::OK {
        return Ok(Answer::Unwell);
    }
    let early = response.headers().get("grpc-status").cloned();
    let collected = Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await
        .map_err(io::Error::other)?;
    let status = collected
        .trailers()
        .and_then(|trailers| trailers.get("grpc-status"))
        .cloned()
        .or(early);
    if status.is_none_or(|status| status.as_bytes() != b"0") {
        return Ok(Answer::Unwell);
    }
    let body = collected.to_bytes();
    let serving = body
        .get(PREFIX..)
        .and_then(|message| HealthCheckResponse::decode(message).ok())
        .is_some_and(|answer| answer.status == SERVING);
    Ok(if serving {
        Answer::Well
    } else {
        Answer::Unwell
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checker() -> Checker {
        let second = |n| {
            Some(pb::Duration {
                seconds: n,
                nanos: 0,
            })
        };
        let proto = Proto {
            timeout: second(1),
            interval: second(5),
            unhealthy_interval: second(2),
            unhealthy_edge_interval: second(3),
            unhealthy_threshold: Some(pb::UInt32Value { value: 2 }),
            healthy_threshold: Some(pb::UInt32Value { value: 3 }),
            health_checker: Some(HealthChecker::TcpHealthCheck(
                health_check::TcpHealthCheck::default(),
            )),
            ..Proto::default()
        };
        Checker::compile(&proto, &crate::stats::Registry::new().scope("cluster.c.")).unwrap()
    }

    #[test]
    fn the_first_answer_decides_and_later_ones_are_counted() {
        let checker = checker();
        let mut counted = Counted::new(&checker);
        use ActiveHealth::{Failed, Passed};
        for (answer, told) in [
            (Answer::Well, Some(Passed)),
            (Answer::Unreachable, None),
            (Answer::Well, None),
            (Answer::Unreachable, None),
            (Answer::Unreachable, Some(Failed)),
            (Answer::Well, None),
            (Answer::Well, None),
            (Answer::Well, Some(Passed)),
            (Answer::Unwell, Some(Failed)),
        ] {
            assert_eq!(counted.take(answer), told, "{answer:?}");
        }
        assert_eq!(checker.stats.healthy.value(), 0);
    }

    #[test]
    fn how_often_depends_on_traffic_and_health() {
        let checker = checker();
        let mut counted = Counted::new(&checker);
        let seconds =
            |counted: &Counted<'_>, traffic, changed| counted.wait(traffic, changed).as_secs();
        assert_eq!(seconds(&counted, false, false), 60);
        counted.take(Answer::Well);
        assert_eq!(seconds(&counted, true, false), 5);
        counted.take(Answer::Unreachable);
        assert_eq!(seconds(&counted, true, false), 2);
        counted.take(Answer::Unreachable);
        assert_eq!(seconds(&counted, true, true), 3);
        assert_eq!(seconds(&counted, true, false), 2);
    }

    #[test]
    fn pieces_are_found_in_order() {
        let pieces: Vec<Bytes> = vec!["ab".into(), "cd".into()];
        assert!(contains_all(b"xxabyycdzz", &pieces));
        assert!(!contains_all(b"cdab", &pieces));
        assert!(contains_all(b"", &[]));
    }

    #[tokio::test]
    async fn a_tcp_host_is_held_to_what_it_should_say() {
        let (near, mut far) = tokio::io::duplex(64);
        far.write_all(b"+PO").await.unwrap();
        let answer = tokio::spawn(async move { tcp(b"PING", &["+PONG".into()], near).await });
        let mut asked = [0; 4];
        far.read_exact(&mut asked).await.unwrap();
        assert_eq!(&asked, b"PING");
        far.write_all(b"NG\r\n").await.unwrap();
        assert_eq!(answer.await.unwrap().unwrap(), Answer::Well);
    }

    #[test]
    fn statuses_are_half_open_ranges() {
        let range = |start, end| Int64Range { start, end };
        assert_eq!(statuses("x", &[range(200, 300)]).unwrap(), vec![(200, 300)]);
        assert!(statuses("x", &[range(300, 300)]).is_err());
        assert!(statuses("x", &[range(99, 300)]).is_err());
    }
}
