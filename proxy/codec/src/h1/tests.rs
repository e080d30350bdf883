use bytes::{Bytes, BytesMut};

mod against_hyper;
mod properties;

use super::*;
use crate::head::{Headers, Known, Name, Protocol, RequestHead, ResponseHead};

fn request(text: impl AsRef<[u8]>) -> Result<(RequestHead, RequestMeta), ParseError> {
    request_with(text, &Limits::default())
}

fn request_with(
    text: impl AsRef<[u8]>,
    limits: &Limits,
) -> Result<(RequestHead, RequestMeta), ParseError> {
    match parse_request(text.as_ref(), limits, &mut Scan::default())? {
        Parsed::Complete { head, .. } => Ok(head),
        Parsed::Partial => panic!("partial: {}", String::from_utf8_lossy(text.as_ref())),
    }
}

fn response(text: &str, method: &str) -> Result<(ResponseHead, ResponseMeta), ParseError> {
    let limits = Limits::default();
    match parse_response(
        text.as_bytes(),
        &limits,
        method.as_bytes(),
        &mut Scan::default(),
    )? {
        Parsed::Complete { head, .. } => Ok(head),
        Parsed::Partial => panic!("partial: {text}"),
    }
}

fn list(headers: &Headers) -> Vec<(String, String)> {
    headers
        .iter()
        .map(|(name, value)| {
            (
                String::from_utf8_lossy(name.as_bytes()).into_owned(),
                value.iter().map(|b| char::from(*b)).collect(),
            )
        })
        .collect()
}

#[test]
fn a_request_is_read_whole() {
    let text = "POST /a?b HTTP/1.1\r\nHost: x.y:8\r\nContent-Length: 3\r\nX-A:  b c \r\n\r\nabc";
    let parsed = parse_request(text.as_bytes(), &Limits::default(), &mut Scan::default()).unwrap();
    let mut headers = Headers::default();
    headers.append(Known::ContentLength, "3");
    headers.append(Name::new("x-a"), "b c");
    assert_eq!(
        parsed,
        Parsed::Complete {
            head: (
                RequestHead {
                    method: "POST".into(),
                    scheme: "http".into(),
                    authority: "x.y:8".into(),
                    path: "/a?b".into(),
                    protocol: Protocol::Http11,
                    headers,
                },
                RequestMeta {
                    framing: Framing::Length(3),
                    keep_alive: true,
                    upgrade: Upgrade::None,
                    expect_continue: false,
                    host_given: true,
                }
            ),
            used: text.len() - 3,
        }
    );
}

#[test]
fn a_response_is_written_whole() {
    let (head, meta) = response(
        "HTTP/1.1 200 OK\r\nx-a: b\r\ncontent-length: 2\r\n\r\n",
        "GET",
    )
    .unwrap();
    let mut out = BytesMut::new();
    write_response(&mut out, &head, meta.framing, Reply::default()).unwrap();
    assert_eq!(
        out,
        "HTTP/1.1 200 OK\r\nx-a: b\r\ncontent-length: 2\r\n\r\n"
    );
}

const HEAD: &str = "GET / HTTP/1.1\r\nHost: a\r\n";

/// The headers of a request that has `lines` beside `Host`.
fn headers_of(lines: &str) -> Result<Vec<(String, String)>, ParseError> {
    request(format!("{HEAD}{lines}\r\n")).map(|(head, _)| list(&head.headers))
}

