use std::net::SocketAddr;

use aws_lc_rs::hmac;

use super::token::encode;
use crate::testing::{Proxy, exchange};

const SECRET: &[u8] = b"a secret of some length for tests";
const KIND: &str = "type.googleapis.com/envoy.extensions.filters.http";

fn keys() -> String {
    format!(
        r#"{{"keys":[{{"kty":"oct","kid":"k1","alg":"HS256","k":"{}"}}]}}"#,
        encode(SECRET, false)
    )
}

fn token(claims: &str) -> String {
    let signed = format!(
        "{}.{}",
        encode(br#"{"alg":"HS256","kid":"k1"}"#, false),
        encode(claims.as_bytes(), false)
    );
    let tag = hmac::sign(
        &hmac::Key::new(hmac::HMAC_SHA256, SECRET),
        signed.as_bytes(),
    );
    format!("{signed}.{}", encode(tag.as_ref(), false))
}

fn listen(proxy: &Proxy, name: &str, fields: &str, routes: &str) -> Result<SocketAddr, String> {
    let yaml = format!(
        "filter_chains: [{{filters: [{{name: hcm, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.\
         filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: t, route_config: \
         {{virtual_hosts: [{{name: v, domains: ['*'], routes: [{routes}]}}]}}, http_filters: [\
         {{name: jwt, typed_config: {{\"@type\": {KIND}.jwt_authn.v3.JwtAuthentication, {fields}}}}}, \
         {{name: router, typed_config: {{\"@type\": {KIND}.router.v3.Router}}}}]}}}}]}}]"
    );
    let listener = proxy.compile(name, &yaml)?;
    proxy
        .workers
        .add_listener(listener)
        .map_err(|error| error.to_string())?;
    Ok(proxy.workers.addresses(name)[0])
}

const SHOW: &str = "response_headers_to_add: [{header: {key: x-seen, value: \
    '[%REQ(X-SUB)%][%REQ(AUTHORIZATION)%][%REQ(:PATH)%]'}}]";

fn route(prefix: &str, more: &str) -> String {
    format!("{{match: {{prefix: {prefix}}}, direct_response: {{status: 200}}, {SHOW}{more}}}")
}

async fn ask(address: SocketAddr, path: &str, headers: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\n{headers}connection: close\r\n\r\n");
    exchange(address, request.as_bytes()).await
}

#[tokio::test]
async fn a_request_passes_by_the_tokens_that_its_rule_requires() {
    let proxy = Proxy::start();
    let fields = format!(
        "providers: {{p: {{issuer: me, local_jwks: {{inline_string: '{}'}}, claim_to_headers: \
         [{{header_name: x-sub, claim_name: user.name}}]}}}}, \
         rules: [{{match: {{prefix: /free}}}}, {{match: {{prefix: /}}, requires: {{provider_name: p}}}}], \
         requirement_map: {{lax: {{allow_missing: {{}}}}}}",
        keys()
    );
    let own = |config: &str| {
        format!(
            ", typed_per_filter_config: {{jwt: {{\"@type\": {KIND}.jwt_authn.v3.PerRouteConfig, {config}}}}}"
        )
    };
    let routes = [
        route("/off", &own("disabled: true")),
        route("/lax", &own("requirement_name: lax")),
        route("/wrong", &own("requirement_name: nobody")),
        route("/", ""),
    ];
    let address = listen(&proxy, "l", &fields, &routes.join(", ")).unwrap();
    let good = token(r#"{"iss":"me","user":{"name":"joe"}}"#);
    let bearer = format!("authorization: Bearer {good}\r\n");

    let answer = ask(address, "/", "").await;
    assert!(
        answer.starts_with("HTTP/1.1 401")
            && answer.contains("www-authenticate: Bearer realm=\"http://a/\"\r\n")
            && answer.ends_with("Jwt is missing"),
        "{answer}"
    );
    // What only the filter may say is taken from the client; the token goes no further.
    let answer = ask(address, "/", &format!("x-sub: root\r\n{bearer}")).await;
    assert!(answer.contains("x-seen: [joe][][/]\r\n"), "{answer}");
    let answer = ask(address, &format!("/?a=1&access_token={good}&b=2"), "").await;
    assert!(
        answer.contains("x-seen: [joe][][/?a=1&b=2]\r\n"),
        "{answer}"
    );
    for (path, headers, want) in [
        ("/", "authorization: Bearer a.b\r\n", "401"),
        ("/free", "", "200"),
        ("/off", "", "200"),
        ("/lax", "", "200"),
        ("/lax", "authorization: Bearer a.b.c\r\n", "401"),
        ("/lax", &bearer, "200"),
        ("/wrong", &bearer, "403"),
    ] {
        let answer = ask(address, path, headers).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {want}")),
            "{path} {answer}"
        );
    }
    assert_eq!(proxy.counter("http.t.jwt_authn.allowed"), 5);
    assert_eq!(proxy.counter("http.t.jwt_authn.denied"), 4);
}

#[tokio::test]
async fn keys_are_fetched_from_their_cluster_once() {
    let proxy = Proxy::start();
    let keys = format!(
        "{{match: {{path: /keys}}, direct_response: {{status: 200, body: {{inline_string: '{}'}}}}}}",
        keys()
    );
    let provider = |name: &str, path: &str| {
        format!(
            "{name}: {{issuer: {name}, remote_jwks: {{http_uri: {{uri: 'http://keys.example{path}', cluster: keys, \
             timeout: 1s}}}}}}"
        )
    };
    let fields = format!(
        "providers: {{{}, {}}}, rules: [{{match: {{prefix: /me}}, requires: {{provider_name: me}}}}, \
         {{match: {{prefix: /lost}}, requires: {{provider_name: lost}}}}]",
        provider("me", "/keys"),
        provider("lost", "/nowhere")
    );
    let address = listen(&proxy, "l", &fields, &format!("{keys}, {}", route("/", ""))).unwrap();
    proxy.cluster("keys", address, "");
    let bearer = |claims: &str| format!("authorization: Bearer {}\r\n", token(claims));
    for _ in 0..3 {
        let answer = ask(address, "/me", &bearer(r#"{"iss":"me"}"#)).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    let answer = ask(address, "/me", &bearer(r#"{"iss":"you"}"#)).await;
    assert!(answer.ends_with("Jwt issuer is not configured"), "{answer}");
    assert_eq!(proxy.counter("cluster.keys.upstream_rq_total"), 1);
    let answer = ask(address, "/lost", &bearer(r#"{"iss":"lost"}"#)).await;
    assert!(answer.ends_with("Jwks remote fetch is failed"), "{answer}");
}

#[tokio::test]
async fn keys_that_are_none_refuse_every_token_and_nothing_else() {
    let proxy = Proxy::start();
    let fields = "providers: {p: {issuer: me, local_jwks: {inline_string: '{\"keys\":[{\"kty\":\"odd\"}]}'}}}, rules: \
        [{match: {prefix: /}, requires: {requires_any: {requirements: [{provider_name: p}, {allow_missing: {}}]}}}]";
    let address = listen(&proxy, "l", fields, &route("/", "")).unwrap();
    assert!(ask(address, "/", "").await.starts_with("HTTP/1.1 200"));
    let bearer = format!("authorization: Bearer {}\r\n", token(r#"{"iss":"me"}"#));
    let answer = ask(address, "/", &bearer).await;
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
}

#[test]
fn what_cannot_be_verified_is_not_configured() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _inside = runtime.enter();
    let proxy = Proxy::start();
    let keys = format!("local_jwks: {{inline_string: '{}'}}", keys());
    for (fields, want) in [
        ("providers: {p: {issuer: me}}".to_owned(), "local_jwks"),
        (
            format!(
                "providers: {{p: {{{keys}}}}}, rules: [{{match: {{prefix: /}}, requires: {{provider_name: q}}}}]"
            ),
            "provider_name",
        ),
        (
            format!(
                "providers: {{p: {{{keys}}}}}, rules: [{{match: {{prefix: /}}, requirement_name: q}}]"
            ),
            "requirement_name",
        ),
    ] {
        let error = listen(&proxy, "l", &fields, &route("/", "")).unwrap_err();
        assert!(error.contains(want), "{error}");
    }
}
