//! Filters and their configuration, compiled from Envoy's messages.

use std::sync::Arc;

use lateen_protocols::envoy::{
    envoy::{
        config::route::v3 as route_proto,
        extensions::filters::{
            http::{
                admission_control::v3::AdmissionControl as AdmissionProto,
                bandwidth_limit::v3::BandwidthLimit as BandwidthProto,
                buffer::v3::{Buffer as BufferProto, BufferPerRoute},
                compressor::v3::{Compressor as CompressorProto, CompressorPerRoute},
                cors::v3::{Cors as CorsProto, CorsPolicy},
                csrf::v3::CsrfPolicy,
                decompressor::v3::Decompressor as DecompressorProto,
                dynamic_forward_proxy::v3::{
                    FilterConfig as ForwardProto, PerRouteConfig as ForwardRoute,
                },
                ext_authz::v3::{ExtAuthz as ExtAuthzProto, ExtAuthzPerRoute},
                fault::v3::HttpFault,
                grpc_http1_bridge::v3::Config as BridgeProto,
                grpc_stats::v3::FilterConfig as GrpcStatsProto,
                grpc_web::v3::GrpcWeb as GrpcWebProto,
                header_mutation::v3::{HeaderMutation as MutationProto, HeaderMutationPerRoute},
                header_to_metadata::v3::Config as HeaderToMetadataProto,
                health_check::v3::HealthCheck as HealthProto,
                jwt_authn::v3::{JwtAuthentication, PerRouteConfig as JwtRoute},
                local_ratelimit::v3::LocalRateLimit as LocalRateLimitProto,
                lua::v3::{Lua as LuaProto, LuaPerRoute},
                original_src::v3::OriginalSrc as OriginalSrcProto,
                ratelimit::v3::{RateLimit as RateLimitProto, RateLimitPerRoute},
                rbac::v3::{Rbac as RbacProto, RbacPerRoute},
                router::v3::Router as RouterProto,
                set_metadata::v3::Config as SetMetadataProto,
                stateful_session::v3::{StatefulSession as SessionProto, StatefulSessionPerRoute},
            },
            network::http_connection_manager::v3::{
                HttpFilter as HttpFilterProto, http_filter::ConfigType,
            },
        },
    },
    google::protobuf as pb,
};
use lateen_protocols::istio::mixer::v1::config::client::{HttpClientConfig, ServiceConfig};

use super::{
    Entry, HttpFilter, HttpFilters, RouteFilterConfig, RouterOptions, admission_control,
    bandwidth_limit, buffer, compressor, cors, csrf, decompressor, dynamic_forward_proxy,
    ext_authz, fault, grpc_http1_bridge, grpc_stats, grpc_web, header_mutation, header_to_metadata,
    health_check, jwt_authn, local_ratelimit, lua, original_src, ratelimit, rbac, set_metadata,
    stateful_session,
};
use crate::{
    config_error::ConfigError,
    head::Name,
    mixer::{self, HttpMixer},
    proto::{invalid, unpack},
    shared::Shared,
    stats::Scope,
};

impl HttpFilters {
    /// Compiles a connection manager's list. `scope` is `http.PREFIX.`.
    ///
    /// # Errors
    /// When a filter is not known (unless it is optional), or the router is not the last.
    pub fn compile(
        list: &[HttpFilterProto],
        scope: &Scope,
        shared: &Shared,
    ) -> Result<HttpFilters, ConfigError> {
        let mut filters = HttpFilters {
            list: Vec::new(),
            scripts: false,
            router: RouterOptions::default(),
        };
        let mut router = false;
        for proto in list {
            let within =
                |error: ConfigError| error.within(format_args!("http filter {}", proto.name));
            if router {
                return Err(within(invalid("http_filters", "stands after the router")));
            }
            let any = match proto.config_type.as_ref() {
                Some(ConfigType::TypedConfig(any)) => any,
                Some(ConfigType::ConfigDiscovery(_)) => {
                    return Err(within(invalid("config_discovery", "not supported")));
                }
                None => return Err(within(invalid("typed_config", "absent"))),
            };
            if let Some(options) = unpack::<RouterProto>(any).map_err(within)? {
                if proto.disabled {
                    return Err(within(invalid("disabled", "the router cannot be disabled")));
                }
                filters.router = router_options(&options).map_err(within)?;
                router = true;
                continue;
            }
            match HttpFilter::compile(any, scope, shared).map_err(within)? {
                Some(filter) => {
                    filters.scripts |= matches!(filter, HttpFilter::Lua(_));
                    filters.list.push(Entry {
                        name: proto.name.as_str().into(),
                        disabled: proto.disabled,
                        filter,
                    });
                }
                None if proto.is_optional => {
                    tracing::warn!(filter = %proto.name, type_url = %any.type_url, "unknown optional filter left out");
                }
                None => {
                    return Err(within(invalid(
                        any.type_url.clone(),
                        "this filter is not supported",
                    )));
                }
            }
        }
        if router {
            Ok(filters)
        } else {
            Err(invalid("http_filters", "the last filter is not the router"))
        }
    }
}

