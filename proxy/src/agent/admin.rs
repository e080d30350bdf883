//! Asking Envoy, over its admin endpoint, to drain, and watching it do so.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Method, Request, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

/// One admin request.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Largest answer read.
const MAX_BYTES: usize = 1 << 20;
/// How often to look.
const POLL: Duration = Duration::from_millis(250);

/// Tells Envoy to drain and waits until no connection is open, at most `limit`. An admin endpoint that does
/// not answer is no reason to wait.
pub(super) async fn drain(address: SocketAddr, limit: Duration) {
    let client = Client::builder(TokioExecutor::new()).build_http();
    // `graceful`: clients are asked to leave (GOAWAY, connection: close) instead of being cut off.
    if ask(
        &client,
        Method::POST,
        address,
        "/drain_listeners?graceful&skip_exit",
    )
    .await
    .is_none()
    {
        tracing::warn!(%address, "Envoy's admin endpoint does not answer; not draining");
        return;
    }
    tracing::info!(?limit, "Envoy is draining");
    let emptied = async {
        loop {
            let stats = ask(
                &client,
                Method::GET,
                address,
                "/stats?filter=downstream_cx_active",
            )
            .await;
            if stats.is_some_and(|stats| open_connections(&stats) == 0) {
                return;
            }
            tokio::time::sleep(POLL).await;
        }
    };
    if tokio::time::timeout(limit, emptied).await.is_err() {
        tracing::info!("connections are still open at the end of the drain time");
    }
}

/// Sums `listener.ADDRESS.downstream_cx_active: N` without the admin listener, which we use ourselves.
fn open_connections(stats: &str) -> u64 {
    stats
        .lines()
        .filter(|line| line.starts_with("listener.") && !line.starts_with("listener.admin."))
        .filter_map(|line| {
            line.split_once(".downstream_cx_active: ")?
                .1
                .trim()
                .parse::<u64>()
                .ok()
        })
        .fold(0, u64::saturating_add)
}

async fn ask(
    client: &Client<HttpConnector, Empty<Bytes>>,
    method: Method,
    address: SocketAddr,
    path: &str,
) -> Option<String> {
    let uri: Uri = format!("http://{address}{path}").parse().ok()?;
    let request = Request::builder()
        .method(method)
        .uri(uri)
        .body(Empty::new())
        .ok()?;
    let answer = async {
        let response = client.request(request).await.ok()?;
        if !response.status().is_success() {
            return None;
        }
        let body = Limited::new(response.into_body(), MAX_BYTES)
            .collect()
            .await
            .ok()?;
        String::from_utf8(body.to_bytes().to_vec()).ok()
    };
    tokio::time::timeout(TIMEOUT, answer).await.ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listeners_of_others_count() {
        let stats = "http.admin.downstream_cx_active: 1\nlistener.127.0.0.1_80.downstream_cx_active: 2\n\
                     listener.127.0.0.1_81.downstream_cx_active: 3\nlistener.admin.downstream_cx_active: 1\n\
                     listener.127.0.0.1_80.worker_0.downstream_cx_active: 2\nlistener.x.downstream_cx_total: 9\n";
        // Per-worker lines count twice; all that matters is zero.
        assert_eq!(open_connections(stats), 7);
        assert_eq!(
            open_connections("listener.admin.downstream_cx_active: 1\n"),
            0
        );
    }
}
