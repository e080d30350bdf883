//! Bodies: a stream of data frames, perhaps ended by trailers. Bodies live on one worker (`!Send`).
//!
//! Of an upgraded stream (WebSocket), the request body yields the bytes the downstream sends after the
//! `101` and the response body the bytes the upstream sends after it; neither has trailers.

use std::{
    fmt,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use tokio::net::TcpStream;

use crate::{head::Headers, reject::Reject};

/// A piece of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Bytes.
    Data(Bytes),
    /// The end, with trailers.
    Trailers(Headers),
}

/// Why a body ended before its end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// The connection ended.
    #[error("the connection was closed")]
    Disconnected,
    /// The peer reset the stream, with its HTTP/2 error code if it is HTTP/2.
    #[error("the peer reset the stream")]
    Reset(Option<u32>),
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// We gave up waiting.
    #[error("timed out")]
    Timeout,
    /// More bytes than allowed.
    #[error("the body is too large")]
    TooLarge,
    /// A filter does not let it pass: what the downstream is told.
    #[error("a filter refused the body")]
    Refused(Box<Reject>),
}

/// Where a body comes from.
pub trait Source {
    /// The next frame; `None` at the end. Not called again after `None`, an error or trailers.
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>>;

    /// Whether it is known that no frame will come.
    fn is_end_stream(&self) -> bool {
        false
    }

    /// The number of data bytes to come, if known.
    fn exact_length(&self) -> Option<u64> {
        None
    }

    /// Whether the data that comes next is many bytes that can stay in the kernel: to be moved with
    /// [`Source::poll_splice`] if they go to a plain socket.
    fn splices(&self) -> bool {
        false
    }

    /// Moves data into `to`, past us; gives how many bytes `to` has taken. 0 means that frames tell what is
    /// next. Called only while [`Source::splices`], and nobody reads frames before it says no.
    ///
    /// # Errors
    /// Those of `to`; what was on its way is lost then.
    fn poll_splice(
        self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
        _to: &TcpStream,
    ) -> Poll<io::Result<u64>> {
        Poll::Ready(Ok(0))
    }
}

/// A body.
#[derive(Default)]
pub struct Body {
    kind: Kind,
}

#[derive(Default)]
enum Kind {
    #[default]
    Empty,
    /// All that is left of it; not both are absent.
    Held(Bytes, Option<Headers>),
    Stream(Pin<Box<dyn Source>>),
}

impl Body {
    /// No body.
    pub fn empty() -> Body {
        Body::default()
    }

    /// One piece of data.
    pub fn full(data: impl Into<Bytes>) -> Body {
        Body::whole(data.into(), None)
    }

    /// A body that is at hand, trailers and all.
    pub fn whole(data: Bytes, trailers: Option<Headers>) -> Body {
        let kind = if data.is_empty() && trailers.is_none() {
            Kind::Empty
        } else {
            Kind::Held(data, trailers)
        };
        Body { kind }
    }

    /// A body that arrives piece by piece.
    pub fn stream(source: impl Source + 'static) -> Body {
        Body {
            kind: Kind::Stream(Box::pin(source)),
        }
    }

    /// Whether all of it is at hand: reading it waits for nothing and cannot fail.
    pub fn is_whole(&self) -> bool {
        !matches!(self.kind, Kind::Stream(_))
    }

    /// The trailers of a body that is at hand.
    pub fn trailers(&self) -> Option<&Headers> {
        match &self.kind {
            Kind::Held(_, trailers) => trailers.as_ref(),
            Kind::Empty | Kind::Stream(_) => None,
        }
    }

    /// A copy of a body that is at hand.
    pub fn try_clone(&self) -> Option<Body> {
        let kind = match &self.kind {
            Kind::Empty => Kind::Empty,
            Kind::Held(data, trailers) => Kind::Held(data.clone(), trailers.clone()),
            Kind::Stream(_) => return None,
        };
        Some(Body { kind })
    }

    /// Whether it is known that no frame will come (then the head may say so).
    pub fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Empty => true,
            Kind::Held(..) => false,
            Kind::Stream(source) => source.is_end_stream(),
        }
    }

    /// The number of data bytes to come, if known.
    pub fn exact_length(&self) -> Option<u64> {
        match &self.kind {
            Kind::Empty => Some(0),
            Kind::Held(data, _) => Some(data.len() as u64),
            Kind::Stream(source) => source.exact_length(),
        }
    }

    /// The data of a body that is at hand; its trailers are dropped.
    pub fn into_data(self) -> Bytes {
        match self.kind {
            Kind::Held(data, _) => data,
            Kind::Empty | Kind::Stream(_) => Bytes::new(),
        }
    }

    /// The next frame; `None` at the end, and ever after an error or trailers.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        match &mut self.kind {
            Kind::Empty => Poll::Ready(None),
            Kind::Held(data, trailers) => {
                let data = std::mem::take(data);
                let trailers = trailers.take();
                let (frame, left) = match (data.is_empty(), trailers) {
                    (true, Some(trailers)) => (Some(Ok(Frame::Trailers(trailers))), Kind::Empty),
                    (true, None) => (None, Kind::Empty),
                    (false, None) => (Some(Ok(Frame::Data(data))), Kind::Empty),
                    (false, trailers) => (
                        Some(Ok(Frame::Data(data))),
                        Kind::Held(Bytes::new(), trailers),
                    ),
                };
                self.kind = left;
                Poll::Ready(frame)
            }
            Kind::Stream(source) => {
                let polled = source.as_mut().poll_frame(cx);
                if matches!(
                    polled,
                    Poll::Ready(None | Some(Err(_) | Ok(Frame::Trailers(_))))
                ) {
                    self.kind = Kind::Empty;
                }
                polled
            }
        }
    }

    /// Whether [`Body::poll_splice`] is the way to go on, towards a plain socket.
    pub fn splices(&self) -> bool {
        match &self.kind {
            Kind::Empty | Kind::Held(..) => false,
            Kind::Stream(source) => source.splices(),
        }
    }

    /// Moves data into `to` inside the kernel; see [`Source::poll_splice`].
    ///
    /// # Errors
    /// Those of `to`.
    pub fn poll_splice(&mut self, cx: &mut Context<'_>, to: &TcpStream) -> Poll<io::Result<u64>> {
        match &mut self.kind {
            Kind::Empty | Kind::Held(..) => Poll::Ready(Ok(0)),
            Kind::Stream(source) => source.as_mut().poll_splice(cx, to),
        }
    }

    /// The next frame. Cancel-safe: a dropped call loses nothing.
    pub async fn frame(&mut self) -> Option<Result<Frame, BodyError>> {
        poll_fn(|cx| self.poll_frame(cx)).await
    }

    /// All data up to `limit` bytes; trailers are dropped.
    ///
    /// # Errors
    /// [`BodyError::TooLarge`] beyond the limit, or what the body ended with.
    pub async fn collect(mut self, limit: usize) -> Result<Bytes, BodyError> {
        let mut all = BytesMut::new();
        while let Some(frame) = self.frame().await {
            if let Frame::Data(data) = frame? {
                if all.len() + data.len() > limit {
                    return Err(BodyError::TooLarge);
                }
                all.extend_from_slice(&data);
            }
        }
        Ok(all.freeze())
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Empty => f.write_str("Body(empty)"),
            Kind::Held(data, _) => write!(f, "Body({} bytes)", data.len()),
            Kind::Stream(_) => f.write_str("Body(stream)"),
        }
    }
}
