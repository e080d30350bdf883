//! Peers that send more than is good: bounded memory and the right end.

use bytes::BytesMut;

use super::{
    pair::{drain, response},
    raw::{END_HEADERS, block, feed, frame, get_and, headers, server},
};
use crate::h2::{Code, Connection, Event, Options};

/// Sends a frame again and again without reading answers; how many it took.
fn flood(server: &mut Connection, mut next: impl FnMut(u32) -> Vec<u8>) -> (u32, &'static str) {
    for number in 0..1_000_000 {
        let bytes = next(number);
        if let Err(fatal) = server.receive(&mut BytesMut::from(&bytes[..]), &mut |_| {}) {
            assert_eq!(fatal.code, Code::ENHANCE_YOUR_CALM);
            let goaway = drain(server);
            assert_eq!(goaway[goaway.len() - 4..], fatal.code.0.to_be_bytes());
            return (number, fatal.counter.unwrap());
        }
        assert!(server.memory() < 200_000, "{number}: {}", server.memory());
    }
    panic!("it bore a million");
}

#[test]
fn floods_end_the_connection_with_bounded_memory() {
    let get = block(&super::raw::GET);
    let first = |server: &mut Connection| {
        feed(server, &headers(1, false));
    };
    let id = |number: u32| number * 2 + 1;

    let mut ping = server(Options::default());
    assert_eq!(
        flood(&mut ping, |_| frame(6, 0, 0, &[0; 8])),
        (1000, "outbound_control_flood")
    );
    let mut settings = server(Options::default());
    assert_eq!(
        flood(&mut settings, |_| frame(4, 0, 0, &[0, 4, 0, 1, 0, 0])),
        (1000, "outbound_control_flood")
    );
    // Refused streams cost a RST_STREAM each.
    let mut refused = server(Options {
        max_concurrent_streams: 1,
        ..Options::default()
    });
    assert_eq!(
        flood(&mut refused, |n| headers(id(n), true)),
        (1001, "outbound_control_flood")
    );
    let mut empty = server(Options::default());
    first(&mut empty);
    assert_eq!(
        flood(&mut empty, |_| frame(0, 0, 1, &[])),
        (1, "inbound_empty_frames_flood")
    );
    let mut empty = server(Options::default());
    assert_eq!(
        flood(&mut empty, |n| frame(if n == 0 { 1 } else { 9 }, 1, 1, &[])),
        (2, "inbound_empty_frames_flood")
    );
    let mut continuation = server(Options::default());
    assert_eq!(
        flood(&mut continuation, |n| match n {
            0 => frame(1, 1, 1, &get),
            _ => frame(9, 0, 1, &[0x82]),
        }),
        (65, "header_overflow")
    );
    let mut priority = server(Options::default());
    assert_eq!(
        flood(&mut priority, |_| frame(2, 0, 3, &[0; 5])),
        (100, "inbound_priority_frames_flood")
    );
    let mut updates = server(Options::default());
    first(&mut updates);
    assert_eq!(
        flood(&mut updates, |_| frame(8, 0, 1, &[0, 0, 0, 1])),
        (7, "inbound_window_update_frames_flood")
    );
    let mut reset = server(Options::default());
    assert_eq!(
        flood(&mut reset, |n| [
            headers(id(n), true),
            frame(3, 0, id(n), &8u32.to_be_bytes())
        ]
        .concat()),
        (249, "downstream_rq_too_many_premature_resets")
    );
}

#[test]
fn resets_of_old_or_answered_streams_are_no_flood() {
    for old in [true, false] {
        let mut server = server(Options::default());
        for number in 0..2000u32 {
            let id = number * 2 + 1;
            server.set_time(std::time::Duration::from_secs(u64::from(number) * 10));
            let outcome = feed(&mut server, &headers(id, true));
            let [Event::Request { stream, .. }] = outcome.events[..] else {
                panic!("{outcome:?}");
            };
            if old {
                server.set_time(std::time::Duration::from_secs(u64::from(number) * 10 + 2));
            } else {
                server.respond(stream, &response(200, &[]), false).unwrap();
            }
            let outcome = feed(&mut server, &frame(3, 0, id, &[0; 4]));
            assert_eq!(outcome.fatal, None);
        }
    }
}

#[test]
fn heads_that_are_too_large_end_their_stream_only() {
    let many: Vec<(String, String)> = (0..97).map(|n| (format!("x-{n}"), String::new())).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    let outcome = feed(
        &mut server(Options::default()),
        &[
            frame(1, 5, 1, &get_and(&many[..96])),
            frame(1, 5, 3, &get_and(&many)),
        ]
        .concat(),
    );
    assert!(matches!(
        outcome.events[..],
        [
            Event::Request { .. },
            Event::Malformed {
                details: "http2.too_many_headers"
            }
        ]
    ));
    assert_eq!(outcome.resets(), [(3, Code::INTERNAL_ERROR)]);
    assert_eq!(outcome.fatal, None);
}

#[test]
fn a_bomb_is_counted_and_not_stored() {
    let mut server = server(Options::default());
    // One entry of 3000 bytes, then a reference to it per byte: 16 KiB that stand for 48 MB.
    let value = "v".repeat(3000);
    let mut bomb = super::raw::block(&super::raw::GET);
    bomb.push(0x40);
    bomb.extend(&super::raw::block(&[("x", &value)])[1..]);
    bomb.resize(16_000, 0xbe);
    let before = server.memory();
    let outcome = feed(
        &mut server,
        &[
            frame(1, END_HEADERS | 1, 1, &bomb),
            frame(1, 5, 3, &get_and(&[])),
        ]
        .concat(),
    );
    assert!(matches!(
        outcome.events[..],
        [
            Event::Malformed {
                details: "http2.header_list_size_too_large"
            },
            Event::Request { .. }
        ]
    ));
    assert_eq!(outcome.resets(), [(1, Code::INTERNAL_ERROR)]);
    // The table holds the entry; what follows still decodes.
    assert!(server.memory() < before + 10_000);
}

#[test]
fn windows_hold_a_peer_that_does_not_stop() {
    let options = Options {
        initial_stream_window_size: 65_535,
        initial_connection_window_size: 100_000,
        ..Options::default()
    };
    let data = |id| frame(0, 0, id, &[0; 16_384]);
    let mut stream = server(options.clone());
    let outcome = feed(
        &mut stream,
        &[headers(1, false), data(1), data(1), data(1), data(1)].concat(),
    );
    assert_eq!(outcome.resets(), [(1, Code::FLOW_CONTROL_ERROR)]);
    assert_eq!(outcome.fatal, None);
    let mut connection = server(options);
    let mut bytes = Vec::new();
    for id in [1, 3, 5] {
        bytes.extend([headers(id, false), data(id), data(id), data(id)].concat());
    }
    let outcome = feed(&mut connection, &bytes);
    assert_eq!(outcome.goaway(), Some(Code::FLOW_CONTROL_ERROR));
}
