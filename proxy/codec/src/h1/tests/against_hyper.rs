//! hyper reads the same bytes: what both take must mean the same, and what they differ in is listed.

use std::{cell::RefCell, convert::Infallible, rc::Rc};

use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use proptest::{collection::vec, prelude::*, sample::select};
use tokio::io::AsyncWriteExt as _;

use super::*;

/// A whole request as a reader found it: method, target, headers but those of the hop, body.
type Read = (String, String, Vec<(String, String)>, Vec<u8>);

fn ours(text: &str) -> Option<Read> {
    let limits = Limits {
        allow_custom_methods: true,
        ..Limits::default()
    };
    let parsed = parse_request(text.as_bytes(), &limits, &mut Scan::default()).ok()?;
    let Parsed::Complete {
        head: (head, meta),
        used,
    } = parsed
    else {
        return None;
    };
    let (body, end, _) = decode(meta.framing, &limits, &text.as_bytes()[used..], &[]);
    end.ok()??;
    let mut headers = list(&head.headers);
    headers.insert(
        0,
        (
            "host".to_owned(),
            String::from_utf8_lossy(&head.authority).into_owned(),
        ),
    );
    Some((
        String::from_utf8_lossy(&head.method).into_owned(),
        String::from_utf8_lossy(&head.path).into_owned(),
        headers,
        body,
    ))
}

fn hypers(text: &str) -> Option<Read> {
    let read = Rc::new(RefCell::new(None));
    let service = |request: Request<Incoming>| {
        let read = read.clone();
        async move {
            let (parts, body) = request.into_parts();
            if let Ok(body) = body.collect().await {
                let headers = parts.headers.iter().map(|(name, value)| {
                    let value = value.as_bytes().iter().map(|b| char::from(*b)).collect();
                    (name.as_str().to_owned(), value)
                });
                let first = (
                    parts.method.to_string(),
                    parts.uri.to_string(),
                    headers
                        .filter(|(name, _)| !matches!(&**name, "connection" | "transfer-encoding"))
                        .collect(),
                    body.to_bytes().to_vec(),
                );
                read.borrow_mut().get_or_insert(first);
            }
            Ok::<_, Infallible>(Response::new(Empty::<bytes::Bytes>::new()))
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (mut client, server) = tokio::io::duplex(64 * 1024);
        client.write_all(text.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        let connection = hyper::server::conn::http1::Builder::new()
            .half_close(true)
            .serve_connection(TokioIo::new(server), service_fn(service))
            .await;
        // How the connection ended is not asked: only what was read before.
        drop(connection);
    });
    read.take()
}

/// hyper keeps headers of a name together, wherever they stood.
fn by_name(read: Option<Read>) -> Option<Read> {
    read.map(|mut first| {
        first.2.sort_by(|(one, _), (other, _)| one.cmp(other));
        first
    })
}

fn line() -> impl Strategy<Value = &'static str> {
    select(vec![
        "x-a: b\r\n",
        "X-Long-Name:\t  with spaces \t\r\n",
        "x-obs: \u{e4}\u{f6}\r\n",
        "x-empty:\r\n",
        "cookie: a=b\r\n",
        "accept: */*\r\n",
        "connection: keep-alive\r\n",
        "connection: close\r\n",
        "x-ctl: a\u{1}b\r\n",
        "x-nul: a\0b\r\n",
        "x-del: a\u{7f}b\r\n",
        "x space: a\r\n",
        "x-colon : a\r\n",
        "no colon\r\n",
        ": a\r\n",
        "x\u{e4}: a\r\n",
        "x(: a\r\n",
        "x-lf: a\nx-next: b\n",
    ])
}

