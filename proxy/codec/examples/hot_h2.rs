//! What one request costs the HTTP/2 codec: a client, a proxy (a server and a client) and a server of ours
//! exchange requests in memory. `valgrind --tool=callgrind target/release/examples/hot_h2 get 10000`;
//! subtract a run with 0 requests and halve: half of the codec's work is the peers'.

use std::{io::IoSlice, sync::Arc};

use bytes::{Bytes, BytesMut};
use lateen_codec::{
    h2::{Connection, Event, Options, Role},
    head::{Headers, Known, Name, Protocol, RequestHead, ResponseHead},
};

fn transfer(
    from: &mut Connection,
    to: &mut Connection,
    wire: &mut BytesMut,
    events: &mut Vec<Event>,
) {
    loop {
        let mut slices = [IoSlice::new(&[]); 16];
        let filled = from.output(&mut slices);
        if filled == 0 {
            break;
        }
        let mut len = 0;
        for slice in slices.iter().take(filled) {
            wire.extend_from_slice(slice);
            len += slice.len();
        }
        from.advance(len);
    }
    if let Err(fatal) = to.receive(wire, &mut |event| events.push(event)) {
        eprintln!("{fatal}");
        std::process::exit(1);
    }
}

fn request(grpc: bool) -> RequestHead {
    let mut headers = Headers::default();
    if grpc {
        headers.append(Known::ContentType, "application/grpc");
        headers.append(Known::Te, "trailers");
        headers.append(Known::UserAgent, "grpc-rust/0.14");
        headers.append(Known::GrpcTimeout, "9999m");
    } else {
        headers.append(Known::UserAgent, "load/1.0");
        headers.append(Known::Accept, "*/*");
    }
    RequestHead {
        method: if grpc { "POST" } else { "GET" }.into(),
        scheme: "http".into(),
        authority: "service.example:8080".into(),
        path: if grpc {
            "/pkg.Service/Method"
        } else {
            "/some/path?query=1"
        }
        .into(),
        protocol: Protocol::Http2,
        headers,
    }
}

fn response(grpc: bool) -> ResponseHead {
    let mut headers = Headers::default();
    if grpc {
        headers.append(Known::ContentType, "application/grpc");
    } else {
        headers.append(Known::ContentType, "text/plain");
        headers.append(Known::ContentLength, "128");
        headers.append(Known::Date, "Tue, 24 Nov 2026 20:00:00 GMT");
    }
    ResponseHead {
        status: 200,
        headers,
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    let grpc = args.next().as_deref() == Some("grpc");
    let requests: usize = args.next().and_then(|n| n.parse().ok()).unwrap_or(10_000);
    let options = Arc::new(Options::default());
    let connection = |role| Connection::new(role, Arc::clone(&options));
    let mut client = connection(Role::Client);
    let mut down = connection(Role::Server);
    let mut up = connection(Role::Client);
    let mut server = connection(Role::Server);
    let mut wire = BytesMut::with_capacity(64 << 10);
    let mut events = Vec::new();
    for _ in 0..2 {
        transfer(&mut client, &mut down, &mut wire, &mut events);
        transfer(&mut down, &mut client, &mut wire, &mut events);
        transfer(&mut up, &mut server, &mut wire, &mut events);
        transfer(&mut server, &mut up, &mut wire, &mut events);
    }
    events.clear();
    let (ask, answer) = (request(grpc), response(grpc));
    let message = Bytes::from_static(&[7; 64]);
    let body = Bytes::from_static(&[7; 128]);
    let mut trailers = Headers::default();
    trailers.append(Known::GrpcStatus, "0");
    trailers.append(Known::GrpcMessage, "");
    let start = std::time::Instant::now();
    for number in 0..requests {
        let Ok(stream) = client.open(&ask, !grpc) else {
            return;
        };
        if grpc && client.send_data(stream, message.clone(), true).is_err() {
            return;
        }
        transfer(&mut client, &mut down, &mut wire, &mut events);
        // The proxy.
        let (mut below, mut above) = (None, None);
        for event in events.drain(..) {
            match event {
                Event::Request {
                    stream,
                    mut head,
                    end,
                } => {
                    below = Some(stream);
                    // An ID that is new each time.
                    let id = (number as u64)
                        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                        .to_be_bytes();
                    let mut text = *b"00000000-0000-4000-8000-000000000000";
                    for (at, byte) in id.iter().enumerate() {
                        text[at] = b'a' + byte % 16;
                    }
                    head.headers.append(Known::XRequestId, text);
                    head.headers.append(Known::XForwardedProto, "http");
                    head.headers
                        .append(Known::XEnvoyExpectedRqTimeoutMs, "15000");
                    above = up.open(&head, end).ok();
                }
                Event::Data { stream, data, end } => {
                    down.consumed(stream, data.len());
                    if let Some(above) = above {
                        up.send_data(above, data, end).unwrap_or_default();
                    }
                }
                _ => {}
            }
        }
        transfer(&mut up, &mut server, &mut wire, &mut events);
        for event in events.drain(..) {
            let stream = match event {
                Event::Request {
                    stream, end: true, ..
                } => stream,
                Event::Data {
                    stream,
                    end: true,
                    data,
                } => {
                    server.consumed(stream, data.len());
                    stream
                }
                _ => continue,
            };
            server.respond(stream, &answer, false).unwrap_or_default();
            if grpc {
                server
                    .send_data(stream, message.clone(), false)
                    .unwrap_or_default();
                server.send_trailers(stream, &trailers).unwrap_or_default();
            } else {
                server
                    .send_data(stream, body.clone(), true)
                    .unwrap_or_default();
            }
        }
        transfer(&mut server, &mut up, &mut wire, &mut events);
        let Some(below) = below else { return };
        for event in events.drain(..) {
            match event {
                Event::Response { mut head, end, .. } => {
                    head.headers.append(Known::XEnvoyUpstreamServiceTime, "1");
                    head.headers.set(Name::Known(Known::Server), "envoy");
                    down.respond(below, &head, end).unwrap_or_default();
                }
                Event::Data { stream, data, end } => {
                    up.consumed(stream, data.len());
                    down.send_data(below, data, end).unwrap_or_default();
                }
                Event::Trailers { trailers, .. } => {
                    down.send_trailers(below, &trailers).unwrap_or_default();
                }
                _ => {}
            }
        }
        transfer(&mut down, &mut client, &mut wire, &mut events);
        events.clear();
    }
    let each = start.elapsed() / u32::try_from(requests.max(1)).unwrap_or(1);
    println!(
        "{each:?} a request, both peers and the proxy; open: {}",
        client.streams() + server.streams()
    );
}