fn pairs(all: &[(&str, &str)]) -> Vec<(String, String)> {
    all.iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

#[test]
fn targets() {
    for (line, want) in [
        ("GET /x?y HTTP/1.1", Ok(("http", "a", "/x?y"))),
        ("GET http://b/x?y HTTP/1.1", Ok(("http", "b", "/x?y"))),
        ("GET HTTP://B HTTP/1.1", Ok(("http", "B", "/"))),
        ("GET http://b?q HTTP/1.1", Ok(("http", "b", "?q"))),
        ("GET http://b:80/x HTTP/1.1", Ok(("http", "b:80", "/x"))),
        ("GET http://u@b:80/x HTTP/1.1", Ok(("http", "b:80", "/x"))),
        ("GET https://b/x HTTP/1.1", Ok(("https", "b", "/x"))),
        (
            "GET http://[::1]:80/x HTTP/1.1",
            Ok(("http", "[::1]:80", "/x")),
        ),
        ("GET http://[::1]/x HTTP/1.1", Ok(("http", "[::1]", "/x"))),
        ("GET http://b/x#f HTTP/1.1", Ok(("http", "b", "/x#f"))),
        ("OPTIONS * HTTP/1.1", Ok(("http", "a", "*"))),
        (
            "GET /\"<>|^`{}\\ HTTP/1.1",
            Ok(("http", "a", "/\"<>|^`{}\\")),
        ),
        ("CONNECT b:1 HTTP/1.1", Ok(("http", "b:1", ""))),
        ("CONNECT [::1]:1 HTTP/1.1", Ok(("http", "[::1]:1", ""))),
        ("GET * HTTP/1.1", Err(ParseError::Codec)),
        ("GET x HTTP/1.1", Err(ParseError::Codec)),
        ("GET http:/x HTTP/1.1", Err(ParseError::Codec)),
        ("GET http://a\"b/ HTTP/1.1", Err(ParseError::Codec)),
        ("GET http://a:/ HTTP/1.1", Err(ParseError::InvalidUrl)),
        ("GET http://a:99999/ HTTP/1.1", Err(ParseError::InvalidUrl)),
        ("GET http:///x HTTP/1.1", Err(ParseError::InvalidUrl)),
        ("GET ftp://b/x HTTP/1.1", Err(ParseError::InvalidScheme)),
        ("CONNECT a HTTP/1.1", Err(ParseError::InvalidUrl)),
        ("CONNECT / HTTP/1.1", Err(ParseError::InvalidUrl)),
        ("CONNECT http://a:1 HTTP/1.1", Err(ParseError::InvalidUrl)),
        ("CONNECT a:1/x HTTP/1.1", Err(ParseError::InvalidUrl)),
        ("GET /\u{e4} HTTP/1.1", Err(ParseError::Codec)),
        ("GET /\u{1} HTTP/1.1", Err(ParseError::Codec)),
        ("GET /a b HTTP/1.1", Err(ParseError::Codec)),
    ] {
        let found = request(format!("{line}\r\nHost: a\r\n\r\n"));
        let found = found.map(|(head, _)| {
            [head.scheme, head.authority, head.path]
                .map(|part| String::from_utf8_lossy(&part).into_owned())
        });
        let want =
            want.map(|(scheme, authority, path)| [scheme, authority, path].map(str::to_owned));
        assert_eq!(found, want, "{line}");
    }
    let relative = Limits {
        allow_absolute_url: false,
        ..Limits::default()
    };
    let (head, _) = request_with("GET http://b/x HTTP/1.1\r\nHost: a\r\n\r\n", &relative).unwrap();
    assert_eq!(
        (&*head.authority, &*head.path),
        (&b"a"[..], &b"http://b/x"[..])
    );
}

#[test]
fn hosts() {
    for (lines, want) in [
        ("", Ok((false, ""))),
        ("Host:\r\n", Ok((true, ""))),
        ("host: u@b\r\n", Ok((true, "u@b"))),
        // As Envoy joins them; no virtual host has that name.
        ("Host: a\r\nHost: b\r\n", Ok((true, "a,b"))),
        ("Host: a b\r\n", Err(ParseError::InvalidAuthority)),
        ("Host: a/b\r\n", Err(ParseError::InvalidAuthority)),
        ("Host: a\r\nConnection: host\r\n", Ok((false, ""))),
    ] {
        let found = request(format!("GET / HTTP/1.1\r\n{lines}\r\n"))
            .map(|(head, meta)| (meta.host_given, head.authority));
        let want = want.map(|(given, authority)| (given, Bytes::from(authority)));
        assert_eq!(found, want, "{lines:?}");
    }
}

#[test]
fn methods_are_the_registered_ones_unless_others_are_allowed() {
    let any = Limits {
        allow_custom_methods: true,
        ..Limits::default()
    };
    for (method, known, allowed) in [
        ("GET", true, true),
        ("PURGE", true, true),
        ("UNSUBSCRIBE", true, true),
        ("get", false, true),
        ("FOO", false, true),
        ("M-SEARCH", false, true),
        ("QUERY", false, true),
        ("PRI", false, true),
        ("GE(T", false, false),
        ("", false, false),
    ] {
        let text = format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n");
        assert_eq!(request(&text).is_ok(), known, "{method}");
        assert_eq!(request_with(&text, &any).is_ok(), allowed, "{method}");
    }
}

#[test]
fn versions() {
    for (line, want) in [
        ("GET / HTTP/1.1", Some(Protocol::Http11)),
        ("GET / HTTP/1.0", Some(Protocol::Http10)),
        ("GET / HTTP/1.2", Some(Protocol::Http10)),
        ("GET / HTTP/0.9", Some(Protocol::Http10)),
        ("GET / HTTP/2.0", Some(Protocol::Http10)),
        ("GET /", Some(Protocol::Http10)),
        ("GET / http/1.1", None),
        ("GET / HTTP/1.10", None),
        ("GET / HTTPS/1.1", None),
        ("GET", None),
    ] {
        let found = request(format!("{line}\r\nHost: a\r\n\r\n"));
        assert_eq!(found.map(|(head, _)| head.protocol).ok(), want, "{line}");
    }
}

/// What Envoy's parser takes beyond RFC 9112 means what it means there, and nothing of it stays.
#[test]
fn unusual_forms_are_read_as_envoy_reads_them() {
    let plain = request("GET / HTTP/1.1\r\nHost: a\r\nx-a: b c\r\n\r\n").unwrap();
    for text in [
        "\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nx-a: b c\r\n\r\n",
        "\n\r\rGET / HTTP/1.1\r\nHost: a\r\nx-a: b c\r\n\r\n",
        "GET / HTTP/1.1\nHost: a\nx-a: b c\n\n",
        "GET  /  HTTP/1.1 \r\nHost: a\r\nx-a: b c\r\n\r\n",
        "GET\t/ HTTP/1.1\r\nHost: a\r\nx-a: \t b c \t \r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nx-a: b\r\n c\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nx-a: b\r c\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nx-a: b c\r\r\n\r\n",
    ] {
        assert_eq!(request(text), Ok(plain.clone()), "{text:?}");
    }
    let (head, _) = response(
        "HTTP/1.1  200  OK\nx-a: one\r\n  two\r\ncontent-length: 2\r\n\r\n",
        "GET",
    )
    .unwrap();
    assert_eq!(
        list(&head.headers),
        pairs(&[("x-a", "one  two"), ("content-length", "2")])
    );
}

#[test]
fn malformed_heads_are_refused() {
    for lines in [
        "x-a: b\r\n c: d\r\r\n\r\r\nx: y\r\n",
        "x a: b\r\n",
        "x-a : b\r\n",
        "x-a\t: b\r\n",
        "x\r-a: b\r\n",
        ": b\r\n",
        "x-a\r\n",
        "x\u{e4}: a\r\n",
        "x(: a\r\n",
        "x\": a\r\n",
        "content-length: 1\r0\r\n",
        "transfer-encoding: chun\rked\r\n",
    ] {
        assert_eq!(headers_of(lines), Err(ParseError::Codec), "{lines:?}");
    }
    for lines in [
        "x-a: b\0c\r\n",
        "x-a: b\u{1}c\r\n",
        "x-a: b\u{7f}c\r\n",
        "x-a: b\r\n c\0\r\n",
    ] {
        let found = headers_of(lines);
        assert_eq!(found, Err(ParseError::InvalidCharacters), "{lines:?}");
    }
    for text in [
        " GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\n x: y\r\nHost: a\r\n\r\n",
        "GET /\ra HTTP/1.1\r\nHost: a\r\n\r\n",
        "\u{16}\u{3}\u{1}",
        "{",
    ] {
        let found = parse_request(text.as_bytes(), &Limits::default(), &mut Scan::default());
        assert_eq!(found, Err(ParseError::Codec), "{text:?}");
    }
    assert_eq!(
        headers_of("x!#$%&'*+-.^_`|~: \u{e4}\r\n"),
        Ok(pairs(&[("x!#$%&'*+-.^_`|~", "\u{c3}\u{a4}")]))
    );
}

#[test]
fn framing_of_requests() {
    let chunked = "Transfer-Encoding: chunked\r\n";
    for (lines, want) in [
        ("", Ok(Framing::None)),
        ("Content-Length: 0\r\n", Ok(Framing::None)),
        ("Content-Length: 0003\r\n", Ok(Framing::Length(3))),
        (
            "Content-Length: 18446744073709551615\r\n",
            Ok(Framing::Length(u64::MAX)),
        ),
        (
            "Content-Length: 18446744073709551616\r\n",
            Err(ParseError::Codec),
        ),
        (
            "Content-Length: 3\r\nContent-Length: 4\r\n",
            Err(ParseError::Codec),
        ),
        (
            "Content-Length: 3\r\nContent-Length: 3\r\n",
            Err(ParseError::Codec),
        ),
        ("Content-Length: 3, 3\r\n", Err(ParseError::Codec)),
        ("Content-Length: -1\r\n", Err(ParseError::Codec)),
        ("Content-Length: +3\r\n", Err(ParseError::Codec)),
        ("Content-Length: 0x3\r\n", Err(ParseError::Codec)),
        ("Content-Length: 1 2\r\n", Err(ParseError::Codec)),
        ("Content-Length:\r\n", Err(ParseError::Codec)),
        (chunked, Ok(Framing::Chunked)),
        ("Transfer-Encoding:\tChUnKeD\r\n", Ok(Framing::Chunked)),
        (
            "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
            Err(ParseError::ChunkedContentLength),
        ),
        (
            "Content-Length: 3\r\nTransfer-Encoding: gzip\r\n",
            Err(ParseError::ChunkedContentLength),
        ),
        (
            "Transfer-Encoding: identity\r\n",
            Err(ParseError::InvalidTransferEncoding),
        ),
        (
            "Transfer-Encoding: gzip, chunked\r\n",
            Err(ParseError::InvalidTransferEncoding),
        ),
        (
            "Transfer-Encoding: chunked\r\n , gzip\r\n",
            Err(ParseError::InvalidTransferEncoding),
        ),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            Err(ParseError::InvalidTransferEncoding),
        ),
        (
            "Transfer-Encoding:\r\n",
            Err(ParseError::InvalidTransferEncoding),
        ),
    ] {
        let found = request(format!("{HEAD}{lines}\r\n")).map(|(_, meta)| meta.framing);
        assert_eq!(found, want, "{lines:?}");
    }
    let lax = Limits {
        allow_chunked_length: true,
        ..Limits::default()
    };
    let (head, meta) =
        request_with(format!("{HEAD}Content-Length: 3\r\n{chunked}\r\n"), &lax).unwrap();
    assert_eq!(meta.framing, Framing::Chunked);
    assert!(head.headers.is_empty());
}

