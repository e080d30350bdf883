//! `x-forwarded-client-cert`: what the connection manager tells the next hop about the client's certificate.

use std::{borrow::Cow, sync::Arc};

use bytes::Bytes;
use lateen_protocols::envoy::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    ForwardClientCertDetails as Mode, ForwardClientCertFormat as Format, SetCurrentClientCertDetails,
};
use rustls::pki_types::CertificateDer;
use serde_json::json;

use crate::{
    format::{pem, url_encoded_pem},
    head::{Headers, Known},
    info::TlsInfo,
    route::matcher::joined,
    tls::PeerCertificate,
};

/// Applies a mode to a request's headers. Only a verified certificate is spoken of.
pub fn forward(
    mode: Mode,
    details: &SetCurrentClientCertDetails,
    tls: Option<&TlsInfo>,
    headers: &mut Headers,
) {
    let mutual = tls.filter(|tls| tls.is_mutual());
    match mode {
        Mode::AlwaysForwardOnly => return,
        // Without mutual TLS anybody could have written the header.
        Mode::ForwardOnly if mutual.is_some() => return,
        Mode::Sanitize | Mode::ForwardOnly => {
            headers.take(Known::XForwardedClientCert);
            return;
        }
        Mode::SanitizeSet | Mode::AppendForward => {}
    }
    let earlier = joined(headers, &Known::XForwardedClientCert.into());
    let earlier = earlier.map(Cow::into_owned);
    headers.take(Known::XForwardedClientCert);
    let Some(tls) = mutual else {
        return;
    };
    let earlier = earlier.filter(|earlier| mode == Mode::AppendForward && !earlier.is_empty());
    // What others began goes on in their format.
    let as_json = match &earlier {
        Some(earlier) => earlier.starts_with(b"[") && earlier.ends_with(b"]"),
        None => details.format() == Format::Json,
    };
    let mut value = earlier.unwrap_or_default();
    if as_json {
        if value.pop().is_some() {
            value.push(b',');
        } else {
            value.push(b'[');
        }
        value.extend_from_slice(json(details, tls).as_bytes());
        value.push(b']');
    } else {
        let own = text(details, tls);
        if !value.is_empty() && !own.is_empty() {
            value.push(b',');
        }
        value.extend_from_slice(own.as_bytes());
    }
    if !value.is_empty() {
        headers.append(Known::XForwardedClientCert, value);
    }
}

/// Whether the subject is to be told.
fn tells_subject(details: &SetCurrentClientCertDetails) -> bool {
    details
        .subject
        .as_ref()
        .is_some_and(|subject| subject.value)
}

fn local_uris(tls: &TlsInfo) -> impl Iterator<Item = &str> {
    let uris = tls.local_uri_san.iter().chain(&tls.local_more_uri_sans);
    uris.map(AsRef::as_ref)
}

fn peer_uris(tls: &TlsInfo) -> impl Iterator<Item = &str> {
    let uris = tls.peer_uri_san.iter().chain(&tls.peer_more_uri_sans);
    uris.map(AsRef::as_ref)
}

/// The peer's certificates, its own first.
fn chain(tls: &TlsInfo) -> impl Iterator<Item = &Bytes> {
    tls.peer_certificate_der.iter().chain(&tls.peer_chain_der)
}

/// Who signed the peer's certificate; empty if that cannot be read.
fn issuer(tls: &TlsInfo) -> Arc<str> {
    let der = tls.peer_certificate_der.as_deref().unwrap_or_default();
    PeerCertificate::of(&CertificateDer::from(der))
        .map_or_else(|_| "".into(), |peer| peer.issuer.clone())
}

/// Names in RFC 2253's form have their quotes and backslashes escaped already.
fn text(details: &SetCurrentClientCertDetails, tls: &TlsInfo) -> String {
    let mut parts: Vec<String> = local_uris(tls).map(|uri| format!("By={uri}")).collect();
    if let Some(hash) = tls.peer_fingerprint.as_deref() {
        parts.push(format!("Hash={hash}"));
    }
    if details.cert
        && let Some(der) = &tls.peer_certificate_der
    {
        parts.push(format!("Cert=\"{}\"", url_encoded_pem(der)));
    }
    if details.chain {
        let pems: String = chain(tls).map(|der| url_encoded_pem(der)).collect();
        parts.push(format!("Chain=\"{pems}\""));
    }
    if tells_subject(details) {
        let subject = tls.peer_subject.as_deref().unwrap_or_default();
        parts.push(format!("Subject=\"{subject}\""));
    }
    if details.uri {
        let before = parts.len();
        parts.extend(peer_uris(tls).map(|uri| format!("URI={uri}")));
        if parts.len() == before {
            // Envoy writes the key even when the certificate has no URI.
            parts.push("URI=".to_owned());
        }
    }
    if details.dns {
        parts.extend(tls.peer_dns_sans.iter().map(|name| format!("DNS={name}")));
    }
    if details.issuer {
        parts.push(format!("Issuer=\"{}\"", issuer(tls)));
    }
    parts.join(";")
}

