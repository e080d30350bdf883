//! Requests whose slow attempts go on while others are made; the first good answer counts. Envoy:
//! `hedge_policy.hedge_on_per_try_timeout`.

use std::{future::poll_fn, pin::Pin, task::Poll};

use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::time::{Instant, Sleep, sleep};

use super::{Attempts, Clock, Ended, Request, downstream_failed, refusal, response::Answer};
use crate::{
    cluster::Host,
    head::{Name, RequestHead},
    outlier::Outcome,
    reject::Reject,
    retry::Reset,
    route::policy::ForwardPolicy,
};

/// Whether the route, or the request itself, asks for it; takes the header away that does.
pub(super) fn wanted(policy: &ForwardPolicy, head: &mut RequestHead) -> bool {
    let name = Name::new("x-envoy-hedge-on-per-try-timeout");
    let wanted = match head.headers.get(&name) {
        Some(b"true") => true,
        Some(b"false") => false,
        _ => policy.hedge,
    };
    head.headers.remove(&name);
    wanted
}

/// An attempt that has come to its end: its number, what was sent, and what came of it.
type Done = (u32, RequestHead, Ended);
type Running<'a> = FuturesUnordered<Pin<Box<dyn Future<Output = Box<Done>> + 'a>>>;

/// What a request waits for.
enum Event {
    Done(Box<Done>),
    /// The latest attempt takes longer than it should.
    Slow,
    /// The time before another attempt is over.
    Again,
}

impl Request<'_> {
    pub(super) async fn run_hedged(
        &self,
        attempts: &mut Attempts<'_>,
        head: &mut RequestHead,
    ) -> Result<Answer, Reject> {
        let mut running = Running::new();
        let mut again: Option<Pin<Box<Sleep>>> = None;
        let mut clock = self.launch(attempts, head, &mut running)?;
        // The latest attempt is one that another was made or is to be made for.
        let mut retried = false;
        loop {
            let event = poll_fn(|cx| {
                if let Poll::Ready(Some(done)) = running.poll_next_unpin(cx) {
                    return Poll::Ready(Event::Done(done));
                }
                if let Some(wait) = &mut again
                    && wait.as_mut().poll(cx).is_ready()
                {
                    return Poll::Ready(Event::Again);
                }
                clock.poll(&self.replay.0, cx).map(|()| Event::Slow)
            })
            .await;
            let done = match event {
                Event::Slow => {
                    clock.limit = None;
                    if let Some((local, host)) = &*self.current.borrow() {
                        local.cluster.report(host, Outcome::TimedOut);
                    }
                    if let Some(wait) = self.grant(attempts, true, None) {
                        retried = true;
                        attempts.after_timeout = true;
                        again = Some(Box::pin(sleep(wait)));
                    }
                    continue;
                }
                Event::Again => {
                    again = None;
                    let slow = self.current.borrow().clone();
                    if let Some(slow) = slow.filter(|_| !running.is_empty()) {
                        self.hedged.borrow_mut().push((attempts.number, slow));
                    }
                    match self.launch(attempts, head, &mut running) {
                        Ok(next) => {
                            clock = next;
                            retried = false;
                        }
                        Err(reject) if running.is_empty() => return Err(reject),
                        Err(_) => {}
                    }
                    continue;
                }
                Event::Done(done) => done,
            };
            let (number, sent, ended) = *done;
            if number == attempts.number {
                clock.limit = None;
            } else {
                self.hedged.borrow_mut().retain(|(of, _)| *of != number);
            }
            let may_retry = number == attempts.number && !retried;
            let mut another = |attempts: &mut Attempts<'_>, wanted: bool, told| {
                let wait = self.grant(attempts, wanted, told)?;
                clock.limit = None;
                retried = true;
                attempts.after_timeout = false;
                again = Some(Box::pin(sleep(wait)));
                Some(())
            };
            let error = match ended {
                Ended::Answer(answer) => {
                    let status = answer.head.status;
                    let wanted = attempts.retry.wants_response(status, &answer.head.headers);
                    let told = match wanted {
                        true => attempts.retry.told(&answer.head.headers),
                        false => None,
                    };
                    if may_retry && another(attempts, wanted, told).is_some() {
                        attempts.local.cluster.stats.retried(status);
                        continue;
                    }
                    // A bad answer waits for what others say.
                    if wanted && (!running.is_empty() || again.is_some()) {
                        continue;
                    }
                    *head = sent;
                    self.settle(&answer.host);
                    return Ok(answer);
                }
                Ended::Reset {
                    reset,
                    sent,
                    transport,
                } => {
                    if let Some(error) = self.replay.0.failure() {
                        return Err(downstream_failed(&error));
                    }
                    let wanted = attempts.retry.wants_reset(reset, sent);
                    if may_retry && another(attempts, wanted, None).is_some() {
                        continue;
                    }
                    (reset, transport)
                }
                // Not without a limit of their own.
                Ended::TimedOut => (Reset::Local, None),
                Ended::Final(reject) => return Err(reject),
            };
            if running.is_empty() && again.is_none() {
                let (reset, transport) = error;
                return Err(refusal(self, reset, transport, attempts.number > 1));
            }
        }
    }

    /// Begins another attempt; gives the clock that tells when it is slow.
    fn launch<'a>(
        &'a self,
        attempts: &mut Attempts<'_>,
        head: &RequestHead,
        running: &mut Running<'a>,
    ) -> Result<Clock, Reject> {
        let mut head = head.clone();
        let (local, host) = self.start(attempts, &mut head)?;
        let number = attempts.number;
        running.push(Box::pin(async move {
            let ended = self.send(&local, &host, &head, None).await;
            Box::new((number, head, ended))
        }));
        let mut clock = Clock::new(self.timeouts.per_try);
        clock.not_before = Some(Instant::now());
        Ok(clock)
    }

    /// Makes the facts those of the attempt that counts.
    fn settle(&self, host: &Host) {
        self.info.borrow_mut().meet(host);
    }
}
