//! Translates gRPC-Web for gRPC upstreams: base64 and the trailers that browsers get in the body. Envoy:
//! `envoy.filters.http.grpc_web`.

use std::{
    collections::HashMap,
    pin::Pin,
    task::{Context, Poll, ready},
};

use arc_swap::ArcSwap;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{Bytes, BytesMut};

use crate::{
    body::{Body, BodyError, Frame, Source},
    filter::{FilterContext, ResponseContext, gather, grpc_stats::split, per_cluster::PerCluster},
    format::grpc_status,
    head::{Headers, Known, Name, RequestHead, ResponseHead},
    info::ResponseFlags,
    reject::{Reject, grpc_status_of, percent_encode_grpc_message},
    router::SharedInfo,
    stats::Scope,
};

/// Content types that make a request gRPC-Web; of the last two the body is base64.
const TYPES: [&[u8]; 4] = [
    b"application/grpc-web",
    b"application/grpc-web+proto",
    b"application/grpc-web-text",
    b"application/grpc-web-text+proto",
];
/// Longest text of an answer that is no gRPC that becomes `grpc-message`. Envoy: `MAX_BUFFERED_PLAINTEXT_LENGTH`.
const MAX_TEXT: usize = 16384;
/// Methods of one cluster that are counted, as clients choose the names.
const MAX_METHODS: usize = 1000;
/// First byte of the frame that holds trailers.
const TRAILERS: u8 = 0x80;

/// The filter of one connection manager.
#[derive(Debug, Default)]
pub struct GrpcWeb {
    clusters: PerCluster<Calls>,
}

/// A request that is gRPC-Web.
#[derive(Debug)]
pub(crate) struct Active {
    /// The client wants base64.
    text: bool,
    counted: Option<Scope>,
}

/// Where the calls of one cluster are counted, by path.
#[derive(Debug)]
struct Calls {
    scope: Scope,
    methods: ArcSwap<HashMap<Box<[u8]>, Scope>>,
}

impl GrpcWeb {
    pub(super) fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
        body: &mut Body,
    ) {
        let kind = |name: Known| {
            let value = head.headers.known(name)?;
            TYPES.iter().position(|known| *known == value)
        };
        let Some(kind_of_body) = kind(Known::ContentType) else {
            return;
        };
        let text = kind(Known::Accept).is_some_and(|kind| kind >= 2);
        head.headers.remove_known(Known::ContentLength);
        head.headers.set(Known::ContentType, "application/grpc");
        head.headers.set(Known::Te, "trailers");
        head.headers
            .set(Name::new("grpc-accept-encoding"), "identity");
        if kind_of_body >= 2 && !body.is_end_stream() {
            *body = Body::stream(Decoded {
                body: std::mem::take(body),
                rest: BytesMut::new(),
            });
        }
        let counted = self.scope(cx, head);
        cx.state.grpc_web = Some(Box::new(Active { text, counted }));
    }

    /// Where the call is counted.
    fn scope(&self, cx: &mut FilterContext<'_>, head: &RequestHead) -> Option<Scope> {
        let (service, method) = split(head.path_only())?;
        let target = cx.route(head)?.target(head)?;
        let calls = self
            .clusters
            .get(cx.shared, &target.cluster, |scope| Calls {
                scope: scope.scope("grpc-web."),
                methods: ArcSwap::default(),
            })?;
        let known = calls.methods.load();
        if let Some(found) = known.get(head.path_only()) {
            return Some(found.clone());
        }
        if known.len() >= MAX_METHODS {
            return None;
        }
        let scope = calls.scope.scope(&format!("{service}.{method}."));
        calls.methods.rcu(|known| {
            let mut all = HashMap::clone(known);
            all.insert(head.path_only().into(), scope.clone());
            all
        });
        Some(scope)
    }
}

impl Active {
    /// Waits for the text of an answer that is no gRPC, as it is to go into the head.
    pub(super) async fn hold(&self, head: &ResponseHead, body: &mut Body) {
        if body.is_whole() || is_translated(head, false) {
            return;
        }
        *body = match gather::read(body, MAX_TEXT).await {
            Ok(text) => Body::full(text.data.slice(..text.data.len().min(MAX_TEXT))),
            Err(error) => gather::failing(error),
        };
    }

