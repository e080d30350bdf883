//! What the kernel's tables shall hold. Pure: settings in, text for iptables-restore out.
//!
//! Rules of the built-in chains only jump to chains of ours. Within those the order is Istio's and matters: what
//! must never be intercepted comes first, and the proxy's own connections before those of the application.

use std::net::IpAddr;

use super::{
    settings::{Choice, Dns, Mode, Settings},
    system::{Backend, Present},
};

/// Every chain this program has ever made. `clean` takes these and no others.
pub(super) const CHAINS: &[&str] = &[
    "ISTIO_INBOUND",
    "ISTIO_REDIRECT",
    "ISTIO_IN_REDIRECT",
    "ISTIO_OUTPUT",
    "ISTIO_OUTPUT_DNS",
    "ISTIO_DIVERT",
    "ISTIO_TPROXY",
    "ISTIO_DROP",
];
/// The tables they are in.
pub(super) const TABLES: &[&str] = &["mangle", "nat", "raw"];
/// Mark of the proxy's own packets that come back in over loopback. Istio: `outboundMark`.
const RETURNING_MARK: u32 = 1338;
/// Where captured DNS goes.
const DNS_PORT: u16 = 15053;

/// IPv4 or IPv6: two sets of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// iptables.
    V4,
    /// ip6tables.
    V6,
}

impl Family {
    fn loopback(self) -> &'static str {
        match self {
            Family::V4 => "127.0.0.1/32",
            Family::V6 => "::1/128",
        }
    }

    /// From where the proxy connects to the application at the address the client had meant.
    fn passthrough(self) -> &'static str {
        match self {
            Family::V4 => "127.0.0.6/32",
            Family::V6 => "::6/128",
        }
    }

    fn has(self, address: &IpAddr) -> bool {
        address.is_ipv4() == (self == Family::V4)
    }

    /// `iptables` with what `suffix` says.
    pub(super) fn program(self, backend: Backend, suffix: &str) -> String {
        let name = match self {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        let variant = match backend {
            Backend::Default => "",
            Backend::Nft => "-nft",
            Backend::Legacy => "-legacy",
        };
        format!("{name}{variant}{suffix}")
    }
}

/// What one table shall hold of ours.
#[derive(Clone, Debug)]
pub(super) struct Table {
    name: &'static str,
    chains: Vec<&'static str>,
    /// The first rules of built-in chains.
    jumps: Vec<String>,
    rules: Vec<String>,
}

impl Table {
    fn new(name: &'static str, chains: &[&'static str]) -> Table {
        Table {
            name,
            chains: chains.to_vec(),
            jumps: Vec::new(),
            rules: Vec::new(),
        }
    }

    fn jump(&mut self, from: &str, rest: &str) {
        self.jumps.push(format!("-A {from} {rest}"));
    }

    fn rule(&mut self, chain: &str, rest: impl AsRef<str>) {
        self.rules.push(format!("-A {chain} {}", rest.as_ref()));
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// The change from what is `present` to this, in one step: iptables-restore does a table whole or not at all.
    pub(super) fn restore(&self, present: &Present) -> String {
        let mut lines = vec![format!("*{}", self.name)];
        lines.extend(present.undo_jumps());
        // Makes a chain, or empties one that is there.
        lines.extend(self.chains.iter().map(|chain| format!(":{chain} - [0:0]")));
        lines.extend(present.undo_chains(&self.chains));
        lines.extend(self.jumps.iter().cloned());
        lines.extend(self.rules.iter().cloned());
        lines.push("COMMIT\n".to_owned());
        lines.join("\n")
    }
}

/// All tables that hold something of ours.
pub(super) fn tables(settings: &Settings, family: Family) -> Vec<Table> {
    let mut all = Vec::new();
    if settings.mode == Mode::Tproxy || settings.drop_invalid {
        all.push(mangle(settings, family));
    }
    all.push(nat(settings, family));
    if settings.dns != Dns::None {
        all.push(raw(settings, family));
    }
    all
}