#[test]
fn headers_of_the_hop_are_taken_out() {
    let eleven = format!("Connection: {}\r\n", ["x"; 10].join(","));
    let long = format!("te: {}\r\nConnection: te\r\n", "x".repeat(256));
    for (lines, want) in [
        (
            "Connection: keep-alive\r\nKeep-Alive: timeout=5\r\nProxy-Connection: x\r\nx: y\r\n",
            Ok(pairs(&[("x", "y")])),
        ),
        (
            "Connection: X-A, close\r\nx-a: 1\r\nx-b: 2\r\n",
            Ok(pairs(&[("x-b", "2")])),
        ),
        (
            "Connection: x-a\r\nConnection: x-b,,\r\nx-a: 1\r\nx-b: 2\r\n",
            Ok(vec![]),
        ),
        (
            "Connection: te\r\nte: gzip, Trailers\r\n",
            Ok(pairs(&[("te", "trailers")])),
        ),
        ("te: gzip\r\n", Ok(vec![])),
        ("te: trailers;q=0.5\r\n", Ok(vec![])),
        (
            "Connection: x-forwarded-for\r\n",
            Err(ParseError::ConnectionHeader),
        ),
        (
            "Connection: X-Forwarded-Host\r\n",
            Err(ParseError::ConnectionHeader),
        ),
        (
            "Connection: x-forwarded-proto\r\n",
            Err(ParseError::ConnectionHeader),
        ),
        ("Connection: :path\r\n", Err(ParseError::ConnectionHeader)),
        (&eleven, Err(ParseError::ConnectionHeader)),
        (&long, Err(ParseError::ConnectionHeader)),
        (
            "Connection: http2-settings\r\nhttp2-settings: x\r\ntrailer: t\r\n",
            Ok(pairs(&[("http2-settings", "x"), ("trailer", "t")])),
        ),
        ("Connection: cookie\r\nCookie: a\r\n", Ok(vec![])),
        (
            "Connection: content-length\r\nContent-Length: 0\r\n",
            Ok(vec![]),
        ),
        ("Expect: 100-Continue\r\n", Ok(vec![])),
        ("Expect: foo\r\n", Ok(pairs(&[("expect", "foo")]))),
    ] {
        assert_eq!(headers_of(lines), want, "{lines:?}");
    }
    let (_, meta) = request(format!("{HEAD}Expect: 100-continue\r\n\r\n")).unwrap();
    assert!(meta.expect_continue);
}

