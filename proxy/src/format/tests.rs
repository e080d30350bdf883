use std::{
    rc::Rc,
    time::{Duration, SystemTime},
};

use lateen_protocols::envoy::google::protobuf as pb;
use pb::value::Kind;
use proptest::prelude::*;
use tokio::time::Instant;

use super::*;
use crate::{
    head::{Name, Protocol},
    info::{ConnectionInfo, ResponseFlags},
};

pub(crate) fn connection() -> Rc<ConnectionInfo> {
    Rc::new(ConnectionInfo {
        id: 7,
        remote: "10.0.0.1:4000".parse().unwrap(),
        direct_remote: "10.0.0.1:4000".parse().unwrap(),
        local: "127.0.0.1:80".parse().unwrap(),
        local_restored: false,
        tls: None,
        requested_server_name: None,
        filter_chain: Some("inbound".into()),
        original_src: None,
        started: Instant::now(),
    })
}

pub(crate) fn request() -> RequestHead {
    let mut headers = Headers::default();
    headers.append(Known::UserAgent, "curl/8");
    headers.append(Known::XRequestId, "an-id");
    headers.append(Name::new("x-quote"), "he said \"hi\" \\ back");
    RequestHead {
        method: "GET".into(),
        scheme: "http".into(),
        authority: "reviews:9080".into(),
        path: "/p?q=1".into(),
        protocol: Protocol::Http11,
        headers,
    }
}

fn info() -> StreamInfo {
    let mut info = StreamInfo::new(connection(), Some(Protocol::Http11));
    info.start_time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
    info.response_code = 503;
    info.flags = ResponseFlags::UPSTREAM_CONNECTION_FAILURE;
    info.flags.set(ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED);
    info.response_code_details =
        "upstream_reset_before_response_started{connection_failure}".into();
    info.bytes_sent = 91;
    info.response_end = Some(Duration::from_millis(12));
    info.upstream_cluster = Some("outbound|9080||reviews".into());
    info.upstream_host = Some("10.0.0.9:9080".parse().unwrap());
    info.upstream_transport_failure = Some("delayed connect error".to_owned());
    info
}

fn render(format: &str) -> String {
    let (info, request) = (info(), request());
    let facts = Facts {
        request: Some(&request),
        ..Facts::of_connection(&info)
    };
    let mut out = Vec::new();
    Format::text(format, false).unwrap().write(&facts, &mut out);
    String::from_utf8(out).unwrap()
}

#[test]
fn istios_default_format() {
    let format = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
        %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \
        \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
        %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \
        \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER% \
        %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% \
        %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n";
    assert_eq!(
        render(format),
        "[2023-11-14T22:13:20.123Z] \"GET /p?q=1 HTTP/1.1\" 503 UF,URX \
         upstream_reset_before_response_started{connection_failure} - \"delayed_connect_error\" 0 91 12 \
         - \"-\" \"curl/8\" \"an-id\" \"reviews:9080\" \"10.0.0.9:9080\" outbound|9080||reviews \
         - 127.0.0.1:80 10.0.0.1:4000 - -\n"
    );
}

#[test]
fn commands() {
    for (format, want) in [
        ("100%%", "100%"),
        ("%REQ(:PATH):3%", "/p?"),
        ("%START_TIME(%Y/%m/%d %s)%", "2023/11/14 1700000000"),
        ("%START_TIME(%3f)%", "123"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "10.0.0.1"),
        ("%GRPC_STATUS%", "-"),
        (
            "%RESPONSE_FLAGS_LONG%",
            "UpstreamConnectionFailure,UpstreamRetryLimitExceeded",
        ),
        ("%DYNAMIC_METADATA(a:b)%", "-"),
        ("%FILTER_CHAIN_NAME%", "inbound"),
        ("%DOWNSTREAM_PEER_ISSUER% %DOWNSTREAM_PEER_SERIAL%", "- -"),
    ] {
        assert_eq!(render(format), want, "{format}");
    }
    for broken in [
        "%",
        "%REQ",
        "%REQ(a%",
        "%NOPE%",
        "%REQ()%",
        "%START_TIME(%Q)%",
        "%START_TIME(%#z)%",
        "%REQ(a):x%",
    ] {
        assert!(Format::text(broken, false).is_err(), "{broken}");
    }
}

