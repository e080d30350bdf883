//! HTTP routes out of VirtualServices, and the default route of a service.

use base64::Engine as _;
use envoy_types::pb::envoy::config::core::v3::{
    DataSource, HeaderValue, HeaderValueOption, RuntimeFractionalPercent, data_source::Specifier,
    header_value_option::HeaderAppendAction,
};
use envoy_types::pb::envoy::config::route::v3::{
    Decorator, DirectResponseAction, HeaderMatcher, QueryParameterMatcher, RedirectAction,
    RetryPolicy, Route, RouteAction, RouteMatch, WeightedCluster,
    header_matcher::HeaderMatchSpecifier, query_parameter_matcher::QueryParameterMatchSpecifier,
    redirect_action::PathRewriteSpecifier, redirect_action::RedirectResponseCode,
    redirect_action::SchemeRewriteSpecifier, retry_policy::RetryBackOff,
    retry_policy::RetryHostPredicate, retry_policy::retry_host_predicate, route::Action,
    route_action::ClusterNotFoundResponseCode, route_action::ClusterSpecifier,
    route_action::HashPolicy, route_action::HostRewriteSpecifier,
    route_action::RequestMirrorPolicy, route_action::hash_policy, route_match::PathSpecifier,
    weighted_cluster::ClusterWeight, weighted_cluster::cluster_weight,
};
use envoy_types::pb::envoy::extensions::filters::common::fault::v3::{
    FaultDelay, fault_delay::FaultDelaySecifier,
};
use envoy_types::pb::envoy::extensions::filters::http::cors::v3::CorsPolicy as EnvoyCors;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3::{
    FaultAbort, HttpFault, fault_abort::ErrorType,
};
use envoy_types::pb::envoy::extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate;
use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatchAndSubstitute, StringMatcher};
use envoy_types::pb::google::protobuf::{Any, Duration};
use lateen_config::networking::{
    CorsPolicy, DerivePort, Destination, HttpDestination, HttpFault as Fault, HttpMatch,
    HttpRedirect, HttpRetry, HttpRoute,
};
use lateen_config::reference::full_gateway;
use lateen_config::{Percent, StringMatch};

use crate::model::{Routes, Service, full_host};

use super::mixer::{self, Direction, RouteHooks};
use super::policy::Policy;
use super::tcp::source_fits;
use super::wire::{
    ZERO, any, bool_value, duration, exact, fraction, inline, metadata, nested, regex,
    string_matcher, structure, text, u32_value,
};
use super::{Scope, names};

/// Retried unless a VirtualService says otherwise: what cannot have reached the application.
const RETRY_ON: &str =
    "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";
const RETRIES: u32 = 2;
/// Begins the path of a redirect that replaces the matched prefix.
const MATCHED_PREFIX: &str = "%PREFIX()%";
/// Picks of another host before one already tried is taken again.
const HOST_PICKS: i64 = 5;

/// Where a VirtualService's routes are to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Binding<'a> {
    /// At sidecars.
    Mesh,
    /// At the gateway `NAMESPACE/NAME`.
    Gateway(&'a str),
}

impl Binding<'_> {
    fn name(&self) -> &str {
        match self {
            Self::Mesh => "mesh",
            Self::Gateway(name) => name,
        }
    }

    pub(super) fn is_bound(&self, routes: &Routes) -> bool {
        routes.gateways.iter().any(|gateway| gateway == self.name())
    }

    /// Whether a match's own gateways, or else its VirtualService's, include this one.
    pub(super) fn fits(&self, routes: &Routes, own: &[String]) -> bool {
        if own.is_empty() {
            return self.is_bound(routes);
        }
        own.iter()
            .any(|gateway| full_gateway(gateway, routes.namespace()) == self.name())
    }
}

