//! A server connection: what a client sends, in pieces of any size, while the server answers.
#![no_main]

use std::{io::IoSlice, sync::Arc};

use bytes::{Bytes, BytesMut};
use lateen_codec::{
    h2::{Code, Connection, Event, Options, Role},
    head::{Headers, Known, ResponseHead},
};
use libfuzzer_sys::fuzz_target;

fn write(connection: &mut Connection, most: usize) {
    let mut slices = [IoSlice::new(&[]); 8];
    let filled = connection.output(&mut slices);
    let all: usize = slices[..filled].iter().map(|slice| slice.len()).sum();
    connection.advance(all.min(most));
}

fuzz_target!(|data: &[u8]| {
    let Some(([step, how], frames)) = data.split_first_chunk::<2>() else {
        return;
    };
    let options = Options {
        initial_stream_window_size: 65_535,
        initial_connection_window_size: 65_535,
        max_concurrent_streams: 8,
        allow_connect: how & 1 != 0,
        stream_error_on_invalid_http_messaging: how & 2 != 0,
        ..Options::default()
    };
    let mut server = Connection::new(Role::Server, Arc::new(options));
    let mut input = BytesMut::from(&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"[..]);
    let mut trailers = Headers::default();
    trailers.append(Known::GrpcStatus, "0");
    for piece in frames.chunks(usize::from(*step) + 1) {
        input.extend_from_slice(piece);
        let mut events = Vec::new();
        if server.receive(&mut input, &mut |event| events.push(event)).is_err() {
            // What was under way goes out before the GOAWAY, a few slices at a time.
            while server.has_output() {
                write(&mut server, usize::MAX);
            }
            assert!(server.is_done());
            return;
        }
        assert!(input.len() <= 16_384 + 9);
        assert!(server.streams() <= 8);
        for event in events {
            match event {
                Event::Request { stream, end, .. } => {
                    let head = ResponseHead {
                        status: 200,
                        headers: Headers::default(),
                    };
                    let bodiless = stream.number() % 8 == 1;
                    let _ = server.respond(stream, &head, bodiless);
                    if how & 4 != 0 {
                        let _ = server.send_data(stream, Bytes::from(vec![0; 20_000]), !end);
                        let _ = server.send_trailers(stream, &trailers);
                    }
                    if stream.number() % 8 == 3 {
                        server.stop_receiving(stream);
                    }
                }
                Event::Data { stream, data, end } => {
                    if how & 16 == 0 {
                        server.consumed(stream, data.len());
                    }
                    let room = server.send_capacity(stream);
                    let _ = server.send_data(stream, data.slice(..data.len().min(room)), end);
                }
                Event::Trailers { stream, .. } => server.reset(stream, Code::CANCEL),
                _ => {}
            }
        }
        write(&mut server, if how & 8 != 0 { 10 } else { usize::MAX });
        while server.next_writable().is_some() {}
    }
});
