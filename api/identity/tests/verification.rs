//! What is believed and what is not: certificates made for the purpose, handshakes in memory.
#![cfg(test)]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io;
use std::sync::Arc;
use std::time::Duration;

use lateen_identity::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use lateen_identity::rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use lateen_identity::{
    BundleError, ClientAuth, PeerError, PeerMatch, SpiffeClientVerifier, SpiffeId,
    SpiffeServerVerifier, Svid, SvidCell, SvidError, Trust, TrustBundle, TrustDomain,
    client_config, peer_identity, server_config,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};

struct Root {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Root {
    fn new(uri: Option<&str>) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = uri
            .map(|uri| SanType::URI(uri.try_into().unwrap()))
            .into_iter()
            .collect();
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    fn bundle(&self, domain: &str) -> Arc<TrustBundle> {
        Arc::new(TrustBundle::from_pem(domain.parse().unwrap(), &self.pem).unwrap())
    }

    fn sign(&self, params: &CertificateParams) -> (CertificateDer<'static>, KeyPair) {
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().into(), key)
    }

    fn svid(&self, id: &str) -> Svid {
        let (leaf, key) = self.sign(&leaf(&[id]));
        let domain = id.parse::<SpiffeId>().unwrap().trust_domain().to_string();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Svid::new(vec![leaf], key, self.bundle(&domain)).unwrap()
    }
}

fn leaf(uris: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = uris
        .iter()
        .map(|uri| SanType::URI((*uri).try_into().unwrap()))
        .collect();
    params
}

fn domain() -> TrustDomain {
    "td".parse().unwrap()
}

const ID: &str = "spiffe://td/ns/a/sa/b";

#[test]
fn a_leaf_has_exactly_one_identity() {
    let root = Root::new(None);
    let identity = |params: &CertificateParams| peer_identity(&[root.sign(params).0]);
    assert_eq!(identity(&leaf(&[ID])).unwrap().to_string(), ID);
    let mut dns = leaf(&[ID]);
    dns.subject_alt_names
        .push(SanType::DnsName("x.example".try_into().unwrap()));
    assert_eq!(
        identity(&dns).unwrap().to_string(),
        ID,
        "names of other types are allowed"
    );

    assert_eq!(identity(&leaf(&[])), Err(PeerError::UriNames(0)));
    assert_eq!(identity(&leaf(&[ID, ID])), Err(PeerError::UriNames(2)));
    assert_eq!(
        identity(&leaf(&[ID, "https://x"])),
        Err(PeerError::UriNames(2))
    );
    assert!(matches!(
        identity(&leaf(&["https://td/ns/a/sa/b"])),
        Err(PeerError::Id(_))
    ));
    assert!(matches!(
        identity(&leaf(&["spiffe://td/ns/a/sa/b\0x"])),
        Err(PeerError::Id(_))
    ));
    assert_eq!(identity(&leaf(&["spiffe://td"])), Err(PeerError::NoPath));
    assert_eq!(peer_identity(&[]), Err(PeerError::Absent));
    assert_eq!(
        peer_identity(&[CertificateDer::from(vec![0x30, 0])]),
        Err(PeerError::Malformed)
    );
}

#[test]
fn signing_certificates_are_no_identities() {
    let root = Root::new(None);
    let mut ca = leaf(&[ID]);
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    assert_eq!(
        peer_identity(&[root.sign(&ca).0]),
        Err(PeerError::SigningCertificate)
    );
    for usage in [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign] {
        let mut signing = leaf(&[ID]);
        signing.key_usages = vec![KeyUsagePurpose::DigitalSignature, usage];
        assert_eq!(
            peer_identity(&[root.sign(&signing).0]),
            Err(PeerError::SigningCertificate)
        );
    }
}

#[test]
fn a_root_vouches_for_its_own_domain_only() {
    let (ours, theirs) = (Root::new(None), Root::new(None));
    let bundle = TrustBundle::default()
        .with("td".parse().unwrap(), &ours.pem)
        .unwrap()
        .with("other".parse().unwrap(), &theirs.pem)
        .unwrap();
    let now = UnixTime::now();
    let verify = |root: &Root, id: &str| {
        let chain = [root.sign(&leaf(&[id])).0];
        (
            bundle.verify_client(&chain, now).is_ok(),
            bundle.verify_server(&chain, now).is_ok(),
        )
    };
    assert_eq!(verify(&ours, ID), (true, true));
    assert_eq!(verify(&theirs, "spiffe://other/ns/a/sa/b"), (true, true));
    assert_eq!(
        verify(&theirs, ID),
        (false, false),
        "their root, our domain"
    );
    assert_eq!(
        verify(&ours, "spiffe://third/ns/a/sa/b"),
        (false, false),
        "nobody's domain"
    );
}

#[test]
fn time_and_purpose_count() {
    let root = Root::new(None);
    let bundle = root.bundle("td");
    let now = UnixTime::now();
    let mut expired = leaf(&[ID]);
    expired.not_after = rcgen::date_time_ymd(2020, 1, 1);
    assert!(bundle.verify_client(&[root.sign(&expired).0], now).is_err());
    let then = UnixTime::since_unix_epoch(Duration::from_secs(1_500_000_000));
    assert!(bundle.verify_client(&[root.sign(&expired).0], then).is_ok());
    let mut server_only = leaf(&[ID]);
    server_only.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let chain = [root.sign(&server_only).0];
    assert!(bundle.verify_server(&chain, now).is_ok());
    assert!(bundle.verify_client(&chain, now).is_err());
}

