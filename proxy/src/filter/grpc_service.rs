//! A gRPC service that a filter asks about each request. Envoy: `GrpcService`.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use lateen_protocols::envoy::envoy::config::core::v3::{
    self as core, grpc_service::TargetSpecifier,
};

use crate::{
    config_error::ConfigError,
    grpc::{CallError, Upstream},
    head::{Known, Name},
    proto::invalid,
    shared::Shared,
};

/// The service, reached through one of our clusters.
#[derive(Debug)]
pub(super) struct GrpcService {
    upstream: Upstream,
    metadata: Vec<(Name, Bytes)>,
}

impl GrpcService {
    /// Compiles a service whose calls take at most `timeout`.
    ///
    /// # Errors
    /// It is no cluster of ours, or something else about it is not supported.
    pub(super) fn compile(
        service: &core::GrpcService,
        timeout: Duration,
    ) -> Result<GrpcService, ConfigError> {
        let Some(TargetSpecifier::EnvoyGrpc(target)) = service.target_specifier.as_ref() else {
            return Err(invalid("google_grpc", "only envoy_grpc is supported"));
        };
        if service.retry_policy.is_some() || target.retry_policy.is_some() {
            return Err(invalid("retry_policy", "not supported"));
        }
        let metadata = service.initial_metadata.iter().map(|header| {
            if header.value.contains('%') {
                return Err(invalid(
                    header.key.clone(),
                    "format strings are not supported",
                ));
            }
            Ok((Name::new(&header.key), Bytes::from(header.value.clone())))
        });
        let from = (Known::XForwardedFor.into(), local_address().into());
        Ok(GrpcService {
            upstream: Upstream::new(&target.cluster_name, timeout)?
                .with_authority(&target.authority),
            metadata: metadata.chain([Ok(from)]).collect::<Result<_, _>>()?,
        })
    }

    /// The cluster's name.
    pub(super) fn cluster(&self) -> &Arc<str> {
        self.upstream.cluster()
    }

    /// Asks; an answer of more than `limit` bytes is none.
    ///
    /// # Errors
    /// See [`Upstream::unary`].
    pub(super) async fn unary<M: prost::Message + Default>(
        &self,
        shared: &Arc<Shared>,
        path: &'static str,
        message: &[u8],
        limit: usize,
    ) -> Result<M, CallError> {
        let answer = self
            .upstream
            .unary(shared, path, &self.metadata, message, limit)
            .await?;
        Ok(answer.message)
    }
}

/// Whose address questions carry in `x-forwarded-for`: ours, as the network sees it. Envoy: the address of
/// `LocalInfo`. Nothing is sent to find it out.
pub(super) fn local_address() -> String {
    let routed = || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((Ipv4Addr::new(198, 51, 100, 1), 9))?;
        socket.local_addr()
    };
    routed()
        .map_or(Ipv4Addr::LOCALHOST.into(), |address: SocketAddr| {
            address.ip()
        })
        .to_string()
}