/// Arguments of `ip`: what the tables alone cannot do.
pub(super) fn ip_commands(settings: &Settings, family: Family) -> Vec<Vec<String>> {
    let words = |text: String| text.split(' ').map(str::to_owned).collect();
    let mut all = Vec::new();
    if family == Family::V6 {
        // All of 127/8 is loopback's, but of IPv6 only ::1. Nobody else can have it, so it is not asked whether.
        all.push(words("-6 addr replace ::6/128 dev lo nodad".to_owned()));
    }
    if settings.mode == Mode::Tproxy {
        let version = match family {
            Family::V4 => "-4",
            Family::V6 => "-6",
        };
        let table = settings.tproxy_route_table;
        let mark = settings.tproxy_mark;
        all.push(words(format!(
            "{version} rule add fwmark {mark} lookup {table}"
        )));
        all.push(words(format!(
            "{version} route replace local default dev lo table {table}"
        )));
    }
    all
}

/// The owners that are the proxy.
fn proxy_owners(settings: &Settings) -> impl Iterator<Item = String> {
    let uids = settings
        .proxy_uid
        .iter()
        .map(|uid| format!("--uid-owner {uid}"));
    let gids = settings
        .proxy_gid
        .iter()
        .map(|gid| format!("--gid-owner {gid}"));
    uids.chain(gids)
}

fn nat(settings: &Settings, family: Family) -> Table {
    let mut chains = vec![
        "ISTIO_INBOUND",
        "ISTIO_REDIRECT",
        "ISTIO_IN_REDIRECT",
        "ISTIO_OUTPUT",
    ];
    if settings.dns != Dns::None {
        chains.push("ISTIO_OUTPUT_DNS");
    }
    let mut table = Table::new("nat", &chains);
    table.jump("PREROUTING", "-p tcp -j ISTIO_INBOUND");
    table.jump("OUTPUT", "-j ISTIO_OUTPUT");
    let outbound = settings.outbound_capture_port;
    let inbound = settings.inbound_capture_port;
    table.rule(
        "ISTIO_REDIRECT",
        format!("-p tcp -j REDIRECT --to-ports {outbound}"),
    );
    table.rule(
        "ISTIO_IN_REDIRECT",
        format!("-p tcp -j REDIRECT --to-ports {inbound}"),
    );
    nat_inbound(&mut table, settings, family);
    nat_outbound(&mut table, settings, family);
    table
}

fn nat_inbound(table: &mut Table, settings: &Settings, family: Family) {
    for name in &settings.virtual_interfaces {
        for range in outbound_ranges(settings, family) {
            let to = destination(range.as_deref());
            table.rule(
                "ISTIO_INBOUND",
                format!("-i {name}{to} -p tcp -j ISTIO_REDIRECT"),
            );
        }
        table.rule("ISTIO_INBOUND", format!("-i {name} -j RETURN"));
    }
    for name in &settings.exclude_interfaces {
        table.rule("ISTIO_INBOUND", format!("-i {name} -j RETURN"));
    }
    let tunnel = settings.inbound_tunnel_port;
    table.rule(
        "ISTIO_INBOUND",
        format!("-p tcp --dport {tunnel} -j RETURN"),
    );
    if settings.mode == Mode::Tproxy {
        return;
    }
    inbound_ports(table, settings, |table, port| {
        table.rule(
            "ISTIO_INBOUND",
            format!("-p tcp{port} -j ISTIO_IN_REDIRECT"),
        );
    });
}

/// Excluded ports return; for the others `intercept` writes the rules, given ` --dport N` or nothing.
fn inbound_ports(table: &mut Table, settings: &Settings, intercept: impl Fn(&mut Table, &str)) {
    match &settings.inbound_ports {
        Choice::All => {
            for port in &settings.exclude_inbound_ports {
                table.rule("ISTIO_INBOUND", format!("-p tcp --dport {port} -j RETURN"));
            }
            intercept(table, "");
        }
        Choice::Only(ports) => {
            for port in ports {
                intercept(table, &format!(" --dport {port}"));
            }
        }
    }
}

