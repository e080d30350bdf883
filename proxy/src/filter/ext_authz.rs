//! Asks a service whether a request may go on. Envoy: `envoy.filters.http.ext_authz`.
//!
//! The service speaks gRPC (`envoy.service.auth.v3.Authorization`) or plain HTTP. `encode` writes the
//! question, `grpc` and `http` ask it, `decision` is what comes back; here is what becomes of the request.

use std::{net::SocketAddr, sync::Arc, time::SystemTime};

use lateen_protocols::envoy::{
    envoy::{
        config::core::v3::ApiVersion,
        extensions::filters::http::ext_authz::v3::{
            self as proto, check_settings::ServiceOverride, ext_authz::Services,
            ext_authz_per_route::Override,
        },
        r#type::matcher::v3::ListStringMatcher,
    },
    google::protobuf::{self as pb, value::Kind},
};
use tokio::time::Instant;

use crate::{
    cluster::Caller,
    config_error::ConfigError,
    filter::{
        FilterContext, RouteFilterConfig,
        gather::{self, Gathered},
        per_cluster::PerCluster,
        rbac::MetadataMatch,
    },
    head::{Name, RequestHead, ResponseHead},
    info::{ConnectionInfo, ResponseFlags},
    proto::{Chance, invalid},
    reject::Reject,
    route::matcher::StringMatch,
    stats::{Counter, Scope},
};

mod decision;
mod encode;
mod grpc;
mod http;
#[cfg(test)]
mod tests;

use decision::{Change, Decision};

/// Where the filter's metadata stands.
const METADATA: &str = "envoy.filters.http.ext_authz";

/// Added when a request goes on although the service failed. Envoy: `failure_mode_allow_header_add`.
const FAILURE_ALLOWED: &str = "x-envoy-auth-failure-mode-allowed";

/// The filter of one connection manager.
#[derive(Debug)]
pub struct ExtAuthz {
    service: Service,
    failure_mode_allow: bool,
    failure_mode_allow_header_add: bool,
    status_on_error: u16,
    body: Option<BodyRule>,
    clear_route_cache: bool,
    enabled: Chance,
    /// Only streams whose metadata is like this are asked about. Envoy: `filter_enabled_metadata`.
    enabled_for: Option<MetadataMatch>,
    deny_at_disable: bool,
    charge: bool,
    max_denied_body: usize,
    validate: bool,
    /// What the service says of the stream is kept for other filters.
    takes_metadata: bool,
    /// Whose metadata the service is shown.
    shows_metadata: Vec<String>,
    shown: Shown,
    stats: Stats,
    stat_prefix: String,
    clusters: PerCluster<Outcomes>,
}

/// What a route says about the filter.
#[derive(Clone, Debug, Default)]
pub struct ExtAuthzRoute {
    disabled: bool,
    extensions: Vec<(String, String)>,
    no_body: bool,
    body: Option<BodyRule>,
    service: Option<Arc<Service>>,
}

/// What the response still needs.
#[derive(Debug)]
pub(crate) struct Kept(Vec<Change>);

#[derive(Debug)]
enum Service {
    Grpc(Box<grpc::GrpcService>),
    Http(Box<http::HttpService>),
}

/// How much of the body goes into the question.
#[derive(Clone, Copy, Debug)]
struct BodyRule {
    limit: usize,
    partial: bool,
    as_bytes: bool,
}

/// What of the request and connection goes into the question.
#[derive(Debug, Default)]
struct Shown {
    /// `None`: all headers.
    allowed: Option<Vec<StringMatch>>,
    disallowed: Vec<StringMatch>,
    peer_certificate: bool,
    tls_session: bool,
    raw_headers: bool,
}

/// `http.PREFIX.ext_authz.`
#[derive(Debug)]
struct Stats {
    outcomes: Outcomes,
    disabled: Counter,
    invalid: Counter,
    ignored_metadata: Counter,
}

