//! Filter chains: which one a connection takes, and what a chain does with it: TLS, then network filters.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use lateen_protocols::envoy::{
    envoy::{
        config::{core::v3::TrafficDirection, listener::v3 as proto},
        extensions::{
            filters::network::{
                connection_limit::v3::ConnectionLimit as LimitProto,
                direct_response::v3::Config as AnswerProto, echo::v3::Echo as EchoProto,
                http_connection_manager::v3::HttpConnectionManager as ManagerProto,
                local_ratelimit::v3::LocalRateLimit as RateProto, rbac::v3::Rbac as RbacProto,
                sni_cluster::v3::SniCluster as SniClusterProto,
                tcp_proxy::v3::TcpProxy as TcpProto,
            },
            transport_sockets::{raw_buffer::v3::RawBuffer, tls::v3::DownstreamTlsContext},
        },
    },
    google::protobuf as pb,
};
use lateen_protocols::istio::mixer::v1::config::client::TcpClientConfig;
use proto::filter_chain_match::ConnectionSourceType;

use crate::{
    access_log::AccessLog,
    config_error::ConfigError,
    filter::rbac::NetworkRbac,
    http::{Cidr, ConnectionManager},
    inspector::Sniffed,
    mixer::TcpMixer,
    proto::{duration, invalid, unpack},
    route::data_source,
    shared::Shared,
    tcp_proxy::TcpProxy,
    tls::ServerContext,
};

mod connection_limit;
mod local_ratelimit;

pub use connection_limit::{ConnectionLimit, Place};
pub use local_ratelimit::ConnectionRate;

/// A handshake must be done in this time. Envoy has no limit unless told.
const HANDSHAKE: Duration = Duration::from_secs(15);

/// A compiled filter chain.
#[derive(Debug)]
pub struct FilterChain {
    /// Its name, if it has one.
    pub name: Option<Arc<str>>,
    /// TLS, if it ends here.
    pub tls: Option<ServerContext>,
    /// How long the handshake may take.
    pub handshake: Duration,
    /// Who may connect.
    pub rbac: Vec<NetworkRbac>,
    /// How many may connect.
    pub limits: Vec<ConnectionLimit>,
    /// How often one may connect.
    pub rates: Vec<ConnectionRate>,
    /// The server name of the ClientHello is the cluster's name. Envoy: `envoy.filters.network.sni_cluster`.
    pub sni_cluster: bool,
    /// Asks Mixer whether a TCP connection may go on, and reports it.
    pub mixer: Option<Arc<TcpMixer>>,
    /// What becomes of the bytes.
    pub terminal: Terminal,
}

/// The last network filter of a chain.
#[derive(Debug)]
pub enum Terminal {
    /// HTTP.
    Http(Arc<ConnectionManager>),
    /// TCP, with its access logs.
    Tcp(Box<TcpProxy>, Vec<AccessLog>),
    /// Everything comes back. Envoy: `envoy.filters.network.echo`.
    Echo,
    /// The same bytes for everybody. Envoy: `envoy.filters.network.direct_response`.
    Answer(Bytes),
}

/// A listener's chains with their matches.
#[derive(Debug)]
pub struct FilterChains {
    chains: Vec<(Match, Arc<FilterChain>)>,
    default: Option<Arc<FilterChain>>,
}

#[derive(Debug, Default)]
struct Match {
    destination_port: Option<u16>,
    destination: Vec<Cidr>,
    server_names: Vec<String>,
    transport: String,
    protocols: Vec<Vec<u8>>,
    direct_source: Vec<Cidr>,
    source_type: Option<ConnectionSourceType>,
    source: Vec<Cidr>,
    source_ports: Vec<u16>,
}

impl FilterChain {
    /// The places of a connection in the limits of its chain; `None`, after the delay that was asked for, if it
    /// must go or has come too soon.
    pub async fn admit(&self) -> Option<Vec<Place>> {
        if !self.rates.iter().all(ConnectionRate::admits) {
            return None;
        }
        let mut places = Vec::new();
        for limit in &self.limits {
            match limit.admit() {
                Some(place) => places.push(place),
                None => {
                    if let Some(delay) = limit.delay {
                        tokio::time::sleep(delay).await;
                    }
                    return None;
                }
            }
        }
        Some(places)
    }
}

