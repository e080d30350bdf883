use bytes::{Bytes, BytesMut};

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
