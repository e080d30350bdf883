//! What Envoy's configuration says: attributes as call metadata, context extensions, custom tags or descriptor
//! entries. Pilot writes them, but it is Envoy that sends them; so what a caller says of itself has to agree with
//! its certificate and with what Pilot knows of that workload.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use lateen_adapter::workload::Workloads as _;
use lateen_engine::{
    AttributeTable, Bag, Text, Value, ValueType, parse_duration, parse_timestamp, wire,
};
use lateen_identity::SpiffeId;
use lateen_protocols::istio::mixer::v1::Attributes;
use lateen_service::tls::PeerIdentity;
use prost::Message as _;
use tonic::metadata::{KeyAndValueRef, MetadataMap};

use crate::workloads::WorkloadView;

/// Call metadata of this prefix are attributes: `mixer-attribute-destination.uid: kubernetes://a.default`.
const PREFIX: &str = "mixer-attribute-";
/// Most attributes that are read of one call or entry.
const MAX_CLAIMS: usize = 256;
/// Most bytes of forwarded attributes that are read.
const MAX_FORWARDED_BYTES: usize = 8 * 1024;

pub(super) const REPORTER_UID: &str = "context.reporter.uid";
pub(super) const REPORTER_KIND: &str = "context.reporter.kind";

/// Attributes that one proxy believes another about.
const FORWARDED: [&str; 6] = [
    "source.uid",
    "source.namespace",
    "destination.service.name",
    "destination.service.uid",
    "destination.service.host",
    "destination.service.namespace",
];

/// Attributes that are seen, never said.
const FACTS: &[&str] = &[
    "request.",
    "response.",
    "connection.",
    "check.",
    "quota.",
    "rbac.",
    "origin.",
    "source.principal",
    "source.user",
    "source.ip",
    "source.port",
    "destination.principal",
    "context.protocol",
    "context.time",
    "context.proxy_error_code",
];

/// Attributes by name, as they are said. The later word counts.
#[derive(Debug, Default)]
pub(super) struct Claims<'a>(BTreeMap<&'a str, &'a str>);

impl<'a> Claims<'a> {
    /// Those in the metadata of a call.
    pub(super) fn of_call(metadata: &'a MetadataMap) -> Self {
        let mut claims = Self::default();
        for entry in metadata.iter() {
            if let KeyAndValueRef::Ascii(key, value) = entry
                && let Some(name) = key.as_str().strip_prefix(PREFIX)
                && let Ok(value) = value.to_str()
            {
                claims.add(name, value);
            }
        }
        claims
    }

    /// Adds one, unless it is about something that only a fact can tell.
    pub(super) fn add(&mut self, name: &'a str, value: &'a str) {
        let is_fact = FACTS.iter().any(|fact| match fact.ends_with('.') {
            true => name.starts_with(fact),
            false => name == *fact,
        });
        if !is_fact && self.0.len() < MAX_CLAIMS {
            self.0.insert(name, value);
        }
    }

    /// Adds one that nothing has been said about.
    pub(super) fn add_default(&mut self, name: &'a str, value: &'a str) {
        if !self.0.contains_key(name) {
            self.add(name, value);
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).copied()
    }

    pub(super) fn is_outbound(&self) -> bool {
        self.get(REPORTER_KIND) == Some("outbound")
    }

    /// Puts them into a bag, by the types that the vocabulary gives them. What has no such type is left out.
    pub(super) fn fill(&self, bag: &mut Bag) {
        for (name, text) in &self.0 {
            put_text(bag, name, text);
        }
        if !self.0.contains_key(REPORTER_KIND) {
            put(bag, REPORTER_KIND, "inbound");
        }
    }
}

/// Sets an attribute that the vocabulary has.
pub(super) fn put(bag: &mut Bag, name: &str, value: impl Into<Value>) {
    if let Some(slot) = bag.table().slot(name) {
        bag.set(slot, value.into());
    }
}

/// Sets an attribute from its text, by the type it has in the vocabulary.
pub(super) fn put_text(bag: &mut Bag, name: &str, text: &str) {
    if let Some(value) = bag.table().value_type(name).and_then(|ty| parse(ty, text)) {
        put(bag, name, value);
    }
}

