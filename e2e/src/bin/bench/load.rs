//! The closed loop: keep-alive connections that send the next request when the answer is there, and an
//! upstream that answers at once. Raw sockets, so that the instrument costs little.

use std::{
    cell::Cell,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::LocalSet,
};

/// Connections of the load.
const CONNECTIONS: usize = 64;
/// Bytes of an answer's body.
const BODY_BYTES: usize = 128;

/// Counts of a running load.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) good: Cell<u64>,
    pub(crate) bad: Cell<u64>,
}

/// Answers every request on a connection; reads only what ends a head.
pub(crate) async fn upstream(listener: TcpListener) {
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {BODY_BYTES}\r\ncontent-type: text/plain\r\n\r\n{}",
        "x".repeat(BODY_BYTES)
    );
    let answer: Rc<str> = answer.into();
    while let Ok((mut stream, _)) = listener.accept().await {
        let answer = answer.clone();
        tokio::task::spawn_local(async move {
            stream.set_nodelay(true).ok();
            let mut buffer = vec![0; 8192];
            let mut filled = 0;
            while let Ok(read @ 1..) = stream.read(&mut buffer[filled..]).await {
                filled += read;
                if buffer[..filled].ends_with(b"\r\n\r\n") {
                    filled = 0;
                    if stream.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            }
        });
    }
}

/// Sends requests over all connections until `end`.
pub(crate) async fn run(to: SocketAddr, counts: Rc<Counts>, end: Instant) -> anyhow::Result<()> {
    let local = LocalSet::new();
    for _ in 0..CONNECTIONS {
        let mut stream = TcpStream::connect(to)
            .await
            .context("no connection to the proxy")?;
        stream.set_nodelay(true)?;
        let counts = counts.clone();
        local.spawn_local(async move {
            let request = "GET /some/path HTTP/1.1\r\nhost: app.default.svc.cluster.local\r\nuser-agent: bench\r\naccept: */*\r\n\r\n";
            let mut buffer = vec![0; 8192];
            while Instant::now() < end {
                let answered = async {
                    stream.write_all(request.as_bytes()).await.ok()?;
                    answer(&mut stream, &mut buffer).await
                };
                match tokio::time::timeout(Duration::from_secs(5), answered).await {
                    Ok(Some(200)) => counts.good.set(counts.good.get() + 1),
                    _ => {
                        counts.bad.set(counts.bad.get() + 1);
                        return;
                    }
                }
            }
        });
    }
    local.await;
    Ok(())
}

/// Reads one answer with a body of known length; its status.
async fn answer(stream: &mut TcpStream, buffer: &mut [u8]) -> Option<u16> {
    let mut filled = 0;
    loop {
        match stream.read(&mut buffer[filled..]).await {
            Ok(read @ 1..) => filled += read,
            _ => return None,
        }
        let got = &buffer[..filled];
        if let Some(head) = got.windows(4).position(|w| w == b"\r\n\r\n")
            && filled >= head + 4 + BODY_BYTES
        {
            let status = std::str::from_utf8(got.get(9..12)?).ok()?;
            return status.parse().ok();
        }
    }
}
