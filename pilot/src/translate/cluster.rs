//! Clusters: of every visible service port and subset, of the workload's own ports, and the special ones.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use envoy_types::pb::envoy::config::cluster::v3::{
    CircuitBreakers, Cluster, OutlierDetection as EnvoyOutlier, UpstreamConnectionOptions,
    circuit_breakers::Thresholds, circuit_breakers::thresholds::RetryBudget as EnvoyBudget,
    cluster::ClusterDiscoveryType, cluster::DiscoveryType, cluster::DnsLookupFamily,
    cluster::EdsClusterConfig, cluster::LbConfig, cluster::LbPolicy, cluster::LeastRequestLbConfig,
    cluster::MaglevLbConfig, cluster::RingHashLbConfig, cluster::RoundRobinLbConfig,
    cluster::SlowStartConfig, cluster::TransportSocketMatch,
    cluster::common_lb_config::LocalityConfigSpecifier,
    cluster::common_lb_config::LocalityWeightedLbConfig,
};
use envoy_types::pb::envoy::config::core::v3::{
    BindConfig, ExtraSourceAddress, Http1ProtocolOptions, Http2ProtocolOptions,
    HttpProtocolOptions as CommonOptions, RuntimeDouble, SocketAddress, TcpKeepalive,
    socket_address::PortSpecifier,
};
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier,
};
use envoy_types::pb::envoy::extensions::upstreams::http::v3::{
    HttpProtocolOptions, http_protocol_options::ExplicitHttpConfig,
    http_protocol_options::UpstreamProtocolOptions, http_protocol_options::UseDownstreamHttpConfig,
    http_protocol_options::explicit_http_config::ProtocolConfig,
};
use envoy_types::pb::envoy::r#type::v3::Percent;
use envoy_types::pb::google::protobuf::{Any, Struct, UInt64Value};
use lateen_config::networking::{
    ConnectionPool, LoadBalancer, OutlierDetection, RetryBudget, SimpleBalancer, TlsMode,
};

use crate::model::{DestinationPolicy, Labels, Port, Protocol, Resolution, Service, selects};

use super::inbound::{self, Application};
use super::interception::source_address;
use super::locality::{Arrangement, arrange};
use super::policy::{Policy, subset_labels};
use super::wire::{
    ads, any, count, duration, endpoint_address, metadata, socket_address, structure, text,
    u32_value,
};
use super::{Resources, Scope, mixer, names, route, tls};

const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// Key of endpoint metadata that transport sockets are matched by.
pub(super) const SOCKET_MATCH: &str = "envoy.transport_socket_match";

/// Mixer's plain port: no DestinationRule has to say so.
const MIXER_PLAIN_PORT: u16 = 9091;

/// Source address of connections the sidecar passes through to its own workload.
const PASSTHROUGH_SOURCE: &str = "127.0.0.6";
/// The same of IPv6, which `proxy iptables` adds to loopback.
const PASSTHROUGH_SOURCE_V6: &str = "::6";

pub(super) fn clusters(scope: &Scope<'_>, resources: &mut Resources) {
    for service in &scope.services {
        let rule = scope
            .snapshot
            .destination_policy(&service.hostname, &scope.node.namespace, &scope.node.labels)
            .map(AsRef::as_ref);
        for port in service
            .ports
            .iter()
            .filter(|port| port.protocol != Protocol::Udp)
        {
            insert(resources, outbound(scope, service, port, rule, ""));
            for subset in rule.iter().flat_map(|rule| &rule.rule.subsets) {
                insert(
                    resources,
                    outbound(scope, service, port, rule, &subset.name),
                );
            }
        }
    }
    insert(
        resources,
        special(scope, names::BLACK_HOLE, DiscoveryType::Static),
    );
    if scope.traffic.knows_original_destination() && !scope.is_router() {
        insert(
            resources,
            special(scope, names::PASSTHROUGH, DiscoveryType::OriginalDst),
        );
        let mut passed = special(
            scope,
            names::INBOUND_PASSTHROUGH,
            DiscoveryType::OriginalDst,
        );
        passed.upstream_bind_config = Some(passthrough_source(scope));
        insert(resources, passed);
    }
    if !scope.is_router() {
        inbound(scope, resources);
    }
}

