//! `istio.mixer.v1.Mixer` on bytes: attributes go straight from the message into bags, without the generated types
//! in between, and calls go by none of tonic's layers. A batch of reports would otherwise cost more to read than to
//! record, and a check more to carry than to decide.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, header::CONTENT_TYPE};
use http_body::{Body, Frame};
use http_body_util::BodyExt as _;
use prost::Message;
use tonic::{Request, Response, Status};

use crate::serve::{MAX_MESSAGE_BYTES, Service};

/// Flag and length before each message.
const PREFIX: usize = 5;
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// A call of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `Check`.
    Check,
    /// `Report`.
    Report,
    /// One that there is not.
    Unknown,
}

impl Call {
    /// The call of this path; `None`: it is of another service.
    pub fn of(path: &str) -> Option<Self> {
        Some(match path.strip_prefix("/istio.mixer.v1.Mixer/")? {
            "Check" => Self::Check,
            "Report" => Self::Report,
            _ => Self::Unknown,
        })
    }
}

/// What a call is answered.
#[derive(Debug)]
pub enum Answer {
    /// One message, and that all is well.
    Message(Option<Bytes>, Option<HeaderMap>),
    /// Nothing: the status is among the headers.
    Refused,
    /// Of another service.
    Routed(tonic::body::Body),
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match &mut *self {
            Self::Message(message, trailers) => {
                let frame = message.take().map(Frame::data);
                let frame = frame.or_else(|| trailers.take().map(Frame::trailers));
                Poll::Ready(frame.map(Ok))
            }
            Self::Refused => Poll::Ready(None),
            Self::Routed(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Message(message, trailers) => message.is_none() && trailers.is_none(),
            Self::Refused => true,
            Self::Routed(body) => body.is_end_stream(),
        }
    }
}

/// Answers one call.
pub async fn answer<B>(
    call: Call,
    service: Service,
    request: http::Request<B>,
) -> http::Response<Answer>
where
    B: Body<Data = Bytes, Error: std::fmt::Display> + Unpin,
{
    let path = match call {
        Call::Unknown => request.uri().path().to_owned(),
        Call::Check | Call::Report => String::new(),
    };
    let (head, body) = request.into_parts();
    let answer = match (call, message(body).await) {
        (Call::Unknown, _) => Err(Status::unimplemented(format!("there is no {path}"))),
        (_, Err(status)) => Err(status),
        (Call::Check, Ok(message)) => {
            let request = Request::from_http(http::Request::from_parts(head, message));
            service.check(request).await.map(encode)
        }
        (Call::Report, Ok(message)) => {
            let request = Request::from_http(http::Request::from_parts(head, message));
            service.report(request).await.map(encode)
        }
    };
    answer.unwrap_or_else(|status| status.into_http::<()>().map(|()| Answer::Refused))
}

/// The one message of a request.
async fn message<B>(mut body: B) -> Result<Bytes, Status>
where
    B: Body<Data = Bytes, Error: std::fmt::Display> + Unpin,
{
    let mut whole = Whole::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Status::cancelled(error.to_string()))?;
        if let Ok(piece) = frame.into_data() {
            whole.add(piece)?;
        }
    }
    whole.finish()
}

/// A message with its prefix, as far as it has come.
#[derive(Debug, Default)]
struct Whole {
    /// Most messages come in one piece, which is not copied.
    first: Bytes,
    rest: BytesMut,
}

impl Whole {
    /// # Errors
    /// It is more than one message, or more than is read. Judged as the bytes come: no more of it is kept.
    fn add(&mut self, piece: Bytes) -> Result<(), Status> {
        if self.first.is_empty() && self.rest.is_empty() {
            self.first = piece;
        } else {
            if self.rest.is_empty() {
                self.rest.reserve(self.first.len() + piece.len());
                self.rest.put(std::mem::take(&mut self.first));
            }
            self.rest.put(piece);
        }
        let bytes = self.bytes();
        let Some((prefix, message)) = bytes.split_first_chunk::<PREFIX>() else {
            return Ok(());
        };
        let [flag, length @ ..] = *prefix;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if flag != 0 {
            return Err(Status::unimplemented(
                "the message is compressed; send it as it is (grpc-encoding: identity)",
            ));
        }
        if length > MAX_MESSAGE_BYTES {
            return Err(Status::out_of_range(format!(
                "a message of {length} bytes is more than {MAX_MESSAGE_BYTES}"
            )));
        }
        if message.len() > length {
            return Err(Status::internal("more than one message"));
        }
        Ok(())
    }

