//! Bytes both ways between two connections, each half closed on its own.
//!
//! A connection that waits holds no buffer: bytes are read into one that belongs to the worker and written
//! at once; only what the other side does not take is kept, and then no more is read until it is gone.
//! Bulk between two plain sockets does not even come up from the kernel.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use crate::{
    net::{
        Transport,
        splice::{Fault as SpliceFault, Splice},
    },
    timer::Deadline,
};

/// What one read takes at most. With 64 KiB a byte of bulk costs a fifth more.
const BUFFER: usize = 256 * 1024;
/// Bytes read or written before others on this worker get their turn.
const TURN: usize = 1 << 20;
/// A read of this much is bulk, and so is what follows the second one in a row.
const BULK: usize = 64 * 1024;
/// Reads of less than this are messages, for which splicing costs more than copying.
const MESSAGE: u64 = 16 * 1024;
/// Messages in a row that end the splicing.
const MESSAGES: u8 = 4;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// Whose fault a failure was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Downstream,
    Upstream,
}

/// How the copying ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// Both sides closed.
    Finished,
    /// No bytes for too long.
    Idle,
    /// The connection's longest duration.
    TooLong,
    /// One side broke.
    Failed(Side, io::Error),
}

/// Where bytes were seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passed {
    FromDownstream,
    ToUpstream,
    FromUpstream,
    ToDownstream,
}

/// When to give up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) idle: Option<Duration>,
    pub(super) deadline: Option<Instant>,
}

