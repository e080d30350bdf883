//! A client and a server of ours, wired together.

use std::{io::IoSlice, sync::Arc};

use bytes::{Bytes, BytesMut};

use crate::{
    h2::{Connection, Event, Fatal, Options, Role, StreamId},
    head::{Headers, Known, Name, Protocol, RequestHead, ResponseHead},
};

pub(super) fn request(method: &'static str, path: &'static str) -> RequestHead {
    RequestHead {
        method: method.into(),
        scheme: "http".into(),
        authority: "a.test".into(),
        path: path.into(),
        protocol: Protocol::Http2,
        headers: Headers::default(),
    }
}

pub(super) fn response(status: u16, headers: &[(&str, &str)]) -> ResponseHead {
    let mut list = Headers::default();
    for (name, value) in headers {
        list.append(Name::new(name), value);
    }
    ResponseHead {
        status,
        headers: list,
    }
}

/// Takes all that a connection has to write.
pub(super) fn drain(connection: &mut Connection) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let mut slices = [IoSlice::new(&[]); 16];
        let filled = connection.output(&mut slices);
        if filled == 0 {
            return bytes;
        }
        let before = bytes.len();
        for slice in &slices[..filled] {
            bytes.extend_from_slice(slice);
        }
        let len = bytes.len() - before;
        connection.advance(len);
    }
}

pub(super) fn feed(connection: &mut Connection, bytes: &[u8]) -> Result<Vec<Event>, Fatal> {
    let mut input = BytesMut::from(bytes);
    let mut events = Vec::new();
    connection.receive(&mut input, &mut |event| events.push(event))?;
    assert!(input.is_empty(), "{} bytes left", input.len());
    Ok(events)
}

struct Pair {
    client: Connection,
    server: Connection,
}

impl Pair {
    fn new(client: Options, server: Options) -> Pair {
        let mut pair = Pair {
            client: Connection::new(Role::Client, Arc::new(client)),
            server: Connection::new(Role::Server, Arc::new(server)),
        };
        pair.at_server();
        pair.at_client();
        pair.at_server();
        pair
    }

    fn at_server(&mut self) -> Vec<Event> {
        feed(&mut self.server, &drain(&mut self.client)).unwrap()
    }

    fn at_client(&mut self) -> Vec<Event> {
        feed(&mut self.client, &drain(&mut self.server)).unwrap()
    }

    /// Opens a stream at both ends.
    fn open(&mut self, head: &RequestHead, end: bool) -> (StreamId, StreamId) {
        let here = self.client.open(head, end).unwrap();
        let events = self.at_server();
        let [Event::Request { stream, .. }] = &events[..] else {
            panic!("{events:?}");
        };
        (here, *stream)
    }
}

#[test]
fn a_request_and_its_response_with_bodies_and_trailers() {
    let mut pair = Pair::new(Options::default(), Options::default());
    let mut head = request("POST", "/x?y");
    head.headers.append(Name::new("x-a"), "1");
    head.headers.append(Known::Te, "trailers");
    let stream = pair.client.open(&head, false).unwrap();
    pair.client.send_data(stream, "abc".into(), false).unwrap();
    pair.client.send_data(stream, "def".into(), true).unwrap();
    let events = pair.at_server();
    let Some(Event::Request { stream: other, .. }) = events.first() else {
        panic!("{events:?}");
    };
    let other = *other;
    assert_eq!(
        events,
        [
            Event::Request {
                stream: other,
                head: head.clone(),
                end: false
            },
            Event::Data {
                stream: other,
                data: "abc".into(),
                end: false
            },
            Event::Data {
                stream: other,
                data: "def".into(),
                end: true
            },
        ]
    );
    let answer = response(200, &[("content-type", "text/plain"), ("x-b", "2")]);
    let mut trailers = Headers::default();
    trailers.append(Known::GrpcStatus, "0");
    pair.server
        .inform(other, &response(103, &[("link", "</a>")]))
        .unwrap();
    pair.server.respond(other, &answer, false).unwrap();
    pair.server.send_data(other, "ghi".into(), false).unwrap();
    pair.server.send_trailers(other, &trailers).unwrap();
    assert_eq!(
        pair.at_client(),
        [
            Event::Informational {
                stream,
                head: response(103, &[("link", "</a>")])
            },
            Event::Response {
                stream,
                head: answer,
                end: false
            },
            Event::Data {
                stream,
                data: "ghi".into(),
                end: false
            },
            Event::Trailers { stream, trailers },
        ]
    );
    assert_eq!((pair.client.streams(), pair.server.streams()), (0, 0));
    assert!(pair.server.send_data(other, "x".into(), true).is_err());
}

