//! A server that keeps what it is sent: over HTTP/1.1, or gRPC.

use std::{convert::Infallible, future::Future, net::SocketAddr, sync::Arc};

use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::{
    HeaderMap, Request, Response,
    body::{Bytes, Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

/// A request as it came in.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Received {
    /// The message of a unary gRPC call.
    pub(crate) fn message<M: prost::Message + Default>(&self) -> M {
        assert_eq!(self.headers["content-type"], "application/grpc");
        let (head, message) = self.body.split_at(5);
        assert_eq!(head[0], 0, "not compressed");
        assert_eq!(
            u32::from_be_bytes(head[1..].try_into().unwrap()) as usize,
            message.len()
        );
        M::decode(message).unwrap()
    }
}

/// Listens, tells what comes in, and answers with what `status` makes of it: an HTTP status over HTTP/1.1, over
/// gRPC a gRPC status.
pub(crate) async fn listen(
    status: impl Fn(&Received) -> u16 + Send + Sync + 'static,
) -> (SocketAddr, mpsc::UnboundedReceiver<Received>) {
    listen_and_say(move |received| (status(received), Vec::new())).await
}

/// As [`listen`], with something to say: a body, or a message.
pub(crate) async fn listen_and_say(
    status: impl Fn(&Received) -> (u16, Vec<u8>) + Send + Sync + 'static,
) -> (SocketAddr, mpsc::UnboundedReceiver<Received>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let plain = |stream| async { Some(stream) };
    (address, serve(listener, plain, status))
}

/// As [`listen_and_say`], on a port that is bound already. `open` makes of a connection what is spoken over;
/// `None`: the peer does not come in.
pub(crate) fn serve<S, F>(
    listener: TcpListener,
    open: impl Fn(TcpStream) -> F + Send + Sync + 'static,
    status: impl Fn(&Received) -> (u16, Vec<u8>) + Send + Sync + 'static,
) -> mpsc::UnboundedReceiver<Received>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = Option<S>> + Send + 'static,
{
    let (sender, receiver) = mpsc::unbounded_channel();
    let status = Arc::new(status);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (sender, status) = (sender.clone(), Arc::clone(&status));
            let service = service_fn(move |request: Request<Incoming>| {
                let (sender, status) = (sender.clone(), Arc::clone(&status));
                async move {
                    let (head, body) = request.into_parts();
                    let received = Received {
                        path: head.uri.path().to_owned(),
                        headers: head.headers,
                        body: body.collect().await.unwrap().to_bytes(),
                    };
                    let (code, said) = status(&received);
                    // The test may be over.
                    let _over = sender.send(received);
                    Ok::<_, Infallible>(match head.version {
                        http::Version::HTTP_2 => grpc(code, &said),
                        _ => Response::builder()
                            .status(code)
                            .body(Full::new(Bytes::from(said)).boxed())
                            .unwrap(),
                    })
                }
            });
            let stream = open(stream);
            tokio::spawn(async move {
                let Some(stream) = stream.await else {
                    return;
                };
                let server = auto::Builder::new(TokioExecutor::new());
                // A client that goes away is no matter.
                let io = TokioIo::new(stream);
                let _gone = server.serve_connection(io, service).await;
            });
        }
    });
    receiver
}

type Body = http_body_util::combinators::BoxBody<Bytes, Infallible>;

/// A message, and the status in trailers.
fn grpc(status: u16, message: &[u8]) -> Response<Body> {
    let mut frame = vec![0];
    frame.extend((message.len() as u32).to_be_bytes());
    frame.extend(message);
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", status.to_string().parse().unwrap());
    let frames = [
        Ok(Frame::data(Bytes::from(frame))),
        Ok(Frame::trailers(trailers)),
    ];
    let body = StreamBody::new(tokio_stream::iter(frames));
    Response::builder()
        .header("content-type", "application/grpc")
        .body(body.boxed())
        .unwrap()
}
