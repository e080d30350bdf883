//! Our heads and bodies to hyper's and back. Only this module and `pool` know hyper here.

use std::{
    error::Error as _,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Uri, Version, header, uri};
use hyper::body::Incoming;

use crate::{
    body::{Body, BodyError, Frame, Source},
    head::{Headers, Known, Name, RequestHead, ResponseHead},
    retry::Reset,
};

/// A body of ours for hyper to send.
#[derive(Debug)]
pub(super) struct OutBody(pub(super) Body);

impl http_body::Body for OutBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, BodyError>>> {
        self.get_mut().0.poll_frame(cx).map(|polled| {
            polled.map(|result| {
                result.map(|frame| match frame {
                    Frame::Data(data) => http_body::Frame::data(data),
                    Frame::Trailers(trailers) => http_body::Frame::trailers(header_map(&trailers)),
                })
            })
        })
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.0
            .exact_length()
            .map(http_body::SizeHint::with_exact)
            .unwrap_or_default()
    }
}

/// A body hyper receives. `held` lives as long as it does.
pub(super) struct InBody<H> {
    pub(super) incoming: Incoming,
    pub(super) _held: H,
}

impl<H: Unpin> Source for InBody<H> {
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let polled = http_body::Body::poll_frame(Pin::new(&mut self.get_mut().incoming), cx);
        polled.map(|polled| {
            polled.map(|result| match result {
                Ok(frame) => Ok(match frame.into_data() {
                    Ok(data) => Frame::Data(data),
                    Err(other) => Frame::Trailers(match other.into_trailers() {
                        Ok(trailers) => headers(&trailers),
                        Err(_) => Headers::default(),
                    }),
                }),
                Err(error) => Err(match reset(&error) {
                    Reset::Remote | Reset::Refused => BodyError::Reset(reset_code(&error)),
                    Reset::Protocol => BodyError::Protocol(error.to_string()),
                    _ => BodyError::Disconnected,
                }),
            })
        })
    }

    fn is_end_stream(&self) -> bool {
        http_body::Body::is_end_stream(&self.incoming)
    }

    fn exact_length(&self) -> Option<u64> {
        http_body::Body::size_hint(&self.incoming).exact()
    }
}

/// What a request asks the connection to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Upgrade {
    None,
    /// `upgrade: websocket` and the like.
    Protocol,
    /// `CONNECT`.
    Connect,
}

impl Upgrade {
    pub(crate) fn of(head: &RequestHead) -> Upgrade {
        if &*head.method == b"CONNECT" {
            Upgrade::Connect
        } else if head.headers.known(Known::Upgrade).is_some() {
            Upgrade::Protocol
        } else {
            Upgrade::None
        }
    }
}

