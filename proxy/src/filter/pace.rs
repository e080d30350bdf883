//! A body that passes no faster than a bucket of tokens lets it: a token is a byte. Envoy:
//! `StreamRateLimiter`, of fault's `response_rate_limit` and of `bandwidth_limit`.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;

use crate::{
    body::{Body, BodyError, Frame, Source},
    clock,
    filter::bucket::TokenBucket,
    head::Headers,
    timer::Deadline,
};

/// Bytes read ahead of what may pass. Envoy: the connection's buffer limit, 1 MiB by default.
const MOST_HELD: usize = 1 << 20;

/// How often a body that waits looks for tokens, unless something else is configured.
pub(super) const INTERVAL: Duration = Duration::from_millis(50);

/// Who is told how a body gets on. Dropped with the body, whether it has come to its end or not.
pub(super) trait Watch: Unpin {
    /// A piece arrived.
    fn arrived(&mut self, _bytes: usize) {}

    /// So many bytes may pass now, and whether others still wait.
    fn passes(&mut self, _bytes: u64, _others_wait: bool) {}

    /// All has passed; trailers may be added.
    fn ended(&mut self, _trailers: &mut Option<Headers>) {}
}

/// Nobody.
pub(super) struct Unwatched;

impl Watch for Unwatched {}

/// Tokens for so many KiB a second.
pub(super) fn bucket(kbps: u64, interval: Duration) -> TokenBucket {
    TokenBucket::of_second(per_second(kbps), of_interval(kbps, interval))
}

/// Tokens that come in an interval.
pub(super) fn of_interval(kbps: u64, interval: Duration) -> f64 {
    per_second(kbps) * interval.as_secs_f64()
}

#[allow(
    clippy::cast_precision_loss,
    reason = "exact up to 2^53, and more than any network carries beyond"
)]
fn per_second(kbps: u64) -> f64 {
    kbps as f64 * 1024.0
}

/// The body at the bucket's pace.
pub(super) fn pace(
    body: Body,
    bucket: Arc<TokenBucket>,
    interval: Duration,
    watch: impl Watch + 'static,
) -> Body {
    Body::stream(Paced {
        body,
        held: VecDeque::new(),
        held_bytes: 0,
        end: None,
        bucket,
        allowed: 0,
        interval,
        next: Deadline::default(),
        watch,
    })
}

struct Paced<W> {
    body: Body,
    held: VecDeque<Bytes>,
    held_bytes: usize,
    /// How the body ended, once it has; trailers are taken when they pass.
    end: Option<End>,
    bucket: Arc<TokenBucket>,
    /// Bytes that may pass already.
    allowed: u64,
    interval: Duration,
    next: Deadline,
    watch: W,
}

enum End {
    Read(Option<Headers>),
    /// The watch knows, and has added its trailers.
    Told(Option<Headers>),
}

impl<W: Watch> Paced<W> {
    /// Reads what has come.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Result<(), BodyError> {
        while self.end.is_none() && self.held_bytes < MOST_HELD {
            match self.body.poll_frame(cx) {
                Poll::Pending => break,
                Poll::Ready(Some(Ok(Frame::Data(data)))) => {
                    self.watch.arrived(data.len());
                    self.held_bytes += data.len();
                    self.held.push_back(data);
                    if self.body.is_end_stream() {
                        self.end = Some(End::Read(None));
                    }
                }
                Poll::Ready(Some(Ok(Frame::Trailers(trailers)))) => {
                    self.end = Some(End::Read(Some(trailers)));
                }
                Poll::Ready(None) => self.end = Some(End::Read(None)),
                Poll::Ready(Some(Err(error))) => return Err(error),
            }
        }
        Ok(())
    }

    /// Ready when bytes may pass.
    fn poll_allowed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.allowed == 0 {
            if self.next.is_set() {
                ready!(self.next.poll(cx));
                self.next.clear();
            }
            let waiting = self.held_bytes as u64;
            self.allowed = self.bucket.take_some(waiting);
            let others = waiting > self.allowed;
            self.watch.passes(self.allowed, others);
            if others {
                self.next.set(clock::now() + self.interval);
            }
        }
        Poll::Ready(())
    }

    /// Tells the watch of the end, once nothing is held any more.
    fn tell_end(&mut self) {
        if self.held.is_empty()
            && let Some(End::Read(trailers)) = &mut self.end
        {
            let mut trailers = trailers.take();
            self.watch.ended(&mut trailers);
            self.end = Some(End::Told(trailers));
        }
    }
}

impl<W: Watch> Source for Paced<W> {
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let this = self.get_mut();
        if let Err(error) = this.poll_read(cx) {
            return Poll::Ready(Some(Err(error)));
        }
        this.tell_end();
        if this.held.is_empty() {
            return match &mut this.end {
                None => Poll::Pending,
                Some(End::Read(trailers) | End::Told(trailers)) => Poll::Ready(
                    trailers
                        .take()
                        .map(|trailers| Ok(Frame::Trailers(trailers))),
                ),
            };
        }
        ready!(this.poll_allowed(cx));
        let Some(front) = this.held.front_mut() else {
            return Poll::Pending;
        };
        let most = usize::try_from(this.allowed).unwrap_or(usize::MAX);
        let piece = front.split_to(most.min(front.len()));
        if front.is_empty() {
            this.held.pop_front();
        }
        this.held_bytes -= piece.len();
        this.allowed -= piece.len() as u64;
        this.tell_end();
        Poll::Ready(Some(Ok(Frame::Data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_empty() && matches!(self.end, Some(End::Told(None)))
    }

    fn exact_length(&self) -> Option<u64> {
        Some(self.body.exact_length()? + self.held_bytes as u64)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::head::Known;

    #[derive(Default)]
    struct Adds(u64);

    impl Watch for Adds {
        fn passes(&mut self, bytes: u64, _: bool) {
            self.0 += bytes;
        }

        fn ended(&mut self, trailers: &mut Option<Headers>) {
            let trailers = trailers.get_or_insert_default();
            trailers.append(Known::Via, self.0.to_string());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_pass_at_the_pace_and_trailers_after_them() {
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let bucket = Arc::new(bucket(1, INTERVAL));
                let mut body = pace(Body::full(vec![7; 1024]), bucket, INTERVAL, Adds::default());
                let began = Instant::now();
                let mut sizes = Vec::new();
                let trailers = loop {
                    match body.frame().await {
                        Some(Ok(Frame::Data(data))) => sizes.push(data.len()),
                        Some(Ok(Frame::Trailers(trailers))) => break trailers,
                        other => panic!("{other:?}"),
                    }
                };
                assert_eq!(sizes.iter().sum::<usize>(), 1024);
                assert!(sizes.iter().all(|size| *size <= 64), "{sizes:?}");
                let took = began.elapsed();
                assert!((900..1200).contains(&took.as_millis()), "{took:?}");
                assert_eq!(trailers.known(Known::Via), Some(b"1024".as_slice()));
                assert_eq!(body.frame().await, None);
            })
            .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_without_trailers_ends_with_its_last_piece() {
        let bucket = Arc::new(bucket(1024, INTERVAL));
        let mut body = pace(Body::full("abc"), bucket, INTERVAL, Unwatched);
        assert_eq!(body.exact_length(), Some(3));
        let frame = body.frame().await;
        assert_eq!(frame, Some(Ok(Frame::Data(Bytes::from_static(b"abc")))));
        assert!(body.is_end_stream());
    }
}