#[test]
fn who_keeps_the_connection() {
    for (version, lines, want) in [
        ("1.1", "", true),
        ("1.1", "Connection: x, CLOSE\r\n", false),
        ("1.1", "Proxy-Connection: close\r\n", false),
        ("1.0", "", false),
        ("1.0", "Connection: Keep-Alive\r\n", true),
        ("1.0", "Connection: keep-alive, close\r\n", false),
    ] {
        let text = format!("GET / HTTP/{version}\r\nHost: a\r\n{lines}\r\n");
        assert_eq!(request(&text).unwrap().1.keep_alive, want, "{text:?}");
        let text = format!("HTTP/{version} 200 OK\r\ncontent-length: 2\r\n{lines}\r\n");
        assert_eq!(
            response(&text, "GET").unwrap().1.keep_alive,
            want,
            "{text:?}"
        );
    }
}

#[test]
fn upgrades() {
    for (lines, want) in [
        (
            "Connection: keep-alive, Upgrade, x-a\r\nUpgrade: WebSocket\r\nx-a: 1\r\nkeep-alive: x\r\n",
            (
                Upgrade::Protocol,
                pairs(&[
                    ("x-a", "1"),
                    ("connection", "keep-alive, Upgrade, x-a"),
                    ("upgrade", "WebSocket"),
                ]),
            ),
        ),
        (
            "Connection: upgrade\r\nUpgrade:\r\n",
            (
                Upgrade::Protocol,
                pairs(&[("connection", "upgrade"), ("upgrade", "")]),
            ),
        ),
        (
            "Connection: upgrade\r\nUpgrade: a\r\nUpgrade: b\r\n",
            (
                Upgrade::Protocol,
                pairs(&[("connection", "upgrade"), ("upgrade", "a,b")]),
            ),
        ),
        ("Upgrade: websocket\r\n", (Upgrade::None, vec![])),
        (
            "Connection: Upgrade, HTTP2-Settings, x-a\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\nx-a: 1\r\n",
            (Upgrade::None, vec![]),
        ),
    ] {
        let (head, meta) = request(format!("{HEAD}{lines}\r\n")).unwrap();
        let (upgrade, headers) = want;
        assert_eq!(
            (meta.upgrade, list(&head.headers)),
            (upgrade, headers),
            "{lines:?}"
        );
        let framing = match upgrade {
            Upgrade::None => Framing::None,
            _ => Framing::UntilClose,
        };
        assert_eq!(meta.framing, framing, "{lines:?}");
    }
}

#[test]
fn connect_has_no_body() {
    for (lines, want) in [
        ("", Ok((Upgrade::Connect, Framing::UntilClose))),
        (
            "Content-Length: 0\r\n",
            Ok((Upgrade::Connect, Framing::UntilClose)),
        ),
        ("Content-Length: 3\r\n", Err(ParseError::BodyDisallowed)),
        (
            "Transfer-Encoding: chunked\r\n",
            Err(ParseError::InvalidTransferEncoding),
        ),
    ] {
        let found = request(format!("CONNECT a:1 HTTP/1.1\r\nHost: b\r\n{lines}\r\n"));
        let found = found.map(|(head, meta)| {
            assert!(head.headers.is_empty());
            (meta.upgrade, meta.framing)
        });
        assert_eq!(found, want, "{lines:?}");
    }
}

