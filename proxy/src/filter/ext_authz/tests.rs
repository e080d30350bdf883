use std::{
    collections::HashMap,
    rc::Rc,
    time::{Duration, UNIX_EPOCH},
};

use lateen_protocols::{
    envoy::envoy::{
        config::core::v3::{self as core, address, socket_address::PortSpecifier},
        service::auth::v3::{
            AttributeContext, CheckRequest, CheckResponse,
            attribute_context::{HttpRequest, Peer, Request, TlsSession},
        },
    },
    envoy::google::protobuf as pb,
    json,
};
use prost::Message as _;
use tokio::time::Instant;

use super::{
    decision::{Allowed, How, Refusal},
    *,
};
use crate::{
    head::{Headers, Protocol},
    info::TlsInfo,
};

fn head() -> RequestHead {
    let mut headers = Headers::default();
    for (name, value) in [
        ("x-a", "1"),
        ("x-a", "2"),
        ("cookie", "a=b"),
        ("cookie", "c=d"),
        ("authorization", "secret"),
        ("x-envoy-auth-partial-body", "true"),
        ("x-envoy-downstream-service-cluster", "front"),
    ] {
        headers.append(Name::new(name), value);
    }
    headers.append(Name::new("x-bytes"), [b'a', 0xff]);
    RequestHead {
        method: "POST".into(),
        scheme: "https".into(),
        authority: "a.test".into(),
        path: "/x?q=1".into(),
        protocol: Protocol::Http2,
        headers,
    }
}

fn connection() -> Rc<ConnectionInfo> {
    Rc::new(ConnectionInfo {
        id: 1,
        remote: ([10, 0, 0, 2], 4000).into(),
        direct_remote: ([10, 0, 0, 2], 4000).into(),
        local: ([10, 0, 0, 1], 443).into(),
        local_restored: false,
        tls: Some(Box::new(TlsInfo {
            peer_uri_san: Some("spiffe://td/peer".into()),
            local_subject: Some("CN=us".into()),
            server_name: Some("sni.test".into()),
            ..TlsInfo::default()
        })),
        requested_server_name: None,
        filter_chain: None,
        original_src: None,
        started: Instant::now(),
    })
}

fn question<'a>(
    head: &'a RequestHead,
    connection: &'a ConnectionInfo,
    shown: &'a Shown,
    extensions: &'a [(String, String)],
) -> Question<'a> {
    Question {
        id: 7,
        head,
        connection,
        remote: connection.remote,
        started: UNIX_EPOCH + Duration::new(5, 6),
        size: 300,
        extensions,
        metadata: Vec::new(),
        body: Some(Gathered {
            data: "body".into(),
            whole: false,
        }),
        body_as_bytes: false,
        include_peer_certificate: false,
        include_tls_session: true,
        raw_headers: false,
        shown,
        always: &[],
    }
}

fn peer(ip: &str, port: u32, service: &str, principal: &str) -> Option<Peer> {
    Some(Peer {
        address: Some(core::Address {
            address: Some(address::Address::SocketAddress(core::SocketAddress {
                address: ip.to_owned(),
                port_specifier: Some(PortSpecifier::PortValue(port)),
                ..Default::default()
            })),
        }),
        service: service.to_owned(),
        principal: principal.to_owned(),
        ..Peer::default()
    })
}

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