/// Copies until both directions have ended; then both connections are closed. `read` is what was read of
/// the downstream already. `tell` is told what passes where.
pub(super) async fn both(
    mut downstream: Transport,
    read: Bytes,
    mut upstream: Transport,
    limits: &Limits,
    tell: impl Fn(Passed, u64),
) -> Ended {
    if !read.is_empty() {
        tell(Passed::FromDownstream, read.len() as u64);
    }
    let mut up = Half {
        left: read,
        ..Half::default()
    };
    let mut down = Half::default();
    let mut idle = Deadline::default();
    if let Some(limit) = limits.idle {
        idle.set(Instant::now() + limit);
    }
    let mut deadline = Deadline::default();
    if let Some(at) = limits.deadline {
        deadline.set(at);
    }
    poll_fn(|cx| {
        let mut moved = false;
        let upward = up.poll(
            cx,
            &mut downstream,
            &mut upstream,
            &|n| tell(Passed::FromDownstream, n),
            &|n| tell(Passed::ToUpstream, n),
            &mut moved,
        );
        let downward = down.poll(
            cx,
            &mut upstream,
            &mut downstream,
            &|n| tell(Passed::FromUpstream, n),
            &|n| tell(Passed::ToDownstream, n),
            &mut moved,
        );
        match upward {
            Poll::Ready(Err((Fault::Reading, error))) => {
                return Poll::Ready(Ended::Failed(Side::Downstream, error));
            }
            // The upstream takes no more, but what it has said already is still delivered.
            Poll::Ready(Err((Fault::Writing, _))) if !down.done => up.done = true,
            Poll::Ready(Err((Fault::Writing, error))) => {
                return Poll::Ready(Ended::Failed(Side::Upstream, error));
            }
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        match downward {
            Poll::Ready(Err((Fault::Reading, error))) => {
                return Poll::Ready(Ended::Failed(Side::Upstream, error));
            }
            Poll::Ready(Err((Fault::Writing, error))) => {
                return Poll::Ready(Ended::Failed(Side::Downstream, error));
            }
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        if up.done && down.done {
            return Poll::Ready(Ended::Finished);
        }
        if deadline.poll(cx).is_ready() {
            return Poll::Ready(Ended::TooLong);
        }
        if moved && let Some(limit) = limits.idle {
            idle.set(Instant::now() + limit);
        }
        idle.poll(cx).map(|()| Ended::Idle)
    })
    .await
}

enum Fault {
    Reading,
    Writing,
}

type Step<T> = Poll<Result<T, (Fault, io::Error)>>;

/// One direction.
#[derive(Debug, Default)]
struct Half {
    /// Read and not yet written.
    left: Bytes,
    read_all: bool,
    unflushed: bool,
    done: bool,
    /// The last read was bulk.
    bulk: bool,
    /// Present while bytes stay in the kernel.
    splice: Option<Box<Splice>>,
    /// Messages in a row while splicing.
    messages: u8,
    /// There was no pipe to be had.
    no_pipe: bool,
}

impl Half {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Transport,
        to: &mut Transport,
        read: &impl Fn(u64),
        wrote: &impl Fn(u64),
        moved: &mut bool,
    ) -> Step<()> {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        let mut turn = 0;
        while turn < TURN {
            if !self.left.is_empty() {
                ready!(self.deliver(cx, to, wrote, moved))?;
            }
            if self.read_all {
                // It may be closed already, which is what we wanted.
                drop(ready!(to.poll_shutdown(cx)));
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            let step = if self.splice.is_some() {
                self.splice(cx, from, to, read, wrote, moved)
            } else {
                self.copy(cx, from, to, read, wrote, moved)
            };
            match step {
                Poll::Ready(Ok(n)) => turn += n,
                Poll::Ready(Err(fault)) => return Poll::Ready(Err(fault)),
                Poll::Pending => {
                    // Nothing more to say for now: what TLS holds back must leave.
                    if self.unflushed
                        && let Poll::Ready(result) = to.poll_flush(cx)
                    {
                        self.unflushed = false;
                        result.map_err(|error| (Fault::Writing, error))?;
                    }
                    return Poll::Pending;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes what is left.
    fn deliver(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut Transport,
        wrote: &impl Fn(u64),
        moved: &mut bool,
    ) -> Step<()> {
        while !self.left.is_empty() {
            let n = ready!(write(cx, to, &self.left))?;
            self.left.advance(n);
            self.unflushed = true;
            *moved = true;
            wrote(n as u64);
        }
        self.left = Bytes::new();
        Poll::Ready(Ok(()))
    }

    /// Reads once and writes that; gives how much it was.
    fn copy(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Transport,
        to: &mut Transport,
        read: &impl Fn(u64),
        wrote: &impl Fn(u64),
        moved: &mut bool,
    ) -> Step<usize> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(&mut *from).poll_read(cx, &mut buffer))
                .map_err(|error| (Fault::Reading, error))?;
            let mut piece = buffer.filled();
            let length = piece.len();
            if length == 0 {
                self.read_all = true;
                return Poll::Ready(Ok(0));
            }
            *moved = true;
            read(length as u64);
            while !piece.is_empty() {
                match write(cx, to, piece) {
                    Poll::Ready(Ok(n)) => {
                        piece = &piece[n..];
                        self.unflushed = true;
                        wrote(n as u64);
                    }
                    Poll::Ready(Err(fault)) => return Poll::Ready(Err(fault)),
                    Poll::Pending => {
                        self.left = Bytes::copy_from_slice(piece);
                        break;
                    }
                }
            }
            let bulk = length >= BULK;
            if bulk
                && self.bulk
                && !self.no_pipe
                && from.plain_tcp().is_some()
                && to.plain_tcp().is_some()
            {
                self.splice = Some(Box::default());
                self.messages = 0;
            }
            self.bulk = bulk;
            Poll::Ready(Ok(length))
        })
    }

    /// Moves what there is inside the kernel; gives how much it was.
    fn splice(
        &mut self,
        cx: &mut Context<'_>,
        from: &Transport,
        to: &Transport,
        read: &impl Fn(u64),
        wrote: &impl Fn(u64),
        moved: &mut bool,
    ) -> Step<usize> {
        let (Some(splice), Some(source), Some(sink)) =
            (&mut self.splice, from.plain_tcp(), to.plain_tcp())
        else {
            self.splice = None;
            return Poll::Ready(Ok(0));
        };
        let before = splice.inside();
        let polled = splice.poll(cx, source, sink, u64::MAX);
        let written = match &polled {
            Poll::Ready(Ok(n)) => *n,
            _ => 0,
        };
        let came = (written + splice.inside()).saturating_sub(before);
        if came > 0 {
            *moved = true;
            read(came);
        }
        match polled {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(0)) => {
                self.read_all = true;
                Poll::Ready(Ok(0))
            }
            Poll::Ready(Ok(n)) => {
                *moved = true;
                wrote(n);
                self.messages = if splice.last() < MESSAGE {
                    self.messages + 1
                } else {
                    0
                };
                if self.messages >= MESSAGES && splice.inside() == 0 {
                    self.splice = None;
                    self.bulk = false;
                }
                Poll::Ready(Ok(usize::try_from(n).unwrap_or(TURN)))
            }
            Poll::Ready(Err(SpliceFault::Reading(error))) => {
                Poll::Ready(Err((Fault::Reading, error)))
            }
            Poll::Ready(Err(SpliceFault::Writing(error))) => {
                Poll::Ready(Err((Fault::Writing, error)))
            }
            Poll::Ready(Err(SpliceFault::Pipe(error))) => {
                tracing::debug!(%error, "no pipe; copying instead");
                self.splice = None;
                self.no_pipe = true;
                Poll::Ready(Ok(0))
            }
        }
    }
}

fn write(cx: &mut Context<'_>, to: &mut Transport, bytes: &[u8]) -> Step<usize> {
    match ready!(Pin::new(to).poll_write(cx, bytes)) {
        Ok(0) => Poll::Ready(Err((Fault::Writing, io::ErrorKind::WriteZero.into()))),
        Ok(n) => Poll::Ready(Ok(n)),
        Err(error) => Poll::Ready(Err((Fault::Writing, error))),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    const NONE: Limits = Limits {
        idle: None,
        deadline: None,
    };

    fn count(counts: &std::cell::Cell<[u64; 4]>, place: Passed, n: u64) {
        let mut all = counts.get();
        all[place as usize] += n;
        counts.set(all);
    }

    #[tokio::test]
    async fn each_half_closes_on_its_own() {
        let (mut client, downstream) = duplex(64);
        let (upstream, mut server) = duplex(64);
        let counts = std::cell::Cell::new([0; 4]);
        let copying = both(
            downstream.into(),
            Bytes::new(),
            upstream.into(),
            &NONE,
            |place, n| count(&counts, place, n),
        );
        let talking = async {
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut asked = String::new();
            server.read_to_string(&mut asked).await.unwrap();
            assert_eq!(asked, "question");
            server.write_all(b"long answer").await.unwrap();
            drop(server);
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "long answer");
        };
        let (ended, ()) = tokio::join!(copying, talking);
        assert!(matches!(ended, Ended::Finished));
        assert_eq!(counts.get(), [8, 8, 11, 11]);
    }

    #[tokio::test]
    async fn more_than_the_buffers_hold_passes() {
        let (mut client, downstream) = duplex(1000);
        let (upstream, mut server) = duplex(777);
        let data: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let copying = both(
            downstream.into(),
            Bytes::new(),
            upstream.into(),
            &NONE,
            |_, _| {},
        );
        let sending = async {
            client.write_all(&data).await.unwrap();
            client.shutdown().await.unwrap();
            drop(client);
        };
        let receiving = async {
            let mut got = Vec::new();
            server.read_to_end(&mut got).await.unwrap();
            drop(server);
            got
        };
        let (_, (), got) = tokio::join!(copying, sending, receiving);
        assert_eq!(got, data);
    }

    async fn sockets() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        (near.unwrap(), far.unwrap().0)
    }

    #[tokio::test]
    async fn bulk_is_spliced_and_messages_are_copied_again() {
        let (mut client, downstream) = sockets().await;
        let (upstream, mut server) = sockets().await;
        let counts = std::cell::Cell::new([0; 4]);
        let copying = both(
            downstream.into(),
            Bytes::new(),
            upstream.into(),
            &NONE,
            |place, n| count(&counts, place, n),
        );
        let data: Vec<u8> = (0..8_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
        let talking = async {
            let (mut reader, mut writer) = client.split();
            let sending = async {
                writer.write_all(&data).await.unwrap();
            };
            let receiving = async {
                let mut got = vec![0; data.len()];
                server.read_exact(&mut got).await.unwrap();
                got
            };
            let ((), got) = tokio::join!(sending, receiving);
            assert!(got == data);
            for _ in 0..20 {
                writer.write_all(b"ping").await.unwrap();
                let mut ping = [0; 4];
                server.read_exact(&mut ping).await.unwrap();
                server.write_all(b"pong!").await.unwrap();
                let mut pong = [0; 5];
                reader.read_exact(&mut pong).await.unwrap();
                assert_eq!((&ping, &pong), (b"ping", b"pong!"));
            }
            writer.shutdown().await.unwrap();
            let mut rest = Vec::new();
            server.read_to_end(&mut rest).await.unwrap();
            assert!(rest.is_empty());
            server.shutdown().await.unwrap();
        };
        let (ended, ()) = tokio::join!(copying, talking);
        assert!(matches!(ended, Ended::Finished), "{ended:?}");
        assert_eq!(counts.get(), [8_000_080, 8_000_080, 100, 100]);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_it() {
        let (mut client, downstream) = duplex(64);
        let (upstream, _server) = duplex(64);
        let limits = Limits {
            idle: Some(Duration::from_secs(10)),
            deadline: None,
        };
        let began = Instant::now();
        let copying = both(
            downstream.into(),
            Bytes::new(),
            upstream.into(),
            &limits,
            |_, _| {},
        );
        let talking = async {
            tokio::time::advance(Duration::from_secs(9)).await;
            client.write_all(b"x").await.unwrap();
            std::future::pending::<()>().await;
        };
        let ended = tokio::select! { ended = copying => ended, () = talking => Ended::Finished };
        assert!(matches!(ended, Ended::Idle));
        assert_eq!(began.elapsed().as_secs(), 19);
    }
}
