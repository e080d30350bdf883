//! A cluster's settings, read and checked.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use lateen_protocols::envoy::{
    envoy::{
        config::{
            cluster::v3::{
                Cluster as Proto,
                cluster::{
                    ClusterDiscoveryType, ClusterProtocolSelection, DiscoveryType, DnsLookupFamily,
                    LbConfig, LbPolicy, SlowStartConfig, common_lb_config::LocalityConfigSpecifier,
                    lb_subset_config::LbSubsetFallbackPolicy, ring_hash_lb_config::HashFunction,
                },
            },
            core::v3::{self as core, socket_address::PortSpecifier},
        },
        extensions::{
            clusters::dynamic_forward_proxy::v3::{
                ClusterConfig as ForwardProto, cluster_config::ClusterImplementationSpecifier,
            },
            common::dynamic_forward_proxy::v3::DnsCacheConfig,
            upstreams::http::v3::{
                HttpProtocolOptions,
                http_protocol_options::{
                    UpstreamProtocolOptions, explicit_http_config::ProtocolConfig,
                },
            },
        },
    },
    google::protobuf as pb,
};

use super::balancing;
use crate::{
    balance::{Algorithm, Policy, SlowStart},
    cluster::host::OverrideHealth,
    config_error::ConfigError,
    head::Name,
    proto::{duration, invalid, optional_duration, source_file, timeout, unpack},
};

/// Envoy: "upstream idle timeout ... defaults to 1 hour".
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// Envoy: `connect_timeout` "defaults to 5s".
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// How the endpoints are found.
#[derive(Clone, Debug, PartialEq)]
pub enum Discovery {
    /// They are in the cluster.
    Static,
    /// By DNS, all addresses.
    StrictDns(Dns),
    /// By DNS, the first address at the time.
    LogicalDns(Dns),
    /// From the control plane, under this name.
    Eds(Arc<str>),
    /// Wherever the connection was going.
    OriginalDst {
        /// The header that names the host instead.
        header: Option<Name>,
        /// The port to use instead.
        port: Option<u16>,
    },
    /// Wherever the request says, by the DNS cache with these settings.
    Forward(Box<DnsCacheConfig>),
}

impl Discovery {
    /// Whether there are no hosts but those that requests and connections are for.
    pub fn is_by_request(&self) -> bool {
        matches!(self, Discovery::OriginalDst { .. } | Discovery::Forward(_))
    }
}

/// How names are resolved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dns {
    /// Time between look-ups.
    pub refresh: Duration,
    /// Which addresses to use.
    pub family: DnsLookupFamily,
}

/// HTTP versions towards the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpVersion {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2, without negotiation.
    Http2,
    /// By ALPN; HTTP/1.1 without TLS.
    Auto,
    /// The one the downstream speaks.
    Downstream,
}

/// Settings of HTTP/2 connections.
#[derive(Clone, Debug, PartialEq)]
pub struct Http2 {
    /// Streams at once on one connection.
    pub max_concurrent_streams: u32,
    /// Flow-control window of a stream.
    pub stream_window: Option<u32>,
    /// Flow-control window of a connection.
    pub connection_window: Option<u32>,
    /// PING interval and how long to wait for the answer.
    pub keepalive: Option<(Duration, Duration)>,
}

impl Default for Http2 {
    fn default() -> Http2 {
        Http2 {
            // Envoy's default since 1.36; a peer's own limit is below that in practice.
            max_concurrent_streams: 1024,
            stream_window: None,
            connection_window: None,
            keepalive: None,
        }
    }
}

/// Which subsets of the hosts routes may ask for.
#[derive(Clone, Debug, PartialEq)]
pub struct Subsets {
    /// Each the keys of one kind of subset, sorted.
    pub selectors: Vec<Vec<String>>,
    /// What to do when no host is in the subset.
    pub fallback: Fallback,
}

