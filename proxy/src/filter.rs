//! HTTP filters: an enum of built-ins, run in configured order for each request. A filter sees heads, the
//! stream's facts and the selected route; it may change them or answer in the upstream's place.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use lateen_protocols::envoy::{
    envoy::{
        config::route::v3 as route_proto,
        extensions::filters::{
            http::{
                buffer::v3::{Buffer as BufferProto, BufferPerRoute},
                cors::v3::{Cors as CorsProto, CorsPolicy},
                ext_authz::v3::{ExtAuthz as ExtAuthzProto, ExtAuthzPerRoute},
                fault::v3::HttpFault,
                grpc_stats::v3::FilterConfig as GrpcStatsProto,
                header_mutation::v3::{HeaderMutation as MutationProto, HeaderMutationPerRoute},
                health_check::v3::HealthCheck as HealthProto,
                rbac::v3::{Rbac as RbacProto, RbacPerRoute},
                router::v3::Router as RouterProto,
            },
            network::http_connection_manager::v3::{
                HttpFilter as HttpFilterProto, http_filter::ConfigType,
            },
        },
    },
    google::protobuf as pb,
};
use lateen_protocols::istio::mixer::v1::config::client::{HttpClientConfig, ServiceConfig};

use crate::{
    body::Body,
    config_error::ConfigError,
    format::Facts,
    head::{Name, RequestHead, ResponseHead},
    info::{ResponseFlags, StreamInfo},
    mixer::{self, HttpMixer},
    proto::{invalid, unpack},
    reject::Reject,
    retry::RetryOn,
    route::{RouteTable, Selected},
    shared::Shared,
    stats::Scope,
};

pub mod buffer;
pub mod cors;
pub mod ext_authz;
pub mod fault;
mod gather;
pub mod grpc_stats;
pub mod header_mutation;
pub mod health_check;
mod per_cluster;
#[cfg(test)]
mod tests;
pub mod rbac;

/// The filters of a connection manager, in order; the router ends the list and is not in it.
#[derive(Debug)]
pub struct HttpFilters {
    list: Vec<Entry>,
    /// What the router filter says.
    pub router: RouterOptions,
}

/// A filter of the list.
#[derive(Debug)]
struct Entry {
    /// Routes configure the filter under this name.
    name: Box<str>,
    /// Runs only where a route configures it.
    disabled: bool,
    filter: HttpFilter,
}

/// A built-in filter.
#[derive(Debug)]
pub enum HttpFilter {
    /// Delays and aborts.
    Fault(fault::Fault),
    /// Cross-origin requests.
    Cors(cors::Cors),
    /// Who may do what.
    Rbac(rbac::HttpRbac),
    /// Waits for the whole body.
    Buffer(buffer::Buffer),
    /// Counts gRPC calls.
    GrpcStats(Box<grpc_stats::GrpcStats>),
    /// Changes headers.
    HeaderMutation(header_mutation::HeaderMutation),
    /// Answers health checks.
    HealthCheck(Box<health_check::HealthCheck>),
    /// Asks a service.
    ExtAuthz(Box<ext_authz::ExtAuthz>),
    /// Asks Mixer, and reports.
    Mixer(Box<HttpMixer>),
}

/// Options of the router filter.
#[derive(Clone, Debug, Default)]
pub struct RouterOptions {
    /// Add no `x-envoy-*` headers to requests and responses.
    pub suppress_envoy_headers: bool,
    /// Take `x-envoy-expected-rq-timeout-ms` as the timeout.
    pub respect_expected_rq_timeout: bool,
    /// `x-envoy-*` headers whose bad values are refused instead of ignored.
    pub strict_check_headers: Vec<Name>,
}

