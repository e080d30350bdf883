//! What a route says about forwarding, compiled: read by `router` and never changed.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use lateen_protocols::envoy::{
    envoy::config::{core::v3 as core, route::v3 as proto},
    google::protobuf as pb,
};
use proto::{
    route_action::{
        ClusterNotFoundResponseCode, ClusterSpecifier, HostRewriteSpecifier,
        hash_policy::PolicySpecifier,
    },
    weighted_cluster::RandomValueSpecifier,
};

use crate::{
    config_error::ConfigError,
    head::Name,
    layers::{Fraction, RuntimeLayers},
    proto::{Chance, invalid, optional_duration, timeout},
    retry::RetryPolicy,
    route::{headers::HeaderOps, internal_redirect::InternalRedirect, matcher::RegexRewrite},
};

/// Timeout of a route that names none. Envoy: `RouteAction.timeout`.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);

/// Where and how a route forwards. The cluster is chosen by the connection manager when it selects the
/// route (per-cluster filter configuration depends on it) and comes to the router as a [`Target`].
#[derive(Debug)]
pub struct ForwardPolicy {
    /// Where to.
    pub cluster: ClusterSpec,
    /// Status when the cluster does not exist.
    pub cluster_not_found: u16,
    /// From the end of the request to the end of the response; `None` is no limit.
    pub timeout: Option<Duration>,
    /// Longest time without a byte; `None` leaves the connection manager's, `Some(None)` is no limit.
    pub idle_timeout: Option<Option<Duration>>,
    /// Longest life of a stream; `None` leaves the connection manager's, `Some(None)` is no limit.
    pub max_stream_duration: Option<Option<Duration>>,
    /// Take `grpc-timeout` as the timeout, bounded by this (zero: unbounded). Envoy: `max_grpc_timeout`.
    pub grpc_timeout_max: Option<Duration>,
    /// Subtracted from `grpc-timeout`, so that the caller times out later than we do.
    pub grpc_timeout_offset: Option<Duration>,
    /// Take `grpc-timeout` as the longest life of the stream, bounded by this (zero: unbounded).
    /// Envoy: `max_stream_duration.grpc_timeout_header_max`.
    pub grpc_duration_max: Option<Duration>,
    /// Subtracted from `grpc-timeout` for `grpc_duration_max`.
    pub grpc_duration_offset: Option<Duration>,
    /// Whether and when to retry.
    pub retry: Option<RetryPolicy>,
    /// An attempt that takes too long goes on while another is made. Envoy: `hedge_on_per_try_timeout`.
    pub hedge: bool,
    /// Values the consistent-hash balancers use, in order.
    pub hash: Vec<HashPolicy>,
    /// Clusters that get a copy of the request.
    pub mirrors: Vec<Mirror>,
    /// Upgrades this route allows or forbids, by lower case name; others as the connection manager says.
    pub upgrades: Vec<(String, bool)>,
    /// CONNECT ends here: its tunnel goes on as plain TCP. Envoy: `connect_config`.
    pub ends_connect: bool,
    /// Which subset of the cluster's hosts may be used.
    pub subset: Option<SubsetMatch>,
    /// Circuit breakers of the high priority apply.
    pub high_priority: bool,
    /// `:authority` is rewritten.
    pub host_rewrite: HostRewrite,
    /// Put the old authority into `x-forwarded-host` when it is rewritten.
    pub append_x_forwarded_host: bool,
    /// Send `x-envoy-attempt-count` upstream.
    pub include_attempt_count: bool,
    /// Send `x-envoy-attempt-count` downstream.
    pub include_attempt_count_in_response: bool,
    /// Send `x-envoy-is-timeout-retry` upstream.
    pub include_is_timeout_retry: bool,
    /// Most body bytes kept for retries and mirrors.
    pub buffer_limit: Option<u64>,
    /// Which redirects are followed here.
    pub internal_redirect: Option<Box<InternalRedirect>>,
}

/// Labels a host must carry (`envoy.lb` metadata), sorted by key.
pub type SubsetMatch = Arc<BTreeMap<String, pb::Value>>;

