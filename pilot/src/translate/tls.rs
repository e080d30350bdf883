//! TLS contexts: the mesh's own by SDS names `default` and `ROOTCA` from the agent, others by file or by the
//! name of a Secret, which comes from us ([`secret`]).

use envoy_types::pb::envoy::config::core::v3::{
    AggregatedConfigSource, ApiConfigSource, ApiVersion, ConfigSource, GrpcService,
    TransportSocket, api_config_source::ApiType, config_source::ConfigSourceSpecifier,
    grpc_service::EnvoyGrpc, grpc_service::TargetSpecifier, transport_socket,
};
use envoy_types::pb::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig,
    SubjectAltNameMatcher, TlsCertificate, TlsParameters, UpstreamTlsContext,
    common_tls_context::CombinedCertificateValidationContext,
    common_tls_context::ValidationContextType, subject_alt_name_matcher::SanType,
    tls_parameters::TlsProtocol,
};
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher;
use lateen_config::networking::{ClientTls, ServerTls, TlsMode};
use prost::{Message, Name};

use super::wire::{any, bool_value, exact, file, prefix};
use super::{Scope, secret};

/// Cluster of the agent's SDS server.
const SDS_CLUSTER: &str = "sds-grpc";

/// In place of a Secret's name: the proxy's own certificate.
const BUILTIN: &str = "builtin://";

/// Where a client without CA certificates of its own looks: the system's.
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";

/// What mesh clients offer, so that a permissive server tells them from other TLS clients, and what
/// mesh servers choose from. The real protocol must be among them: Envoy picks its codec by it.
pub(super) const MESH_HTTP1: &[&str] = &["istio-http/1.1", "istio", "http/1.1"];
pub(super) const MESH_HTTP2: &[&str] = &["istio-h2", "istio", "h2"];
pub(super) const MESH_TCP: &[&str] = &["istio"];
/// What marks a mesh client, including Istio's own.
pub(super) const MESH_MARKS: &[&str] = &[
    "istio",
    "istio-peer-exchange",
    "istio-http/1.0",
    "istio-http/1.1",
    "istio-h2",
];
/// Of those, what mesh clients of HTTP offer, and all others.
pub(super) const MESH_HTTP_MARKS: &[&str] = &["istio-http/1.0", "istio-http/1.1", "istio-h2"];
pub(super) const MESH_TCP_MARKS: &[&str] = &["istio", "istio-peer-exchange"];
pub(super) const SERVE_HTTP: &[&str] = &["h2", "http/1.1", "istio"];

fn socket<M: Message + Name>(name: &str, context: &M) -> TransportSocket {
    TransportSocket {
        name: name.to_owned(),
        config_type: Some(transport_socket::ConfigType::TypedConfig(any(context))),
    }
}

/// No TLS.
pub(super) fn plain() -> TransportSocket {
    socket("envoy.transport_sockets.raw_buffer", &RawBuffer {})
}

fn downstream(context: &DownstreamTlsContext) -> TransportSocket {
    socket("envoy.transport_sockets.tls", context)
}

fn upstream(context: &UpstreamTlsContext) -> TransportSocket {
    socket("envoy.transport_sockets.tls", context)
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

/// A secret the agent beside the proxy serves.
fn sds(name: &str) -> SdsSecretConfig {
    SdsSecretConfig {
        name: name.to_owned(),
        sds_config: Some(ConfigSource {
            initial_fetch_timeout: super::wire::ZERO,
            resource_api_version: ApiVersion::V3 as i32,
            config_source_specifier: Some(ConfigSourceSpecifier::ApiConfigSource(
                ApiConfigSource {
                    api_type: ApiType::Grpc as i32,
                    transport_api_version: ApiVersion::V3 as i32,
                    set_node_on_first_message_only: true,
                    grpc_services: vec![GrpcService {
                        target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
                            cluster_name: SDS_CLUSTER.to_owned(),
                            ..Default::default()
                        })),
                        ..Default::default()
                    }],
                    ..Default::default()
                },
            )),
            ..Default::default()
        }),
    }
}

/// The Secret that a user's `credentialName` names, on the stream that everything else comes by.
fn credential(scope: &Scope<'_>, name: String) -> SdsSecretConfig {
    scope.credentials.borrow_mut().insert(name.clone());
    SdsSecretConfig {
        name,
        sds_config: Some(ConfigSource {
            resource_api_version: ApiVersion::V3 as i32,
            config_source_specifier: Some(ConfigSourceSpecifier::Ads(
                AggregatedConfigSource::default(),
            )),
            ..Default::default()
        }),
    }
}

