//! HTTP filters: an enum of built-ins, run in configured order for each request. A filter sees heads, the
//! stream's facts and the selected route; it may change them or answer in the upstream's place.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use crate::{
    body::Body,
    boxed::boxed,
    format::Facts,
    head::{Name, RequestHead, ResponseHead},
    info::{ResponseFlags, StreamInfo},
    mixer::{self, HttpMixer},
    reject::Reject,
    retry::RetryOn,
    route::{RouteTable, Selected},
    shared::Shared,
};

pub mod bandwidth_limit;
pub mod admission_control;
pub(crate) mod bucket;
pub mod buffer;
mod compile;
pub mod compressor;
pub mod cors;
pub mod csrf;
pub mod decompressor;
pub mod dynamic_forward_proxy;
pub mod ext_authz;
pub mod fault;
mod gather;
pub mod grpc_http1_bridge;
mod grpc_service;
pub mod grpc_stats;
pub mod grpc_web;
pub mod header_mutation;
pub mod header_to_metadata;
pub mod health_check;
pub mod jwt_authn;
pub mod local_ratelimit;
pub mod lua;
mod pace;
mod per_cluster;
pub mod original_src;
pub mod ratelimit;
pub mod rbac;
pub mod set_metadata;
pub mod stateful_session;
#[cfg(test)]
mod tests;

