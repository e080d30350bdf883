//! The flags of `proxy iptables apply`, and what they mean.

use std::{net::IpAddr, str::FromStr};

use clap::{Args, ValueEnum};
use ipnet::IpNet;

/// What to intercept. Letters and the long names that begin with `istio` are those of Istio's `istio-iptables`.
#[derive(Clone, Debug, Args)]
pub struct Intercept {
    /// Outbound connections go to this port.
    #[arg(
        short = 'p',
        long = "outbound-capture-port",
        visible_alias = "envoy-port",
        value_name = "PORT",
        default_value_t = 15001
    )]
    outbound_capture_port: u16,
    /// Inbound connections go to this port.
    #[arg(short = 'z', long, value_name = "PORT", default_value_t = 15006)]
    inbound_capture_port: u16,
    /// Connections to this port are the proxy's in any case: the tunnel of other meshes.
    #[arg(short = 'e', long, value_name = "PORT", default_value_t = 15008)]
    inbound_tunnel_port: u16,
    /// Users whose connections are the proxy's own.
    #[arg(
        short = 'u',
        long,
        value_name = "UID,…",
        value_delimiter = ',',
        default_value = "1337"
    )]
    proxy_uid: Vec<u32>,
    /// Groups whose connections are the proxy's own.
    #[arg(
        short = 'g',
        long,
        value_name = "GID,…",
        value_delimiter = ',',
        default_value = "1337"
    )]
    proxy_gid: Vec<u32>,
    /// How inbound connections reach the proxy: REDIRECT, or TPROXY, which keeps the client's address.
    #[arg(
        short = 'm',
        long,
        visible_alias = "istio-inbound-interception-mode",
        value_enum,
        default_value = "REDIRECT",
        ignore_case = true
    )]
    mode: Mode,
    /// Inbound ports to intercept: a list, `*` for all, empty for none.
    #[arg(
        short = 'b',
        long,
        visible_alias = "istio-inbound-ports",
        value_name = "PORT,…|*",
        default_value = "*"
    )]
    inbound_ports: Ports,
    /// Inbound ports to leave alone when all are intercepted.
    #[arg(
        short = 'd',
        long,
        visible_alias = "istio-local-exclude-ports",
        value_name = "PORT,…",
        default_value = "15090,15021,15020"
    )]
    exclude_inbound_ports: List<u16>,
    /// Outbound ports to intercept whatever their address.
    #[arg(
        short = 'q',
        long,
        visible_alias = "istio-outbound-ports",
        value_name = "PORT,…",
        default_value = ""
    )]
    outbound_ports: List<u16>,
    /// Outbound ports to leave alone.
    #[arg(
        short = 'o',
        long,
        visible_alias = "istio-local-outbound-ports-exclude",
        value_name = "PORT,…",
        default_value = ""
    )]
    exclude_outbound_ports: List<u16>,
    /// Destinations to intercept: CIDR ranges, `*` for all, empty for none.
    #[arg(
        short = 'i',
        long,
        visible_alias = "istio-service-cidr",
        value_name = "CIDR,…|*",
        default_value = "*"
    )]
    outbound_ranges: Ranges,
    /// Destinations to leave alone.
    #[arg(
        short = 'x',
        long,
        visible_alias = "istio-service-exclude-cidr",
        value_name = "CIDR,…",
        default_value = ""
    )]
    exclude_outbound_ranges: List<Range>,
    /// Interfaces whose traffic is left alone.
    #[arg(
        short = 'c',
        long,
        visible_alias = "istio-exclude-interfaces",
        value_name = "NAME,…",
        default_value = ""
    )]
    exclude_interfaces: List<Interface>,
    /// Interfaces of virtual machines, whose inbound traffic counts as outbound.
    #[arg(
        short = 'k',
        long,
        visible_alias = "kube-virt-interfaces",
        value_name = "NAME,…",
        default_value = ""
    )]
    virtual_interfaces: List<Interface>,
    /// Groups whose outbound connections are intercepted; `*` for all.
    #[arg(long, value_name = "GID,…|*", default_value = "*")]
    outbound_owner_groups: Owners,
    /// Groups whose outbound connections are left alone.
    #[arg(long, value_name = "GID,…", default_value = "")]
    exclude_outbound_owner_groups: List<u32>,
    /// Mark of what TPROXY has taken.
    #[arg(
        short = 't',
        long,
        visible_alias = "istio-inbound-tproxy-mark",
        value_name = "N",
        default_value_t = 1337
    )]
    tproxy_mark: u32,
    /// Routing table for what TPROXY has taken.
    #[arg(
        short = 'r',
        long,
        visible_alias = "istio-inbound-tproxy-route-table",
        value_name = "N",
        default_value_t = 133
    )]
    tproxy_route_table: u32,
    /// Send DNS queries to port 15053, where a resolver must listen; this proxy has none.
    #[arg(long)]
    redirect_dns: bool,
    /// With `--redirect-dns`: queries to all servers, not only to `--dns-servers`.
    #[arg(long)]
    capture_all_dns: bool,
    /// Servers whose queries `--redirect-dns` takes.
    #[arg(long, value_name = "IP,…", value_delimiter = ',')]
    dns_servers: Vec<IpAddr>,
    /// Drop packets that belong to no known connection, instead of having them answered with a reset.
    #[arg(long)]
    drop_invalid: bool,
}