fn router_options(options: &RouterProto) -> Result<RouterOptions, ConfigError> {
    let unsupported = [
        ("upstream_log", !options.upstream_log.is_empty()),
        (
            "upstream_http_filters",
            !options.upstream_http_filters.is_empty(),
        ),
    ];
    match unsupported.iter().find(|(_, present)| *present) {
        Some((field, _)) => Err(invalid(*field, "not supported")),
        None => Ok(RouterOptions {
            suppress_envoy_headers: options.suppress_envoy_headers,
            respect_expected_rq_timeout: options.respect_expected_rq_timeout,
            strict_check_headers: options.strict_check_headers.iter().map(Name::new).collect(),
        }),
    }
}

impl HttpFilter {
    /// Compiles a filter; `None` if it is of a kind that is not known.
    fn compile(
        any: &pb::Any,
        scope: &Scope,
        shared: &Shared,
    ) -> Result<Option<HttpFilter>, ConfigError> {
        if let Some(fault) = unpack::<HttpFault>(any)? {
            return Ok(Some(HttpFilter::Fault(fault::Fault::compile(
                &fault,
                scope,
                &shared.layers,
            )?)));
        }
        if unpack::<CorsProto>(any)?.is_some() {
            return Ok(Some(HttpFilter::Cors(cors::Cors::new(scope))));
        }
        if let Some(rbac) = unpack::<RbacProto>(any)? {
            let rbac = rbac::HttpRbac::compile(&rbac, scope)?;
            return Ok(Some(HttpFilter::Rbac(Box::new(rbac))));
        }
        if let Some(buffer) = unpack::<BufferProto>(any)? {
            return Ok(Some(HttpFilter::Buffer(buffer::Buffer::compile(&buffer)?)));
        }
        if let Some(limit) = unpack::<BandwidthProto>(any)? {
            let limit = bandwidth_limit::BandwidthLimit::compile(&limit, shared, false)?;
            return Ok(Some(HttpFilter::BandwidthLimit(Box::new(limit))));
        }
        if let Some(stats) = unpack::<GrpcStatsProto>(any)? {
            let stats = grpc_stats::GrpcStats::compile(&stats)?;
            return Ok(Some(HttpFilter::GrpcStats(Box::new(stats))));
        }
        if unpack::<GrpcWebProto>(any)?.is_some() {
            return Ok(Some(HttpFilter::GrpcWeb(grpc_web::GrpcWeb::default())));
        }
        if let Some(bridge) = unpack::<BridgeProto>(any)? {
            let bridge = grpc_http1_bridge::GrpcHttp1Bridge::compile(&bridge);
            return Ok(Some(HttpFilter::GrpcHttp1Bridge(bridge)));
        }
        if let Some(session) = unpack::<SessionProto>(any)? {
            let session = stateful_session::StatefulSession::compile(&session, scope)?;
            return Ok(Some(HttpFilter::StatefulSession(session)));
        }
        if let Some(limit) = unpack::<RateLimitProto>(any)? {
            let limit = ratelimit::RateLimit::compile(&limit, shared)?;
            return Ok(Some(HttpFilter::RateLimit(Box::new(limit))));
        }
        if let Some(mutation) = unpack::<MutationProto>(any)? {
            let mutation = header_mutation::HeaderMutation::compile(&mutation)?;
            return Ok(Some(HttpFilter::HeaderMutation(mutation)));
        }
        if let Some(compressor) = unpack::<CompressorProto>(any)? {
            let compressor = compressor::Compressor::compile(&compressor, scope)?;
            return Ok(Some(HttpFilter::Compressor(Box::new(compressor))));
        }
        if let Some(control) = unpack::<AdmissionProto>(any)? {
            let control =
                admission_control::AdmissionControl::compile(&control, scope, &shared.layers)?;
            return Ok(Some(HttpFilter::AdmissionControl(Box::new(control))));
        }
        if let Some(forward) = unpack::<ForwardProto>(any)? {
            let forward = dynamic_forward_proxy::DynamicForwardProxy::compile(&forward, shared)?;
            return Ok(Some(HttpFilter::DynamicForwardProxy(forward)));
        }
        if let Some(source) = unpack::<OriginalSrcProto>(any)? {
            let source = original_src::OriginalSrc { mark: source.mark };
            return Ok(Some(HttpFilter::OriginalSrc(source)));
        }
        if let Some(decompressor) = unpack::<DecompressorProto>(any)? {
            let decompressor =
                decompressor::Decompressor::compile(&decompressor, scope, &shared.layers)?;
            return Ok(Some(HttpFilter::Decompressor(Box::new(decompressor))));
        }
        if let Some(script) = unpack::<LuaProto>(any)? {
            let script = lua::Lua::compile(&script, scope)?;
            return Ok(Some(HttpFilter::Lua(Box::new(script))));
        }
        if let Some(jwt) = unpack::<JwtAuthentication>(any)? {
            let jwt = jwt_authn::JwtAuthn::compile(&jwt, scope, shared)?;
            return Ok(Some(HttpFilter::JwtAuthn(Box::new(jwt))));
        }
        if let Some(policy) = unpack::<CsrfPolicy>(any)? {
            let csrf = csrf::Csrf::compile(&policy, scope, &shared.layers)?;
            return Ok(Some(HttpFilter::Csrf(Box::new(csrf))));
        }
        if let Some(metadata) = unpack::<SetMetadataProto>(any)? {
            let metadata = set_metadata::SetMetadata::compile(&metadata, scope)?;
            return Ok(Some(HttpFilter::SetMetadata(metadata)));
        }
        if let Some(rules) = unpack::<HeaderToMetadataProto>(any)? {
            let rules = header_to_metadata::HeaderToMetadata::compile(&rules)?;
            return Ok(Some(HttpFilter::HeaderToMetadata(rules)));
        }
        if let Some(limit) = unpack::<LocalRateLimitProto>(any)? {
            let limit = local_ratelimit::LocalRateLimit::compile(&limit, shared)?;
            return Ok(Some(HttpFilter::LocalRateLimit(Box::new(limit))));
        }
        if let Some(check) = unpack::<HealthProto>(any)? {
            let check = health_check::HealthCheck::compile(&check)?;
            return Ok(Some(HttpFilter::HealthCheck(Box::new(check))));
        }
        if let Some(authz) = unpack::<ExtAuthzProto>(any)? {
            let authz = ext_authz::ExtAuthz::compile(&authz, scope)?;
            return Ok(Some(HttpFilter::ExtAuthz(Box::new(authz))));
        }
        if let Some(config) = unpack::<HttpClientConfig>(any)? {
            let mixer = HttpMixer::compile(&config, shared)?;
            return Ok(Some(HttpFilter::Mixer(Box::new(mixer))));
        }
        Ok(None)
    }
}

