//! A server against raw frames: the cases that RFC 9113 names, in its order.

use std::sync::Arc;

use bytes::BytesMut;
use proptest::prelude::*;

use super::pair::{drain, response};
use crate::h2::{
    Code, Connection, Event, Fatal, Options, Role, StreamId,
    frame::{Head, PREFACE},
};

pub(super) fn frame(kind: u8, flags: u8, id: u32, payload: &[u8]) -> Vec<u8> {
    let head = Head {
        len: payload.len(),
        kind,
        flags,
        id,
    };
    [&head.bytes()[..], payload].concat()
}

pub(super) fn block(headers: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in headers {
        block.push(0);
        for text in [name, value] {
            if text.len() < 127 {
                block.push(text.len() as u8);
            } else {
                assert!(text.len() < 127 + 128 * 128);
                let rest = text.len() - 127;
                block.extend([127, (rest % 128) as u8 | 128, (rest / 128) as u8]);
            }
            block.extend(text.bytes());
        }
    }
    block
}

pub(super) const GET: [(&str, &str); 4] = [
    (":method", "GET"),
    (":scheme", "http"),
    (":authority", "a"),
    (":path", "/"),
];

pub(super) fn get_and(more: &[(&str, &str)]) -> Vec<u8> {
    block(&[&GET, more].concat())
}

pub(super) const END: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 32;

pub(super) fn headers(id: u32, end: bool) -> Vec<u8> {
    frame(1, END_HEADERS | u8::from(end), id, &block(&GET))
}

/// What came of some bytes: the events, how it ended and the frames in answer.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) events: Vec<Event>,
    pub(super) fatal: Option<Fatal>,
    pub(super) frames: Vec<(u8, u32, Vec<u8>)>,
}

impl Outcome {
    /// The codes of the RST_STREAM frames sent, by stream.
    pub(super) fn resets(&self) -> Vec<(u32, Code)> {
        self.codes(3, 0)
    }

    /// The code of the GOAWAY sent.
    pub(super) fn goaway(&self) -> Option<Code> {
        self.codes(7, 4).first().map(|(_, code)| *code)
    }

    fn codes(&self, kind: u8, at: usize) -> Vec<(u32, Code)> {
        self.frames
            .iter()
            .filter(|(found, ..)| *found == kind)
            .map(|(_, id, payload)| {
                let code = payload[at..at + 4].try_into().unwrap();
                (*id, Code(u32::from_be_bytes(code)))
            })
            .collect()
    }
}

pub(super) fn server(options: Options) -> Connection {
    let mut server = Connection::new(Role::Server, Arc::new(options));
    let hello = [&PREFACE[..], &frame(4, 0, 0, &[])].concat();
    server
        .receive(&mut BytesMut::from(&hello[..]), &mut |_| {})
        .unwrap();
    drain(&mut server);
    server
}

pub(super) fn feed(connection: &mut Connection, bytes: &[u8]) -> Outcome {
    let mut events = Vec::new();
    let fatal = connection
        .receive(&mut BytesMut::from(bytes), &mut |event| events.push(event))
        .err();
    let out = drain(connection);
    let mut frames = Vec::new();
    let mut rest = &out[..];
    while let Some(head) = Head::read(rest) {
        let end = 9 + head.len;
        frames.push((head.kind, head.id, rest[9..end].to_vec()));
        rest = &rest[end..];
    }
    Outcome {
        events,
        fatal,
        frames,
    }
}

fn outcome(frames: &[Vec<u8>]) -> Outcome {
    feed(&mut server(Options::default()), &frames.concat())
}

