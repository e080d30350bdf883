//! `x-forwarded-client-cert`: what the connection manager tells the next hop about the client's certificate.

use lateen_protocols::envoy::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    ForwardClientCertDetails as Mode, SetCurrentClientCertDetails,
};

use crate::{
    format::url_encoded_pem,
    head::{Headers, Known},
    info::TlsInfo,
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
    let earlier = headers.take(Known::XForwardedClientCert);
    let Some(tls) = mutual else {
        return;
    };
    let own = describe(details, tls);
    let value = match earlier.filter(|_| mode == Mode::AppendForward) {
        Some(earlier) if own.is_empty() => earlier,
        Some(earlier) => {
            let mut all = earlier.to_vec();
            all.push(b',');
            all.extend_from_slice(own.as_bytes());
            all.into()
        }
        None if own.is_empty() => return,
        None => own.into(),
    };
    headers.append(Known::XForwardedClientCert, value);
}

fn describe(details: &SetCurrentClientCertDetails, tls: &TlsInfo) -> String {
    let mut parts = Vec::new();
    if let Some(uri) = tls.local_uri_san.as_deref() {
        parts.push(format!("By={uri}"));
    }
    if let Some(hash) = tls.peer_fingerprint.as_deref() {
        parts.push(format!("Hash={hash}"));
    }
    if details.cert
        && let Some(der) = &tls.peer_certificate_der
    {
        parts.push(format!("Cert=\"{}\"", url_encoded_pem(der)));
    }
    if details
        .subject
        .as_ref()
        .is_some_and(|subject| subject.value)
    {
        let subject = tls.peer_subject.as_deref().unwrap_or_default();
        parts.push(format!(
            "Subject=\"{}\"",
            subject.replace('\\', "\\\\").replace('"', "\\\"")
        ));
    }
    if details.uri {
        // Envoy writes the key even when the certificate has no URI.
        parts.push(format!(
            "URI={}",
            tls.peer_uri_san.as_deref().unwrap_or_default()
        ));
    }
    if details.dns {
        parts.extend(tls.peer_dns_sans.iter().map(|name| format!("DNS={name}")));
    }
    parts.join(";")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use lateen_protocols::envoy::google::protobuf::BoolValue;

    use super::*;

    fn mutual() -> TlsInfo {
        TlsInfo {
            peer_uri_san: Some("spiffe://td/ns/a/sa/b".into()),
            peer_subject: Some("CN=\"x\"".into()),
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
}
