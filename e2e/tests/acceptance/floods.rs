//! Attacks at full speed on one connection while ordinary requests pass on others: none of those fails, the
//! proxy's memory stays bounded, and where Envoy has a limit the attacker's connection is ended.
//!
//! The same floods run against stock Envoy (`ENVOY_BIN`), so that what is asked of us is what it does. Whoever is ended
//! comes back at once and floods again, until the time is over. `make floods` runs them for longer on a release build.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use e2e::process::{Process, Spec, program};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};

/// How long each flood lasts: `FLOOD_SECONDS`, or 1.5 s.
fn flood_time() -> anyhow::Result<Duration> {
    let seconds = match std::env::var("FLOOD_SECONDS") {
        Ok(seconds) => seconds.parse().context("FLOOD_SECONDS is no number")?,
        Err(_) => 1.5,
    };
    Ok(Duration::try_from_secs_f64(seconds)?)
}

/// Longest answer to an ordinary request.
const PATIENCE: Duration = Duration::from_secs(5);
/// A flood may cost so much memory while it lasts.
const MAX_GROWTH_KIB: u64 = 32 * 1024;
/// Who is to be ended does not get rid of more than the kernel's buffers hold, and a little.
const MAX_SENT: usize = 64 << 20;
/// Ordinary connections: so many that their requests keep their rate when an answer takes a while.
const CONNECTIONS: usize = 50;
/// Wait before who was ended comes back, so that the ports of this machine suffice.
const RETURN: Duration = Duration::from_millis(1);

/// Requests a second on each of them: 1,000 in all. A debug build carries less beside a flood.
fn rate(program: &Path) -> f64 {
    let debug = program
        .parent()
        .is_some_and(|folder| folder.ends_with("debug"));
    if debug { 4.0 } else { 20.0 }
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// `GET http://a/`, by static indexes but for the authority.
const REQUEST: &[u8] = b"\x82\x86\x84\x41\x01a";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
    out
}

/// Client stream number `n`.
fn stream(n: u64) -> u32 {
    u32::try_from(2 * n + 1).unwrap()
}

/// What must become of the flooding connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Closed by the proxy.
    Ended,
    /// Answered with this status, and closed.
    Refused(u16),
    /// Whatever: Envoy has no limit here, and memory is the only concern.
    Free,
}

impl Fate {
    fn is_met(self, end: &End) -> bool {
        match self {
            Fate::Ended => end.closed && end.sent < MAX_SENT,
            Fate::Refused(status) => end.closed && end.status == Some(status),
            Fate::Free => true,
        }
    }
}

struct Flood {
    name: &'static str,
    /// Sent once.
    opening: Vec<u8>,
    /// Piece number n, sent as fast as the proxy takes it.
    piece: Box<dyn FnMut(u64) -> Vec<u8> + Send>,
    /// Wait between pieces; nothing for full speed.
    pause: Duration,
    /// Reads what the proxy says while it floods; not reading is the worse attack where answers are due.
    reads: bool,
    fate: Fate,
}