#[test]
fn framing_of_responses() {
    let chunked = "transfer-encoding: chunked\r\n";
    for (method, status, lines, want) in [
        ("GET", "200 OK", "", Ok(Framing::UntilClose)),
        (
            "GET",
            "200",
            "content-length: 2\r\n",
            Ok(Framing::Length(2)),
        ),
        ("GET", "200 ", "content-length: 0\r\n", Ok(Framing::None)),
        ("GET", "200 OK", chunked, Ok(Framing::Chunked)),
        ("HEAD", "200 OK", "content-length: 2\r\n", Ok(Framing::None)),
        ("HEAD", "200 OK", chunked, Ok(Framing::None)),
        ("HEAD", "200 OK", "", Ok(Framing::None)),
        ("GET", "304 NM", "content-length: 2\r\n", Ok(Framing::None)),
        ("GET", "304 NM", chunked, Ok(Framing::None)),
        ("GET", "204 NC", "", Ok(Framing::None)),
        ("GET", "204 NC", "content-length: 0\r\n", Ok(Framing::None)),
        (
            "GET",
            "204 NC",
            "content-length: 2\r\n",
            Err(ParseError::Codec),
        ),
        ("GET", "204 NC", chunked, Err(ParseError::Codec)),
        (
            "GET",
            "205 RC",
            "content-length: 2\r\n",
            Ok(Framing::Length(2)),
        ),
        ("GET", "100 Continue", "", Ok(Framing::None)),
        ("GET", "103 EH", "link: x\r\n", Ok(Framing::None)),
        (
            "GET",
            "100 C",
            "content-length: 2\r\n",
            Err(ParseError::Codec),
        ),
        ("GET", "100 C", chunked, Err(ParseError::Codec)),
        (
            "GET",
            "101 SP",
            "upgrade: x\r\nconnection: upgrade\r\n",
            Ok(Framing::UntilClose),
        ),
        (
            "GET",
            "101 SP",
            "content-length: 2\r\n",
            Err(ParseError::Codec),
        ),
        ("CONNECT", "200 OK", "", Ok(Framing::UntilClose)),
        ("CONNECT", "200 OK", chunked, Ok(Framing::UntilClose)),
        (
            "CONNECT",
            "400 BR",
            "content-length: 2\r\n",
            Ok(Framing::Length(2)),
        ),
        (
            "GET",
            "200 OK",
            "content-length: 2\r\ncontent-length: 2\r\n",
            Err(ParseError::Codec),
        ),
        (
            "GET",
            "200 OK",
            "content-length: 2\r\ntransfer-encoding: chunked\r\n",
            Err(ParseError::ChunkedContentLength),
        ),
        (
            "GET",
            "200 OK",
            "transfer-encoding: gzip\r\n",
            Err(ParseError::InvalidTransferEncoding),
        ),
        (
            "GET",
            "600 Odd",
            "content-length: 2\r\n",
            Ok(Framing::Length(2)),
        ),
        ("GET", "099 Odd", "", Err(ParseError::Codec)),
        ("GET", "abc OK", "", Err(ParseError::Codec)),
        ("GET", "20 OK", "", Err(ParseError::Codec)),
        ("GET", "200x OK", "", Err(ParseError::Codec)),
        ("GET", "200 O\u{1}K", "", Err(ParseError::Codec)),
        (
            "GET",
            "200 OK",
            "x: a\0\r\n",
            Err(ParseError::InvalidCharacters),
        ),
        ("GET", "200 OK", "x : a\r\n", Err(ParseError::Codec)),
        ("GET", "200 OK", "x\r\n", Err(ParseError::Codec)),
    ] {
        let found = response(&format!("HTTP/1.1 {status}\r\n{lines}\r\n"), method);
        let found = found.map(|(_, meta)| meta.framing);
        assert_eq!(found, want, "{method} {status:?} {lines:?}");
    }
    for text in [
        "this is not http\r\n\r\n",
        "\r\nHTTP/1.1 200 OK\r\n\r\n",
        "h",
    ] {
        let limits = Limits::default();
        let found = parse_response(text.as_bytes(), &limits, b"GET", &mut Scan::default());
        assert_eq!(found, Err(ParseError::Codec), "{text:?}");
    }
}

#[test]
fn a_response_keeps_what_its_connection_names() {
    let lines = "connection: x-a\r\nx-a: 1\r\nkeep-alive: 5\r\nproxy-connection: x\r\nupgrade: foo\r\nte: trailers\r\n";
    for (status, want) in [
        ("200", pairs(&[("x-a", "1"), ("te", "trailers")])),
        (
            "101",
            pairs(&[
                ("x-a", "1"),
                ("te", "trailers"),
                ("connection", "x-a"),
                ("upgrade", "foo"),
            ]),
        ),
    ] {
        let (head, _) = response(&format!("HTTP/1.1 {status} x\r\n{lines}\r\n"), "GET").unwrap();
        assert_eq!(list(&head.headers), want, "{status}");
    }
}

#[test]
fn heads_are_bounded() {
    let head = |headers: usize| format!("{HEAD}{}\r\n", "x: y\r\n".repeat(headers - 1));
    assert!(request(head(100)).is_ok());
    assert_eq!(request(head(101)), Err(ParseError::TooManyHeaders));
    let many = Limits {
        headers: 200,
        ..Limits::default()
    };
    assert!(request_with(head(200), &many).is_ok());
    assert_eq!(
        request_with(head(201), &many),
        Err(ParseError::TooManyHeaders)
    );

    let limits = Limits::default();
    let long = |bytes: usize| format!("{HEAD}x: {}\r\n\r\n", "y".repeat(bytes - HEAD.len() - 7));
    assert!(request(long(limits.head_bytes)).is_ok());
    let over = long(limits.head_bytes + 1);
    assert_eq!(request(&over), Err(ParseError::HeadersTooLarge));
    for endless in [over.trim_end().repeat(2), "\r\n".repeat(limits.head_bytes)] {
        let found = parse_request(endless.as_bytes(), &limits, &mut Scan::default());
        assert_eq!(found, Err(ParseError::HeadersTooLarge));
    }
    // A form that is read again in another is bounded as well.
    let folded = format!("{HEAD}x: {}\r\n\r\n", "y\r\n ".repeat(20_000));
    assert_eq!(request(folded), Err(ParseError::HeadersTooLarge));
}

fn decode(
    framing: Framing,
    limits: &Limits,
    text: &[u8],
    splits: &[usize],
) -> (Vec<u8>, Result<Option<Option<Headers>>, ParseError>, usize) {
    let mut decoder = BodyDecoder::new(framing, limits);
    let mut input = BytesMut::new();
    let mut data = Vec::new();
    let mut at = 0;
    let mut lengths = splits.iter().copied().chain([usize::MAX]);
    loop {
        match decoder.decode(&mut input) {
            Err(error) => return (data, Err(error), 0),
            Ok(Some(Piece::Data(piece))) => {
                assert!(!piece.is_empty());
                data.extend_from_slice(&piece);
            }
            Ok(Some(Piece::End(trailers))) => {
                assert!(decoder.is_end());
                return (data, Ok(Some(trailers)), text.len() - at + input.len());
            }
            Ok(None) if at == text.len() => return (data, Ok(None), 0),
            Ok(None) => {
                let n = lengths.next().unwrap_or(usize::MAX).min(text.len() - at);
                input.extend_from_slice(&text[at..at + n]);
                at += n;
            }
        }
    }
}