/// What a connection is matched by.
#[derive(Debug)]
pub struct Candidate<'a> {
    /// Address the peer meant.
    pub local: std::net::SocketAddr,
    /// The peer (after PROXY protocol).
    pub remote: std::net::SocketAddr,
    /// The peer of the socket.
    pub direct_remote: std::net::SocketAddr,
    /// What its first bytes told.
    pub sniffed: &'a Sniffed,
}

impl FilterChains {
    /// Compiles a listener's chains.
    ///
    /// # Errors
    /// When a chain is invalid, or two have the same match.
    pub fn compile(
        listener: &proto::Listener,
        shared: &Arc<Shared>,
    ) -> Result<FilterChains, ConfigError> {
        let mut chains: Vec<(Match, Arc<FilterChain>)> =
            Vec::with_capacity(listener.filter_chains.len());
        let mut seen: Vec<&proto::FilterChainMatch> = Vec::new();
        let nothing = proto::FilterChainMatch::default();
        for (index, chain) in listener.filter_chains.iter().enumerate() {
            let within = |error: ConfigError| match chain.name.as_str() {
                "" => error.within(format_args!("filter_chains[{index}]")),
                name => error.within(format_args!("filter chain {name}")),
            };
            let rules = chain.filter_chain_match.as_ref().unwrap_or(&nothing);
            if seen.contains(&rules) {
                return Err(within(invalid(
                    "filter_chain_match",
                    "has the same matching rules as another chain",
                )));
            }
            seen.push(rules);
            let compiled = FilterChain::compile(chain, listener.traffic_direction(), shared)
                .map_err(within)?;
            chains.push((Match::compile(rules).map_err(within)?, Arc::new(compiled)));
        }
        let default = match listener.default_filter_chain.as_ref() {
            None => None,
            Some(chain) => {
                let chain = FilterChain::compile(chain, listener.traffic_direction(), shared)
                    .map_err(|error| error.within("default_filter_chain"))?;
                Some(Arc::new(chain))
            }
        };
        if chains.is_empty() && default.is_none() {
            return Err(invalid("filter_chains", "no filter chains specified"));
        }
        Ok(FilterChains { chains, default })
    }

    /// All chains.
    pub fn all(&self) -> impl Iterator<Item = &Arc<FilterChain>> {
        self.chains
            .iter()
            .map(|(_, chain)| chain)
            .chain(&self.default)
    }

    /// The chain of a connection. As in Envoy, each criterion in its order keeps only the chains that
    /// match it most specifically, and there is no way back.
    pub fn find(&self, connection: &Candidate<'_>) -> Option<Arc<FilterChain>> {
        if let [(only, chain)] = self.chains.as_slice()
            && only.is_any()
        {
            return Some(chain.clone());
        }
        let mut left: Vec<&(Match, Arc<FilterChain>)> = self.chains.iter().collect();
        let criteria: [Criterion<'_>; 9] = [
            &|m| exact(m.destination_port, connection.local.port()),
            &|m| longest(&m.destination, connection.local.ip()),
            &|m| server_name(&m.server_names, connection.sniffed.server_name.as_deref()),
            &|m| transport(&m.transport, connection.sniffed.tls),
            &|m| protocol(&m.protocols, &connection.sniffed.protocols),
            &|m| longest(&m.direct_source, connection.direct_remote.ip()),
            &|m| source_type(m.source_type, connection),
            &|m| longest(&m.source, connection.remote.ip()),
            &|m| match m.source_ports.as_slice() {
                [] => Some(0),
                ports => ports.contains(&connection.remote.port()).then_some(1),
            },
        ];
        for criterion in criteria {
            let best = left.iter().filter_map(|(rules, _)| criterion(rules)).max();
            left.retain(|(rules, _)| best.is_some() && criterion(rules) == best);
        }
        left.first()
            .map(|(_, chain)| chain.clone())
            .or_else(|| self.default.clone())
    }
}

