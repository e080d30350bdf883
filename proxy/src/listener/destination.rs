//! Redirected connections: where they were going before the kernel sent them here, and whose they are by that.
//!
//! A listener with `use_original_dst` takes what iptables sends and hands each connection to the listener of the
//! address it was meant for. Most of those have no socket of their own (`bind_to_port: false`).

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Weak},
};

use arc_swap::ArcSwap;
use tokio::net::TcpStream;

use super::Listener;

/// Listeners by address. [`crate::worker::Workers`] replaces it whole with every listener that comes or goes; the
/// listeners that hand on read it.
#[derive(Debug, Default)]
pub struct Destinations(ArcSwap<HashMap<SocketAddr, Weak<ArcSwap<Listener>>>>);

impl Destinations {
    /// Replaces all. Of two listeners of one address the first is kept.
    pub(crate) fn set<'a>(&self, listeners: impl Iterator<Item = &'a Arc<ArcSwap<Listener>>>) {
        let mut all = HashMap::new();
        for current in listeners {
            let listener = current.load();
            for address in listener.addresses() {
                // Not held: listeners hold what this is a part of.
                all.entry(address)
                    .or_insert_with(|| Arc::downgrade(current));
            }
        }
        self.0.store(Arc::new(all));
    }

    /// The listener of exactly this address, or of all addresses with this port. Envoy:
    /// `getBalancedHandlerByAddress`.
    pub(super) fn find(&self, address: SocketAddr) -> Option<Arc<Listener>> {
        let all = self.0.load();
        let any = match address {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let found = all
            .get(&address)
            .or_else(|| all.get(&SocketAddr::new(any, address.port())))?;
        Some(found.upgrade()?.load_full())
    }
}

/// Where the peer wanted to go before a rule of the kernel's; `None` if the kernel does not know. With REDIRECT
/// its connection tracking does; with TPROXY (`transparent`) the socket's own address is the one that was meant.
pub(super) fn of(socket: &TcpStream, transparent: bool) -> Option<SocketAddr> {
    let local = socket.local_addr().ok()?;
    let asked = socket2::SockRef::from(socket);
    let original = match local {
        SocketAddr::V4(_) => asked.original_dst_v4(),
        SocketAddr::V6(_) => asked.original_dst_v6(),
    };
    match original {
        // The kernel says nothing of scope and flow label.
        Ok(address) => address
            .as_socket()
            .map(|address| SocketAddr::new(address.ip(), address.port())),
        Err(_) => transparent.then_some(local),
    }
}

#[cfg(test)]
mod tests {
    use lateen_protocols::{envoy::envoy::config::listener::v3 as proto, json};

    use super::*;
    use crate::testing::Proxy;

    const ECHO: &str = "filter_chains: [{filters: [{name: e, typed_config: {\"@type\": \
                        type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo}}]}]";

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_listener_is_found_by_its_address_or_its_port() {
        let proxy = Proxy::start();
        let add = |name: &str, ip: &str, port: u16, rest: &str| {
            let yaml = format!(
                "{{name: {name}, address: {{socket_address: {{address: '{ip}', port_value: {port}}}}}, \
                 bind_to_port: false, {rest}, {ECHO}}}"
            );
            let proto: proto::Listener = json::from_yaml(&yaml).unwrap();
            let listener = Listener::compile(&proto, &proxy.shared).unwrap();
            proxy.workers.add_listener(listener).unwrap();
        };
        let both =
            "additional_addresses: [{address: {socket_address: {address: '::', port_value: 80}}}]";
        add("all", "0.0.0.0", 80, both);
        add("one", "10.0.0.1", 80, "use_original_dst: false");
        let find = |address: &str| -> Option<String> {
            let found = proxy.shared.destinations.find(address.parse().unwrap());
            found.map(|listener| listener.name.to_string())
        };
        assert_eq!(find("10.0.0.1:80").as_deref(), Some("one"));
        assert_eq!(find("10.0.0.2:80").as_deref(), Some("all"));
        assert_eq!(find("[fd00::1]:80").as_deref(), Some("all"));
        assert_eq!(find("10.0.0.1:81"), None);
        proxy.workers.remove_listener("one");
        assert_eq!(find("10.0.0.1:80").as_deref(), Some("all"));
        proxy.workers.drain_all();
        assert_eq!(find("10.0.0.2:80"), None);
    }

    #[tokio::test]
    async fn two_sources_of_one_address_are_refused() {
        let proxy_protocol = format!(
            "use_original_dst: true\nlistener_filters: [{{name: p, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol}}}}]\n{ECHO}"
        );
        let refused = Proxy::start().compile("l", &proxy_protocol).unwrap_err();
        assert!(refused.contains("use_original_dst"), "{refused}");
    }
}
