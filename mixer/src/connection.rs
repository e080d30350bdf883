//! Connections of the API: HTTP/2 by hyper, and one task a connection for all its calls.
//!
//! Proxies send calls in bunches. If each call had a task of its own, as hyper's and tonic's servers give it, the
//! first answer of a bunch would wake the connection's task before the second call is looked at, and nearly each
//! answer would be a write, and a wake-up at the other end, of its own. In one task all calls of a bunch are
//! answered before the connection writes again (and [`InOnePiece`] makes one write of it). The price is that calls of one connection share a processor while
//! they compute; what waits for somebody (a handler, Redis, an adapter process) still waits beside the others, reports
//! are worked off in tasks of their own ([`Service::report`]), and proxies have a connection for each worker.

use std::{
    future::{Future, poll_fn},
    io,
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures::{
    FutureExt as _, Stream, StreamExt as _, future::BoxFuture, stream::FuturesUnordered,
};
use hyper::{body::Incoming, rt::Executor, server::conn::http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use lateen_service::{
    shutdown::Drain,
    tls::{Conn, PeerIdentity},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::{service::Routes, transport::server::Connected as _};
use tower_service::Service as _;

use crate::{
    door::{self, Answer},
    serve::Service,
};

/// Streams of one connection.
const MAX_STREAMS: u32 = 1024;
/// A peer that says nothing for so long is asked whether it is there.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// It has so long to say so.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// After so many answers other connections have their turn, and what measures the program's delay has.
const BUNCH: usize = 64;

/// What is served.
#[derive(Clone, Debug)]
pub struct Api {
    /// `istio.mixer.v1.Mixer`.
    pub service: Service,
    /// All else.
    pub others: Routes,
}

/// Serves connections until stopping begins; then each ends with its last call. [`Drain::finish`] waits for them.
pub async fn serve(
    connections: impl Stream<Item = io::Result<Conn>> + Send + 'static,
    api: Api,
    drain: Drain,
) {
    let stopping = drain.stopping();
    let mut stopping = pin!(stopping);
    let mut connections = pin!(connections);
    loop {
        // Both are cancel-safe: a connection that is not taken stays in the stream.
        let next = tokio::select! {
            () = stopping.as_mut() => return,
            next = connections.next() => next,
        };
        match next {
            Some(Ok(connection)) => {
                drain.spawn(drive(connection, api.clone(), drain.stopping()));
            }
            Some(Err(error)) => tracing::debug!(%error, "a connection was not accepted"),
            None => return,
        }
    }
}

/// A connection that takes one piece at a time. h2 copies short messages into its buffer then, and answers that are
/// ready together leave in one write; else each message from 256 bytes on is a write of its own, which costs more
/// than all else about a check.
struct InOnePiece(Conn);

impl AsyncRead for InOnePiece {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for InOnePiece {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Calls of one connection that have not been polled yet.
#[derive(Clone, Default)]
struct Begun(Arc<Mutex<Vec<BoxFuture<'static, ()>>>>);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Begun {
    fn execute(&self, call: F) {
        // A call that panics ends alone: its stream is reset.
        let call = AssertUnwindSafe(call).catch_unwind().map(drop).boxed();
        let mut begun = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        begun.push(call);
    }
}

impl Begun {
    fn take(&self, under_way: &FuturesUnordered<BoxFuture<'static, ()>>) -> bool {
        let mut begun = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let any = !begun.is_empty();
        begun.drain(..).for_each(|call| under_way.push(call));
        any
    }
}

async fn drive(connection: Conn, api: Api, stopping: impl Future<Output = ()>) {
    let peer = connection.connect_info();
    let begun = Begun::default();
    let calls = Calls { api, peer };
    let served = http2::Builder::new(begun.clone())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(InOnePiece(connection)), calls);
    let mut served = pin!(served);
    let mut stopping = pin!(stopping.fuse());
    let mut under_way = FuturesUnordered::new();
    let ended = poll_fn(|cx| {
        if stopping.as_mut().poll(cx).is_ready() {
            served.as_mut().graceful_shutdown();
        }
        turn(served.as_mut(), &begun, &mut under_way, cx)
    })
    .await;
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection failed");
    }
}

/// Reads and writes, and has all calls go as far as they can, for as long as either gets anywhere; [`BUNCH`] calls
/// at most.
fn turn<T>(
    mut connection: Pin<&mut impl Future<Output = T>>,
    begun: &Begun,
    under_way: &mut FuturesUnordered<BoxFuture<'static, ()>>,
    cx: &mut Context<'_>,
) -> Poll<T> {
    let mut done = 0;
    loop {
        if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
            return Poll::Ready(ended);
        }
        if done >= BUNCH {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let mut is_idle = !begun.take(under_way);
        while done < BUNCH
            && let Poll::Ready(Some(())) = under_way.poll_next_unpin(cx)
        {
            is_idle = false;
            done += 1;
        }
        if is_idle {
            return Poll::Pending;
        }
    }
}

/// The calls of one connection.
struct Calls {
    api: Api,
    peer: PeerIdentity,
}

impl hyper::service::Service<http::Request<Incoming>> for Calls {
    type Response = http::Response<Answer>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn call(&self, mut request: http::Request<Incoming>) -> Self::Future {
        if let Some(call) = door::Call::of(request.uri().path()) {
            let service = self.api.service.clone();
            return async move { Ok(door::answer(call, service, request).await) }.boxed();
        }
        request.extensions_mut().insert(self.peer.clone());
        // Routes are always ready.
        let answer = self.api.others.clone().call(request);
        async move {
            let Ok(answer) = answer.await;
            Ok(answer.map(Answer::Routed))
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Begins three calls, each of which needs two turns, and counts how often it writes meanwhile.
    struct Fake {
        begun: Begun,
        answered: Arc<AtomicUsize>,
        written: Vec<usize>,
    }

    impl Future for Fake {
        type Output = ();

        fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
            let answered = self.answered.load(Ordering::Relaxed);
            if self.written.is_empty() {
                for number in 0..4 {
                    let counter = Arc::clone(&self.answered);
                    self.begun.execute(async move {
                        assert_ne!(number, 3, "a call that panics");
                        counter.fetch_add(1, Ordering::Relaxed);
                    });
                }
            }
            self.written.push(answered);
            match answered {
                3 => Poll::Ready(()),
                _ => Poll::Pending,
            }
        }
    }

    #[tokio::test]
    async fn many_calls_let_others_have_their_turn() {
        let begun = Begun::default();
        let answered = Arc::new(AtomicUsize::new(0));
        for _ in 0..3 * BUNCH {
            let answered = Arc::clone(&answered);
            begun.execute(async move {
                answered.fetch_add(1, Ordering::Relaxed);
            });
        }
        let mut under_way = FuturesUnordered::new();
        let mut turns = Vec::new();
        poll_fn(|cx| {
            let connection = pin!(std::future::pending::<()>());
            let turn = turn(connection, &begun, &mut under_way, cx);
            turns.push(answered.load(Ordering::Relaxed));
            match turns.len() {
                3 => Poll::Ready(()),
                _ => turn, // and it has asked to be polled again
            }
        })
        .await;
        assert_eq!(turns, [BUNCH, 2 * BUNCH, 3 * BUNCH]);
    }

    #[tokio::test]
    async fn calls_that_come_together_are_answered_together() {
        let begun = Begun::default();
        let mut fake = Fake {
            begun: begun.clone(),
            answered: Arc::default(),
            written: Vec::new(),
        };
        let mut under_way = FuturesUnordered::new();
        poll_fn(|cx| turn(Pin::new(&mut fake), &begun, &mut under_way, cx)).await;
        assert_eq!(
            fake.written,
            [0, 3],
            "nothing is written between the answers, and a panic takes nobody along"
        );
    }
}
