//! Reading a request's body before it goes on, for filters that judge it or bound it. What was read goes
//! back in front of the rest, so that the upstream sees the body as it was sent.

use std::{
    cell::RefCell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};

use crate::{
    body::{Body, BodyError, Frame, Source},
    head::Headers,
    info::ResponseFlags,
    reject::Reject,
};

/// The beginning of a body, or all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gathered {
    /// What came; may be more than the limit by the rest of one piece.
    pub(super) data: Bytes,
    /// Whether the body ended within the limit.
    pub(super) whole: bool,
}

/// Reads until the body ends or more than `limit` bytes have come; leaves the body as it was.
///
/// # Errors
/// What broke the body off; the body is gone then.
pub(super) async fn read(body: &mut Body, limit: usize) -> Result<Gathered, BodyError> {
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    let mut trailers = None;
    let mut whole = true;
    while !body.is_end_stream() {
        match body.frame().await {
            None => break,
            Some(Err(error)) => return Err(error),
            Some(Ok(Frame::Trailers(all))) => {
                trailers = Some(all);
                break;
            }
            // One piece is kept as it is; further ones are joined to it.
            Some(Ok(Frame::Data(data))) if first.is_empty() && rest.is_empty() => first = data,
            Some(Ok(Frame::Data(data))) => {
                if rest.is_empty() {
                    rest.extend_from_slice(&first);
                }
                rest.extend_from_slice(&data);
            }
        }
        if first.len().max(rest.len()) > limit {
            whole = false;
            break;
        }
    }
    let data = if rest.is_empty() {
        first
    } else {
        rest.freeze()
    };
    let left = std::mem::take(body);
    *body = if whole && trailers.is_none() {
        Body::full(data.clone())
    } else {
        Body::stream(Again {
            data: data.clone(),
            rest: left,
            trailers,
        })
    };
    Ok(Gathered { data, whole })
}

/// Takes all of a body, with its trailers.
///
/// # Errors
/// [`BodyError::TooLarge`] beyond `limit` bytes, or what broke the body off.
pub(super) async fn take(
    body: &mut Body,
    limit: usize,
) -> Result<(Bytes, Option<Headers>), BodyError> {
    let mut body = std::mem::take(body);
    let mut data = BytesMut::new();
    while let Some(frame) = body.frame().await {
        match frame? {
            Frame::Data(piece) if data.len() + piece.len() > limit => {
                return Err(BodyError::TooLarge);
            }
            Frame::Data(piece) => data.extend_from_slice(&piece),
            Frame::Trailers(trailers) => return Ok((data.freeze(), Some(trailers))),
        }
    }
    Ok((data.freeze(), None))
}

/// A body that breaks off at once.
pub(super) fn failing(error: BodyError) -> Body {
    struct Failing(Option<BodyError>);
    impl Source for Failing {
        fn poll_frame(
            mut self: Pin<&mut Self>,
            _cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame, BodyError>>> {
            Poll::Ready(self.0.take().map(Err))
        }
    }
    Body::stream(Failing(Some(error)))
}

/// A body of these bytes and trailers; the trailers may be changed until they are taken.
pub(super) fn with_trailers(data: Bytes, trailers: Option<Rc<RefCell<Headers>>>) -> Body {
    struct Then {
        data: Bytes,
        trailers: Option<Rc<RefCell<Headers>>>,
    }
    impl Source for Then {
        fn poll_frame(
            mut self: Pin<&mut Self>,
            _cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame, BodyError>>> {
            if !self.data.is_empty() {
                return Poll::Ready(Some(Ok(Frame::Data(std::mem::take(&mut self.data)))));
            }
            let trailers = self.trailers.take().map(|trailers| trailers.take());
            Poll::Ready(trailers.map(|trailers| Ok(Frame::Trailers(trailers))))
        }

        fn is_end_stream(&self) -> bool {
            self.data.is_empty() && self.trailers.is_none()
        }
    }
    match trailers {
        None if data.is_empty() => Body::empty(),
        None => Body::full(data),
        trailers => Body::stream(Then { data, trailers }),
    }
}

/// 413, as Envoy answers when a body does not fit.
pub(super) fn too_large() -> Reject {
    Reject::new(
        413,
        "Payload Too Large",
        ResponseFlags::default(),
        "request_payload_too_large",
    )
}

/// The answer nobody will see: the client went away, or broke the body off.
pub(super) fn broken(error: &BodyError) -> Reject {
    tracing::debug!(%error, "the request's body broke off before it was read");
    Reject::new(
        400,
        "",
        ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION,
        "request_body_broke_off",
    )
}

/// What was read, then the rest.
struct Again {
    data: Bytes,
    rest: Body,
    trailers: Option<Headers>,
}

impl Source for Again {
    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        if !self.data.is_empty() {
            let data = std::mem::take(&mut self.data);
            return Poll::Ready(Some(Ok(Frame::Data(data))));
        }
        match self.trailers.take() {
            Some(trailers) => Poll::Ready(Some(Ok(Frame::Trailers(trailers)))),
            None => self.rest.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.data.is_empty() && self.trailers.is_none() && self.rest.is_end_stream()
    }

    fn exact_length(&self) -> Option<u64> {
        let rest = self.rest.exact_length()?;
        Some(rest + self.data.len() as u64)
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    struct Pieces<F>(F);

    impl<F: FnMut() -> Option<Frame> + Unpin> Source for Pieces<F> {
        fn poll_frame(
            mut self: Pin<&mut Self>,
            _cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame, BodyError>>> {
            Poll::Ready((self.0)().map(Ok))
        }
    }

    /// A body of what `next` gives.
    pub(in crate::filter) fn pieces(next: impl FnMut() -> Option<Frame> + Unpin + 'static) -> Body {
        Body::stream(Pieces(next))
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::head::Name;

    fn body(pieces: &[&'static str], trailers: Option<Headers>) -> Body {
        let data = pieces.iter().map(|piece| Frame::Data((*piece).into()));
        let all: Vec<_> = data.chain(trailers.map(Frame::Trailers)).collect();
        let mut all = all.into_iter();
        testing::pieces(move || all.next())
    }

    async fn drain(mut body: Body) -> (Vec<u8>, Option<Headers>) {
        let (mut data, mut trailers) = (Vec::new(), None);
        while let Some(frame) = body.frame().await {
            match frame.unwrap() {
                Frame::Data(piece) => data.extend_from_slice(&piece),
                Frame::Trailers(all) => trailers = Some(all),
            }
        }
        (data, trailers)
    }

    #[tokio::test]
    async fn what_was_read_is_still_there() {
        let mut end = Headers::default();
        end.append(Name::new("x-end"), "1");
        for (pieces, trailers, limit, read_bytes, whole) in [
            (&["one"][..], None, 10, "one", true),
            (&["one", "two"], None, 6, "onetwo", true),
            (&["one", "two", "three"], None, 5, "onetwo", false),
            (&[], None, 5, "", true),
            (&["one", "two"], Some(end.clone()), 10, "onetwo", true),
            (&["one", "two"], Some(end.clone()), 2, "one", false),
        ] {
            let mut body = body(pieces, trailers.clone());
            let want = Gathered {
                data: read_bytes.into(),
                whole,
            };
            assert_eq!(read(&mut body, limit).await, Ok(want));
            let all = pieces.concat().into_bytes();
            assert_eq!(drain(body).await, (all, trailers));
        }
    }
}