/// The cluster a destination means, seen from a listener's port.
pub(super) fn cluster_name(
    scope: &Scope<'_>,
    namespace: &str,
    to: &Destination,
    listener_port: u16,
) -> String {
    if to.host.is_empty() {
        return names::NOWHERE.to_owned();
    }
    let host = full_host(&to.host.to_ascii_lowercase(), namespace);
    let port = to.port_number().unwrap_or_else(|| {
        match scope.snapshot.service(&host).map(|service| &*service.ports) {
            Some([only]) => only.number,
            _ => listener_port,
        }
    });
    names::outbound(port, &to.subset, &host)
}

/// The routes of a VirtualService that hold for this node there, in order; nothing after one that
/// matches everything.
pub(super) fn of_virtual_service(
    scope: &Scope<'_>,
    routes: &Routes,
    binding: Binding<'_>,
    listener_port: u16,
) -> Vec<Route> {
    let builder = Builder {
        scope,
        routes,
        listener_port,
    };
    let mut all = Vec::new();
    for route in &routes.spec().http {
        if route.matches.is_empty() {
            if binding.is_bound(routes) {
                all.extend(builder.route(route, None));
            }
        } else {
            let fitting = route.matches.iter().filter(|entry| {
                (entry.port == 0 || entry.port == u32::from(listener_port))
                    && binding.fits(routes, &entry.gateways)
                    && source_fits(scope, &entry.source_labels, &entry.source_namespace)
            });
            all.extend(fitting.filter_map(|entry| builder.route(route, Some(entry))));
        }
        if let Some(last) = all.iter().position(is_catch_all) {
            all.truncate(last + 1);
            break;
        }
    }
    all
}

/// Whether a route takes every request.
pub(super) fn is_catch_all(route: &Route) -> bool {
    route.r#match.as_ref().is_some_and(|matcher| {
        let path = match &matcher.path_specifier {
            Some(PathSpecifier::Prefix(prefix)) => prefix == "/",
            Some(PathSpecifier::SafeRegex(regex)) => regex.regex == ".*",
            _ => false,
        };
        path && matcher.headers.is_empty() && matcher.query_parameters.is_empty()
    })
}

/// Everything to one service port.
pub(super) fn to_service(scope: &Scope<'_>, service: &Service, port: u16) -> Route {
    let cluster = names::outbound(port, "", &service.hostname);
    let mut route = everything(
        "default",
        RouteAction {
            hash_policy: hash_policies(scope, std::slice::from_ref(&cluster)),
            cluster_specifier: Some(ClusterSpecifier::Cluster(cluster)),
            timeout: ZERO,
            retry_policy: retry_policy(None),
            ..Default::default()
        },
    );
    route.decorator = decorator(format!("{}:{port}/*", service.hostname));
    let hooks = scope.route_hooks(
        Direction::Outbound,
        mixer::Destination::Service(service),
        &[],
    );
    route.typed_per_filter_config.extend(hooks.configs);
    route.request_headers_to_add.extend(hooks.request_headers);
    route
}

/// A route for every request.
pub(super) fn everything(name: &str, action: RouteAction) -> Route {
    Route {
        name: name.to_owned(),
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
            ..Default::default()
        }),
        action: Some(Action::Route(action)),
        ..Default::default()
    }
}

/// An answer to every request.
pub(super) fn always(name: &str, status: u32) -> Route {
    Route {
        name: name.to_owned(),
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
            ..Default::default()
        }),
        action: Some(Action::DirectResponse(DirectResponseAction {
            status,
            ..Default::default()
        })),
        ..Default::default()
    }
}

pub(super) fn decorator(operation: String) -> Option<Decorator> {
    Some(Decorator {
        operation,
        propagate: None,
    })
}

struct Builder<'a> {
    scope: &'a Scope<'a>,
    routes: &'a Routes,
    listener_port: u16,
}