/// The cluster chosen for one request.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its name.
    pub cluster: Arc<str>,
    /// Which of its hosts may be used.
    pub subset: Option<SubsetMatch>,
}

impl Target {
    /// Asks for hosts with these labels, too.
    pub(crate) fn narrow(&mut self, labels: &pb::Struct) {
        let mut all = self.subset.as_deref().cloned().unwrap_or_default();
        let labels = labels.fields.iter();
        all.extend(labels.map(|(key, value)| (key.clone(), value.clone())));
        self.subset = Some(Arc::new(all));
    }
}

/// How the cluster is chosen.
#[derive(Debug)]
pub enum ClusterSpec {
    /// Always this one.
    Name(Arc<str>),
    /// The one a request header names.
    Header(Name),
    /// By weight.
    Weighted(Weighted),
}

/// Clusters by weight.
#[derive(Debug)]
pub struct Weighted {
    /// The clusters.
    pub clusters: Vec<WeightedCluster>,
    /// Sum of the weights, not zero.
    pub total: u32,
    /// Header that carries the random value.
    pub random_header: Option<Name>,
}

/// One of the weighted clusters.
#[derive(Debug)]
pub struct WeightedCluster {
    /// Its name, or the header that has it.
    pub name: WeightedName,
    /// Its share of `Weighted::total`.
    pub weight: u32,
    /// Which of its hosts may be used.
    pub subset: Option<SubsetMatch>,
    /// Changes to the request.
    pub request_headers: HeaderOps,
    /// Changes to the response.
    pub response_headers: HeaderOps,
    /// `:authority` for this cluster.
    pub host_rewrite: Option<Bytes>,
}

/// What names a weighted cluster.
#[derive(Debug)]
pub enum WeightedName {
    /// This name.
    Name(Arc<str>),
    /// The name in a request header.
    Header(Name),
}

/// What becomes of `:authority`.
#[derive(Debug)]
pub enum HostRewrite {
    /// Stays.
    Keep,
    /// This text.
    Literal(Bytes),
    /// The DNS name of the chosen host. Done by the router, who knows the host.
    Auto,
    /// Value of a request header.
    Header(Name),
    /// Made from the path.
    PathRegex(RegexRewrite),
}

/// One value to hash by.
#[derive(Debug)]
pub struct HashPolicy {
    /// Stop here if this one gave a value.
    pub terminal: bool,
    /// The value.
    pub key: HashKey,
}

/// What a hash policy reads.
#[derive(Debug)]
pub enum HashKey {
    /// A request header, perhaps rewritten first.
    Header(Name, Option<RegexRewrite>),
    /// A cookie, made when absent if it has a lifetime.
    Cookie {
        /// Name of the cookie.
        name: String,
        /// Lifetime of a cookie we make (zero: session); `None` makes none.
        ttl: Option<Duration>,
        /// Its path.
        path: String,
        /// More attributes (`SameSite=Lax`), in order.
        attributes: Vec<(String, String)>,
    },
    /// Address of the downstream.
    SourceIp,
    /// A query parameter.
    Query(String),
}

/// A cluster that gets copies.
#[derive(Debug)]
pub struct Mirror {
    /// The cluster, or the header that names it.
    pub cluster: WeightedName,
    /// How often.
    pub chance: Fraction,
    /// Append `-shadow` to the authority.
    pub shadow_suffix: bool,
    /// `:authority` of the copy.
    pub host_rewrite: Option<Bytes>,
}