#[test]
fn a_peers_certificate_says_who_made_it() {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["a.example".into()]).unwrap();
    params.serial_number = Some(0x1234_u64.into());
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, "root");
    let der = params.self_signed(&key).unwrap().der().to_vec();
    let connection = ConnectionInfo {
        tls: Some(Box::new(crate::info::TlsInfo {
            peer_certificate_der: Some(der.into()),
            ..Default::default()
        })),
        ..Rc::into_inner(connection()).unwrap()
    };
    let info = StreamInfo::new(Rc::new(connection), None);
    let mut out = Vec::new();
    Format::text("%DOWNSTREAM_PEER_ISSUER% %DOWNSTREAM_PEER_SERIAL%", false)
        .unwrap()
        .write(&Facts::of_connection(&info), &mut out);
    assert_eq!(String::from_utf8(out).unwrap(), "CN=root 1234");
}

#[test]
fn json_keeps_types_and_sorts_keys() {
    let text = |text: &str| pb::Value {
        kind: Some(Kind::StringValue(text.to_owned())),
    };
    let format = pb::Struct {
        fields: [
            ("code", text("%RESPONSE_CODE%")),
            ("absent", text("%REQ(X-NONE)%")),
            ("mixed", text("m=%REQ(:METHOD)% n=%REQ(X-NONE)%")),
            ("quote", text("%REQ(X-QUOTE)%")),
            (
                "flag",
                pb::Value {
                    kind: Some(Kind::BoolValue(true)),
                },
            ),
            (
                "num",
                pb::Value {
                    kind: Some(Kind::NumberValue(5.0)),
                },
            ),
        ]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect(),
    };
    let (info, request) = (info(), request());
    let facts = Facts {
        request: Some(&request),
        ..Facts::of_connection(&info)
    };
    let mut out = Vec::new();
    JsonFormat::compile(&format, false)
        .unwrap()
        .write(&facts, &mut out);
    assert_eq!(
        String::from_utf8(out).unwrap(),
        r#"{"absent":null,"code":503,"flag":true,"mixed":"m=GET n=-","num":5,"quote":"he said \"hi\" \\ back"}"#
    );
    let mut out = Vec::new();
    JsonFormat::compile(&format, true)
        .unwrap()
        .write(&facts, &mut out);
    assert_eq!(
        String::from_utf8(out).unwrap(),
        r#"{"code":503,"flag":true,"mixed":"m=GET n=","num":5,"quote":"he said \"hi\" \\ back"}"#
    );
}

#[test]
fn a_grpc_status_that_did_not_come_is_derived() {
    let format = Format::text("%GRPC_STATUS%", false).unwrap();
    let (mut info, mut request) = (info(), request());
    let write = |info: &StreamInfo, request: &RequestHead| {
        let facts = Facts {
            request: Some(request),
            ..Facts::of_connection(info)
        };
        let mut out = Vec::new();
        format.write(&facts, &mut out);
        String::from_utf8(out).unwrap()
    };
    assert_eq!(write(&info, &request), "-", "no gRPC");
    request
        .headers
        .append(Known::ContentType, "application/grpc");
    assert_eq!(write(&info, &request), "Unavailable");
    info.response_code = 200;
    assert_eq!(write(&info, &request), "Unknown");
    info.grpc_status = Some(5);
    assert_eq!(write(&info, &request), "NotFound");
    (info.response_code, info.grpc_status) = (0, None);
    assert_eq!(write(&info, &request), "-", "no answer");
}

proptest! {
    #[test]
    fn any_format_is_refused_or_written(format in "(%|[A-Z_]{1,12}|\\(|\\)|:|[0-9]{1,20}|\\PC|START_TIME\\(%.\\)%)*") {
        if let Ok(format) = Format::text(&format, false) {
            let info = info();
            format.write(&Facts::of_connection(&info), &mut Vec::new());
        }
    }
}