impl Builder<'_> {
    /// `None` for a route that leads nowhere: what it delegates to is not there.
    fn route(&self, route: &HttpRoute, entry: Option<&HttpMatch>) -> Option<Route> {
        let object = &self.routes.object;
        let path = format!(
            "/apis/{}/v1/namespaces/{}/virtual-service/{}",
            object.key.group, object.key.namespace, object.key.name
        );
        let mut built = Route {
            name: route_name(route, entry),
            r#match: Some(route_match(entry, self.routes.matches_segments())),
            metadata: metadata([("istio", structure([("config", text(path))]))]),
            ..Default::default()
        };
        if let Some(entry) = entry {
            built.stat_prefix.clone_from(&entry.stat_prefix);
        }
        let mut headers = Operations::default();
        headers.add(&route.headers);
        headers.add_old(
            &route.append_headers,
            &Default::default(),
            &Default::default(),
            &Default::default(),
        );
        headers.add_old(
            &route.append_request_headers,
            &route.remove_request_headers,
            &route.append_response_headers,
            &route.remove_response_headers,
        );

        built.action = Some(if let Some(redirect) = &route.redirect {
            Action::Redirect(self.redirect(redirect, entry))
        } else if let Some(response) = &route.direct_response {
            Action::DirectResponse(DirectResponseAction {
                status: response.status,
                body: response
                    .body
                    .as_ref()
                    .and_then(|body| match (&body.string, &body.bytes) {
                        (Some(text), _) => inline(text),
                        (None, Some(bytes)) => Some(DataSource {
                            specifier: Some(Specifier::InlineBytes(
                                base64::engine::general_purpose::STANDARD
                                    .decode(bytes)
                                    .ok()?,
                            )),
                            ..Default::default()
                        }),
                        (None, None) => None,
                    }),
                ..Default::default()
            })
        } else if route.route.is_empty() {
            return None;
        } else {
            let mut action = self.action(route, entry);
            self.destinations(route, &mut action, &mut built, &mut headers);
            let mut host = headers.host.take();
            if let Some(rewrite) = route
                .rewrite
                .as_ref()
                .filter(|rewrite| !rewrite.authority.is_empty())
            {
                host = Some(rewrite.authority.clone());
            }
            action.host_rewrite_specifier = host.map(HostRewriteSpecifier::HostRewriteLiteral);
            Action::Route(action)
        });
        built.request_headers_to_add = headers.request_add;
        built.request_headers_to_remove = headers.request_remove;
        built.response_headers_to_add = headers.response_add;
        built.response_headers_to_remove = headers.response_remove;
        if let Some(fault) = &route.fault {
            built
                .typed_per_filter_config
                .insert("envoy.filters.http.fault".to_owned(), fault_config(fault));
        }
        if let Some(cors) = &route.cors_policy {
            built
                .typed_per_filter_config
                .insert("envoy.filters.http.cors".to_owned(), cors_config(cors));
        }
        Some(built)
    }

    fn redirect(&self, redirect: &HttpRedirect, entry: Option<&HttpMatch>) -> RedirectAction {
        let https = redirect.scheme == "https";
        // Gateway API: a scheme's own port is not written.
        let implied = self.routes.is_gateway_api();
        let port = match (redirect.port, redirect.derive_port) {
            (Some(port), _) => port,
            (None, Some(DerivePort::FromProtocolDefault)) if implied => 0,
            (None, Some(DerivePort::FromProtocolDefault)) => {
                if https {
                    443
                } else {
                    80
                }
            }
            (None, Some(DerivePort::FromRequestPort))
                if implied && matches!(self.listener_port, 80 | 443) =>
            {
                0
            }
            (None, Some(DerivePort::FromRequestPort)) => self.listener_port.into(),
            (None, None) => 0,
        };
        RedirectAction {
            host_redirect: redirect.authority.clone(),
            port_redirect: port,
            response_code: match redirect.redirect_code {
                302 => RedirectResponseCode::Found,
                303 => RedirectResponseCode::SeeOther,
                307 => RedirectResponseCode::TemporaryRedirect,
                308 => RedirectResponseCode::PermanentRedirect,
                _ => RedirectResponseCode::MovedPermanently,
            } as i32,
            scheme_rewrite_specifier: (!redirect.scheme.is_empty())
                .then(|| SchemeRewriteSpecifier::SchemeRedirect(redirect.scheme.clone())),
            path_rewrite_specifier: match redirect.uri.strip_prefix(MATCHED_PREFIX) {
                None if redirect.uri.is_empty() => None,
                None => Some(PathRewriteSpecifier::PathRedirect(redirect.uri.clone())),
                Some(prefix) => Some(new_prefix(prefix, entry)),
            },
            ..Default::default()
        }
    }

    /// All of the action but where to.
    fn action(&self, route: &HttpRoute, entry: Option<&HttpMatch>) -> RouteAction {
        let not_found = if self.routes.is_gateway_api() {
            // What a backend that is not there, or not allowed, is answered with.
            ClusterNotFoundResponseCode::InternalServerError
        } else {
            ClusterNotFoundResponseCode::ServiceUnavailable
        };
        let mut action = RouteAction {
            cluster_not_found_response_code: not_found as i32,
            timeout: route.timeout.map_or(ZERO, duration),
            retry_policy: retry_policy(route.retries.as_ref()),
            ..Default::default()
        };
        if let Some(rewrite) = &route.rewrite {
            if let Some(by_regex) = &rewrite.uri_regex_rewrite {
                action.regex_rewrite = substitute(&by_regex.pattern, &by_regex.rewrite);
            } else if !rewrite.uri.is_empty() {
                match entry.and_then(|entry| entry.uri.as_ref()) {
                    // `/a` -> `/` must make `/b` of `/a/b`, not `//b`.
                    Some(StringMatch::Prefix(prefix))
                        if rewrite.uri == "/" && !prefix.ends_with('/') =>
                    {
                        action.regex_rewrite = without_prefix(prefix);
                    }
                    _ => action.prefix_rewrite.clone_from(&rewrite.uri),
                }
            }
        }
        let mirrored = |to: &Destination, percentage: Option<Percent>, percent: Option<u32>| {
            let share = percentage.map_or(percent.map_or(100.0, f64::from), |percentage| {
                percentage.value
            });
            (share > 0.0).then(|| RequestMirrorPolicy {
                cluster: cluster_name(self.scope, self.routes.namespace(), to, self.listener_port),
                runtime_fraction: Some(RuntimeFractionalPercent {
                    default_value: fraction(share),
                    ..Default::default()
                }),
                trace_sampled: bool_value(false),
                ..Default::default()
            })
        };
        action.request_mirror_policies = route
            .mirror
            .iter()
            .filter_map(|to| mirrored(to, route.mirror_percentage, route.mirror_percent))
            .chain(
                route
                    .mirrors
                    .iter()
                    .filter_map(|mirror| mirrored(&mirror.destination, mirror.percentage, None)),
            )
            .collect();
        action
    }

    fn destinations(
        &self,
        route: &HttpRoute,
        action: &mut RouteAction,
        built: &mut Route,
        headers: &mut Operations,
    ) {
        let weighted: Vec<&HttpDestination> = route
            .route
            .iter()
            .filter(|to| route.route.len() == 1 || to.weight > 0)
            .collect();
        let name = |to: &HttpDestination| {
            cluster_name(
                self.scope,
                self.routes.namespace(),
                &to.destination,
                self.listener_port,
            )
        };
        let clusters: Vec<String> = weighted.iter().map(|to| name(to)).collect();
        action.hash_policy = hash_policies(self.scope, &clusters);
        if let Some(first) = weighted.first() {
            let host = full_host(&first.destination.host, self.routes.namespace());
            built.decorator = decorator(format!(
                "{host}:{}/*",
                names::Outbound::parse(&name(first)).map_or(0, |name| name.port)
            ));
        }
        if let [only] = weighted.as_slice() {
            headers.add(&only.headers);
            headers.add_old(
                &only.append_request_headers,
                &only.remove_request_headers,
                &only.append_response_headers,
                &only.remove_response_headers,
            );
            let hooks = self.mixer(&only.destination);
            built.typed_per_filter_config.extend(hooks.configs);
            headers.request_add.extend(hooks.request_headers);
            action.cluster_specifier = clusters.into_iter().next().map(ClusterSpecifier::Cluster);
            return;
        }
        let clusters = weighted
            .into_iter()
            .zip(clusters)
            .map(|(to, name)| {
                let mut own = Operations::default();
                own.add(&to.headers);
                own.add_old(
                    &to.append_request_headers,
                    &to.remove_request_headers,
                    &to.append_response_headers,
                    &to.remove_response_headers,
                );
                let hooks = self.mixer(&to.destination);
                own.request_add.extend(hooks.request_headers);
                ClusterWeight {
                    name,
                    weight: u32_value(u32::try_from(to.weight).unwrap_or(0)),
                    typed_per_filter_config: hooks.configs,
                    request_headers_to_add: own.request_add,
                    request_headers_to_remove: own.request_remove,
                    response_headers_to_add: own.response_add,
                    response_headers_to_remove: own.response_remove,
                    host_rewrite_specifier: own
                        .host
                        .map(cluster_weight::HostRewriteSpecifier::HostRewriteLiteral),
                    ..Default::default()
                }
            })
            .collect();
        action.cluster_specifier = Some(ClusterSpecifier::WeightedClusters(WeightedCluster {
            clusters,
            ..Default::default()
        }));
    }

    fn mixer(&self, to: &Destination) -> RouteHooks {
        // Nobody is there to ask about.
        if to.host.is_empty() {
            return RouteHooks::default();
        }
        let host = full_host(&to.host.to_ascii_lowercase(), self.routes.namespace());
        let destination = match self.scope.snapshot.service(&host) {
            Some(service) => mixer::Destination::Service(service),
            None => mixer::Destination::Named(&host),
        };
        self.scope
            .route_hooks(Direction::Outbound, destination, &[])
    }
}