impl RouteFilterConfig {
    /// Compiles an entry of `typed_per_filter_config`; `None` if it is optional and not known.
    ///
    /// # Errors
    /// When it is not valid, or not known and not optional.
    pub fn compile(
        any: &pb::Any,
        shared: &Shared,
    ) -> Result<Option<RouteFilterConfig>, ConfigError> {
        if let Some(wrapper) = unpack::<route_proto::FilterConfig>(any)? {
            return match (wrapper.disabled, wrapper.config.as_ref()) {
                (true, _) => Ok(Some(RouteFilterConfig::Disabled)),
                (false, None) => Err(invalid("config", "absent")),
                (false, Some(inner)) if inner.type_url.is_empty() => {
                    Ok(Some(RouteFilterConfig::Enabled))
                }
                (false, Some(inner)) => match RouteFilterConfig::compile(inner, shared) {
                    Err(error) if wrapper.is_optional => {
                        tracing::warn!(%error, "optional filter configuration left out");
                        Ok(None)
                    }
                    other => other,
                },
            };
        }
        if let Some(fault) = unpack::<HttpFault>(any)? {
            return Ok(Some(RouteFilterConfig::Fault(Arc::new(
                fault::FaultRules::compile(&fault, &shared.layers)?,
            ))));
        }
        if let Some(policy) = unpack::<CorsPolicy>(any)? {
            return Ok(Some(RouteFilterConfig::Cors(Arc::new(
                cors::CorsRules::compile(&policy)?,
            ))));
        }
        if let Some(rbac) = unpack::<RbacPerRoute>(any)? {
            return Ok(Some(RouteFilterConfig::Rbac(Arc::new(
                rbac::RbacRules::compile_route(&rbac)?,
            ))));
        }
        if let Some(buffer) = unpack::<BufferPerRoute>(any)? {
            return buffer::Buffer::compile_route(&buffer).map(Some);
        }
        if let Some(limit) = unpack::<BandwidthProto>(any)? {
            let limit = bandwidth_limit::BandwidthLimit::compile(&limit, shared, true)?;
            return Ok(Some(RouteFilterConfig::BandwidthLimit(Arc::new(limit))));
        }
        if let Some(mutation) = unpack::<HeaderMutationPerRoute>(any)? {
            let mutations = header_mutation::Mutations::compile_route(&mutation)?;
            return Ok(Some(RouteFilterConfig::HeaderMutation(vec![mutations])));
        }
        if let Some(compressor) = unpack::<CompressorPerRoute>(any)? {
            return compressor::Compressor::compile_route(&compressor).map(Some);
        }
        if let Some(forward) = unpack::<ForwardRoute>(any)? {
            return dynamic_forward_proxy::DynamicForwardProxy::compile_route(&forward).map(Some);
        }
        if let Some(script) = unpack::<LuaPerRoute>(any)? {
            return lua::LuaRoute::compile(&script).map(Some);
        }
        if let Some(jwt) = unpack::<JwtRoute>(any)? {
            return jwt_authn::compile_route(&jwt).map(Some);
        }
        if let Some(policy) = unpack::<CsrfPolicy>(any)? {
            let rules = csrf::CsrfRules::compile(&policy, &shared.layers)?;
            return Ok(Some(RouteFilterConfig::Csrf(Arc::new(rules))));
        }
        if let Some(rules) = unpack::<HeaderToMetadataProto>(any)? {
            let rules = header_to_metadata::HeaderToMetadata::compile(&rules)?;
            return Ok(Some(RouteFilterConfig::HeaderToMetadata(Arc::new(rules))));
        }
        if let Some(limit) = unpack::<LocalRateLimitProto>(any)? {
            let limit = local_ratelimit::LocalRateLimit::compile(&limit, shared)?;
            return Ok(Some(RouteFilterConfig::LocalRateLimit(Arc::new(limit))));
        }
        if let Some(session) = unpack::<StatefulSessionPerRoute>(any)? {
            return stateful_session::Sessions::compile_route(&session).map(Some);
        }
        if let Some(limit) = unpack::<RateLimitPerRoute>(any)? {
            let limit = ratelimit::RateLimitRoute::compile(&limit, shared)?;
            return Ok(Some(RouteFilterConfig::RateLimit(Arc::new(limit))));
        }
        if let Some(authz) = unpack::<ExtAuthzPerRoute>(any)? {
            return Ok(Some(RouteFilterConfig::ExtAuthz(Arc::new(
                ext_authz::ExtAuthzRoute::compile(&authz)?,
            ))));
        }
        if let Some(service) = unpack::<ServiceConfig>(any)? {
            return Ok(Some(RouteFilterConfig::Mixer(Arc::new(
                mixer::Service::compile(&service)?,
            ))));
        }
        Err(invalid(
            any.type_url.clone(),
            "this filter configuration is not supported",
        ))
    }

