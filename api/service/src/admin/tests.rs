use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;

async fn start(admin: Admin) -> (SocketAddr, Drain) {
    let drain = Drain::new();
    let address = admin
        .serve(SocketAddr::from(([127, 0, 0, 1], 0)), &drain)
        .await
        .unwrap();
    (address, drain)
}

async fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn get(address: SocketAddr, path: &str) -> String {
    ask(
        address,
        &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"),
    )
    .await
}

#[tokio::test]
async fn readiness_follows_its_gates() {
    let admin = Admin::new(Registry::default());
    let gate = admin.readiness().gate("identity");
    let (address, _drain) = start(admin).await;
    let waiting = get(address, "/healthz/ready").await;
    assert!(
        waiting.starts_with("HTTP/1.1 503") && waiting.ends_with("waiting for: identity\n"),
        "{waiting}"
    );
    gate.open();
    assert!(
        get(address, "/healthz/ready")
            .await
            .starts_with("HTTP/1.1 200")
    );
    assert!(
        get(address, "/healthz/live")
            .await
            .starts_with("HTTP/1.1 200")
    );
}

#[tokio::test]
async fn metrics_and_own_routes() {
    let mut registry = Registry::default();
    let counter = prometheus_client::metrics::counter::Counter::<u64>::default();
    registry.register("pushes", "Pushes", counter.clone());
    counter.inc_by(3);
    let admin = Admin::new(registry)
        .route("/debug/echo", |query| async move {
            Reply::json(query.get("q").unwrap_or_default())
        })
        .post("/drain", |_| async { Reply::text("draining\n") });
    let (address, _drain) = start(admin).await;
    assert!(get(address, "/metrics").await.contains("pushes_total 3"));
    assert!(
        get(address, "/debug/echo?a&q=x%20y")
            .await
            .ends_with("\r\n\r\nx y")
    );
    assert!(get(address, "/nothing").await.starts_with("HTTP/1.1 404"));
    let refused = get(address, "/drain").await;
    assert!(
        refused.starts_with("HTTP/1.1 405") && refused.contains("allow: POST"),
        "{refused}"
    );
}

#[tokio::test]
async fn oversized_heads_are_refused() {
    let (address, _drain) = start(Admin::new(Registry::default())).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "GET / HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n",
        "a".repeat(2 * MAX_HEAD_BYTES)
    );
    // The server may reset while we still write; what counts is that it never serves this.
    drop(stream.write_all(head.as_bytes()).await);
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer).await);
    assert!(!answer.starts_with(b"HTTP/1.1 200") && !answer.starts_with(b"HTTP/1.1 404"));
}

#[tokio::test]
async fn stopping_ends_idle_connections() {
    let (address, drain) = start(Admin::new(Registry::default())).await;
    let mut idle = TcpStream::connect(address).await.unwrap();
    assert!(
        get(address, "/healthz/live")
            .await
            .starts_with("HTTP/1.1 200")
    );
    assert!(drain.finish(Duration::from_secs(5)).await);
    assert_eq!(idle.read(&mut [0; 1]).await.unwrap_or(0), 0);
}