/// From where the proxy connects to the application at the address the client had meant; what comes from there is
/// not redirected again.
fn passthrough_source(scope: &Scope<'_>) -> BindConfig {
    let source = |address: &str| SocketAddress {
        address: address.to_owned(),
        port_specifier: Some(PortSpecifier::PortValue(0)),
        ..Default::default()
    };
    let addresses = &scope.node.addresses;
    let mut sources = Vec::new();
    if addresses.iter().any(IpAddr::is_ipv4) {
        sources.push(source(PASSTHROUGH_SOURCE));
    }
    if addresses.iter().any(IpAddr::is_ipv6) {
        sources.push(source(PASSTHROUGH_SOURCE_V6));
    }
    let mut sources = sources.into_iter();
    BindConfig {
        source_address: sources.next(),
        extra_source_addresses: sources
            .map(|address| ExtraSourceAddress {
                address: Some(address),
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

fn insert(resources: &mut Resources, cluster: Cluster) {
    // Kept as it came if already there: two services may lead to one workload port.
    resources
        .clusters
        .entry(cluster.name.clone())
        .or_insert(cluster);
}

fn special(scope: &Scope<'_>, name: &str, kind: DiscoveryType) -> Cluster {
    let original = kind == DiscoveryType::OriginalDst;
    Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(kind as i32)),
        connect_timeout: duration(scope.snapshot.mesh().connect_timeout()),
        lb_policy: if original {
            LbPolicy::ClusterProvided
        } else {
            LbPolicy::RoundRobin
        } as i32,
        load_assignment: (!original).then(|| assignment(name, Vec::new())),
        typed_extension_protocol_options: if original {
            downstream_protocol()
        } else {
            HashMap::new()
        },
        ..Default::default()
    }
}

fn assignment(name: &str, endpoints: Vec<LocalityLbEndpoints>) -> ClusterLoadAssignment {
    ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints,
        ..Default::default()
    }
}

/// How a cluster of a service port finds its endpoints, for this node.
pub(super) fn discovery(
    scope: &Scope<'_>,
    service: &Service,
    policy: &Policy<'_>,
) -> DiscoveryType {
    let wants_original =
        policy.balancer.and_then(|balancer| balancer.simple) == Some(SimpleBalancer::Passthrough);
    let can_original = scope.traffic.knows_original_destination() && !scope.is_router();
    match service.resolution {
        Resolution::Endpoints if wants_original && can_original => DiscoveryType::OriginalDst,
        Resolution::Endpoints => DiscoveryType::Eds,
        Resolution::Dns => DiscoveryType::StrictDns,
        Resolution::DnsRoundRobin => DiscoveryType::LogicalDns,
        Resolution::Passthrough if can_original => DiscoveryType::OriginalDst,
        // Headless: its pods are known. An entry without endpoints: what the client would have resolved.
        Resolution::Passthrough if service.headless || service.hostname.starts_with('*') => {
            DiscoveryType::Eds
        }
        Resolution::Passthrough => DiscoveryType::StrictDns,
    }
}

fn outbound(
    scope: &Scope<'_>,
    service: &Service,
    port: &Port,
    rule: Option<&DestinationPolicy>,
    subset: &str,
) -> Cluster {
    let name = names::outbound(port.number, subset, &service.hostname);
    let policy = Policy::of(rule, port.number, subset);
    let mesh = scope.snapshot.mesh();
    let is_mixer = mixer::is_server(mesh, &service.hostname, port.number);
    let kind = discovery(scope, service, &policy);
    let arrangement = Arrangement::of(scope, service, &policy);
    let mut cluster = Cluster {
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(kind as i32)),
        connect_timeout: duration(mesh.connect_timeout()),
        circuit_breakers: Some(CircuitBreakers {
            thresholds: vec![thresholds(policy.pool, policy.retry_budget)],
            ..Default::default()
        }),
        metadata: cluster_metadata(service, rule, subset),
        ..Default::default()
    };
    match kind {
        DiscoveryType::Eds => {
            cluster.upstream_bind_config = source_address(scope.node).map(|address| BindConfig {
                source_address: Some(SocketAddress {
                    address: address.to_string(),
                    port_specifier: Some(PortSpecifier::PortValue(0)),
                    ..Default::default()
                }),
                ..Default::default()
            });
            cluster.eds_cluster_config = Some(EdsClusterConfig {
                eds_config: ads(),
                service_name: name.clone(),
            });
        }
        DiscoveryType::StrictDns | DiscoveryType::LogicalDns => {
            resolve(
                scope,
                &mut cluster,
                &name,
                kind,
                dns_endpoints(
                    scope,
                    service,
                    port,
                    subset_labels(rule, subset),
                    arrangement.as_ref(),
                ),
            );
        }
        DiscoveryType::OriginalDst | DiscoveryType::Static => {}
    }
    balance(&mut cluster, policy.balancer, kind);
    if arrangement.is_some() && kind != DiscoveryType::OriginalDst {
        let common = cluster.common_lb_config.get_or_insert_default();
        common.locality_config_specifier = Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(
            LocalityWeightedLbConfig {},
        ));
    }
    if let Some(pool) = policy.pool {
        connections(&mut cluster, pool);
    }
    if let Some(outlier) = policy.outlier {
        eject(&mut cluster, outlier);
    }
    let http2 = is_mixer || is_http2(port.protocol, policy.pool);
    if let Some(options) = protocol_options(port.protocol, policy.pool, http2) {
        cluster.typed_extension_protocol_options =
            HashMap::from([(HTTP_OPTIONS.to_owned(), options)]);
    }
    secure(
        scope,
        &mut cluster,
        service,
        port,
        rule,
        subset,
        &policy,
        http2,
    );
    cluster.name = name;
    cluster
}