#[test]
fn chunks() {
    let ok = |data: &str| (data.as_bytes().to_vec(), Ok(Some(None)));
    let bad = |data: &str| (data.as_bytes().to_vec(), Err(ParseError::Codec));
    for (text, want) in [
        ("3\r\nabc\r\n0\r\n\r\n", ok("abc")),
        (
            "A\r\n0123456789\r\n1\r\nx\r\n000\r\n\r\n",
            ok("0123456789x"),
        ),
        ("0000000000000000000003\r\nabc\r\n0\r\n\r\n", ok("abc")),
        ("3;ext=1\r\nabc\r\n0;x\r\n\r\n", ok("abc")),
        ("3 ; ext\r\nabc\r\n0\r\n\r\n", ok("abc")),
        ("3\t\r\nabc\r\n0\r\n\r\n", ok("abc")),
        ("3\r\nabc\n0\r\n\n", ok("abc")),
        ("0\r\nx: y\r\n\r\n", ok("")),
        ("0\r\nx: y\r\n z\r\n\r\n", ok("")),
        ("zz\r\nabc\r\n0\r\n\r\n", bad("")),
        ("\r\nabc\r\n0\r\n\r\n", bad("")),
        (";a\r\nabc\r\n0\r\n\r\n", bad("")),
        (" 3\r\nabc\r\n0\r\n\r\n", bad("")),
        ("0x3\r\nabc\r\n0\r\n\r\n", bad("")),
        ("-1\r\nabc\r\n0\r\n\r\n", bad("")),
        ("3\nabc\n0\n\n", bad("")),
        ("3;a\nabc\r\n0\r\n\r\n", bad("")),
        ("3;a\rb\r\nabc\r\n0\r\n\r\n", bad("")),
        ("3\r\nabcXX0\r\n\r\n", bad("abc")),
        ("3\r\nabc\rX0\r\n\r\n", bad("abc")),
        ("ffffffffffffffff1\r\nabc", bad("")),
        ("ffffffffffffffff\r\nabc", (b"abc".to_vec(), Ok(None))),
        ("0\r\nx y: 1\r\n\r\n", bad("")),
        ("0\r\nxt\r\n\r\n", bad("")),
        (
            "0\r\nx: \0\r\n\r\n",
            (vec![], Err(ParseError::InvalidCharacters)),
        ),
        ("3\r\nab", (b"ab".to_vec(), Ok(None))),
    ] {
        let limits = Limits::default();
        for splits in [&[][..], &[1; 64], &[2; 32]] {
            let (data, end, _) = decode(Framing::Chunked, &limits, text.as_bytes(), splits);
            assert_eq!((data, end), want, "{text:?}");
        }
    }
}

#[test]
fn trailers_are_bounded_and_hold_nothing_of_the_hop() {
    let limits = Limits {
        enable_trailers: true,
        ..Limits::default()
    };
    let end = |trailers: &str| {
        let text = format!("0\r\n{trailers}\r\n");
        decode(Framing::Chunked, &limits, text.as_bytes(), &[]).1
    };
    let mut want = Headers::default();
    want.append(Name::new("grpc-status"), "0");
    want.append(Name::new("x"), "y z");
    assert_eq!(
        end(
            "Grpc-Status: 0\r\ncontent-length: 5\r\nhost: a\r\ntransfer-encoding: b\r\nconnection: c\r\nx: y\r\n z\r\n"
        ),
        Ok(Some(Some(want)))
    );
    assert_eq!(end("host: a\r\n"), Ok(Some(None)));
    assert_eq!(
        end(&"x: y\r\n".repeat(101)),
        Err(ParseError::TooManyHeaders)
    );
    assert_eq!(
        end(&format!("x: {}\r\n", "y".repeat(limits.head_bytes))),
        Err(ParseError::HeadersTooLarge)
    );
    let endless = format!("0\r\nx: {}", "y".repeat(limits.head_bytes));
    let (_, end, _) = decode(Framing::Chunked, &limits, endless.as_bytes(), &[1000; 100]);
    assert_eq!(end, Err(ParseError::HeadersTooLarge));
}

#[test]
fn bodies_with_a_length_leave_what_follows() {
    let limits = Limits::default();
    let (data, end, left) = decode(Framing::Length(3), &limits, b"abcGET", &[1, 1]);
    assert_eq!((&*data, end, left), (&b"abc"[..], Ok(Some(None)), 3));
    let (data, end, left) = decode(Framing::None, &limits, b"GET", &[]);
    assert_eq!((&*data, end, left), (&b""[..], Ok(Some(None)), 3));
    let (data, end, _) = decode(Framing::UntilClose, &limits, b"abc", &[1]);
    assert_eq!((&*data, end), (&b"abc"[..], Ok(None)));
    let (data, end, left) = decode(Framing::Chunked, &limits, b"3\r\nabc\r\n0\r\n\r\nGET", &[]);
    assert_eq!((&*data, end, left), (&b"abc"[..], Ok(Some(None)), 3));
}

