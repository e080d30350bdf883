//! A certificate authority for tests.

use envoy_types::pb::envoy::{
    config::core::v3::{DataSource, data_source::Specifier},
    extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, CommonTlsContext, DownstreamTlsContext,
        SubjectAltNameMatcher, TlsCertificate, TlsParameters, UpstreamTlsContext,
        common_tls_context::ValidationContextType, subject_alt_name_matcher::SanType,
        tls_parameters::TlsProtocol,
    },
    r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern},
};
use envoy_types::pb::google::protobuf::BoolValue;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType as Name};

pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// PEM of a chain and its key.
#[derive(Clone)]
pub(crate) struct Issued {
    pub(crate) chain: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new() -> Authority {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    pub(crate) fn issue(&self, uri: &str, dns: &[&str]) -> Issued {
        let names: Vec<String> = dns.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        if !uri.is_empty() {
            params
                .subject_alt_names
                .push(Name::URI(uri.try_into().unwrap()));
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Issued {
            chain: certificate.pem(),
            key: key.serialize_pem(),
        }
    }
}

pub(crate) fn inline(text: &str) -> Option<DataSource> {
    Some(DataSource {
        specifier: Some(Specifier::InlineString(text.into())),
        watched_directory: None,
    })
}

pub(crate) fn certificate(issued: &Issued) -> TlsCertificate {
    TlsCertificate {
        certificate_chain: inline(&issued.chain),
        private_key: inline(&issued.key),
        ..TlsCertificate::default()
    }
}

pub(crate) fn uri_is(uri: &str) -> SubjectAltNameMatcher {
    SubjectAltNameMatcher {
        san_type: SanType::Uri as i32,
        matcher: Some(StringMatcher {
            ignore_case: false,
            match_pattern: Some(MatchPattern::Exact(uri.into())),
        }),
        oid: String::new(),
    }
}

pub(crate) fn common(
    issued: Option<&Issued>,
    roots: Option<&str>,
    uris: &[&str],
    alpn: &[&str],
) -> CommonTlsContext {
    CommonTlsContext {
        tls_certificates: issued.map(certificate).into_iter().collect(),
        validation_context_type: roots.map(|roots| {
            ValidationContextType::ValidationContext(CertificateValidationContext {
                trusted_ca: inline(roots),
                match_typed_subject_alt_names: uris.iter().map(|uri| uri_is(uri)).collect(),
                ..CertificateValidationContext::default()
            })
        }),
        alpn_protocols: alpn.iter().map(ToString::to_string).collect(),
        // As between workloads; a client would stop at TLS 1.2 otherwise.
        tls_params: Some(TlsParameters {
            tls_maximum_protocol_version: TlsProtocol::TlSv13 as i32,
            ..TlsParameters::default()
        }),
        ..CommonTlsContext::default()
    }
}

pub(crate) fn downstream(common: CommonTlsContext, require: bool) -> DownstreamTlsContext {
    DownstreamTlsContext {
        common_tls_context: Some(common),
        require_client_certificate: Some(BoolValue { value: require }),
        ..DownstreamTlsContext::default()
    }
}

pub(crate) fn upstream(common: CommonTlsContext, sni: &str) -> UpstreamTlsContext {
    UpstreamTlsContext {
        common_tls_context: Some(common),
        sni: sni.into(),
        ..UpstreamTlsContext::default()
    }
}