fn parse(ty: ValueType, text: &str) -> Option<Value> {
    match ty {
        ValueType::Int64 => text.parse().ok().map(Value::Int64),
        ValueType::Double => text.parse().ok().map(Value::Double),
        ValueType::Bool => text.parse().ok().map(Value::Bool),
        ValueType::IpAddress => {
            let ip: std::net::IpAddr = text.parse().ok()?;
            Some(Value::Ip(ip.to_canonical()))
        }
        ValueType::Timestamp => parse_timestamp(text).ok().map(Value::Timestamp),
        ValueType::Duration => parse_duration(text).map(Value::Duration),
        ValueType::StringMap => None,
        ValueType::String | ValueType::EmailAddress | ValueType::Uri | ValueType::DnsName => {
            Value::from_text(ty, Text::from(text))
        }
    }
}

/// Puts into `bag` what the proxy before, whose verified identity is `peer`, says: believed only about a workload
/// of its own identity.
pub(super) fn fill_forwarded(
    bag: &mut Bag,
    header: &str,
    peer: Option<&SpiffeId>,
    workloads: &WorkloadView,
) {
    let Some(peer) = peer.filter(|_| header.len() <= MAX_FORWARDED_BYTES) else {
        return;
    };
    let Some(plain) = BASE64
        .decode(header)
        .ok()
        .and_then(|bytes| Attributes::decode(bytes.as_slice()).ok())
    else {
        return;
    };
    let all: Vec<(String, Value)> = wire::from_plain(&plain)
        .into_iter()
        .filter(|(name, value)| FORWARDED.contains(&name.as_str()) && value.as_str().is_some())
        .collect();
    let said = |name: &str| {
        let (_, value) = all.iter().find(|(known, _)| known == name)?;
        value.as_str()
    };
    let is_honest = said("source.uid").is_none_or(|uid| is_of(uid, peer, workloads))
        && said("source.namespace").is_none_or(|name| peer.namespace() == Some(name));
    if is_honest {
        for (name, value) in all {
            put(bag, &name, value);
        }
    }
}

/// Whether a workload with this uid may have this identity: the namespace is the same, and the service account too
/// if Pilot knows the workload.
fn is_of(uid: &str, identity: &SpiffeId, workloads: &WorkloadView) -> bool {
    let namespace = uid
        .strip_prefix("kubernetes://")
        .and_then(|rest| rest.rsplit_once('.'))
        .map(|(_, namespace)| namespace);
    if namespace.is_none() || namespace != identity.namespace() {
        return false;
    }
    workloads
        .by_uid(uid)
        .is_none_or(|known| identity.service_account() == Some(&known.service_account))
}

/// Who calls: the identity that its certificate has proved, if the port asks for one.
#[derive(Debug)]
pub(super) struct Caller(Option<SpiffeId>);

impl Caller {
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Self {
        let peer = lateen_service::tls::peer(request);
        Self(peer.and_then(PeerIdentity::spiffe_id).cloned())
    }

    /// Checks what the caller says of itself. On the port without TLS nobody has an identity, and everybody is
    /// believed, as everybody is there by `istio.mixer.v1`.
    ///
    /// # Errors
    /// It says that it is somebody else.
    pub(super) fn vouch(
        &self,
        claims: &Claims<'_>,
        workloads: &WorkloadView,
    ) -> Result<(), String> {
        let Some(identity) = &self.0 else {
            return Ok(());
        };
        let (uid, namespace) = if claims.is_outbound() {
            ("source.uid", "source.namespace")
        } else {
            ("destination.uid", "destination.namespace")
        };
        for name in [REPORTER_UID, uid] {
            if let Some(uid) = claims.get(name)
                && !is_of(uid, identity, workloads)
            {
                return Err(format!("{identity} may not report as {uid}"));
            }
        }
        if let Some(said) = claims.get(namespace)
            && identity.namespace() != Some(said)
        {
            return Err(format!("{identity} is not of namespace {said}"));
        }
        Ok(())
    }
}

/// An empty bag with these claims in it.
pub(super) fn bag(table: &AttributeTable, claims: &Claims<'_>) -> Bag {
    let mut bag = Bag::new(table);
    claims.fill(&mut bag);
    bag
}

#[cfg(test)]
mod tests {
    use super::*;
    use lateen_adapter::workload::Workload;
    use lateen_protocols::istio::mixer::v1::attributes::{AttributeValue, attribute_value};

