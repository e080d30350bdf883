//! `networking.istio.io`: v1, v1beta1 and v1alpha3 alike.

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use crate::object::Labels;
use crate::value::{Duration, Percent, StringMatch, WorkloadSelector};

/// Names as a list, or as the keys of a map, as the API of old had it.
fn names<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<IndexMap<String, String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Names {
        List(Vec<String>),
        Map(IndexMap<String, String>),
    }
    Ok(match Names::deserialize(deserializer)? {
        Names::List(all) => all.into_iter().map(|name| (name, String::new())).collect(),
        Names::Map(all) => all,
    })
}

macro_rules! kinds {
    ($( $(#[$meta:meta])* $name:ident { $( $(#[$field_meta:meta])* $field:ident : $type:ty, )* } )*) => {$(
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
        pub struct $name { $( $(#[$field_meta])* pub $field: $type, )* }
    )*};
}

kinds! {
    /// Where requests for some hosts go.
    VirtualService {
        /// Hosts it is for; empty in a delegate.
        hosts: Vec<String>,
        /// Gateways it is bound to; empty: `mesh`.
        gateways: Vec<String>,
        /// Ordered HTTP routes.
        http: Vec<HttpRoute>,
        /// Ordered routes by SNI.
        tls: Vec<TlsRoute>,
        /// Ordered TCP routes.
        tcp: Vec<TcpRoute>,
        /// Namespaces that see it.
        #[serde(alias = "export_to")] export_to: Vec<String>,
    }

    /// One HTTP route.
    HttpRoute {
        /// Name, for logs and statistics.
        name: String,
        /// Any of them; empty: every request.
        #[serde(rename = "match")] matches: Vec<HttpMatch>,
        /// Weighted destinations.
        route: Vec<HttpDestination>,
        /// Answer with a redirect.
        redirect: Option<HttpRedirect>,
        /// Answer at once.
        #[serde(alias = "direct_response")] direct_response: Option<DirectResponse>,
        /// Continue in another VirtualService.
        delegate: Option<Delegate>,
        /// Rewrite path or authority.
        rewrite: Option<HttpRewrite>,
        /// For the whole exchange; unset or zero: none.
        timeout: Option<Duration>,
        /// Retry policy.
        retries: Option<HttpRetry>,
        /// Faults to inject.
        fault: Option<HttpFault>,
        /// Shadow traffic.
        mirror: Option<Destination>,
        /// Shadow traffic to several.
        mirrors: Vec<HttpMirror>,
        /// Share of requests mirrored; unset: all.
        #[serde(alias = "mirror_percentage")] mirror_percentage: Option<Percent>,
        /// The same in whole percent (old).
        #[serde(alias = "mirror_percent")] mirror_percent: Option<u32>,
        /// CORS.
        #[serde(alias = "cors_policy")] cors_policy: Option<CorsPolicy>,
        /// Header operations.
        headers: Headers,
        /// Old: append to requests.
        #[serde(alias = "append_headers")] append_headers: IndexMap<String, String>,
        /// Old: append to requests.
        #[serde(alias = "append_request_headers")] append_request_headers: IndexMap<String, String>,
        /// Old: remove from requests.
        #[serde(alias = "remove_request_headers", deserialize_with = "names")] remove_request_headers: IndexMap<String, String>,
        /// Old: append to responses.
        #[serde(alias = "append_response_headers")] append_response_headers: IndexMap<String, String>,
        /// Old: remove from responses.
        #[serde(alias = "remove_response_headers", deserialize_with = "names")] remove_response_headers: IndexMap<String, String>,
        /// Old, without effect: WebSocket always works.
        #[serde(alias = "websocket_upgrade")] websocket_upgrade: Option<bool>,
    }

    /// What a request must look like; all fields that are set.
    HttpMatch {
        /// Name, for logs and statistics.
        name: String,
        /// Path (with query for a regex on it, as Envoy does not: path only).
        uri: Option<StringMatch>,
        /// Scheme.
        scheme: Option<StringMatch>,
        /// Method.
        method: Option<StringMatch>,
        /// Host.
        authority: Option<StringMatch>,
        /// Headers that must match.
        headers: BTreeMap<String, StringMatch>,
        /// Headers that must not.
        #[serde(alias = "without_headers")] without_headers: BTreeMap<String, StringMatch>,
        /// Query parameters.
        #[serde(alias = "query_params")] query_params: BTreeMap<String, StringMatch>,
        /// Compare exact and prefix paths without case.
        #[serde(alias = "ignore_uri_case")] ignore_uri_case: bool,
        /// Port the host is addressed on.
        port: u32,
        /// Labels of the client.
        #[serde(alias = "source_labels")] source_labels: Labels,
        /// Namespace of the client.
        #[serde(alias = "source_namespace")] source_namespace: String,
        /// Gateways this is for; empty: those of the VirtualService.
        gateways: Vec<String>,
        /// Prefix of statistics.
        #[serde(alias = "stat_prefix")] stat_prefix: String,
    }

    /// A weighted HTTP destination.
    HttpDestination {
        /// Where.
        destination: Destination,
        /// Share; with one destination 0 means all.
        weight: i32,
        /// Header operations for this destination.
        headers: Headers,
        /// Old: append to requests.
        #[serde(alias = "append_request_headers")] append_request_headers: IndexMap<String, String>,
        /// Old: remove from requests.
        #[serde(alias = "remove_request_headers", deserialize_with = "names")] remove_request_headers: IndexMap<String, String>,
        /// Old: append to responses.
        #[serde(alias = "append_response_headers")] append_response_headers: IndexMap<String, String>,
        /// Old: remove from responses.
        #[serde(alias = "remove_response_headers", deserialize_with = "names")] remove_response_headers: IndexMap<String, String>,
    }

    /// A service, possibly a subset and port of it.
    Destination {
        /// Host; short names are completed with the object's namespace.
        host: String,
        /// Subset a DestinationRule names.
        subset: String,
        /// Port; needless if the service has one.
        port: Option<PortSelector>,
    }

    /// A port by number.
    PortSelector {
        /// Number.
        number: u32,
    }

    /// Header operations on requests and responses.
    Headers {
        /// To the upstream.
        request: HeaderOperations,
        /// To the downstream.
        response: HeaderOperations,
    }

    /// Header operations; names keep the order written.
    HeaderOperations {
        /// Overwrite.
        set: IndexMap<String, String>,
        /// Append.
        add: IndexMap<String, String>,
        /// Remove.
        remove: Vec<String>,
    }

    /// A redirect.
    HttpRedirect {
        /// New path.
        uri: String,
        /// New host.
        authority: String,
        /// New port.
        port: Option<u32>,
        /// New port, derived.
        #[serde(alias = "derive_port")] derive_port: Option<DerivePort>,
        /// New scheme.
        scheme: String,
        /// 301 unless set.
        #[serde(alias = "redirect_code")] redirect_code: u32,
    }

    /// An answer without upstream.
    DirectResponse {
        /// Status.
        status: u32,
        /// Body.
        body: Option<DirectBody>,
    }

    /// The body of a direct response.
    DirectBody {
        /// Text.
        string: Option<String>,
        /// Base64 of anything.
        bytes: Option<String>,
    }

    /// Another VirtualService to continue in.
    Delegate {
        /// Name.
        name: String,
        /// Namespace; empty: the root's.
        namespace: String,
    }

    /// Path and host rewriting.
    HttpRewrite {
        /// Replaces the matched prefix, or the path.
        uri: String,
        /// Replaces the host.
        authority: String,
        /// Replaces what a regex matches.
        #[serde(alias = "uri_regex_rewrite")] uri_regex_rewrite: Option<RegexRewrite>,
    }

    /// Replace by expression.
    RegexRewrite {
        /// RE2 expression.
        #[serde(rename = "match")] pattern: String,
        /// Substitution, `\1` for groups.
        rewrite: String,
    }

    /// Retry policy.
    HttpRetry {
        /// Retries; 0 switches off.
        attempts: i32,
        /// For one try.
        #[serde(alias = "per_try_timeout")] per_try_timeout: Option<Duration>,
        /// Envoy's conditions, comma separated, and status codes.
        #[serde(alias = "retry_on")] retry_on: String,
        /// Also in other localities.
        #[serde(alias = "retry_remote_localities")] retry_remote_localities: Option<bool>,
        /// Avoid hosts already tried; unset: yes.
        #[serde(alias = "retry_ignore_previous_hosts")] retry_ignore_previous_hosts: Option<bool>,
        /// Base interval.
        backoff: Option<Duration>,
    }

    /// Faults.
    HttpFault {
        /// Wait.
        delay: Option<Delay>,
        /// Fail.
        abort: Option<Abort>,
    }

    /// An injected delay.
    Delay {
        /// How long.
        #[serde(alias = "fixed_delay")] fixed_delay: Option<Duration>,
        /// Old, never implemented.
        #[serde(alias = "exponential_delay")] exponential_delay: Option<Duration>,
        /// Share; unset: all.
        percentage: Option<Percent>,
        /// Old: in whole percent.
        percent: Option<i32>,
    }

    /// An injected failure.
    Abort {
        /// HTTP status.
        #[serde(alias = "http_status")] http_status: Option<i32>,
        /// gRPC status by name or number.
        #[serde(alias = "grpc_status")] grpc_status: Option<String>,
        /// Old, never implemented.
        #[serde(alias = "http2_error")] http2_error: Option<String>,
        /// Share; unset: all.
        percentage: Option<Percent>,
        /// Old: in whole percent.
        percent: Option<i32>,
    }

    /// One of several mirrors.
    HttpMirror {
        /// Where.
        destination: Destination,
        /// Share; unset: all.
        percentage: Option<Percent>,
    }

    /// Cross-origin resource sharing.
    CorsPolicy {
        /// Origins allowed.
        #[serde(alias = "allow_origins")] allow_origins: Vec<StringMatch>,
        /// Old: exact origins, or `*`.
        #[serde(alias = "allow_origin")] allow_origin: Vec<String>,
        /// Methods.
        #[serde(alias = "allow_methods")] allow_methods: Vec<String>,
        /// Request headers.
        #[serde(alias = "allow_headers")] allow_headers: Vec<String>,
        /// Response headers scripts may read.
        #[serde(alias = "expose_headers")] expose_headers: Vec<String>,
        /// How long a preflight answer holds.
        #[serde(alias = "max_age")] max_age: Option<Duration>,
        /// Cookies and the like.
        #[serde(alias = "allow_credentials")] allow_credentials: Option<bool>,
        /// `FORWARD` or `IGNORE`.
        #[serde(alias = "unmatched_preflights")] unmatched_preflights: String,
    }

    /// A route by SNI.
    TlsRoute {
        /// Any of them.
        #[serde(rename = "match")] matches: Vec<TlsMatch>,
        /// Weighted destinations.
        route: Vec<TcpDestination>,
    }

    /// What a TLS connection must look like.
    TlsMatch {
        /// SNI, any of them.
        #[serde(alias = "sni_hosts")] sni_hosts: Vec<String>,
        /// Destination CIDRs.
        #[serde(alias = "destination_subnets")] destination_subnets: Vec<String>,
        /// Destination port.
        port: u32,
        /// Labels of the client.
        #[serde(alias = "source_labels")] source_labels: Labels,
        /// Namespace of the client.
        #[serde(alias = "source_namespace")] source_namespace: String,
        /// Old: client CIDR.
        #[serde(alias = "source_subnet")] source_subnet: String,
        /// Gateways this is for.
        gateways: Vec<String>,
    }

    /// A TCP route.
    TcpRoute {
        /// Any of them; empty: every connection.
        #[serde(rename = "match")] matches: Vec<TcpMatch>,
        /// Weighted destinations.
        route: Vec<TcpDestination>,
    }

    /// What a TCP connection must look like.
    TcpMatch {
        /// Destination CIDRs.
        #[serde(alias = "destination_subnets")] destination_subnets: Vec<String>,
        /// Destination port.
        port: u32,
        /// Client CIDR.
        #[serde(alias = "source_subnet")] source_subnet: String,
        /// Labels of the client.
        #[serde(alias = "source_labels")] source_labels: Labels,
        /// Namespace of the client.
        #[serde(alias = "source_namespace")] source_namespace: String,
        /// Gateways this is for.
        gateways: Vec<String>,
    }

    /// A weighted TCP destination.
    TcpDestination {
        /// Where.
        destination: Destination,
        /// Share; with one destination 0 means all.
        weight: i32,
    }

    /// What to do on the way to a host, and its subsets.
    DestinationRule {
        /// The host.
        host: String,
        /// For all of it.
        #[serde(alias = "traffic_policy")] traffic_policy: Option<TrafficPolicy>,
        /// Named parts of its endpoints.
        subsets: Vec<Subset>,
        /// Namespaces that see it.
        #[serde(alias = "export_to")] export_to: Vec<String>,
        /// Clients it is for.
        #[serde(alias = "workload_selector")] workload_selector: Option<WorkloadSelector>,
    }

    /// A named part of a host's endpoints.
    Subset {
        /// Name.
        name: String,
        /// Labels of its endpoints.
        labels: Labels,
        /// Overrides the host's, field by field.
        #[serde(alias = "traffic_policy")] traffic_policy: Option<TrafficPolicy>,
    }

    /// How to talk to a destination.
    TrafficPolicy {
        /// Load balancing.
        #[serde(alias = "load_balancer")] load_balancer: Option<LoadBalancer>,
        /// Limits.
        #[serde(alias = "connection_pool")] connection_pool: Option<ConnectionPool>,
        /// Ejection.
        #[serde(alias = "outlier_detection")] outlier_detection: Option<OutlierDetection>,
        /// TLS.
        tls: Option<ClientTls>,
        /// By port; replace, do not merge.
        #[serde(alias = "port_level_settings")] port_level_settings: Vec<PortTrafficPolicy>,
        /// Tunnel; not supported yet.
        tunnel: Option<serde_json::Value>,
        /// PROXY protocol; not supported yet.
        #[serde(alias = "proxy_protocol")] proxy_protocol: Option<serde_json::Value>,
        /// Retries at a time, as a share of the requests.
        #[serde(alias = "retry_budget")] retry_budget: Option<RetryBudget>,
    }

    /// The policy of one port.
    PortTrafficPolicy {
        /// The port.
        port: Option<PortSelector>,
        /// Load balancing.
        #[serde(alias = "load_balancer")] load_balancer: Option<LoadBalancer>,
        /// Limits.
        #[serde(alias = "connection_pool")] connection_pool: Option<ConnectionPool>,
        /// Ejection.
        #[serde(alias = "outlier_detection")] outlier_detection: Option<OutlierDetection>,
        /// TLS.
        tls: Option<ClientTls>,
    }

    /// Load balancing.
    LoadBalancer {
        /// A simple policy.
        simple: Option<SimpleBalancer>,
        /// By hash.
        #[serde(alias = "consistent_hash")] consistent_hash: Option<ConsistentHash>,
        /// Localities; instead of the mesh's settings.
        #[serde(alias = "locality_lb_setting")] locality_lb_setting: Option<LocalityBalancing>,
        /// Slow start.
        #[serde(alias = "warmup_duration_secs")] warmup_duration_secs: Option<Duration>,
        /// Slow start, newer form.
        warmup: Option<Warmup>,
    }

    /// Slow start: a new endpoint's share of traffic grows.
    Warmup {
        /// For so long.
        duration: Option<Duration>,
        /// From this percentage; unset: 10.
        #[serde(alias = "minimum_percent")] minimum_percent: Option<f64>,
        /// 1: in step with time; above: faster at first.
        aggression: Option<f64>,
    }

    /// Retries at a time, as a share of the requests under way.
    RetryBudget {
        /// Percent; unset: 20.
        percent: Option<f64>,
        /// At least so many; unset: 3.
        #[serde(alias = "min_retry_concurrency")] min_retry_concurrency: Option<u32>,
    }

    /// Which localities traffic goes to.
    LocalityBalancing {
        /// Shares of localities, by the client's.
        distribute: Vec<LocalityShares>,
        /// Where to when a region fails.
        failover: Vec<LocalityFailover>,
        /// Labels that endpoints should have in common with the client, the most important first; `LABEL=VALUE` stands
        /// for a client that has that value.
        #[serde(alias = "failover_priority")] failover_priority: Vec<String>,
        /// `false`: localities do not matter.
        enabled: Option<bool>,
    }

    /// Shares of localities for clients in one.
    LocalityShares {
        /// Where the client is: `REGION[/ZONE[/SUBZONE]]`, `*` for any.
        from: String,
        /// Percentage of each locality.
        to: BTreeMap<String, u32>,
    }

    /// The region that helps another one.
    LocalityFailover {
        /// The client's.
        from: String,
        /// Where its requests go when endpoints there fail.
        to: String,
    }

    /// Balancing by hash.
    ConsistentHash {
        /// Of a header.
        #[serde(alias = "http_header_name")] http_header_name: Option<String>,
        /// Of a cookie, set if absent.
        #[serde(alias = "http_cookie")] http_cookie: Option<HttpCookie>,
        /// Of the client's address.
        #[serde(alias = "use_source_ip")] use_source_ip: Option<bool>,
        /// Of a query parameter.
        #[serde(alias = "http_query_parameter_name")] http_query_parameter_name: Option<String>,
        /// Ring hash.
        #[serde(alias = "ring_hash")] ring_hash: Option<RingHash>,
        /// Maglev.
        maglev: Option<Maglev>,
        /// Old: smallest ring.
        #[serde(alias = "minimum_ring_size")] minimum_ring_size: Option<u64>,
    }

    /// Ring hash parameters.
    RingHash {
        /// Smallest ring.
        #[serde(alias = "minimum_ring_size")] minimum_ring_size: Option<u64>,
    }

    /// Maglev parameters.
    Maglev {
        /// A prime.
        #[serde(alias = "table_size")] table_size: Option<u64>,
    }

    /// A cookie to hash.
    HttpCookie {
        /// Name.
        name: String,
        /// Path.
        path: String,
        /// Life; 0: session.
        ttl: Option<Duration>,
        /// Further attributes.
        attributes: Vec<serde_json::Value>,
    }

    /// Limits of connections and requests.
    ConnectionPool {
        /// Connections.
        tcp: TcpPool,
        /// Requests.
        http: HttpPool,
    }

    /// Limits of connections.
    TcpPool {
        /// Connections to all hosts of the cluster.
        #[serde(alias = "max_connections")] max_connections: Option<i32>,
        /// To connect within.
        #[serde(alias = "connect_timeout")] connect_timeout: Option<Duration>,
        /// Keepalive probes.
        #[serde(alias = "tcp_keepalive")] tcp_keepalive: Option<TcpKeepalive>,
        /// Longest life.
        #[serde(alias = "max_connection_duration")] max_connection_duration: Option<Duration>,
        /// Idle TCP connections end after this.
        #[serde(alias = "idle_timeout")] idle_timeout: Option<Duration>,
    }

    /// Keepalive probes.
    TcpKeepalive {
        /// Number of probes.
        probes: u32,
        /// Idle time before the first.
        time: Option<Duration>,
        /// Between probes.
        interval: Option<Duration>,
    }

    /// Limits of requests.
    HttpPool {
        /// Requests waiting for a connection.
        #[serde(alias = "http1_max_pending_requests")] http1_max_pending_requests: Option<i32>,
        /// Requests to all hosts of the cluster.
        #[serde(alias = "http2_max_requests")] http2_max_requests: Option<i32>,
        /// Requests of one connection.
        #[serde(alias = "max_requests_per_connection")] max_requests_per_connection: Option<i32>,
        /// Retries at a time.
        #[serde(alias = "max_retries")] max_retries: Option<i32>,
        /// Idle connections end after this.
        #[serde(alias = "idle_timeout")] idle_timeout: Option<Duration>,
        /// `DEFAULT`, `DO_NOT_UPGRADE`, `UPGRADE`.
        #[serde(alias = "h2_upgrade_policy")] h2_upgrade_policy: String,
        /// Speak upstream what the client speaks.
        #[serde(alias = "use_client_protocol")] use_client_protocol: bool,
        /// HTTP/2 streams of one connection.
        #[serde(alias = "max_concurrent_streams")] max_concurrent_streams: Option<i32>,
    }

    /// Ejection of bad hosts.
    OutlierDetection {
        /// Old: consecutive gateway errors.
        #[serde(alias = "consecutive_errors")] consecutive_errors: Option<i32>,
        /// 5xx in a row.
        #[serde(rename = "consecutive5xxErrors", alias = "consecutive_5xx_errors")] consecutive_5xx_errors: Option<u32>,
        /// 502, 503, 504 in a row.
        #[serde(alias = "consecutive_gateway_errors")] consecutive_gateway_errors: Option<u32>,
        /// Local failures in a row.
        #[serde(alias = "consecutive_local_origin_failures")] consecutive_local_origin_failures: Option<u32>,
        /// Count local failures apart.
        #[serde(alias = "split_external_local_origin_errors")] split_external_local_origin_errors: bool,
        /// Between sweeps.
        interval: Option<Duration>,
        /// Out for this times the number of ejections.
        #[serde(alias = "base_ejection_time")] base_ejection_time: Option<Duration>,
        /// Most hosts out, in percent.
        #[serde(alias = "max_ejection_percent")] max_ejection_percent: i32,
        /// Below this share of healthy hosts, all are used.
        #[serde(alias = "min_health_percent")] min_health_percent: i32,
    }

    /// TLS towards a destination.
    ClientTls {
        /// Mode.
        mode: TlsMode,
        /// Path.
        #[serde(alias = "client_certificate")] client_certificate: String,
        /// Path.
        #[serde(alias = "private_key")] private_key: String,
        /// Path.
        #[serde(alias = "ca_certificates")] ca_certificates: String,
        /// Path.
        #[serde(alias = "ca_crl")] ca_crl: String,
        /// Secret.
        #[serde(alias = "credential_name")] credential_name: String,
        /// Names accepted.
        #[serde(alias = "subject_alt_names")] subject_alt_names: Vec<String>,
        /// SNI to send.
        sni: String,
        /// Do not verify.
        #[serde(alias = "insecure_skip_verify")] insecure_skip_verify: Option<bool>,
    }

    /// Ports a gateway opens.
    Gateway {
        /// Its servers.
        servers: Vec<Server>,
        /// Gateway workloads; empty: all.
        selector: Labels,
    }

    /// One port of a gateway.
    Server {
        /// The port.
        port: Option<GatewayPort>,
        /// Address to bind.
        bind: String,
        /// `[NAMESPACE/]HOST`.
        hosts: Vec<String>,
        /// TLS.
        tls: Option<ServerTls>,
        /// Name.
        name: String,
        /// Old, without effect.
        #[serde(alias = "default_endpoint")] default_endpoint: String,
    }

    /// A gateway's port.
    GatewayPort {
        /// Number.
        number: u32,
        /// Protocol.
        protocol: String,
        /// Name.
        name: String,
        /// Old, without effect.
        #[serde(alias = "target_port")] target_port: u32,
    }

    /// TLS towards clients.
    ServerTls {
        /// Answer plain HTTP with 301.
        #[serde(alias = "https_redirect")] https_redirect: bool,
        /// Mode.
        mode: String,
        /// Path.
        #[serde(alias = "server_certificate")] server_certificate: String,
        /// Path.
        #[serde(alias = "private_key")] private_key: String,
        /// Path.
        #[serde(alias = "ca_certificates")] ca_certificates: String,
        /// Path.
        #[serde(alias = "ca_crl")] ca_crl: String,
        /// Secret.
        #[serde(alias = "credential_name")] credential_name: String,
        /// Secrets.
        #[serde(alias = "credential_names")] credential_names: Vec<String>,
        /// Secret with the CA.
        #[serde(alias = "ca_cert_credential_name")] ca_cert_credential_name: String,
        /// Paths.
        #[serde(alias = "tls_certificates")] tls_certificates: Vec<serde_json::Value>,
        /// Client names accepted.
        #[serde(alias = "subject_alt_names")] subject_alt_names: Vec<String>,
        /// Client keys accepted.
        #[serde(alias = "verify_certificate_spki")] verify_certificate_spki: Vec<String>,
        /// Client certificates accepted.
        #[serde(alias = "verify_certificate_hash")] verify_certificate_hash: Vec<String>,
        /// Lowest version.
        #[serde(alias = "min_protocol_version")] min_protocol_version: String,
        /// Highest version.
        #[serde(alias = "max_protocol_version")] max_protocol_version: String,
        /// Ciphers.
        #[serde(alias = "cipher_suites")] cipher_suites: Vec<String>,
    }

    /// A service outside of the registry.
    ServiceEntry {
        /// Hosts.
        hosts: Vec<String>,
        /// Virtual addresses or CIDRs.
        addresses: Vec<String>,
        /// Ports.
        ports: Vec<ServicePort>,
        /// Inside or outside of the mesh.
        location: Location,
        /// How endpoints are found.
        resolution: Resolution,
        /// Endpoints.
        endpoints: Vec<WorkloadEntry>,
        /// Endpoints by label.
        #[serde(alias = "workload_selector")] workload_selector: Option<WorkloadSelector>,
        /// Namespaces that see it.
        #[serde(alias = "export_to")] export_to: Vec<String>,
        /// Names the endpoints present.
        #[serde(alias = "subject_alt_names")] subject_alt_names: Vec<String>,
    }

    /// A port of a ServiceEntry.
    ServicePort {
        /// Number.
        number: u32,
        /// Protocol.
        protocol: String,
        /// Name.
        name: String,
        /// Port on endpoints; 0: the same.
        #[serde(alias = "target_port")] target_port: u32,
    }

    /// A workload that is no pod.
    WorkloadEntry {
        /// IP, DNS name or `unix:///path`.
        address: String,
        /// Port name to number.
        ports: BTreeMap<String, u32>,
        /// Labels.
        labels: Labels,
        /// Network.
        network: String,
        /// `region/zone/subzone`.
        locality: String,
        /// Load-balancing weight.
        weight: u32,
        /// Service account.
        #[serde(alias = "service_account")] service_account: String,
    }

    /// What a sidecar sees and serves.
    Sidecar {
        /// Workloads it is for.
        #[serde(alias = "workload_selector")] workload_selector: Option<WorkloadSelector>,
        /// Inbound listeners, instead of those of services.
        ingress: Vec<IngressListener>,
        /// Hosts that are visible.
        egress: Vec<EgressListener>,
        /// Unknown destinations.
        #[serde(alias = "outbound_traffic_policy")] outbound_traffic_policy: Option<OutboundTrafficPolicy>,
        /// Inbound limits; not supported yet.
        #[serde(alias = "inbound_connection_pool")] inbound_connection_pool: Option<serde_json::Value>,
        /// Localhost; not supported yet.
        localhost: Option<serde_json::Value>,
    }

    /// A port of the workload.
    IngressListener {
        /// The port.
        port: Option<GatewayPort>,
        /// Address; not supported yet.
        bind: String,
        /// Capture; not supported yet.
        #[serde(alias = "capture_mode")] capture_mode: String,
        /// Where the application listens: `IP:PORT` or `unix:///PATH`; empty: the same port.
        #[serde(alias = "default_endpoint")] default_endpoint: String,
        /// TLS of its own; not supported yet.
        tls: Option<serde_json::Value>,
        /// Limits; not supported yet.
        #[serde(alias = "connection_pool")] connection_pool: Option<serde_json::Value>,
    }

    /// Hosts visible to a sidecar.
    EgressListener {
        /// Port; not supported yet.
        port: Option<GatewayPort>,
        /// Address; not supported yet.
        bind: String,
        /// Capture; not supported yet.
        #[serde(alias = "capture_mode")] capture_mode: String,
        /// `NAMESPACE/HOST`.
        hosts: Vec<String>,
    }

    /// What becomes of traffic to unknown destinations.
    OutboundTrafficPolicy {
        /// Mode.
        mode: OutboundMode,
        /// Where to send it instead; not supported yet.
        #[serde(alias = "egress_proxy")] egress_proxy: Option<Destination>,
    }
}

impl Server {
    /// The port's number, 0 without one.
    #[must_use]
    pub fn port_number(&self) -> u32 {
        self.port.as_ref().map_or(0, |port| port.number)
    }
}

impl Destination {
    /// The port's number, if one is named.
    #[must_use]
    pub fn port_number(&self) -> Option<u16> {
        self.port
            .as_ref()
            .and_then(|port| u16::try_from(port.number).ok())
            .filter(|number| *number != 0)
    }
}

/// Which port a redirect names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum DerivePort {
    /// 80 or 443, by scheme.
    #[default]
    FromProtocolDefault,
    /// The one the request came to.
    FromRequestPort,
}

/// A load balancing policy without parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum SimpleBalancer {
    /// The default.
    #[default]
    Unspecified,
    /// In turn.
    RoundRobin,
    /// The less busy of two.
    #[serde(alias = "LEAST_CONN")]
    LeastRequest,
    /// By chance.
    Random,
    /// Where the client connected to.
    Passthrough,
}

/// TLS towards a destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TlsMode {
    /// None.
    #[default]
    Disable,
    /// Server verified.
    Simple,
    /// With a client certificate from files.
    Mutual,
    /// With the mesh's certificates.
    IstioMutual,
}

/// Whether a ServiceEntry is part of the mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Location {
    /// Outside.
    #[default]
    MeshExternal,
    /// Inside.
    MeshInternal,
}

/// How the endpoints of a ServiceEntry are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Resolution {
    /// The address dialled.
    #[default]
    None,
    /// Listed.
    Static,
    /// DNS, all addresses.
    Dns,
    /// DNS, one address.
    DnsRoundRobin,
    /// DNS of a wildcard's concrete name.
    DynamicDns,
}

/// What becomes of traffic to unknown destinations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum OutboundMode {
    /// Refused.
    RegistryOnly,
    /// Passed on.
    #[default]
    AllowAny,
}
