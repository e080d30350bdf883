//! Stock Envoy's protocols: the same rules decide, and the answer is what our own proxy would give.

use std::collections::HashMap;

use lateen_protocols::envoy::{
    envoy::{
        config::core::v3::{
            Address, Node, RequestMethod, SocketAddress, address,
            header_value_option::HeaderAppendAction, socket_address::PortSpecifier,
        },
        data::accesslog::v3::{
            AccessLogCommon, AccessLogType, ConnectionProperties, HttpAccessLogEntry,
            HttpRequestProperties, HttpResponseProperties, TcpAccessLogEntry,
        },
        extensions::common::ratelimit::v3::{RateLimitDescriptor, rate_limit_descriptor::Entry},
        service::{
            accesslog::v3::{
                StreamAccessLogsMessage,
                access_log_service_client::AccessLogServiceClient,
                stream_access_logs_message::{
                    HttpAccessLogEntries, Identifier, LogEntries, TcpAccessLogEntries,
                },
            },
            auth::v3::{
                AttributeContext, CheckRequest, CheckResponse,
                attribute_context::{HttpRequest, Peer, Request as Seen},
                authorization_client::AuthorizationClient,
                check_response::HttpResponse,
            },
            ratelimit::v3::{
                RateLimitRequest, rate_limit_response::Code,
                rate_limit_service_client::RateLimitServiceClient,
            },
        },
    },
    google::protobuf::{Timestamp, UInt32Value},
};
use tonic::{Request, transport::Channel};

use crate::support::Mesh;

async fn channel(mesh: &Mesh) -> Channel {
    let url = format!("http://{}", mesh.running.address);
    Channel::from_shared(url).unwrap().connect().await.unwrap()
}

fn socket(ip: &str, port: u32) -> Option<Address> {
    Some(Address {
        address: Some(address::Address::SocketAddress(SocketAddress {
            address: ip.into(),
            port_specifier: Some(PortSpecifier::PortValue(port)),
            ..SocketAddress::default()
        })),
    })
}

fn strings(entries: &[(&str, &str)]) -> HashMap<String, String> {
    entries
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

/// A request of productpage for `/details/0?a=b`, as Envoy beside details tells of it.
fn seen(headers: &[(&str, &str)], extensions: &[(&str, &str)]) -> CheckRequest {
    let mut all = strings(headers);
    all.extend(strings(&[(":path", "/details/0?a=b"), (":method", "GET")]));
    CheckRequest {
        attributes: Some(AttributeContext {
            source: Some(Peer {
                address: socket("10.0.0.7", 4711),
                principal: "spiffe://cluster.local/ns/default/sa/bookinfo-productpage".into(),
                ..Peer::default()
            }),
            destination: Some(Peer {
                address: socket("10.0.0.8", 9080),
                principal: "spiffe://cluster.local/ns/default/sa/bookinfo-details".into(),
                ..Peer::default()
            }),
            request: Some(Seen {
                time: Some(Timestamp {
                    seconds: 1_700_000_000,
                    nanos: 5,
                }),
                http: Some(HttpRequest {
                    method: "GET".into(),
                    path: "/details/0?a=b".into(),
                    host: "details:9080".into(),
                    scheme: "http".into(),
                    headers: all,
                    ..HttpRequest::default()
                }),
            }),
            context_extensions: strings(extensions),
            ..AttributeContext::default()
        }),
    }
}

async fn check(mesh: &Mesh, request: impl tonic::IntoRequest<CheckRequest>) -> CheckResponse {
    let answer = AuthorizationClient::new(channel(mesh).await)
        .check(request)
        .await;
    answer.unwrap().into_inner()
}

/// HTTP status and body of a denial; `None`: the request goes on.
fn denial(answer: CheckResponse) -> Option<(i32, String)> {
    match answer.http_response.unwrap() {
        HttpResponse::DeniedResponse(denied) => {
            assert_ne!(answer.status.unwrap().code, 0);
            Some((denied.status.unwrap().code, denied.body))
        }
        HttpResponse::OkResponse(_) => {
            assert_eq!(answer.status.unwrap().code, 0);
            None
        }
        HttpResponse::ErrorResponse(_) => panic!("Mixer has no such answer"),
    }
}

/// A rule that denies what `condition` says.
fn deny(condition: &str) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: deny, namespace: istio-system }}
spec: {{ compiledAdapter: denier, params: {{ status: {{ code: 7, message: Not allowed }} }} }}
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: {{ name: nothing, namespace: istio-system }}
spec: {{ compiledTemplate: checknothing }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: deny, namespace: istio-system }}
spec:
  match: {condition}
  actions: [ {{ handler: deny, instances: [ nothing ] }} ]
"#
    )
}