#[test]
fn a_body_knows_what_is_left_of_it() {
    let limits = Limits::default();
    let mut length = BodyDecoder::new(Framing::Length(10), &limits);
    assert_eq!((length.remaining(), length.spliceable()), (Some(10), 10));
    let mut input = BytesMut::from("abc");
    assert_eq!(
        length.decode(&mut input),
        Ok(Some(Piece::Data("abc".into())))
    );
    assert_eq!(length.close(), Err(ParseError::Truncated));
    length.advance(7);
    assert!(length.is_end());
    assert_eq!(length.remaining(), Some(0));
    assert_eq!(length.close(), Ok(()));

    let mut chunked = BodyDecoder::new(Framing::Chunked, &limits);
    let mut input = BytesMut::from("a\r\nabc");
    assert_eq!(chunked.remaining(), None);
    assert_eq!(
        chunked.decode(&mut input),
        Ok(Some(Piece::Data("abc".into())))
    );
    assert_eq!((chunked.remaining(), chunked.spliceable()), (None, 7));
    chunked.advance(7);
    input.extend_from_slice(b"\r\n1\r\nx\r\n0\r\n\r\n");
    // The end without trailers is told with the last data.
    assert_eq!(
        chunked.decode(&mut input),
        Ok(Some(Piece::Data("x".into())))
    );
    assert!(chunked.is_end());

    let mut until_close = BodyDecoder::new(Framing::UntilClose, &limits);
    assert_eq!(until_close.spliceable(), u64::MAX);
    until_close.advance(1 << 40);
    assert_eq!(until_close.close(), Ok(()));
    assert!(until_close.is_end());
}

#[test]
fn large_pieces_are_not_copied_and_small_ones_leave_the_buffer_to_its_owner() {
    let limits = Limits::default();
    let mut input = BytesMut::from(&[7; 8192][..]);
    let at = input.as_ptr();
    let mut decoder = BodyDecoder::new(Framing::Length(8192), &limits);
    let Ok(Some(Piece::Data(piece))) = decoder.decode(&mut input) else {
        panic!("no data");
    };
    assert_eq!((piece.len(), piece.as_ptr()), (8192, at));

    let mut input = BytesMut::from(&[7; 100][..]);
    let at = input.as_ptr();
    let mut decoder = BodyDecoder::new(Framing::Length(100), &limits);
    let Ok(Some(Piece::Data(_piece))) = decoder.decode(&mut input) else {
        panic!("no data");
    };
    assert!(input.try_reclaim(100));
    input.extend_from_slice(b"x");
    assert_eq!(input.as_ptr(), at);
}

fn head_of(method: &str, path: &str, headers: &[(&str, &str)]) -> RequestHead {
    let mut list = Headers::default();
    for (name, value) in headers {
        list.append(Name::new(name), value);
    }
    RequestHead {
        method: Bytes::copy_from_slice(method.as_bytes()),
        scheme: "http".into(),
        authority: "a:1".into(),
        path: Bytes::copy_from_slice(path.as_bytes()),
        protocol: Protocol::Http2,
        headers: list,
    }
}

#[test]
fn requests_are_written() {
    for (method, path, headers, framing, want) in [
        (
            "GET",
            "/x",
            &[("x", "y")][..],
            Framing::None,
            "GET /x HTTP/1.1\r\nhost: a:1\r\nx: y\r\n\r\n",
        ),
        (
            "GET",
            "",
            &[],
            Framing::None,
            "GET / HTTP/1.1\r\nhost: a:1\r\n\r\n",
        ),
        (
            "POST",
            "/",
            &[],
            Framing::None,
            "POST / HTTP/1.1\r\nhost: a:1\r\ncontent-length: 0\r\n\r\n",
        ),
        (
            "DELETE",
            "/",
            &[],
            Framing::None,
            "DELETE / HTTP/1.1\r\nhost: a:1\r\n\r\n",
        ),
        (
            "POST",
            "/",
            &[("content-length", "3")],
            Framing::Length(3),
            "POST / HTTP/1.1\r\nhost: a:1\r\ncontent-length: 3\r\n\r\n",
        ),
        (
            "POST",
            "/",
            &[("content-length", "4")],
            Framing::Length(3),
            "POST / HTTP/1.1\r\nhost: a:1\r\ncontent-length: 3\r\n\r\n",
        ),
        (
            "POST",
            "/",
            &[("content-length", "3")],
            Framing::None,
            "POST / HTTP/1.1\r\nhost: a:1\r\ncontent-length: 0\r\n\r\n",
        ),
        (
            "GET",
            "/",
            &[
                ("content-length", "3"),
                ("transfer-encoding", "gzip"),
                ("host", "b"),
            ],
            Framing::Chunked,
            "GET / HTTP/1.1\r\nhost: a:1\r\ntransfer-encoding: chunked\r\n\r\n",
        ),
        (
            "GET",
            "/",
            &[("upgrade", "websocket")],
            Framing::UntilClose,
            "GET / HTTP/1.1\r\nhost: a:1\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n",
        ),
        (
            "GET",
            "/",
            &[("connection", "upgrade, x"), ("upgrade", "websocket")],
            Framing::UntilClose,
            "GET / HTTP/1.1\r\nhost: a:1\r\nconnection: upgrade, x\r\nupgrade: websocket\r\n\r\n",
        ),
        (
            "CONNECT",
            "",
            &[],
            Framing::UntilClose,
            "CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n",
        ),
    ] {
        let mut out = BytesMut::new();
        write_request(&mut out, &head_of(method, path, headers), framing).unwrap();
        assert_eq!(out, want);
    }
}

