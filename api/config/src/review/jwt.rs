//! Tokens: where they are read from, and the keys that verify them.

use serde_json::Value;

use super::{At, Check, text};

pub(super) fn rule(check: &mut Check<'_>, at: &At<'_>) {
    if at.str("issuer").is_empty() {
        check.error(&at.get("issuer"), "missing; it is required");
    }
    if !at.str("jwksUri").is_empty() {
        jwks_uri(check, &at.get("jwksUri"));
    }
    if !at.str("jwks").is_empty() {
        key_set(check, &at.get("jwks"));
    }
    if !at.str("jwks").is_empty() && !at.str("jwksUri").is_empty() {
        check.error(&at.get("jwksUri"), "jwks and jwksUri exclude each other");
    }
    for output in at.get("outputClaimToHeaders").items() {
        let header = output.get("header");
        if !header.text().is_empty() && !text::is_header_name(header.text()) {
            check.error(&header, format!("{:?} is not a header name", header.text()));
        } else if header.text().is_empty() && !header.is_set() {
            check.error(&header, "missing; it is required");
        }
    }
    check.duration(&at.get("timeout"));
}

/// The `jwt` of an older Policy.
pub(super) fn older(check: &mut Check<'_>, at: &At<'_>) {
    if at.str("issuer").is_empty() {
        check.error(&at.get("issuer"), "missing; it is required");
    }
    for name in ["audiences", "jwtHeaders", "jwtParams"] {
        for item in at.get(name).items() {
            if item.text().is_empty() {
                check.error(&item, "may not be empty");
            }
        }
    }
    if !at.str("jwksUri").is_empty() {
        jwks_uri(check, &at.get("jwksUri"));
    }
    for rule in at.get("triggerRules").items() {
        for path in rule
            .get("excludedPaths")
            .items()
            .chain(rule.get("includedPaths").items())
        {
            let matcher = ["exact", "prefix", "suffix", "regex"]
                .into_iter()
                .find(|name| path.has(name));
            match matcher {
                Some("regex") => check.regex(&path.get("regex")),
                Some(name) if path.str(name).is_empty() => {
                    check.error(&path.get(name), "may not be empty")
                }
                Some(_) => {}
                None => check.error(&path, "one of exact, prefix, suffix and regex is required"),
            }
        }
    }
}

fn jwks_uri(check: &mut Check<'_>, at: &At<'_>) {
    let good =
        text::url_parts(at.text()).is_some_and(|(scheme, _, _)| matches!(scheme, "http" | "https"));
    if !good {
        check.error(
            at,
            format!("{:?} is not an http:// or https:// URL", at.text()),
        );
    }
}

/// RFC 7517: a set of keys, or one key.
fn key_set(check: &mut Check<'_>, at: &At<'_>) {
    let set: Value = match serde_json::from_str(at.text()) {
        Ok(set) => set,
        Err(error) => {
            check.error(at, format!("not JSON: {error}"));
            return;
        }
    };
    let keys = match set.get("keys") {
        Some(Value::Array(keys)) => keys.clone(),
        Some(_) => {
            check.error(at, "keys must be a list");
            return;
        }
        None => vec![set],
    };
    for (index, key) in keys.iter().enumerate() {
        let member = |name: &str| {
            key.get(name)
                .and_then(Value::as_str)
                .is_some_and(|text| !text.is_empty())
        };
        let (kind, needed): (&str, &[&str]) = match key.get("kty").and_then(Value::as_str) {
            Some("RSA") => ("RSA", &["n", "e"]),
            Some("EC") => ("EC", &["crv", "x", "y"]),
            Some("OKP") => ("OKP", &["crv", "x"]),
            Some("oct") => ("oct", &["k"]),
            _ => {
                check.error(
                    at,
                    format!("key {index} has no kty that is one of RSA, EC, OKP, oct"),
                );
                continue;
            }
        };
        if let Some(missing) = needed.iter().find(|name| !member(name)) {
            check.error(at, format!("key {index} ({kind}) has no {missing}"));
        }
        if key.get("d").is_some() || kind == "oct" {
            check.warn(at, format!("key {index} holds a private key; everybody who reads the configuration can forge tokens: publish the public part only"));
        }
    }
}
