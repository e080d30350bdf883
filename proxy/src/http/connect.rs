//! CONNECT that ends here: the tunnel goes on as plain TCP to a host of the route's cluster. Envoy:
//! `RouteAction.UpgradeConfig.connect_config`.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll, ready},
};

use crate::{
    body::{Body, BodyError, Frame, Source},
    circuit::{Permit, Resource},
    cluster::Host,
    head::{Headers, RequestHead, ResponseHead},
    info::ResponseFlags,
    net::{Transport, stock},
    outlier::Outcome,
    reject::Reject,
    route::{ForwardPolicy, policy::Target},
    router::{SharedInfo, original_destination},
    shared::Shared,
    upstream::{ConnectError, Pick, WorkerClusters, connect},
};
use bytes::{Buf as _, Bytes};

/// Connects, and gives the response whose body carries what the host sends.
///
/// # Errors
/// The local reply when there is no connection.
pub(super) async fn end(
    shared: &Arc<Shared>,
    policy: &ForwardPolicy,
    target: &Target,
    head: &RequestHead,
    body: Body,
    info: &SharedInfo,
) -> Result<(ResponseHead, Body), Reject> {
    let worker = WorkerClusters::of(&shared.clusters);
    let Some(local) = worker.get(&target.cluster) else {
        return Err(Reject::no_cluster(policy.cluster_not_found));
    };
    let stats = &local.cluster.stats;
    let host = local.pick(&Pick {
        subset: target.subset.as_ref(),
        original: original_destination(&info.borrow().connection),
        headers: Some(&head.headers),
        authority: &head.authority,
        ..Pick::default()
    });
    let Some(host) = host else {
        stats.upstream_cx_none_healthy.inc();
        return Err(Reject::no_healthy_upstream());
    };
    let permit = local
        .cluster
        .circuits
        .of(policy.high_priority)
        .try_acquire(Resource::Connections);
    let Some(permit) = permit else {
        stats.upstream_cx_overflow.inc();
        return Err(Reject::overflow());
    };
    {
        let mut info = info.borrow_mut();
        info.meet(&host);
        info.upstream_attempts = 1;
    }
    let source = info.borrow().original_src;
    match connect(&local.cluster, &host, None, None, source).await {
        Ok(connected) => {
            local.cluster.report(&host, Outcome::Connected);
            let mut facts = info.borrow_mut();
            facts.upstream_local = connected.local;
            facts.upstream_tls = connected.tls;
            drop(facts);
            stats.upstream_rq_total.inc();
            let tunnel = Tunnel {
                io: connected.transport,
                up: Some(body),
                pending: Bytes::new(),
                shut: false,
                info: info.clone(),
                _permit: permit,
                _host: host,
            };
            let head = ResponseHead {
                status: 200,
                headers: Headers::default(),
            };
            Ok((head, Body::stream(tunnel)))
        }
        Err(error) => {
            let outcome = match error {
                ConnectError::Timeout => Outcome::TimedOut,
                ConnectError::Refused(_) | ConnectError::Tls(_) => Outcome::Failed,
            };
            local.cluster.report(&host, outcome);
            host.state.numbers.rq_error.fetch_add(1, Relaxed);
            info.borrow_mut().upstream_transport_failure = Some(error.to_string());
            Err(failed(&error))
        }
    }
}

/// The local reply for a connection that could not be made, in Envoy's words.
fn failed(error: &ConnectError) -> Reject {
    let (reason, details) = match error {
        ConnectError::Timeout => (
            "connection timeout",
            "upstream_reset_before_response_started{connection_timeout}",
        ),
        ConnectError::Refused(_) | ConnectError::Tls(_) => (
            "remote connection failure",
            "upstream_reset_before_response_started{remote_connection_failure}",
        ),
    };
    Reject::new(
        503,
        format!(
            "upstream connect error or disconnect/reset before headers. reset reason: {reason}"
        ),
        ResponseFlags::UPSTREAM_CONNECTION_FAILURE,
        details,
    )
}

/// The host's bytes as a body; what the downstream sends is written while this is polled.
struct Tunnel {
    io: Transport,
    /// What the downstream sends, until it ends.
    up: Option<Body>,
    /// A piece of it that the host has not taken yet.
    pending: Bytes,
    /// The host is to be told that the downstream has ended its half.
    shut: bool,
    info: SharedInfo,
    _permit: Permit,
    _host: Arc<Host>,
}

impl Tunnel {
    /// Moves bytes towards the host until one of the two has to be waited for.
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            while !self.pending.is_empty() {
                let n = ready!(self.io.poll_write(cx, &[IoSlice::new(&self.pending)]))?;
                if n == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.pending.advance(n);
            }
            if self.shut {
                ready!(self.io.poll_shutdown(cx))?;
                self.shut = false;
            }
            let Some(up) = &mut self.up else {
                return Poll::Pending;
            };
            match up.poll_frame(cx) {
                Poll::Ready(Some(Ok(Frame::Data(data)))) => self.pending = data,
                Poll::Ready(Some(Ok(Frame::Trailers(_)) | Err(_)) | None) => {
                    self.info
                        .borrow_mut()
                        .flags
                        .set(ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION);
                    self.up = None;
                    self.shut = true;
                }
                Poll::Pending => {
                    ready!(self.io.poll_flush(cx))?;
                    return Poll::Pending;
                }
            }
        }
    }
}

impl Source for Tunnel {
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let this = self.get_mut();
        if let Poll::Ready(Err(_)) = this.poll_up(cx) {
            return Poll::Ready(Some(Err(BodyError::Disconnected)));
        }
        match ready!(this.io.poll_readable(cx)) {
            Ok(()) => {}
            Err(_) => return Poll::Ready(Some(Err(BodyError::Disconnected))),
        }
        let mut buffer = stock::get();
        match this.io.poll_read(cx, &mut buffer) {
            Poll::Pending => {
                stock::put(buffer);
                Poll::Pending
            }
            Poll::Ready(Ok(0)) => Poll::Ready(None),
            Poll::Ready(Ok(_)) => Poll::Ready(Some(Ok(Frame::Data(buffer.freeze())))),
            Poll::Ready(Err(_)) => Poll::Ready(Some(Err(BodyError::Disconnected))),
        }
    }
}