    fn view() -> WorkloadView {
        let view = WorkloadView::default();
        view.replace([Workload {
            uid: "kubernetes://pay-1.bank".into(),
            namespace: "bank".into(),
            service_account: "pay".into(),
            ..Workload::default()
        }]);
        view
    }

    fn id(account: &str) -> SpiffeId {
        format!("spiffe://cluster.local/ns/bank/sa/{account}")
            .parse()
            .unwrap()
    }

    fn forwarded(entries: &[(&str, &str)]) -> String {
        let attributes = entries
            .iter()
            .map(|(name, value)| {
                let value = attribute_value::Value::StringValue((*value).to_owned());
                ((*name).to_owned(), AttributeValue { value: Some(value) })
            })
            .collect();
        BASE64.encode(Attributes { attributes }.encode_to_vec())
    }

    #[test]
    fn a_caller_speaks_for_its_own_workload_only() {
        let view = view();
        for (account, kind, name, value, is_fine) in [
            (
                "pay",
                "inbound",
                "destination.uid",
                "kubernetes://pay-1.bank",
                true,
            ),
            (
                "pay",
                "inbound",
                "destination.uid",
                "kubernetes://new-1.bank",
                true,
            ),
            (
                "shop",
                "inbound",
                "destination.uid",
                "kubernetes://pay-1.bank",
                false,
            ),
            (
                "pay",
                "inbound",
                "destination.uid",
                "kubernetes://pay-1.other",
                false,
            ),
            ("pay", "inbound", "destination.uid", "pay", false),
            ("pay", "inbound", "destination.namespace", "other", false),
            ("pay", "outbound", "destination.namespace", "other", true),
            (
                "pay",
                "outbound",
                "destination.uid",
                "kubernetes://x.other",
                true,
            ),
            (
                "pay",
                "outbound",
                "source.uid",
                "kubernetes://x.other",
                false,
            ),
            (
                "shop",
                "outbound",
                REPORTER_UID,
                "kubernetes://pay-1.bank",
                false,
            ),
        ] {
            let mut claims = Claims::default();
            claims.add(REPORTER_KIND, kind);
            claims.add(name, value);
            let told = Caller(Some(id(account))).vouch(&claims, &view);
            assert_eq!(
                told.is_ok(),
                is_fine,
                "{account} {kind} {name} {value}: {told:?}"
            );
            assert!(Caller(None).vouch(&claims, &view).is_ok(), "without TLS");
        }
    }

    #[test]
    fn facts_cannot_be_claimed() {
        let mut claims = Claims::default();
        for name in [
            "source.principal",
            "source.user",
            "request.headers",
            "source.ip",
            "connection.mtls",
        ] {
            claims.add(name, "x");
        }
        claims.add("destination.port", "9080");
        claims.add("destination.ip", "::ffff:10.0.0.1");
        claims.add("no.such.attribute", "x");
        let bag = bag(&AttributeTable::default_vocabulary(), &claims);
        let names: Vec<_> = bag.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), 3, "{names:?}");
        assert_eq!(
            bag.get_by_name("destination.port"),
            Some(&Value::Int64(9080))
        );
        assert_eq!(
            bag.get_by_name("destination.ip"),
            Some(&Value::Ip([10, 0, 0, 1].into()))
        );
        assert_eq!(
            bag.get_by_name(REPORTER_KIND),
            Some(&Value::string("inbound"))
        );
    }

    #[test]
    fn another_proxy_is_believed_only_about_its_own_workloads() {
        let view = view();
        let believed = |peer: Option<&SpiffeId>, header: &str| {
            let mut bag = Bag::new(&AttributeTable::default_vocabulary());
            fill_forwarded(&mut bag, header, peer, &view);
            bag.iter()
                .map(|(name, _)| name.to_owned())
                .collect::<Vec<_>>()
        };
        let honest = forwarded(&[
            ("source.uid", "kubernetes://pay-1.bank"),
            ("source.principal", "admin"),
        ]);
        assert_eq!(believed(Some(&id("pay")), &honest), ["source.uid"]);
        assert!(
            believed(Some(&id("shop")), &honest).is_empty(),
            "another account"
        );
        assert!(believed(None, &honest).is_empty(), "no certificate");
        let foreign = forwarded(&[
            ("source.namespace", "other"),
            ("destination.service.name", "b"),
        ]);
        assert!(believed(Some(&id("pay")), &foreign).is_empty());
        assert!(believed(Some(&id("pay")), "%%%").is_empty());
    }
}