/// Counted for the connection manager and for the cluster the request was to go to.
#[derive(Debug)]
struct Outcomes {
    ok: Counter,
    denied: Counter,
    error: Counter,
    failure_mode_allowed: Counter,
}

/// What is asked about.
#[derive(Debug)]
struct Question<'a> {
    id: u64,
    head: &'a RequestHead,
    connection: &'a ConnectionInfo,
    remote: SocketAddr,
    started: SystemTime,
    size: u64,
    metadata: Vec<(&'a str, pb::Struct)>,
    extensions: &'a [(String, String)],
    body: Option<Gathered>,
    body_as_bytes: bool,
    include_peer_certificate: bool,
    include_tls_session: bool,
    raw_headers: bool,
    shown: &'a Shown,
    /// Headers that go in whatever the lists say.
    always: &'static [&'static str],
}

impl Question<'_> {
    /// Calls `see` for every header of the question, pseudo headers first.
    fn headers(&self, mut see: impl FnMut(&[u8], &[u8])) {
        let shown = |name: &[u8]| self.shown.header(name, self.always);
        let head = self.head;
        let pseudo: [(&[u8], &[u8]); 4] = [
            (b":authority", &head.authority),
            (b":path", &head.path),
            (b":method", &head.method),
            (b":scheme", &head.scheme),
        ];
        for (name, value) in pseudo {
            if shown(name) {
                see(name, value);
            }
        }
        encode::each_header(&head.headers, shown, &mut see);
        if let Some(body) = &self.body {
            let partial: &[u8] = if body.whole { b"false" } else { b"true" };
            see(encode::PARTIAL_BODY.as_bytes(), partial);
        }
    }
}

impl Shown {
    fn header(&self, name: &[u8], always: &[&str]) -> bool {
        if self.disallowed.iter().any(|pattern| pattern.matches(name)) {
            return false;
        }
        match &self.allowed {
            None => true,
            Some(allowed) => {
                always.iter().any(|always| always.as_bytes() == name)
                    || allowed.iter().any(|pattern| pattern.matches(name))
            }
        }
    }
}

