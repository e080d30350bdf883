//! One call through a proxy's resources, by Envoy's rules: listener by address, filter chain by port, address,
//! name, transport and application protocol, virtual host by domain, route by match.
//!
//! Decides where a call ends up, not what is done to it: no filters, no load balancing.

use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::{
    CidrRange, SocketAddress, address::Address as AddressKind, socket_address::PortSpecifier,
};
use envoy_types::pb::envoy::config::listener::v3::{
    FilterChain, FilterChainMatch, Listener, ListenerFilterChainMatchPredicate, filter::ConfigType,
    listener_filter_chain_match_predicate::Rule,
};
use envoy_types::pb::envoy::config::route::v3::{
    HeaderMatcher, Route, RouteConfiguration, RouteMatch, VirtualHost,
    header_matcher::HeaderMatchSpecifier, query_parameter_matcher::QueryParameterMatchSpecifier,
    route::Action, route_action::ClusterSpecifier, route_match::PathSpecifier,
    virtual_host::TlsRequirementType,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, http_connection_manager::RouteSpecifier,
};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::{
    TcpProxy, tcp_proxy::ClusterSpecifier as TcpCluster,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::DownstreamTlsContext;
use envoy_types::pb::envoy::r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern};
use prost::{Message, Name};
use regex::Regex;
use serde::Deserialize;
use serde_json::Value;

use crate::translate::Resources;

/// Where a call goes that does not say.
const ANYWHERE: &str = "1.3.3.7";

/// A call, as rows write it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase", deny_unknown_fields)]
pub(super) struct Call {
    address: String,
    port: u16,
    path: String,
    /// `HTTP`, `HTTP2` or `TCP`.
    protocol: String,
    /// `Plaintext`, `TLS` or `MTLS`.
    #[serde(rename = "TLS")]
    tls: String,
    alpn: String,
    host_header: String,
    headers: std::collections::BTreeMap<String, Vec<String>>,
    sni: String,
    /// `CallModeInbound`, `CallModeOutbound`, `CallModeGateway`; without it, what the proxy is for.
    call_mode: String,
}

impl Call {
    fn is_http(&self) -> bool {
        self.protocol == "HTTP" || self.is_http2()
    }

    fn is_http2(&self) -> bool {
        self.protocol == "HTTP2"
    }

    fn is_plain(&self) -> bool {
        self.tls.is_empty() || self.tls == "Plaintext"
    }

    /// With what a client would send that says nothing else.
    fn complete(mut self) -> Self {
        if self.address.is_empty() {
            ANYWHERE.clone_into(&mut self.address);
        }
        if self.path.is_empty() {
            "/".clone_into(&mut self.path);
        }
        if self.host_header.is_empty()
            && let Some(host) = self.headers.get("Host").and_then(|all| all.first())
        {
            self.host_header.clone_from(host);
        }
        if self.is_plain() {
            return self;
        }
        if self.sni.is_empty() {
            self.sni.clone_from(&self.host_header);
        }
        if self.alpn.is_empty() {
            match (self.tls.as_str(), self.protocol.as_str()) {
                ("MTLS", "HTTP") => "istio-http/1.1",
                ("MTLS", "HTTP2") => "istio-h2",
                ("MTLS", _) => "istio",
                (_, "HTTP") => "http/1.1",
                (_, "HTTP2") => "h2",
                _ => "",
            }
            .clone_into(&mut self.alpn);
        }
        self
    }
}

/// Where a call ended up, or why nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    listener: String,
    filter_chain: String,
    virtual_host: String,
    route: String,
    route_config: String,
    cluster: String,
    error: Option<Failure>,
}

/// Why a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    Listener,
    FilterChain,
    Ambiguous,
    VirtualHost,
    Route,
    Redirect,
    Protocol,
    Tls,
    MutualTls,
}

impl Failure {
    fn name(self) -> &'static str {
        match self {
            Self::Listener => "ErrNoListener",
            Self::FilterChain => "ErrNoFilterChain",
            Self::Ambiguous => "ErrMultipleFilterChain",
            Self::VirtualHost => "ErrNoVirtualHost",
            Self::Route => "ErrNoRoute",
            Self::Redirect => "ErrTLSRedirect",
            Self::Protocol => "ErrProtocolError",
            Self::Tls => "ErrTLSError",
            Self::MutualTls => "ErrMTLSError",
        }
    }
}

