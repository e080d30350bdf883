//! Moves bytes from one socket to another inside the kernel, through a pipe.
//!
//! Worth it for bulk, where it halves what a byte costs; for small messages two calls more cost more
//! than the copy they save.

#![allow(unsafe_code, reason = "splice(2) has no safe wrapper in std")]

use std::{
    cell::RefCell,
    io::{self, PipeReader, PipeWriter},
    os::fd::{AsRawFd, RawFd},
    task::{Context, Poll, ready},
};

use tokio::{io::Interest, net::TcpStream};

/// Asked for as a pipe's capacity, in bytes; the most that the kernel grants without privileges. With less
/// it works too.
const PIPE: usize = 1 << 20;
/// Empty pipes kept by one worker.
const KEPT: usize = 16;
/// Bytes moved before others on this worker get their turn.
const TURN: u64 = 4 << 20;

thread_local! {
    static PIPES: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

#[derive(Debug)]
struct Pipe {
    reader: PipeReader,
    writer: PipeWriter,
}

impl Pipe {
    fn get() -> io::Result<Pipe> {
        if let Some(pipe) = PIPES.with_borrow_mut(Vec::pop) {
            return Ok(pipe);
        }
        let (reader, writer) = io::pipe()?;
        let size = i32::try_from(PIPE).unwrap_or(i32::MAX);
        // SAFETY: F_SETPIPE_SZ takes an int and touches no memory of ours; the descriptor is open, for
        // `writer` owns it.
        unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, size) };
        Ok(Pipe { reader, writer })
    }
}

/// Whose fault a failure was.
#[derive(Debug)]
pub enum Fault {
    /// Of the socket that is read.
    Reading(io::Error),
    /// Of the socket that is written.
    Writing(io::Error),
    /// There is no pipe to be had; nothing was moved.
    Pipe(io::Error),
}

/// One direction between two sockets. It owns a pipe only while bytes are in it.
#[derive(Debug, Default)]
pub struct Splice {
    pipe: Option<Pipe>,
    inside: u64,
    /// Read in the last step.
    last: u64,
}