/// Endpoints by DNS name, looked up by the proxy.
#[allow(
    deprecated,
    reason = "the typed form of these fields is younger than proxies in use"
)]
fn resolve(
    scope: &Scope<'_>,
    cluster: &mut Cluster,
    name: &str,
    kind: DiscoveryType,
    mut localities: Vec<LocalityLbEndpoints>,
) {
    if kind == DiscoveryType::LogicalDns {
        localities.truncate(1);
        for locality in &mut localities {
            locality.lb_endpoints.truncate(1);
        }
        if localities.is_empty() {
            // LOGICAL_DNS of nothing is refused.
            cluster.cluster_discovery_type =
                Some(ClusterDiscoveryType::Type(DiscoveryType::StrictDns as i32));
        }
    }
    cluster.load_assignment = Some(assignment(name, localities));
    cluster.dns_lookup_family = DnsLookupFamily::V4Preferred as i32;
    cluster.respect_dns_ttl = true;
    cluster.dns_refresh_rate = duration(
        scope
            .snapshot
            .mesh()
            .dns_refresh_rate
            .unwrap_or(lateen_config::Duration::from_millis(60_000)),
    );
}

fn cluster_metadata(
    service: &Service,
    rule: Option<&DestinationPolicy>,
    subset: &str,
) -> Option<envoy_types::pb::envoy::config::core::v3::Metadata> {
    let mut fields = structure([("services", route::service_metadata(service))]);
    if let Some(object) = rule.and_then(|rule| rule.objects.first()) {
        let path = format!(
            "/apis/{}/v1/namespaces/{}/destination-rule/{}",
            object.key.group, object.key.namespace, object.key.name
        );
        fields.fields.insert("config".to_owned(), text(path));
    }
    if !subset.is_empty() {
        fields.fields.insert("subset".to_owned(), text(subset));
    }
    metadata([("istio", fields)])
}