/// Framing and a body for it; for a bad one, whatever.
fn body() -> impl Strategy<Value = (&'static str, &'static str)> {
    select(vec![
        ("", ""),
        ("content-length: 0\r\n", ""),
        ("content-length: 3\r\n", "abc"),
        ("content-length: 4\r\n", "abc"),
        ("content-length: -1\r\n", "abc"),
        ("content-length: 3, 4\r\n", "abc"),
        ("content-length: x\r\n", "abc"),
        ("content-length: 99999999999999999999999\r\n", "abc"),
        ("content-length: 3\r\ncontent-length: 4\r\n", "abcd"),
        ("transfer-encoding: chunked\r\n", "3\r\nabc\r\n0\r\n\r\n"),
        (
            "transfer-encoding: chunked\r\n",
            "3;x=y\r\nabc\r\n0\r\n\r\n",
        ),
        (
            "transfer-encoding: chunked\r\n",
            "1\r\na\r\n2 \r\nbc\r\n00\r\n\r\n",
        ),
        ("transfer-encoding: chunked\r\n", "0\r\n\r\n"),
        ("transfer-encoding: chunked\r\n", "zz\r\nabc\r\n0\r\n\r\n"),
        ("transfer-encoding: chunked\r\n", "3\r\nabcd\r\n0\r\n\r\n"),
        ("transfer-encoding: chunked\r\n", "3\nabc\n0\n\n"),
        ("transfer-encoding: chunked\r\n", "3;a\nabc\r\n0\r\n\r\n"),
        (
            "transfer-encoding: chunked\r\n",
            "ffffffffffffffffff\r\nabc",
        ),
        ("transfer-encoding: chunked\r\n", "3\r\nab"),
        ("transfer-encoding: identity\r\n", "abc"),
        ("transfer-encoding: chunked, gzip\r\n", "abc"),
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn both_read_the_same(
        first in select(vec![
            "GET / HTTP/1.1",
            "POST /a?b=c HTTP/1.1",
            "FOO /a HTTP/1.1",
            "PUT /a HTTP/1.1",
            "GE(T /a HTTP/1.1",
            "GET /a HTTP/1",
            "GET /a http/1.1",
            "GET /a b HTTP/1.1",
            "GET /\u{1} HTTP/1.1",
        ]),
        lines in vec(line(), 0..3),
        (framing, body) in body(),
    ) {
        let text = format!("{first}\r\nhost: a\r\n{}{framing}\r\n{body}", lines.concat());
        prop_assert_eq!(by_name(ours(&text)), by_name(hypers(&text)));
    }
}

/// Whether (ours, hyper) take it. Each of ours is what Envoy does, but where it says so.
#[test]
fn known_differences() {
    for (lines, body, want) in [
        // Equal lengths are a list, which Envoy refuses.
        (
            "content-length: 3\r\ncontent-length: 3\r\n",
            "abc",
            (false, true),
        ),
        // hyper goes by the chunks; both at once is how requests are smuggled.
        (
            "content-length: 3\r\ntransfer-encoding: chunked\r\n",
            "0\r\n\r\n",
            (false, true),
        ),
        // A coding that would have to be passed on.
        (
            "transfer-encoding: gzip, chunked\r\n",
            "0\r\n\r\n",
            (false, true),
        ),
        // Folded lines and a CR within a value are cleaned.
        ("x: a\r\n b\r\n", "", (true, false)),
        ("x: a\rb\r\n", "", (true, false)),
        // Envoy skips to the end of the line; hyper wants a semicolon before anything.
        (
            "transfer-encoding: chunked\r\n",
            "3 x\r\nabc\r\n0\r\n\r\n",
            (true, false),
        ),
        // Names of the origin may not be nominated.
        ("connection: x-forwarded-for\r\n", "", (false, true)),
        // Stricter than Envoy, which reads the coding without the CR but the body as if there were none.
        (
            "transfer-encoding: chun\rked\r\n",
            "0\r\n\r\n",
            (false, false),
        ),
    ] {
        let text = format!("POST / HTTP/1.1\r\nhost: a\r\n{lines}\r\n{body}");
        let found = (ours(&text).is_some(), hypers(&text).is_some());
        assert_eq!(found, want, "{text:?}");
    }
}