/// See [`Subsets`].
#[derive(Clone, Debug, PartialEq)]
pub enum Fallback {
    /// Fail.
    Refuse,
    /// Use any host.
    Any,
    /// Use hosts with these labels.
    Default(Vec<(String, pb::Value)>),
}

/// TCP keep-alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepAlive {
    /// Idle time before the first probe.
    pub time: Option<Duration>,
    /// Time between probes.
    pub interval: Option<Duration>,
    /// Probes before giving up.
    pub probes: Option<u32>,
}

/// Everything about a cluster that does not change while it lives.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// How endpoints are found.
    pub discovery: Discovery,
    /// How a host is picked.
    pub policy: Policy,
    /// Subsets routes may ask for.
    pub subsets: Option<Subsets>,
    /// Longest time for connecting, TLS included.
    pub connect_timeout: Duration,
    /// HTTP version.
    pub version: HttpVersion,
    /// HTTP/2 settings.
    pub http2: Http2,
    /// Trailers pass to and from HTTP/1.1. Envoy: `enable_trailers`.
    pub http1_trailers: bool,
    /// How long an unused connection is kept.
    pub idle_timeout: Option<Duration>,
    /// How long a connection is used for new requests.
    pub max_connection_duration: Option<Duration>,
    /// Requests on one connection before it is closed.
    pub max_requests_per_connection: Option<u32>,
    /// Most response headers.
    pub max_response_headers: Option<u32>,
    /// Most bytes kept of a request body for retries.
    pub buffer_limit: u64,
    /// The server name is taken from the request.
    pub auto_sni: bool,
    /// The header it is taken from instead of `:authority`.
    pub auto_sni_header: Option<Name>,
    /// Our address on connections: the first of the family of the host's.
    pub bind: Vec<SocketAddr>,
    /// TCP keep-alive.
    pub keepalive: Option<KeepAlive>,
    /// Which hosts a filter may insist on.
    pub override_health: OverrideHealth,
    /// The file that gives the endpoints of an EDS cluster; a stream does otherwise.
    pub eds_file: Option<String>,
}

impl Config {
    pub(super) fn read(proto: &Proto) -> Result<Config, ConfigError> {
        let proto = &*balancing::plain(proto)?;
        refuse_unsupported(proto)?;
        let options = match proto.typed_extension_protocol_options.get(OPTIONS) {
            None => HttpProtocolOptions::default(),
            Some(any) => unpack::<HttpProtocolOptions>(any)?
                .ok_or_else(|| invalid(OPTIONS, format!("is a {}", any.type_url)))?,
        };
        if let Some(other) = proto
            .typed_extension_protocol_options
            .keys()
            .find(|key| *key != OPTIONS)
        {
            tracing::warn!(
                cluster = proto.name,
                option = other,
                "unknown protocol option is ignored"
            );
        }
        refuse_options(&options).map_err(|error| error.within(OPTIONS))?;
        let (version, http2) = version(proto, &options)?;
        let common = options
            .common_http_protocol_options
            .as_ref()
            .or(proto.common_http_protocol_options.as_ref());
        let upstream = upstream_options(proto)?;
        let upstream = upstream.as_ref();
        let wrapped = |value: Option<&pb::UInt32Value>| value.map(|v| v.value).filter(|v| *v > 0);
        Ok(Config {
            discovery: discovery(proto)?,
            policy: policy(proto)?,
            subsets: subsets(proto)?,
            connect_timeout: optional_duration("connect_timeout", proto.connect_timeout.as_ref())?
                .filter(|time| !time.is_zero())
                .unwrap_or(CONNECT_TIMEOUT),
            version,
            http2,
            idle_timeout: timeout(
                "idle_timeout",
                common.and_then(|common| common.idle_timeout.as_ref()),
                Some(IDLE_TIMEOUT),
            )?,
            max_connection_duration: timeout(
                "max_connection_duration",
                common.and_then(|common| common.max_connection_duration.as_ref()),
                None,
            )?,
            max_requests_per_connection: wrapped(
                common.and_then(|c| c.max_requests_per_connection.as_ref()),
            )
            .or(wrapped(proto.max_requests_per_connection.as_ref())),
            max_response_headers: wrapped(common.and_then(|c| c.max_headers_count.as_ref())),
            buffer_limit: proto
                .per_connection_buffer_limit_bytes
                .as_ref()
                .map_or(1024 * 1024, |v| u64::from(v.value)),
            auto_sni: upstream.is_some_and(|upstream| upstream.auto_sni),
            auto_sni_header: upstream
                .map(|upstream| upstream.override_auto_sni_header.as_str())
                .filter(|name| !name.is_empty())
                .map(Name::new),
            bind: bind(proto.upstream_bind_config.as_ref())?,
            keepalive: keepalive(proto),
            override_health: OverrideHealth::read(proto),
            http1_trailers: http1(proto, &options).is_some_and(|http1| http1.enable_trailers),
            eds_file: proto
                .eds_cluster_config
                .as_ref()
                .and_then(|eds| source_file(eds.eds_config.as_ref()))
                .map(str::to_owned),
        })
    }