fn route_name(route: &HttpRoute, entry: Option<&HttpMatch>) -> String {
    let own = entry
        .map(|entry| entry.name.as_str())
        .filter(|name| !name.is_empty());
    match (route.name.as_str(), own) {
        ("", None) => String::new(),
        ("", Some(own)) => own.to_owned(),
        (name, None) => name.to_owned(),
        (name, Some(own)) => format!("{name}.{own}"),
    }
}

/// The new path of a redirect, its matched prefix replaced.
fn new_prefix(prefix: &str, entry: Option<&HttpMatch>) -> PathRewriteSpecifier {
    let matched = entry.and_then(|entry| entry.uri.as_ref());
    match matched {
        Some(StringMatch::Prefix(matched))
            if prefix.trim_end_matches('/').is_empty() && !matched.ends_with('/') =>
        {
            without_prefix(matched).map_or_else(
                || PathRewriteSpecifier::PrefixRewrite("/".to_owned()),
                PathRewriteSpecifier::RegexRewrite,
            )
        }
        // A path in segments has its slash after the prefix.
        _ => PathRewriteSpecifier::PrefixRewrite(match prefix.trim_end_matches('/') {
            "" => "/".to_owned(),
            prefix => prefix.to_owned(),
        }),
    }
}

/// `/b` of `/a/b`, and `/` of `/a`.
fn without_prefix(prefix: &str) -> Option<RegexMatchAndSubstitute> {
    substitute(&format!("^{}(/?)(.*)", escape(prefix)), r"/\2")
}