#[tokio::test]
async fn the_question_is_what_envoy_would_ask() {
    let (head, connection, shown) = (head(), connection(), Shown::default());
    let long = "v".repeat(20_000);
    let extensions = [("key".to_owned(), long.clone())];
    let mut out = Vec::new();
    let asked = question(&head, &connection, &shown, &extensions);
    encode::check_request(&asked, &mut out);
    let want = CheckRequest {
        attributes: Some(AttributeContext {
            source: peer("10.0.0.2", 4000, "front", "spiffe://td/peer"),
            destination: peer("10.0.0.1", 443, "", "CN=us"),
            request: Some(Request {
                time: Some(pb::Timestamp {
                    seconds: 5,
                    nanos: 6,
                }),
                http: Some(HttpRequest {
                    id: "7".to_owned(),
                    method: "POST".to_owned(),
                    headers: map(&[
                        (":authority", "a.test"),
                        (":method", "POST"),
                        (":path", "/x?q=1"),
                        (":scheme", "https"),
                        ("x-a", "1,2"),
                        ("cookie", "a=b; c=d"),
                        ("authorization", "secret"),
                        ("x-envoy-auth-partial-body", "true"),
                        ("x-envoy-downstream-service-cluster", "front"),
                        ("x-bytes", "a!"),
                    ]),
                    path: "/x?q=1".to_owned(),
                    host: "a.test".to_owned(),
                    scheme: "https".to_owned(),
                    size: 300,
                    protocol: "HTTP/2".to_owned(),
                    body: "body".to_owned(),
                    ..HttpRequest::default()
                }),
            }),
            context_extensions: map(&[("key", &long)]),
            metadata_context: Some(core::Metadata::default()),
            route_metadata_context: Some(core::Metadata::default()),
            tls_session: Some(TlsSession {
                sni: "sni.test".to_owned(),
            }),
        }),
    };
    assert_eq!(CheckRequest::decode(out.as_slice()), Ok(want));
}

#[tokio::test]
async fn lists_decide_which_headers_are_shown() {
    let (head, connection) = (head(), connection());
    let exact = |name: &str| StringMatch::Exact(name.to_owned().into(), false);
    for (allowed, disallowed, always, want) in [
        (
            Some(vec![exact("x-a")]),
            vec![],
            &[":path"][..],
            &[":path", "x-a"][..],
        ),
        (
            Some(vec![exact("x-a"), exact("x-bytes")]),
            vec![exact("x-a")],
            &[],
            &["x-bytes"],
        ),
        (Some(vec![]), vec![], &[], &[]),
    ] {
        let shown = Shown {
            allowed,
            disallowed,
            ..Shown::default()
        };
        let mut asked = question(&head, &connection, &shown, &[]);
        asked.always = always;
        asked.body = None;
        let mut seen = Vec::new();
        asked.headers(|name, _| seen.push(String::from_utf8_lossy(name).into_owned()));
        assert_eq!(seen, want);
    }
}

