//! An upgraded stream: bytes both ways, from and to bodies.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::BytesMut;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
};

use crate::body::{Body, BodyError, Frame, Source};

/// Pieces read ahead of the downstream.
const QUEUE: usize = 4;
const PIECE: usize = 16 * 1024;

/// Sends what `downstream` yields over the upgraded connection; the body that is returned yields what
/// comes back. Dropping it ends the tunnel.
pub(super) fn open<H: 'static>(upgrade: OnUpgrade, mut downstream: Body, held: H) -> Body {
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::task::spawn_local(async move {
        let _held = held;
        let upgraded = match upgrade.await {
            Ok(upgraded) => upgraded,
            Err(_) => {
                // If the receiver is gone there is nobody to tell.
                drop(sender.send(Err(BodyError::Disconnected)).await);
                return;
            }
        };
        let (mut reader, mut writer) = tokio::io::split(TokioIo::new(upgraded));
        let up = async {
            while let Some(Ok(frame)) = downstream.frame().await {
                if let Frame::Data(data) = frame
                    && (writer.write_all(&data).await.is_err() || writer.flush().await.is_err())
                {
                    return;
                }
            }
            // The other direction may go on; a failure shows there.
            drop(writer.shutdown().await);
        };
        let down = async {
            loop {
                let mut buffer = BytesMut::with_capacity(PIECE);
                let piece = match reader.read_buf(&mut buffer).await {
                    Ok(0) => return,
                    Ok(_) => Ok(buffer.freeze()),
                    Err(_) => Err(BodyError::Disconnected),
                };
                let failed = piece.is_err();
                if sender.send(piece).await.is_err() || failed {
                    return;
                }
            }
        };
        // The end of the response ends the tunnel; the end of the request only half of it.
        tokio::select! {
            () = down => {}
            () = sender.closed() => {}
            () = async { up.await; std::future::pending().await } => {}
        }
    });
    Body::stream(Received(receiver))
}

struct Received(mpsc::Receiver<Result<bytes::Bytes, BodyError>>);

impl Source for Received {
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        self.get_mut()
            .0
            .poll_recv(cx)
            .map(|received| received.map(|piece| piece.map(Frame::Data)))
    }
}