const DENIED: &str = "PERMISSION_DENIED:deny.handler.istio-system:Not allowed";

#[tokio::test]
async fn every_attribute_of_a_check_is_where_rules_look_for_it() {
    let mut mesh = Mesh::start(&[]).await;
    for condition in [
        r#"request.headers["x-user"] == "john""#,
        r#"request.headers[":path"] == "/details/0?a=b" && request.path == "/details/0?a=b""#,
        r#"request.url_path == "/details/0" && request.query_params["a"] == "b""#,
        r#"request.method == "GET" && request.scheme == "http" && request.host == "details:9080""#,
        r#"request.useragent == "curl" && request.id == "id-1""#,
        r#"request.time == timestamp("2023-11-14T22:13:20.000000005Z")"#,
        r#"source.ip == ip("10.0.0.7") && origin.ip == ip("10.0.0.7")"#,
        r#"destination.ip == ip("10.0.0.8") && destination.port == 9080"#,
        r#"source.principal == "cluster.local/ns/default/sa/bookinfo-productpage" && source.user == source.principal"#,
        r#"destination.principal == "cluster.local/ns/default/sa/bookinfo-details" && connection.mtls"#,
        r#"context.protocol == "http" && context.reporter.kind == "inbound""#,
        r#"destination.service.host == "details.default.svc.cluster.local""#,
        r#"destination.uid == "kubernetes://details-v1-0.default" && context.reporter.uid == destination.uid"#,
    ] {
        let rule = deny(condition);
        mesh.apply("deny.yaml", Some(&rule)).await;
        assert_eq!(mesh.refused(), [""; 0]);
        let headers = [
            ("x-user", "john"),
            ("user-agent", "curl"),
            ("x-request-id", "id-1"),
        ];
        let extensions = [(
            "destination.service.host",
            "details.default.svc.cluster.local",
        )];
        let mut request = Request::new(seen(&headers, &extensions));
        for name in ["destination.uid", "context.reporter.uid"] {
            let key = format!("mixer-attribute-{name}");
            let key: tonic::metadata::AsciiMetadataKey = key.parse().unwrap();
            request
                .metadata_mut()
                .insert(key, "kubernetes://details-v1-0.default".parse().unwrap());
        }
        let told = denial(check(&mesh, request).await);
        assert_eq!(told, Some((403, DENIED.to_owned())), "{condition}");
    }
}

#[tokio::test]
async fn what_configuration_says_does_not_pass_for_what_was_seen() {
    let condition =
        r#"(source.principal | "") == "admin" || (request.headers["x"] | "") == "admin""#;
    let mesh = Mesh::start(&[("deny.yaml", &deny(condition))]).await;
    let claims = [("source.principal", "admin"), ("source.user", "admin")];
    assert_eq!(denial(check(&mesh, seen(&[], &claims)).await), None);
    assert!(denial(check(&mesh, seen(&[("x", "admin")], &claims)).await).is_some());
}

#[tokio::test]
async fn header_operations_go_with_the_request_and_its_response() {
    let rules = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: keyval, namespace: istio-system }
spec: { compiledAdapter: keyval, params: { table: { jason: admin } } }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: keyval, namespace: istio-system }
spec: { compiledTemplate: keyval, params: { key: 'request.headers["user"] | ""' } }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: keyval, namespace: istio-system }
spec:
  actions: [ { handler: keyval, instances: [ keyval ], name: x } ]
  requestHeaderOperations:
  - { name: user-group, values: [ x.output.value ] }
  - { name: user, values: [ '"too"' ], operation: APPEND }
  - { name: secret, operation: REMOVE }
  responseHeaderOperations:
  - { name: group, values: [ x.output.value ] }
"#;
    let mesh = Mesh::start(&[("rules.yaml", rules)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let answer = check(&mesh, seen(&[("user", "jason"), ("secret", "1")], &[])).await;
    let Some(HttpResponse::OkResponse(ok)) = answer.http_response else {
        panic!("denied");
    };
    let told: Vec<_> = ok
        .headers
        .iter()
        .map(|option| {
            let header = option.header.clone().unwrap();
            (header.key, header.value, option.append_action())
        })
        .collect();
    assert_eq!(
        told,
        [
            (
                "user".into(),
                "too".into(),
                HeaderAppendAction::AppendIfExistsOrAdd
            ),
            (
                "user-group".into(),
                "admin".into(),
                HeaderAppendAction::OverwriteIfExistsOrAdd
            ),
        ]
    );
    assert_eq!(ok.headers_to_remove, ["secret"]);
    assert_eq!(
        ok.response_headers_to_add[0].header.clone().unwrap().value,
        "admin"
    );

    let unknown = denial(check(&mesh, seen(&[("user", "nobody")], &[])).await).unwrap();
    assert_eq!(unknown.0, 404);
    assert!(
        unknown
            .1
            .starts_with("NOT_FOUND:keyval.handler.istio-system:"),
        "{unknown:?}"
    );
}

const QUOTA: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: quota, namespace: istio-system }
spec:
  compiledAdapter: memquota
  params: { quotas: [ { name: requestcount.instance.istio-system, maxAmount: 2, validDuration: 600s } ] }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: requestcount, namespace: istio-system }