fn nat_outbound(table: &mut Table, settings: &Settings, family: Family) {
    const CHAIN: &str = "ISTIO_OUTPUT";
    let loopback = family.loopback();
    let captures_dns = settings.dns != Dns::None;
    for name in &settings.exclude_interfaces {
        table.rule(CHAIN, format!("-o {name} -j RETURN"));
    }
    for port in &settings.exclude_outbound_ports {
        table.rule(CHAIN, format!("-p tcp --dport {port} -j RETURN"));
        table.rule(CHAIN, format!("-p udp --dport {port} -j RETURN"));
    }
    // The proxy, handing the application what it has taken.
    table.rule(
        CHAIN,
        format!("-o lo -s {} -j RETURN", family.passthrough()),
    );
    // Loopback is intercepted only where its ranges are named.
    let takes_loopback = settings
        .outbound_ranges
        .list()
        .iter()
        .any(|range| range.0.addr().is_loopback());
    let tunnel = settings.inbound_tunnel_port;
    for owner in proxy_owners(settings) {
        // The application has called itself by its service's name: that comes in like any other call.
        let ports = match captures_dns {
            true => format!("-m multiport ! --dports 53,{tunnel}"),
            false => format!("! --dport {tunnel}"),
        };
        table.rule(
            CHAIN,
            format!("-o lo ! -d {loopback} -p tcp {ports} -m owner {owner} -j ISTIO_IN_REDIRECT"),
        );
        // The application has called itself by its address.
        if !takes_loopback {
            let all_but_dns = if captures_dns {
                " -p tcp ! --dport 53"
            } else {
                ""
            };
            table.rule(
                CHAIN,
                format!("-o lo{all_but_dns} -m owner ! {owner} -j RETURN"),
            );
        }
        // Whatever else the proxy sends must not come back to it.
        table.rule(CHAIN, format!("-m owner {owner} -j RETURN"));
    }
    for group in &settings.exclude_outbound_owner_groups {
        table.rule(CHAIN, format!("-m owner --gid-owner {group} -j RETURN"));
    }
    if captures_dns {
        table.rule(CHAIN, "-j ISTIO_OUTPUT_DNS");
        dns_redirect(table, settings, family);
    }
    if !takes_loopback {
        table.rule(CHAIN, format!("-d {loopback} -j RETURN"));
    }
    for range in &settings.exclude_outbound_ranges {
        if family.has(&range.addr()) {
            table.rule(CHAIN, format!("-d {range} -j RETURN"));
        }
    }
    let owners: Vec<String> = match &settings.outbound_owner_groups {
        Choice::All => vec![String::new()],
        Choice::Only(groups) => groups
            .iter()
            .map(|group| format!(" -m owner --gid-owner {group}"))
            .collect(),
    };
    for owner in owners {
        for port in &settings.outbound_ports {
            table.rule(
                CHAIN,
                format!("-p tcp --dport {port}{owner} -j ISTIO_REDIRECT"),
            );
        }
        for range in outbound_ranges(settings, family) {
            let to = destination(range.as_deref());
            table.rule(CHAIN, format!("-p tcp{to}{owner} -j ISTIO_REDIRECT"));
        }
    }
}

/// The destinations to intercept; `None` is all.
fn outbound_ranges(settings: &Settings, family: Family) -> Vec<Option<String>> {
    match &settings.outbound_ranges {
        Choice::All => vec![None],
        Choice::Only(ranges) => ranges
            .iter()
            .filter(|range| family.has(&range.0.addr()))
            .map(|range| Some(range.0.to_string()))
            .collect(),
    }
}

fn destination(range: Option<&str>) -> String {
    range.map_or_else(String::new, |range| format!(" -d {range}"))
}

/// The servers whose queries are captured, each as ` FLAG ADDRESS`, or one nothing for all.
fn dns_servers(settings: &Settings, family: Family, flag: &str) -> Vec<String> {
    match &settings.dns {
        Dns::None => Vec::new(),
        Dns::All => vec![String::new()],
        Dns::To(servers) => servers
            .iter()
            .filter(|server| family.has(server))
            .map(|server| format!(" {flag} {server}"))
            .collect(),
    }
}

fn dns_redirect(table: &mut Table, settings: &Settings, family: Family) {
    const CHAIN: &str = "ISTIO_OUTPUT_DNS";
    let to = format!("-j REDIRECT --to-ports {DNS_PORT}");
    for server in dns_servers(settings, family, "-d") {
        table.rule(CHAIN, format!("-p tcp --dport 53{server} {to}"));
    }
    for owner in proxy_owners(settings) {
        table.rule(
            CHAIN,
            format!("-p udp --dport 53 -m owner {owner} -j RETURN"),
        );
    }
    for server in dns_servers(settings, family, "-d") {
        table.rule(CHAIN, format!("-p udp --dport 53{server} {to}"));
    }
}

