//! Names of clusters and what is read back from them. Istio's, to the letter: operators grep for them.

/// Cluster of connections to nowhere.
pub(super) const BLACK_HOLE: &str = "BlackHoleCluster";
/// Cluster of connections to where the client wanted.
pub(super) const PASSTHROUGH: &str = "PassthroughCluster";
/// The same for inbound connections to ports nobody declared.
pub(super) const INBOUND_PASSTHROUGH: &str = "InboundPassthroughCluster";
/// Filter chain of connections to a port's listener that are for none of its services.
pub(super) const PASSTHROUGH_CHAIN: &str = "PassthroughFilterChain";
/// Route configuration of the outbound HTTP proxy listener.
pub(super) const HTTP_PROXY: &str = "http_proxy";

/// Cluster of destinations that lead nowhere, because they are not there or not allowed. There is none of that name.
pub(super) const NOWHERE: &str = "UnknownService";

/// `outbound|PORT|SUBSET|HOST`.
pub(super) fn outbound(port: u16, subset: &str, host: &str) -> String {
    format!("outbound|{port}|{subset}|{host}")
}

/// `inbound|PORT||`.
pub(super) fn inbound(port: u16) -> String {
    format!("inbound|{port}||")
}

/// `outbound_.PORT_.SUBSET_.HOST`: the SNI of mesh mTLS.
pub(super) fn sni(port: u16, subset: &str, host: &str) -> String {
    format!("outbound_.{port}_.{subset}_.{host}")
}

/// An outbound cluster's name in parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outbound<'a> {
    pub(super) port: u16,
    pub(super) subset: &'a str,
    pub(super) host: &'a str,
}

impl<'a> Outbound<'a> {
    pub(super) fn parse(name: &'a str) -> Option<Self> {
        let mut parts = name.splitn(4, '|');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("outbound"), Some(port), Some(subset), Some(host)) => Some(Self {
                port: port.parse().ok()?,
                subset,
                host,
            }),
            _ => None,
        }
    }
}
