//! A TCP socket as a transport reads and writes it: tokio's, asked as little as possible.
//!
//! A proxy asks sockets about eleven times a request whether something is there, and most of the time it has
//! asked before. Tokio answers that with its cooperative budget, the scheduler's thread-local and the list of
//! waiters. Here the reactor's last word is looked at first, which is one load, and who waits already is not
//! registered again.

#![allow(
    unsafe_code,
    reason = "reading into memory that is not initialised, which spares writing it twice"
)]

use std::{
    cell::Cell,
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::BytesMut;
use socket2::SockRef;
use tokio::{
    io::{AsyncWrite as _, Interest, ReadBuf},
    net::TcpStream,
    task::coop,
};

/// A connected socket.
#[derive(Debug)]
pub struct Tcp {
    stream: TcpStream,
    /// Whose waker the reactor holds for reading, by the address of its data; [`NOBODY`] when that is not known.
    ///
    /// The reactor keeps a clone of the waker until the socket becomes readable, which is seen before this is
    /// looked at, or until another is registered, all of which happens here or after [`Tcp::stream`]. So the
    /// task at the address lives, and no other can have the address.
    waiting: Cell<usize>,
}

/// No waker's data lies here.
const NOBODY: usize = usize::MAX;

impl Tcp {
    /// The socket for what is not done here. Its waiters are not remembered.
    pub fn stream(&self) -> &TcpStream {
        self.waiting.set(NOBODY);
        &self.stream
    }

    /// Our address.
    pub(super) fn local_addr(&self) -> Option<std::net::SocketAddr> {
        self.stream.local_addr().ok()
    }

    /// Whether the reactor has seen something that was not read yet. No system call, nobody is woken later.
    #[inline]
    pub(super) fn is_readable(&self) -> bool {
        self.stream.try_io(Interest::READABLE, || Ok(())).is_ok()
    }

    #[inline]
    pub(super) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_readable() {
            self.waiting.set(NOBODY);
            return Poll::Ready(Ok(()));
        }
        self.wait(cx)
    }

    /// Has the task woken when something comes.
    fn wait(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let task = cx.waker().data().addr();
        if self.waiting.get() == task {
            return Poll::Pending;
        }
        // A task that has used up its turn is told to wait without the reactor hearing of it.
        let heard = coop::has_budget_remaining();
        let ready = self.stream.poll_read_ready(cx);
        self.waiting.set(if heard && ready.is_pending() {
            task
        } else {
            NOBODY
        });
        ready
    }

    /// Reads into the beginning of `spare`, of which so many bytes are initialised then.
    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        spare: &mut [MaybeUninit<u8>],
    ) -> Poll<io::Result<usize>> {
        // A peer that always has something to say must not keep the worker from others.
        let coop = ready!(coop::poll_proceed(cx));
        loop {
            let mut read = None;
            let tried = self.stream.try_io(Interest::READABLE, || {
                // That it is readable was told to who waited; the reactor holds nobody's waker now.
                self.waiting.set(NOBODY);
                let n = SockRef::from(&self.stream).recv(spare)?;
                read = Some(n);
                if 0 < n && n < spare.len() {
                    // All there was. To say so makes the reactor forget that there was something, and spares
                    // the call that would find nothing; what comes from now on is told anew (edge-triggered).
                    Err(io::ErrorKind::WouldBlock.into())
                } else {
                    Ok(())
                }
            });
            let outcome = match (read, tried) {
                (Some(n), _) => Ok(n),
                (None, Ok(())) => Ok(0),
                (None, Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.wait(cx))?;
                    continue;
                }
                (None, Err(error)) => Err(error),
            };
            coop.made_progress();
            return Poll::Ready(outcome);
        }
    }

    /// Reads into the spare capacity of `buf`; see [`super::Transport::poll_read`].
    #[inline]
    pub(super) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        buf: &mut BytesMut,
    ) -> Poll<io::Result<usize>> {
        let n = ready!(self.poll_recv(cx, buf.spare_capacity_mut()))?;
        // SAFETY: the kernel has written `n` bytes into the spare capacity, from its beginning.
        unsafe { buf.set_len(buf.len() + n) };
        Poll::Ready(Ok(n))
    }

    pub(super) fn poll_read_buf(
        &self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // SAFETY: nothing in it is made uninitialised: the kernel only writes into it.
        let n = ready!(self.poll_recv(cx, unsafe { buf.unfilled_mut() }))?;
        // SAFETY: the kernel has written `n` bytes into the unfilled part, from its beginning.
        unsafe { buf.assume_init(n) };
        buf.advance(n);
        Poll::Ready(Ok(()))
    }

    /// Writes what the socket takes of `buf`.
    #[inline]
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let coop = ready!(coop::poll_proceed(cx));
        match self.stream.try_write(buf) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            outcome => {
                coop.made_progress();
                return Poll::Ready(outcome);
            }
        }
        drop(coop);
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    /// Writes what the socket takes of `buf` at once; nobody is woken later.
    #[inline]
    pub(super) fn try_write(&self, buf: &[u8]) -> io::Result<usize> {
        self.stream.try_write(buf)
    }

    /// The socket, for what has nothing to do with reading.
    pub(super) fn raw(&mut self) -> &mut TcpStream {
        &mut self.stream
    }
}