/// How specifically a match's rule meets a connection; `None` if it does not.
type Criterion<'a> = &'a dyn Fn(&Match) -> Option<u32>;

/// 0 if the rule says nothing, 1 if it matches.
fn exact<T: PartialEq>(rule: Option<T>, value: T) -> Option<u32> {
    match rule {
        None => Some(0),
        Some(rule) => (rule == value).then_some(1),
    }
}

/// 0 if there are no ranges, else one more than the length of the longest that matches.
fn longest(ranges: &[Cidr], address: IpAddr) -> Option<u32> {
    if ranges.is_empty() {
        return Some(0);
    }
    ranges
        .iter()
        .filter(|range| range.contains(address))
        .map(|range| u32::from(range.bits()) + 1)
        .max()
}

/// Exact names win over wildcards, longer wildcards over shorter ones.
fn server_name(rules: &[String], name: Option<&str>) -> Option<u32> {
    if rules.is_empty() {
        return Some(0);
    }
    let name = name?;
    rules
        .iter()
        .filter_map(|rule| match rule.strip_prefix('*') {
            None => (rule == name).then_some(u32::MAX),
            Some(suffix) => (name.len() > suffix.len() && name.ends_with(suffix))
                .then_some(suffix.len() as u32 + 1),
        })
        .max()
}

fn transport(rule: &str, tls: bool) -> Option<u32> {
    match rule {
        "" => Some(0),
        "tls" => tls.then_some(1),
        "raw_buffer" => (!tls).then_some(1),
        _ => None,
    }
}

fn protocol(rules: &[Vec<u8>], offered: &[Vec<u8>]) -> Option<u32> {
    if rules.is_empty() {
        return Some(0);
    }
    // The client's order decides, as in Envoy.
    let first = offered
        .iter()
        .position(|protocol| rules.contains(protocol))?;
    Some(u32::try_from(offered.len() - first).unwrap_or(u32::MAX))
}

fn source_type(rule: Option<ConnectionSourceType>, connection: &Candidate<'_>) -> Option<u32> {
    let local =
        connection.remote.ip().is_loopback() || connection.remote.ip() == connection.local.ip();
    match rule {
        None | Some(ConnectionSourceType::Any) => Some(0),
        Some(ConnectionSourceType::SameIpOrLoopback) => local.then_some(1),
        Some(ConnectionSourceType::External) => (!local).then_some(1),
    }
}

impl Match {
    fn compile(rules: &proto::FilterChainMatch) -> Result<Match, ConfigError> {
        if !rules.address_suffix.is_empty() || rules.suffix_len.is_some() {
            return Err(invalid("address_suffix", "not supported"));
        }
        let port = |port: u32| {
            u16::try_from(port).map_err(|_| invalid("port", format!("{port} is not a port")))
        };
        let ranges = |ranges: &[lateen_protocols::envoy::envoy::config::core::v3::CidrRange]| {
            ranges
                .iter()
                .map(Cidr::compile)
                .collect::<Result<Vec<_>, _>>()
        };
        let mut server_names = Vec::new();
        for name in &rules.server_names {
            let name = name.to_ascii_lowercase();
            if name.contains('*') && !name.starts_with("*.") {
                return Err(invalid(
                    "server_names",
                    format!("partial wildcards are not supported: {name}"),
                ));
            }
            server_names.push(name);
        }
        Ok(Match {
            destination_port: rules
                .destination_port
                .as_ref()
                .map(|p| port(p.value))
                .transpose()?,
            destination: ranges(&rules.prefix_ranges)?,
            server_names,
            transport: rules.transport_protocol.clone(),
            protocols: rules
                .application_protocols
                .iter()
                .map(|p| p.clone().into_bytes())
                .collect(),
            direct_source: ranges(&rules.direct_source_prefix_ranges)?,
            source_type: Some(rules.source_type()).filter(|t| *t != ConnectionSourceType::Any),
            source: ranges(&rules.source_prefix_ranges)?,
            source_ports: rules
                .source_ports
                .iter()
                .map(|p| port(*p))
                .collect::<Result<_, _>>()?,
        })
    }