    /// Whether the server's certificate must be for the server name that is taken from the request.
    pub(super) fn validates_sni(proto: &Proto) -> Result<bool, ConfigError> {
        Ok(upstream_options(proto)?.is_some_and(|upstream| upstream.auto_san_validation))
    }
}

fn refuse_unsupported(proto: &Proto) -> Result<(), ConfigError> {
    let unsupported = [
        ("filters", !proto.filters.is_empty()),
        ("upstream_config", proto.upstream_config.is_some()),
        (
            "connection_pool_per_downstream_connection",
            proto.connection_pool_per_downstream_connection,
        ),
        ("queuing_policies", proto.queuing_policies.is_some()),
    ];
    if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
        return Err(invalid(*field, "not supported"));
    }
    for (field, present) in [
        ("preconnect_policy", proto.preconnect_policy.is_some()),
        ("lrs_server", proto.lrs_server.is_some()),
        (
            "close_connections_on_host_health_failure",
            proto.close_connections_on_host_health_failure,
        ),
        ("track_timeout_budgets", proto.track_timeout_budgets),
    ] {
        if present {
            tracing::warn!(cluster = proto.name, field, "setting is ignored");
        }
    }
    Ok(())
}

fn refuse_options(options: &HttpProtocolOptions) -> Result<(), ConfigError> {
    let codec_only = options
        .http_filters
        .iter()
        .all(|filter| filter.name == "envoy.filters.http.upstream_codec");
    let unsupported = [
        ("http_filters", !codec_only),
        ("outlier_detection", options.outlier_detection.is_some()),
        (
            "request_mirror_policies",
            !options.request_mirror_policies.is_empty(),
        ),
        ("hash_policy", !options.hash_policy.is_empty()),
        ("retry_policy", options.retry_policy.is_some()),
    ];
    match unsupported.iter().find(|(_, present)| *present) {
        Some((field, _)) => Err(invalid(*field, "not supported")),
        None => Ok(()),
    }
}

