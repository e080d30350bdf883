//! Lets HTTP/1.1 clients that know nothing of trailers make gRPC calls: what the trailers say goes into the
//! head, so the response is read to its end first. Envoy: `envoy.filters.http.grpc_http1_bridge`.

use bytes::{Bytes, BytesMut};
use lateen_protocols::envoy::envoy::extensions::filters::http::grpc_http1_bridge::v3::Config as BridgeProto;

use crate::{
    body::{Body, BodyError},
    filter::{FilterContext, gather},
    head::{Headers, Known, Protocol, RequestHead, ResponseHead},
    info::ResponseFlags,
    reject::Reject,
};

/// Longest request or response that is read to its end. Envoy: `per_connection_buffer_limit_bytes`.
const LIMIT: usize = 1 << 20;
/// A flag and a length.
const FRAME_HEAD: usize = 5;

/// The filter of one connection manager.
#[derive(Debug)]
pub struct GrpcHttp1Bridge {
    upgrade_protobuf: bool,
    ignore_query: bool,
}

/// A request whose response is to be bridged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Active {
    /// The client spoke plain protobuf, and is to get such.
    framed: bool,
}

impl GrpcHttp1Bridge {
    /// Compiles the filter.
    pub fn compile(config: &BridgeProto) -> GrpcHttp1Bridge {
        GrpcHttp1Bridge {
            upgrade_protobuf: config.upgrade_protobuf_to_grpc,
            ignore_query: config.ignore_query_parameters,
        }
    }

    /// Notes a call; one in plain protobuf becomes gRPC.
    ///
    /// # Errors
    /// The body does not fit, or broke off.
    pub(super) async fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
        body: &mut Body,
    ) -> Result<(), Reject> {
        let framed = self.upgrade_protobuf
            && head.headers.known(Known::ContentType) == Some(b"application/x-protobuf");
        if framed {
            head.headers.set(Known::ContentType, "application/grpc");
            head.headers.remove_known(Known::ContentLength);
            if self.ignore_query {
                head.path = head.path.slice(..head.path_only().len());
            }
            if !body.is_end_stream() {
                let message = gather::read(body, LIMIT)
                    .await
                    .map_err(|error| gather::broken(&error))?;
                if !message.whole {
                    return Err(gather::too_large());
                }
                *body = Body::full(frame(&message.data));
            }
        }
        if head.protocol != Protocol::Http2 && head.is_grpc() {
            cx.state.grpc_http1_bridge = Some(Active { framed });
        }
        Ok(())
    }
}

impl Active {
    /// Reads the response to its end, and moves the trailers into the head.
    ///
    /// # Errors
    /// The response does not fit.
    pub(super) async fn hold(self, head: &mut ResponseHead, body: &mut Body) -> Result<(), Reject> {
        if body.is_end_stream() {
            return Ok(());
        }
        let (mut data, trailers) = match gather::take(body, LIMIT).await {
            Ok(all) => all,
            Err(BodyError::TooLarge) => {
                return Err(Reject::new(
                    500,
                    "Internal Server Error",
                    ResponseFlags::default(),
                    "response_payload_too_large",
                ));
            }
            Err(error) => {
                *body = gather::failing(error);
                return Ok(());
            }
        };
        if self.framed && data.len() >= FRAME_HEAD {
            data = data.slice(FRAME_HEAD..);
        }
        if let Some(trailers) = trailers {
            told_by(&trailers, head);
        }
        head.headers
            .set(Known::ContentLength, data.len().to_string());
        *body = Body::full(data);
        Ok(())
    }
}

fn told_by(trailers: &Headers, head: &mut ResponseHead) {
    if let Some(status) = trailers.known(Known::GrpcStatus) {
        if status != b"0" {
            head.status = 503;
        }
        head.headers.set(Known::GrpcStatus, status);
    }
    if let Some(message) = trailers.known(Known::GrpcMessage) {
        head.headers.set(Known::GrpcMessage, message);
    }
}

fn frame(message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX); // at most LIMIT
    let mut out = BytesMut::with_capacity(FRAME_HEAD + message.len());
    out.extend_from_slice(&[0]);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(message);
    out.freeze()
}
