//! `x-forwarded-client-cert` of a peer, and a certificate whose names are arbitrary, in every mode.
#![no_main]

use bytes::Bytes;
use lateen_protocols::envoy::{
    envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
        ForwardClientCertDetails as Mode, SetCurrentClientCertDetails,
    },
    google::protobuf::BoolValue,
};
use libfuzzer_sys::fuzz_target;
use proxy::{
    head::{Headers, Known, Name},
    http::cert::forward,
    info::TlsInfo,
};

fuzz_target!(|data: &[u8]| {
    // What the peer sent, its URI, its subject, its certificate.
    let mut lines = data.splitn(4, |byte| *byte == b'\n');
    let mut next = || lines.next().unwrap_or_default();
    let (sent, uri, subject, der) = (next(), next(), next(), next());
    let text = |bytes: &[u8]| Some(String::from_utf8_lossy(bytes).as_ref().into());
    let tls = TlsInfo {
        peer_uri_san: text(uri),
        peer_subject: text(subject),
        peer_certificate_der: (!der.is_empty()).then(|| Bytes::copy_from_slice(der)),
        ..TlsInfo::default()
    };
    let details = SetCurrentClientCertDetails {
        cert: true,
        uri: true,
        dns: true,
        subject: Some(BoolValue { value: true }),
        ..SetCurrentClientCertDetails::default()
    };
    for mode in [
        Mode::Sanitize,
        Mode::ForwardOnly,
        Mode::AppendForward,
        Mode::SanitizeSet,
        Mode::AlwaysForwardOnly,
    ] {
        let mut headers = Headers::default();
        headers.append(Known::XForwardedClientCert, Bytes::copy_from_slice(sent));
        forward(mode, &details, Some(&tls), &mut headers);
        let name = Name::Known(Known::XForwardedClientCert);
        let all: Vec<_> = headers.all(&name).collect();
        assert!(all.len() <= 1);
        // A peer without a certificate says nothing about itself, unless that is what was asked for.
        if der.is_empty() && mode != Mode::AlwaysForwardOnly {
            assert!(all.is_empty());
        }
    }
});