impl ExtAuthz {
    /// Compiles the filter; counts in `http.PREFIX.ext_authz.`.
    ///
    /// # Errors
    /// When something is invalid, or not supported and would change what happens.
    pub fn compile(config: &proto::ExtAuthz, scope: &Scope) -> Result<ExtAuthz, ConfigError> {
        if config.transport_api_version() != ApiVersion::V3 {
            return Err(invalid("transport_api_version", "only V3 is supported"));
        }
        let unsupported = [
            (
                "bootstrap_metadata_labels_key",
                !config.bootstrap_metadata_labels_key.is_empty(),
            ),
            (
                "decoder_header_mutation_rules",
                config.decoder_header_mutation_rules.is_some(),
            ),
            ("shadow_mode", config.shadow_mode),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, given)| *given) {
            return Err(invalid(*field, "not supported"));
        }
        let mut allowed = patterns("allowed_headers", config.allowed_headers.as_ref())?;
        let service = match config.services.as_ref() {
            Some(Services::GrpcService(grpc)) => Service::Grpc(Box::new(
                grpc::GrpcService::compile(grpc).map_err(within("grpc_service"))?,
            )),
            Some(Services::HttpService(http)) => {
                let (service, more) =
                    http::HttpService::compile(http).map_err(within("http_service"))?;
                allowed.extend(more);
                Service::Http(Box::new(service))
            }
            None => return Err(invalid("services", "no service is named")),
        };
        let every = config.allowed_headers.is_none() && matches!(service, Service::Grpc(_));
        let status_on_error = match config.status_on_error.as_ref() {
            None => 403,
            Some(status) => u16::try_from(status.code)
                .ok()
                .filter(|status| (200..600).contains(status))
                .ok_or_else(|| invalid("status_on_error", "no HTTP status"))?,
        };
        let prefix = match config.stat_prefix.as_str() {
            "" => "ext_authz.".to_owned(),
            prefix => format!("ext_authz.{prefix}."),
        };
        let on = |flag: Option<&pb::BoolValue>| flag.is_none_or(|flag| flag.value);
        Ok(ExtAuthz {
            service,
            failure_mode_allow: config.failure_mode_allow,
            failure_mode_allow_header_add: config.failure_mode_allow_header_add,
            status_on_error,
            body: config
                .with_request_body
                .as_ref()
                .map(BodyRule::compile)
                .transpose()?,
            clear_route_cache: config.clear_route_cache,
            enabled: Chance::of_runtime(config.filter_enabled.as_ref(), Chance::ALWAYS),
            enabled_for: config
                .filter_enabled_metadata
                .as_ref()
                .map(MetadataMatch::of_stream)
                .transpose()
                .map_err(within("filter_enabled_metadata"))?,
            deny_at_disable: config
                .deny_at_disable
                .as_ref()
                .and_then(|flag| flag.default_value)
                .is_some_and(|default| default.value),
            charge: on(config.charge_cluster_response_stats.as_ref()),
            max_denied_body: match config.max_denied_response_body_bytes {
                0 => usize::MAX,
                limit => limit as usize,
            },
            validate: config.validate_mutations,
            shown: Shown {
                allowed: (!every).then_some(allowed),
                disallowed: patterns("disallowed_headers", config.disallowed_headers.as_ref())?,
                peer_certificate: config.include_peer_certificate,
                tls_session: config.include_tls_session,
                raw_headers: config.encode_raw_headers,
            },
            shows_metadata: config.metadata_context_namespaces.clone(),
            takes_metadata: on(config.enable_dynamic_metadata_ingestion.as_ref()),
            stats: Stats {
                outcomes: Outcomes::new(scope, &prefix),
                disabled: scope.counter(&format!("{prefix}disabled")),
                invalid: scope.counter(&format!("{prefix}invalid")),
                ignored_metadata: scope.counter(&format!("{prefix}ignored_dynamic_metadata")),
            },
            stat_prefix: prefix,
            clusters: PerCluster::default(),
        })
    }

    /// Asks about a request.
    ///
    /// # Errors
    /// The service refuses the request or cannot be asked, or the body does not fit.
    pub(super) async fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
        body: &mut crate::body::Body,
    ) -> Result<(), Reject> {
        let own = match cx.config(head) {
            Some(RouteFilterConfig::ExtAuthz(own)) => Some(own.clone()),
            _ => None,
        };
        let own = own.as_deref();
        if own.is_some_and(|own| own.disabled) {
            return Ok(());
        }
        let meant = self
            .enabled_for
            .as_ref()
            .is_none_or(|matcher| matcher.holds(None, &cx.info.borrow()));
        if !meant || !self.enabled.hits() {
            self.stats.disabled.inc();
            return match self.deny_at_disable {
                true => Err(self.error()),
                false => Ok(()),
            };
        }
        let rule = match own {
            Some(own) if own.no_body => None,
            Some(own) => own.body.or(self.body),
            None => self.body,
        };
        let read = match rule.filter(|_| !body.is_end_stream() && !is_upgrade(head)) {
            None => None,
            Some(rule) => {
                let read = gather::read(body, rule.limit)
                    .await
                    .map_err(|error| gather::broken(&error))?;
                if !read.whole && !rule.partial {
                    return Err(gather::too_large());
                }
                Some(read.cut(rule.limit))
            }
        };
        let (connection, started, size, metadata) = {
            let info = cx.info.borrow();
            let shown = self.shows_metadata.iter().filter_map(|filter| {
                let fields = info.metadata.as_ref()?.get(filter)?;
                Some((filter.as_str(), fields.clone()))
            });
            (
                info.connection.clone(),
                info.start_time,
                info.bytes_received,
                shown.collect(),
            )
        };
        let service = own
            .and_then(|own| own.service.as_deref())
            .unwrap_or(&self.service);
        let question = Question {
            id: rand::random(),
            head,
            connection: &connection,
            remote: connection.remote,
            started,
            size,
            extensions: own.map_or(&[], |own| &own.extensions),
            metadata,
            body: read,
            body_as_bytes: rule.is_some_and(|rule| rule.as_bytes),
            include_peer_certificate: self.shown.peer_certificate,
            include_tls_session: self.shown.tls_session,
            raw_headers: self.shown.raw_headers,
            shown: &self.shown,
            always: service.always(),
        };
        let asked = Instant::now();
        let (decision, mut metadata) = match service {
            Service::Grpc(service) => service.ask(cx.shared, &question).await,
            Service::Http(service) => (service.ask(cx.shared, &question).await, Default::default()),
        };
        drop(question);
        if !metadata.fields.is_empty() {
            if self.takes_metadata {
                if matches!(decision, Decision::Allowed(_)) {
                    let ms = asked.elapsed().as_secs_f64() * 1000.0;
                    let ms = Kind::NumberValue(ms.trunc());
                    let ms = pb::Value { kind: Some(ms) };
                    metadata.fields.insert("ext_authz_duration".to_owned(), ms);
                }
                cx.info.borrow_mut().add_metadata(METADATA, metadata);
            } else {
                self.stats.ignored_metadata.inc();
            }
        }
        self.decide(cx, head, decision)
    }

    fn decide(
        &self,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
        decision: Decision,
    ) -> Result<(), Reject> {
        let cluster = cx.route(head).and_then(|route| route.target(head));
        let counters = cluster.as_ref().and_then(|target| {
            self.clusters.get(cx.shared, &target.cluster, |scope| {
                Outcomes::new(scope, &self.stat_prefix)
            })
        });
        let count = |which: fn(&Outcomes) -> &Counter| {
            which(&self.stats.outcomes).inc();
            if let Some(counters) = &counters {
                which(counters).inc();
            }
        };
        match decision {
            Decision::Allowed(allowed) => {
                if self.validate && !allowed.is_valid() {
                    self.stats.invalid.inc();
                    return Err(invalid_answer());
                }
                count(|stats| &stats.ok);
                if allowed.apply(head) && self.clear_route_cache {
                    cx.clear_route_cache();
                }
                if !allowed.response.is_empty() {
                    let kept = cx.state.ext_authz.get_or_insert_with(|| Kept(Vec::new()));
                    kept.0.extend(allowed.response);
                }
                Ok(())
            }
            Decision::Denied(refusal) => {
                if self.validate && !refusal.is_valid() {
                    self.stats.invalid.inc();
                    return Err(invalid_answer());
                }
                count(|stats| &stats.denied);
                if self.charge
                    && let Some(target) = &cluster
                    && let Some(cluster) = cx.shared.clusters.get(&target.cluster)
                {
                    cluster.stats.answered(refusal.status, Caller::External);
                }
                Err(refusal.into_reject("ext_authz_denied", self.max_denied_body))
            }
            Decision::Error(refusal) => {
                count(|stats| &stats.error);
                if self.failure_mode_allow {
                    count(|stats| &stats.failure_mode_allowed);
                    if self.failure_mode_allow_header_add {
                        head.headers.append(Name::new(FAILURE_ALLOWED), "true");
                    }
                    return Ok(());
                }
                Err(match refusal {
                    Some(refusal) => refusal.into_reject("ext_authz_error", self.max_denied_body),
                    None => self.error(),
                })
            }
        }
    }

    fn error(&self) -> Reject {
        Reject::new(
            self.status_on_error,
            "",
            ResponseFlags::UNAUTHORIZED_EXTERNAL_SERVICE,
            "ext_authz_error",
        )
    }
}