fn route_match(entry: Option<&HttpMatch>, segments: bool) -> RouteMatch {
    let mut matcher = RouteMatch {
        path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
        ..Default::default()
    };
    let Some(entry) = entry else {
        return matcher;
    };
    match &entry.uri {
        None | Some(StringMatch::Present) => {}
        Some(StringMatch::Prefix(prefix)) if prefix.is_empty() => {}
        Some(StringMatch::Exact(path)) => {
            matcher.path_specifier = Some(PathSpecifier::Path(path.clone()))
        }
        Some(StringMatch::Prefix(path)) if segments && path != "/" => {
            matcher.path_specifier = Some(PathSpecifier::PathSeparatedPrefix(
                path.trim_end_matches('/').to_owned(),
            ));
        }
        Some(StringMatch::Prefix(path)) => {
            matcher.path_specifier = Some(PathSpecifier::Prefix(path.clone()))
        }
        Some(StringMatch::Regex(pattern)) => {
            matcher.path_specifier = Some(PathSpecifier::SafeRegex(regex(pattern)))
        }
    }
    if entry.ignore_uri_case && !matches!(entry.uri, Some(StringMatch::Regex(_))) {
        matcher.case_sensitive = bool_value(false);
    }
    for (name, value) in [
        (":method", &entry.method),
        (":authority", &entry.authority),
        (":scheme", &entry.scheme),
    ] {
        if let Some(value) = value {
            matcher.headers.push(header_matcher(name, value));
        }
    }
    for (name, value) in &entry.headers {
        matcher.headers.push(header_matcher(name, value));
    }
    for (name, value) in &entry.without_headers {
        let present = StringMatch::Present;
        let value = if matches!(value, StringMatch::Regex(pattern) if pattern == "*") {
            &present
        } else {
            value
        };
        let mut header = header_matcher(name, value);
        header.invert_match = true;
        // Without the header there is no match to invert, unless it counts as empty.
        header.treat_missing_header_as_empty = *value != StringMatch::Present;
        matcher.headers.push(header);
    }
    for (name, value) in &entry.query_params {
        matcher.query_parameters.push(QueryParameterMatcher {
            name: name.clone(),
            query_parameter_match_specifier: Some(match string_matcher(value) {
                Some(value) => QueryParameterMatchSpecifier::StringMatch(value),
                None => QueryParameterMatchSpecifier::PresentMatch(true),
            }),
        });
    }
    matcher
}