/// How inbound connections reach the proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Their destination is rewritten (table nat).
    #[default]
    #[value(name = "REDIRECT")]
    Redirect,
    /// They are handed over as they are (table mangle).
    #[value(name = "TPROXY")]
    Tproxy,
}

/// All, or a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice<T> {
    /// `*`.
    All,
    /// These; none if empty.
    Only(Vec<T>),
}

/// A list, which may be empty.
#[derive(Clone, Debug, PartialEq, Eq)]
struct List<T>(Vec<T>);

/// Name of a network interface. It becomes a word of a rule, so it may not be more than one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Interface(String);

impl FromStr for Interface {
    type Err = String;

    fn from_str(text: &str) -> Result<Interface, String> {
        /// Linux: IFNAMSIZ, less the zero at the end.
        const LONGEST: usize = 15;
        let fits = text.len() <= LONGEST
            && text
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && !b"/\"'\\!".contains(&byte));
        match fits {
            true => Ok(Interface(text.to_owned())),
            false => Err("is no name of a network interface".to_owned()),
        }
    }
}

impl<T: FromStr<Err: std::fmt::Display>> FromStr for List<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<List<T>, String> {
        match text.parse()? {
            Choice::Only(list) => Ok(List(list)),
            Choice::All => Err("`*` has no meaning here: give a list".to_owned()),
        }
    }
}

/// Ports.
pub type Ports = Choice<u16>;
/// Destinations.
pub type Ranges = Choice<Range>;
/// Groups.
pub type Owners = Choice<u32>;

/// A range of addresses; a bare address is one of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range(pub IpNet);

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Range, String> {
        let net = text.parse::<IpNet>().map(|net| net.trunc());
        net.or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
            .map(Range)
            .map_err(|_| format!("{text:?} is neither an address nor a CIDR range"))
    }
}

impl<T: FromStr<Err: std::fmt::Display>> FromStr for Choice<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Choice<T>, String> {
        let text = text.trim();
        if text == "*" {
            return Ok(Choice::All);
        }
        let words = text
            .split(',')
            .map(str::trim)
            .filter(|word| !word.is_empty());
        let parse = |word: &str| {
            word.parse()
                .map_err(|error| format!("{word:?} in {text:?}: {error}"))
        };
        words.map(parse).collect::<Result<_, _>>().map(Choice::Only)
    }
}

impl<T> Choice<T> {
    pub(super) fn list(&self) -> &[T] {
        match self {
            Choice::All => &[],
            Choice::Only(list) => list,
        }
    }
}

/// Which DNS queries are captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dns {
    /// None.
    None,
    /// To these servers.
    To(Vec<IpAddr>),
    /// All.
    All,
}

/// What is meant.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the flags say it")]
pub struct Settings {
    pub outbound_capture_port: u16,
    pub inbound_capture_port: u16,
    pub inbound_tunnel_port: u16,
    pub proxy_uid: Vec<u32>,
    pub proxy_gid: Vec<u32>,
    pub mode: Mode,
    pub inbound_ports: Ports,
    pub exclude_inbound_ports: Vec<u16>,
    pub outbound_ports: Vec<u16>,
    pub exclude_outbound_ports: Vec<u16>,
    pub outbound_ranges: Ranges,
    pub exclude_outbound_ranges: Vec<IpNet>,
    pub exclude_interfaces: Vec<String>,
    pub virtual_interfaces: Vec<String>,
    pub outbound_owner_groups: Owners,
    pub exclude_outbound_owner_groups: Vec<u32>,
    pub tproxy_mark: u32,
    pub tproxy_route_table: u32,
    pub dns: Dns,
    pub drop_invalid: bool,
}

impl Intercept {
    /// What the flags mean.
    pub fn settings(&self) -> Settings {
        let names = |list: &List<Interface>| list.0.iter().map(|name| name.0.clone()).collect();
        Settings {
            outbound_capture_port: self.outbound_capture_port,
            inbound_capture_port: self.inbound_capture_port,
            inbound_tunnel_port: self.inbound_tunnel_port,
            proxy_uid: self.proxy_uid.clone(),
            proxy_gid: self.proxy_gid.clone(),
            mode: self.mode,
            inbound_ports: self.inbound_ports.clone(),
            exclude_inbound_ports: self.exclude_inbound_ports.0.clone(),
            outbound_ports: self.outbound_ports.0.clone(),
            exclude_outbound_ports: self.exclude_outbound_ports.0.clone(),
            outbound_ranges: self.outbound_ranges.clone(),
            exclude_outbound_ranges: self
                .exclude_outbound_ranges
                .0
                .iter()
                .map(|range| range.0)
                .collect(),
            exclude_interfaces: names(&self.exclude_interfaces),
            virtual_interfaces: names(&self.virtual_interfaces),
            outbound_owner_groups: self.outbound_owner_groups.clone(),
            exclude_outbound_owner_groups: self.exclude_outbound_owner_groups.0.clone(),
            tproxy_mark: self.tproxy_mark,
            tproxy_route_table: self.tproxy_route_table,
            dns: match (self.redirect_dns, self.capture_all_dns) {
                (false, _) => Dns::None,
                (true, true) => Dns::All,
                (true, false) => Dns::To(self.dns_servers.clone()),
            },
            drop_invalid: self.drop_invalid,
        }
    }
}