    fn bytes(&self) -> &[u8] {
        if self.rest.is_empty() {
            &self.first
        } else {
            &self.rest
        }
    }

    /// # Errors
    /// It ended before its end.
    fn finish(self) -> Result<Bytes, Status> {
        let Some((prefix, message)) = self.bytes().split_first_chunk::<PREFIX>() else {
            return Err(Status::internal("there is no message"));
        };
        let [_, length @ ..] = *prefix;
        if usize::try_from(u32::from_be_bytes(length)) != Ok(message.len()) {
            return Err(Status::internal("the message ends too early"));
        }
        let mut whole = if self.rest.is_empty() {
            self.first
        } else {
            self.rest.freeze()
        };
        whole.advance(PREFIX);
        Ok(whole)
    }
}

fn encode<T: Message>(answer: Response<T>) -> http::Response<Answer> {
    let (metadata, message, extensions) = answer.into_parts();
    let length = message.encoded_len();
    let mut bytes = BytesMut::with_capacity(PREFIX + length);
    bytes.put_u8(0);
    // An answer of 4 GiB does not fit in memory, and a buffer that grows takes any message.
    bytes.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    message.encode_raw(&mut bytes);
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(Status::GRPC_STATUS, HeaderValue::from_static("0"));
    let answer = Answer::Message(Some(bytes.freeze()), Some(trailers));
    let mut response = http::Response::new(answer);
    *response.headers_mut() = metadata.into_headers();
    response.headers_mut().insert(CONTENT_TYPE, GRPC);
    *response.extensions_mut() = extensions;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: &[&[u8]]) -> Result<Vec<u8>, (tonic::Code, String)> {
        let mut whole = Whole::default();
        let mut all = || {
            for piece in pieces {
                whole.add(Bytes::copy_from_slice(piece))?;
            }
            std::mem::take(&mut whole).finish()
        };
        let told = |status: Status| (status.code(), status.message().to_owned());
        all().map(|message| message.to_vec()).map_err(told)
    }

    #[test]
    fn one_message_is_read_however_it_is_cut() {
        let message = [0, 0, 0, 0, 3, 7, 8, 9];
        for cut in 0..=message.len() {
            let (a, b) = message.split_at(cut);
            assert_eq!(read(&[a, b]).unwrap(), [7, 8, 9], "{cut}");
        }
        let bytes: Vec<&[u8]> = message.chunks(1).collect();
        assert_eq!(read(&bytes).unwrap(), [7, 8, 9]);
        assert_eq!(read(&[&[0; 5]]).unwrap(), Vec::<u8>::new());
    }

    #[test]
    fn what_is_no_message_is_refused() {
        use tonic::Code::{Internal, OutOfRange, Unimplemented};
        let too_long = u32::try_from(MAX_MESSAGE_BYTES + 1).unwrap().to_be_bytes();
        let too_long = [&[0][..], &too_long].concat();
        let cases: [(&[&[u8]], tonic::Code); 6] = [
            (&[], Internal),
            (&[&[0, 0, 0]], Internal),
            (&[&[0, 0, 0, 0, 3, 1, 2]], Internal),
            (&[&[0, 0, 0, 0, 1, 1], &[0, 0, 0, 0, 0]], Internal),
            (&[&[1, 0, 0, 0, 0]], Unimplemented),
            (&[&too_long], OutOfRange),
        ];
        for (pieces, code) in cases {
            assert_eq!(read(pieces).unwrap_err().0, code, "{pieces:?}");
        }
    }

    #[test]
    fn calls_are_known_by_their_path() {
        let call = |path| Call::of(path);
        assert_eq!(call("/istio.mixer.v1.Mixer/Check"), Some(Call::Check));
        assert_eq!(call("/istio.mixer.v1.Mixer/Report"), Some(Call::Report));
        assert_eq!(call("/istio.mixer.v1.Mixer/Other"), Some(Call::Unknown));
        assert_eq!(call("/istio.mixer.v1.Mixers/Check"), None);
        assert_eq!(call("/"), None);
    }
}