    fn is_any(&self) -> bool {
        self.destination_port.is_none()
            && self.destination.is_empty()
            && self.server_names.is_empty()
            && self.transport.is_empty()
            && self.protocols.is_empty()
            && self.direct_source.is_empty()
            && self.source_type.is_none()
            && self.source.is_empty()
            && self.source_ports.is_empty()
    }
}

impl FilterChain {
    fn compile(
        chain: &proto::FilterChain,
        direction: TrafficDirection,
        shared: &Arc<Shared>,
    ) -> Result<FilterChain, ConfigError> {
        let tls = match chain.transport_socket.as_ref() {
            None => None,
            Some(socket) => {
                let Some(lateen_protocols::envoy::envoy::config::core::v3::transport_socket::ConfigType::TypedConfig(
                    any,
                )) = socket.config_type.as_ref()
                else {
                    return Err(invalid("transport_socket", "no typed_config"));
                };
                downstream_tls(any, shared).map_err(|error| error.within("transport_socket"))?
            }
        };
        if chain.use_proxy_proto.as_ref().is_some_and(|on| on.value) {
            return Err(invalid(
                "use_proxy_proto",
                "use the proxy_protocol listener filter",
            ));
        }
        let handshake = match chain.transport_socket_connect_timeout.as_ref() {
            Some(limit) => duration("transport_socket_connect_timeout", limit)?,
            None => HANDSHAKE,
        };
        let Some((last, others)) = chain.filters.split_last() else {
            return Err(invalid("filters", "there are none"));
        };
        let terminal = terminal(last, direction, shared)
            .map_err(|error| error.within(format_args!("filter {}", last.name)))?;
        let mut mixer = None;
        let mut rbac = Vec::new();
        let mut limits = Vec::new();
        let mut rates = Vec::new();
        let mut sni_cluster = false;
        for filter in others {
            let within = |error: ConfigError| error.within(format_args!("filter {}", filter.name));
            let any = typed_config(filter).map_err(within)?;
            // Network filters before the last one decide who may pass, so none may be left out.
            if let Some(config) = unpack::<RbacProto>(any).map_err(within)? {
                rbac.push(NetworkRbac::compile(&config, &shared.stats).map_err(within)?);
                continue;
            }
            if let Some(config) = unpack::<LimitProto>(any).map_err(within)? {
                limits.extend(ConnectionLimit::compile(&config, &shared.stats).map_err(within)?);
                continue;
            }
            if let Some(config) = unpack::<RateProto>(any).map_err(within)? {
                rates.extend(ConnectionRate::compile(&config, &shared.stats).map_err(within)?);
                continue;
            }
            if unpack::<SniClusterProto>(any).map_err(within)?.is_some() {
                sni_cluster = true;
                continue;
            }
            let Some(config) = unpack::<TcpClientConfig>(any).map_err(within)? else {
                return Err(within(invalid(
                    any.type_url.clone(),
                    "this network filter is not supported",
                )));
            };
            if !matches!(terminal, Terminal::Tcp(..)) {
                return Err(within(invalid(
                    "filters",
                    "the mixer network filter goes before tcp_proxy only",
                )));
            }
            mixer = Some(Arc::new(
                TcpMixer::compile(&config, shared).map_err(within)?,
            ));
        }
        Ok(FilterChain {
            name: Some(&*chain.name)
                .filter(|name| !name.is_empty())
                .map(Into::into),
            tls,
            handshake,
            rbac,
            limits,
            rates,
            sni_cluster,
            mixer,
            terminal,
        })
    }
}

fn downstream_tls(
    any: &pb::Any,
    shared: &Arc<Shared>,
) -> Result<Option<ServerContext>, ConfigError> {
    if unpack::<RawBuffer>(any)?.is_some() {
        return Ok(None);
    }
    match unpack::<DownstreamTlsContext>(any)? {
        Some(context) => ServerContext::compile(&context, &shared.secrets).map(Some),
        None => Err(invalid(
            any.type_url.clone(),
            "this transport socket is not supported",
        )),
    }
}