/// Configuration that a route, virtual host or weighted cluster has for a filter.
#[derive(Clone, Debug)]
pub enum RouteFilterConfig {
    /// The filter does not run.
    Disabled,
    /// The filter runs as the connection manager configures it, even if it is disabled there.
    Enabled,
    /// Of the fault filter.
    Fault(Arc<fault::FaultRules>),
    /// Of the CORS filter.
    Cors(Arc<cors::CorsRules>),
    /// Of the RBAC filter.
    Rbac(Arc<rbac::RbacRules>),
    /// Of the buffer filter.
    Buffer(Arc<buffer::Buffer>),
    /// Of the header mutation filter.
    HeaderMutation(Arc<header_mutation::Mutations>),
    /// Of the external authorization filter.
    ExtAuthz(Arc<ext_authz::ExtAuthzRoute>),
    /// Of the Mixer filter.
    Mixer(Arc<mixer::Service>),
}

/// What a filter has before it while a request passes.
#[derive(Debug)]
pub struct FilterContext<'a> {
    /// Clusters, secrets, statistics.
    pub shared: &'a Arc<Shared>,
    /// Facts of the stream; borrow briefly, never across an await.
    pub info: &'a Rc<RefCell<StreamInfo>>,
    /// What filters keep for later in the same stream.
    pub state: &'a mut FilterState,
    table: &'a Arc<RouteTable>,
    selected: Option<Selected>,
    stale: bool,
    /// Name of the filter that runs now.
    filter: &'a str,
    /// Whether the request came from inside the mesh (`x-envoy-internal`).
    internal: bool,
}

/// What a filter has before it when the head of a response passes.
#[derive(Clone, Copy, Debug)]
pub struct ResponseContext<'a> {
    /// Clusters, secrets, statistics.
    pub shared: &'a Arc<Shared>,
    /// Facts of the stream; borrow briefly.
    pub info: &'a Rc<RefCell<StreamInfo>>,
    /// The request as it went upstream; `None` if its head was not understood.
    pub request: Option<&'a RequestHead>,
    /// Its route, if it has one.
    pub route: Option<&'a Selected>,
}

/// What filters keep from the request to the end of the stream. Dropped with the stream.
#[derive(Debug, Default)]
pub struct FilterState {
    cors: Option<cors::Allowed>,
    fault: Option<fault::Active>,
    ext_authz: Option<ext_authz::Kept>,
    grpc_stats: Option<grpc_stats::Active>,
    health_check: Option<health_check::Check>,
    mixer: Option<mixer::MixerState>,
}