spec:
  compiledTemplate: quota
  params:
    dimensions: { client: 'request.headers["x-client"] | "unknown"', app: 'destination.service.name | "unknown"' }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: quota, namespace: istio-system, annotations: { policy.istio.io/rate-limit-headers: "true" } }
spec: { actions: [ { handler: quota, instances: [ requestcount ] } ] }
"#;

#[tokio::test]
async fn a_check_takes_the_quotas_of_its_destination() {
    let mesh = Mesh::start(&[("quota.yaml", QUOTA)]).await;
    let charges =
        r#"[{"quota":"requestcount","charge":1,"match":[{"request.path":{"prefix":"/details"}}]}]"#;
    for client in ["a", "b"] {
        let mut told = Vec::new();
        for _ in 0..3 {
            let answer = check(
                &mesh,
                seen(&[("x-client", client)], &[("mixer-quotas", charges)]),
            )
            .await;
            told.push(denial(answer).map(|(status, _)| status));
        }
        assert_eq!(told, [None, None, Some(429)], "{client}");
    }
    // What is not matched is not charged; what is not understood refuses.
    let other = charges.replace("/details", "/other");
    for _ in 0..3 {
        let answer = check(
            &mesh,
            seen(&[("x-client", "a")], &[("mixer-quotas", &other)]),
        )
        .await;
        assert_eq!(denial(answer), None);
    }
    let answer = denial(check(&mesh, seen(&[], &[("mixer-quotas", "many")])).await).unwrap();
    assert_eq!(answer.0, 503);
}

fn descriptor(entries: &[(&str, &str)]) -> RateLimitDescriptor {
    let entries = entries.iter().map(|(key, value)| Entry {
        key: (*key).to_owned(),
        value: (*value).to_owned(),
    });
    RateLimitDescriptor {
        entries: entries.collect(),
        ..RateLimitDescriptor::default()
    }
}

#[tokio::test]
async fn descriptors_name_quotas_and_attributes() {
    let mesh = Mesh::start(&[("quota.yaml", QUOTA)]).await;
    let mut client = RateLimitServiceClient::new(channel(&mesh).await);
    for (key, service) in [("quota", "details"), ("generic_key", "ratings")] {
        let request = RateLimitRequest {
            domain: "mesh".into(),
            descriptors: vec![descriptor(&[
                (key, "requestcount"),
                ("request.headers[X-Client]", "a"),
                ("destination.service.name", service),
            ])],
            hits_addend: 0,
        };
        let mut told = Vec::new();
        for _ in 0..3 {
            let answer = client
                .should_rate_limit(request.clone())
                .await
                .unwrap()
                .into_inner();
            told.push((answer.overall_code(), answer.statuses[0].limit_remaining));
            let names: Vec<_> = answer
                .response_headers_to_add
                .iter()
                .map(|header| header.key.as_str())
                .collect();
            assert_eq!(
                names[..3],
                ["ratelimit-limit", "ratelimit-remaining", "ratelimit-reset"]
            );
            if answer.overall_code() == Code::OverLimit {
                assert_eq!(
                    String::from_utf8(answer.raw_body).unwrap(),
                    "RESOURCE_EXHAUSTED:Quota is exhausted for: requestcount"
                );
            }
        }
        assert_eq!(
            told,
            [(Code::Ok, 1), (Code::Ok, 0), (Code::OverLimit, 0)],
            "{service}"
        );
    }
    // Two at once.
    let mut request = RateLimitRequest {
        descriptors: vec![descriptor(&[
            ("quota", "requestcount"),
            ("request.headers[x-client]", "c"),
        ])],
        hits_addend: 2,
        ..RateLimitRequest::default()
    };
    for want in [Code::Ok, Code::OverLimit] {
        let answer = client.should_rate_limit(request.clone()).await.unwrap();
        assert_eq!(answer.into_inner().overall_code(), want);
    }
    // A name that nobody has configured is a mistake, not a permission.
    request.descriptors = vec![descriptor(&[("quota", "typo")])];
    let answer = client.should_rate_limit(request.clone()).await.unwrap();
    assert_eq!(answer.into_inner().overall_code(), Code::OverLimit);
    request.descriptors = vec![descriptor(&[("remote_address", "10.0.0.1")])];
    let refused = client.should_rate_limit(request).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
}