fn dns_endpoints(
    scope: &Scope<'_>,
    service: &Service,
    port: &Port,
    labels: Option<&Labels>,
    arrangement: Option<&Arrangement<'_>>,
) -> Vec<LocalityLbEndpoints> {
    let endpoints = scope
        .snapshot
        .endpoints(&service.hostname, port.number)
        .iter()
        .filter(|endpoint| labels.is_none_or(|labels| selects(labels, &endpoint.labels)))
        // DNS clusters have no unix sockets.
        .filter(|endpoint| !endpoint.address.starts_with("unix://"));
    let listed = arrange(scope, arrangement, endpoints.map(AsRef::as_ref));
    if !listed.is_empty() || service.resolution != Resolution::Passthrough {
        return listed;
    }
    vec![LocalityLbEndpoints {
        lb_endpoints: vec![LbEndpoint {
            host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
                address: socket_address(&service.hostname, port.number),
                ..Default::default()
            })),
            ..Default::default()
        }],
        ..Default::default()
    }]
}

/// Everything unlimited unless a pool says otherwise.
fn thresholds(pool: Option<&ConnectionPool>, budget: Option<&RetryBudget>) -> Thresholds {
    let limit = |wanted: Option<i32>| {
        wanted
            .filter(|limit| *limit > 0)
            .map_or(u32_value(u32::MAX), count)
    };
    Thresholds {
        max_connections: limit(pool.and_then(|pool| pool.tcp.max_connections)),
        max_pending_requests: limit(pool.and_then(|pool| pool.http.http1_max_pending_requests)),
        max_requests: limit(pool.and_then(|pool| pool.http.http2_max_requests)),
        max_retries: limit(pool.and_then(|pool| pool.http.max_retries)),
        track_remaining: true,
        retry_budget: budget.map(|budget| EnvoyBudget {
            budget_percent: budget.percent.map(|value| Percent { value }),
            min_retry_concurrency: budget.min_retry_concurrency.and_then(u32_value),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn balance(cluster: &mut Cluster, balancer: Option<&LoadBalancer>, kind: DiscoveryType) {
    if kind == DiscoveryType::OriginalDst {
        cluster.lb_policy = LbPolicy::ClusterProvided as i32;
        return;
    }
    let slow_start = balancer.and_then(slow_start);
    if let Some(hash) = balancer.and_then(|balancer| balancer.consistent_hash.as_ref()) {
        if let Some(maglev) = &hash.maglev {
            cluster.lb_policy = LbPolicy::Maglev as i32;
            cluster.lb_config = Some(LbConfig::MaglevLbConfig(MaglevLbConfig {
                table_size: maglev.table_size.map(|value| UInt64Value { value }),
            }));
        } else {
            let size = hash
                .ring_hash
                .as_ref()
                .and_then(|ring| ring.minimum_ring_size)
                .or(hash.minimum_ring_size);
            cluster.lb_policy = LbPolicy::RingHash as i32;
            cluster.lb_config = Some(LbConfig::RingHashLbConfig(RingHashLbConfig {
                // Envoy's largest ring.
                minimum_ring_size: Some(UInt64Value {
                    value: size.unwrap_or(1024).min(8_388_608),
                }),
                ..Default::default()
            }));
        }
        return;
    }
    match balancer
        .and_then(|balancer| balancer.simple)
        .unwrap_or_default()
    {
        SimpleBalancer::RoundRobin | SimpleBalancer::Passthrough => {
            cluster.lb_policy = LbPolicy::RoundRobin as i32;
            if slow_start.is_some() {
                cluster.lb_config = Some(LbConfig::RoundRobinLbConfig(RoundRobinLbConfig {
                    slow_start_config: slow_start,
                }));
            }
        }
        SimpleBalancer::Random => cluster.lb_policy = LbPolicy::Random as i32,
        SimpleBalancer::LeastRequest | SimpleBalancer::Unspecified => {
            cluster.lb_policy = LbPolicy::LeastRequest as i32;
            if slow_start.is_some() {
                cluster.lb_config = Some(LbConfig::LeastRequestLbConfig(LeastRequestLbConfig {
                    slow_start_config: slow_start,
                    ..Default::default()
                }));
            }
        }
    }
}

fn slow_start(balancer: &LoadBalancer) -> Option<SlowStartConfig> {
    let warmup = balancer.warmup.as_ref();
    let window = warmup
        .and_then(|warmup| warmup.duration)
        .or(balancer.warmup_duration_secs)?;
    Some(SlowStartConfig {
        slow_start_window: duration(window),
        aggression: warmup
            .and_then(|warmup| warmup.aggression)
            .map(|default_value| RuntimeDouble {
                default_value,
                // Envoy wants a name by which operators may change it.
                runtime_key: "upstream.slow_start.aggression".to_owned(),
            }),
        min_weight_percent: warmup
            .and_then(|warmup| warmup.minimum_percent)
            .map(|value| Percent { value }),
    })
}

fn connections(cluster: &mut Cluster, pool: &ConnectionPool) {
    if let Some(timeout) = pool.tcp.connect_timeout {
        cluster.connect_timeout = duration(timeout);
    }
    if let Some(keepalive) = &pool.tcp.tcp_keepalive {
        let seconds = |time: Option<lateen_config::Duration>| {
            time.and_then(|time| u32::try_from(time.0.as_secs()).ok())
                .and_then(u32_value)
        };
        cluster.upstream_connection_options = Some(UpstreamConnectionOptions {
            tcp_keepalive: Some(TcpKeepalive {
                keepalive_probes: if keepalive.probes > 0 {
                    u32_value(keepalive.probes)
                } else {
                    None
                },
                keepalive_time: seconds(keepalive.time),
                keepalive_interval: seconds(keepalive.interval),
            }),
            ..Default::default()
        });
    }
}

fn eject(cluster: &mut Cluster, outlier: &OutlierDetection) {
    let percent = |value: i32| if value > 0 { count(value) } else { None };
    let mut detection = EnvoyOutlier {
        interval: outlier.interval.and_then(duration),
        base_ejection_time: outlier.base_ejection_time.and_then(duration),
        max_ejection_percent: percent(outlier.max_ejection_percent),
        // Users name counts, not rates.
        enforcing_success_rate: u32_value(0),
        ..Default::default()
    };
    let gateway = outlier.consecutive_gateway_errors.or_else(|| {
        outlier
            .consecutive_errors
            .and_then(|count| u32::try_from(count).ok())
    });
    if let Some(errors) = gateway {
        detection.enforcing_consecutive_gateway_failure =
            u32_value(if errors > 0 { 100 } else { 0 });
        detection.consecutive_gateway_failure = if errors > 0 { u32_value(errors) } else { None };
        if outlier.consecutive_gateway_errors.is_none() {
            // The old field meant gateway errors only.
            detection.enforcing_consecutive_5xx = u32_value(0);
        }
    }
    if let Some(errors) = outlier.consecutive_5xx_errors {
        detection.enforcing_consecutive_5xx = u32_value(if errors > 0 { 100 } else { 0 });
        detection.consecutive_5xx = if errors > 0 { u32_value(errors) } else { None };
    }
    if outlier.split_external_local_origin_errors {
        detection.split_external_local_origin_errors = true;
        if let Some(failures) = outlier
            .consecutive_local_origin_failures
            .filter(|failures| *failures > 0)
        {
            detection.consecutive_local_origin_failure = u32_value(failures);
            detection.enforcing_consecutive_local_origin_failure = u32_value(100);
        }
        detection.enforcing_local_origin_success_rate = u32_value(0);
    }
    cluster.outlier_detection = Some(detection);
    // Hosts that were ejected are not used only because most are.
    let common = cluster.common_lb_config.get_or_insert_default();
    common.healthy_panic_threshold = Some(Percent {
        value: f64::from(outlier.min_health_percent.max(0)),
    });
}

fn is_http2(protocol: Protocol, pool: Option<&ConnectionPool>) -> bool {
    protocol.is_http2()
        || protocol.is_http() && pool.is_some_and(|pool| pool.http.h2_upgrade_policy == "UPGRADE")
}

fn downstream_protocol() -> HashMap<String, Any> {
    HashMap::from([(HTTP_OPTIONS.to_owned(), downstream_options())])
}

fn downstream_options() -> Any {
    any(&HttpProtocolOptions {
        upstream_protocol_options: Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(
            UseDownstreamHttpConfig {
                http_protocol_options: Some(Http1ProtocolOptions::default()),
                http2_protocol_options: Some(Http2ProtocolOptions::default()),
                ..Default::default()
            },
        )),
        ..Default::default()
    })
}

/// `None` for HTTP/1.1 with nothing to say, and for what is no HTTP.
fn protocol_options(protocol: Protocol, pool: Option<&ConnectionPool>, http2: bool) -> Option<Any> {
    let http = pool.map(|pool| &pool.http);
    let requests = http
        .and_then(|http| http.max_requests_per_connection)
        .filter(|limit| *limit > 0);
    let idle = http.and_then(|http| http.idle_timeout);
    let age = pool.and_then(|pool| pool.tcp.max_connection_duration);
    let common = (requests.is_some() || idle.is_some() || age.is_some()).then(|| CommonOptions {
        max_requests_per_connection: requests.and_then(count),
        idle_timeout: idle.and_then(duration),
        max_connection_duration: age.and_then(duration),
        ..Default::default()
    });
    let speaks_http = http2 || protocol.is_http() || protocol == Protocol::Unknown;
    if !speaks_http || (common.is_none() && !http2 && !protocol.is_http()) {
        return None;
    }
    let http2_options = Http2ProtocolOptions {
        max_concurrent_streams: http
            .and_then(|http| http.max_concurrent_streams)
            .filter(|limit| *limit > 0)
            .and_then(count),
        ..Default::default()
    };
    let upstream = if !http2 && http.is_some_and(|http| http.use_client_protocol) {
        UpstreamProtocolOptions::UseDownstreamProtocolConfig(UseDownstreamHttpConfig {
            http_protocol_options: Some(Http1ProtocolOptions::default()),
            http2_protocol_options: Some(http2_options),
            ..Default::default()
        })
    } else {
        UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(if http2 {
                ProtocolConfig::Http2ProtocolOptions(http2_options)
            } else {
                ProtocolConfig::HttpProtocolOptions(Http1ProtocolOptions::default())
            }),
        })
    };
    Some(any(&HttpProtocolOptions {
        common_http_protocol_options: common,
        upstream_protocol_options: Some(upstream),
        ..Default::default()
    }))
}

/// TLS: as a DestinationRule says; else mesh mTLS with every endpoint that takes it.
#[allow(
    clippy::too_many_arguments,
    reason = "all of what a cluster is made of"
)]
fn secure(
    scope: &Scope<'_>,
    cluster: &mut Cluster,
    service: &Service,
    port: &Port,
    rule: Option<&DestinationPolicy>,
    subset: &str,
    policy: &Policy<'_>,
    http2: bool,
) {
    let mesh = scope.snapshot.mesh();
    let is_mixer = mixer::is_server(mesh, &service.hostname, port.number);
    let mesh_socket = || {
        let sni = match policy.tls.map(|tls| tls.sni.as_str()) {
            None | Some("") => names::sni(port.number, subset, &service.hostname),
            Some(sni) => sni.to_owned(),
        };
        let listed = policy
            .tls
            .map(|tls| &tls.subject_alt_names)
            .filter(|names| !names.is_empty());
        let identities = match listed {
            Some(names) => names.clone(),
            None => identities(scope, service, port, rule, subset),
        };
        let alpn = if http2 {
            tls::MESH_HTTP2
        } else if port.protocol.is_http() {
            tls::MESH_HTTP1
        } else {
            tls::MESH_TCP
        };
        tls::mesh_client(&sni, &identities, scope.trust_domains(), alpn)
    };
    match policy.tls.map(|tls| (tls, tls.mode)) {
        Some((_, TlsMode::Disable)) => {}
        Some((_, TlsMode::IstioMutual)) => cluster.transport_socket = Some(mesh_socket()),
        Some((settings, TlsMode::Simple | TlsMode::Mutual)) => {
            cluster.transport_socket = tls::client(
                scope,
                settings,
                &service.hostname,
                &service.subject_alt_names,
                http2,
            );
        }
        // Mixer's own ports say by their number what they are.
        None if is_mixer && port.number == MIXER_PLAIN_PORT => {}
        None if is_mixer => cluster.transport_socket = Some(mesh_socket()),
        None if mesh.enable_auto_mtls && !service.external => {
            cluster.transport_socket_matches = vec![
                TransportSocketMatch {
                    name: "tlsMode-istio".to_owned(),
                    r#match: Some(structure([("tlsMode", text("istio"))])),
                    transport_socket: Some(mesh_socket()),
                },
                TransportSocketMatch {
                    name: "tlsMode-disabled".to_owned(),
                    r#match: Some(Struct::default()),
                    transport_socket: Some(tls::plain()),
                },
            ];
        }
        None => {}
    }
}