/// The filters of a connection manager, in order; the router ends the list and is not in it.
#[derive(Debug)]
pub struct HttpFilters {
    list: Vec<Entry>,
    /// Some of them are scripts.
    scripts: bool,
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
    Rbac(Box<rbac::HttpRbac>),
    /// Waits for the whole body.
    Buffer(buffer::Buffer),
    /// Slows bodies.
    BandwidthLimit(Box<bandwidth_limit::BandwidthLimit>),
    /// Counts gRPC calls.
    GrpcStats(Box<grpc_stats::GrpcStats>),
    /// Serves browsers' gRPC.
    GrpcWeb(grpc_web::GrpcWeb),
    /// Serves gRPC without trailers.
    GrpcHttp1Bridge(grpc_http1_bridge::GrpcHttp1Bridge),
    /// Keeps sessions at their hosts.
    StatefulSession(stateful_session::StatefulSession),
    /// Asks how much is too much.
    RateLimit(Box<ratelimit::RateLimit>),
    /// Compresses responses.
    Compressor(Box<compressor::Compressor>),
    /// Refuses some requests while too few succeed.
    AdmissionControl(Box<admission_control::AdmissionControl>),
    /// Resolves the hosts that requests name.
    DynamicForwardProxy(dynamic_forward_proxy::DynamicForwardProxy),
    /// Makes connections to upstreams come from the downstream's address.
    OriginalSrc(original_src::OriginalSrc),
    /// Decompresses requests and responses.
    Decompressor(Box<decompressor::Decompressor>),
    /// Runs scripts.
    Lua(Box<lua::Lua>),
    /// Verifies tokens.
    JwtAuthn(Box<jwt_authn::JwtAuthn>),
    /// Keeps other sites' pages from changing things.
    Csrf(Box<csrf::Csrf>),
    /// Says what is said of each stream.
    SetMetadata(set_metadata::SetMetadata),
    /// Turns headers into metadata.
    HeaderToMetadata(header_to_metadata::HeaderToMetadata),
    /// Knows how much is too much.
    LocalRateLimit(Box<local_ratelimit::LocalRateLimit>),
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
    /// Of the header mutation filter, of each level, the least specific first.
    HeaderMutation(Vec<Arc<header_mutation::Mutations>>),
    /// Of the dynamic forward proxy filter.
    DynamicForwardProxy(Arc<dynamic_forward_proxy::HostFrom>),
    /// Of the Lua filter.
    Lua(Arc<lua::LuaRoute>),
    /// Of the JWT filter: the name of a requirement.
    JwtAuthn(Arc<str>),
    /// Of the CSRF filter.
    Csrf(Arc<csrf::CsrfRules>),
    /// Of the filter that turns headers into metadata.
    HeaderToMetadata(Arc<header_to_metadata::HeaderToMetadata>),
    /// Of the local rate limit filter.
    LocalRateLimit(Arc<local_ratelimit::LocalRateLimit>),
    /// Of the stateful session filter.
    StatefulSession(Arc<stateful_session::Sessions>),
    /// Of the rate limit filter.
    RateLimit(Arc<ratelimit::RateLimitRoute>),
    /// Of the external authorization filter.
    ExtAuthz(Arc<ext_authz::ExtAuthzRoute>),
    /// Of the bandwidth limit, in place of the filter's.
    BandwidthLimit(Arc<bandwidth_limit::BandwidthLimit>),
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
    bandwidth: Option<bandwidth_limit::SharedSpent>,
    admission_control: Option<admission_control::Awaited>,
    compressor: Option<compressor::Choice>,
    cors: Option<cors::Allowed>,
    fault: Option<fault::Active>,
    ext_authz: Option<ext_authz::Kept>,
    grpc_http1_bridge: Option<grpc_http1_bridge::Active>,
    grpc_stats: Option<grpc_stats::Active>,
    grpc_web: Option<Box<grpc_web::Active>>,
    local_ratelimit: Option<local_ratelimit::Kept>,
    ratelimit: Option<Box<ratelimit::Kept>>,
    stateful_session: Option<Box<stateful_session::Active>>,
    health_check: Option<health_check::Check>,
    /// Scripts that may wait have seen the response.
    lua_done: bool,
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
                HttpFilter::Fault(fault) => boxed(|| fault.on_request(cx, head)).await?,
                HttpFilter::Cors(cors) => cors.on_request(cx, head)?,
                HttpFilter::Rbac(rbac) => rbac.on_request(cx, head)?,
                HttpFilter::GrpcStats(stats) => stats.on_request(cx, head, body)?,
                HttpFilter::HeaderMutation(mutation) => mutation.on_request(cx, head)?,
                HttpFilter::Compressor(compressor) => compressor.on_request(cx, head),
                HttpFilter::AdmissionControl(control) => control.on_request(cx)?,
                HttpFilter::OriginalSrc(source) => source.on_request(cx),
                HttpFilter::DynamicForwardProxy(forward) => {
                    boxed(|| forward.on_request(cx, head)).await?;
                }
                HttpFilter::Decompressor(decompressor) => decompressor.on_request(head, body),
                HttpFilter::Lua(lua) => {
                    boxed(|| lua.on_request(cx, &entry.name, head, body)).await?;
                }
                HttpFilter::JwtAuthn(jwt) => boxed(|| jwt.on_request(cx, head)).await?,
                HttpFilter::Csrf(csrf) => csrf.on_request(cx, head)?,
                HttpFilter::SetMetadata(metadata) => metadata.on_request(cx),
                HttpFilter::HeaderToMetadata(rules) => rules.on_request(cx, head),
                HttpFilter::LocalRateLimit(limit) => limit.on_request(cx, head)?,
                HttpFilter::GrpcWeb(web) => web.on_request(cx, head, body),
                HttpFilter::StatefulSession(session) => session.on_request(cx, head),
                HttpFilter::GrpcHttp1Bridge(bridge) => {
                    boxed(|| bridge.on_request(cx, head, body)).await?;
                }
                HttpFilter::RateLimit(limit) => {
                    boxed(|| limit.on_request(cx, head)).await?;
                }
                HttpFilter::HealthCheck(check) => check.on_request(cx, head)?,
                HttpFilter::BandwidthLimit(limit) => limit.on_request(cx, head, body),
                HttpFilter::Buffer(buffer) => {
                    boxed(|| buffer.on_request(cx, head, body)).await?;
                }
                HttpFilter::ExtAuthz(authz) => {
                    boxed(|| authz.on_request(cx, head, body)).await?;
                }
                HttpFilter::Mixer(mixer) => {
                    let mut state = None;
                    let outcome = boxed(|| mixer.on_request(cx, head, &mut state)).await;
                    cx.state.mixer = state;
                    outcome?;
                }
            }
        }
        Ok(())
    }

    /// Whether a filter needs a response's body before its head goes on.
    pub fn holds_response(&self, state: &FilterState) -> bool {
        state.grpc_http1_bridge.is_some() || state.grpc_web.is_some() || self.scripts
    }

    /// Reads as much of an upstream's response as filters need before its head goes on.
    ///
    /// # Errors
    /// The answer instead, when there is more of it than may be read.
    pub async fn hold_response(
        &self,
        cx: &ResponseContext<'_>,
        state: &mut FilterState,
        head: &mut ResponseHead,
        body: &mut Body,
    ) -> Result<(), Reject> {
        state.lua_done = true;
        for entry in self.list.iter().rev() {
            match &entry.filter {
                HttpFilter::Lua(lua) => {
                    if let Some(own) = entry.runs(cx).filter(|own| lua.waits(*own)) {
                        lua.run_response(cx, &entry.name, own, head, body).await?;
                    }
                }
                HttpFilter::GrpcHttp1Bridge(_) => {
                    if let Some(active) = state.grpc_http1_bridge {
                        active.hold(head, body).await?;
                    }
                }
                HttpFilter::GrpcWeb(_) => {
                    if let Some(active) = &state.grpc_web {
                        active.hold(head, body).await;
                    }
                }
                _ => {}
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
            HttpFilter::GrpcWeb(_) => {
                if let Some(active) = &state.grpc_web {
                    active.on_response(cx, head, body);
                }
            }
            HttpFilter::StatefulSession(_) => {
                if let Some(active) = &state.stateful_session {
                    active.on_response(cx, head);
                }
            }
            HttpFilter::RateLimit(_) => {
                if let Some(kept) = state.ratelimit.take() {
                    kept.on_response(head);
                }
            }
            HttpFilter::Compressor(compressor) => {
                if self.runs(cx).is_some() {
                    compressor.on_response(state, head, body);
                }
            }
            HttpFilter::AdmissionControl(control) => control.on_response(state, head),
            HttpFilter::Decompressor(decompressor) => {
                if self.runs(cx).is_some() {
                    decompressor.on_response(head, body);
                }
            }
            HttpFilter::Lua(lua) => {
                if let Some(own) = self
                    .runs(cx)
                    .filter(|own| !state.lua_done || !lua.waits(*own))
                {
                    lua.on_response(cx, &self.name, own, head, body);
                }
            }
            HttpFilter::LocalRateLimit(_) => {
                if let Some(kept) = state.local_ratelimit.take() {
                    kept.on_response(head);
                }
            }
            HttpFilter::HeaderToMetadata(rules) => {
                if let Some(own) = self.runs(cx) {
                    rules.on_response(cx, own, head);
                }
            }
            HttpFilter::Fault(_) => {
                if let Some(active) = &state.fault {
                    active.on_response(body);
                }
            }
            HttpFilter::BandwidthLimit(limit) => {
                if let Some(own) = self.runs(cx) {
                    limit.on_response(own, state, body);
                }
            }
            HttpFilter::Rbac(_)
            | HttpFilter::Buffer(_)
            | HttpFilter::DynamicForwardProxy(_)
            | HttpFilter::OriginalSrc(_)
            | HttpFilter::JwtAuthn(_)
            | HttpFilter::Csrf(_)
            | HttpFilter::SetMetadata(_)
            | HttpFilter::GrpcHttp1Bridge(_) => {}
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
    fn on_complete(&self, completed: &Completed<'_>) {
        match self {
            HttpFilter::Mixer(mixer) => {
                if let Some(kept) = &completed.state.mixer {
                    mixer.on_complete(kept, &completed.facts);
                }
            }
            HttpFilter::AdmissionControl(control) => {
                control.on_complete(completed.state, &completed.facts);
            }
            // They keep what they count in the state, which ends with the stream, or count at once.
            HttpFilter::Fault(_)
            | HttpFilter::Cors(_)
            | HttpFilter::Rbac(_)
            | HttpFilter::Buffer(_)
            | HttpFilter::BandwidthLimit(_)
            | HttpFilter::HeaderMutation(_)
            | HttpFilter::Compressor(_)
            | HttpFilter::Decompressor(_)
            | HttpFilter::DynamicForwardProxy(_)
            | HttpFilter::OriginalSrc(_)
            | HttpFilter::Lua(_)
            | HttpFilter::JwtAuthn(_)
            | HttpFilter::Csrf(_)
            | HttpFilter::SetMetadata(_)
            | HttpFilter::HeaderToMetadata(_)
            | HttpFilter::LocalRateLimit(_)
            | HttpFilter::HealthCheck(_)
            | HttpFilter::GrpcWeb(_)
            | HttpFilter::GrpcHttp1Bridge(_)
            | HttpFilter::StatefulSession(_)
            | HttpFilter::RateLimit(_)
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
                .select(head, connection.tls.as_deref(), self.internal)
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

/// A whole number in a header's value.
fn number(value: Option<&[u8]>) -> Option<u64> {
    std::str::from_utf8(value?).ok()?.trim().parse().ok()
}