fn header_matcher(name: &str, value: &StringMatch) -> HeaderMatcher {
    HeaderMatcher {
        name: name.to_ascii_lowercase(),
        header_match_specifier: Some(match string_matcher(value) {
            Some(value) => HeaderMatchSpecifier::StringMatch(value),
            None => HeaderMatchSpecifier::PresentMatch(true),
        }),
        ..Default::default()
    }
}

fn substitute(pattern: &str, substitution: &str) -> Option<RegexMatchAndSubstitute> {
    Some(RegexMatchAndSubstitute {
        pattern: Some(regex(pattern)),
        substitution: substitution.to_owned(),
    })
}

fn escape(text: &str) -> String {
    ::regex::escape(text)
}

/// Header operations in Envoy's form.
#[derive(Default)]
struct Operations {
    request_add: Vec<HeaderValueOption>,
    request_remove: Vec<String>,
    response_add: Vec<HeaderValueOption>,
    response_remove: Vec<String>,
    /// The host is no header to Envoy: it is rewritten.
    host: Option<String>,
}

impl Operations {
    fn add(&mut self, headers: &lateen_config::networking::Headers) {
        for (name, value) in &headers.request.set {
            if name.eq_ignore_ascii_case("host") || name.eq_ignore_ascii_case(":authority") {
                self.host = Some(value.clone());
            } else {
                self.request_add.push(header(
                    name,
                    value,
                    HeaderAppendAction::OverwriteIfExistsOrAdd,
                ));
            }
        }
        for (name, value) in &headers.request.add {
            if !name.eq_ignore_ascii_case("host") {
                self.request_add
                    .push(header(name, value, HeaderAppendAction::AppendIfExistsOrAdd));
            }
        }
        let set =
            headers.response.set.iter().map(|(name, value)| {
                header(name, value, HeaderAppendAction::OverwriteIfExistsOrAdd)
            });
        let add = headers
            .response
            .add
            .iter()
            .map(|(name, value)| header(name, value, HeaderAppendAction::AppendIfExistsOrAdd));
        self.response_add.extend(set.chain(add));
        self.request_remove
            .extend(headers.request.remove.iter().cloned());
        self.response_remove
            .extend(headers.response.remove.iter().cloned());
    }

