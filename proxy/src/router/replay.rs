//! A request body that can be sent again: what has passed is kept, up to a limit.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use tokio::{net::TcpStream, time::Instant};

use crate::{
    body::{Body, BodyError, Frame, Source},
    clock,
};

/// The one body of a request, from which each attempt gets its own. Only the latest attempt's moves.
pub(super) struct Replay(Kind);

enum Kind {
    /// All of it is at hand, which costs nothing to keep.
    Whole {
        body: Body,
        ended: Instant,
        /// It must not be kept: there may be no other attempt.
        too_long: bool,
    },
    Parts(Rc<RefCell<Inner>>),
}

struct Inner {
    source: Body,
    kept: Vec<Frame>,
    kept_bytes: u64,
    limit: u64,
    /// Whether frames are kept.
    keep: bool,
    /// Whether some went by without being kept.
    lost: bool,
    end: End,
    attempt: u32,
    wakers: Vec<Waker>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Coming,
    Came(Instant),
    Failed(BodyError),
    /// Nobody wants it any more.
    Dropped,
}

impl Replay {
    /// `limit` bounds what is kept; nothing is with `None`.
    pub(super) fn new(source: Body, limit: Option<u64>) -> Replay {
        if source.is_whole() {
            let length = source.exact_length().unwrap_or(0);
            return Replay(Kind::Whole {
                body: source,
                ended: clock::now(),
                too_long: limit.is_some_and(|limit| length > limit),
            });
        }
        let end = if source.is_end_stream() {
            End::Came(clock::now())
        } else {
            End::Coming
        };
        Replay(Kind::Parts(Rc::new(RefCell::new(Inner {
            source,
            kept: Vec::new(),
            kept_bytes: 0,
            limit: limit.unwrap_or(0),
            keep: limit.is_some(),
            lost: false,
            end,
            attempt: 0,
            wakers: Vec::new(),
        }))))
    }

    /// Another hold on the same body.
    pub(super) fn share(&self) -> Replay {
        Replay(match &self.0 {
            Kind::Whole {
                body,
                ended,
                too_long,
            } => Kind::Whole {
                body: body.try_clone().unwrap_or_default(),
                ended: *ended,
                too_long: *too_long,
            },
            Kind::Parts(inner) => Kind::Parts(inner.clone()),
        })
    }

    /// The body for the next attempt; bodies of earlier ones end with an error unless all of it has come.
    pub(super) fn body(&self) -> Body {
        let shared = match &self.0 {
            Kind::Whole { body, .. } => return body.try_clone().unwrap_or_default(),
            Kind::Parts(inner) => inner,
        };
        let mut inner = shared.borrow_mut();
        if matches!(inner.end, End::Came(_)) && !inner.lost {
            return frames(inner.kept.clone());
        }
        inner.attempt += 1;
        Body::stream(Attempt {
            inner: shared.clone(),
            number: inner.attempt,
            next: 0,
        })
    }

    /// All of the body, if it has come entirely and was kept.
    pub(super) fn entire(&self) -> Option<Body> {
        match &self.0 {
            Kind::Whole { too_long: true, .. } => None,
            Kind::Whole { body, .. } => body.try_clone(),
            Kind::Parts(inner) => {
                let inner = inner.borrow();
                let came = matches!(inner.end, End::Came(_)) && !inner.lost;
                came.then(|| frames(inner.kept.clone()))
            }
        }
    }

    /// The body itself, for an upgraded stream that is not replayed.
    pub(super) fn take_source(&self) -> Body {
        match &self.0 {
            Kind::Whole { body, .. } => body.try_clone().unwrap_or_default(),
            Kind::Parts(inner) => std::mem::take(&mut inner.borrow_mut().source),
        }
    }

    /// Whether another attempt would see all of it.
    pub(super) fn is_whole(&self) -> bool {
        match &self.0 {
            Kind::Whole { too_long, .. } => !too_long,
            Kind::Parts(inner) => {
                let inner = inner.borrow();
                !inner.lost && !matches!(inner.end, End::Failed(_) | End::Dropped)
            }
        }
    }

    /// Whether something was lost because the limit was passed.
    pub(super) fn passed_limit(&self) -> bool {
        match &self.0 {
            Kind::Whole { too_long, .. } => *too_long,
            Kind::Parts(inner) => {
                let inner = inner.borrow();
                inner.lost && inner.limit > 0
            }
        }
    }

    /// Forgets what was kept: there will be no other attempt.
    pub(super) fn stop_keeping(&self) {
        if let Kind::Parts(inner) = &self.0 {
            // The attempt under way may be behind; what it has not sent stays.
            inner.borrow_mut().keep = false;
        }
    }

