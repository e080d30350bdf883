//! A06 and A13–A17: connections are shared out, what breaks is kept away, copies are sent, requests rewritten.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use e2e::{
    app::{self, App},
    http::Client,
    mesh::Mesh,
    workload::Workload,
};
use futures::future::join_all;
use http::Method;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::support::{Sidecar, add_sleep, ask, assert_share, eventually, on_both, stat};

on_both!(
    a06_tcp_connections_are_shared_out,
    a13_what_is_too_much_is_refused,
    a14_what_fails_is_left_out_for_a_while,
    a15_a_mirror_is_not_seen,
    a16_a17_requests_are_told_apart_and_rewritten,
);

/// `httpbin` on port 8000 in as many versions as asked for, one instance each.
const HTTPBIN: &str = "apiVersion: v1
kind: Service
metadata: { name: httpbin }
spec:
  selector: { app: httpbin }
  ports: [{ name: http, port: 8000 }]
---
apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: { name: httpbin }
spec:
  host: httpbin
  subsets:
  - { name: v1, labels: { version: v1 } }
  - { name: v2, labels: { version: v2 } }
";

/// A version of an application: where it listens is known, it does not run yet.
fn add_version(
    mesh: &mut Mesh,
    name: &str,
    version: &'static str,
    port: u16,
) -> anyhow::Result<SocketAddr> {
    let labels = [("app", name), ("version", version)];
    let workload = Workload::new(&format!("{name}-{version}"), &labels, port);
    let instance = mesh.add(workload, false)?;
    let port = instance.workload.app_port(port);
    Ok(SocketAddr::from((instance.address.ip, port)))
}

/// A mesh with `sleep` and these versions of `httpbin`.
async fn httpbin(
    sidecar: Sidecar,
    versions: &[&'static str],
) -> anyhow::Result<Option<(Mesh, Client, Vec<App>)>> {
    let Some(options) = sidecar.options() else {
        return Ok(None);
    };
    let mut mesh = Mesh::start(options).await?;
    add_sleep(&mut mesh)?;
    let mut apps = Vec::new();
    for version in versions {
        let address = add_version(&mut mesh, "httpbin", version, 8000)?;
        apps.push(app::httpbin(address, version).await?);
    }
    mesh.ready().await?;
    mesh.apply("httpbin.yaml", HTTPBIN).await?;
    Ok(Some((mesh, Client::new(), apps)))
}

/// A VirtualService of `httpbin` with these HTTP routes.
fn routes(http: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: {{ name: httpbin }}
spec:
  hosts: [httpbin]
  http:
{http}"
    )
}

fn rule(policy: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: {{ name: httpbin-policy }}
spec:
  host: httpbin.default.svc.cluster.local
  trafficPolicy: {policy}
"
    )
}

const CLUSTER: &str = "cluster.outbound|8000||httpbin.default.svc.cluster.local";

async fn a06_tcp_connections_are_shared_out(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.options() else {
        return Ok(());
    };
    let mut mesh = Mesh::start(options).await?;
    add_sleep(&mut mesh)?;
    let one = add_version(&mut mesh, "tcp-echo", "v1", 9000)?;
    let two = add_version(&mut mesh, "tcp-echo", "v2", 9000)?;
    let _apps = [
        app::tcp_echo(one, "one").await?,
        app::tcp_echo(two, "two").await?,
    ];
    mesh.ready().await?;
    let service = "apiVersion: v1
kind: Service
metadata: { name: tcp-echo }
spec:
  selector: { app: tcp-echo }
  ports: [{ name: tcp, port: 9000 }]
---
apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: { name: tcp-echo }
spec:
  host: tcp-echo
  subsets:
  - { name: v1, labels: { version: v1 } }
  - { name: v2, labels: { version: v2 } }
";
    mesh.apply("tcp-echo.yaml", service).await?;
    let outbound = mesh.instance("sleep-0")?.address.outbound;
    for (v1, v2) in [(100, 0), (80, 20)] {
        let yaml = format!(
            "apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: {{ name: tcp-echo }}
spec:
  hosts: [tcp-echo]
  tcp:
  - route:
    - {{ destination: {{ host: tcp-echo, subset: v1 }}, weight: {v1} }}
    - {{ destination: {{ host: tcp-echo, subset: v2 }}, weight: {v2} }}
"
        );
        mesh.apply("tcp-routes.yaml", &yaml).await?;
        let mut second = 0;
        for _ in 0..200 {
            let mut stream = TcpStream::connect((outbound, 9000)).await?;
            let mut answers = Vec::new();
            for _ in 0..2 {
                stream.write_all(b"hello").await?;
                let mut answer = [0; 9];
                stream.read_exact(&mut answer).await?;
                answers.push(answer);
            }
            assert_eq!(answers[0], answers[1], "switched inside a connection");
            second += usize::from(&answers[0] == b"two hello");
        }
        match v2 {
            0 => assert_eq!(second, 0),
            _ => assert_share(second, 200, f64::from(v2) / 100.0),
        }
    }
    Ok(())
}