/// Queries of the application and of the proxy are told apart by connection tracking zones: both may have the same
/// source port, and an answer would find the wrong one.
fn raw(settings: &Settings, family: Family) -> Table {
    let mut table = Table::new("raw", &["ISTIO_INBOUND", "ISTIO_OUTPUT_DNS"]);
    table.jump("PREROUTING", "-p udp -j ISTIO_INBOUND");
    table.jump("OUTPUT", "-p udp -j ISTIO_OUTPUT_DNS");
    for owner in proxy_owners(settings) {
        let chain = "ISTIO_OUTPUT_DNS";
        table.rule(
            chain,
            format!("-p udp --dport 53 -m owner {owner} -j CT --zone 1"),
        );
        table.rule(
            chain,
            format!("-p udp --sport {DNS_PORT} -m owner {owner} -j CT --zone 2"),
        );
    }
    for server in dns_servers(settings, family, "-d") {
        table.rule(
            "ISTIO_OUTPUT_DNS",
            format!("-p udp --dport 53{server} -j CT --zone 2"),
        );
    }
    for server in dns_servers(settings, family, "-s") {
        table.rule(
            "ISTIO_INBOUND",
            format!("-p udp --sport 53{server} -j CT --zone 1"),
        );
    }
    table
}

fn mangle(settings: &Settings, family: Family) -> Table {
    let tproxy = settings.mode == Mode::Tproxy;
    let mut chains = vec!["ISTIO_INBOUND"];
    if tproxy {
        chains.extend(["ISTIO_OUTPUT", "ISTIO_DIVERT", "ISTIO_TPROXY"]);
    }
    if settings.drop_invalid {
        chains.push("ISTIO_DROP");
    }
    let mut table = Table::new("mangle", &chains);
    table.jump("PREROUTING", "-p tcp -j ISTIO_INBOUND");
    if settings.drop_invalid {
        table.rule("ISTIO_DROP", "-j DROP");
        table.rule(
            "ISTIO_INBOUND",
            "-m conntrack --ctstate INVALID -j ISTIO_DROP",
        );
    }
    if tproxy {
        table.jump("OUTPUT", "-p tcp -j ISTIO_OUTPUT");
        tproxy_rules(&mut table, settings, family);
    }
    table
}

fn tproxy_rules(table: &mut Table, settings: &Settings, family: Family) {
    let loopback = family.loopback();
    let mark = settings.tproxy_mark;
    let port = settings.inbound_capture_port;
    table.rule("ISTIO_DIVERT", format!("-j MARK --set-mark {mark}"));
    table.rule("ISTIO_DIVERT", "-j ACCEPT");
    table.rule(
        "ISTIO_TPROXY",
        format!(
            "! -d {loopback} -p tcp -j TPROXY --on-port {port} --tproxy-mark {mark}/0xffffffff"
        ),
    );

    // A proxy that keeps the client's address marks what it sends to the application; the answers must find it.
    let marked = format!("-p tcp -m mark --mark {mark}");
    table.rule("ISTIO_INBOUND", format!("{marked} -j CONNMARK --save-mark"));
    table.rule("ISTIO_INBOUND", format!("{marked} -j RETURN"));
    table.rule(
        "ISTIO_INBOUND",
        format!("-p tcp -s {} -i lo -j RETURN", family.passthrough()),
    );
    table.rule(
        "ISTIO_INBOUND",
        format!("-p tcp -i lo -m mark ! --mark {RETURNING_MARK} -j RETURN"),
    );
    for name in settings
        .exclude_interfaces
        .iter()
        .chain(&settings.virtual_interfaces)
    {
        table.rule("ISTIO_INBOUND", format!("-i {name} -j RETURN"));
    }
    inbound_ports(table, settings, |table, dport| {
        // What belongs to a connection that was taken goes where the connection went.
        table.rule(
            "ISTIO_INBOUND",
            format!("-p tcp{dport} -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT"),
        );
        table.rule("ISTIO_INBOUND", format!("-p tcp{dport} -j ISTIO_TPROXY"));
    });

    for name in &settings.exclude_interfaces {
        table.rule("ISTIO_OUTPUT", format!("-o {name} -j RETURN"));
    }
    table.rule("ISTIO_OUTPUT", format!("-o lo {marked} -j RETURN"));
    for owner in proxy_owners(settings) {
        table.rule(
            "ISTIO_OUTPUT",
            format!(
                "! -d {loopback} -p tcp -o lo -m owner {owner} -j MARK --set-mark {RETURNING_MARK}"
            ),
        );
    }
    table.rule(
        "ISTIO_OUTPUT",
        format!("-p tcp -m connmark --mark {mark} -j CONNMARK --restore-mark"),
    );
}