/// Who may answer for a service port: the identities of its endpoints.
fn identities(
    scope: &Scope<'_>,
    service: &Service,
    port: &Port,
    rule: Option<&DestinationPolicy>,
    subset: &str,
) -> Vec<String> {
    let labels = subset_labels(rule, subset);
    let mut all: BTreeSet<String> = service.subject_alt_names.iter().cloned().collect();
    all.extend(
        scope
            .snapshot
            .endpoints(&service.hostname, port.number)
            .iter()
            .filter(|endpoint| labels.is_none_or(|labels| selects(labels, &endpoint.labels)))
            .filter_map(|endpoint| endpoint.spiffe_id.clone()),
    );
    all.into_iter().collect()
}

fn inbound(scope: &Scope<'_>, resources: &mut Resources) {
    // Conflicts have been told with the listeners.
    for inbound in inbound::ports(scope, &mut Vec::new()).into_values() {
        let name = names::inbound(inbound.port);
        let application = match &inbound.application {
            Application::AsMeant => None,
            Application::At(address) => socket_address(&address.ip().to_string(), address.port()),
            Application::Pipe(path) => endpoint_address(&format!("unix://{path}"), 0),
        };
        let kind = match application {
            Some(_) => DiscoveryType::Static,
            None => DiscoveryType::OriginalDst,
        };
        let endpoint = application.map(|address| LocalityLbEndpoints {
            lb_endpoints: vec![LbEndpoint {
                host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
                    address: Some(address),
                    ..Default::default()
                })),
                ..Default::default()
            }],
            ..Default::default()
        });
        let options = match inbound.protocol {
            // As the client came: its protocol has been sniffed.
            Protocol::Unknown => Some(downstream_options()),
            protocol => protocol_options(protocol, None, protocol.is_http2()),
        };
        insert(
            resources,
            Cluster {
                cluster_discovery_type: Some(ClusterDiscoveryType::Type(kind as i32)),
                lb_policy: match kind {
                    DiscoveryType::OriginalDst => LbPolicy::ClusterProvided,
                    _ => LbPolicy::RoundRobin,
                } as i32,
                connect_timeout: duration(scope.snapshot.mesh().connect_timeout()),
                upstream_bind_config: endpoint.is_none().then(|| passthrough_source(scope)),
                load_assignment: endpoint.map(|endpoint| assignment(&name, vec![endpoint])),
                circuit_breakers: Some(CircuitBreakers {
                    thresholds: vec![thresholds(None, None)],
                    ..Default::default()
                }),
                typed_extension_protocol_options: options
                    .map(|options| HashMap::from([(HTTP_OPTIONS.to_owned(), options)]))
                    .unwrap_or_default(),
                name,
                ..Default::default()
            },
        );
    }
}