#[test]
fn large_bodies_flow_through_small_windows_in_turn() {
    let options = Options {
        initial_stream_window_size: 65_535,
        initial_connection_window_size: 65_535,
        send_buffer_bytes: 64 << 10,
        ..Options::default()
    };
    let mut pair = Pair::new(options.clone(), options);
    const BODY: usize = 1 << 20;
    let streams: Vec<_> = (0..3)
        .map(|_| pair.open(&request("GET", "/"), true))
        .collect();
    let mut left = [BODY; 3];
    let mut got = [0; 3];
    for (_, server) in &streams {
        pair.server
            .respond(*server, &response(200, &[]), false)
            .unwrap();
    }
    let mut rounds = 0;
    while got != [BODY; 3] {
        rounds += 1;
        assert!(rounds < 1000, "{got:?}");
        for (index, (_, server)) in streams.iter().enumerate() {
            let now = pair.server.send_capacity(*server).min(left[index]);
            if now > 0 {
                left[index] -= now;
                let piece = Bytes::from(vec![index as u8; now]);
                pair.server
                    .send_data(*server, piece, left[index] == 0)
                    .unwrap();
            }
        }
        assert!(pair.server.queued <= 3 * (64 << 10));
        for event in pair.at_client() {
            let Event::Data { stream, data, .. } = event else {
                continue;
            };
            let index = streams
                .iter()
                .position(|(client, _)| *client == stream)
                .unwrap();
            assert!(data.iter().all(|byte| *byte == index as u8));
            got[index] += data.len();
            pair.client.consumed(stream, data.len());
        }
        pair.at_server();
        while let Some(stream) = pair.server.next_writable() {
            assert!(pair.server.send_capacity(stream) > 0);
        }
        if got.contains(&BODY) {
            assert!(got.iter().all(|got| *got > BODY / 2), "unfair: {got:?}");
        }
    }
    assert_eq!((pair.client.streams(), pair.server.streams()), (0, 0));
}

#[test]
fn a_large_body_is_not_copied_and_leaves_in_few_slices() {
    let mut pair = Pair::new(Options::default(), Options::default());
    let (_, server) = pair.open(&request("GET", "/"), true);
    pair.server
        .respond(server, &response(200, &[]), false)
        .unwrap();
    drain(&mut pair.server);
    // The client's window is open already.
    let body = Bytes::from(vec![7; 128 << 10]);
    let range = body.as_ptr_range();
    pair.server.send_data(server, body.clone(), true).unwrap();
    let mut slices = [IoSlice::new(&[]); 64];
    let filled = pair.server.output(&mut slices);
    assert_eq!(filled, 16); // a head and a payload for each of 8 frames
    for pair in slices[..filled].chunks(2) {
        assert_eq!((pair[0].len(), pair[1].len()), (9, 16_384));
        assert!(range.contains(&pair[1].as_ptr()));
    }
}

#[test]
fn trailers_wait_for_the_body() {
    let options = Options {
        initial_stream_window_size: 65_535,
        ..Options::default()
    };
    let mut pair = Pair::new(options, Options::default());
    let (client, server) = pair.open(&request("GET", "/"), true);
    pair.server
        .respond(server, &response(200, &[]), false)
        .unwrap();
    pair.server
        .send_data(server, vec![0; 100_000].into(), false)
        .unwrap();
    let mut trailers = Headers::default();
    trailers.append(Known::GrpcStatus, "0");
    pair.server.send_trailers(server, &trailers).unwrap();
    let mut got = 0;
    for _ in 0..3 {
        for event in pair.at_client() {
            match event {
                Event::Data { data, .. } => {
                    got += data.len();
                    pair.client.consumed(client, data.len());
                }
                Event::Trailers {
                    trailers: found, ..
                } => {
                    assert_eq!((got, &found), (100_000, &trailers));
                    return;
                }
                _ => {}
            }
        }
        pair.at_server();
    }
    panic!("no trailers after {got}");
}

#[test]
fn an_extended_connect_is_an_upgrade_at_both_ends() {
    let server = Options {
        allow_connect: true,
        ..Options::default()
    };
    let mut head = request("GET", "/chat");
    head.headers.append(Known::Upgrade, "websocket");
    let mut closed = Pair::new(Options::default(), Options::default());
    assert!(closed.client.open(&head, false).is_err());

    let mut pair = Pair::new(Options::default(), server);
    assert!(pair.client.allows_extended_connect());
    let client = pair.client.open(&head, false).unwrap();
    let events = pair.at_server();
    let [
        Event::Request {
            stream,
            head: got,
            end: false,
        },
    ] = &events[..]
    else {
        panic!("{events:?}");
    };
    assert_eq!(got, &head);
    let switched = response(101, &[("upgrade", "websocket"), ("connection", "Upgrade")]);
    pair.server.respond(*stream, &switched, false).unwrap();
    assert_eq!(
        pair.at_client(),
        [Event::Response {
            stream: client,
            head: response(101, &[("upgrade", "websocket")]),
            end: false
        }]
    );
}