fn san(matcher: StringMatcher, san_type: SanType) -> SubjectAltNameMatcher {
    SubjectAltNameMatcher {
        san_type: san_type as i32,
        matcher: Some(matcher),
        ..Default::default()
    }
}

/// Names users list may be URIs or DNS names.
fn listed_san(name: &str) -> SubjectAltNameMatcher {
    san(
        exact(name),
        if name.contains("://") {
            SanType::Uri
        } else {
            SanType::Dns
        },
    )
}

fn mesh_context(sans: Vec<SubjectAltNameMatcher>, alpn: &[&str]) -> CommonTlsContext {
    CommonTlsContext {
        tls_params: Some(TlsParameters {
            tls_minimum_protocol_version: TlsProtocol::TlSv12 as i32,
            tls_maximum_protocol_version: TlsProtocol::TlSv13 as i32,
            ..Default::default()
        }),
        alpn_protocols: strings(alpn),
        tls_certificate_sds_secret_configs: vec![sds("default")],
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(
            CombinedCertificateValidationContext {
                default_validation_context: Some(CertificateValidationContext {
                    match_typed_subject_alt_names: sans,
                    ..Default::default()
                }),
                validation_context_sds_secret_config: Some(sds("ROOTCA")),
                ..Default::default()
            },
        )),
        ..Default::default()
    }
}

fn any_identity_of<'a>(trust_domains: impl Iterator<Item = &'a str>) -> Vec<SubjectAltNameMatcher> {
    trust_domains
        .map(|domain| san(prefix(format!("spiffe://{domain}/")), SanType::Uri))
        .collect()
}

/// mTLS that mesh clients of these trust domains pass.
pub(super) fn mesh_server<'a>(
    trust_domains: impl Iterator<Item = &'a str>,
    alpn: &[&str],
) -> TransportSocket {
    downstream(&DownstreamTlsContext {
        common_tls_context: Some(mesh_context(any_identity_of(trust_domains), alpn)),
        require_client_certificate: bool_value(true),
        ..Default::default()
    })
}

/// mTLS towards mesh servers that hold one of these identities; with none known, any of the mesh's.
pub(super) fn mesh_client<'a>(
    sni: &str,
    identities: &[String],
    trust_domains: impl Iterator<Item = &'a str>,
    alpn: &[&str],
) -> TransportSocket {
    let sans = if identities.is_empty() {
        any_identity_of(trust_domains)
    } else {
        identities
            .iter()
            .map(|identity| listed_san(identity))
            .collect()
    };
    upstream(&UpstreamTlsContext {
        common_tls_context: Some(mesh_context(sans, alpn)),
        sni: sni.to_owned(),
        ..Default::default()
    })
}

/// TLS towards a server outside of the mesh, as a DestinationRule says. `None`: no TLS.
pub(super) fn client(
    scope: &Scope<'_>,
    tls: &ClientTls,
    host: &str,
    identities: &[String],
    http2: bool,
) -> Option<TransportSocket> {
    if !matches!(tls.mode, TlsMode::Simple | TlsMode::Mutual) {
        return None;
    }
    let names = if tls.subject_alt_names.is_empty() {
        identities
    } else {
        &tls.subject_alt_names
    };
    let validation = CertificateValidationContext {
        match_typed_subject_alt_names: names.iter().map(|name| listed_san(name)).collect(),
        trusted_ca: file(match tls.ca_certificates.as_str() {
            "" => SYSTEM_ROOTS,
            path => path,
        }),
        crl: if tls.ca_crl.is_empty() {
            None
        } else {
            file(&tls.ca_crl)
        },
        ..Default::default()
    };
    let mut common = CommonTlsContext {
        alpn_protocols: strings(if http2 { &["h2"] } else { &[] }),
        ..Default::default()
    };
    if tls.credential_name.is_empty() {
        if tls.insecure_skip_verify != Some(true) {
            common.validation_context_type =
                Some(ValidationContextType::ValidationContext(validation));
        }
        if tls.mode == TlsMode::Mutual {
            common.tls_certificates = vec![certificate(&tls.client_certificate, &tls.private_key)];
        }
    } else {
        if tls.mode == TlsMode::Mutual {
            let name = secret::certificate_name(&tls.credential_name);
            common.tls_certificate_sds_secret_configs = vec![credential(scope, name)];
        }
        if tls.insecure_skip_verify != Some(true) {
            common.validation_context_type =
                Some(ValidationContextType::CombinedValidationContext(
                    CombinedCertificateValidationContext {
                        default_validation_context: Some(CertificateValidationContext {
                            trusted_ca: None,
                            ..validation
                        }),
                        validation_context_sds_secret_config: Some(credential(
                            scope,
                            secret::authorities_name(&tls.credential_name),
                        )),
                        ..Default::default()
                    },
                ));
        }
    }
    let sni = match tls.sni.as_str() {
        "" if host.starts_with('*') => "",
        "" => host,
        sni => sni,
    };
    Some(upstream(&UpstreamTlsContext {
        common_tls_context: Some(common),
        sni: sni.to_owned(),
        ..Default::default()
    }))
}

