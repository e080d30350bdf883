//! The question `envoy.service.auth.v3.CheckRequest`, written straight from the request's head: no maps, no
//! strings, one buffer. Envoy: `CheckRequestUtils::createHttpCheck`.

use std::{net::SocketAddr, time::UNIX_EPOCH};

use prost::Message as _;

use super::Question;
use crate::{
    format::url_encoded_pem,
    head::{Headers, Known, Name},
    info::TlsInfo,
    proto::wire::{bytes, message, number},
};

/// Says whether the body in the question is all of it.
pub(super) const PARTIAL_BODY: &str = "x-envoy-auth-partial-body";

/// Writes the question.
pub(super) fn check_request(question: &Question<'_>, out: &mut Vec<u8>) {
    // CheckRequest.attributes
    message(out, 1, |out| {
        message(out, 1, |out| source(question, out));
        message(out, 2, |out| destination(question, out));
        message(out, 4, |out| {
            message(out, 1, |out| time(question, out));
            message(out, 2, |out| http(question, out));
        });
        for (key, value) in question.extensions {
            message(out, 10, |out| entry(out, key.as_bytes(), value.as_bytes()));
        }
        message(out, 11, |out| {
            for (filter, fields) in &question.metadata {
                message(out, 1, |out| {
                    text(out, 1, filter.as_bytes());
                    text(out, 2, &fields.encode_to_vec());
                });
            }
        });
        message(out, 13, |_| {});
        let name = question.connection.tls.as_ref();
        let name = name.and_then(|tls| tls.server_name.as_deref());
        if let Some(name) = name.filter(|_| question.include_tls_session) {
            message(out, 12, |out| text(out, 1, name.as_bytes()));
        }
    });
}

fn source(question: &Question<'_>, out: &mut Vec<u8>) {
    address(out, question.remote);
    let service = Name::new("x-envoy-downstream-service-cluster");
    if let Some(service) = question.head.headers.get(&service) {
        text(out, 2, service);
    }
    if let Some(tls) = &question.connection.tls {
        text(out, 4, peer_name(tls).as_bytes());
        if let Some(der) = tls
            .peer_certificate_der
            .as_ref()
            .filter(|_| question.include_peer_certificate)
        {
            text(out, 5, url_encoded_pem(der).as_bytes());
        }
    }
}

/// URI SAN, else DNS SAN, else subject.
fn peer_name(tls: &TlsInfo) -> &str {
    tls.peer_uri_san
        .as_ref()
        .or(tls.peer_dns_sans.first())
        .or(tls.peer_subject.as_ref())
        .map_or("", |name| name)
}

fn destination(question: &Question<'_>, out: &mut Vec<u8>) {
    address(out, question.connection.local);
    if let Some(tls) = &question.connection.tls {
        let name = tls.local_uri_san.as_ref().or(tls.local_subject.as_ref());
        text(out, 4, name.map_or("", |name| name).as_bytes());
    }
}

/// `Peer.address.socket_address`.
fn address(out: &mut Vec<u8>, address: SocketAddr) {
    message(out, 1, |out| {
        message(out, 1, |out| {
            message(out, 2, |out| {
                use std::io::Write as _;
                // Writing to memory does not fail.
                drop(write!(out, "{}", address.ip()));
            });
            number(out, 3, u64::from(address.port()));
        });
    });
}

fn time(question: &Question<'_>, out: &mut Vec<u8>) {
    let since = question
        .started
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    number(out, 1, since.as_secs());
    number(out, 2, u64::from(since.subsec_nanos()));
}

fn http(question: &Question<'_>, out: &mut Vec<u8>) {
    let head = question.head;
    message(out, 1, |out| {
        use std::io::Write as _;
        drop(write!(out, "{}", question.id));
    });
    text(out, 2, &head.method);
    let field = if question.raw_headers { 13 } else { 3 };
    question.headers(|name, value| {
        if question.raw_headers {
            // HeaderMap.headers: key, raw_value
            message(out, field, |out| {
                message(out, 1, |out| {
                    text(out, 1, name);
                    bytes(out, 3, value);
                });
            });
        } else {
            message(out, field, |out| entry(out, name, value));
        }
    });
    text(out, 4, &head.path);
    text(out, 5, &head.authority);
    text(out, 6, &head.scheme);
    number(out, 9, question.size);
    text(out, 10, head.protocol.as_str().as_bytes());
    if let Some(body) = &question.body {
        match question.body_as_bytes {
            true => bytes(out, 12, &body.data),
            false => text(out, 11, &body.data),
        }
    }
}

/// Calls `see` for each header that the question may show, values of the same name joined.
pub(super) fn each_header(
    headers: &Headers,
    mut shown: impl FnMut(&[u8]) -> bool,
    mut see: impl FnMut(&[u8], &[u8]),
) {
    let mut joined = Vec::new();
    for (index, (name, value)) in headers.iter().enumerate() {
        if name.as_bytes() == PARTIAL_BODY.as_bytes() || !shown(name.as_bytes()) {
            continue;
        }
        if headers
            .iter()
            .take(index)
            .any(|(earlier, _)| earlier == name)
        {
            continue;
        }
        let separator: &[u8] = match name.known() {
            Some(Known::Cookie) => b"; ",
            _ => b",",
        };
        let mut more = headers
            .iter()
            .skip(index + 1)
            .filter(|(later, _)| *later == name)
            .map(|(_, value)| value)
            .peekable();
        if more.peek().is_none() {
            see(name.as_bytes(), value);
            continue;
        }
        joined.clear();
        joined.extend_from_slice(value);
        for value in more {
            joined.extend_from_slice(separator);
            joined.extend_from_slice(value);
        }
        see(name.as_bytes(), &joined);
    }
}

/// An entry of a map of texts.
fn entry(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    text(out, 1, key);
    text(out, 2, value);
}

/// A string field; what is not UTF-8 becomes `!`, as Envoy's `sanitizeUtf8String` has it.
fn text(out: &mut Vec<u8>, field: u32, value: &[u8]) {
    if std::str::from_utf8(value).is_ok() {
        bytes(out, field, value);
        return;
    }
    let mut clean = Vec::with_capacity(value.len());
    for chunk in value.utf8_chunks() {
        clean.extend_from_slice(chunk.valid().as_bytes());
        clean.extend(chunk.invalid().iter().map(|_| b'!'));
    }
    bytes(out, field, &clean);
}