/// Envoy: `validate_mutations`.
fn invalid_answer() -> Reject {
    Reject::new(
        500,
        "",
        ResponseFlags::UNAUTHORIZED_EXTERNAL_SERVICE,
        "ext_authz_invalid",
    )
}

fn is_upgrade(head: &RequestHead) -> bool {
    head.headers.known(crate::head::Known::Upgrade).is_some() || *head.method == *b"CONNECT"
}

fn within(field: &'static str) -> impl Fn(ConfigError) -> ConfigError {
    move |error| error.within(field)
}

fn patterns(
    field: &str,
    list: Option<&ListStringMatcher>,
) -> Result<Vec<StringMatch>, ConfigError> {
    list.map_or(&[][..], |list| &list.patterns)
        .iter()
        .map(|pattern| StringMatch::compile(field, pattern))
        .collect()
}

impl Service {
    /// Headers that the question shows in any case.
    fn always(&self) -> &'static [&'static str] {
        match self {
            Service::Grpc(_) => &[],
            Service::Http(_) => &[":authority", ":method", ":path", "authorization"],
        }
    }
}

impl BodyRule {
    fn compile(settings: &proto::BufferSettings) -> Result<BodyRule, ConfigError> {
        if settings.max_request_bytes == 0 {
            return Err(invalid("max_request_bytes", "must be greater than 0"));
        }
        Ok(BodyRule {
            limit: settings.max_request_bytes as usize,
            partial: settings.allow_partial_message,
            as_bytes: settings.pack_as_bytes,
        })
    }
}

