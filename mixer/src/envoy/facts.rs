//! What Envoy saw of a connection and a request.

use std::{collections::HashMap, net::IpAddr};

use chrono::{DateTime, Utc};
use lateen_adapter::workload::Workloads as _;
use lateen_engine::{Bag, StringMap, Text, Value};
use lateen_identity::SpiffeId;
use lateen_protocols::envoy::{
    envoy::config::core::v3::{Address, Metadata, address, socket_address::PortSpecifier},
    google::protobuf::{Timestamp, value::Kind},
};

use super::claims::{fill_forwarded, put};
use crate::workloads::WorkloadView;

/// Headers of Envoy's own, and the one that proxies talk to each other in.
const HIDDEN: [&str; 2] = ["x-istio-attributes", "x-envoy-auth-partial-body"];
/// Pseudo headers that are in `request.headers`.
const PSEUDO: [&str; 3] = [":authority", ":method", ":path"];

/// The two ends of a connection.
#[derive(Debug, Default)]
pub(super) struct Ends<'a> {
    /// Whether the client has shown a certificate.
    pub(super) is_mutual: bool,
    /// URI name in the client's certificate.
    pub(super) peer: Option<&'a str>,
    /// URI name in the own one.
    pub(super) local: Option<&'a str>,
    /// SNI.
    pub(super) server_name: &'a str,
    /// The client, as Envoy reckons it.
    pub(super) remote: Option<(IpAddr, u16)>,
    /// What the client's proxy says, `x-istio-attributes`.
    pub(super) forwarded: Option<&'a str>,
}

impl Ends<'_> {
    /// Puts into `bag` who is at the two ends.
    pub(super) fn fill(&self, bag: &mut Bag, workloads: &WorkloadView) {
        let id = |name: Option<&str>| name.and_then(|name| name.parse::<SpiffeId>().ok());
        let peer = id(self.peer);
        if let Some(header) = self.forwarded {
            fill_forwarded(bag, header, peer.as_ref(), workloads);
        }
        put(bag, "connection.mtls", self.is_mutual);
        let principal = |id: &SpiffeId| id.to_string().trim_start_matches("spiffe://").to_owned();
        if let Some(peer) = peer.as_ref().map(principal) {
            put(bag, "source.user", peer.as_str());
            put(bag, "source.principal", peer.as_str());
            if let Some(local) = id(self.local).as_ref().map(principal) {
                put(bag, "destination.principal", local.as_str());
            }
        }
        if !self.server_name.is_empty() {
            put(bag, "connection.requested_server_name", self.server_name);
        }
        if let Some((ip, _)) = self.remote {
            put(bag, "origin.ip", ip);
            if !is_borrowed(ip, peer.as_ref(), workloads) {
                put(bag, "source.ip", ip);
            }
        }
    }
}

/// Whether an address is that of a workload with another identity than the client has proved. Envoy takes the
/// client's address from `x-forwarded-for`, which the client has written.
fn is_borrowed(ip: IpAddr, peer: Option<&SpiffeId>, workloads: &WorkloadView) -> bool {
    let (Some(peer), Some(known)) = (peer, workloads.by_ip(ip)) else {
        return false;
    };
    peer.namespace() != Some(&known.namespace)
        || peer.service_account() != Some(&known.service_account)
}

/// The head of a request.
#[derive(Debug, Default)]
pub(super) struct Head<'a> {
    pub(super) method: &'a str,
    pub(super) scheme: &'a str,
    pub(super) authority: &'a str,
    /// With the query.
    pub(super) path: &'a str,
    pub(super) headers: HashMap<String, String>,
}

impl Head<'_> {
    /// Puts it into `bag`; gives its headers.
    pub(super) fn fill(self, bag: &mut Bag) -> StringMap {
        let header = |name: &str| self.headers.get(name).map(String::as_str);
        let is_grpc = header("content-type").is_some_and(|kind| {
            kind.strip_prefix("application/grpc")
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', ';']))
        });
        put(
            bag,
            "context.protocol",
            if is_grpc { "grpc" } else { "http" },
        );
        let (url_path, query) = match self.path.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (self.path, None),
        };
        for (name, value) in [
            ("request.method", self.method),
            ("request.scheme", self.scheme),
            ("request.host", self.authority),
            ("request.path", self.path),
            ("request.url_path", url_path),
        ] {
            put(bag, name, value);
        }
        for (name, key) in [
            ("request.useragent", "user-agent"),
            ("request.referer", "referer"),
            ("request.id", "x-request-id"),
        ] {
            if let Some(value) = header(key).filter(|value| !value.is_empty()) {
                put(bag, name, value);
            }
        }
        if let Some(query) = query {
            put(bag, "request.query_params", query_params(query));
        }
        let values = [self.authority, self.method, self.path];
        let pseudo = PSEUDO
            .iter()
            .zip(values)
            .map(|(name, value)| (Text::from(*name), Text::from(value)));
        let ordinary = self
            .headers
            .iter()
            .filter(|(name, _)| !name.starts_with(':') && !HIDDEN.contains(&name.as_str()))
            .map(|(name, value)| (Text::from(name.as_str()), Text::from(value.as_str())));
        let headers = StringMap::new(pseudo.chain(ordinary));
        put(bag, "request.headers", headers.clone());
        headers
    }
}

/// Decoded parameters of a query; of several with one name the first, as our proxy has it.
fn query_params(query: &str) -> StringMap {
    let mut all: Vec<(Text, Text)> = url::form_urlencoded::parse(query.as_bytes())
        .map(|(name, value)| (Text::from(&*name), Text::from(&*value)))
        .collect();
    all.reverse(); // of equal keys the last one counts
    StringMap::new(all)
}

/// IP address and port.
pub(super) fn socket(address: Option<&Address>) -> Option<(IpAddr, u16)> {
    let Some(address::Address::SocketAddress(socket)) = address?.address.as_ref() else {
        return None;
    };
    let port = match socket.port_specifier {
        Some(PortSpecifier::PortValue(port)) => u16::try_from(port).unwrap_or_default(),
        _ => 0,
    };
    let ip: IpAddr = socket.address.parse().ok()?;
    Some((ip.to_canonical(), port))
}

/// An instant, if it is one.
pub(super) fn instant(time: Option<&Timestamp>) -> Option<DateTime<Utc>> {
    let time = time?;
    DateTime::from_timestamp(time.seconds, u32::try_from(time.nanos).ok()?)
}

/// Text in dynamic metadata.
pub(super) fn told<'a>(
    metadata: Option<&'a Metadata>,
    namespace: &str,
    key: &str,
) -> Option<&'a str> {
    match metadata?
        .filter_metadata
        .get(namespace)?
        .fields
        .get(key)?
        .kind
        .as_ref()?
    {
        Kind::StringValue(text) => Some(text),
        _ => None,
    }
}

/// The value of an attribute that is a map, as a request header is looked up.
pub(super) fn text_of<'a>(bag: &'a Bag, name: &str) -> Option<&'a str> {
    bag.get_by_name(name).and_then(Value::as_str)
}