/// Makes hyper's request. The head has passed our own codec, so a failure means bytes that HTTP forbids.
pub(super) fn request(
    head: &RequestHead,
    body: Body,
    http2: bool,
) -> Result<Request<OutBody>, http::Error> {
    let upgrade = Upgrade::of(head);
    // As Envoy: a request that could have a body and has none says so. hyper does it for some methods only.
    let says_empty = !http2
        && upgrade == Upgrade::None
        && body.is_end_stream()
        && head.headers.known(Known::ContentLength).is_none()
        && !matches!(&*head.method, b"GET" | b"HEAD" | b"DELETE" | b"TRACE");
    let mut request = Request::new(OutBody(body));
    *request.method_mut() = Method::from_bytes(&head.method)?;
    let map = request.headers_mut();
    map.reserve(head.headers.len() + 2);
    if !http2 {
        map.insert(
            header::HOST,
            HeaderValue::from_maybe_shared(head.authority.clone())?,
        );
    }
    for (name, value) in head.headers.iter() {
        if http2 && name == Known::Upgrade {
            continue;
        }
        map.append(header_name(name)?, HeaderValue::from_bytes(value)?);
    }
    if says_empty {
        map.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
    match (upgrade, http2) {
        (Upgrade::Protocol, false) => {
            map.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        }
        (Upgrade::Protocol, true) => {
            // RFC 8441: an upgrade is an extended CONNECT.
            let protocol = head
                .headers
                .known(Known::Upgrade)
                .map(bytes::Bytes::copy_from_slice)
                .unwrap_or_default();
            let protocol = String::from_utf8_lossy(&protocol).into_owned();
            request
                .extensions_mut()
                .insert(hyper::ext::Protocol::from(protocol.as_str()));
            *request.method_mut() = Method::CONNECT;
        }
        (Upgrade::None | Upgrade::Connect, _) => {}
    }
    *request.uri_mut() = target(head, upgrade, http2)?;
    if http2 {
        *request.version_mut() = Version::HTTP_2;
    }
    Ok(request)
}

fn target(head: &RequestHead, upgrade: Upgrade, http2: bool) -> Result<Uri, http::Error> {
    let mut parts = uri::Parts::default();
    if upgrade == Upgrade::Connect {
        parts.authority = Some(uri::Authority::from_maybe_shared(head.authority.clone())?);
        return Ok(Uri::from_parts(parts)?);
    }
    let path = if head.path.is_empty() {
        Bytes::from_static(b"/")
    } else {
        head.path.clone()
    };
    parts.path_and_query = Some(uri::PathAndQuery::from_maybe_shared(path)?);
    if http2 {
        let scheme = if head.scheme.is_empty() {
            &b"http"[..]
        } else {
            &head.scheme
        };
        parts.scheme = Some(uri::Scheme::try_from(scheme)?);
        parts.authority = Some(uri::Authority::from_maybe_shared(head.authority.clone())?);
    }
    Ok(Uri::from_parts(parts)?)
}

fn header_name(name: crate::head::NameRef<'_>) -> Result<HeaderName, http::Error> {
    Ok(match name.known() {
        Some(known) => HeaderName::from_static(known.as_str()),
        None => HeaderName::from_lowercase(name.as_bytes())?,
    })
}

/// For trailers: what is not valid is left out, as there is nobody to tell.
fn header_map(headers: &Headers) -> http::HeaderMap {
    // `with_capacity` and `append` panic when there are more than the map can hold.
    let mut map = http::HeaderMap::try_with_capacity(headers.len()).unwrap_or_default();
    for (name, value) in headers.iter() {
        if let (Ok(name), Ok(value)) = (header_name(name), HeaderValue::from_bytes(value))
            && map.try_append(name, value).is_err()
        {
            break;
        }
    }
    map
}

fn headers(map: &http::HeaderMap) -> Headers {
    let mut headers = Headers::with_capacity(map.len());
    for (name, value) in map {
        headers.append(
            Name::from_lower(Bytes::copy_from_slice(name.as_str().as_bytes())),
            Bytes::copy_from_slice(value.as_bytes()),
        );
    }
    headers
}

/// Our response head; hop-by-hop headers go. What `connection` names stays, as in Envoy: clients depend on it.
pub(super) fn response(parts: &http::response::Parts) -> ResponseHead {
    let mut headers = headers(&parts.headers);
    let switched = parts.status == http::StatusCode::SWITCHING_PROTOCOLS;
    if !switched {
        headers.remove(&Name::Known(Known::Connection));
        headers.remove(&Name::Known(Known::Upgrade));
    }
    for name in [
        Known::KeepAlive,
        Known::ProxyConnection,
        Known::TransferEncoding,
        Known::Te,
    ] {
        headers.remove(&Name::Known(name));
    }
    ResponseHead {
        status: parts.status.as_u16(),
        headers,
    }
}

/// What an error of hyper means for the stream.
pub(super) fn reset(error: &hyper::Error) -> Reset {
    if let Some(h2) = find::<h2::Error>(error) {
        return match h2.reason() {
            Some(h2::Reason::REFUSED_STREAM) => Reset::Refused,
            Some(_) if h2.is_go_away() => Reset::Termination,
            Some(_) if h2.is_reset() && h2.is_remote() => Reset::Remote,
            Some(_) => Reset::Protocol,
            None => Reset::Termination,
        };
    }
    if error.is_parse() || error.is_parse_too_large() || error.is_parse_status() {
        return Reset::Protocol;
    }
    // A malformed chunk of a body arrives as an I/O error.
    if find::<io::Error>(error).is_some_and(|io| {
        matches!(
            io.kind(),
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput
        )
    }) {
        return Reset::Protocol;
    }
    if error.is_user() {
        return Reset::Local;
    }
    Reset::Termination
}

fn reset_code(error: &hyper::Error) -> Option<u32> {
    find::<h2::Error>(error)
        .and_then(h2::Error::reason)
        .map(u32::from)
}

fn find<T: std::error::Error + 'static>(error: &hyper::Error) -> Option<&T> {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        source = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::Protocol;

    #[test]
    fn who_could_have_a_body_and_has_none_says_so() {
        for (method, http2, says) in [
            ("GET", false, false),
            ("DELETE", false, false),
            ("OPTIONS", false, true),
            ("POST", false, true),
            ("POST", true, false),
        ] {
            let head = RequestHead {
                method: method.into(),
                scheme: "http".into(),
                authority: "a".into(),
                path: "/".into(),
                protocol: Protocol::Http11,
                headers: Headers::default(),
            };
            let made = request(&head, Body::empty(), http2).unwrap();
            let length = made.headers().get(header::CONTENT_LENGTH);
            assert_eq!(length.is_some_and(|v| v == "0"), says, "{method} {http2}");
        }
    }

    #[test]
    fn what_connection_names_stays_but_not_what_is_of_the_hop() {
        let (parts, ()) = http::Response::builder()
            .header("connection", "x-mine, keep-alive")
            .header("keep-alive", "timeout=5")
            .header("x-mine", "1")
            .body(())
            .unwrap()
            .into_parts();
        let head = response(&parts);
        let names: Vec<_> = head.headers.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(names, [Name::new("x-mine")]);
    }
}
