//! Copies of requests for mirrors: nobody waits for what they come to.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use tokio::task::spawn_local;

use super::{reject, replay::Replay};
use crate::{
    body::{Body, Frame},
    cluster::Caller,
    head::{Headers, Known, Name, RequestHead, ResponseHead},
    reject::Reject,
    retry::Reset,
    route::{
        policy::{ForwardPolicy, Mirror, WeightedName},
        without_port,
    },
    shared::Shared,
    upstream::{ConnectError, Pick, Refusal, WorkerClusters},
};

/// Longest time for a copy when the route has no timeout: nobody may be held up for ever.
const LONGEST: Duration = Duration::from_secs(3600);

/// Starts the copies of a request. They are sent when the whole body has been read; if it is too large
/// or breaks there are none.
pub(super) fn start(
    shared: &Arc<Shared>,
    policy: &ForwardPolicy,
    head: &RequestHead,
    replay: &Replay,
    timeout: Option<Duration>,
) {
    for mirror in &policy.mirrors {
        if !mirror.chance.hits() {
            continue;
        }
        let Some(cluster) = named(&mirror.cluster, head) else {
            continue;
        };
        let mut head = head.clone();
        head.authority = shadow_authority(mirror, &head.authority);
        // The copy is a request of our own.
        head.headers.set(Name::new("x-envoy-internal"), "true");
        append_own_address(&mut head.headers);
        let (shared, replay) = (shared.clone(), replay.share());
        spawn_local(async move {
            let Some(body) = replay.whole().await else {
                return;
            };
            drop(replay);
            let answer = call(&shared, &cluster, head, body, timeout.unwrap_or(LONGEST)).await;
            match answer {
                // Read to the end, so that the connection can be used again.
                Ok((_, mut body)) => while let Some(Ok(Frame::Data(_))) = body.frame().await {},
                Err(reject) => {
                    tracing::debug!(cluster = &*cluster, status = reject.status, "mirror failed")
                }
            }
        });
    }
}

fn append_own_address(headers: &mut Headers) {
    let Some(own) = own_address() else { return };
    let value = match headers.known(Known::XForwardedFor) {
        Some(earlier) => [earlier, ",".as_bytes(), own.as_bytes()].concat().into(),
        None => Bytes::from_static(own.as_bytes()),
    };
    headers.set(Known::XForwardedFor, value);
}

/// The address this machine would use towards others; none if it has no network.
fn own_address() -> Option<&'static str> {
    static OWN: OnceLock<Option<String>> = OnceLock::new();
    let own = OWN.get_or_init(|| {
        // Connecting a UDP socket sends nothing: it only asks the routing table. RFC 5737 address.
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
        socket.connect("203.0.113.1:9").ok()?;
        Some(socket.local_addr().ok()?.ip().to_string())
    });
    own.as_deref()
}

fn named(name: &WeightedName, head: &RequestHead) -> Option<Arc<str>> {
    match name {
        WeightedName::Name(name) => Some(name.clone()),
        WeightedName::Header(name) => {
            let value = head.headers.get(name)?;
            std::str::from_utf8(value)
                .ok()
                .filter(|value| !value.is_empty())
                .map(Arc::from)
        }
    }
}

/// Envoy: `-shadow` goes before the port.
fn shadow_authority(mirror: &Mirror, authority: &Bytes) -> Bytes {
    if let Some(rewritten) = &mirror.host_rewrite {
        return rewritten.clone();
    }
    if !mirror.shadow_suffix {
        return authority.clone();
    }
    let host = without_port(authority);
    [host, b"-shadow", &authority[host.len()..]].concat().into()
}

/// Sends one request to a cluster, without a route: no retries, one timeout for everything up to the end
/// of the response. Limits and statistics are the cluster's.
async fn call(
    shared: &Arc<Shared>,
    cluster: &str,
    mut head: RequestHead,
    body: Body,
    timeout: Duration,
) -> Result<(ResponseHead, Body), Reject> {
    let worker = WorkerClusters::of(&shared.clusters);
    let local = worker.get(cluster).ok_or_else(|| Reject::no_cluster(503))?;
    let stats = &local.cluster.stats;
    let deadline = tokio::time::Instant::now() + timeout;
    let exchange = async {
        let Some(host) = local.pick(&Pick::default()) else {
            stats.upstream_cx_none_healthy.inc();
            return Err(Reject::no_healthy_upstream());
        };
        for name in [Known::XEnvoyRetryOn, Known::XEnvoyMaxRetries] {
            head.headers.remove(&Name::Known(name));
        }
        let replay = Replay::new(body, Some(local.cluster.config.buffer_limit));
        let pool = local.pool(&host, &head, false, None);
        let mut resent = false;
        loop {
            let lease = match pool.acquire().await {
                Ok(lease) => lease,
                Err(Refusal::Overflow) => return Err(Reject::overflow()),
                Err(Refusal::Connect(ConnectError::Timeout)) => {
                    return Err(reject(Reset::ConnectTimeout, false));
                }
                Err(Refusal::Connect(_)) => return Err(reject(Reset::ConnectFailure, false)),
            };
            match lease.send(&head, replay.body(), &|_| {}).await {
                Ok(answer) => return Ok(answer),
                Err(failure) if failure.reused && !failure.sent && !resent && replay.is_whole() => {
                    resent = true
                }
                Err(failure) => return Err(reject(failure.reset, false)),
            }
        }
    };
    let result = match tokio::time::timeout_at(deadline, Box::pin(exchange)).await {
        Ok(result) => result,
        Err(_) => {
            stats.upstream_rq_timeout.inc();
            Err(Reject::upstream_timeout())
        }
    };
    let status = match &result {
        Ok((head, _)) => head.status,
        Err(reject) => reject.status,
    };
    stats.answered(status, Caller::Internal);
    let (head, body) = result?;
    Ok((head, super::response::until(body, deadline)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Chance;

    #[test]
    fn the_suffix_goes_before_the_port() {
        let mut mirror = Mirror {
            cluster: WeightedName::Name("m".into()),
            chance: crate::layers::Fraction::fixed(Chance::ALWAYS),
            shadow_suffix: true,
            host_rewrite: None,
        };
        let of = |mirror: &Mirror, text: &'static str| shadow_authority(mirror, &text.into());
        assert_eq!(of(&mirror, "m.test:80"), "m.test-shadow:80");
        assert_eq!(of(&mirror, "m.test"), "m.test-shadow");
        mirror.shadow_suffix = false;
        assert_eq!(of(&mirror, "m.test"), "m.test");
    }
}