#[test]
fn what_would_be_read_otherwise_is_not_written() {
    for (method, path, name, value) in [
        ("GET", "/ HTTP/1.1\r\nx: y", "x", "y"),
        ("GET", "/a b", "x", "y"),
        ("GET", "/\n", "x", "y"),
        ("GE T", "/", "x", "y"),
        ("", "/", "x", "y"),
        ("GET", "/", "x", "y\r\nz: a"),
        ("GET", "/", "x", "y\n"),
        ("GET", "/", "x", "y\0"),
        ("GET", "/", "x", "a tab\tand later an end of line\n"),
        ("GET", "/", "x\r\nz", "y"),
    ] {
        let mut out = BytesMut::from("before");
        let head = head_of(method, path, &[(name, value)]);
        assert_eq!(
            write_request(&mut out, &head, Framing::None),
            Err(WriteError)
        );
        assert_eq!(out, "before", "{method:?} {path:?} {name:?} {value:?}");
    }
    let mut head = head_of("GET", "/", &[("x", "y\tz")]);
    write_request(&mut BytesMut::new(), &head, Framing::None).unwrap();
    head.authority = "a\r\nx: y".into();
    let written = write_request(&mut BytesMut::new(), &head, Framing::None);
    assert_eq!(written, Err(WriteError));
    let mut trailers = Headers::default();
    trailers.append(Name::new("x"), "y\r\n\r\nHTTP/1.1 200 OK");
    let mut out = BytesMut::new();
    write_last_chunk(&mut out, Some(&trailers));
    assert_eq!(out, "0\r\n\r\n");
}

#[test]
fn responses_are_written() {
    let plain = Reply::default();
    let to_head = Reply {
        to_head: true,
        ..plain
    };
    let closing = Reply {
        connection: Connection::Close,
        ..plain
    };
    let old = Reply {
        http_10: true,
        connection: Connection::KeepAlive,
        to_head: false,
    };
    for (status, headers, framing, reply, want) in [
        (
            200,
            &[("content-length", "2")][..],
            Framing::Length(2),
            plain,
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n",
        ),
        (
            200,
            &[],
            Framing::Length(12),
            plain,
            "HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n",
        ),
        (
            404,
            &[],
            Framing::None,
            plain,
            "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
        ),
        (
            999,
            &[],
            Framing::Chunked,
            closing,
            "HTTP/1.1 999 Unknown\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n",
        ),
        (
            200,
            &[("connection", "x")],
            Framing::UntilClose,
            closing,
            "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n",
        ),
        (
            200,
            &[("content-length", "2")],
            Framing::Length(2),
            old,
            "HTTP/1.0 200 OK\r\ncontent-length: 2\r\nconnection: keep-alive\r\n\r\n",
        ),
        (
            204,
            &[("content-length", "0")],
            Framing::None,
            plain,
            "HTTP/1.1 204 No Content\r\n\r\n",
        ),
        (
            304,
            &[("content-length", "5")],
            Framing::None,
            plain,
            "HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n",
        ),
        (
            304,
            &[],
            Framing::None,
            plain,
            "HTTP/1.1 304 Not Modified\r\n\r\n",
        ),
        (
            103,
            &[("link", "x")],
            Framing::None,
            plain,
            "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n",
        ),
        (
            101,
            &[("upgrade", "x")],
            Framing::UntilClose,
            plain,
            "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: Upgrade\r\n\r\n",
        ),
        (
            200,
            &[("content-length", "5")],
            Framing::None,
            to_head,
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n",
        ),
        (
            200,
            &[("content-length", "5")],
            Framing::None,
            plain,
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        ),
        (
            200,
            &[],
            Framing::None,
            to_head,
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        ),
    ] {
        let mut list = Headers::default();
        for (name, value) in headers {
            list.append(Name::new(name), value);
        }
        let head = ResponseHead {
            status,
            headers: list,
        };
        let mut out = BytesMut::new();
        write_response(&mut out, &head, framing, reply).unwrap();
        assert_eq!(out, want);
    }
    let unwritable = ResponseHead {
        status: 42,
        headers: Headers::default(),
    };
    let written = write_response(&mut BytesMut::new(), &unwritable, Framing::None, plain);
    assert_eq!(written, Err(WriteError));
}

#[test]
fn chunks_are_written() {
    let mut out = BytesMut::new();
    write_continue(&mut out);
    write_chunk(&mut out, b"");
    write_chunk(&mut out, &[b'x'; 26]);
    write_chunk_size(&mut out, 0xfedc_ba98);
    out.extend_from_slice(CHUNK_END);
    let mut trailers = Headers::default();
    trailers.append(Name::new("grpc-status"), "0");
    trailers.append(Known::ContentLength, "3");
    write_last_chunk(&mut out, Some(&trailers));
    write_last_chunk(&mut out, None);
    let want = format!(
        "HTTP/1.1 100 Continue\r\n\r\n1a\r\n{}\r\nfedcba98\r\n\r\n0\r\ngrpc-status: 0\r\n\r\n0\r\n\r\n",
        "x".repeat(26)
    );
    assert_eq!(out, want);
}

#[test]
fn errors_are_told_as_envoy_tells_them() {
    for (error, status, details) in [
        (ParseError::Codec, 400, "http1.codec_error"),
        (ParseError::TooManyHeaders, 431, "http1.too_many_headers"),
        (ParseError::HeadersTooLarge, 431, "http1.headers_too_large"),
        (
            ParseError::InvalidTransferEncoding,
            501,
            "http1.invalid_transfer_encoding",
        ),
    ] {
        assert_eq!((error.status(), error.details()), (status, details));
    }
}