fn discovery(proto: &Proto) -> Result<Discovery, ConfigError> {
    let kind = match proto.cluster_discovery_type.as_ref() {
        None => DiscoveryType::Static,
        Some(ClusterDiscoveryType::Type(kind)) => {
            DiscoveryType::try_from(*kind).map_err(|_| invalid("type", "is not known"))?
        }
        Some(ClusterDiscoveryType::ClusterType(custom)) => {
            let forward = custom.typed_config.as_ref().map(unpack::<ForwardProto>);
            return match forward.transpose()?.flatten() {
                Some(forward) => self::forward(proto, forward),
                None => Err(invalid(
                    "cluster_type",
                    format!("{} is not supported", custom.name),
                )),
            };
        }
    };
    let dns = || -> Result<Dns, ConfigError> {
        Ok(Dns {
            refresh: optional_duration("dns_refresh_rate", proto.dns_refresh_rate.as_ref())?
                .unwrap_or(Duration::from_secs(5))
                .max(Duration::from_millis(1)),
            family: proto.dns_lookup_family(),
        })
    };
    Ok(match kind {
        DiscoveryType::Static => Discovery::Static,
        DiscoveryType::StrictDns => Discovery::StrictDns(dns()?),
        DiscoveryType::LogicalDns => Discovery::LogicalDns(dns()?),
        DiscoveryType::Eds => {
            let service = proto
                .eds_cluster_config
                .as_ref()
                .map(|eds| eds.service_name.as_str());
            let service = service
                .filter(|name| !name.is_empty())
                .unwrap_or(&proto.name);
            Discovery::Eds(service.into())
        }
        DiscoveryType::OriginalDst => match proto.lb_config.as_ref() {
            Some(LbConfig::OriginalDstLbConfig(config)) => {
                if config.metadata_key.is_some() {
                    return Err(invalid(
                        "original_dst_lb_config.metadata_key",
                        "not supported",
                    ));
                }
                let name = match config.http_header_name.as_str() {
                    "" => "x-envoy-original-dst-host",
                    name => name,
                };
                let port =
                    match config.upstream_port_override.as_ref() {
                        None => None,
                        Some(port) => Some(u16::try_from(port.value).map_err(|_| {
                            invalid("upstream_port_override", "is greater than 65535")
                        })?),
                    };
                Discovery::OriginalDst {
                    header: config.use_http_header.then(|| Name::new(name)),
                    port,
                }
            }
            _ => Discovery::OriginalDst {
                header: None,
                port: None,
            },
        },
    })
}

/// A cluster of hosts that requests name. Envoy: `envoy.clusters.dynamic_forward_proxy`.
fn forward(proto: &Proto, config: ForwardProto) -> Result<Discovery, ConfigError> {
    use ClusterImplementationSpecifier::{DnsCacheConfig, SubClustersConfig};
    if config.allow_coalesced_connections {
        return Err(invalid("allow_coalesced_connections", "not supported"));
    }
    if proto.lb_policy() != LbPolicy::ClusterProvided {
        return Err(invalid("lb_policy", "is not CLUSTER_PROVIDED"));
    }
    if let Some(upstream) = upstream_options(proto)?
        && !config.allow_insecure_cluster_options
        && !(upstream.auto_sni && upstream.auto_san_validation)
    {
        return Err(invalid(
            "cluster_type",
            "auto_sni and auto_san_validation must be true unless allow_insecure_cluster_options is",
        ));
    }
    match config.cluster_implementation_specifier {
        Some(DnsCacheConfig(cache)) => Ok(Discovery::Forward(Box::new(cache))),
        Some(SubClustersConfig(_)) => Err(invalid("sub_clusters_config", "not supported")),
        None => Err(invalid("dns_cache_config", "is required")),
    }
}

/// What is said of server names and certificates. For hosts that requests name, both follow the request unless
/// something else is said.
fn upstream_options(
    proto: &Proto,
) -> Result<Option<core::UpstreamHttpProtocolOptions>, ConfigError> {
    let options = match proto.typed_extension_protocol_options.get(OPTIONS) {
        None => None,
        Some(any) => unpack::<HttpProtocolOptions>(any)?,
    };
    let typed = options.is_some();
    let said = options
        .and_then(|options| options.upstream_http_protocol_options)
        .or(proto.upstream_http_protocol_options.clone());
    let by_request = match proto.cluster_discovery_type.as_ref() {
        Some(ClusterDiscoveryType::ClusterType(custom)) => {
            let config = custom.typed_config.as_ref().map(unpack::<ForwardProto>);
            config.transpose()?.flatten().is_some()
        }
        _ => false,
    };
    Ok(said.or_else(|| {
        (by_request && !typed).then(|| core::UpstreamHttpProtocolOptions {
            auto_sni: true,
            auto_san_validation: true,
            ..Default::default()
        })
    }))
}

