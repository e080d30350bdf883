//! A client connection: what a server sends in answer to a few requests, whole and in pieces.
#![no_main]

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use lateen_codec::{
    h2::{Connection, Event, Fatal, Options, Role},
    head::{Headers, Protocol, RequestHead},
};
use libfuzzer_sys::fuzz_target;

/// Events, with pieces of bodies joined: they may follow the reads.
fn run(frames: &[u8], step: usize) -> (Vec<Event>, Option<Fatal>) {
    let mut client = Connection::new(Role::Client, Arc::new(Options::default()));
    let mut input = BytesMut::from(&b"\0\0\0\x04\0\0\0\0\0"[..]);
    for method in ["GET", "HEAD", "POST", "CONNECT"] {
        let head = RequestHead {
            method: method.into(),
            scheme: "http".into(),
            authority: "a".into(),
            path: "/".into(),
            protocol: Protocol::Http2,
            headers: Headers::default(),
        };
        if let Ok(stream) = client.open(&head, method == "GET") {
            let _ = client.send_data(stream, Bytes::from(vec![0; 100_000]), method == "HEAD");
        }
    }
    let mut events: Vec<Event> = Vec::new();
    for piece in frames.chunks(step) {
        input.extend_from_slice(piece);
        let result = client.receive(&mut input, &mut |event| {
            if let (
                Some(Event::Data { stream: before, data: head, end: last }),
                Event::Data { stream, data, end },
            ) = (events.last_mut(), &event)
                && before == stream
            {
                *head = [&head[..], data].concat().into();
                *last = *end;
            } else {
                events.push(event);
            }
        });
        if let Err(fatal) = result {
            return (events, Some(fatal));
        }
        assert!(input.len() <= 16_384 + 9);
    }
    (events, None)
}

fuzz_target!(|data: &[u8]| {
    let Some((step, frames)) = data.split_first() else {
        return;
    };
    assert_eq!(run(frames, usize::from(*step) + 1), run(frames, usize::MAX));
});
