//! Certificates of the TLS scenarios, and the load's side of TLS.

use std::{fs, path::Path, sync::Arc};

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{
    ClientConfig, RootCertStore,
    client::Resumption,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use crate::wire::SERVER_NAME;

/// A root that signs leaves into a folder: `NAME.pem` and `NAME.key`; its own is `root.pem`.
#[derive(Debug)]
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

/// Key of a leaf.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Key {
    P256,
    Rsa2048,
}

impl Authority {
    pub(crate) fn new(folder: &Path) -> anyhow::Result<Authority> {
        let mut root = CertificateParams::default();
        root.distinguished_name = name("root");
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        root.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        fs::write(folder.join("root.pem"), root.self_signed(&key)?.pem())?;
        Ok(Authority {
            issuer: Issuer::new(root, key),
        })
    }

    /// Signs a leaf for `spiffe://cluster.local/ns/default/sa/NAME`, and for the scenarios' server name.
    pub(crate) fn sign(&self, folder: &Path, leaf: &str, key: Key) -> anyhow::Result<()> {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = name(leaf);
        let id = format!("spiffe://cluster.local/ns/default/sa/{leaf}");
        parameters.subject_alt_names = vec![
            SanType::DnsName(SERVER_NAME.try_into()?),
            SanType::URI(id.try_into()?),
        ];
        parameters.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        parameters.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = match key {
            Key::P256 => KeyPair::generate()?,
            Key::Rsa2048 => {
                KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048)?
            }
        };
        let certificate = parameters.signed_by(&key, &self.issuer)?;
        fs::write(folder.join(format!("{leaf}.pem")), certificate.pem())?;
        fs::write(folder.join(format!("{leaf}.key")), key.serialize_pem())?;
        Ok(())
    }
}

fn name(common: &str) -> DistinguishedName {
    let mut all = DistinguishedName::new();
    all.push(DnType::CommonName, common);
    all
}

/// The load's TLS: full handshakes only, and one cipher and one group for every proxy, so that what
/// differs is the implementation and not the choice.
pub(crate) fn client(
    folder: &Path,
    certificate: Option<&str>,
    protocol: &str,
) -> anyhow::Result<Arc<ClientConfig>> {
    let mut provider = aws_lc_rs::default_provider();
    provider
        .cipher_suites
        .retain(|suite| suite.suite() == rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
        .kx_groups
        .retain(|group| group.name() == rustls::NamedGroup::X25519);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(folder.join("root.pem"))?)?;
    let builder = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots);
    let mut config = match certificate {
        Some(leaf) => builder.with_client_auth_cert(
            vec![CertificateDer::from_pem_file(
                folder.join(format!("{leaf}.pem")),
            )?],
            PrivateKeyDer::from_pem_file(folder.join(format!("{leaf}.key")))
                .context("no private key")?,
        )?,
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    Ok(Arc::new(config))
}