fn certificate(chain: &str, key: &str) -> TlsCertificate {
    TlsCertificate {
        certificate_chain: file(chain),
        private_key: file(key),
        ..Default::default()
    }
}

/// TLS of a gateway's server. `None`: it terminates nothing.
pub(super) fn gateway_server(
    scope: &Scope<'_>,
    tls: &ServerTls,
    http: bool,
) -> Option<TransportSocket> {
    let alpn: &[&str] = if http { &["h2", "http/1.1"] } else { &[] };
    let wants_client = match tls.mode.as_str() {
        "SIMPLE" => None,
        "MUTUAL" => Some(true),
        "OPTIONAL_MUTUAL" => Some(false),
        "ISTIO_MUTUAL" => {
            return Some(mesh_server(
                scope.trust_domains(),
                if http { SERVE_HTTP } else { MESH_TCP },
            ));
        }
        _ => return None,
    };
    let version = |name: &str, default| match name {
        "TLSV1_0" => TlsProtocol::TlSv10,
        "TLSV1_1" => TlsProtocol::TlSv11,
        "TLSV1_2" => TlsProtocol::TlSv12,
        "TLSV1_3" => TlsProtocol::TlSv13,
        _ => default,
    };
    let mut common = CommonTlsContext {
        alpn_protocols: strings(alpn),
        tls_params: Some(TlsParameters {
            tls_minimum_protocol_version: version(&tls.min_protocol_version, TlsProtocol::TlSv12)
                as i32,
            tls_maximum_protocol_version: version(&tls.max_protocol_version, TlsProtocol::TlsAuto)
                as i32,
            cipher_suites: tls.cipher_suites.clone(),
            ..Default::default()
        }),
        ..Default::default()
    };
    // Several are of different key types: TLS picks by what the client can verify.
    let secret_names: &[String] = match tls.credential_names.as_slice() {
        [] => std::slice::from_ref(&tls.credential_name),
        several => several,
    };
    let secret_name = secret_names.first().map_or("", String::as_str);
    if secret_name == BUILTIN {
        common.tls_certificate_sds_secret_configs = vec![sds("default")];
        return Some(downstream(&DownstreamTlsContext {
            common_tls_context: Some(common),
            require_client_certificate: bool_value(false),
            ..Default::default()
        }));
    }
    let sans = tls
        .subject_alt_names
        .iter()
        .map(|name| listed_san(name))
        .collect();
    if secret_name.is_empty() {
        common.tls_certificates = vec![certificate(&tls.server_certificate, &tls.private_key)];
        if wants_client.is_some() {
            common.validation_context_type = Some(ValidationContextType::ValidationContext(
                CertificateValidationContext {
                    trusted_ca: file(&tls.ca_certificates),
                    match_typed_subject_alt_names: sans,
                    verify_certificate_hash: tls.verify_certificate_hash.clone(),
                    verify_certificate_spki: tls.verify_certificate_spki.clone(),
                    ..Default::default()
                },
            ));
        }
    } else {
        common.tls_certificate_sds_secret_configs = secret_names
            .iter()
            .map(|name| credential(scope, secret::certificate_name(name)))
            .collect();
        if wants_client.is_some() {
            let authorities = match tls.ca_cert_credential_name.as_str() {
                "" => secret::authorities_name(secret_name),
                named => secret::authorities_name(named),
            };
            common.validation_context_type =
                Some(ValidationContextType::CombinedValidationContext(
                    CombinedCertificateValidationContext {
                        default_validation_context: Some(CertificateValidationContext {
                            match_typed_subject_alt_names: sans,
                            ..Default::default()
                        }),
                        validation_context_sds_secret_config: Some(credential(scope, authorities)),
                        ..Default::default()
                    },
                ));
        }
    }
    Some(downstream(&DownstreamTlsContext {
        common_tls_context: Some(common),
        require_client_certificate: bool_value(wants_client == Some(true)),
        ..Default::default()
    }))
}