    pub(super) fn on_response(
        &self,
        cx: &ResponseContext<'_>,
        head: &mut ResponseHead,
        body: &mut Body,
    ) {
        self.count(&head.headers);
        // What stands in trailers is body to whoever looks at it later.
        cx.info.borrow_mut().grpc_status = grpc_status(&head.headers);
        let ends = body.is_end_stream();
        let foreign = !is_translated(head, ends);
        let kind = if self.text { TYPES[3] } else { TYPES[1] };
        head.headers.set(Known::ContentType, kind);
        if foreign {
            if !ends {
                let text = std::mem::take(body).into_data();
                head.headers.set(
                    Known::GrpcStatus,
                    grpc_status_of(head.status).to_string().as_bytes(),
                );
                head.headers
                    .set(Known::GrpcMessage, percent_encode_grpc_message(&text));
                head.headers.set(Known::ContentLength, "0");
            }
            return;
        }
        if !ends {
            head.headers.remove_known(Known::ContentLength);
            *body = Body::stream(Encoded {
                body: std::mem::take(body),
                text: self.text.then(Base64::default),
                counted: self.counted.clone(),
                info: cx.info.clone(),
            });
        }
    }

    fn count(&self, headers: &Headers) {
        count(self.counted.as_ref(), headers);
    }
}

/// Counts the end of a call, if headers or trailers tell how it ended.
fn count(scope: Option<&Scope>, headers: &Headers) {
    let Some((scope, status)) = scope.zip(grpc_status(headers)) else {
        return;
    };
    if (0..=16).contains(&status) {
        scope.counter(&status.to_string()).inc();
    }
    scope
        .counter(if status == 0 { "success" } else { "failure" })
        .inc();
    scope.counter("total").inc();
}

/// Whether the answer is one that gRPC-Web has a form for.
fn is_translated(head: &ResponseHead, ends: bool) -> bool {
    if ends {
        return head.headers.known(Known::GrpcStatus).is_some();
    }
    let kind = head.headers.known(Known::ContentType).unwrap_or_default();
    let grpc = kind
        .strip_prefix(b"application/grpc")
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"+"));
    head.status == 200 && grpc || TYPES.contains(&kind)
}

/// The request's body out of base64.
struct Decoded {
    body: Body,
    /// Less than four characters that wait for more.
    rest: BytesMut,
}