const LOG: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: logentry
metadata: { name: line, namespace: istio-system }
spec:
  severity: '"info"'
  variables:
    kind: context.reporter.kind | "?"
    reporter: context.reporter.uid | "?"
    method: request.method | "?"
    path: request.path | "?"
    user: request.headers["x-user"] | "?"
    code: response.code | 0
    size: response.size | 0
    took: response.duration | "0ms"
    service: destination.service.name | "?"
    flags: context.proxy_error_code | "?"
    protocol: context.protocol | "?"
    event: connection.event | "?"
    received: connection.received.bytes | 0
  monitored_resource_type: '"global"'
---
apiVersion: config.istio.io/v1alpha2
kind: stdio
metadata: { name: out, namespace: istio-system }
spec: { outputAsJson: true }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: log, namespace: istio-system }
spec: { actions: [ { handler: out.stdio, instances: [ line.logentry ] } ] }
"#;

fn common(kind: AccessLogType) -> Option<AccessLogCommon> {
    Some(AccessLogCommon {
        downstream_remote_address: socket("10.0.0.7", 4711),
        start_time: Some(Timestamp {
            seconds: 1_700_000_000,
            nanos: 0,
        }),
        duration: Some(lateen_protocols::envoy::google::protobuf::Duration {
            seconds: 0,
            nanos: 15_000_000,
        }),
        stream_id: "one".into(),
        upstream_cluster: "outbound|9080||details.default.svc.cluster.local".into(),
        custom_tags: strings(&[
            ("source.uid", "kubernetes://a-1.shop"),
            ("request.path", "/lie"),
        ]),
        access_log_type: kind.into(),
        ..AccessLogCommon::default()
    })
}

#[tokio::test]
async fn access_logs_are_reports() {
    let mesh = Mesh::start(&[("log.yaml", LOG)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let http = |kind: AccessLogType| HttpAccessLogEntry {
        common_properties: common(kind),
        request: Some(HttpRequestProperties {
            request_method: RequestMethod::Get.into(),
            path: "/details/0".into(),
            request_headers: strings(&[
                ("x-user", "john"),
                ("content-type", "application/grpc+proto"),
            ]),
            ..HttpRequestProperties::default()
        }),
        response: Some(HttpResponseProperties {
            response_code: Some(UInt32Value { value: 200 }),
            response_body_bytes: 178,
            ..HttpResponseProperties::default()
        }),
        ..HttpAccessLogEntry::default()
    };
    let tcp = |kind: AccessLogType, received: u64| TcpAccessLogEntry {
        common_properties: common(kind),
        connection_properties: Some(ConnectionProperties {
            received_bytes: received,
            sent_bytes: 0,
        }),
    };
    let first = StreamAccessLogsMessage {
        identifier: Some(Identifier {
            node: Some(Node {
                id: "sidecar~10.0.0.9~a-1.shop~shop.svc.cluster.local".into(),
                ..Node::default()
            }),
            log_name: "mixer".into(),
        }),
        log_entries: Some(LogEntries::HttpLogs(HttpAccessLogEntries {
            log_entry: vec![
                http(AccessLogType::DownstreamStart),
                http(AccessLogType::DownstreamEnd),
            ],
        })),
    };
    let second = StreamAccessLogsMessage {
        identifier: None,
        log_entries: Some(LogEntries::TcpLogs(TcpAccessLogEntries {
            log_entry: vec![
                tcp(AccessLogType::TcpPeriodic, 5),
                tcp(AccessLogType::TcpConnectionEnd, 7),
            ],
        })),
    };
    AccessLogServiceClient::new(channel(&mesh).await)
        .stream_access_logs(tokio_stream::iter([first, second]))
        .await
        .unwrap();
    let lines = mesh.stdout.0.lock().unwrap();
    let lines: Vec<serde_json::Value> = lines
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let [request, open, going, close] = &lines[..] else {
        panic!("{lines:#?}");
    };
    for (field, want) in [
        ("kind", "outbound"),
        ("reporter", "kubernetes://a-1.shop"),
        ("method", "GET"),
        ("path", "/details/0"),
        ("user", "john"),
        ("service", "details"),
        ("flags", "-"),
        ("protocol", "grpc"),
        ("took", "15ms"),
    ] {
        assert_eq!(request[field], want, "{field}");
    }
    assert_eq!(
        (&request["code"], &request["size"]),
        (&200.into(), &178.into())
    );
    for (line, event, received) in [
        (open, "open", 0),
        (going, "continue", 5),
        (close, "close", 2),
    ] {
        assert_eq!(line["event"], event);
        assert_eq!(line["received"], received, "{event}");
        assert_eq!(line["protocol"], "tcp");
    }
}