fn policy(proto: &Proto) -> Result<Policy, ConfigError> {
    let algorithm = match (proto.lb_policy(), proto.lb_config.as_ref()) {
        (LbPolicy::RoundRobin, _) => Algorithm::RoundRobin,
        (LbPolicy::Random | LbPolicy::ClusterProvided, _) => Algorithm::Random,
        (LbPolicy::LeastRequest, config) => {
            let config = match config {
                Some(LbConfig::LeastRequestLbConfig(config)) => Some(config),
                _ => None,
            };
            let choices = config
                .and_then(|c| c.choice_count.as_ref())
                .map_or(2, |c| c.value);
            if choices < 2 {
                return Err(invalid(
                    "least_request_lb_config.choice_count",
                    "is less than 2",
                ));
            }
            let bias = config
                .and_then(|c| c.active_request_bias.as_ref())
                .map_or(1.0, |b| b.default_value);
            Algorithm::LeastRequest { choices, bias }
        }
        (LbPolicy::RingHash, config) => {
            let config = match config {
                Some(LbConfig::RingHashLbConfig(config)) => Some(config),
                _ => None,
            };
            if config.is_some_and(|config| config.hash_function() != HashFunction::XxHash) {
                return Err(invalid(
                    "ring_hash_lb_config.hash_function",
                    "not supported",
                ));
            }
            // Envoy's defaults, and its bound.
            const LARGEST: u64 = 8 * 1024 * 1024;
            let size =
                |value: Option<&pb::UInt64Value>, default: u64| value.map_or(default, |v| v.value);
            let min_size = size(config.and_then(|c| c.minimum_ring_size.as_ref()), 1024);
            let max_size = size(config.and_then(|c| c.maximum_ring_size.as_ref()), LARGEST);
            if min_size > max_size || max_size > LARGEST {
                return Err(invalid(
                    "ring_hash_lb_config",
                    "ring sizes are out of range",
                ));
            }
            Algorithm::RingHash { min_size, max_size }
        }
        (LbPolicy::Maglev, config) => {
            let table_size = match config {
                Some(LbConfig::MaglevLbConfig(config)) => {
                    config.table_size.as_ref().map_or(65537, |v| v.value)
                }
                _ => 65537,
            };
            let prime = table_size > 2
                && table_size <= 5_000_011
                && (2..)
                    .take_while(|n| n * n <= table_size)
                    .all(|n| table_size % n != 0);
            if !prime {
                return Err(invalid(
                    "maglev_lb_config.table_size",
                    "is not a prime number up to 5000011",
                ));
            }
            Algorithm::Maglev { table_size }
        }
        (LbPolicy::LoadBalancingPolicyConfig, _) => {
            return Err(invalid(
                "lb_policy",
                "is LOAD_BALANCING_POLICY_CONFIG, and there is no load_balancing_policy",
            ));
        }
    };
    let slow_start = match proto.lb_config.as_ref() {
        Some(LbConfig::RoundRobinLbConfig(config)) => config.slow_start_config.as_ref(),
        Some(LbConfig::LeastRequestLbConfig(config)) => config.slow_start_config.as_ref(),
        _ => None,
    };
    let slow_start = match slow_start {
        Some(config) => {
            self::slow_start(config).map_err(|error| error.within("lb_config.slow_start_config"))?
        }
        None => None,
    };
    let common = proto.common_lb_config.clone().unwrap_or_default();
    let hashing = common.consistent_hashing_lb_config.as_ref();
    if hashing.is_some_and(|hashing| hashing.hash_balance_factor.is_some()) {
        return Err(invalid(
            "consistent_hashing_lb_config.hash_balance_factor",
            "not supported",
        ));
    }
    let fail_on_panic = match common.locality_config_specifier.as_ref() {
        Some(LocalityConfigSpecifier::ZoneAwareLbConfig(zone)) => zone.fail_traffic_on_panic,
        _ => false,
    };
    Ok(Policy {
        algorithm,
        panic_threshold: common
            .healthy_panic_threshold
            .as_ref()
            .map_or(50.0, |p| p.value),
        fail_on_panic,
        locality_weighted: matches!(
            common.locality_config_specifier,
            Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_))
        ),
        hash_hostnames: hashing.is_some_and(|hashing| hashing.use_hostname_for_hashing),
        slow_start,
    })
}