    /// Takes what a more specific level says: most filters go by that alone, some by all levels together.
    pub(crate) fn refine(&mut self, config: RouteFilterConfig) {
        match (self, config) {
            (RouteFilterConfig::HeaderMutation(all), RouteFilterConfig::HeaderMutation(own)) => {
                all.extend(own);
            }
            (RouteFilterConfig::ExtAuthz(base), RouteFilterConfig::ExtAuthz(own)) => {
                *base = Arc::new(own.over(base));
            }
            (present, config) => *present = config,
        }
    }

    /// Adds the old `cors` field of a route or virtual host, unless the filter has its own entry.
    pub(crate) fn add_legacy_cors(
        configs: &mut Vec<(Arc<str>, RouteFilterConfig)>,
        policy: &route_proto::CorsPolicy,
    ) -> Result<(), ConfigError> {
        const NAME: &str = "envoy.filters.http.cors";
        let policy = CorsPolicy {
            allow_origin_string_match: policy.allow_origin_string_match.clone(),
            allow_methods: policy.allow_methods.clone(),
            allow_headers: policy.allow_headers.clone(),
            expose_headers: policy.expose_headers.clone(),
            max_age: policy.max_age.clone(),
            allow_credentials: policy.allow_credentials,
            shadow_enabled: policy.shadow_enabled.clone(),
            allow_private_network_access: policy.allow_private_network_access,
            forward_not_matching_preflights: policy.forward_not_matching_preflights,
            filter_enabled: policy.enabled_specifier.clone().map(|specifier| {
                let route_proto::cors_policy::EnabledSpecifier::FilterEnabled(enabled) = specifier;
                enabled
            }),
        };
        let config = RouteFilterConfig::Cors(Arc::new(cors::CorsRules::compile(&policy)?));
        match configs.iter_mut().find(|(name, _)| **name == *NAME) {
            Some((_, present)) => *present = config,
            None => configs.push((NAME.into(), config)),
        }
        Ok(())
    }
}