fn http2(
    name: &'static str,
    fate: Fate,
    piece: impl FnMut(u64) -> Vec<u8> + Send + 'static,
) -> Flood {
    Flood {
        name,
        opening: [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat(),
        piece: Box::new(piece),
        pause: Duration::ZERO,
        reads: true,
        fate,
    }
}

fn http1(
    name: &'static str,
    fate: Fate,
    opening: &str,
    piece: impl FnMut(u64) -> Vec<u8> + Send + 'static,
) -> Flood {
    Flood {
        opening: opening.into(),
        ..http2(name, fate, piece)
    }
}

fn floods() -> Vec<Flood> {
    let unread = |flood: Flood| Flood {
        reads: false,
        ..flood
    };
    let slow = |flood: Flood| Flood {
        pause: Duration::from_millis(100),
        ..flood
    };
    let opened = |flood: Flood, flags: u8| Flood {
        opening: [&flood.opening[..], &frame(HEADERS, flags, 1, REQUEST)].concat(),
        ..flood
    };
    let post = "POST / HTTP/1.1\r\nhost: a\r\n";
    vec![
        http2("rapid reset", Fate::Ended, |n| {
            let request = frame(HEADERS, END_HEADERS | END_STREAM, stream(n), REQUEST);
            [request, frame(RST_STREAM, 0, stream(n), &[0, 0, 0, 8])].concat()
        }),
        opened(
            http2("CONTINUATION", Fate::Ended, |_| {
                // A literal without indexing of 1,000 bytes.
                let field = [b"\x00\x01x\x7f\xe9\x06".as_slice(), &[b'a'; 1000]].concat();
                frame(CONTINUATION, 0, 1, &field)
            }),
            0,
        ),
        unread(http2("SETTINGS", Fate::Ended, |_| {
            frame(SETTINGS, 0, 0, &[]).repeat(100)
        })),
        unread(http2("PING", Fate::Ended, |_| {
            frame(PING, 0, 0, &[7; 8]).repeat(100)
        })),
        http2("PRIORITY", Fate::Ended, |_| {
            frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1]).repeat(100)
        }),
        http2("WINDOW_UPDATE", Fate::Ended, |_| {
            frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]).repeat(100)
        }),
        opened(
            http2("empty DATA", Fate::Free, |_| {
                frame(DATA, 0, 1, &[]).repeat(100)
            }),
            END_HEADERS,
        ),
        http2("empty HEADERS", Fate::Ended, |n| {
            frame(HEADERS, 0, stream(n), &[])
        }),
        http2("HPACK amplification", Fate::Free, |n| {
            // The first enters 3 KB into the table; every block then names it 4,000 times.
            let mut block = REQUEST.to_vec();
            if n == 0 {
                block.extend_from_slice(b"\x40\x01x\x7f\xb9\x16");
                block.extend_from_slice(&[b'a'; 3000 - 56]);
            }
            block.extend_from_slice(&[0xbe; 4000]);
            frame(HEADERS, END_HEADERS | END_STREAM, stream(n), &block)
        }),
        slow(http1(
            "slow head",
            Fate::Refused(408),
            "GET / HTTP/1.1\r\nhost: a\r\n",
            |_| b"x: y\r\n".to_vec(),
        )),
        slow(http1(
            "slow body",
            Fate::Refused(408),
            &format!("{post}content-length: 1000000\r\n\r\n"),
            |_| b"x".to_vec(),
        )),
        http1(
            "header count",
            Fate::Refused(431),
            "GET / HTTP/1.1\r\nhost: a\r\n",
            |_| b"x: y\r\n".repeat(100),
        ),
        http1(
            "header size",
            Fate::Refused(431),
            "GET / HTTP/1.1\r\nhost: a\r\nx: ",
            |_| vec![b'a'; 4096],
        ),
        http1(
            "chunk extension",
            Fate::Free,
            &format!("{post}transfer-encoding: chunked\r\n\r\n1;"),
            |_| vec![b'a'; 4096],
        ),
    ]
}

/// What was seen of a flood's end.
#[derive(Debug)]
#[allow(dead_code, reason = "shown by Debug")]
struct End {
    closed: bool,
    /// HTTP/1.1 status of the first answer.
    status: Option<u16>,
    /// Code of the last GOAWAY.
    goaway: Option<u32>,
    sent: usize,
}

fn end(received: &[u8], closed: bool, sent: usize) -> End {
    let status = received
        .strip_prefix(b"HTTP/1.1 ")
        .and_then(|rest| std::str::from_utf8(rest.get(..3)?).ok()?.parse().ok());
    let mut goaway = None;
    let mut rest = received;
    while status.is_none()
        && let Some((head, after)) = rest.split_first_chunk::<9>()
    {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let Some((payload, after)) = after.split_at_checked(length) else {
            break;
        };
        if head[3] == GOAWAY {
            let code = payload[4..].first_chunk().copied().map(u32::from_be_bytes);
            goaway = code.or(goaway);
        }
        rest = after;
    }
    End {
        closed,
        status,
        goaway,
        sent,
    }
}

