//! Secrets that listeners and clusters name, for nodes that have proven who they are.
//!
//! A node gets what its own configuration names, from its own namespace, on a stream whose certificate says that
//! it is of that namespace: as in Istio, who may read the Secrets of a namespace may run its gateway, and the
//! other way round.

use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source::Specifier};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret, TlsCertificate, secret,
};
use lateen_config::Secret as Material;

use super::{Resources, Scope};

const SCHEME: &str = "kubernetes://";
const AUTHORITIES: &str = "-cacert";

/// Name of the resource with certificate and key of a Secret.
pub(super) fn certificate_name(secret: &str) -> String {
    format!("{SCHEME}{secret}")
}

/// Name of the resource with the authorities that go with a Secret: those of the Secret `NAME-cacert`, or of
/// the Secret itself.
pub(super) fn authorities_name(secret: &str) -> String {
    match secret.strip_suffix(AUTHORITIES) {
        Some(_) => certificate_name(secret),
        None => format!("{SCHEME}{secret}{AUTHORITIES}"),
    }
}

/// Adds what has been asked for so far.
pub(super) fn all(scope: &Scope<'_>, resources: &mut Resources) {
    for name in scope.credentials.borrow().iter() {
        match one(scope, name) {
            Ok(secret) => {
                resources.secrets.insert(name.clone(), secret);
            }
            Err(reason) => resources.conflicts.push(format!("{name}: {reason}")),
        }
    }
}

fn one(scope: &Scope<'_>, name: &str) -> Result<Secret, String> {
    let namespace = &scope.node.namespace;
    if !scope.node.verified {
        return Err(
            "not given to a proxy without a certificate of the mesh; it must use the mTLS port"
                .into(),
        );
    }
    let wanted = name.strip_prefix(SCHEME).unwrap_or(name);
    let find = |wanted: &str| scope.snapshot.secret(namespace, wanted);
    let r#type = match wanted.strip_suffix(AUTHORITIES) {
        Some(base) => {
            let material = find(wanted)
                .filter(|material| material.authorities().is_some())
                .or_else(|| find(base));
            authorities(material).ok_or_else(|| {
                format!("no Secret {wanted} or {base} with ca.crt in namespace {namespace}")
            })?
        }
        None => certificate(find(wanted)).ok_or_else(|| {
            format!("no Secret {wanted} with tls.crt and tls.key in namespace {namespace}")
        })?,
    };
    Ok(Secret {
        name: name.to_owned(),
        r#type: Some(r#type),
    })
}

fn certificate(material: Option<&Material>) -> Option<secret::Type> {
    let material = material?;
    Some(secret::Type::TlsCertificate(TlsCertificate {
        certificate_chain: inline(material.certificate_chain()?),
        private_key: inline(material.private_key()?),
        ..Default::default()
    }))
}

fn authorities(material: Option<&Material>) -> Option<secret::Type> {
    let material = material?;
    Some(secret::Type::ValidationContext(
        CertificateValidationContext {
            trusted_ca: inline(material.authorities()?),
            crl: material.revoked().and_then(inline),
            ..Default::default()
        },
    ))
}

fn inline(pem: &str) -> Option<DataSource> {
    Some(DataSource {
        specifier: Some(Specifier::InlineBytes(pem.as_bytes().to_vec())),
        ..Default::default()
    })
}
