//! Calls the proxy makes on its own behalf (Mixer, trace collectors) through its own clusters: load
//! balancing, mutual TLS and outlier ejection apply to them as to anybody's requests.

use std::{cell::RefCell, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use lateen_protocols::envoy::{envoy::config::route::v3 as route, google::protobuf as pb};

use crate::{
    body::{Body, BodyError, Frame},
    config_error::ConfigError,
    head::{Headers, Known, Name, Protocol, RequestHead, ResponseHead},
    info::{ConnectionInfo, StreamInfo},
    reject::Reject,
    route::policy::{ForwardPolicy, Target},
    router,
    shared::Shared,
};

/// gRPC's status for success.
const OK: i32 = 0;

/// A cluster that the proxy itself calls.
#[derive(Debug)]
pub struct Upstream {
    policy: ForwardPolicy,
    target: Target,
    authority: Bytes,
}

/// What a call came back with.
#[derive(Debug)]
pub struct Answer<M> {
    /// The one message.
    pub message: M,
    /// Initial metadata.
    pub headers: Headers,
}

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The router answered in the upstream's place.
    #[error("{0}")]
    Rejected(String),
    /// The answer is not one of success.
    #[error("HTTP status {0}")]
    Http(u16),
    /// The answer broke off.
    #[error("the answer broke off")]
    Body(#[source] BodyError),
    /// The upstream said no.
    #[error("gRPC status {code}: {message}")]
    Status {
        /// `google.rpc.Code`.
        code: i32,
        /// `grpc-message`, as sent.
        message: String,
    },
    /// Question or answer are not one gRPC message of acceptable size.
    #[error("{0}")]
    Malformed(&'static str),
}

impl Upstream {
    /// Calls to `cluster` that take at most `timeout`. The cluster need not be known yet.
    ///
    /// # Errors
    /// When no cluster is named.
    pub fn new(cluster: &str, timeout: Duration) -> Result<Upstream, ConfigError> {
        if cluster.is_empty() {
            return Err(ConfigError::new("cluster", "no cluster is named"));
        }
        let action = route::RouteAction {
            cluster_specifier: Some(route::route_action::ClusterSpecifier::Cluster(
                cluster.to_owned(),
            )),
            timeout: Some(pb::Duration {
                seconds: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
                nanos: i32::try_from(timeout.subsec_nanos()).unwrap_or(0),
            }),
            ..route::RouteAction::default()
        };
        Ok(Upstream {
            policy: ForwardPolicy::compile(
                &action,
                &route::Route::default(),
                &route::VirtualHost::default(),
                &Default::default(),
            )?,
            target: Target {
                cluster: cluster.into(),
                subset: None,
            },
            authority: Bytes::from(cluster.replace('|', "_")),
        })
    }

    /// Makes calls say this authority; an empty one changes nothing.
    #[must_use]
    pub fn with_authority(mut self, authority: &str) -> Upstream {
        if !authority.is_empty() {
            self.authority = Bytes::from(authority.to_owned());
        }
        self
    }

    /// The cluster's name.
    pub fn cluster(&self) -> &Arc<str> {
        &self.target.cluster
    }

    /// Sends a POST and waits for the head of the answer.
    ///
    /// # Errors
    /// When the router answers in the upstream's place, or the status is not 2xx.
    pub async fn post(
        &self,
        shared: &Arc<Shared>,
        path: Bytes,
        headers: Headers,
        body: Bytes,
    ) -> Result<(ResponseHead, Body), CallError> {
        let head = RequestHead {
            method: Bytes::from_static(b"POST"),
            scheme: Bytes::from_static(b"http"),
            authority: self.authority.clone(),
            path,
            protocol: Protocol::Http2,
            headers,
        };
        let (response, body) = self
            .exchange(shared, head, Body::full(body))
            .await
            .map_err(|reject| CallError::Rejected(reject.body.into_owned()))?;
        if (200..300).contains(&response.status) {
            Ok((response, body))
        } else {
            Err(CallError::Http(response.status))
        }
    }

    /// Sends a request as it is and waits for the head of the answer.
    ///
    /// # Errors
    /// What the router answers in the upstream's place.
    pub async fn exchange(
        &self,
        shared: &Arc<Shared>,
        head: RequestHead,
        body: Body,
    ) -> Result<(ResponseHead, Body), Reject> {
        let nobody = SocketAddr::from(([127, 0, 0, 1], 0));
        let connection = ConnectionInfo {
            id: 0,
            remote: nobody,
            direct_remote: nobody,
            local: nobody,
            local_restored: false,
            tls: None,
            requested_server_name: None,
            filter_chain: None,
            original_src: None,
            started: tokio::time::Instant::now(),
        };
        let info = StreamInfo::new(Rc::new(connection), Some(Protocol::Http2));
        let info = Rc::new(RefCell::new(info));
        router::forward(shared, &self.policy, &self.target, head, body, &info).await
    }

    /// One unary gRPC call; answers of more than `limit` bytes are refused.
    ///
    /// # Errors
    /// When there is no answer, or its status is not OK.
    pub async fn unary<M: prost::Message + Default>(
        &self,
        shared: &Arc<Shared>,
        path: &'static str,
        metadata: &[(Name, Bytes)],
        message: &[u8],
        limit: usize,
    ) -> Result<Answer<M>, CallError> {
        let mut headers = Headers::with_capacity(3 + metadata.len());
        headers.append(Known::ContentType, "application/grpc");
        headers.append(Known::Te, "trailers");
        headers.append(Known::XEnvoyInternal, "true");
        for (name, value) in metadata {
            headers.append(name.clone(), value.clone());
        }
        let length = u32::try_from(message.len())
            .map_err(|_| CallError::Malformed("the message is too large"))?;
        let mut framed = BytesMut::with_capacity(5 + message.len());
        framed.put_u8(0);
        framed.put_u32(length);
        framed.put_slice(message);
        let path = Bytes::from_static(path.as_bytes());
        let (response, mut body) = self.post(shared, path, headers, framed.freeze()).await?;
        let mut data = BytesMut::new();
        let mut trailers = None;
        while let Some(frame) = body.frame().await {
            match frame.map_err(CallError::Body)? {
                Frame::Data(piece) if data.len() + piece.len() <= limit => {
                    data.extend_from_slice(&piece);
                }
                Frame::Data(_) => return Err(CallError::Malformed("the answer is too large")),
                Frame::Trailers(all) => trailers = Some(all),
            }
        }
        let end = trailers
            .as_ref()
            .filter(|trailers| status(trailers).is_some())
            .unwrap_or(&response.headers);
        match status(end) {
            Some(OK) => {}
            Some(code) => {
                return Err(CallError::Status {
                    code,
                    message: end
                        .known(Known::GrpcMessage)
                        .map(|message| String::from_utf8_lossy(message).into_owned())
                        .unwrap_or_default(),
                });
            }
            None => return Err(CallError::Malformed("the answer has no gRPC status")),
        }
        // A flag byte (0: not compressed), the length, the message.
        let [0, a, b, c, d, message @ ..] = &data[..] else {
            return Err(CallError::Malformed("the answer is not one gRPC message"));
        };
        if u32::from_be_bytes([*a, *b, *c, *d]) as usize != message.len() {
            return Err(CallError::Malformed("the answer is cut short"));
        }
        Ok(Answer {
            message: M::decode(message)
                .map_err(|_| CallError::Malformed("the answer cannot be decoded"))?,
            headers: response.headers,
        })
    }
}

fn status(headers: &Headers) -> Option<i32> {
    let value = headers.known(Known::GrpcStatus)?;
    std::str::from_utf8(value).ok()?.parse().ok()
}
