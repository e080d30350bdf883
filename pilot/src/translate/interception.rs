//! Where a node's traffic enters and leaves: the one seam between iptables and none.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::model::{Interception, Node};

/// Port of the outbound HTTP proxy listener unless the node names one.
const HTTP_PROXY_PORT: u16 = 15002;

/// How traffic reaches a sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Traffic {
    /// The kernel sends it to one listener for each direction, which hands on by original destination.
    Redirected {
        /// With the client's address kept.
        transparent: bool,
    },
    /// The sidecar binds the ports it serves; the application is told where.
    Bound {
        /// Outbound listeners bind here.
        outbound: IpAddr,
        /// HTTP to any host goes to this port there.
        http_proxy_port: u16,
    },
}

impl Traffic {
    pub(super) fn of(node: &Node) -> Self {
        match node.interception {
            Interception::Redirect => Self::Redirected { transparent: false },
            Interception::Tproxy => Self::Redirected { transparent: true },
            Interception::None => Self::Bound {
                outbound: node
                    .outbound_bind
                    .unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
                http_proxy_port: node.http_proxy_port.unwrap_or(HTTP_PROXY_PORT),
            },
        }
    }

    /// Whether the address a client dialled is known.
    pub(super) fn knows_original_destination(self) -> bool {
        matches!(self, Self::Redirected { .. })
    }
}

/// Whether a node may bind a port for real: below 1024 it takes a privilege, which a node has only if it
/// says so (`UNPRIVILEGED_POD: "false"`). A listener that cannot be bound would be refused.
pub(super) fn may_bind(node: &Node, port: u16) -> bool {
    port >= 1024
        || node
            .metadata
            .get("UNPRIVILEGED_POD")
            .is_some_and(|text| text == "false")
}

/// Where the application listens for what comes to `port`; `None`: at the address that the client had meant.
pub(super) fn app_address(node: &Node, port: u16) -> Option<SocketAddr> {
    let named = node.app_ports.get(&port).copied();
    let beside = || SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    match Traffic::of(node) {
        Traffic::Redirected { .. } => named,
        Traffic::Bound { .. } => Some(named.unwrap_or_else(beside)),
    }
}

/// Where a gateway's listener binds unless its server says.
pub(super) fn gateway_bind(node: &Node) -> IpAddr {
    match node.interception {
        // Workloads share the machine: only its own address is free.
        Interception::None => node.ip(),
        Interception::Redirect | Interception::Tproxy => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    }
}

/// Source address of connections to other workloads. Without redirection workloads share a machine and its
/// routes; only by its own address can a client be told from another where there is no certificate.
pub(super) fn source_address(node: &Node) -> Option<IpAddr> {
    (node.interception == Interception::None && node.ip().is_loopback()).then(|| node.ip())
}