async fn a13_what_is_too_much_is_refused(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some((mut mesh, client, _apps)) = httpbin(sidecar, &["v1"]).await? else {
        return Ok(());
    };
    let limits = "{ connectionPool: { tcp: { maxConnections: 1 }, \
                  http: { http1MaxPendingRequests: 1, maxRequestsPerConnection: 1 } } }";
    mesh.apply("limits.yaml", &rule(limits)).await?;
    let from = mesh.instance("sleep-0")?;
    let mut refused = 0;
    for (together, rounds) in [(2, 10), (3, 10)] {
        let before = refused;
        for _ in 0..rounds {
            let asked =
                (0..together).map(|_| ask(&client, from, "httpbin:8000", "/delay/0.02", &[]));
            for response in join_all(asked).await {
                match response?.status {
                    200 => {}
                    503 => refused += 1,
                    other => panic!("status {other}"),
                }
            }
        }
        if together == 3 {
            assert!(refused - before >= 6, "{} of 30", refused - before);
        }
    }
    let overflows = stat(
        &client,
        &from.admin(),
        &format!("{CLUSTER}.upstream_rq_pending_overflow"),
    )
    .await?;
    assert_eq!(overflows, refused);
    eventually(Duration::from_secs(15), async || {
        let lines = from.sidecar_output();
        let flagged = lines.lines().filter(|line| line.contains(" 503 UO "));
        anyhow::ensure!(flagged.count() as u64 == refused, "flags UO:\n{lines}");
        Ok(())
    })
    .await
}

async fn a14_what_fails_is_left_out_for_a_while(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some((mut mesh, client, apps)) = httpbin(sidecar, &["v1", "v2"]).await? else {
        return Ok(());
    };
    let outlier = "{ outlierDetection: { consecutive5xxErrors: 1, interval: 1s, baseEjectionTime: 3s, \
                   maxEjectionPercent: 100 } }";
    mesh.apply("outlier.yaml", &rule(outlier)).await?;
    let none = routes(
        "  - route: [{ destination: { host: httpbin } }]
    retries: { attempts: 0 }
",
    );
    mesh.apply("routes.yaml", &none).await?;
    let from = mesh.instance("sleep-0")?;
    let active = format!("{CLUSTER}.outlier_detection.ejections_active");
    // Each is asked for an error until nobody is left.
    let failed = Instant::now();
    eventually(Duration::from_secs(2), async || {
        let status = ask(&client, from, "httpbin:8000", "/status/500", &[])
            .await?
            .status;
        anyhow::ensure!(status == 503, "status {status}");
        Ok(())
    })
    .await?;
    assert_eq!(stat(&client, &from.admin(), &active).await?, 2);
    let seen: u64 = apps.iter().map(App::count).sum();
    let response = ask(&client, from, "httpbin:8000", "/status/200", &[]).await?;
    assert_eq!(
        (response.status, response.text().as_str()),
        (503, "no healthy upstream")
    );
    assert_eq!(apps.iter().map(App::count).sum::<u64>(), seen);
    eventually(Duration::from_secs(6), async || {
        let status = ask(&client, from, "httpbin:8000", "/status/200", &[])
            .await?
            .status;
        anyhow::ensure!(status == 200, "status {status}");
        Ok(())
    })
    .await?;
    assert!(failed.elapsed() >= Duration::from_secs(3), "back too soon");
    eventually(Duration::from_secs(15), async || {
        let lines = from.sidecar_output();
        anyhow::ensure!(
            lines.contains(" 503 UH "),
            "no line has the flag UH:\n{lines}"
        );
        Ok(())
    })
    .await
}