impl Splice {
    /// Moves bytes until `to` takes no more, `from` has no more, or `max` have been taken by `to`. Gives how
    /// many that is; 0 means that `from` has ended (or `max` is 0) and nothing is left inside. No more than
    /// `max` is ever read from `from`, what is inside already included.
    ///
    /// # Errors
    /// [`Fault`]. Bytes that were inside are lost then, except with [`Fault::Pipe`].
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        to: &TcpStream,
        max: u64,
    ) -> Poll<Result<u64, Fault>> {
        let mut moved = 0;
        while moved < max.min(TURN) {
            if self.inside == 0 {
                match self.poll_fill(cx, from, max - moved) {
                    Poll::Ready(Ok(0)) => break,
                    Poll::Ready(Ok(_)) => {}
                    // It will be met again.
                    Poll::Ready(Err(_)) if moved > 0 => break,
                    Poll::Ready(Err(fault)) => return Poll::Ready(Err(fault)),
                    Poll::Pending if moved > 0 => break,
                    Poll::Pending => return Poll::Pending,
                }
            }
            match self.poll_drain(cx, to) {
                Poll::Ready(Ok(n)) => moved += n,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Fault::Writing(error))),
                Poll::Pending if moved > 0 => break,
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(moved))
    }

    /// Bytes read and not yet written.
    pub fn inside(&self) -> u64 {
        self.inside
    }

    /// How much the last read brought: when it is little, copying is cheaper.
    pub fn last(&self) -> u64 {
        self.last
    }

    fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        max: u64,
    ) -> Poll<Result<u64, Fault>> {
        loop {
            ready!(from.poll_read_ready(cx)).map_err(Fault::Reading)?;
            let pipe = match &mut self.pipe {
                Some(pipe) => pipe,
                none => none.insert(Pipe::get().map_err(Fault::Pipe)?),
            };
            let wanted = usize::try_from(max).unwrap_or(PIPE).min(PIPE);
            // The pipe is empty, so "would block" is the socket's word.
            let read = from.try_io(Interest::READABLE, || {
                splice(from.as_raw_fd(), pipe.writer.as_raw_fd(), wanted)
            });
            match read {
                Ok(n) => {
                    self.inside = n;
                    self.last = n;
                    if n == 0 {
                        self.put_back();
                    }
                    return Poll::Ready(Ok(n));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(Fault::Reading(error))),
            }
            // Waiting with an empty pipe needs none.
            self.put_back();
        }
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>, to: &TcpStream) -> Poll<io::Result<u64>> {
        let Some(pipe) = &self.pipe else {
            return Poll::Ready(Ok(0));
        };
        loop {
            ready!(to.poll_write_ready(cx))?;
            let wanted = usize::try_from(self.inside).unwrap_or(PIPE);
            // The pipe has bytes, so "would block" is the socket's word.
            let wrote = to.try_io(Interest::WRITABLE, || {
                splice(pipe.reader.as_raw_fd(), to.as_raw_fd(), wanted)
            });
            match wrote {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(n) => {
                    self.inside -= n;
                    if self.inside == 0 {
                        self.put_back();
                    }
                    return Poll::Ready(Ok(n));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Returns an empty pipe to the stock.
    fn put_back(&mut self) {
        if let Some(pipe) = self.pipe.take() {
            PIPES.with_borrow_mut(|pipes| {
                if pipes.len() < KEPT {
                    pipes.push(pipe);
                }
            });
        }
    }
}

/// Bytes from which on a part of a message is moved in the kernel.
const WORTH: u64 = 128 * 1024;

/// A part of a message with a known length, as it passes.
#[derive(Debug, Default)]
pub struct Passage {
    splice: Option<Box<Splice>>,
    /// There was no pipe to be had.
    no_pipe: bool,
}

/// What a step of a [`Passage`] brought.
#[derive(Debug)]
pub enum Step {
    /// `to` took this many bytes.
    Moved(u64),
    /// The source has ended or failed, or there is no pipe.
    Stopped,
    /// The sink failed.
    Sink(io::Error),
}

impl Passage {
    /// Whether to move `left` bytes in the kernel, when `buffered` says that some were read already.
    pub fn pays(&self, left: u64, buffered: bool) -> bool {
        match &self.splice {
            Some(splice) => splice.inside > 0 || left > 0 && !buffered,
            None => left >= WORTH && !buffered && !self.no_pipe,
        }
    }

    /// Bytes that were taken from the source and not yet taken by the sink.
    pub fn inside(&self) -> u64 {
        self.splice.as_ref().map_or(0, |splice| splice.inside)
    }

    /// Moves at most `left` bytes, none of them from the source if some were read already. `read` is told
    /// how many bytes were taken from the source.
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        to: &TcpStream,
        left: u64,
        buffered: bool,
        read: impl FnOnce(u64),
    ) -> Poll<Step> {
        let splice = self.splice.get_or_insert_default();
        let before = splice.inside;
        let max = if buffered { before } else { left };
        let polled = splice.poll(cx, from, to, max);
        let written = match &polled {
            Poll::Ready(Ok(n)) => *n,
            _ => 0,
        };
        let came = (written + splice.inside).saturating_sub(before);
        if came > 0 {
            read(came);
        }
        Poll::Ready(match ready!(polled) {
            Ok(0) => Step::Stopped,
            Ok(n) => Step::Moved(n),
            Err(Fault::Writing(error)) => Step::Sink(error),
            Err(Fault::Reading(_)) => Step::Stopped,
            Err(Fault::Pipe(error)) => {
                tracing::debug!(%error, "no pipe; copying instead");
                self.no_pipe = true;
                self.splice = None;
                Step::Stopped
            }
        })
    }
}

fn splice(from: RawFd, to: RawFd, n: usize) -> io::Result<u64> {
    // SAFETY: both descriptors are open, for their owners are borrowed by the callers; the offsets are
    // null, as they must be for sockets and pipes; no memory of ours is touched.
    let moved = unsafe {
        libc::splice(
            from,
            std::ptr::null_mut(),
            to,
            std::ptr::null_mut(),
            n,
            libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK,
        )
    };
    u64::try_from(moved).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        (near.unwrap(), far.unwrap().0)
    }

    #[tokio::test]
    async fn no_byte_more_than_asked_for_is_taken() {
        let (mut client, from) = pair().await;
        let (to, mut server) = pair().await;
        let data: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let length = data.len() as u64;
        let sending = async {
            client.write_all(&data).await.unwrap();
            client.write_all(b"next").await.unwrap();
            client
        };
        let receiving = async {
            let mut got = vec![0; data.len()];
            server.read_exact(&mut got).await.unwrap();
            (server, got)
        };
        let moving = async {
            let mut splice = Splice::default();
            let mut left = length;
            while left > 0 {
                left -= poll_fn(|cx| splice.poll(cx, &from, &to, left))
                    .await
                    .unwrap();
            }
            splice
        };
        let (mut client, (mut server, got), mut splice) = tokio::join!(sending, receiving, moving);
        assert_eq!(got, data);
        assert!(splice.pipe.is_none() && splice.inside() == 0);
        // What follows is still there, and so is the end.
        client.shutdown().await.unwrap();
        assert_eq!(
            poll_fn(|cx| splice.poll(cx, &from, &to, 10)).await.unwrap(),
            4
        );
        assert_eq!(
            poll_fn(|cx| splice.poll(cx, &from, &to, 6)).await.unwrap(),
            0
        );
        drop(to);
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"next");
    }

    #[tokio::test]
    async fn who_failed_is_told() {
        let (client, from) = pair().await;
        let (to, server) = pair().await;
        socket2::SockRef::from(&client)
            .set_linger(Some(std::time::Duration::ZERO))
            .unwrap();
        drop(client);
        let mut splice = Splice::default();
        let fault = poll_fn(|cx| splice.poll(cx, &from, &to, 10)).await;
        assert!(matches!(fault, Err(Fault::Reading(_))), "{fault:?}");
        drop(server);
    }
}