    /// Why the downstream's body broke, if it did.
    pub(super) fn failure(&self) -> Option<BodyError> {
        match &self.0 {
            Kind::Whole { .. } => None,
            Kind::Parts(inner) => match &inner.borrow().end {
                End::Failed(error) => Some(error.clone()),
                End::Coming | End::Came(_) | End::Dropped => None,
            },
        }
    }

    /// When the downstream had sent all of it.
    pub(super) fn ended_at(&self) -> Option<Instant> {
        match &self.0 {
            Kind::Whole { ended, .. } => Some(*ended),
            Kind::Parts(inner) => match inner.borrow().end {
                End::Came(at) => Some(at),
                End::Coming | End::Failed(_) | End::Dropped => None,
            },
        }
    }

    /// Ready at the end of the body, with when that was; never if it breaks.
    pub(super) fn poll_ended(&self, cx: &Context<'_>) -> Poll<Instant> {
        match &self.0 {
            Kind::Whole { ended, .. } => Poll::Ready(*ended),
            Kind::Parts(inner) => {
                let mut inner = inner.borrow_mut();
                match inner.end {
                    End::Came(at) => Poll::Ready(at),
                    End::Coming | End::Failed(_) | End::Dropped => {
                        inner.wait(cx);
                        Poll::Pending
                    }
                }
            }
        }
    }

    /// Waits for the whole body; `None` if it breaks, is dropped or is too large.
    pub(super) async fn whole(&self) -> Option<Body> {
        let inner = match &self.0 {
            Kind::Whole { too_long: true, .. } => return None,
            Kind::Whole { body, .. } => return body.try_clone(),
            Kind::Parts(inner) => inner,
        };
        poll_fn(|cx| {
            let mut inner = inner.borrow_mut();
            match inner.end {
                _ if inner.lost => Poll::Ready(None),
                End::Came(_) => Poll::Ready(Some(frames(inner.kept.clone()))),
                End::Coming => {
                    inner.wait(cx);
                    Poll::Pending
                }
                End::Failed(_) | End::Dropped => Poll::Ready(None),
            }
        })
        .await
    }

    /// Nobody will read on: the attempt's body ends with an error, and who waits is told.
    pub(super) fn cancel(&self) {
        let Kind::Parts(inner) = &self.0 else { return };
        let mut inner = inner.borrow_mut();
        if inner.end == End::Coming {
            inner.end = End::Dropped;
            inner.source = Body::empty();
        }
        inner.wake();
    }
}

impl Inner {
    fn wait(&mut self, cx: &Context<'_>) {
        if !self.wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.wakers.push(cx.waker().clone());
        }
    }

    fn wake(&mut self) {
        for waker in self.wakers.drain(..) {
            waker.wake();
        }
    }

    fn finish(&mut self, end: End) {
        self.end = end;
        self.wake();
    }

    /// Keeps a frame for later attempts, if it fits.
    fn keep(&mut self, frame: &Frame) -> bool {
        if !self.keep {
            self.lost = true;
            return false;
        }
        let size = match frame {
            Frame::Data(data) => data.len() as u64,
            Frame::Trailers(_) => 0,
        };
        self.kept_bytes += size;
        if self.kept_bytes > self.limit {
            self.keep = false;
            self.lost = true;
            self.kept.clear();
            self.wake();
            return false;
        }
        self.kept.push(frame.clone());
        true
    }
}

struct Attempt {
    inner: Rc<RefCell<Inner>>,
    number: u32,
    /// The next of the kept frames.
    next: usize,
}