impl Outcome {
    /// As rows expect it.
    pub(super) fn fields(&self) -> impl Iterator<Item = (String, Value)> {
        [
            ("ListenerMatched", self.listener.as_str()),
            ("FilterChainMatched", &self.filter_chain),
            ("VirtualHostMatched", &self.virtual_host),
            ("RouteMatched", &self.route),
            ("RouteConfigMatched", &self.route_config),
            ("ClusterMatched", &self.cluster),
            ("Error", self.error.map_or("", Failure::name)),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), Value::from(value)))
        .collect::<Vec<_>>()
        .into_iter()
    }
}

/// A proxy's resources to walk through.
#[derive(Debug)]
pub(super) struct Walk<'a> {
    resources: &'a Resources,
}

/// What listener filters found out about a connection.
struct Connection<'a> {
    address: Option<IpAddr>,
    port: u16,
    sni: &'a str,
    transport: &'static str,
    alpn: &'a str,
}

impl<'a> Walk<'a> {
    pub(super) fn new(resources: &'a Resources) -> Self {
        Self { resources }
    }

    pub(super) fn run(&self, call: Call) -> Outcome {
        let mut outcome = Outcome::default();
        if let Err(failure) = self.step(&call.complete(), &mut outcome) {
            outcome.error = Some(failure);
        }
        outcome
    }

    fn step(&self, call: &Call, outcome: &mut Outcome) -> Result<(), Failure> {
        let listener = self.listener(call).ok_or(Failure::Listener)?;
        outcome.listener.clone_from(&listener.name);

        let inspects_tls = has_filter(listener, "envoy.filters.listener.tls_inspector", call.port);
        let inspects_http =
            has_filter(listener, "envoy.filters.listener.http_inspector", call.port);
        let tls = !call.is_plain();
        let connection = Connection {
            address: call.address.parse().ok(),
            port: call.port,
            sni: if inspects_tls { &call.sni } else { "" },
            transport: if tls && inspects_tls {
                "tls"
            } else {
                "raw_buffer"
            },
            alpn: match (tls, call.protocol.as_str()) {
                (true, _) if inspects_tls => &call.alpn,
                (false, "HTTP") if inspects_http => "http/1.1",
                (false, "HTTP2") if inspects_http => "h2c",
                _ => "",
            },
        };
        let chain = filter_chain(listener, &connection)?;
        outcome.filter_chain.clone_from(&chain.name);
        let socket = chain
            .transport_socket
            .as_ref()
            .and_then(|socket| socket.config_type.as_ref())
            .and_then(|config| {
                use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType;
                let ConfigType::TypedConfig(any) = config;
                unpack::<DownstreamTlsContext>(any)
            });
        if let Some(context) = &socket {
            if !tls {
                return Err(Failure::Tls);
            }
            if is_mesh(context) != (call.tls == "MTLS") {
                return Err(Failure::MutualTls);
            }
        }
        for filter in &chain.filters {
            let Some(ConfigType::TypedConfig(any)) = &filter.config_type else {
                continue;
            };
            if let Some(manager) = unpack::<HttpConnectionManager>(any) {
                // Bytes of TLS that nobody ended, or no HTTP at all.
                if tls && socket.is_none() || !call.is_http() {
                    return Err(Failure::Protocol);
                }
                return self.request(&manager, call, outcome);
            }
            if let Some(proxy) = unpack::<TcpProxy>(any) {
                outcome.cluster = match proxy.cluster_specifier {
                    Some(TcpCluster::Cluster(name)) => name,
                    Some(TcpCluster::WeightedClusters(_)) | None => String::new(),
                };
            }
        }
        Ok(())
    }