impl ForwardPolicy {
    /// Compiles a route action; `vhost` gives what the route does not.
    ///
    /// # Errors
    /// When something is invalid, or not supported and would change what happens.
    pub fn compile(
        action: &proto::RouteAction,
        route: &proto::Route,
        vhost: &proto::VirtualHost,
        layers: &RuntimeLayers,
    ) -> Result<ForwardPolicy, ConfigError> {
        refuse_unsupported(action)?;
        let spans = action.max_stream_duration.unwrap_or_default();
        let retry = action.retry_policy.as_ref().or(vhost.retry_policy.as_ref());
        let hedge = action.hedge_policy.as_ref().or(vhost.hedge_policy.as_ref());
        let mirrors = if action.request_mirror_policies.is_empty() {
            &vhost.request_mirror_policies
        } else {
            &action.request_mirror_policies
        };
        let buffer_limit = route
            .request_body_buffer_limit
            .as_ref()
            .map(|v| v.value)
            .or(route
                .per_request_buffer_limit_bytes
                .as_ref()
                .map(|v| u64::from(v.value)))
            .or(vhost.request_body_buffer_limit.as_ref().map(|v| v.value))
            .or(vhost
                .per_request_buffer_limit_bytes
                .as_ref()
                .map(|v| u64::from(v.value)));
        let wrap =
            |given: Option<&pb::Duration>, path| -> Result<Option<Option<Duration>>, ConfigError> {
                match given {
                    None => Ok(None),
                    Some(_) => timeout(path, given, None).map(Some),
                }
            };
        Ok(ForwardPolicy {
            cluster: cluster_spec(action)?,
            cluster_not_found: match action.cluster_not_found_response_code() {
                ClusterNotFoundResponseCode::ServiceUnavailable => 503,
                ClusterNotFoundResponseCode::NotFound => 404,
                ClusterNotFoundResponseCode::InternalServerError => 500,
            },
            timeout: timeout("timeout", action.timeout.as_ref(), Some(DEFAULT_TIMEOUT))?,
            idle_timeout: wrap(action.idle_timeout.as_ref(), "idle_timeout")?,
            max_stream_duration: wrap(spans.max_stream_duration.as_ref(), "max_stream_duration")?,
            grpc_timeout_max: optional_duration(
                "max_grpc_timeout",
                action.max_grpc_timeout.as_ref(),
            )?,
            grpc_timeout_offset: optional_duration(
                "grpc_timeout_offset",
                action.grpc_timeout_offset.as_ref(),
            )?,
            grpc_duration_max: optional_duration(
                "grpc_timeout_header_max",
                spans.grpc_timeout_header_max.as_ref(),
            )?,
            grpc_duration_offset: optional_duration(
                "grpc_timeout_header_offset",
                spans.grpc_timeout_header_offset.as_ref(),
            )?,
            retry: retry.map(RetryPolicy::compile).transpose()?,
            hedge: hedge.is_some_and(|hedge| hedge.hedge_on_per_try_timeout),
            hash: action
                .hash_policy
                .iter()
                .map(hash_policy)
                .collect::<Result<_, _>>()?,
            mirrors: mirrors
                .iter()
                .map(|policy| mirror(policy, layers))
                .collect::<Result<_, _>>()?,
            upgrades: action
                .upgrade_configs
                .iter()
                .map(|u| {
                    (
                        u.upgrade_type.to_ascii_lowercase(),
                        u.enabled.as_ref().is_none_or(|e| e.value),
                    )
                })
                .collect(),
            ends_connect: action
                .upgrade_configs
                .iter()
                .any(|u| u.connect_config.is_some()),
            subset: subset(action.metadata_match.as_ref()),
            high_priority: action.priority() == core::RoutingPriority::High,
            host_rewrite: host_rewrite(action.host_rewrite_specifier.as_ref())?,
            append_x_forwarded_host: action.append_x_forwarded_host,
            include_attempt_count: vhost.include_request_attempt_count,
            include_attempt_count_in_response: vhost.include_attempt_count_in_response,
            include_is_timeout_retry: vhost.include_is_timeout_retry_header,
            buffer_limit,
            internal_redirect: action
                .internal_redirect_policy
                .as_ref()
                .map(|policy| InternalRedirect::compile(policy).map(Box::new))
                .transpose()
                .map_err(|error| error.within("internal_redirect_policy"))?,
        })
    }