impl ExtAuthzRoute {
    /// What this says, with the context extensions that a less specific level adds.
    pub(super) fn over(&self, base: &ExtAuthzRoute) -> ExtAuthzRoute {
        let mut own = self.clone();
        for (key, value) in &base.extensions {
            if !self.extensions.iter().any(|(own, _)| own == key) {
                own.extensions.push((key.clone(), value.clone()));
            }
        }
        own.extensions.sort();
        own
    }

    /// Compiles a route's configuration.
    ///
    /// # Errors
    /// When it is not valid.
    pub fn compile(config: &proto::ExtAuthzPerRoute) -> Result<ExtAuthzRoute, ConfigError> {
        let settings = match config.r#override.as_ref() {
            Some(Override::Disabled(disabled)) => {
                return Ok(ExtAuthzRoute {
                    disabled: *disabled,
                    ..ExtAuthzRoute::default()
                });
            }
            Some(Override::CheckSettings(settings)) => settings,
            None => return Err(invalid("override", "absent")),
        };
        let mut extensions: Vec<_> = settings
            .context_extensions
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        extensions.sort();
        let service = match settings.service_override.as_ref() {
            None => None,
            Some(ServiceOverride::GrpcService(grpc)) => {
                let grpc = grpc::GrpcService::compile(grpc).map_err(within("grpc_service"))?;
                Some(Arc::new(Service::Grpc(Box::new(grpc))))
            }
            Some(ServiceOverride::HttpService(_)) => {
                return Err(invalid("http_service", "not supported as an override"));
            }
        };
        Ok(ExtAuthzRoute {
            disabled: false,
            extensions,
            no_body: settings.disable_request_body_buffering,
            body: settings
                .with_request_body
                .as_ref()
                .map(BodyRule::compile)
                .transpose()?,
            service,
        })
    }
}

impl Outcomes {
    fn new(scope: &Scope, prefix: &str) -> Outcomes {
        let counter = |name: &str| scope.counter(&format!("{prefix}{name}"));
        Outcomes {
            ok: counter("ok"),
            denied: counter("denied"),
            error: counter("error"),
            failure_mode_allowed: counter("failure_mode_allowed"),
        }
    }
}

impl Kept {
    /// Puts the service's headers into the response.
    pub(super) fn on_response(&self, head: &mut ResponseHead) {
        for change in &self.0 {
            change.apply(&mut head.headers);
        }
    }
}

impl Gathered {
    /// As much of it as fits into the question.
    fn cut(mut self, limit: usize) -> Gathered {
        self.data.truncate(limit);
        self
    }
}