/// Floods until the proxy closes the connection or the time is over.
async fn run(flood: &mut Flood, to: SocketAddr, time: Duration) -> anyhow::Result<End> {
    let (mut read, mut write) = TcpStream::connect(to).await?.into_split();
    let over = Instant::now() + time;
    let reads = flood.reads;
    let stop = Arc::new(tokio::sync::Notify::new());
    let stopped = stop.clone();
    let reader = tokio::spawn(async move {
        let mut received = Vec::new();
        let mut buffer = vec![0; 16 * 1024];
        if !reads {
            stopped.notified().await;
        }
        loop {
            match timeout(time + Duration::from_secs(2), read.read(&mut buffer)).await {
                // An unread flood's answers would be long; its end is what matters.
                Ok(Ok(n @ 1..)) => {
                    received.extend_from_slice(&buffer[..n]);
                    if received.len() > 64 << 20 {
                        return (received, false);
                    }
                }
                Ok(_) => return (received, true),
                Err(_) => return (received, false),
            }
        }
    });
    let mut sent = 0;
    let written = async {
        write.write_all(&flood.opening).await?;
        for n in 0.. {
            if Instant::now() > over || reader.is_finished() {
                break;
            }
            let piece = (flood.piece)(n);
            write.write_all(&piece).await?;
            sent += piece.len();
            if !flood.pause.is_zero() {
                tokio::time::sleep(flood.pause).await;
            }
        }
        std::io::Result::Ok(())
    };
    // A proxy that has stopped reading, or has closed, is as good an end as any for the writer.
    timeout(time, written).await.ok();
    stop.notify_one();
    let (received, closed) = reader.await?;
    Ok(end(&received, closed, sent))
}

/// Floods, and comes back whenever it was ended, until the time is over: the first end that is not due, else the
/// first, and how many connections there were.
async fn attack(mut flood: Flood, to: SocketAddr, time: Duration) -> anyhow::Result<(End, u64)> {
    let over = Instant::now() + time;
    let first = run(&mut flood, to, time).await?;
    let mut connections = 1;
    while Instant::now() < over && flood.fate.is_met(&first) {
        tokio::time::sleep(RETURN).await;
        let end = run(&mut flood, to, time).await?;
        connections += 1;
        if !flood.fate.is_met(&end) {
            return Ok((end, connections));
        }
    }
    Ok((first, connections))
}

fn bootstrap(entry: SocketAddr, admin: SocketAddr, upstream: SocketAddr) -> Value {
    let address = |at: SocketAddr| json!({"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}});
    let manager = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "request_headers_timeout": "0.5s",
        "request_timeout": "0.7s",
        "route_config": {"virtual_hosts": [{
            "name": "all", "domains": ["*"],
            "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "up"}}],
        }]},
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
        }],
    });
    json!({
        "admin": {"address": address(admin)},
        "static_resources": {
            "listeners": [{
                "name": "entry", "address": address(entry),
                "filter_chains": [{"filters": [{
                    "name": "envoy.filters.network.http_connection_manager", "typed_config": manager,
                }]}],
            }],
            "clusters": [{
                "name": "up", "type": "STATIC", "connect_timeout": "2s",
                "load_assignment": {"cluster_name": "up", "endpoints": [{"lb_endpoints": [
                    {"endpoint": {"address": address(upstream)}},
                ]}]},
            }],
        },
    })
}