/// `None` without a window.
fn slow_start(config: &SlowStartConfig) -> Result<Option<SlowStart>, ConfigError> {
    let window = optional_duration("slow_start_window", config.slow_start_window.as_ref())?;
    let percent = config.min_weight_percent.as_ref().map_or(10.0, |p| p.value);
    if !(0.0..=100.0).contains(&percent) {
        return Err(invalid("min_weight_percent", "is not between 0 and 100"));
    }
    let aggression = config
        .aggression
        .as_ref()
        .map_or(1.0, |value| value.default_value);
    Ok(window
        .filter(|window| !window.is_zero())
        .map(|window| SlowStart {
            window,
            // As in Envoy, what makes no sense is 1.
            aggression: if aggression > 0.0 { aggression } else { 1.0 },
            least: percent / 100.0,
        }))
}

fn subsets(proto: &Proto) -> Result<Option<Subsets>, ConfigError> {
    let Some(config) = proto
        .lb_subset_config
        .as_ref()
        .filter(|config| !config.subset_selectors.is_empty())
    else {
        return Ok(None);
    };
    let mut selectors = Vec::with_capacity(config.subset_selectors.len());
    for selector in &config.subset_selectors {
        if selector.fallback_policy != 0 || selector.single_host_per_subset {
            return Err(invalid(
                "lb_subset_config.subset_selectors",
                "per-selector fallback and single_host_per_subset are not supported",
            ));
        }
        let mut keys = selector.keys.clone();
        keys.sort();
        selectors.push(keys);
    }
    let fallback = match config.fallback_policy() {
        LbSubsetFallbackPolicy::NoFallback => Fallback::Refuse,
        LbSubsetFallbackPolicy::AnyEndpoint => Fallback::Any,
        LbSubsetFallbackPolicy::DefaultSubset => {
            let labels = config
                .default_subset
                .as_ref()
                .map(|subset| subset.fields.clone())
                .unwrap_or_default();
            Fallback::Default(labels.into_iter().collect())
        }
    };
    Ok(Some(Subsets {
        selectors,
        fallback,
    }))
}

fn version(
    proto: &Proto,
    options: &HttpProtocolOptions,
) -> Result<(HttpVersion, Http2), ConfigError> {
    let read = |options: Option<&core::Http2ProtocolOptions>| {
        options.map_or_else(|| Ok(Http2::default()), http2)
    };
    Ok(match options.upstream_protocol_options.as_ref() {
        None => {
            let http2 = read(proto.http2_protocol_options.as_ref())?;
            if proto.protocol_selection() == ClusterProtocolSelection::UseDownstreamProtocol {
                (HttpVersion::Downstream, http2)
            } else if proto.http2_protocol_options.is_some() {
                (HttpVersion::Http2, http2)
            } else {
                (HttpVersion::Http1, http2)
            }
        }
        Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => {
            match explicit.protocol_config.as_ref() {
                Some(ProtocolConfig::Http2ProtocolOptions(options)) => {
                    (HttpVersion::Http2, http2(options)?)
                }
                Some(ProtocolConfig::HttpProtocolOptions(_)) | None => {
                    (HttpVersion::Http1, Http2::default())
                }
                Some(ProtocolConfig::Http3ProtocolOptions(_)) => {
                    return Err(invalid("http3_protocol_options", "not supported"));
                }
            }
        }
        Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(config)) => {
            // Without HTTP/2 settings Envoy speaks HTTP/1.1 to the upstream whatever the downstream does.
            if config.http2_protocol_options.is_none() {
                (HttpVersion::Http1, Http2::default())
            } else {
                (
                    HttpVersion::Downstream,
                    read(config.http2_protocol_options.as_ref())?,
                )
            }
        }
        Some(UpstreamProtocolOptions::AutoConfig(config)) => (
            HttpVersion::Auto,
            read(config.http2_protocol_options.as_ref())?,
        ),
    })
}