/// A stream that has ended, for `on_complete`.
#[derive(Debug)]
pub struct Completed<'a> {
    /// Everything known of it.
    pub facts: Facts<'a>,
    /// What the filters kept.
    pub state: &'a FilterState,
}

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
                Some(filter) => filters.list.push(Entry {
                    name: proto.name.as_str().into(),
                    disabled: proto.disabled,
                    filter,
                }),
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

    /// Whether there is none but the router.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Runs the filters over a request; the first refusal ends it. A filter that needs the body reads it
    /// and puts another in its place.
    ///
    /// # Errors
    /// The answer a filter gave in the upstream's place.
    pub async fn on_request<'a>(
        &'a self,
        cx: &mut FilterContext<'a>,
        head: &mut RequestHead,
        body: &mut Body,
    ) -> Result<(), Reject> {
        for entry in &self.list {
            cx.filter = &entry.name;
            let skip = match cx.config(head) {
                None => entry.disabled,
                Some(config) => matches!(config, RouteFilterConfig::Disabled),
            };
            if skip {
                continue;
            }
            // Futures of filters that wait are boxed, so that those that do not wait cost no room.
            match &entry.filter {
                HttpFilter::Fault(fault) => Box::pin(fault.on_request(cx, head)).await?,
                HttpFilter::Cors(cors) => cors.on_request(cx, head)?,
                HttpFilter::Rbac(rbac) => rbac.on_request(cx, head)?,
                HttpFilter::GrpcStats(stats) => stats.on_request(cx, head, body)?,
                HttpFilter::HeaderMutation(mutation) => mutation.on_request(cx, head)?,
                HttpFilter::HealthCheck(check) => check.on_request(cx, head)?,
                HttpFilter::Buffer(buffer) => {
                    Box::pin(buffer.on_request(cx, head, body)).await?;
                }
                HttpFilter::ExtAuthz(authz) => {
                    Box::pin(authz.on_request(cx, head, body)).await?;
                }
                HttpFilter::Mixer(mixer) => {
                    let mut state = None;
                    let outcome = Box::pin(mixer.on_request(cx, head, &mut state)).await;
                    cx.state.mixer = state;
                    outcome?;
                }
            }
        }
        Ok(())
    }

    /// Runs the filters over a response, the last first.
    pub fn on_response(
        &self,
        cx: &ResponseContext<'_>,
        state: &mut FilterState,
        head: &mut ResponseHead,
        body: &mut Body,
    ) {
        for entry in self.list.iter().rev() {
            entry.on_response(cx, state, head, body);
        }
    }

    /// Tells the filters that the stream has ended. Called exactly once, after the facts are final.
    pub fn on_complete(&self, completed: &Completed<'_>) {
        for entry in &self.list {
            entry.filter.on_complete(completed);
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

impl RouterOptions {
    /// Refuses a request whose `x-envoy-*` headers are not valid, as far as they are to be checked.
    ///
    /// # Errors
    /// 400 `IH`.
    pub fn check(&self, head: &RequestHead) -> Result<(), Reject> {
        for name in &self.strict_check_headers {
            let Some(value) = head.headers.get(name) else {
                continue;
            };
            let text = String::from_utf8_lossy(value);
            let valid = match name.as_bytes() {
                b"x-envoy-retry-on" | b"x-envoy-retry-grpc-on" => {
                    let mut known = true;
                    RetryOn::parse(&text, |_| known = false);
                    known
                }
                _ => number(Some(value)).is_some(),
            };
            if !valid {
                let name = String::from_utf8_lossy(name.as_bytes());
                return Err(Reject::new(
                    400,
                    format!("invalid header '{name}' with value '{text}'"),
                    ResponseFlags::INVALID_ENVOY_REQUEST_HEADERS,
                    format!("request_headers_failed_strict_check{{{name}}}"),
                ));
            }
        }
        Ok(())
    }
}

impl Entry {
    fn on_response(
        &self,
        cx: &ResponseContext<'_>,
        state: &mut FilterState,
        head: &mut ResponseHead,
        body: &mut Body,
    ) {
        match &self.filter {
            HttpFilter::Cors(_) => {
                if let Some(allowed) = &state.cors {
                    allowed.on_response(head);
                }
            }
            HttpFilter::Mixer(mixer) => {
                if let Some(kept) = &state.mixer {
                    mixer.on_response(kept, head);
                }
            }
            HttpFilter::ExtAuthz(_) => {
                if let Some(kept) = state.ext_authz.take() {
                    kept.on_response(head);
                }
            }
            HttpFilter::GrpcStats(stats) => stats.on_response(state, body),
            HttpFilter::HeaderMutation(mutation) => {
                if let Some(own) = self.runs(cx) {
                    mutation.on_response(cx, own, head);
                }
            }
            HttpFilter::HealthCheck(check) => {
                if self.runs(cx).is_some() {
                    check.on_response(cx, state, head);
                }
            }
            HttpFilter::Fault(_) | HttpFilter::Rbac(_) | HttpFilter::Buffer(_) => {}
        }
    }

    /// The route's configuration, unless the filter does not run for this stream.
    fn runs<'a>(&self, cx: &ResponseContext<'a>) -> Option<Option<&'a RouteFilterConfig>> {
        match cx.route.and_then(|route| route.filter_config(&self.name)) {
            None if self.disabled => None,
            Some(RouteFilterConfig::Disabled) => None,
            own => Some(own),
        }
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
                &fault, scope,
            )?)));
        }
        if unpack::<CorsProto>(any)?.is_some() {
            return Ok(Some(HttpFilter::Cors(cors::Cors::new(scope))));
        }
        if let Some(rbac) = unpack::<RbacProto>(any)? {
            return Ok(Some(HttpFilter::Rbac(rbac::HttpRbac::compile(
                &rbac, scope,
            )?)));
        }
        if let Some(buffer) = unpack::<BufferProto>(any)? {
            return Ok(Some(HttpFilter::Buffer(buffer::Buffer::compile(&buffer)?)));
        }
        if let Some(stats) = unpack::<GrpcStatsProto>(any)? {
            let stats = grpc_stats::GrpcStats::compile(&stats)?;
            return Ok(Some(HttpFilter::GrpcStats(Box::new(stats))));
        }
        if let Some(mutation) = unpack::<MutationProto>(any)? {
            let mutation = header_mutation::HeaderMutation::compile(&mutation)?;
            return Ok(Some(HttpFilter::HeaderMutation(mutation)));
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

    fn on_complete(&self, completed: &Completed<'_>) {
        match self {
            HttpFilter::Mixer(mixer) => {
                if let Some(kept) = &completed.state.mixer {
                    mixer.on_complete(kept, &completed.facts);
                }
            }
            // They keep what they count in the state, which ends with the stream, or count at once.
            HttpFilter::Fault(_)
            | HttpFilter::Cors(_)
            | HttpFilter::Rbac(_)
            | HttpFilter::Buffer(_)
            | HttpFilter::HeaderMutation(_)
            | HttpFilter::HealthCheck(_)
            | HttpFilter::ExtAuthz(_) => {}
            HttpFilter::GrpcStats(stats) => {
                if let Some(active) = &completed.state.grpc_stats {
                    stats.on_complete(active, &completed.facts);
                }
            }
        }
    }
}

