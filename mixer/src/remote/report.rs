//! Reports: instances wait in a bounded queue and are sent in batches, one call for each template.

use std::sync::Arc;

use bytes::Bytes;
use lateen_adapter::{Env, HandlerError};
use tokio::time::Instant;

use super::{Caller, session::InUse};
use crate::{
    adapter::export::{Limits, Queue, SendError, Sink, outcome},
    config::remote::RemoteTemplate,
    instance::Encoded,
};

/// How long an instance waits for others: long enough that Report calls of several proxies share a call.
const INTERVAL: std::time::Duration = std::time::Duration::from_millis(100);

/// The queue of one handler.
pub(super) struct Reports {
    queue: Queue<Encoded>,
}

impl Reports {
    pub(super) fn start(
        caller: &Arc<Caller>,
        session: Option<InUse>,
        env: &Env,
    ) -> Result<Self, String> {
        let limits = Limits {
            interval: INTERVAL,
            ..Limits::default()
        };
        let sender = Sender {
            caller: Arc::clone(caller),
            calls: Vec::new(),
            _session: session,
        };
        let queue =
            Queue::start(env, &caller.handler, limits, sender).map_err(|e| e.to_string())?;
        Ok(Self { queue })
    }

    pub(super) fn push(&self, batch: Vec<Encoded>) -> Result<(), HandlerError> {
        let mut dropped = 0;
        for instance in batch {
            let bytes = instance.message.len();
            dropped += usize::from(!self.queue.push(instance, bytes));
        }
        outcome(dropped)
    }
}

struct Sender {
    caller: Arc<Caller>,
    /// What is left to do of a batch that was not taken whole.
    calls: Vec<(Arc<RemoteTemplate>, Bytes)>,
    _session: Option<InUse>,
}

impl Sink for Sender {
    type Record = Encoded;

    async fn send(&mut self, batch: &[Encoded]) -> Result<(), SendError> {
        if self.calls.is_empty() {
            self.calls = calls(&self.caller, batch);
        }
        let mut refused = None;
        while let Some((template, request)) = self.calls.last() {
            let deadline = Instant::now() + self.caller.patience();
            let sent = self.caller.call(template, request.clone(), deadline).await;
            match sent {
                Err(failure) if failure.may_come_again() => {
                    return Err(SendError::Again(failure.to_string()));
                }
                Err(failure) => refused = Some(failure.to_string()),
                Ok(_) => {}
            }
            self.calls.pop();
        }
        refused.map_or(Ok(()), |reason| Err(SendError::Never(reason)))
    }
}

/// One call for each template, with an id that stays when the call is made again.
fn calls(caller: &Caller, batch: &[Encoded]) -> Vec<(Arc<RemoteTemplate>, Bytes)> {
    let mut by_template: Vec<(&Arc<RemoteTemplate>, Vec<Bytes>)> = Vec::new();
    for Encoded { instance, message } in batch {
        let place = by_template
            .iter_mut()
            .find(|(template, _)| Arc::ptr_eq(template, &instance.template));
        match place {
            Some((_, messages)) => messages.push(message.clone()),
            None => by_template.push((&instance.template, vec![message.clone()])),
        }
    }
    let calls = by_template
        .into_iter()
        .map(|(template, messages)| (Arc::clone(template), caller.request(template, &messages)));
    calls.collect()
}
