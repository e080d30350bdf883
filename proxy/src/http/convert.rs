//! Between hyper's types and ours. Nothing outside `http` sees hyper on the downstream side.

use std::{
    cell::RefCell,
    future::Future as _,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Version, request::Parts};
use http_body::Body as _;
use hyper::{body::Incoming, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, ReadBuf, ReadHalf},
    sync::oneshot,
};

use super::stream::StreamLimits;
use crate::{
    body::{Body, BodyError, Frame, Source},
    head::{Headers, Known, Name, Protocol, RequestHead, ResponseHead},
    info::{ResponseFlags, StreamInfo},
    reject::Reject,
};

/// The protocol of a request.
pub(super) fn protocol(version: Version) -> Protocol {
    match version {
        Version::HTTP_09 | Version::HTTP_10 => Protocol::Http10,
        Version::HTTP_2 => Protocol::Http2,
        _ => Protocol::Http11,
    }
}

/// The upgrade an HTTP/1.1 request asks for, in lower case. `h2c` is never one: RFC 9113 dropped it.
pub(super) fn wanted_upgrade(version: Version, headers: &HeaderMap) -> Option<String> {
    if version != Version::HTTP_11 || !connection_tokens(headers).any(|token| token == "upgrade") {
        return None;
    }
    let wanted = headers
        .get(http::header::UPGRADE)?
        .to_str()
        .ok()?
        .trim()
        .to_ascii_lowercase();
    (!wanted.is_empty() && wanted != "h2c").then_some(wanted)
}

fn connection_tokens(headers: &HeaderMap) -> impl Iterator<Item = String> {
    headers
        .get_all(http::header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|token| token.trim().to_ascii_lowercase())
}

/// Whether a request says which host it means, even if with an empty `Host`.
pub(super) fn names_host(parts: &Parts) -> bool {
    parts.uri.authority().is_some() || parts.headers.contains_key(http::header::HOST)
}

/// The head of a request, without hop-by-hop headers.
///
/// # Errors
/// When the request line or pseudo headers make no sense.
pub(super) fn request_head(parts: &Parts, upgrade: bool) -> Result<RequestHead, Reject> {
    let bad = |details| {
        Reject::new(
            400,
            "Bad Request",
            ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR,
            details,
        )
    };
    let protocol = protocol(parts.version);
    let mut headers = Headers::with_capacity(parts.headers.len() + 8);
    let nominated: Vec<String> = if protocol == Protocol::Http2 {
        Vec::new()
    } else {
        connection_tokens(&parts.headers).collect()
    };
    if !is_plainly_chunked(&parts.headers) {
        // Forwarded without its coding, the body would mean something else to the next hop.
        return Err(Reject::new(
            501,
            "Not Implemented",
            ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR,
            "http1.invalid_transfer_encoding",
        ));
    }
    let mut cookies = BytesMut::new();
    for (name, value) in &parts.headers {
        let value = Bytes::copy_from_slice(value.as_bytes());
        let text = name.as_str();
        match text {
            "host" | "connection" | "keep-alive" | "proxy-connection" | "transfer-encoding"
            | "expect" | "http2-settings" => continue,
            "upgrade" if !upgrade => continue,
            "te" if !has_token(&value, b"trailers") => continue,
            "te" => headers.append(Known::Te, "trailers"),
            // HTTP/2 may split cookies for compression; RFC 9113 §8.2.3.
            "cookie" if protocol == Protocol::Http2 => {
                if !cookies.is_empty() {
                    cookies.extend_from_slice(b"; ");
                }
                cookies.extend_from_slice(&value);
            }
            _ if !matches!(text, "upgrade" | "te") && nominated.iter().any(|n| n == text) => {
                continue;
            }
            _ => headers.append(header_name(name), value),
        }
    }
    if !cookies.is_empty() {
        headers.append(Known::Cookie, cookies.freeze());
    }
    let mut hosts = parts.headers.get_all(http::header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(bad("http1.codec_error"));
    }
    let authority = match (parts.uri.authority(), host) {
        (Some(authority), _) => Bytes::copy_from_slice(authority.as_str().as_bytes()),
        (None, Some(host)) => Bytes::copy_from_slice(host.as_bytes()),
        (None, None) => Bytes::new(),
    };
    if !authority
        .iter()
        .all(|b| matches!(b, b'!'..=b'~') && !b"/?#\"<>\\^`{|}".contains(b))
    {
        return Err(bad("invalid_authority"));
    }
    let path = match parts.uri.path_and_query() {
        _ if parts.method == http::Method::CONNECT => Bytes::new(),
        Some(path) => Bytes::copy_from_slice(path.as_str().as_bytes()),
        None => Bytes::from_static(b"/"),
    };
    Ok(RequestHead {
        method: Bytes::copy_from_slice(parts.method.as_str().as_bytes()),
        scheme: Bytes::from_static(b"http"),
        authority,
        path,
        protocol,
        headers,
    })
}