async fn a15_a_mirror_is_not_seen(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some((mut mesh, client, mut apps)) = httpbin(sidecar, &["v1", "v2"]).await? else {
        return Ok(());
    };
    let mut before = 0;
    for share in [100, 50] {
        let mirrored = routes(&format!(
            "  - route: [{{ destination: {{ host: httpbin, subset: v1 }} }}]
    mirror: {{ host: httpbin, subset: v2 }}
    mirrorPercentage: {{ value: {share} }}
"
        ));
        mesh.apply("routes.yaml", &mirrored).await?;
        let from = mesh.instance("sleep-0")?;
        for _ in 0..200 {
            let response = ask(&client, from, "httpbin:8000", "/anything", &[]).await?;
            assert_eq!(response.status, 200);
            assert_eq!(response.json()?["version"], "v1");
        }
        let copies = if share == 100 {
            eventually(Duration::from_secs(5), async || {
                anyhow::ensure!(apps[1].count() == 200, "{} of 200 copies", apps[1].count());
                Ok(())
            })
            .await?;
            200
        } else {
            // The last copies may be on their way still; how many there are is not known.
            let admin = from.admin();
            let name =
                "cluster.outbound|8000|v2|httpbin.default.svc.cluster.local.upstream_rq_total";
            let sent = eventually(Duration::from_secs(5), async || {
                let sent = stat(&client, &admin, name).await?;
                anyhow::ensure!(apps[1].count() == sent, "{} of {sent}", apps[1].count());
                Ok(sent)
            })
            .await?;
            sent - before
        };
        assert_share(copies as usize, 200, f64::from(share) / 100.0);
        before += copies;
    }
    // Nobody listens there any more.
    drop(apps.pop());
    let from = mesh.instance("sleep-0")?;
    for _ in 0..50 {
        let started = Instant::now();
        let response = ask(&client, from, "httpbin:8000", "/anything", &[]).await?;
        assert_eq!(response.json()?["version"], "v1");
        assert!(started.elapsed() < Duration::from_millis(500));
    }
    Ok(())
}