    fn add_old(
        &mut self,
        append: &indexmap::IndexMap<String, String>,
        remove: &indexmap::IndexMap<String, String>,
        append_response: &indexmap::IndexMap<String, String>,
        remove_response: &indexmap::IndexMap<String, String>,
    ) {
        let added = |(name, value): (&String, &String)| {
            header(name, value, HeaderAppendAction::AppendIfExistsOrAdd)
        };
        self.request_add.extend(append.iter().map(added));
        self.request_remove.extend(remove.keys().cloned());
        self.response_add.extend(append_response.iter().map(added));
        self.response_remove.extend(remove_response.keys().cloned());
    }
}

fn header(name: &str, value: &str, action: HeaderAppendAction) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue {
            key: name.to_owned(),
            value: value.to_owned(),
            ..Default::default()
        }),
        append_action: action as i32,
        ..Default::default()
    }
}

/// `None`: no retries.
fn retry_policy(policy: Option<&HttpRetry>) -> Option<RetryPolicy> {
    let attempts = policy.map_or(RETRIES, |policy| {
        u32::try_from(policy.attempts).unwrap_or(0)
    });
    if attempts == 0 {
        return None;
    }
    let (conditions, codes) = conditions(policy.map_or("", |policy| policy.retry_on.as_str()));
    let avoid_tried = policy.is_none_or(|policy| policy.retry_ignore_previous_hosts != Some(false));
    Some(RetryPolicy {
        retry_on: conditions,
        num_retries: u32_value(attempts),
        per_try_timeout: policy
            .and_then(|policy| policy.per_try_timeout)
            .filter(|timeout| !timeout.0.is_zero())
            .and_then(duration),
        retriable_status_codes: codes,
        retry_host_predicate: if avoid_tried {
            vec![previous_hosts()]
        } else {
            Vec::new()
        },
        host_selection_retry_max_attempts: if avoid_tried { HOST_PICKS } else { 0 },
        retry_back_off: policy
            .and_then(|policy| policy.backoff)
            .map(|base| RetryBackOff {
                base_interval: duration(base),
                max_interval: None,
            }),
        ..Default::default()
    })
}

/// Status codes among the conditions are a list of their own.
fn conditions(text: &str) -> (String, Vec<u32>) {
    let mut named: Vec<&str> = Vec::new();
    let mut codes = Vec::new();
    for item in text
        .split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
    {
        match item.parse() {
            Ok(code) => codes.push(code),
            Err(_) => named.push(item),
        }
    }
    if named.is_empty() && codes.is_empty() {
        return (RETRY_ON.to_owned(), codes);
    }
    if !codes.is_empty() && !named.contains(&"retriable-status-codes") {
        named.push("retriable-status-codes");
    }
    (named.join(","), codes)
}

fn previous_hosts() -> RetryHostPredicate {
    RetryHostPredicate {
        name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
        config_type: Some(retry_host_predicate::ConfigType::TypedConfig(any(
            &PreviousHostsPredicate {},
        ))),
    }
}

fn share(percentage: Option<Percent>, percent: Option<i32>) -> f64 {
    percentage.map_or(percent.map_or(100.0, f64::from), |percentage| {
        percentage.value
    })
}