/// Answers every GET with 200. The floods' POSTs never end, and get no answer.
async fn upstream(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let mut buffer = vec![0; 16 * 1024];
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                let gets = buffer[..read].windows(6).filter(|w| w == b"GET / ").count();
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".repeat(gets);
                if stream.write_all(&answer).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// Counts of the ordinary traffic.
#[derive(Debug, Default)]
struct Ordinary {
    good: AtomicU64,
    failed: AtomicU64,
    took: Mutex<Vec<Duration>>,
    over: AtomicBool,
}

impl Ordinary {
    /// The 99th percentile and the slowest since the last call, in ms.
    fn slow(&self) -> (f64, f64) {
        let mut took = std::mem::take(&mut *self.took.lock().unwrap());
        took.sort_unstable();
        let ms = |at: usize| took.get(at).map_or(0.0, |took| took.as_secs_f64() * 1e3);
        (ms(took.len() * 99 / 100), ms(took.len().saturating_sub(1)))
    }
}

async fn ask(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> std::io::Result<bool> {
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        .await?;
    buffer.clear();
    while !buffer.ends_with(b"\r\n\r\nok") {
        if stream.read_buf(buffer).await? == 0 {
            return Ok(false);
        }
    }
    Ok(buffer.starts_with(b"HTTP/1.1 200 "))
}

async fn ordinary(
    to: SocketAddr,
    rate: f64,
    begin: tokio::time::Instant,
    counts: Arc<Ordinary>,
) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(to).await?;
    let mut buffer = Vec::new();
    let mut ticks = tokio::time::interval_at(begin, Duration::from_secs_f64(1.0 / rate));
    while !counts.over.load(Ordering::Relaxed) {
        ticks.tick().await;
        let started = Instant::now();
        let answer = timeout(PATIENCE, ask(&mut stream, &mut buffer)).await;
        counts.took.lock().unwrap().push(started.elapsed());
        if matches!(answer, Ok(Ok(true))) {
            counts.good.fetch_add(1, Ordering::Relaxed);
        } else {
            counts.failed.fetch_add(1, Ordering::Relaxed);
            stream = TcpStream::connect(to).await?;
        }
    }
    Ok(())
}

fn resident_kib(id: u32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    status
        .lines()
        .find_map(|line| {
            line.strip_prefix("VmRSS:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .context("no VmRSS")
}

async fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0").await?.local_addr()?)
}

async fn survive(path: PathBuf) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let (entry, admin) = (free_port().await?, free_port().await?);
    let file = folder.path().join("bootstrap.json");
    let bootstrap = bootstrap(entry, admin, listener.local_addr()?);
    std::fs::write(&file, serde_json::to_vec(&bootstrap)?)?;
    tokio::spawn(upstream(listener));
    let id = (std::process::id() % 20_000).to_string();
    let args = [
        "-c",
        &file.display().to_string(),
        "--concurrency",
        "1",
        "--base-id",
        &id,
        "-l",
        "error",
    ];
    let rate = rate(&path);
    let spec = Spec {
        name: "flooded".to_owned(),
        path,
        args: args.map(str::to_owned).to_vec(),
        env: Vec::new(),
        own_group: false,
    };
    let mut proxy = Process::start(spec, folder.path())?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(entry).await.is_err() {
        proxy.check()?;
        anyhow::ensure!(Instant::now() < deadline, "the proxy does not listen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    let counts = Arc::new(Ordinary::default());
    let clients: Vec<_> = (0..CONNECTIONS)
        .map(|n| {
            // One after the other, not all at once.
            let begin = n as f64 / CONNECTIONS as f64 / rate;
            let begin = tokio::time::Instant::now() + Duration::from_secs_f64(begin);
            tokio::spawn(ordinary(entry, rate, begin, counts.clone()))
        })
        .collect();
    let time = flood_time()?;
    let asked = rate * CONNECTIONS as f64 * time.as_secs_f64();
    let mut wrong = Vec::new();
    for flood in floods() {
        let before = resident_kib(proxy.id())?;
        let good = counts.good.load(Ordering::Relaxed);
        let failed = counts.failed.load(Ordering::Relaxed);
        counts.slow();
        let (name, fate) = (flood.name, flood.fate);
        let running = tokio::spawn(attack(flood, entry, time));
        let mut most = before;
        while !running.is_finished() {
            most = most.max(resident_kib(proxy.id()).unwrap_or(most));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let (end, connections) = running.await??;
        let good = counts.good.load(Ordering::Relaxed) - good;
        let failed = counts.failed.load(Ordering::Relaxed) - failed;
        let (p99, slowest) = counts.slow();
        let after = resident_kib(proxy.id())?;
        println!(
            "{name}: {connections} connections, {end:?}; {good} good, {failed} failed, p99 {p99:.1} ms, \
             slowest {slowest:.1} ms; {before} KiB before, {most} at most, {after} after"
        );
        if !fate.is_met(&end) {
            wrong.push(format!("{name}: {end:?} where {fate:?} is due"));
        }
        if failed > 0 || (good as f64) < asked / 4.0 {
            wrong.push(format!(
                "{name}: {failed} ordinary requests failed, {good} did not"
            ));
        }
        if most > before + MAX_GROWTH_KIB {
            wrong.push(format!("{name}: memory grew from {before} to {most} KiB"));
        }
        proxy.check()?;
    }
    counts.over.store(true, Ordering::Relaxed);
    for client in clients {
        client.await??;
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_hurt_nobody_else() -> anyhow::Result<()> {
    survive(program("proxy")?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_meet_the_same_fate_in_envoy() -> anyhow::Result<()> {
    let Some(envoy) = std::env::var_os("ENVOY_BIN") else {
        eprintln!("skipped: ENVOY_BIN is not set (`make test` sets it)");
        return Ok(());
    };
    survive(envoy.into()).await
}