fn allowed(yaml: &str) -> Allowed {
    let answer: CheckResponse =
        json::from_yaml(&format!("status: {{}}\nok_response: {yaml}")).unwrap();
    match grpc::decision(answer) {
        Decision::Allowed(allowed) => allowed,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_allowed_request_is_changed_as_told() {
    let mut head = head();
    let answer = allowed(
        "{headers: [{header: {key: x-a, value: '3'}, append: true}, {header: {key: X-New, value: n}}, \
         {header: {key: x-none, value: n}, append: true}, {header: {key: ':path', value: /y}}, \
         {header: {key: x-bad, value: \"a\\r\\nb: c\"}}], \
         headers_to_remove: [authorization, ':method', host], \
         query_parameters_to_set: [{key: z, value: '1'}, {key: b, value: '2'}], query_parameters_to_remove: [q], \
         response_headers_to_add: [{header: {key: x-r, value: a}}, {header: {key: x-s, value: a}, append: false}]}",
    );
    assert!(answer.apply(&mut head));
    let get = |name: &str| head.headers.get(&Name::new(name)).map(<[u8]>::to_vec);
    assert_eq!(get("x-a"), Some(b"1,3".to_vec()));
    assert_eq!(get("x-new"), Some(b"n".to_vec()));
    assert_eq!(get("x-none"), None);
    assert_eq!(get("x-bad"), None);
    assert_eq!(get("authorization"), None);
    assert_eq!(&*head.path, b"/y?b=2&z=1");
    assert_eq!(
        (&*head.method, &*head.authority),
        (&b"POST"[..], &b"a.test"[..])
    );
    let how: Vec<_> = answer.response.iter().map(|change| change.how).collect();
    assert_eq!(how, [How::Add, How::Set]);
    assert!(!answer.is_valid());
    assert!(!Allowed::default().apply(&mut head));
}

#[test]
fn a_refusal_becomes_the_reply() {
    let answer: CheckResponse = json::from_yaml(
        "{status: {code: 7}, denied_response: {status: {code: 401}, headers: [{header: {key: x-why, value: b}}, \
         {header: {key: content-length, value: '9'}}], body: no entry}}",
    )
    .unwrap();
    let Decision::Denied(refusal) = grpc::decision(answer) else {
        panic!("not denied");
    };
    let reject = refusal.into_reject("ext_authz_denied", 5);
    assert_eq!((reject.status, &*reject.body), (401, "no en"));
    assert_eq!(reject.flags, ResponseFlags::UNAUTHORIZED_EXTERNAL_SERVICE);
    assert_eq!(reject.details, "ext_authz_denied");
    assert_eq!(reject.headers.len(), 1);
    let bare: CheckResponse = json::from_yaml("{status: {code: 16}}").unwrap();
    let Decision::Denied(Refusal { status, .. }) = grpc::decision(bare) else {
        panic!("not denied");
    };
    assert_eq!(status, 403);
}

#[test]
fn what_is_not_supported_is_refused() {
    let scope = crate::stats::Registry::new().scope("http.t.");
    let compile = |yaml: &str| {
        let config: proto::ExtAuthz = json::from_yaml(yaml).unwrap();
        ExtAuthz::compile(&config, &scope).map(drop)
    };
    let grpc = "grpc_service: {envoy_grpc: {cluster_name: a}}";
    assert_eq!(
        compile(&format!("{{transport_api_version: V3, {grpc}}}")),
        Ok(())
    );
    for yaml in [
        format!("{{{grpc}}}"),
        "{transport_api_version: V3}".to_owned(),
        format!("{{transport_api_version: V3, shadow_mode: true, {grpc}}}"),
        format!("{{transport_api_version: V3, with_request_body: {{}}, {grpc}}}"),
        "{transport_api_version: V3, http_service: {server_uri: {uri: a, cluster: a, timeout: 1s}, path_prefix: x}}".to_owned(),
    ] {
        assert!(compile(&yaml).is_err(), "{yaml}");
    }
}

#[tokio::test]
async fn only_requests_that_bear_the_mark_are_asked_about() {
    use crate::testing::{Proxy, exchange};

    const KIND: &str = "type.googleapis.com/envoy.extensions.filters";
    let proxy = Proxy::start();
    let yaml = format!(
        "filter_chains: [{{filters: [{{name: hcm, typed_config: {{\"@type\": {KIND}.network.http_connection_manager.v3.\
         HttpConnectionManager, stat_prefix: t, route_config: {{virtual_hosts: [{{name: v, domains: ['*'], routes: \
         [{{match: {{prefix: /}}, direct_response: {{status: 200}}}}]}}]}}, http_filters: [\
         {{name: envoy.filters.http.rbac, typed_config: {{\"@type\": {KIND}.http.rbac.v3.RBAC, shadow_rules_stat_prefix: \
         my_, shadow_rules: {{action: DENY, policies: {{ask-a: {{permissions: [{{url_path: {{path: {{exact: /a}}}}}}], \
         principals: [{{any: true}}]}}}}}}}}}}, \
         {{name: ext, typed_config: {{\"@type\": {KIND}.http.ext_authz.v3.ExtAuthz, transport_api_version: V3, \
         grpc_service: {{envoy_grpc: {{cluster_name: nobody}}}}, filter_enabled_metadata: {{filter: envoy.filters.http.rbac, \
         path: [{{key: my_shadow_effective_policy_id}}], value: {{string_match: {{prefix: ask-}}}}}}}}}}, \
         {{name: router, typed_config: {{\"@type\": {KIND}.http.router.v3.Router}}}}]}}}}]}}]"
    );
    let listener = proxy.compile("l", &yaml).unwrap();
    proxy.workers.add_listener(listener).unwrap();
    let address = proxy.workers.addresses("l")[0];
    for (path, want) in [("/a", "403"), ("/b", "200")] {
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        let answer = exchange(address, request.as_bytes()).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {want}")),
            "{path}: {answer}"
        );
    }
    assert_eq!(proxy.counter("http.t.ext_authz.error"), 1);
    assert_eq!(proxy.counter("http.t.ext_authz.disabled"), 1);
}