#[test]
fn connection_errors() {
    let hang = || headers(1, false);
    let priority_on = |id: u32| [&id.to_be_bytes()[..], &[0]].concat();
    for (what, frames, code) in [
        (
            "§4.2 too large",
            vec![frame(6, 0, 0, &[0; 16_385])],
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "§4.3 bad compression",
            vec![frame(1, 5, 1, &[0xbe])],
            Code::COMPRESSION_ERROR,
        ),
        (
            "§4.3 cut compression",
            vec![frame(1, 5, 1, &[0x04])],
            Code::COMPRESSION_ERROR,
        ),
        (
            "§5.1 DATA idle",
            vec![frame(0, 0, 1, b"x")],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§5.1 RST_STREAM idle",
            vec![frame(3, 0, 1, &[0; 4])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§5.1 WINDOW_UPDATE idle",
            vec![frame(8, 0, 1, &[0, 0, 0, 1])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§5.1 CONTINUATION idle",
            vec![frame(9, 4, 1, &[])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§5.1 DATA after reset",
            vec![hang(), frame(3, 0, 1, &[0; 4]), frame(0, 0, 1, b"x")],
            Code::STREAM_CLOSED,
        ),
        (
            "§5.1 HEADERS after reset",
            vec![hang(), frame(3, 0, 1, &[0; 4]), headers(1, true)],
            Code::STREAM_CLOSED,
        ),
        ("§5.1.1 even", vec![headers(2, true)], Code::PROTOCOL_ERROR),
        (
            "§5.1.1 lower",
            vec![headers(5, true), headers(3, true)],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.1 DATA on 0",
            vec![frame(0, 0, 0, b"x")],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.1 padding",
            vec![hang(), frame(0, PADDED, 1, &[2, 0])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.1 no padding length",
            vec![hang(), frame(0, PADDED, 1, &[])],
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "§6.2 HEADERS on 0",
            vec![headers(0, true)],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.2 padding",
            vec![frame(1, 5 | PADDED, 1, &[9, 0x82])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.2 no priority",
            vec![frame(1, 5 | PRIORITY, 1, &[0; 4])],
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "§6.2 another frame between",
            vec![frame(1, 1, 1, &block(&GET)), frame(6, 0, 0, &[0; 8])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.10 of another stream",
            vec![frame(1, 1, 1, &block(&GET)), frame(9, 4, 3, &[])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.3 PRIORITY on 0",
            vec![frame(2, 0, 0, &[0; 5])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.3 PRIORITY size",
            vec![frame(2, 0, 1, &[0; 4])],
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "§5.3.1 on itself",
            vec![frame(2, 0, 1, &priority_on(1))],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.4 RST_STREAM on 0",
            vec![frame(3, 0, 0, &[0; 4])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.4 size",
            vec![hang(), frame(3, 0, 1, &[0; 3])],
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "§6.5 SETTINGS on 1",
            vec![frame(4, 0, 1, &[])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.5 size",
            vec![frame(4, 0, 0, &[0; 5])],
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "§6.5 full ACK",
            vec![frame(4, 1, 0, &[0; 6])],
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "§6.5.2 push",
            vec![frame(4, 0, 0, &[0, 2, 0, 0, 0, 2])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.5.2 window",
            vec![frame(4, 0, 0, &[0, 4, 128, 0, 0, 0])],
            Code::FLOW_CONTROL_ERROR,
        ),
        (
            "§6.5.2 small frames",
            vec![frame(4, 0, 0, &[0, 5, 0, 0, 63, 255])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.5.2 large frames",
            vec![frame(4, 0, 0, &[0, 5, 1, 0, 0, 0])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "RFC 8441 §3",
            vec![frame(4, 0, 0, &[0, 8, 0, 0, 0, 2])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.6 PUSH_PROMISE",
            vec![frame(5, 4, 1, &[0, 0, 0, 2])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.7 PING on 1",
            vec![frame(6, 0, 1, &[0; 8])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.7 size",
            vec![frame(6, 0, 0, &[0; 7])],
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "§6.8 GOAWAY on 1",
            vec![frame(7, 0, 1, &[0; 8])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.8 size",
            vec![frame(7, 0, 0, &[0; 7])],
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "§6.9 no increment",
            vec![frame(8, 0, 0, &[0; 4])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.9 size",
            vec![frame(8, 0, 0, &[0; 3])],
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "§6.9.1 overflow",
            vec![frame(8, 0, 0, &[127, 255, 255, 255])],
            Code::FLOW_CONTROL_ERROR,
        ),
        (
            "§6.9.2 overflow by SETTINGS",
            vec![
                hang(),
                frame(8, 0, 1, &[127, 255, 0, 0]),
                frame(4, 0, 0, &[0, 4, 127, 255, 255, 255]),
            ],
            Code::FLOW_CONTROL_ERROR,
        ),
        (
            "§8.1 trailers without end",
            vec![hang(), frame(1, END_HEADERS, 1, &block(&[("x", "y")]))],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§8.1 pseudo header in trailers",
            vec![hang(), frame(1, 5, 1, &block(&[(":path", "/")]))],
            Code::PROTOCOL_ERROR,
        ),
    ] {
        let outcome = outcome(&frames);
        assert_eq!(outcome.goaway(), Some(code), "{what}: {outcome:?}");
        assert_eq!(outcome.fatal.map(|f| f.code), Some(code), "{what}");
    }
}

#[test]
fn the_preface_comes_first() {
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"PRI * HTTP/1"] {
        let mut server = Connection::new(Role::Server, Arc::default());
        drain(&mut server);
        assert_eq!(
            feed(&mut server, bytes).goaway(),
            Some(Code::PROTOCOL_ERROR)
        );
    }
    for first in [
        headers(1, true),
        frame(4, 1, 0, &[]),
        frame(6, 0, 0, &[0; 8]),
    ] {
        let mut server = Connection::new(Role::Server, Arc::default());
        drain(&mut server);
        let outcome = feed(&mut server, &[&PREFACE[..], &first].concat());
        assert_eq!(outcome.goaway(), Some(Code::PROTOCOL_ERROR));
    }
}

#[test]
fn stream_errors() {
    let length = |n: &str| frame(1, END_HEADERS, 1, &get_and(&[("content-length", n)]));
    let on_itself = [&[0, 0, 0, 1, 0][..], &block(&GET)].concat();
    for (what, frames, code) in [
        (
            "§5.1 DATA half-closed",
            vec![headers(1, true), frame(0, 0, 1, b"x")],
            Code::STREAM_CLOSED,
        ),
        (
            "§5.1 HEADERS half-closed",
            vec![headers(1, true), headers(1, true)],
            Code::STREAM_CLOSED,
        ),
        (
            "§5.3.1 on itself",
            vec![frame(1, 5 | PRIORITY, 1, &on_itself)],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.9 no increment",
            vec![headers(1, false), frame(8, 0, 1, &[0; 4])],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§6.9.1 overflow",
            vec![headers(1, false), frame(8, 0, 1, &[127, 255, 255, 255])],
            Code::FLOW_CONTROL_ERROR,
        ),
        (
            "§8.1.1 too short",
            vec![length("5"), frame(0, END, 1, b"abc")],
            Code::PROTOCOL_ERROR,
        ),
        (
            "§8.1.1 too long",
            vec![length("2"), frame(0, 0, 1, b"abc")],
            Code::PROTOCOL_ERROR,
        ),
    ] {
        let outcome = outcome(&frames);
        assert_eq!(outcome.resets(), [(1, code)], "{what}: {outcome:?}");
        assert_eq!(outcome.fatal, None, "{what}");
    }
}

#[test]
fn what_is_no_fault() {
    for (what, frames, events) in [
        ("§4.1 unknown frame", vec![frame(200, 255, 7, b"x")], 0),
        ("§5.1 PRIORITY idle", vec![frame(2, 0, 9, &[0; 5])], 0),
        (
            "§6.1 padding",
            vec![
                headers(1, false),
                frame(0, PADDED | END, 1, &[3, b'x', 0, 0, 0]),
            ],
            2,
        ),
        (
            "§6.1 only padding",
            vec![headers(1, false), frame(0, PADDED | END, 1, &[0])],
            2,
        ),
        (
            "§6.2 padding and priority",
            vec![frame(
                1,
                5 | PADDED | PRIORITY,
                1,
                &[&[1, 0, 0, 0, 3, 9][..], &block(&GET), &[0]].concat(),
            )],
            1,
        ),
        (
            "§6.5.2 unknown setting",
            vec![frame(4, 0, 0, &[0, 99, 0, 0, 0, 1])],
            1,
        ),
        ("§6.7 answer to none", vec![frame(6, 1, 0, &[0; 8])], 1),
        (
            "§6.9 on a closed stream",
            vec![
                headers(1, false),
                frame(3, 0, 1, &[0; 4]),
                frame(8, 0, 1, &[0, 0, 0, 1]),
                frame(3, 0, 1, &[0; 4]),
            ],
            2,
        ),
        (
            "§6.10 fragments",
            vec![
                frame(1, END, 1, &block(&GET)[..7]),
                frame(9, 0, 1, &block(&GET)[7..8]),
                frame(9, 4, 1, &block(&GET)[8..]),
            ],
            1,
        ),
        (
            "§8.1 trailers",
            vec![headers(1, false), frame(1, 5, 1, &block(&[("x", "y")]))],
            2,
        ),
    ] {
        let outcome = outcome(&frames);
        assert_eq!(
            (outcome.goaway(), outcome.resets().len()),
            (None, 0),
            "{what}: {outcome:?}"
        );
        assert_eq!(outcome.events.len(), events, "{what}: {outcome:?}");
    }
}

/// What Envoy 1.40 said to the same requests (nghttp2, defaults).
#[test]
fn malformed_requests_as_envoy_judges_them() {
    let without =
        |name: &str| -> Vec<(&str, &str)> { GET.into_iter().filter(|(n, _)| *n != name).collect() };
    let with = |name: &'static str, value: &'static str| {
        GET.map(|(n, v)| if n == name { (n, value) } else { (n, v) })
            .to_vec()
    };
    let and = |name: &'static str, value: &'static str| [&GET[..], &[(name, value)]].concat();
    const FIELD: Option<&str> = Some("http2.invalid.header.field");
    const MESSAGING: Option<&str> = Some("http2.violation.of.messaging.rule");
    for (headers, want) in [
        (GET.to_vec(), None),
        (without(":method"), MESSAGING),
        (without(":scheme"), MESSAGING),
        (without(":path"), MESSAGING),
        (without(":authority"), MESSAGING),
        (
            [&without(":authority")[..], &[("host", "b")]].concat(),
            None,
        ),
        (
            [&without(":authority")[..], &[("host", "a b")]].concat(),
            FIELD,
        ),
        (and("host", "b"), None),
        ([&GET[..], &[("host", "b"), ("host", "c")]].concat(), FIELD),
        (with(":authority", ""), FIELD),
        (with(":authority", "a b"), FIELD),
        (with(":authority", "u@a"), None),
        (with(":path", ""), FIELD),
        (with(":path", "relative"), FIELD),
        (with(":path", "*"), FIELD),
        (with(":path", "/a b"), FIELD),
        (with(":path", "/a\tb"), FIELD),
        (with(":path", "/aéb"), None),
        (with(":method", ""), FIELD),
        (with(":method", "G T"), FIELD),
        (with(":method", "get"), None),
        (with(":scheme", "ftp"), None),
        (with(":scheme", "HTTP"), None),
        (with(":scheme", "h ttp"), FIELD),
        (and(":method", "POST"), FIELD),
        (and(":path", "/"), FIELD),
        (and(":status", "200"), FIELD),
        (and(":unknown", "x"), FIELD),
        (and(":protocol", "websocket"), MESSAGING),
        ([&[("x", "y")][..], &GET].concat(), FIELD),
        (and("X-Upper", "x"), FIELD),
        (and("", "x"), FIELD),
        (and("x a", "x"), FIELD),
        (and("x-a", "a\0b"), FIELD),
        (and("x-a", "a\r\nb: c"), FIELD),
        (and("x-a", "a\u{1}b"), FIELD),
        (and("x-a", "a\u{7f}b"), FIELD),
        (and("x-a", "aéb\t"), None),
        (and("x-a", " b "), None),
        (and("connection", "close"), FIELD),
        (and("keep-alive", "1"), FIELD),
        (and("proxy-connection", "close"), FIELD),
        (and("transfer-encoding", "chunked"), FIELD),
        (and("upgrade", "h2c"), FIELD),
        (and("te", "gzip"), FIELD),
        (and("te", "Trailers"), None),
        (and("content-length", "x"), FIELD),
        (and("content-length", "0"), None),
        (and("content-length", "5"), MESSAGING),
        (
            [
                &GET[..],
                &[("content-length", "0"), ("content-length", "0")],
            ]
            .concat(),
            FIELD,
        ),
        (vec![(":method", "CONNECT"), (":authority", "a:1")], None),
        (with(":method", "CONNECT"), MESSAGING),
        (
            [
                &with(":method", "CONNECT")[..],
                &[(":protocol", "websocket")],
            ]
            .concat(),
            MESSAGING,
        ),
        (
            [&with(":method", "OPTIONS")[..3], &[(":path", "*")]].concat(),
            None,
        ),
    ] {
        let bytes = frame(1, 5, 1, &block(&headers));
        let strict = outcome(std::slice::from_ref(&bytes));
        assert_eq!(strict.fatal.map(|f| f.details), want, "{headers:?}");
        let malformed = strict.events.iter().find_map(|event| match event {
            Event::Malformed { details } => Some(*details),
            _ => None,
        });
        assert_eq!(malformed, want, "{headers:?}");
        let mut lenient = server(Options {
            stream_error_on_invalid_http_messaging: true,
            ..Options::default()
        });
        let lenient = feed(
            &mut lenient,
            &[bytes, super::raw::headers(3, true)].concat(),
        );
        assert_eq!(lenient.fatal, None);
        let resets: &[_] = if want.is_some() {
            &[(1, Code::PROTOCOL_ERROR)]
        } else {
            &[]
        };
        assert_eq!(lenient.resets(), resets, "{headers:?}");
        assert!(
            matches!(lenient.events.last(), Some(Event::Request { stream, .. }) if stream.number() == 3)
        );
    }
}

#[test]
fn frames_on_streams_that_we_have_reset_are_ignored() {
    let mut server = server(Options::default());
    for id in (1..401).step_by(2) {
        let outcome = feed(&mut server, &headers(id, false));
        let [Event::Request { stream, .. }] = outcome.events[..] else {
            panic!("{outcome:?}");
        };
        server.reset(stream, Code::CANCEL);
    }
    for id in [1, 199, 399] {
        let late = [
            frame(0, 0, id, b"x"),
            frame(1, 5, id, &block(&[("x", "y")])),
        ]
        .concat();
        let outcome = feed(&mut server, &late);
        assert_eq!((outcome.fatal, outcome.events), (None, vec![]), "{id}");
    }
}

#[test]
fn a_client_is_strict_with_its_server() {
    let status =
        |id, end: u8, status: &str| frame(1, END_HEADERS | end, id, &block(&[(":status", status)]));
    let hello = frame(4, 0, 0, &[]);
    for (what, frames, fatal, reset) in [
        ("plain", vec![status(1, END, "200")], None, None),
        (
            "early hints",
            vec![status(1, 0, "103"), status(1, END, "200")],
            None,
            None,
        ),
        (
            "hints that end",
            vec![status(1, END, "103")],
            Some(Code::PROTOCOL_ERROR),
            Some(Code::PROTOCOL_ERROR),
        ),
        (
            "101",
            vec![status(1, 0, "101")],
            Some(Code::PROTOCOL_ERROR),
            Some(Code::PROTOCOL_ERROR),
        ),
        (
            "no status",
            vec![frame(1, 5, 1, &block(&[("x", "y")]))],
            Some(Code::PROTOCOL_ERROR),
            Some(Code::PROTOCOL_ERROR),
        ),
        (
            "bad status",
            vec![status(1, END, "2x0")],
            Some(Code::PROTOCOL_ERROR),
            Some(Code::PROTOCOL_ERROR),
        ),
        (
            "data first",
            vec![frame(0, END, 1, b"x")],
            None,
            Some(Code::PROTOCOL_ERROR),
        ),
        (
            "never opened",
            vec![status(3, END, "200")],
            Some(Code::PROTOCOL_ERROR),
            None,
        ),
        (
            "pushed",
            vec![status(2, END, "200")],
            Some(Code::PROTOCOL_ERROR),
            None,
        ),
        (
            "allows push",
            vec![frame(4, 0, 0, &[0, 2, 0, 0, 0, 1])],
            Some(Code::PROTOCOL_ERROR),
            None,
        ),
    ] {
        let mut client = Connection::new(Role::Client, Arc::default());
        client
            .open(&super::pair::request("GET", "/"), true)
            .unwrap();
        drain(&mut client);
        let outcome = feed(&mut client, &[hello.clone(), frames.concat()].concat());
        assert_eq!(outcome.fatal.map(|f| f.code), fatal, "{what}: {outcome:?}");
        assert_eq!(
            outcome.resets().first().map(|(_, code)| *code),
            reset,
            "{what}"
        );
    }
}

#[test]
fn a_response_to_head_has_a_length_and_no_body() {
    let mut client = Connection::new(Role::Client, Arc::default());
    for method in ["HEAD", "GET"] {
        client
            .open(&super::pair::request(method, "/"), true)
            .unwrap();
    }
    drain(&mut client);
    let answer = block(&[(":status", "200"), ("content-length", "5")]);
    let outcome = feed(
        &mut client,
        &[
            frame(4, 0, 0, &[]),
            frame(1, 5, 1, &answer),
            frame(1, 5, 3, &answer),
        ]
        .concat(),
    );
    assert!(matches!(
        outcome.events[1],
        Event::Response { end: true, .. }
    ));
    assert_eq!(outcome.resets(), [(3, Code::PROTOCOL_ERROR)]);
}

#[test]
fn a_response_that_has_no_body_may_not_bring_one() {
    for (method, status) in [("HEAD", "200"), ("GET", "204"), ("GET", "304")] {
        for (data, reset) in [(&b""[..], None), (b"x", Some(Code::PROTOCOL_ERROR))] {
            let mut client = Connection::new(Role::Client, Arc::default());
            client
                .open(&super::pair::request(method, "/"), true)
                .unwrap();
            drain(&mut client);
            let length = if status == "204" { "0" } else { "5" };
            let answer = block(&[(":status", status), ("content-length", length)]);
            let frames = [
                frame(4, 0, 0, &[]),
                frame(1, END_HEADERS, 1, &answer),
                frame(0, 1, 1, data),
            ];
            let outcome = feed(&mut client, &frames.concat());
            let resets = outcome.resets();
            assert_eq!(
                resets.first().map(|(_, code)| *code),
                reset,
                "{method} {status}"
            );
        }
    }
}

/// A run of frames, mostly sound.
fn conversation() -> impl Strategy<Value = Vec<u8>> {
    let id = prop_oneof![8 => (0u32..6).prop_map(|n| n * 2 + 1), 1 => 0u32..20];
    let sound =
        (id, 0u8..8, any::<bool>(), 0usize..3000).prop_map(|(id, what, end, len)| match what {
            0 | 1 => headers(id, end),
            2 | 3 => frame(0, u8::from(end), id, &vec![b'd'; len]),
            4 => frame(
                0,
                PADDED | u8::from(end),
                id,
                &[&[3][..], &vec![b'd'; len], &[0; 3]].concat(),
            ),
            5 => frame(8, 0, id, &[0, 0, 1, 0]),
            6 => frame(6, 0, 0, &[7; 8]),
            _ => frame(1, 5, id, &block(&[("x-trailer", "y")])),
        });
    let odd = (
        any::<u8>(),
        any::<u8>(),
        0u32..12,
        prop::collection::vec(any::<u8>(), 0..40),
    )
        .prop_map(|(kind, flags, id, payload)| frame(kind % 12, flags, id, &payload));
    prop::collection::vec(prop_oneof![12 => sound, 1 => odd], 1..30)
        .prop_map(|frames| frames.concat())
}

/// Joins pieces of bodies, which may follow the reads.
fn joined(events: Vec<Event>) -> Vec<Event> {
    let mut joined: Vec<Event> = Vec::new();
    for event in events {
        if let (
            Some(Event::Data {
                stream: before,
                data: head,
                end: last,
            }),
            Event::Data { stream, data, end },
        ) = (joined.last_mut(), &event)
            && before == stream
        {
            *head = [&head[..], data].concat().into();
            *last = *end;
        } else {
            joined.push(event);
        }
    }
    joined
}

fn received(bytes: &[u8], cuts: &[usize]) -> (Vec<Event>, Option<Fatal>, Vec<u8>) {
    let mut server = server(Options::default());
    let mut events = Vec::new();
    let mut input = BytesMut::new();
    let mut rest = bytes;
    let mut cuts = cuts.iter().cycle();
    let mut fatal = None;
    while !rest.is_empty() && fatal.is_none() {
        let (now, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
        rest = later;
        input.extend_from_slice(now);
        fatal = server
            .receive(&mut input, &mut |event| events.push(event))
            .err();
    }
    (joined(events), fatal, drain(&mut server))
}

proptest! {
    #[test]
    fn any_split_of_the_bytes_gives_the_same_events(
        bytes in conversation(),
        cuts in prop::collection::vec(1usize..700, 1..8),
    ) {
        prop_assert_eq!(received(&bytes, &[usize::MAX]), received(&bytes, &cuts));
    }
}

#[test]
fn a_stream_that_was_reset_leaves_others_alone() {
    let mut server = server(Options::default());
    let outcome = feed(&mut server, &[headers(1, true), headers(3, true)].concat());
    let streams: Vec<StreamId> = outcome
        .events
        .iter()
        .map(|event| match event {
            Event::Request { stream, .. } => *stream,
            other => panic!("{other:?}"),
        })
        .collect();
    let outcome = feed(&mut server, &frame(3, 0, 1, &8u32.to_be_bytes()));
    assert_eq!(
        outcome.events,
        [Event::Reset {
            stream: streams[0],
            code: Code::CANCEL,
            local: None
        }]
    );
    assert!(
        server
            .respond(streams[0], &response(200, &[]), true)
            .is_err()
    );
    assert!(
        server
            .respond(streams[1], &response(200, &[]), true)
            .is_ok()
    );
}
