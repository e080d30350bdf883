//! Our HTTP/2 against hyper's, as client and as server, over a pipe.
#![cfg(test)]

use std::{
    collections::HashMap,
    convert::Infallible,
    io::IoSlice,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request, Response, body::Frame, client::conn::http2 as client, header::HeaderMap,
    server::conn::http2 as server, service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lateen_codec::{
    h2::{Connection, Event, Options, Role, StreamId},
    head::{Headers, Known, Name, Protocol, RequestHead, ResponseHead},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

/// Sizes of bodies: none, small ones that are copied, and more than the default windows.
const SIZES: [usize; 6] = [0, 1, 2000, 16_384, 100_000, 1_000_000];

fn options() -> Arc<Options> {
    Arc::new(Options {
        initial_stream_window_size: 65_535,
        initial_connection_window_size: 65_535,
        ..Options::default()
    })
}

fn body(size: usize) -> Bytes {
    (0..size).map(|n| (n * 7 % 251) as u8).collect()
}

/// Reads, dispatches and writes until `handle` says that it is done or the peer leaves.
async fn drive(
    io: &mut DuplexStream,
    connection: &mut Connection,
    mut handle: impl FnMut(&mut Connection, Event) -> bool,
) {
    let mut input = BytesMut::new();
    loop {
        loop {
            let mut slices = [IoSlice::new(&[]); 32];
            let filled = connection.output(&mut slices);
            if filled == 0 {
                break;
            }
            let bytes: Vec<u8> = slices[..filled].iter().flat_map(|s| s.to_vec()).collect();
            if io.write_all(&bytes).await.is_err() {
                return;
            }
            connection.advance(bytes.len());
        }
        if !matches!(io.read_buf(&mut input).await, Ok(1..)) {
            return;
        }
        let mut events = Vec::new();
        connection
            .receive(&mut input, &mut |event| events.push(event))
            .unwrap();
        for event in events {
            if handle(connection, event) {
                return;
            }
        }
    }
}

/// Answers with the body that came, and trailers.
fn echo(connection: &mut Connection, event: Event) {
    let mut trailers = Headers::default();
    trailers.append(Known::GrpcStatus, "0");
    match event {
        Event::Request { stream, head, end } => {
            assert_eq!(head.authority, "a.test");
            assert_eq!(head.headers.get(&Name::new("x-request")), Some(&b"1"[..]));
            let mut headers = Headers::default();
            headers.append(Name::new("x-path"), &head.path);
            let head = ResponseHead {
                status: 200,
                headers,
            };
            connection.respond(stream, &head, false).unwrap();
            if end {
                connection.send_trailers(stream, &trailers).unwrap();
            }
        }
        Event::Data { stream, data, end } => {
            connection.consumed(stream, data.len());
            connection.send_data(stream, data, false).unwrap();
            if end {
                connection.send_trailers(stream, &trailers).unwrap();
            }
        }
        Event::Reset { .. } | Event::Malformed { .. } => panic!("{event:?}"),
        _ => {}
    }
}

#[tokio::test]
async fn hyper_as_client() {
    let (ours, theirs) = tokio::io::duplex(20_000);
    let run = tokio::spawn(async move {
        let mut ours = ours;
        let mut connection = Connection::new(Role::Server, options());
        drive(&mut ours, &mut connection, |connection, event| {
            echo(connection, event);
            false
        })
        .await;
        assert_eq!(connection.streams(), 0);
    });
    let (send, connection) = client::handshake(TokioExecutor::new(), TokioIo::new(theirs))
        .await
        .unwrap();
    let driver = tokio::spawn(connection);
    let mut requests = Vec::new();
    for number in 0..60 {
        let size = SIZES[number % SIZES.len()];
        let mut send = send.clone();
        requests.push(tokio::spawn(async move {
            let request = Request::post(format!("http://a.test/{number}"))
                .header("x-request", "1")
                .header("x-number", number.to_string())
                .body(Full::new(body(size)))
                .unwrap();
            let response = send.send_request(request).await.unwrap();
            assert_eq!(response.headers()["x-path"], format!("/{number}"));
            let got = response.into_body().collect().await.unwrap();
            assert_eq!(got.trailers().unwrap()["grpc-status"], "0");
            assert!(got.to_bytes() == body(size), "{number}");
        }));
    }
    for request in requests {
        request.await.unwrap();
    }
    drop(send);
    driver.await.unwrap().unwrap();
    run.await.unwrap();
}

async fn answer(request: Request<hyper::body::Incoming>) -> Result<Response<Frames>, Infallible> {
    let path = request.uri().path().to_owned();
    assert_eq!(request.uri().authority().unwrap(), "a.test");
    let got = request.into_body().collect().await.unwrap();
    let sent = got.trailers().cloned();
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sent", sent.unwrap()["x-trailer"].clone());
    let mut frames = vec![Frame::data(got.to_bytes()), Frame::trailers(trailers)];
    // hyper would send an empty frame, and several in a row are a flood by Envoy's default.
    frames.retain(|frame| frame.data_ref().is_none_or(|data| !data.is_empty()));
    Ok(Response::builder()
        .header("x-path", path)
        .body(Frames(frames.into_iter()))
        .unwrap())
}

/// A body of frames that are there already.
struct Frames(std::vec::IntoIter<Frame<Bytes>>);

impl hyper::body::Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.next().map(Ok))
    }
}

#[tokio::test]
async fn hyper_as_server() {
    let (mut ours, theirs) = tokio::io::duplex(20_000);
    let serve = tokio::spawn(
        server::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(theirs), service_fn(answer)),
    );
    let mut connection = Connection::new(Role::Client, options());
    let mut trailers = Headers::default();
    trailers.append(Name::new("x-trailer"), "t");
    let mut open: HashMap<StreamId, (usize, Vec<u8>)> = HashMap::new();
    for number in 0..60 {
        let head = RequestHead {
            method: "POST".into(),
            scheme: "http".into(),
            authority: "a.test".into(),
            path: format!("/{number}").into(),
            protocol: Protocol::Http2,
            headers: Headers::default(),
        };
        let stream = connection.open(&head, false).unwrap();
        let size = SIZES[number % SIZES.len()];
        connection.send_data(stream, body(size), false).unwrap();
        connection.send_trailers(stream, &trailers).unwrap();
        open.insert(stream, (number, Vec::new()));
    }
    drive(&mut ours, &mut connection, |connection, event| {
        match event {
            Event::Response { stream, head, .. } => {
                let path = format!("/{}", open[&stream].0);
                assert_eq!(
                    head.headers.get(&Name::new("x-path")),
                    Some(path.as_bytes())
                );
            }
            Event::Data { stream, data, .. } => {
                connection.consumed(stream, data.len());
                open.get_mut(&stream).unwrap().1.extend_from_slice(&data);
            }
            Event::Trailers { stream, trailers } => {
                assert_eq!(trailers.get(&Name::new("x-sent")), Some(&b"t"[..]));
                let (number, got) = open.remove(&stream).unwrap();
                assert!(got == body(SIZES[number % SIZES.len()]), "{number}");
            }
            Event::Reset { .. } => panic!("{event:?}"),
            _ => {}
        }
        open.is_empty()
    })
    .await;
    assert!(open.is_empty());
    assert_eq!(connection.streams(), 0);
    drop(ours);
    serve.await.unwrap().unwrap_or_default();
}