    /// Names of all clusters this may go to, as far as the configuration names them.
    pub fn clusters(&self) -> Vec<Arc<str>> {
        match &self.cluster {
            ClusterSpec::Name(name) => vec![name.clone()],
            ClusterSpec::Header(_) => Vec::new(),
            ClusterSpec::Weighted(weighted) => weighted
                .clusters
                .iter()
                .filter_map(|cluster| match &cluster.name {
                    WeightedName::Name(name) => Some(name.clone()),
                    WeightedName::Header(_) => None,
                })
                .collect(),
        }
    }

    /// Whether the route allows (`Some(true)`) or forbids an upgrade, or leaves it to the connection manager.
    pub fn upgrade(&self, name: &str) -> Option<bool> {
        self.upgrades
            .iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, allowed)| *allowed)
    }
}

fn refuse_unsupported(action: &proto::RouteAction) -> Result<(), ConfigError> {
    let unsupported = [
        (
            "retry_policy_typed_config",
            action.retry_policy_typed_config.is_some(),
        ),
        ("path_rewrite", !action.path_rewrite.is_empty()),
        ("early_data_policy", action.early_data_policy.is_some()),
    ];
    match unsupported.iter().find(|(_, present)| *present) {
        Some((field, _)) => Err(invalid(*field, "not supported")),
        None => Ok(()),
    }
}

fn cluster_spec(action: &proto::RouteAction) -> Result<ClusterSpec, ConfigError> {
    match action.cluster_specifier.as_ref() {
        Some(ClusterSpecifier::Cluster(name)) if !name.is_empty() => {
            Ok(ClusterSpec::Name(name.as_str().into()))
        }
        Some(ClusterSpecifier::ClusterHeader(name)) if !name.is_empty() => {
            Ok(ClusterSpec::Header(Name::new(name)))
        }
        Some(ClusterSpecifier::WeightedClusters(weighted)) => {
            weighted_clusters(weighted).map_err(|error| error.within("weighted_clusters"))
        }
        Some(ClusterSpecifier::Cluster(_) | ClusterSpecifier::ClusterHeader(_)) | None => {
            Err(invalid("cluster", "no cluster is named"))
        }
        Some(
            ClusterSpecifier::ClusterSpecifierPlugin(_)
            | ClusterSpecifier::InlineClusterSpecifierPlugin(_),
        ) => Err(invalid("cluster_specifier_plugin", "not supported")),
    }
}

fn weighted_clusters(weighted: &proto::WeightedCluster) -> Result<ClusterSpec, ConfigError> {
    let mut clusters = Vec::with_capacity(weighted.clusters.len());
    let mut total: u32 = 0;
    for cluster in &weighted.clusters {
        let weight = cluster.weight.as_ref().map_or(0, |weight| weight.value);
        total = total
            .checked_add(weight)
            .ok_or_else(|| invalid("weight", "the sum of the weights is too large"))?;
        let host_rewrite = cluster.host_rewrite_specifier.as_ref().map(|specifier| {
            let proto::weighted_cluster::cluster_weight::HostRewriteSpecifier::HostRewriteLiteral(
                host,
            ) = specifier;
            Bytes::from(host.clone())
        });
        clusters.push(WeightedCluster {
            name: named(&cluster.name, &cluster.cluster_header)?,
            weight,
            subset: subset(cluster.metadata_match.as_ref()),
            request_headers: HeaderOps::compile(
                &cluster.request_headers_to_add,
                &cluster.request_headers_to_remove,
            )?,
            response_headers: HeaderOps::compile(
                &cluster.response_headers_to_add,
                &cluster.response_headers_to_remove,
            )?,
            host_rewrite,
        });
    }
    if total == 0 {
        return Err(invalid("weight", "the sum of the weights is zero"));
    }
    let random_header = match weighted.random_value_specifier.as_ref() {
        None => None,
        Some(RandomValueSpecifier::HeaderName(name)) => Some(Name::new(name)),
        Some(RandomValueSpecifier::UseHashPolicy(on)) if !on.value => None,
        Some(RandomValueSpecifier::UseHashPolicy(_)) => {
            return Err(invalid("use_hash_policy", "not supported"));
        }
    };
    Ok(ClusterSpec::Weighted(Weighted {
        clusters,
        total,
        random_header,
    }))
}