/// Whether a body has no transfer coding but `chunked`.
fn is_plainly_chunked(headers: &HeaderMap) -> bool {
    let mut codings = headers.get_all(http::header::TRANSFER_ENCODING).iter();
    let first = codings.next();
    first.is_none_or(|coding| coding.as_bytes().eq_ignore_ascii_case(b"chunked"))
        && codings.next().is_none()
}

fn has_token(value: &[u8], token: &[u8]) -> bool {
    value
        .split(|b| *b == b',')
        .any(|part| part.trim_ascii().eq_ignore_ascii_case(token))
}

fn header_name(name: &HeaderName) -> Name {
    match crate::head::known_from_lower(name.as_str().as_bytes()) {
        Some(known) => Name::Known(known),
        None => Name::Other(Bytes::copy_from_slice(name.as_str().as_bytes())),
    }
}

fn trailers(map: &HeaderMap) -> Headers {
    let mut headers = Headers::with_capacity(map.len());
    for (name, value) in map {
        headers.append(header_name(name), Bytes::copy_from_slice(value.as_bytes()));
    }
    headers
}

/// hyper's form of headers. What cannot be sent (it came malformed from an upstream) is left out.
pub(super) fn header_map(headers: &Headers) -> HeaderMap {
    // `with_capacity` and `append` panic when there are more than the map can hold.
    let mut map = HeaderMap::try_with_capacity(headers.len()).unwrap_or_default();
    for (name, value) in headers.iter() {
        let name = HeaderName::from_bytes(name.as_bytes());
        let value = HeaderValue::from_bytes(value);
        if let (Ok(name), Ok(value)) = (name, value)
            && map.try_append(name, value).is_err()
        {
            break;
        }
    }
    map
}

/// Takes hop-by-hop headers from a response, but for those of an upgrade. Headers that `connection`
/// names stay, as in Envoy: clients depend on what they get from it.
pub(super) fn strip_hop_by_hop(head: &mut ResponseHead) {
    for known in [
        Known::KeepAlive,
        Known::ProxyConnection,
        Known::TransferEncoding,
    ] {
        head.headers.take(known);
    }
    if head.status != 101 {
        head.headers.take(Known::Connection);
        head.headers.take(Known::Upgrade);
    }
}

/// The body of an ordinary request.
pub(super) fn request_body(
    incoming: Incoming,
    info: Rc<RefCell<StreamInfo>>,
    limits: Rc<StreamLimits>,
) -> Body {
    if incoming.is_end_stream() {
        let mut info = info.borrow_mut();
        info.request_end = Some(info.start.elapsed());
        limits.request_done();
        return Body::empty();
    }
    Body::stream(RequestBody {
        incoming,
        info,
        limits,
    })
}

struct RequestBody {
    incoming: Incoming,
    info: Rc<RefCell<StreamInfo>>,
    limits: Rc<StreamLimits>,
}