impl Source for Attempt {
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let this = self.get_mut();
        let mut inner = this.inner.borrow_mut();
        if inner.attempt != this.number || inner.end == End::Dropped {
            return Poll::Ready(Some(Err(BodyError::Disconnected)));
        }
        if let Some(frame) = inner.kept.get(this.next) {
            this.next += 1;
            return Poll::Ready(Some(Ok(frame.clone())));
        }
        match &inner.end {
            End::Came(_) => return Poll::Ready(None),
            End::Failed(error) => return Poll::Ready(Some(Err(error.clone()))),
            End::Coming | End::Dropped => {}
        }
        match inner.source.poll_frame(cx) {
            Poll::Pending => {
                // `cancel` must reach whoever waits for the next frame.
                inner.wait(cx);
                Poll::Pending
            }
            Poll::Ready(None) => {
                inner.finish(End::Came(clock::now()));
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                inner.finish(End::Failed(error.clone()));
                Poll::Ready(Some(Err(error)))
            }
            Poll::Ready(Some(Ok(frame))) => {
                if inner.keep(&frame) {
                    this.next += 1;
                }
                if matches!(frame, Frame::Trailers(_)) || inner.source.is_end_stream() {
                    inner.finish(End::Came(clock::now()));
                }
                Poll::Ready(Some(Ok(frame)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let inner = self.inner.borrow();
        self.next >= inner.kept.len()
            && (matches!(inner.end, End::Came(_)) || inner.source.is_end_stream())
    }

    fn exact_length(&self) -> Option<u64> {
        let inner = self.inner.borrow();
        let kept: u64 = inner
            .kept
            .iter()
            .skip(self.next)
            .map(|frame| match frame {
                Frame::Data(data) => data.len() as u64,
                Frame::Trailers(_) => 0,
            })
            .sum();
        match inner.end {
            End::Came(_) => Some(kept),
            _ => inner.source.exact_length().map(|rest| rest + kept),
        }
    }

    fn splices(&self) -> bool {
        let inner = self.inner.borrow();
        inner.attempt == self.number
            && inner.end == End::Coming
            && !inner.keep
            && self.next >= inner.kept.len()
            && inner.source.splices()
    }

    fn poll_splice(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &TcpStream,
    ) -> Poll<io::Result<u64>> {
        let mut inner = self.get_mut().inner.borrow_mut();
        let polled = inner.source.poll_splice(cx, to);
        match &polled {
            Poll::Pending => inner.wait(cx),
            Poll::Ready(Ok(0)) => {}
            Poll::Ready(moved) => {
                inner.lost = true;
                if moved.is_ok() && inner.source.is_end_stream() {
                    inner.finish(End::Came(clock::now()));
                }
            }
        }
        polled
    }
}

/// A body of frames that are at hand.
fn frames(frames: Vec<Frame>) -> Body {
    if frames.is_empty() {
        return Body::empty();
    }
    Body::stream(AtHand(frames.into_iter()))
}

struct AtHand(std::vec::IntoIter<Frame>);

impl Source for AtHand {
    fn poll_frame(
        self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        Poll::Ready(self.get_mut().0.next().map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_slice().is_empty()
    }

    fn exact_length(&self) -> Option<u64> {
        let lengths = self.0.as_slice().iter().map(|frame| match frame {
            Frame::Data(data) => data.len() as u64,
            Frame::Trailers(_) => 0,
        });
        Some(lengths.sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(pieces: &[&'static str]) -> Body {
        frames(
            pieces
                .iter()
                .map(|piece| Frame::Data((*piece).into()))
                .collect(),
        )
    }

    async fn read(body: &mut Body) -> Result<String, BodyError> {
        let mut text = String::new();
        while let Some(frame) = body.frame().await {
            if let Frame::Data(data) = frame? {
                text.push_str(&String::from_utf8_lossy(&data));
            }
        }
        Ok(text)
    }

    #[tokio::test]
    async fn a_second_attempt_sees_what_the_first_saw_and_the_rest() {
        let replay = Replay::new(body(&["one", "two", "three"]), Some(100));
        let mut first = replay.body();
        assert_eq!(first.exact_length(), Some(11));
        assert_eq!(first.frame().await, Some(Ok(Frame::Data("one".into()))));
        let mut second = replay.body();
        assert_eq!(second.exact_length(), Some(11));
        assert_eq!(read(&mut second).await, Ok("onetwothree".to_owned()));
        assert_eq!(first.frame().await, Some(Err(BodyError::Disconnected)));
        assert!(replay.is_whole() && replay.ended_at().is_some());
        assert_eq!(read(&mut replay.body()).await, Ok("onetwothree".to_owned()));
        let mut whole = replay.whole().await.unwrap();
        assert_eq!(read(&mut whole).await, Ok("onetwothree".to_owned()));
    }

    #[tokio::test]
    async fn beyond_the_limit_there_is_no_second_attempt() {
        let replay = Replay::new(body(&["one", "two"]), Some(5));
        assert_eq!(read(&mut replay.body()).await, Ok("onetwo".to_owned()));
        assert!(!replay.is_whole() && replay.passed_limit());
        assert!(replay.whole().await.is_none());
    }

    #[tokio::test]
    async fn cancelling_ends_the_body_and_tells_who_waits() {
        let replay = Replay::new(body(&["one"]), None);
        let mut first = replay.body();
        replay.cancel();
        assert_eq!(first.frame().await, Some(Err(BodyError::Disconnected)));
        assert!(replay.whole().await.is_none());
    }

    #[tokio::test]
    async fn what_is_at_hand_has_ended_and_can_be_had_again() {
        let replay = Replay::new(Body::empty(), None);
        assert!(replay.ended_at().is_some() && replay.is_whole());
        assert!(replay.body().is_end_stream());
        let replay = Replay::new(Body::full("one"), None);
        assert!(replay.ended_at().is_some() && replay.is_whole());
        for _ in 0..2 {
            assert_eq!(read(&mut replay.body()).await, Ok("one".to_owned()));
        }
        let replay = Replay::new(Body::full("one"), Some(2));
        assert_eq!(read(&mut replay.body()).await, Ok("one".to_owned()));
        assert!(!replay.is_whole() && replay.passed_limit());
        assert!(replay.whole().await.is_none());
    }
}