fn named(name: &str, header: &str) -> Result<WeightedName, ConfigError> {
    match (name.is_empty(), header.is_empty()) {
        (false, true) => Ok(WeightedName::Name(name.into())),
        (true, false) => Ok(WeightedName::Header(Name::new(header))),
        _ => Err(invalid(
            "cluster",
            "either a name or a header must be given",
        )),
    }
}

fn subset(metadata: Option<&core::Metadata>) -> Option<SubsetMatch> {
    let labels = metadata?.filter_metadata.get("envoy.lb")?;
    let labels: BTreeMap<_, _> = labels
        .fields
        .iter()
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    Some(Arc::new(labels))
}

fn host_rewrite(specifier: Option<&HostRewriteSpecifier>) -> Result<HostRewrite, ConfigError> {
    Ok(match specifier {
        None => HostRewrite::Keep,
        Some(
            HostRewriteSpecifier::HostRewriteLiteral(host)
            | HostRewriteSpecifier::HostRewrite(host),
        ) => {
            if host.is_empty() {
                HostRewrite::Keep
            } else {
                HostRewrite::Literal(host.clone().into())
            }
        }
        Some(HostRewriteSpecifier::AutoHostRewrite(on)) if on.value => HostRewrite::Auto,
        Some(HostRewriteSpecifier::AutoHostRewrite(_)) => HostRewrite::Keep,
        Some(HostRewriteSpecifier::HostRewriteHeader(name)) => HostRewrite::Header(Name::new(name)),
        Some(HostRewriteSpecifier::HostRewritePathRegex(rewrite)) => {
            HostRewrite::PathRegex(RegexRewrite::compile("host_rewrite_path_regex", rewrite)?)
        }
    })
}

fn hash_policy(policy: &proto::route_action::HashPolicy) -> Result<HashPolicy, ConfigError> {
    let key = match policy.policy_specifier.as_ref() {
        Some(PolicySpecifier::Header(header)) => HashKey::Header(
            Name::new(&header.header_name),
            header
                .regex_rewrite
                .as_ref()
                .map(|rewrite| RegexRewrite::compile("regex_rewrite", rewrite))
                .transpose()?,
        ),
        Some(PolicySpecifier::Cookie(cookie)) => HashKey::Cookie {
            name: cookie.name.clone(),
            ttl: optional_duration("ttl", cookie.ttl.as_ref())?,
            path: cookie.path.clone(),
            attributes: cookie
                .attributes
                .iter()
                .map(|attribute| (attribute.name.clone(), attribute.value.clone()))
                .collect(),
        },
        Some(PolicySpecifier::ConnectionProperties(properties)) if properties.source_ip => {
            HashKey::SourceIp
        }
        Some(PolicySpecifier::QueryParameter(parameter)) => HashKey::Query(parameter.name.clone()),
        Some(PolicySpecifier::ConnectionProperties(_) | PolicySpecifier::FilterState(_)) | None => {
            return Err(invalid("hash_policy", "not supported"));
        }
    };
    Ok(HashPolicy {
        terminal: policy.terminal,
        key,
    })
}

fn mirror(
    policy: &proto::route_action::RequestMirrorPolicy,
    layers: &RuntimeLayers,
) -> Result<Mirror, ConfigError> {
    if !policy.request_headers_mutations.is_empty() {
        return Err(invalid("request_headers_mutations", "not supported"));
    }
    Ok(Mirror {
        cluster: named(&policy.cluster, &policy.cluster_header)?,
        chance: layers.fraction(policy.runtime_fraction.as_ref(), Chance::ALWAYS),
        shadow_suffix: !policy.disable_shadow_host_suffix_append,
        host_rewrite: Some(policy.host_rewrite_literal.clone())
            .filter(|host| !host.is_empty())
            .map(Bytes::from),
    })
}