async fn a16_a17_requests_are_told_apart_and_rewritten(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some((mut mesh, client, _apps)) = httpbin(sidecar, &["v1", "v2"]).await? else {
        return Ok(());
    };
    let mut other = Workload::new("other", &[("app", "other")], 80);
    other.service_account = "other".to_owned();
    mesh.add(other, false)?;
    mesh.ready().await?;
    let all = routes(
        r#"  - match: [{ uri: { prefix: /only }, sourceLabels: { app: other } }]
    route: [{ destination: { host: httpbin, subset: v2 } }]
  - match: [{ uri: { prefix: /old/ } }]
    rewrite: { uri: /new/, authority: renamed.example }
    route: [{ destination: { host: httpbin, subset: v1 } }]
  - match: [{ uri: { exact: /moved } }]
    redirect: { uri: /there, authority: other.example, redirectCode: 302 }
  - match: [{ uri: { regex: "/item/[0-9]+" }, method: { exact: PUT }, queryParams: { v: { exact: "2" } } }]
    route: [{ destination: { host: httpbin, subset: v2 } }]
  - match: [{ uri: { prefix: /headers } }]
    headers:
      request: { set: { x-set: new }, add: { x-added: more }, remove: [x-gone] }
      response: { set: { x-answer: yes }, remove: [content-type] }
    route: [{ destination: { host: httpbin, subset: v1 } }]
  - match: [{ uri: { prefix: /cors } }]
    corsPolicy:
      allowOrigins: [{ exact: "https://example.com" }]
      allowMethods: [POST, GET]
      allowHeaders: [x-own]
      maxAge: 24h
    route: [{ destination: { host: httpbin, subset: v1 } }]
  - route: [{ destination: { host: httpbin, subset: v1 } }]
"#,
    );
    mesh.apply("routes.yaml", &all).await?;
    let (sleep, other) = (mesh.instance("sleep-0")?, mesh.instance("other-0")?);
    let host = "httpbin:8000";

    for (from, version) in [(sleep, "v1"), (other, "v2")] {
        let response = ask(&client, from, host, "/only/here", &[]).await?;
        assert_eq!(response.json()?["version"], version, "by source labels");
    }

    let echo = ask(&client, sleep, host, "/old/place?q=1", &[])
        .await?
        .json()?;
    assert_eq!(echo["url"], "/new/place?q=1");
    assert_eq!(echo["headers"]["host"], "renamed.example");

    let moved = ask(&client, sleep, host, "/moved", &[]).await?;
    assert_eq!(moved.status, 302);
    assert_eq!(moved.header("location"), Some("http://other.example/there"));

    for (method, path, version) in [
        (Method::PUT, "/item/17?v=2", "v2"),
        (Method::PUT, "/item/17?v=1", "v1"),
        (Method::PUT, "/item/x?v=2", "v1"),
        (Method::GET, "/item/17?v=2", "v1"),
    ] {
        let url = format!("{}{path}", sleep.http_proxy());
        let response = client
            .send(method.clone(), &url, &[("host", host)], "x".into())
            .await?;
        assert_eq!(response.json()?["version"], version, "{method} {path}");
    }

    let headers = [("x-set", "old"), ("x-gone", "1"), ("x-kept", "2")];
    let response = ask(&client, sleep, host, "/headers", &headers).await?;
    assert_eq!(response.header("x-answer"), Some("yes"));
    assert_eq!(response.header("content-type"), None);
    let echo = response.json()?;
    for (name, value) in [("x-set", "new"), ("x-added", "more"), ("x-kept", "2")] {
        assert_eq!(echo["headers"][name], value, "{name}");
    }
    assert!(echo["headers"]["x-gone"].is_null());

    let preflight = |origin: &'static str| {
        let url = format!("{}/cors", sleep.http_proxy());
        let client = client.clone();
        async move {
            let headers = [
                ("host", host),
                ("origin", origin),
                ("access-control-request-method", "POST"),
            ];
            client
                .send(Method::OPTIONS, &url, &headers, "".into())
                .await
        }
    };
    let allowed = preflight("https://example.com").await?;
    assert_eq!(allowed.status, 200);
    for (name, value) in [
        ("access-control-allow-origin", "https://example.com"),
        ("access-control-allow-methods", "POST,GET"),
        ("access-control-allow-headers", "x-own"),
        ("access-control-max-age", "86400"),
    ] {
        assert_eq!(allowed.header(name), Some(value), "{name}");
    }
    let foreign = preflight("https://evil.example").await?;
    assert_eq!(foreign.header("access-control-allow-origin"), None);

    let address = add_version(&mut mesh, "chat", "v1", 8000)?;
    let _chat = app::websocket_echo(address).await?;
    mesh.ready().await?;
    let service = HTTPBIN.split("---").next().unwrap_or_default();
    mesh.apply("chat.yaml", &service.replace("httpbin", "chat"))
        .await?;
    let url = mesh.instance("sleep-0")?.http_proxy();
    let mut stream = TcpStream::connect(url.trim_start_matches("http://")).await?;
    let request = "GET /chat HTTP/1.1\r\nhost: chat:8000\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    assert!(
        head.starts_with(b"HTTP/1.1 101 "),
        "{}",
        head.escape_ascii()
    );
    for frame in [b"\x81\x02hi".as_slice(), b"\x82\x03abc"] {
        stream.write_all(frame).await?;
        let mut answer = vec![0; frame.len()];
        stream.read_exact(&mut answer).await?;
        assert_eq!(answer, frame);
    }
    Ok(())
}