    /// By exact address, else by port alone, else the one for everything that was redirected.
    fn listener(&self, call: &Call) -> Option<&'a Listener> {
        let all = || self.resources.listeners.values();
        if call.call_mode == "CallModeInbound" {
            return all().find(|listener| listener.name == "virtualInbound");
        }
        let wanted: Option<IpAddr> = call.address.parse().ok();
        let bound = |listener: &&Listener, fits: &dyn Fn(IpAddr) -> bool| {
            std::iter::once(&listener.address)
                .chain(
                    listener
                        .additional_addresses
                        .iter()
                        .map(|more| &more.address),
                )
                .filter_map(|address| socket_address(address.as_ref()?.address.as_ref()?))
                .any(|(ip, port)| port == u32::from(call.port) && fits(ip))
        };
        all()
            .find(|listener| bound(listener, &|ip| Some(ip) == wanted))
            .or_else(|| all().find(|listener| bound(listener, &|ip| ip.is_unspecified())))
            .or_else(|| {
                all().find(|listener| {
                    listener
                        .use_original_dst
                        .as_ref()
                        .is_some_and(|flag| flag.value)
                })
            })
    }

    fn request(
        &self,
        manager: &HttpConnectionManager,
        call: &Call,
        outcome: &mut Outcome,
    ) -> Result<(), Failure> {
        let config = match &manager.route_specifier {
            Some(RouteSpecifier::RouteConfig(config)) => Some(config),
            Some(RouteSpecifier::Rds(rds)) => {
                outcome.route_config.clone_from(&rds.route_config_name);
                self.resources.routes.get(&rds.route_config_name)
            }
            _ => None,
        };
        let host = config
            .and_then(|config| virtual_host(config, &call.host_header))
            .ok_or(Failure::VirtualHost)?;
        outcome.virtual_host.clone_from(&host.name);
        if host.require_tls == TlsRequirementType::All as i32 && call.is_plain() {
            return Err(Failure::Redirect);
        }
        let route = host
            .routes
            .iter()
            .find(|route| route_fits(route, call))
            .ok_or(Failure::Route)?;
        outcome.route.clone_from(&route.name);
        if let Some(Action::Route(action)) = &route.action
            && let Some(ClusterSpecifier::Cluster(name)) = &action.cluster_specifier
        {
            outcome.cluster.clone_from(name);
        }
        Ok(())
    }
}

fn unpack<M: Message + Name + Default>(any: &envoy_types::pb::google::protobuf::Any) -> Option<M> {
    let name = any.type_url.rsplit('/').next()?;
    (name == M::full_name())
        .then(|| M::decode(any.value.as_slice()).ok())
        .flatten()
}

fn socket_address(address: &AddressKind) -> Option<(IpAddr, u32)> {
    let AddressKind::SocketAddress(SocketAddress {
        address,
        port_specifier: Some(PortSpecifier::PortValue(port)),
        ..
    }) = address
    else {
        return None;
    };
    Some((address.parse().ok()?, *port))
}

/// Whether a listener filter runs for connections to a port.
fn has_filter(listener: &Listener, name: &str, port: u16) -> bool {
    listener.listener_filters.iter().any(|filter| {
        filter.name == name
            && !filter
                .filter_disabled
                .as_ref()
                .is_some_and(|predicate| disables(predicate, port))
    })
}

fn disables(predicate: &ListenerFilterChainMatchPredicate, port: u16) -> bool {
    match &predicate.rule {
        Some(Rule::OrMatch(set)) => set.rules.iter().any(|rule| disables(rule, port)),
        Some(Rule::AndMatch(set)) => set.rules.iter().all(|rule| disables(rule, port)),
        Some(Rule::NotMatch(rule)) => !disables(rule, port),
        Some(Rule::AnyMatch(any)) => *any,
        Some(Rule::DestinationPortRange(range)) => {
            (range.start..range.end).contains(&i32::from(port))
        }
        None => false,
    }
}

/// Whether a context asks for the mesh's own certificates of clients.
fn is_mesh(context: &DownstreamTlsContext) -> bool {
    context
        .require_client_certificate
        .as_ref()
        .is_some_and(|flag| flag.value)
        && context.common_tls_context.as_ref().is_some_and(|common| {
            common
                .tls_certificate_sds_secret_configs
                .iter()
                .any(|secret| secret.name == "default")
        })
}

/// How well a rule fits a connection: none if not at all, 0 if it says nothing.
type Criterion<'a> = &'a dyn Fn(&FilterChainMatch) -> Option<usize>;