/// The options of HTTP/1.1, wherever they stand.
fn http1<'a>(
    proto: &'a Proto,
    options: &'a HttpProtocolOptions,
) -> Option<&'a core::Http1ProtocolOptions> {
    match options.upstream_protocol_options.as_ref() {
        None => proto.http_protocol_options.as_ref(),
        Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => {
            match explicit.protocol_config.as_ref()? {
                ProtocolConfig::HttpProtocolOptions(http1) => Some(http1),
                _ => None,
            }
        }
        Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(config)) => {
            config.http_protocol_options.as_ref()
        }
        Some(UpstreamProtocolOptions::AutoConfig(config)) => config.http_protocol_options.as_ref(),
    }
}

fn http2(options: &core::Http2ProtocolOptions) -> Result<Http2, ConfigError> {
    let default = Http2::default();
    let wrapped = |value: &Option<pb::UInt32Value>| value.as_ref().map(|v| v.value);
    let keepalive = match options.connection_keepalive.as_ref() {
        None => None,
        Some(keepalive) => match optional_duration("interval", keepalive.interval.as_ref())? {
            None => None,
            Some(interval) => {
                let wait = keepalive
                    .timeout
                    .as_ref()
                    .ok_or_else(|| invalid("timeout", "is required"))?;
                Some((interval, duration("timeout", wait)?))
            }
        },
    };
    Ok(Http2 {
        max_concurrent_streams: wrapped(&options.max_concurrent_streams)
            .filter(|n| *n > 0)
            .unwrap_or(default.max_concurrent_streams),
        stream_window: wrapped(&options.initial_stream_window_size),
        connection_window: wrapped(&options.initial_connection_window_size),
        keepalive,
    })
}

fn bind(config: Option<&core::BindConfig>) -> Result<Vec<SocketAddr>, ConfigError> {
    let Some(config) = config else {
        return Ok(Vec::new());
    };
    let extra = config.extra_source_addresses.iter();
    config
        .source_address
        .iter()
        .chain(extra.filter_map(|extra| extra.address.as_ref()))
        .map(source_address)
        .collect()
}

fn source_address(source: &core::SocketAddress) -> Result<SocketAddr, ConfigError> {
    let ip = source.address.parse().map_err(|_| {
        invalid(
            "upstream_bind_config.source_address",
            "is not an IP address",
        )
    })?;
    let port = match source.port_specifier {
        Some(PortSpecifier::PortValue(port)) => u16::try_from(port)
            .map_err(|_| invalid("upstream_bind_config.port_value", "is greater than 65535"))?,
        _ => 0,
    };
    Ok(SocketAddr::new(ip, port))
}

fn keepalive(proto: &Proto) -> Option<KeepAlive> {
    let options = proto
        .upstream_connection_options
        .as_ref()?
        .tcp_keepalive
        .as_ref()?;
    let seconds = |value: &Option<pb::UInt32Value>| {
        value
            .as_ref()
            .filter(|v| v.value > 0)
            .map(|v| Duration::from_secs(u64::from(v.value)))
    };
    Some(KeepAlive {
        time: seconds(&options.keepalive_time),
        interval: seconds(&options.keepalive_interval),
        probes: options.keepalive_probes.as_ref().map(|v| v.value),
    })
}