impl RequestBody {
    fn ended(&self) {
        let mut info = self.info.borrow_mut();
        if info.request_end.is_none() {
            info.request_end = Some(info.start.elapsed());
        }
        self.limits.request_done();
    }
}

impl Source for RequestBody {
    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.incoming).poll_frame(cx));
        self.limits.touch();
        Poll::Ready(match frame {
            None => {
                self.ended();
                None
            }
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    self.info.borrow_mut().bytes_received += data.len() as u64;
                    if self.incoming.is_end_stream() {
                        self.ended();
                    }
                    Some(Ok(Frame::Data(data)))
                }
                Err(frame) => {
                    self.ended();
                    Some(Ok(Frame::Trailers(
                        frame
                            .into_trailers()
                            .map(|map| trailers(&map))
                            .unwrap_or_default(),
                    )))
                }
            },
            Some(Err(error)) => Some(Err(body_error(&error))),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn exact_length(&self) -> Option<u64> {
        self.incoming.size_hint().exact()
    }
}

fn body_error(error: &hyper::Error) -> BodyError {
    if error.is_parse() || error.is_user() {
        BodyError::Protocol(error.to_string())
    } else {
        BodyError::Disconnected
    }
}

/// The body of an upgraded request: what the downstream sends once the `101` is out.
pub(super) fn upgraded_body(
    io: oneshot::Receiver<ReadHalf<TokioIo<Upgraded>>>,
    info: Rc<RefCell<StreamInfo>>,
    limits: Rc<StreamLimits>,
) -> Body {
    limits.request_done();
    Body::stream(UpgradedBody {
        io: UpgradeState::Waiting(io),
        buffer: BytesMut::new(),
        info,
        limits,
    })
}

struct UpgradedBody {
    io: UpgradeState,
    buffer: BytesMut,
    info: Rc<RefCell<StreamInfo>>,
    limits: Rc<StreamLimits>,
}

enum UpgradeState {
    Waiting(oneshot::Receiver<ReadHalf<TokioIo<Upgraded>>>),
    Reading(ReadHalf<TokioIo<Upgraded>>),
}

impl Source for UpgradedBody {
    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        const READ: usize = 16 * 1024;
        let this = &mut *self;
        loop {
            match &mut this.io {
                UpgradeState::Waiting(io) => match ready!(Pin::new(io).poll(cx)) {
                    Ok(io) => this.io = UpgradeState::Reading(io),
                    // The upstream refused the upgrade.
                    Err(_) => return Poll::Ready(None),
                },
                UpgradeState::Reading(io) => {
                    this.buffer.resize(READ, 0);
                    let mut buf = ReadBuf::new(&mut this.buffer);
                    let result = ready!(Pin::new(io).poll_read(cx, &mut buf));
                    let n = buf.filled().len();
                    this.limits.touch();
                    return Poll::Ready(match (result, n) {
                        (Err(_), _) => Some(Err(BodyError::Disconnected)),
                        (Ok(()), 0) => None,
                        (Ok(()), n) => {
                            this.info.borrow_mut().bytes_received += n as u64;
                            Some(Ok(Frame::Data(this.buffer.split_to(n).freeze())))
                        }
                    });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_headers_than_the_map_holds_are_no_panic() {
        let mut headers = Headers::default();
        for number in 0..40_000 {
            headers.append(Name::new(format!("x-{number}")), "");
        }
        assert!(header_map(&headers).len() > 20_000);
    }

    #[test]
    fn only_the_chunked_coding_is_known() {
        for (lines, plain) in [
            (&[][..], true),
            (&["chunked"], true),
            (&["Chunked"], true),
            (&["gzip, chunked"], false),
            (&["identity"], false),
            (&["gzip", "chunked"], false),
            (&["chunked", "chunked"], false),
        ] {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append("transfer-encoding", HeaderValue::from_static(line));
            }
            assert_eq!(is_plainly_chunked(&headers), plain, "{lines:?}");
        }
    }
}