/// The same as an element of a JSON array, without the keys that have nothing to tell; in Envoy's order.
fn json(details: &SetCurrentClientCertDetails, tls: &TlsInfo) -> String {
    let leaf = tls.peer_certificate_der.as_deref();
    let dns = || tls.peer_dns_sans.iter().map(AsRef::as_ref);
    let fields = [
        ("by", json!(Vec::from_iter(local_uris(tls)))),
        ("hash", json!(tls.peer_fingerprint.as_deref())),
        ("cert", json!(leaf.filter(|_| details.cert).map(pem))),
        (
            "chain",
            json!(
                details
                    .chain
                    .then(|| Vec::from_iter(chain(tls).map(|der| pem(der))))
            ),
        ),
        (
            "subject",
            json!(
                tls.peer_subject
                    .as_deref()
                    .filter(|_| tells_subject(details))
            ),
        ),
        (
            "uri",
            json!(details.uri.then(|| Vec::from_iter(peer_uris(tls)))),
        ),
        (
            "dns",
            json!(details.dns.then(|| Vec::<&str>::from_iter(dns()))),
        ),
        (
            "issuer",
            json!(details.issuer.then(|| issuer(tls).to_string())),
        ),
    ];
    let told = fields.iter();
    let told = told.filter(|(_, value)| !value.is_null() && *value != json!([]));
    let told: Vec<String> = told
        .map(|(key, value)| format!("\"{key}\":{value}"))
        .collect();
    format!("{{{}}}", told.join(","))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use lateen_protocols::envoy::google::protobuf::BoolValue;

    use super::*;

    fn mutual() -> TlsInfo {
        TlsInfo {
            peer_uri_san: Some("spiffe://td/ns/a/sa/b".into()),
            peer_subject: Some("CN=\\\"x\\\"".into()),
            peer_fingerprint: Some("ab12".into()),
            peer_dns_sans: vec!["d.test".into()],
            peer_certificate_der: Some(Bytes::from_static(b"der")),
            local_uri_san: Some("spiffe://td/ns/a/sa/me".into()),
            ..TlsInfo::default()
        }
    }

    #[test]
    fn modes() {
        let details = SetCurrentClientCertDetails {
            subject: Some(BoolValue { value: true }),
            uri: true,
            dns: true,
            ..Default::default()
        };
        let own = "By=spiffe://td/ns/a/sa/me;Hash=ab12;Subject=\"CN=\\\"x\\\"\";URI=spiffe://td/ns/a/sa/b;DNS=d.test";
        let appended = format!("old,{own}");
        for (mode, tls, want) in [
            (Mode::Sanitize, true, None),
            (Mode::ForwardOnly, true, Some("old")),
            (Mode::ForwardOnly, false, None),
            (Mode::AppendForward, true, Some(appended.as_str())),
            (Mode::AppendForward, false, None),
            (Mode::SanitizeSet, true, Some(own)),
            (Mode::SanitizeSet, false, None),
            (Mode::AlwaysForwardOnly, false, Some("old")),
        ] {
            let mut headers = Headers::default();
            headers.append(Known::XForwardedClientCert, "old");
            let tls = tls.then(mutual);
            forward(mode, &details, tls.as_ref(), &mut headers);
            let got = headers
                .known(Known::XForwardedClientCert)
                .map(Bytes::copy_from_slice);
            assert_eq!(
                got,
                want.map(|text| Bytes::from(text.to_owned())),
                "{mode:?}"
            );
        }
    }

    #[test]
    fn what_was_begun_in_a_format_goes_on_in_it() {
        let details = SetCurrentClientCertDetails {
            chain: true,
            uri: true,
            issuer: true,
            ..Default::default()
        };
        let tls = TlsInfo {
            peer_more_uri_sans: vec!["spiffe://td/more".into()],
            peer_chain_der: vec![Bytes::from_static(b"up")],
            local_more_uri_sans: vec!["spiffe://td/too".into()],
            ..mutual()
        };
        let told = |format: Format, earlier: &str| {
            let mut details = details;
            details.format = format.into();
            let mut headers = Headers::default();
            headers.append(Known::XForwardedClientCert, earlier);
            forward(Mode::AppendForward, &details, Some(&tls), &mut headers);
            let value = headers.known(Known::XForwardedClientCert);
            String::from_utf8(value.unwrap_or_default().to_vec()).unwrap()
        };
        let chain = "-----BEGIN%20CERTIFICATE-----%0AZGVy%0A-----END%20CERTIFICATE-----%0A\
                     -----BEGIN%20CERTIFICATE-----%0AdXA%3D%0A-----END%20CERTIFICATE-----%0A";
        let text = format!(
            "By=spiffe://td/ns/a/sa/me;By=spiffe://td/too;Hash=ab12;Chain=\"{chain}\";\
             URI=spiffe://td/ns/a/sa/b;URI=spiffe://td/more;Issuer=\"\""
        );
        let json = r#"{"by":["spiffe://td/ns/a/sa/me","spiffe://td/too"],"hash":"ab12","chain":["-----BEGIN CERTIFICATE-----\nZGVy\n-----END CERTIFICATE-----\n","-----BEGIN CERTIFICATE-----\ndXA=\n-----END CERTIFICATE-----\n"],"uri":["spiffe://td/ns/a/sa/b","spiffe://td/more"],"issuer":""}"#;
        for (format, earlier, want) in [
            (Format::Json, "", format!("[{json}]")),
            (Format::Json, "By=x", format!("By=x,{text}")),
            (Format::Json, "[{\"by\"", format!("[{{\"by\",{text}")),
            (Format::Text, "", text.clone()),
            (Format::Text, "[{}]", format!("[{{}},{json}]")),
        ] {
            assert_eq!(told(format, earlier), want, "{format:?} {earlier}");
        }
    }
}
