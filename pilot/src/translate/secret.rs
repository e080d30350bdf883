//! Secrets that listeners and clusters name, for nodes that have proven who they are.
//!
//! A node gets what its own configuration names, from its own namespace, on a stream whose certificate says that
//! it is of that namespace: as in Istio, who may read the Secrets of a namespace may run its gateway, and the
//! other way round. What Gateway API objects name comes from any namespace that grants it: the grants are judged where
//! those objects are read ([`crate::gateway_api`]), and hold for the pods behind their Services.

use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source::Specifier};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret, TlsCertificate, secret,
};
use lateen_config::Secret as Material;

use super::{Resources, Scope};

const SCHEME: &str = "kubernetes://";
const AUTHORITIES: &str = "-cacert";
/// Schemes of names with a namespace, that Gateway API objects use.
const GATEWAY_SCHEME: &str = "kubernetes-gateway://";
const CONFIG_MAP_SCHEME: &str = "configmap://";

/// Name of the resource with certificate and key of a Secret.
pub(super) fn certificate_name(secret: &str) -> String {
    if secret.contains("://") {
        secret.to_owned()
    } else {
        format!("{SCHEME}{secret}")
    }
}

/// Name of the resource with the authorities that go with a Secret: those of the Secret `NAME-cacert`, or of
/// the Secret itself.
pub(super) fn authorities_name(secret: &str) -> String {
    let name = certificate_name(secret);
    if name.ends_with(AUTHORITIES) {
        name
    } else {
        format!("{name}{AUTHORITIES}")
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
    if let Some(text) = name.strip_prefix(CONFIG_MAP_SCHEME) {
        return authorities_in_config_map(scope, name, text);
    }
    if let Some(text) = name.strip_prefix(GATEWAY_SCHEME) {
        return of_gateway(scope, name, text);
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

/// A Secret that a Gateway API object names.
fn of_gateway(scope: &Scope<'_>, name: &str, text: &str) -> Result<Secret, String> {
    let is_authorities = text.ends_with(AUTHORITIES);
    let base = text.strip_suffix(AUTHORITIES).unwrap_or(text);
    granted(scope, &format!("{GATEWAY_SCHEME}{base}"))?;
    let (namespace, secret) = base.split_once('/').unwrap_or_default();
    let material = scope.snapshot.secret(namespace, secret);
    let r#type = if is_authorities {
        authorities(material).ok_or_else(|| format!("no Secret {base} with ca.crt"))?
    } else {
        certificate(material).ok_or_else(|| format!("no Secret {base} with tls.crt and tls.key"))?
    };
    Ok(Secret {
        name: name.to_owned(),
        r#type: Some(r#type),
    })
}

/// Authorities in a ConfigMap: no secret, but only those that an object in use names are given out.
fn authorities_in_config_map(scope: &Scope<'_>, name: &str, text: &str) -> Result<Secret, String> {
    let base = text.strip_suffix(AUTHORITIES).unwrap_or(text);
    granted(scope, &format!("{CONFIG_MAP_SCHEME}{base}"))?;
    let (namespace, map) = base.split_once('/').unwrap_or_default();
    let pem = scope
        .snapshot
        .config_map_text(namespace, map, "ca.crt")
        .ok_or_else(|| format!("no ConfigMap {base} with ca.crt"))?;
    Ok(Secret {
        name: name.to_owned(),
        r#type: Some(secret::Type::ValidationContext(
            CertificateValidationContext {
                trusted_ca: inline(pem),
                ..Default::default()
            },
        )),
    })
}

fn granted(scope: &Scope<'_>, credential: &str) -> Result<(), String> {
    if scope.snapshot.may_have(&scope.node.namespace, credential) {
        Ok(())
    } else {
        Err(format!(
            "no Gateway or policy that stands gives it to pods of namespace {}",
            scope.node.namespace
        ))
    }
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