impl<'a> FilterContext<'a> {
    /// A context for one request, with its route selected (or none found).
    pub(crate) fn new(
        shared: &'a Arc<Shared>,
        info: &'a Rc<RefCell<StreamInfo>>,
        state: &'a mut FilterState,
        table: &'a Arc<RouteTable>,
        selected: Option<Selected>,
        internal: bool,
    ) -> FilterContext<'a> {
        FilterContext {
            shared,
            info,
            state,
            table,
            selected,
            stale: false,
            filter: "",
            internal,
        }
    }

    /// The route of the request.
    pub fn route(&mut self, head: &RequestHead) -> Option<&Selected> {
        if std::mem::take(&mut self.stale) {
            let connection = self.info.borrow().connection.clone();
            self.selected = self
                .table
                .select(head, connection.tls.as_ref(), self.internal)
                .ok();
        }
        self.selected.as_ref()
    }

    /// Makes the next look at the route select it anew, after a filter changed what routes match on.
    pub fn clear_route_cache(&mut self) {
        self.stale = true;
    }

    /// The route's configuration for the filter that runs now.
    pub fn config(&mut self, head: &RequestHead) -> Option<&RouteFilterConfig> {
        let filter = self.filter;
        self.route(head)?.filter_config(filter)
    }

    /// Gives up the context and keeps the route.
    pub(crate) fn into_route(mut self, head: &RequestHead) -> Option<Selected> {
        self.route(head);
        self.selected
    }
}

impl RouteFilterConfig {
    /// Compiles an entry of `typed_per_filter_config`; `None` if it is optional and not known.
    ///
    /// # Errors
    /// When it is not valid, or not known and not optional.
    #[expect(
        clippy::only_used_in_recursion,
        reason = "filters that look up clusters or secrets need it; those we have do not yet"
    )]
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
                fault::FaultRules::compile(&fault)?,
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
        if let Some(mutation) = unpack::<HeaderMutationPerRoute>(any)? {
            return Ok(Some(RouteFilterConfig::HeaderMutation(
                header_mutation::Mutations::compile_route(&mutation)?,
            )));
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

/// A whole number in a header's value.
fn number(value: Option<&[u8]>) -> Option<u64> {
    std::str::from_utf8(value?).ok()?.trim().parse().ok()
}