/// Envoy: each criterion in turn keeps those that fit best; nobody goes back to an earlier one.
fn filter_chain<'a>(
    listener: &'a Listener,
    connection: &Connection<'_>,
) -> Result<&'a FilterChain, Failure> {
    let nothing = FilterChainMatch::default();
    let mut left: Vec<(&FilterChain, &FilterChainMatch)> = listener
        .filter_chains
        .iter()
        .map(|chain| (chain, chain.filter_chain_match.as_ref().unwrap_or(&nothing)))
        .collect();
    let criteria: [Criterion<'_>; 5] = [
        &|rule| match &rule.destination_port {
            None => Some(0),
            Some(port) => (port.value == u32::from(connection.port)).then_some(1),
        },
        &|rule| {
            if rule.prefix_ranges.is_empty() {
                return Some(0);
            }
            let address = connection.address?;
            rule.prefix_ranges
                .iter()
                .filter(|range| contains(range, address))
                .map(|range| {
                    1 + range
                        .prefix_len
                        .as_ref()
                        .map_or(0, |bits| bits.value as usize)
                })
                .max()
        },
        &|rule| server_name(&rule.server_names, connection.sni),
        &|rule| match rule.transport_protocol.as_str() {
            "" => Some(0),
            named => (named == connection.transport).then_some(1),
        },
        &|rule| {
            if rule.application_protocols.is_empty() {
                return Some(0);
            }
            rule.application_protocols
                .iter()
                .any(|protocol| protocol == connection.alpn)
                .then_some(1)
        },
    ];
    for criterion in criteria {
        let fits: Vec<Option<usize>> = left.iter().map(|(_, rule)| criterion(rule)).collect();
        let best = fits.iter().flatten().max().copied();
        left = left
            .into_iter()
            .zip(fits)
            .filter(|(_, fit)| fit.is_some() && *fit == best)
            .map(|(chain, _)| chain)
            .collect();
    }
    match left.as_slice() {
        [] => listener
            .default_filter_chain
            .as_ref()
            .ok_or(Failure::FilterChain),
        [(chain, _)] => Ok(chain),
        _ => Err(Failure::Ambiguous),
    }
}

fn contains(range: &CidrRange, address: IpAddr) -> bool {
    let bits = range.prefix_len.as_ref().map_or(0, |bits| bits.value);
    match (range.address_prefix.parse(), address) {
        (Ok(IpAddr::V4(prefix)), IpAddr::V4(address)) => {
            let shift = 32_u32.saturating_sub(bits);
            let cut = |ip: std::net::Ipv4Addr| u32::from(ip).checked_shr(shift).unwrap_or(0);
            cut(prefix) == cut(address)
        }
        (Ok(IpAddr::V6(prefix)), IpAddr::V6(address)) => {
            let shift = 128_u32.saturating_sub(bits);
            let cut = |ip: std::net::Ipv6Addr| u128::from(ip).checked_shr(shift).unwrap_or(0);
            cut(prefix) == cut(address)
        }
        _ => false,
    }
}

/// The exact name, else the longest `*.SUFFIX`.
fn server_name(names: &[String], sni: &str) -> Option<usize> {
    if names.is_empty() {
        return Some(0);
    }
    let sni = sni.to_ascii_lowercase();
    names
        .iter()
        .filter_map(|name| match name.strip_prefix('*') {
            Some(suffix) => {
                (sni.len() > suffix.len() && sni.ends_with(suffix)).then_some(1 + suffix.len())
            }
            None => (*name == sni).then_some(usize::MAX),
        })
        .max()
}

/// Envoy: the exact domain, else the longest `*SUFFIX`, else the longest `PREFIX*`, else `*`.
fn virtual_host<'a>(config: &'a RouteConfiguration, host: &str) -> Option<&'a VirtualHost> {
    let mut host = host.to_ascii_lowercase();
    if config.ignore_port_in_host_matching
        && let Some((name, port)) = host.rsplit_once(':')
        && port.bytes().all(|digit| digit.is_ascii_digit())
    {
        host = name.to_owned();
    }
    let rank = |domain: &str| -> Option<(u8, usize)> {
        let domain = domain.to_ascii_lowercase();
        if domain == host {
            Some((3, 0))
        } else if domain == "*" {
            Some((0, 0))
        } else if let Some(suffix) = domain.strip_prefix('*') {
            (host.len() > suffix.len() && host.ends_with(suffix)).then_some((2, suffix.len()))
        } else if let Some(prefix) = domain.strip_suffix('*') {
            (host.len() > prefix.len() && host.starts_with(prefix)).then_some((1, prefix.len()))
        } else {
            None
        }
    };
    config
        .virtual_hosts
        .iter()
        .flat_map(|host| host.domains.iter().map(move |domain| (host, domain)))
        .filter_map(|(host, domain)| Some((rank(domain)?, host)))
        // The first among equals, which Envoy would refuse.
        .rev()
        .max_by_key(|(rank, _)| *rank)
        .map(|(_, host)| host)
}

