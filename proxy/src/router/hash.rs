//! The value consistent-hash balancers go by, and the cookie that keeps a client where it is.

use std::net::SocketAddr;

use bytes::Bytes;

use crate::{
    balance::xxh64,
    head::RequestHead,
    route::{
        matcher::{cookie, joined, query_parameter},
        policy::{HashKey, HashPolicy},
    },
};

/// What the policies gave.
#[derive(Debug, Default)]
pub(super) struct Hashed {
    pub(super) hash: Option<u64>,
    /// `set-cookie` for clients that had none.
    pub(super) set_cookie: Option<Bytes>,
}

pub(super) fn of(
    policies: &[HashPolicy],
    head: &RequestHead,
    remote: SocketAddr,
    local: SocketAddr,
) -> Hashed {
    let mut hashed = Hashed::default();
    for policy in policies {
        let value = match &policy.key {
            HashKey::Header(name, rewrite) => {
                joined(&head.headers, name).map(|value| match rewrite {
                    Some(rewrite) => xxh64(&rewrite.apply(&value), 0),
                    None => xxh64(&value, 0),
                })
            }
            HashKey::SourceIp => Some(xxh64(remote.ip().to_string().as_bytes(), 0)),
            HashKey::Query(name) => head
                .query()
                .and_then(|query| query_parameter(query, name.as_bytes()))
                .map(|value| xxh64(value, 0)),
            HashKey::Cookie {
                name,
                ttl,
                path,
                attributes,
            } => match (cookie(&head.headers, name), ttl) {
                (Some(value), _) => Some(xxh64(value, 0)),
                (None, None) => None,
                (None, Some(ttl)) => {
                    // Envoy: the addresses of the connection, so that it is the same until the client
                    // comes back with the cookie.
                    let value = xxh64(format!("{remote}{local}").as_bytes(), 0);
                    let value = format!("{value:016x}");
                    let mut text = format!("{name}=\"{value}\"");
                    if !ttl.is_zero() {
                        text.push_str(&format!("; Max-Age={}", ttl.as_secs()));
                    }
                    if !path.is_empty() {
                        text.push_str(&format!("; Path={path}"));
                    }
                    for (key, value) in attributes {
                        text.push_str("; ");
                        text.push_str(key);
                        if !value.is_empty() {
                            text.push('=');
                            text.push_str(value);
                        }
                    }
                    text.push_str("; HttpOnly");
                    hashed.set_cookie = Some(text.into());
                    Some(xxh64(value.as_bytes(), 0))
                }
            },
        };
        if let Some(value) = value {
            // Envoy: rotating the old value keeps the order of the policies in the result.
            hashed.hash = Some(hashed.hash.map_or(value, |old| old.rotate_left(1) ^ value));
            if policy.terminal {
                break;
            }
        }
    }
    hashed
}