impl From<TcpStream> for Tcp {
    fn from(stream: TcpStream) -> Tcp {
        Tcp {
            stream,
            waiting: Cell::new(NOBODY),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, sync::Arc, task::Waker};

    use tokio::{io::AsyncWriteExt as _, net::TcpListener};

    use super::*;

    async fn pair() -> (TcpStream, Tcp) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap());
        let (peer, accepted) = tokio::join!(peer, listener.accept());
        (peer.unwrap(), Tcp::from(accepted.unwrap().0))
    }

    #[derive(Default)]
    struct Woken(std::sync::atomic::AtomicUsize);

    impl std::task::Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn who_waits_is_woken_whoever_waited_before_and_after() {
        let (mut peer, tcp) = pair().await;
        let (one, other) = (Arc::new(Woken::default()), Arc::new(Woken::default()));
        let (first, second) = (Waker::from(one.clone()), Waker::from(other.clone()));
        // Tokio takes a new socket to be readable until it was looked at.
        let mut buf = BytesMut::with_capacity(64);
        let looked = tcp.poll_read(&mut Context::from_waker(&first), &mut buf);
        assert!(looked.is_pending());
        for round in 1..=3 {
            for waker in [&first, &second, &first, &first] {
                let polled = tcp.poll_readable(&mut Context::from_waker(waker));
                assert!(polled.is_pending(), "{round}");
            }
            peer.write_all(b"hello").await.unwrap();
            poll_fn(|cx| {
                // The reactor has turned when it is seen; nobody else was registered meanwhile.
                cx.waker().wake_by_ref();
                if tcp.is_readable() {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            })
            .await;
            assert_eq!(one.0.load(std::sync::atomic::Ordering::Relaxed), round);
            assert_eq!(other.0.load(std::sync::atomic::Ordering::Relaxed), 0);
            let mut buf = BytesMut::with_capacity(64);
            let n = poll_fn(|cx| tcp.poll_read(cx, &mut buf)).await.unwrap();
            assert_eq!((n, &buf[..]), (5, &b"hello"[..]));
            // A read that left room is known to have taken everything.
            assert!(!tcp.is_readable());
        }
        // Somebody who has the socket itself may have taken the place.
        assert!(
            tcp.poll_readable(&mut Context::from_waker(&first))
                .is_pending()
        );
        assert!(
            tcp.stream()
                .poll_read_ready(&mut Context::from_waker(&second))
                .is_pending()
        );
        assert!(
            tcp.poll_readable(&mut Context::from_waker(&first))
                .is_pending()
        );
        drop(peer);
        poll_fn(|cx| {
            cx.waker().wake_by_ref();
            if tcp.is_readable() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        assert_eq!(one.0.load(std::sync::atomic::Ordering::Relaxed), 4);
        let mut buf = BytesMut::with_capacity(64);
        assert_eq!(poll_fn(|cx| tcp.poll_read(cx, &mut buf)).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn who_was_woken_for_nothing_is_woken_again() {
        let (mut peer, tcp) = pair().await;
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        let times = || woken.0.load(std::sync::atomic::Ordering::Relaxed);
        let mut buf = BytesMut::with_capacity(64);
        let mut read = || tcp.poll_read(&mut Context::from_waker(&waker), &mut buf);
        assert!(read().is_pending());
        peer.write_all(b"a").await.unwrap();
        while times() < 1 {
            tokio::task::yield_now().await;
        }
        // The byte goes another way.
        let taken = SockRef::from(&tcp.stream).recv(&mut [MaybeUninit::uninit(); 8]);
        assert_eq!(taken.unwrap(), 1);
        assert!(read().is_pending());
        peer.write_all(b"c").await.unwrap();
        while times() < 2 {
            tokio::task::yield_now().await;
        }
        assert!(matches!(read(), Poll::Ready(Ok(1))));
    }

    #[tokio::test]
    async fn who_asks_at_the_end_of_a_turn_is_woken() {
        let (mut peer, tcp) = pair().await;
        let mut buf = BytesMut::with_capacity(64);
        let looked = tcp.poll_read(&mut Context::from_waker(Waker::noop()), &mut buf);
        assert!(looked.is_pending());
        let (asked, mut was_asked) = tokio::sync::mpsc::channel(1);
        let mut polls = 0;
        let waiting = poll_fn(|cx| {
            polls += 1;
            if polls == 1 {
                while let Poll::Ready(coop) = coop::poll_proceed(cx) {
                    coop.made_progress();
                }
            }
            let polled = tcp.poll_readable(cx);
            if polls == 2 {
                asked.try_send(()).unwrap();
            }
            polled
        });
        let writing = async {
            was_asked.recv().await;
            peer.write_all(b"a").await.unwrap();
        };
        let both = async { tokio::join!(waiting, writing) };
        let limit = std::time::Duration::from_secs(5);
        let begun = std::time::Instant::now();
        // The end of the time is a reason to look again, too, but a late one.
        tokio::time::timeout(limit, both).await.unwrap().0.unwrap();
        assert!(begun.elapsed() < limit);
    }

    #[tokio::test]
    async fn a_full_buffer_leaves_the_rest_readable() {
        let (mut peer, tcp) = pair().await;
        peer.write_all(&[7; 100]).await.unwrap();
        let mut got = 0;
        while got < 100 {
            let mut room = [MaybeUninit::uninit(); 32];
            let mut buf = ReadBuf::uninit(&mut room);
            poll_fn(|cx| tcp.poll_read_buf(cx, &mut buf)).await.unwrap();
            assert!(buf.filled().iter().all(|b| *b == 7) && !buf.filled().is_empty());
            got += buf.filled().len();
        }
        assert_eq!(got, 100);
    }
}
