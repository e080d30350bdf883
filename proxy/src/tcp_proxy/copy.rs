//! Bytes both ways between two connections, each half closed on its own.
//!
//! A connection that waits holds no buffer: bytes are read into one that belongs to the worker and written
//! at once; only what the other side does not take is kept, and then no more is read until it is gone.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

const BUFFER: usize = 64 * 1024;
/// Reads before others on this worker get their turn.
const TURNS: usize = 16;

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

/// When to give up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) idle: Option<Duration>,
    pub(super) deadline: Option<Instant>,
}

/// One direction.
#[derive(Debug, Default)]
struct Half {
    /// Read and not yet written.
    left: Bytes,
    read_all: bool,
    unflushed: bool,
    done: bool,
}

/// Copies until both directions have ended; then both connections are closed. `received` and `sent` are
/// told the bytes from and to the downstream.
pub(super) async fn both<D, U>(
    mut downstream: D,
    mut upstream: U,
    limits: &Limits,
    received: impl Fn(u64),
    sent: impl Fn(u64),
) -> Ended
where
    D: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    let (mut up, mut down) = (Half::default(), Half::default());
    let mut idle = Timer::new(limits.idle);
    let mut deadline = limits.deadline.map(|at| Box::pin(sleep_until(at)));
    poll_fn(|cx| {
        let mut moved = false;
        // Bytes are counted when read from the downstream, and when written to it.
        let upward = up.poll(
            cx,
            &mut downstream,
            &mut upstream,
            &received,
            &|_| {},
            &mut moved,
        );
        let downward = down.poll(
            cx,
            &mut upstream,
            &mut downstream,
            &|_| {},
            &sent,
            &mut moved,
        );
        match upward {
            Poll::Ready(Err((Fault::Reading, error))) => {
                return Poll::Ready(Ended::Failed(Side::Downstream, error));
            }
            Poll::Ready(Err((Fault::Writing, error))) if !down_is_coming(&down) => {
                return Poll::Ready(Ended::Failed(Side::Upstream, error));
            }
            // The upstream takes no more, but what it has said already is still delivered.
            Poll::Ready(Err((Fault::Writing, _))) => up.done = true,
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
        if let Some(deadline) = &mut deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Ended::TooLong);
        }
        if idle.poll(cx, moved).is_ready() {
            return Poll::Ready(Ended::Idle);
        }
        Poll::Pending
    })
    .await
}

fn down_is_coming(down: &Half) -> bool {
    !down.done
}

enum Fault {
    Reading,
    Writing,
}

impl Half {
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        read: &impl Fn(u64),
        wrote: &impl Fn(u64),
        moved: &mut bool,
    ) -> Poll<Result<(), (Fault, io::Error)>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        for _ in 0..TURNS {
            while self.left.has_remaining() {
                match Pin::new(&mut *to).poll_write(cx, &self.left) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(0)) => {
                        return Poll::Ready(Err((Fault::Writing, io::ErrorKind::WriteZero.into())));
                    }
                    Poll::Ready(Ok(n)) => {
                        self.left.advance(n);
                        self.unflushed = true;
                        *moved = true;
                        wrote(n as u64);
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err((Fault::Writing, error))),
                }
            }
            if self.read_all {
                match Pin::new(&mut *to).poll_shutdown(cx) {
                    Poll::Pending => return Poll::Pending,
                    // It may be closed already, which is what we wanted.
                    Poll::Ready(_) => {
                        self.done = true;
                        return Poll::Ready(Ok(()));
                    }
                }
            }
            let step = SCRATCH.with_borrow_mut(|scratch| {
                let mut buffer = ReadBuf::new(scratch);
                match Pin::new(&mut *from).poll_read(cx, &mut buffer) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err((Fault::Reading, error))),
                    Poll::Ready(Ok(())) => {}
                }
                let mut piece = buffer.filled();
                if piece.is_empty() {
                    self.read_all = true;
                    return Poll::Ready(Ok(()));
                }
                *moved = true;
                read(piece.len() as u64);
                while !piece.is_empty() {
                    match Pin::new(&mut *to).poll_write(cx, piece) {
                        Poll::Ready(Ok(n)) if n > 0 => {
                            piece = &piece[n..];
                            self.unflushed = true;
                            wrote(n as u64);
                        }
                        Poll::Ready(Err(error)) => {
                            return Poll::Ready(Err((Fault::Writing, error)));
                        }
                        Poll::Ready(Ok(_)) => {
                            return Poll::Ready(Err((
                                Fault::Writing,
                                io::ErrorKind::WriteZero.into(),
                            )));
                        }
                        Poll::Pending => {
                            self.left = Bytes::copy_from_slice(piece);
                            return Poll::Ready(Ok(()));
                        }
                    }
                }
                Poll::Ready(Ok(()))
            });
            match step {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(fault)) => return Poll::Ready(Err(fault)),
                Poll::Pending => {
                    // Nothing more to say for now: what TLS holds back must leave.
                    if self.unflushed {
                        match Pin::new(&mut *to).poll_flush(cx) {
                            Poll::Ready(Ok(())) => self.unflushed = false,
                            Poll::Ready(Err(error)) => {
                                return Poll::Ready(Err((Fault::Writing, error)));
                            }
                            Poll::Pending => {}
                        }
                    }
                    return Poll::Pending;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Goes off after a time without a sign of life. The timer itself is moved only when it goes off.
struct Timer {
    limit: Option<Duration>,
    last: Instant,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Timer {
    fn new(limit: Option<Duration>) -> Timer {
        let last = Instant::now();
        Timer {
            limit,
            last,
            sleep: limit.map(|limit| Box::pin(sleep_until(last + limit))),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, alive: bool) -> Poll<()> {
        let (Some(limit), Some(sleep)) = (self.limit, self.sleep.as_mut()) else {
            return Poll::Pending;
        };
        if alive {
            self.last = Instant::now();
        }
        while sleep.as_mut().poll(cx).is_ready() {
            let due = self.last + limit;
            if Instant::now() >= due {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(due);
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    const NONE: Limits = Limits {
        idle: None,
        deadline: None,
    };

    #[tokio::test]
    async fn each_half_closes_on_its_own() {
        let (mut client, downstream) = duplex(64);
        let (upstream, mut server) = duplex(64);
        let counts = std::cell::Cell::new((0, 0));
        let copying = both(
            downstream,
            upstream,
            &NONE,
            |n| counts.set((counts.get().0 + n, counts.get().1)),
            |n| counts.set((counts.get().0, counts.get().1 + n)),
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
        assert_eq!(counts.get(), (8, 11));
    }

    #[tokio::test]
    async fn more_than_the_buffers_hold_passes() {
        let (mut client, downstream) = duplex(1000);
        let (upstream, mut server) = duplex(777);
        let data: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let copying = both(downstream, upstream, &NONE, |_| {}, |_| {});
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

    #[tokio::test(start_paused = true)]
    async fn silence_ends_it() {
        let (mut client, downstream) = duplex(64);
        let (upstream, _server) = duplex(64);
        let limits = Limits {
            idle: Some(Duration::from_secs(10)),
            deadline: None,
        };
        let began = Instant::now();
        let copying = both(downstream, upstream, &limits, |_| {}, |_| {});
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