fn fault_config(fault: &Fault) -> Any {
    any(&HttpFault {
        delay: fault.delay.as_ref().and_then(|delay| {
            Some(FaultDelay {
                percentage: fraction(share(delay.percentage, delay.percent)),
                fault_delay_secifier: Some(FaultDelaySecifier::FixedDelay(duration(
                    delay.fixed_delay?,
                )?)),
            })
        }),
        abort: fault.abort.as_ref().and_then(|abort| {
            let status = abort
                .http_status
                .and_then(|status| u32::try_from(status).ok())
                .map(ErrorType::HttpStatus);
            let grpc = || {
                abort
                    .grpc_status
                    .as_deref()
                    .and_then(lateen_config::value::grpc_status)
                    .map(ErrorType::GrpcStatus)
            };
            Some(FaultAbort {
                percentage: fraction(share(abort.percentage, abort.percent)),
                error_type: Some(status.or_else(grpc)?),
                ..Default::default()
            })
        }),
        ..Default::default()
    })
}

fn cors_config(cors: &CorsPolicy) -> Any {
    let mut origins: Vec<StringMatcher> = cors
        .allow_origins
        .iter()
        .filter_map(string_matcher)
        .collect();
    origins.extend(cors.allow_origin.iter().map(|origin| {
        match origin.as_str() {
            "*" => StringMatcher {
                match_pattern: string_matcher(&StringMatch::Regex(".*".to_owned()))
                    .and_then(|any| any.match_pattern),
                ignore_case: false,
            },
            origin => exact(origin),
        }
    }));
    any(&EnvoyCors {
        allow_origin_string_match: origins,
        allow_methods: cors.allow_methods.join(","),
        allow_headers: cors.allow_headers.join(","),
        expose_headers: cors.expose_headers.join(","),
        max_age: cors
            .max_age
            .map(|age| age.0.as_secs().to_string())
            .unwrap_or_default(),
        allow_credentials: cors.allow_credentials.and_then(bool_value),
        filter_enabled: Some(RuntimeFractionalPercent {
            default_value: fraction(100.0),
            ..Default::default()
        }),
        forward_not_matching_preflights: match cors.unmatched_preflights.as_str() {
            "FORWARD" => bool_value(true),
            "IGNORE" => bool_value(false),
            _ => None,
        },
        ..Default::default()
    })
}

/// What to hash requests by, if one of the clusters is balanced by hash.
fn hash_policies(scope: &Scope<'_>, clusters: &[String]) -> Vec<HashPolicy> {
    clusters
        .iter()
        .filter_map(|cluster| {
            let name = names::Outbound::parse(cluster)?;
            let rule = scope.snapshot.destination_policy(
                name.host,
                &scope.node.namespace,
                &scope.node.labels,
            );
            let policy = Policy::of(rule.map(AsRef::as_ref), name.port, name.subset);
            let hash = policy.balancer?.consistent_hash.as_ref()?;
            let specifier = if let Some(header_name) = &hash.http_header_name {
                hash_policy::PolicySpecifier::Header(hash_policy::Header {
                    header_name: header_name.clone(),
                    ..Default::default()
                })
            } else if let Some(cookie) = &hash.http_cookie {
                hash_policy::PolicySpecifier::Cookie(hash_policy::Cookie {
                    name: cookie.name.clone(),
                    path: cookie.path.clone(),
                    ttl: cookie.ttl.and_then(duration).or(Some(Duration::default())),
                    ..Default::default()
                })
            } else if hash.use_source_ip == Some(true) {
                hash_policy::PolicySpecifier::ConnectionProperties(
                    hash_policy::ConnectionProperties { source_ip: true },
                )
            } else {
                hash_policy::PolicySpecifier::QueryParameter(hash_policy::QueryParameter {
                    name: hash.http_query_parameter_name.clone()?,
                })
            };
            Some(HashPolicy {
                policy_specifier: Some(specifier),
                ..Default::default()
            })
        })
        .take(1)
        .collect()
}

/// Metadata that says which service a resource is for.
pub(super) fn service_metadata(service: &Service) -> envoy_types::pb::google::protobuf::Value {
    super::wire::list(vec![nested([
        ("host", text(&*service.hostname)),
        ("name", text(&service.name)),
        ("namespace", text(&service.namespace)),
    ])])
}