fn route_fits(route: &Route, call: &Call) -> bool {
    let Some(rule) = &route.r#match else {
        return false;
    };
    let (path, query) = call
        .path
        .split_once('?')
        .unwrap_or((call.path.as_str(), ""));
    path_fits(rule, path)
        && rule.headers.iter().all(|header| header_fits(header, call))
        && rule.query_parameters.iter().all(|wanted| {
            let value = query
                .split('&')
                .filter_map(|pair| pair.split_once('=').or(Some((pair, ""))))
                .find(|(name, _)| *name == wanted.name)
                .map(|(_, value)| value);
            match (&wanted.query_parameter_match_specifier, value) {
                (Some(QueryParameterMatchSpecifier::PresentMatch(present)), value) => {
                    value.is_some() == *present
                }
                (Some(QueryParameterMatchSpecifier::StringMatch(matcher)), Some(value)) => {
                    string_fits(matcher, value)
                }
                (None, value) => value.is_some(),
                (Some(_), None) => false,
            }
        })
}

fn path_fits(rule: &RouteMatch, path: &str) -> bool {
    let sensitive = rule.case_sensitive.as_ref().is_none_or(|flag| flag.value);
    let fold = |text: &str| {
        if sensitive {
            text.to_owned()
        } else {
            text.to_ascii_lowercase()
        }
    };
    match &rule.path_specifier {
        Some(PathSpecifier::Prefix(prefix)) => fold(path).starts_with(&fold(prefix)),
        Some(PathSpecifier::Path(exact)) => fold(path) == fold(exact),
        Some(PathSpecifier::SafeRegex(pattern)) => whole(&pattern.regex, path),
        Some(PathSpecifier::PathSeparatedPrefix(prefix)) => fold(path)
            .strip_prefix(&fold(prefix))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
        _ => false,
    }
}

fn header_fits(rule: &HeaderMatcher, call: &Call) -> bool {
    let value = match rule.name.as_str() {
        ":authority" => Some(call.host_header.clone()),
        ":path" => Some(call.path.clone()),
        ":method" => Some("GET".to_owned()),
        ":scheme" => Some(if call.is_plain() { "http" } else { "https" }.to_owned()),
        name => call
            .headers
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, values)| values.join(",")),
    };
    let fits = match (&rule.header_match_specifier, value) {
        (Some(HeaderMatchSpecifier::PresentMatch(present)), value) => value.is_some() == *present,
        (Some(HeaderMatchSpecifier::StringMatch(matcher)), Some(value)) => {
            string_fits(matcher, &value)
        }
        (None, value) => value.is_some(),
        (Some(_), None) => return rule.invert_match && !rule.treat_missing_header_as_empty,
        // Older forms, which translation does not write.
        (Some(_), Some(_)) => false,
    };
    fits != rule.invert_match
}

fn string_fits(matcher: &StringMatcher, value: &str) -> bool {
    let fold = |text: &str| {
        if matcher.ignore_case {
            text.to_ascii_lowercase()
        } else {
            text.to_owned()
        }
    };
    let value = fold(value);
    match &matcher.match_pattern {
        Some(MatchPattern::Exact(text)) => value == fold(text),
        Some(MatchPattern::Prefix(text)) => value.starts_with(&fold(text)),
        Some(MatchPattern::Suffix(text)) => value.ends_with(&fold(text)),
        Some(MatchPattern::Contains(text)) => value.contains(&fold(text)),
        Some(MatchPattern::SafeRegex(pattern)) => whole(&pattern.regex, &value),
        _ => false,
    }
}

/// Whether a pattern takes all of a text. Envoy's RE2 and ours differ in nothing that is allowed there.
fn whole(pattern: &str, text: &str) -> bool {
    Regex::new(&format!("^(?:{pattern})$")).is_ok_and(|regex| regex.is_match(text))
}