#[test]
fn draining_lets_open_streams_end_and_refuses_new_ones() {
    let mut pair = Pair::new(Options::default(), Options::default());
    let (first, server) = pair.open(&request("GET", "/1"), true);
    pair.server.drain_notice();
    let late = pair.client.open(&request("GET", "/2"), true).unwrap();
    pair.server.drain();
    let goaways = pair.at_client();
    assert!(matches!(
        goaways[..],
        [
            Event::GoAway { notice: true, .. },
            Event::Reset { stream, code: crate::h2::Code::REFUSED_STREAM, local: None },
            Event::GoAway { notice: false, .. },
        ] if stream == late
    ));
    assert_eq!(pair.client.can_open(), 0);
    assert_eq!(pair.at_server(), []); // the late request is ignored
    assert!(!pair.server.is_done());
    pair.server
        .respond(server, &response(204, &[]), true)
        .unwrap();
    assert!(!pair.server.is_done());
    let events = pair.at_client();
    assert!(matches!(events[..], [Event::Response { stream, end: true, .. }] if stream == first));
    assert!(pair.server.is_done() && pair.client.is_done());
}

#[test]
fn an_early_response_stops_the_upload() {
    let mut pair = Pair::new(Options::default(), Options::default());
    let (client, server) = pair.open(&request("POST", "/"), false);
    pair.server
        .respond(server, &response(413, &[]), true)
        .unwrap();
    pair.server.stop_receiving(server);
    pair.client.send_data(client, "more".into(), false).unwrap();
    assert_eq!(pair.at_server(), []);
    let events = pair.at_client();
    assert!(matches!(
        events[..],
        [
            Event::Response { end: true, .. },
            Event::Reset {
                code: crate::h2::Code::NO_ERROR,
                local: None,
                ..
            }
        ]
    ));
    assert_eq!((pair.client.streams(), pair.server.streams()), (0, 0));
}

#[test]
fn the_connection_window_survives_streams_that_go_without_consuming() {
    let options = Options {
        initial_connection_window_size: 65_535,
        ..Options::default()
    };
    let mut pair = Pair::new(Options::default(), options);
    for _ in 0..20 {
        let (client, server) = pair.open(&request("POST", "/"), false);
        pair.client
            .send_data(client, vec![0; 20_000].into(), false)
            .unwrap();
        let events = pair.at_server();
        assert!(!events.is_empty());
        pair.server.reset(server, crate::h2::Code::CANCEL);
        pair.at_client();
        pair.at_server();
    }
    assert_eq!(
        pair.server.receive_window + pair.server.receive_credit,
        65_535
    );
}

#[test]
fn cookies_are_one_header_and_the_host_is_the_authority() {
    let mut pair = Pair::new(Options::default(), Options::default());
    let mut head = request("GET", "/");
    head.headers.append(Known::Cookie, "a=1");
    head.headers.append(Known::Cookie, "b=2");
    pair.client.open(&head, true).unwrap();
    let events = pair.at_server();
    let [Event::Request { head, .. }] = &events[..] else {
        panic!("{events:?}");
    };
    assert_eq!(head.headers.known(Known::Cookie), Some(&b"a=1; b=2"[..]));
    assert_eq!(head.headers.len(), 1);
}

#[test]
fn a_long_head_is_split_and_comes_together() {
    let options = Options {
        max_header_bytes: 200_000,
        ..Options::default()
    };
    let mut pair = Pair::new(options.clone(), options);
    let mut head = request("GET", "/");
    for number in 0..50 {
        head.headers
            .append(Name::new(format!("x-{number}")), vec![b'a'; 2000]);
    }
    pair.client.open(&head, true).unwrap();
    let events = pair.at_server();
    assert!(matches!(&events[..], [Event::Request { head: got, .. }] if *got == head));
}

#[test]
fn an_idle_connection_holds_little() {
    let mut pair = Pair::new(Options::default(), Options::default());
    for _ in 0..10 {
        let (_, server) = pair.open(&request("GET", "/some/path"), true);
        pair.server
            .respond(
                server,
                &response(200, &[("content-type", "a/b"), ("server", "x")]),
                true,
            )
            .unwrap();
        pair.at_client();
    }
    let bytes = pair.server.memory();
    assert!(bytes < 2048, "{bytes}");
}
