//! opa: direct responses, a server that answers by OPA's REST API, and one that does not.

use std::{convert::Infallible, sync::Arc};

use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, body::Bytes, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value as Json, json};
use tokio::net::TcpListener;

use crate::{
    collector,
    remote::security::{Authority, accept, counted, put, show},
    support::{Mesh, text, told},
};

fn rules(params: &str) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: opa
metadata: {{ name: opa, namespace: istio-system }}
spec: {params}
---
apiVersion: config.istio.io/v1alpha2
kind: authorization
metadata: {{ name: who, namespace: istio-system }}
spec:
  subject: {{ user: source.principal | "" }}
  action: {{ method: request.method | "", path: request.path | "" }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: opa, namespace: istio-system }}
spec: {{ actions: [ {{ handler: opa.opa, instances: [ who.authorization ] }} ] }}
"#
    )
}

/// Answers what `decide` makes of a request to `/v1/data/mesh/allow`; anything else is 404 or 400.
async fn opa(decide: impl Fn(&Json) -> Json + Send + Sync + 'static) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let decide = Arc::new(decide);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let decide = Arc::clone(&decide);
            let service = service_fn(move |request: Request<Incoming>| {
                let decide = Arc::clone(&decide);
                async move {
                    let is_known = request.method() == "POST"
                        && request.uri().path() == "/v1/data/mesh/allow"
                        && request.headers()["content-type"] == "application/json";
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    let (status, answer) = match serde_json::from_slice::<Json>(&body) {
                        _ if !is_known => (404, json!({})),
                        Ok(body) if body["input"].is_object() => (200, decide(&body["input"])),
                        _ => (400, json!({})),
                    };
                    let response = Response::builder()
                        .status(status)
                        .body(Full::new(Bytes::from(answer.to_string())))
                        .unwrap();
                    Ok::<_, Infallible>(response)
                }
            });
            let io = TokioIo::new(stream);
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
        }
    });
    address
}

#[tokio::test]
async fn a_server_is_asked_for_each_request() {
    let address = opa(|input| match input["subject"]["user"].as_str() {
        Some("alice") => json!({ "result": input["action"]["method"] == "GET" }),
        Some("bob") => json!({ "result": {
            "allowed": false, "http_status": 302, "body": "elsewhere", "headers": { "location": "/login" },
        } }),
        Some("carol") => json!({ "result": 7 }),
        _ => json!({}),
    })
    .await;
    let params = format!("{{ serverUrl: \"http://{address}\", checkMethod: data.mesh.allow }}");
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&params))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let rejected = "PERMISSION_DENIED:opa.opa.istio-system:opa: request was rejected";
    for (user, method, want) in [
        ("alice", "GET", "OK:"),
        ("alice", "PUT", rejected),
        ("bob", "GET", rejected),
        ("mallory", "GET", rejected),
        (
            "carol",
            "GET",
            "UNAVAILABLE:opa.opa.istio-system:its answer is neither true, false nor an object: 7",
        ),
    ] {
        let attributes = [
            ("source.principal", text(user)),
            ("request.method", text(method)),
        ];
        let answer = mesh.check(&attributes).await;
        assert_eq!(told(&answer), want, "{user} {method}");
        assert_eq!(answer.valid_use_count, 0);
        if user == "bob" {
            let directive = answer.route_directive.unwrap();
            assert_eq!(directive.direct_response_code, 302);
            assert_eq!(directive.direct_response_body, "elsewhere");
            assert_eq!(directive.response_header_operations[0].value, "/login");
        }
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_allows_nothing() {
    let params = "{ serverUrl: \"http://127.0.0.1:1\", checkMethod: data.mesh.allow }";
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(params))]).await;
    let answer = told(&mesh.check(&[]).await);
    let want = "UNAVAILABLE:opa.opa.istio-system:OPA at http://127.0.0.1:1/v1/data/mesh/allow:";
    assert!(answer.starts_with(want), "{answer}");
}