#[test]
fn bundles_describe_themselves_or_not() {
    let (named, unnamed) = (Root::new(Some("spiffe://td")), Root::new(None));
    let described = TrustBundle::from_described_pem(&named.pem).unwrap();
    assert_eq!(described.trust_domains().collect::<Vec<_>>(), [&domain()]);
    assert!(matches!(
        TrustBundle::from_described_pem(&unnamed.pem),
        Err(BundleError::Domain(_))
    ));
    assert!(matches!(
        TrustBundle::from_pem(domain(), ""),
        Err(BundleError::Empty)
    ));
    assert!(matches!(
        TrustBundle::from_pem(domain(), &unnamed.pem.repeat(200)),
        Err(BundleError::TooMany)
    ));
}

#[test]
fn an_svid_is_whole_or_refused() {
    let (root, other) = (Root::new(None), Root::new(None));
    let svid = root.svid(ID);
    let again = Svid::from_pem(&svid.chain_pem(), &svid.key_pem(), root.bundle("td")).unwrap();
    assert_eq!(
        (again.spiffe_id(), again.serial()),
        (svid.spiffe_id(), svid.serial())
    );
    let foreign = Svid::from_pem(&svid.chain_pem(), &svid.key_pem(), other.bundle("td"));
    assert!(matches!(foreign, Err(SvidError::Untrusted(_))));
    let key = KeyPair::generate().unwrap().serialize_pem();
    let mismatched = Svid::from_pem(&svid.chain_pem(), &key, root.bundle("td"));
    assert!(matches!(mismatched, Err(SvidError::Key(_))));
    assert!(matches!(
        Svid::from_pem("", &key, root.bundle("td")),
        Err(SvidError::Leaf(PeerError::Absent))
    ));
    let printed = format!("{svid:?}");
    assert!(
        printed.contains("***") && !printed.contains("PRIVATE"),
        "{printed}"
    );
    let mut named = leaf(&[ID]);
    named.distinguished_name.push(DnType::CommonName, "x");
    let (leaf, key) = root.sign(&named);
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    Svid::new(vec![leaf], key, root.bundle("td")).unwrap();
}

/// One handshake in memory; whether both sides were satisfied.
fn handshake(client: ClientConfig, server: ServerConfig) -> io::Result<Option<SpiffeId>> {
    let name = ServerName::try_from("ignored.example").unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name).map_err(io::Error::other)?;
    let mut server = ServerConnection::new(Arc::new(server)).map_err(io::Error::other)?;
    while client.is_handshaking()
        || server.is_handshaking()
        || client.wants_write()
        || server.wants_write()
    {
        let mut wire = Vec::new();
        client.write_tls(&mut wire)?;
        server.read_tls(&mut &wire[..])?;
        server.process_new_packets().map_err(io::Error::other)?;
        wire.clear();
        server.write_tls(&mut wire)?;
        client.read_tls(&mut &wire[..])?;
        client.process_new_packets().map_err(io::Error::other)?;
    }
    Ok(server
        .peer_certificates()
        .map(|chain| peer_identity(chain).unwrap()))
}

fn server(svid: Svid, auth: ClientAuth, trust: Trust) -> ServerConfig {
    let verifier = SpiffeClientVerifier::new(trust, PeerMatch::AnyTrusted, auth);
    server_config(SvidCell::holding(Arc::new(svid)), verifier, &[])
}

#[test]
fn handshakes_are_by_identity() {
    let (root, other) = (Root::new(None), Root::new(None));
    let trust = || Trust::Fixed(root.bundle("td"));
    let (client_id, server_id) = ("spiffe://td/ns/a/sa/client", "spiffe://td/ns/a/sa/server");
    let client = |svid: Option<Svid>, expected: PeerMatch| {
        let verifier = SpiffeServerVerifier::new(trust(), expected);
        match svid {
            Some(svid) => client_config(Some(SvidCell::holding(Arc::new(svid))), verifier, &[]),
            None => client_config(None, verifier, &[]),
        }
    };
    let required = || server(root.svid(server_id), ClientAuth::Required, trust());
    let optional = || server(root.svid(server_id), ClientAuth::Optional, trust());
    let right = || PeerMatch::id(server_id.parse().unwrap());

    let got = handshake(client(Some(root.svid(client_id)), right()), required()).unwrap();
    assert_eq!(got.unwrap().to_string(), client_id);
    assert_eq!(handshake(client(None, right()), optional()).unwrap(), None);
    assert!(
        handshake(client(None, right()), required()).is_err(),
        "no certificate"
    );
    let foreign = other.svid(client_id);
    assert!(
        handshake(client(Some(foreign), right()), optional()).is_err(),
        "shown certificates must verify"
    );

    let matching = |expected| handshake(client(None, expected), optional()).is_ok();
    assert!(matching(PeerMatch::TrustDomain(domain())));
    assert!(!matching(PeerMatch::TrustDomain("other".parse().unwrap())));
    assert!(!matching(PeerMatch::id(client_id.parse().unwrap())));
    assert!(!matching(PeerMatch::Ids(Arc::new([]))));
    assert!(matching(PeerMatch::Predicate(Arc::new(|id| id
        .service_account()
        == Some("server")))));
    let impostor = server(other.svid(server_id), ClientAuth::Optional, trust());
    assert!(
        handshake(client(None, right()), impostor).is_err(),
        "another root"
    );
}

#[test]
fn without_roots_nobody_is_let_in() {
    let root = Root::new(None);
    let empty = || Trust::Live(SvidCell::empty());
    let verifier = SpiffeServerVerifier::new(empty(), PeerMatch::AnyTrusted);
    let config = server(root.svid(ID), ClientAuth::Optional, empty());
    assert!(handshake(client_config(None, verifier, &[]), config).is_err());
}
