//! Format strings from configuration, written for a request whose parts are the same bytes.
#![no_main]

use std::rc::Rc;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use proxy::{
    format::{Facts, Format},
    head::{Headers, Known, Name, Protocol, RequestHead, ResponseHead},
    info::{ConnectionInfo, StreamInfo},
};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(format) = Format::text(text, text.len() % 2 == 0) else {
        return;
    };
    let bytes = Bytes::copy_from_slice(data);
    let mut headers = Headers::default();
    headers.append(Known::XRequestId, bytes.clone());
    headers.append(Name::new("a"), bytes.clone());
    let request = RequestHead {
        method: bytes.clone(),
        scheme: "http".into(),
        authority: bytes.clone(),
        path: bytes.clone(),
        protocol: Protocol::Http11,
        headers: headers.clone(),
    };
    let response = ResponseHead {
        status: 200,
        headers,
    };
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], 80));
    let connection = ConnectionInfo {
        id: 1,
        remote: address,
        direct_remote: address,
        local: address,
        local_restored: false,
        tls: None,
        requested_server_name: Some(text.into()),
        started: tokio::time::Instant::now(),
    };
    let info = StreamInfo::new(Rc::new(connection), Some(Protocol::Http11));
    let facts = Facts {
        request: Some(&request),
        response: Some(&response),
        ..Facts::of_connection(&info)
    };
    format.write(&facts, &mut Vec::new());
});