#[tokio::test]
async fn many_evaluations_at_a_time_do_not_mix() {
    let policy = r#"{ policy: [ "package p\nallow { input.subject.user == input.action.path }" ], checkMethod: data.p.allow }"#;
    let mesh = Mesh::start(&[("rules.yaml", &rules(policy))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let calls = (0..200).map(|i| {
        let mut client = mesh.client.clone();
        async move {
            let user = format!("u{i}");
            let path = if i % 3 == 0 {
                user.clone()
            } else {
                format!("u{}", i + 1)
            };
            let attributes = [
                ("source.principal", text(&user)),
                ("request.path", text(&path)),
            ];
            let request = crate::support::request(&attributes, &[], "");
            let answer = client.check(request).await.unwrap().into_inner();
            let code = answer.precondition.unwrap().status.unwrap().code;
            assert_eq!(code == 0, i % 3 == 0, "{i}");
        }
    });
    futures::future::join_all(calls).await;
}

/// A server behind TLS that knows two tokens, and the requests that reach it.
async fn secured(
    authority: &Authority,
) -> (
    String,
    tokio::sync::mpsc::UnboundedReceiver<collector::Received>,
) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let tls = accept(authority.server("localhost", None));
    let received = collector::serve(listener, tls, |call| {
        match call.headers.get("authorization").map(|v| v.as_bytes()) {
            Some(b"Bearer first" | b"Bearer second") => (200, br#"{"result": true}"#.to_vec()),
            _ => (401, b"{}".to_vec()),
        }
    });
    (format!("https://localhost:{port}"), received)
}

fn one(url: &str, authentication: &str) -> String {
    let params = format!(
        "{{ serverUrl: \"{url}\", checkMethod: data.mesh.allow, authentication: {{ {authentication} }} }}"
    );
    rules(&params)
        .replace(
            "kind: opa\nmetadata: { name: opa,",
            "kind: opa\nmetadata: { name: one,",
        )
        .replace("handler: opa.opa", "handler: one.opa")
}

#[tokio::test]
async fn a_server_is_asked_over_tls_with_a_token_from_a_file() {
    let authority = Authority::new();
    let (url, mut received) = secured(&authority).await;
    let (ca, token) = (authority.path("ca.pem"), authority.path("token"));
    put(&token, "first\n");
    let tls = |ca: &std::path::Path| {
        let (ca, token) = (show(ca), show(&token));
        format!("tls: {{ caCertificates: {ca}, tokenPath: {token} }}")
    };
    let mut mesh = Mesh::start(&[("rules.yaml", &one(&url, &tls(&ca)))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
    let call = received.recv().await.unwrap();
    assert_eq!(call.headers["authorization"], "Bearer first");
    assert_eq!(call.path, "/v1/data/mesh/allow");

    // Another token is in force without a change of configuration, one that cannot be used is not.
    put(&token, "second");
    counted(&mesh, "credentials_reloaded", 1).await;
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
    let call = received.recv().await.unwrap();
    assert_eq!(call.headers["authorization"], "Bearer second");
    put(&token, "");
    counted(&mesh, "credentials_refused", 1).await;
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
    let call = received.recv().await.unwrap();
    assert_eq!(call.headers["authorization"], "Bearer second");

    // A token that the server does not take allows nothing.
    put(&token, "wrong");
    counted(&mesh, "credentials_reloaded", 2).await;
    let verdict = told(&mesh.check(&[]).await);
    assert!(verdict.starts_with("UNAVAILABLE:"), "{verdict}");
    assert!(verdict.contains("it answers 401"), "{verdict}");
    received.recv().await.unwrap();

    // The authority of somebody else: nothing is sent, and then it is replaced by the right one.
    put(&token, "first");
    let roots = authority.path("roots.pem");
    let stranger = Authority::new();
    put(
        &roots,
        &std::fs::read_to_string(stranger.path("ca.pem")).unwrap(),
    );
    let mut mesh = Mesh::start(&[("rules.yaml", &one(&url, &tls(&roots)))]).await;
    let verdict = told(&mesh.check(&[]).await);
    assert!(verdict.starts_with("UNAVAILABLE:"), "{verdict}");
    assert!(verdict.contains("invalid peer certificate"), "{verdict}");
    assert!(received.try_recv().is_err(), "nothing was sent");
    put(&roots, &std::fs::read_to_string(&ca).unwrap());
    counted(&mesh, "credentials_reloaded", 1).await;
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
}

#[tokio::test]
async fn a_server_that_asks_for_a_certificate_gets_it() {
    let authority = Authority::new();
    authority.write_client("mixer.example");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let tls = accept(authority.server("localhost", Some(&authority)));
    let _received = collector::serve(listener, tls, |_| (200, br#"{"result": true}"#.to_vec()));
    let [key, cert, ca] = ["key.pem", "cert.pem", "ca.pem"].map(|name| authority.path(name));
    let mutual = format!(
        "mutual: {{ privateKey: {}, clientCertificate: {}, caCertificates: {} }}",
        show(&key),
        show(&cert),
        show(&ca)
    );
    let url = format!("https://localhost:{port}");
    let mut mesh = Mesh::start(&[("rules.yaml", &one(&url, &mutual))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
    // Without one nobody comes in.
    let tls = format!("tls: {{ caCertificates: {} }}", show(&ca));
    let mut mesh = Mesh::start(&[("rules.yaml", &one(&url, &tls))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let verdict = told(&mesh.check(&[]).await);
    assert!(verdict.starts_with("UNAVAILABLE:"), "{verdict}");
}

#[tokio::test]
async fn credentials_that_cannot_be_used_are_refused_with_file_and_line() {
    for (authentication, reason) in [
        (
            "tls: { caCertificates: /nowhere/ca.pem }",
            "authentication: caCertificates /nowhere/ca.pem: No such file",
        ),
        (
            "tls: { tokenPath: /dev/null }",
            "authentication: tokenPath: the file has no token",
        ),
    ] {
        let rules = one("https://localhost:1", authentication);
        let mesh = Mesh::start(&[("rules.yaml", &rules)]).await;
        let refused = mesh.refused().join("\n");
        assert!(refused.contains(reason), "{refused}");
        assert!(refused.contains("rules.yaml:"), "{refused}");
    }
}