impl Source for Decoded {
    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        loop {
            match ready!(self.body.poll_frame(cx)) {
                None | Some(Ok(Frame::Trailers(_))) if !self.rest.is_empty() => {
                    return Poll::Ready(Some(Err(not_base64(
                        "grpc_base_64_decode_failed_bad_size",
                    ))));
                }
                Some(Ok(Frame::Data(data))) => {
                    self.rest.extend_from_slice(&data);
                    let whole = self.rest.len() / 4 * 4;
                    if whole == 0 {
                        continue;
                    }
                    let piece = self.rest.split_to(whole);
                    return Poll::Ready(Some(match STANDARD.decode(&piece) {
                        Ok(data) => Ok(Frame::Data(data.into())),
                        Err(_) => Err(not_base64("grpc_base_64_decode_failed")),
                    }));
                }
                other => return Poll::Ready(other),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }
}

fn not_base64(details: &'static str) -> BodyError {
    BodyError::Refused(Box::new(Reject::new(
        400,
        "Bad gRPC-web request, invalid base64 data.",
        ResponseFlags::default(),
        details,
    )))
}

/// The response's body with its trailers in it.
struct Encoded {
    body: Body,
    text: Option<Base64>,
    counted: Option<Scope>,
    info: SharedInfo,
}

impl Source for Encoded {
    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        loop {
            let data = match ready!(self.body.poll_frame(cx)) {
                Some(Ok(Frame::Data(data))) => data,
                Some(Ok(Frame::Trailers(trailers))) => {
                    count(self.counted.as_ref(), &trailers);
                    self.info.borrow_mut().grpc_status = None;
                    trailers_frame(&trailers)
                }
                other => return Poll::Ready(other),
            };
            let data = match &mut self.text {
                None => data,
                Some(text) => text.encode(&data),
            };
            if !data.is_empty() {
                return Poll::Ready(Some(Ok(Frame::Data(data))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

fn trailers_frame(trailers: &Headers) -> Bytes {
    let mut out = vec![TRAILERS, 0, 0, 0, 0];
    for (name, value) in trailers.iter() {
        out.extend_from_slice(name.as_bytes());
        out.push(b':');
        out.extend_from_slice(value);
        out.extend_from_slice(b"\r\n");
    }
    // Trailers are bounded by the codec, far below 4 GiB.
    let length = u32::try_from(out.len() - 5).unwrap_or(u32::MAX);
    if let Some(place) = out.get_mut(1..5) {
        place.copy_from_slice(&length.to_be_bytes());
    }
    out.into()
}

/// Base64 of one gRPC frame after the other, each padded at its end, without waiting for all of one.
#[derive(Debug, Default)]
struct Base64 {
    /// Bytes of the next frame's head that have come.
    head: u8,
    length: u32,
    /// Bytes of the frame that are still to come.
    left: u32,
    /// Up to two bytes that wait for a third.
    carry: Vec<u8>,
}

impl Base64 {
    fn encode(&mut self, mut data: &[u8]) -> Bytes {
        let mut out = String::with_capacity(data.len() / 3 * 4 + 12);
        while !data.is_empty() {
            // The rest of a frame, or as much of its head as there is.
            let wanted = match self.left {
                0 => usize::from(5 - self.head),
                left => left as usize,
            };
            let (piece, rest) = data.split_at(wanted.min(data.len()));
            data = rest;
            self.carry.extend_from_slice(piece);
            if self.left > 0 {
                self.left -= u32::try_from(piece.len()).unwrap_or(self.left);
            } else {
                for byte in piece {
                    if self.head > 0 {
                        self.length = self.length << 8 | u32::from(*byte);
                    }
                    self.head += 1;
                }
                if self.head < 5 {
                    continue;
                }
                self.head = 0;
                self.left = std::mem::take(&mut self.length);
            }
            let whole = match self.left {
                0 => self.carry.len(),
                _ => self.carry.len() / 3 * 3,
            };
            STANDARD.encode_string(&self.carry[..whole], &mut out);
            self.carry.drain(..whole);
        }
        out.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(flag: u8, data: &[u8]) -> Vec<u8> {
        let mut out = vec![flag];
        out.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
        out.extend_from_slice(data);
        out
    }

    #[test]
    fn each_frame_is_base64_of_its_own_however_it_is_cut() {
        let frames = [frame(0, b"hello"), frame(0, b""), frame(1, &[7; 400])];
        let want: String = frames.iter().map(|frame| STANDARD.encode(frame)).collect();
        let all = frames.concat();
        for size in 1..=all.len() {
            let mut text = Base64::default();
            let got: Vec<u8> = all
                .chunks(size)
                .flat_map(|piece| text.encode(piece))
                .collect();
            assert_eq!(got, want.as_bytes(), "pieces of {size}");
        }
    }

    #[test]
    fn trailers_become_lines() {
        let mut trailers = Headers::default();
        trailers.append(Known::GrpcStatus, "0");
        trailers.append(Name::new("x-tr"), "tv");
        let want = frame(TRAILERS, b"grpc-status:0\r\nx-tr:tv\r\n");
        assert_eq!(trailers_frame(&trailers), want);
    }

    #[tokio::test]
    async fn base64_is_decoded_however_it_is_cut_and_refused_when_it_is_none() {
        async fn read(pieces: Vec<&'static [u8]>) -> Result<Bytes, BodyError> {
            let mut pieces = pieces.into_iter();
            let body =
                gather::testing::pieces(move || pieces.next().map(|p| Frame::Data(p.into())));
            let decoded = Decoded {
                body,
                rest: BytesMut::new(),
            };
            Body::stream(decoded).collect(100).await
        }
        assert_eq!(
            read(vec![b"AAAA", b"AAJoaQ=="]).await,
            Ok(Bytes::from_static(b"\0\0\0\0\x02hi"))
        );
        assert_eq!(
            read(vec![b"AA", b"AAA", b"AJoaQ=", b"="]).await,
            Ok(Bytes::from_static(b"\0\0\0\0\x02hi"))
        );
        for (bad, details) in [
            (vec![&b"!!!n"[..]], "grpc_base_64_decode_failed"),
            (vec![b"AAAAAA"], "grpc_base_64_decode_failed_bad_size"),
        ] {
            match read(bad).await {
                Err(BodyError::Refused(reject)) => assert_eq!(reject.details, *details),
                other => panic!("{other:?}"),
            }
        }
    }
}