fn typed_config(filter: &proto::Filter) -> Result<&pb::Any, ConfigError> {
    match filter.config_type.as_ref() {
        Some(proto::filter::ConfigType::TypedConfig(any)) => Ok(any),
        _ => Err(invalid(
            "typed_config",
            "absent or by discovery, which is not supported",
        )),
    }
}

fn terminal(
    filter: &proto::Filter,
    direction: TrafficDirection,
    shared: &Arc<Shared>,
) -> Result<Terminal, ConfigError> {
    let any = typed_config(filter)?;
    if let Some(manager) = unpack::<ManagerProto>(any)? {
        return Ok(Terminal::Http(Arc::new(ConnectionManager::compile(
            &manager, direction, shared,
        )?)));
    }
    if let Some(tcp) = unpack::<TcpProto>(any)? {
        let logs = AccessLog::compile_all(&tcp.access_log)?;
        return Ok(Terminal::Tcp(
            Box::new(TcpProxy::compile(&tcp, shared)?),
            logs,
        ));
    }
    if unpack::<EchoProto>(any)?.is_some() {
        return Ok(Terminal::Echo);
    }
    if let Some(answer) = unpack::<AnswerProto>(any)? {
        let bytes = answer.response.as_ref().map(data_source).transpose()?;
        return Ok(Terminal::Answer(bytes.unwrap_or_default()));
    }
    Err(invalid(
        any.type_url.clone(),
        "this network filter is not supported",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(rules: &[proto::FilterChainMatch], sniffed: &Sniffed, local: &str) -> Option<usize> {
        let compiled: Vec<Match> = rules
            .iter()
            .map(|rules| Match::compile(rules).unwrap())
            .collect();
        let connection = Candidate {
            local: local.parse().unwrap(),
            remote: "10.0.0.1:999".parse().unwrap(),
            direct_remote: "10.0.0.1:999".parse().unwrap(),
            sniffed,
        };
        // The same steps as `find`, over matches without chains.
        let mut left: Vec<usize> = (0..compiled.len()).collect();
        let criteria: [Criterion<'_>; 5] = [
            &|m| exact(m.destination_port, connection.local.port()),
            &|m| longest(&m.destination, connection.local.ip()),
            &|m| server_name(&m.server_names, connection.sniffed.server_name.as_deref()),
            &|m| transport(&m.transport, connection.sniffed.tls),
            &|m| protocol(&m.protocols, &connection.sniffed.protocols),
        ];
        for criterion in criteria {
            let best = left.iter().filter_map(|i| criterion(&compiled[*i])).max();
            left.retain(|i| best.is_some() && criterion(&compiled[*i]) == best);
        }
        left.first().copied()
    }

    #[test]
    fn the_most_specific_match_wins() {
        let rule = |names: &[&str], transport: &str, protocols: &[&str]| proto::FilterChainMatch {
            server_names: names.iter().map(|name| (*name).to_owned()).collect(),
            transport_protocol: transport.to_owned(),
            application_protocols: protocols.iter().map(|p| (*p).to_owned()).collect(),
            ..Default::default()
        };
        let rules = [
            rule(&["a.example.com"], "", &[]),
            rule(&["*.example.com"], "", &[]),
            rule(&[], "tls", &["istio", "istio-http/1.1"]),
            rule(&[], "tls", &[]),
            rule(&[], "raw_buffer", &[]),
        ];
        let tls = |name: Option<&str>, protocols: &[&str]| Sniffed {
            tls: true,
            server_name: name.map(Arc::from),
            protocols: protocols.iter().map(|p| p.as_bytes().to_vec()).collect(),
            proxied: None,
        };
        for (sniffed, want) in [
            (tls(Some("a.example.com"), &[]), Some(0)),
            (tls(Some("b.example.com"), &[]), Some(1)),
            (tls(Some("example.com"), &[]), Some(3)),
            (tls(Some("other"), &["istio"]), Some(2)),
            (tls(None, &["h2"]), Some(3)),
            (Sniffed::default(), Some(4)),
        ] {
            assert_eq!(find(&rules, &sniffed, "10.0.0.2:80"), want, "{sniffed:?}");
        }
    }
}
