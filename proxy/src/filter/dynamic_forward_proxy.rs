//! Resolves the host that a request names before a cluster of the same cache sends it there. Envoy:
//! `envoy.filters.http.dynamic_forward_proxy`.

use std::sync::Arc;

use lateen_protocols::envoy::envoy::extensions::filters::http::dynamic_forward_proxy::v3::{
    FilterConfig as FilterProto, PerRouteConfig, filter_config::ImplementationSpecifier,
    per_route_config::HostRewriteSpecifier,
};

use crate::{
    cluster::{DnsCache, Unresolved, with_port},
    config_error::ConfigError,
    filter::{FilterContext, RouteFilterConfig},
    head::{Name, RequestHead},
    info::ResponseFlags,
    proto::invalid,
    reject::Reject,
    shared::Shared,
    upstream::WorkerClusters,
};

/// The filter of one connection manager.
#[derive(Debug)]
pub struct DynamicForwardProxy {
    cache: Arc<DnsCache>,
}

/// Which host a route's requests are for, in place of what they name.
#[derive(Debug)]
pub enum HostFrom {
    /// This one.
    Literal(String),
    /// The one in this header, if it is there.
    Header(Name),
}

impl DynamicForwardProxy {
    /// Compiles the filter.
    ///
    /// # Errors
    /// The cache's settings are not valid, or something is not supported.
    pub fn compile(
        config: &FilterProto,
        shared: &Shared,
    ) -> Result<DynamicForwardProxy, ConfigError> {
        let unsupported = [
            ("save_upstream_address", config.save_upstream_address),
            (
                "allow_dynamic_host_from_filter_state",
                config.allow_dynamic_host_from_filter_state,
            ),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, given)| *given) {
            return Err(invalid(*field, "not supported"));
        }
        match config.implementation_specifier.as_ref() {
            Some(ImplementationSpecifier::DnsCacheConfig(cache)) => Ok(DynamicForwardProxy {
                cache: shared.clusters.dns_cache(cache, shared)?,
            }),
            Some(ImplementationSpecifier::SubClusterConfig(_)) => {
                Err(invalid("sub_cluster_config", "not supported"))
            }
            None => Err(invalid("dns_cache_config", "is required")),
        }
    }

    /// Compiles a route's configuration.
    ///
    /// # Errors
    /// It says nothing.
    pub fn compile_route(config: &PerRouteConfig) -> Result<RouteFilterConfig, ConfigError> {
        let from = match config.host_rewrite_specifier.as_ref() {
            Some(HostRewriteSpecifier::HostRewriteLiteral(host)) => HostFrom::Literal(host.clone()),
            Some(HostRewriteSpecifier::HostRewriteHeader(name)) => {
                HostFrom::Header(Name::new(name))
            }
            None => return Err(invalid("host_rewrite_specifier", "absent")),
        };
        Ok(RouteFilterConfig::DynamicForwardProxy(Arc::new(from)))
    }

    pub(super) async fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
    ) -> Result<(), Reject> {
        let Some(target) = cx.route(head).and_then(|route| route.target(head)) else {
            return Ok(());
        };
        let Some(local) = WorkerClusters::of(&cx.shared.clusters).get(&target.cluster) else {
            return Ok(());
        };
        if local.cluster.dns_cache().is_none() {
            return Ok(());
        }
        if let Some(RouteFilterConfig::DynamicForwardProxy(from)) = cx.config(head) {
            let host = match &**from {
                HostFrom::Literal(host) => Some(host.clone().into()),
                HostFrom::Header(name) => head.headers.get(name).map(<[u8]>::to_vec),
            };
            if let Some(host) = host.filter(|host| !host.is_empty()) {
                head.authority = host.into();
            }
        }
        let Some(host) = with_port(&head.authority, local.cluster.is_secure()) else {
            return Err(failed("empty_host_header"));
        };
        match self.cache.load(&host).await {
            Ok(()) => Ok(()),
            Err(Unresolved::Pending) => Err(Reject::new(
                503,
                "Dynamic forward proxy pending request overflow",
                ResponseFlags::default(),
                "dynamic_forward_proxy_pending_request_overflow",
            )),
            Err(Unresolved::Overflow) => Err(Reject::new(
                503,
                "DNS cache overflow",
                ResponseFlags::default(),
                "dns_cache_overflow",
            )),
            Err(Unresolved::Failed(reason)) => Err(failed(reason)),
        }
    }
}

fn failed(reason: &str) -> Reject {
    Reject::new(
        503,
        "DNS resolution failure",
        ResponseFlags::DNS_RESOLUTION_FAILED,
        format!("dns_resolution_failure{{{reason}}}"),
    )
}
