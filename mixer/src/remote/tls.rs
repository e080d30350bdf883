//! TLS towards an adapter: whose certificate is taken, and which one is shown.

use std::sync::Arc;

use lateen_identity::{
    PeerMatch, SpiffeId, SpiffeServerVerifier, Trust, TrustBundle, peer_identity, provider,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
};

use super::{channel::TlsSettings, credentials::Material};
use crate::config::remote::handler::{Authentication, Mutual, Tls};

/// The roots that everybody trusts, where Debian keeps them (Envoy and Istio look there too).
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";
/// How a name says that it is an identity.
const SPIFFE: &str = "spiffe://";

/// The settings for `HOST:PORT` by the configuration and the files it names; `None`: no TLS. `protocol` is what ALPN
/// offers.
pub(super) fn settings(
    authentication: &Authentication,
    material: &Material,
    address: &str,
    protocol: &[u8],
) -> Result<Option<TlsSettings>, String> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let (server_name, client) = match authentication {
        Authentication::Plain => return Ok(None),
        Authentication::Tls(Tls { server_name, .. }) => (server_name.clone(), None),
        Authentication::Mutual(Mutual { server_name, .. }) => {
            let chain = chain(&material.chain)?;
            let key = PrivateKeyDer::from_pem_slice(&material.key)
                .map_err(|error| format!("privateKey is no PEM of a key: {error}"))?;
            // Mixer's adapters have Mixer's own identity, if nothing else is said, and if it has one.
            let own = peer_identity(&chain).ok().map(|id| id.to_string());
            let name = match server_name.as_str() {
                "" => own.unwrap_or_default(),
                name => name.to_owned(),
            };
            (name, Some((chain, key)))
        }
    };
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let dns_name = match server_name.as_str() {
        name if name.is_empty() || name.starts_with(SPIFFE) => host.to_owned(),
        name => name.to_owned(),
    };
    let name = ServerName::try_from(dns_name.clone())
        .map_err(|_| format!("{dns_name:?} is no name that a certificate can have"))?;
    let builder = if server_name.starts_with(SPIFFE) {
        let id: SpiffeId = server_name
            .parse()
            .map_err(|error| format!("serverName {server_name}: {error}"))?;
        let Some(roots) = &material.roots else {
            return Err(format!(
                "caCertificates must say who vouches for {server_name}; no public authority does"
            ));
        };
        let pem = std::str::from_utf8(roots).map_err(|_| "caCertificates is no PEM".to_owned())?;
        let bundle = TrustBundle::from_pem(id.trust_domain().clone(), pem)
            .map_err(|error| format!("caCertificates: {error}"))?;
        let verifier = SpiffeServerVerifier::new(Trust::Fixed(Arc::new(bundle)), PeerMatch::id(id));
        builder
            .dangerous()
            .with_custom_certificate_verifier(verifier)
    } else {
        builder.with_root_certificates(roots(material)?)
    };
    let mut config = match client {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => builder
            .with_client_auth_cert(chain, key)
            .map_err(|error| format!("clientCertificate and privateKey: {error}"))?,
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    let config = Arc::new(config);
    Ok(Some(TlsSettings { config, name }))
}

/// For requests over HTTP/1.1 to `host`, whose certificate is by the same authorities.
pub(super) fn https(material: &Material, host: &str) -> Result<TlsSettings, String> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots(material)?)
        .with_no_client_auth();
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| format!("{host:?} is no name that a certificate can have"))?;
    Ok(TlsSettings {
        config: Arc::new(config),
        name,
    })
}

fn chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let chain = chain.map_err(|error| format!("clientCertificate is no PEM: {error}"))?;
    match chain.as_slice() {
        [] => Err("clientCertificate has no certificate".to_owned()),
        _ => Ok(chain),
    }
}

/// Those that the configuration names, or else the system's.
fn roots(material: &Material) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    match &material.roots {
        Some(pem) => {
            for root in CertificateDer::pem_slice_iter(pem) {
                let root = root.map_err(|error| format!("caCertificates is no PEM: {error}"))?;
                store
                    .add(root)
                    .map_err(|error| format!("caCertificates: {error}"))?;
            }
        }
        None => {
            let pem = std::fs::read(SYSTEM_ROOTS).map_err(|error| {
                format!("there are no caCertificates, and {SYSTEM_ROOTS}: {error}")
            })?;
            let all = CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok);
            // Among so many there are some that rustls does not take.
            store.add_parsable_certificates(all);
        }
    }
    if store.is_empty() {
        return Err("caCertificates has no certificate".to_owned());
    }
    Ok(store)
}
