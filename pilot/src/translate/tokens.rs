//! RequestAuthentications, and the origins of older Policies, as the JWT filter: `envoy.filters.http.jwt_authn`.
//!
//! Keys are in the rule, or the proxy fetches them from a service of the mesh. Where neither is possible the
//! issuer has a key that is nobody's, so that its tokens are refused: a request never gets by on a token that
//! was not verified.

use envoy_types::pb::envoy::config::core::v3::{HttpUri, http_uri::HttpUpstreamType};
use envoy_types::pb::envoy::config::route::v3::{RouteMatch, route_match::PathSpecifier};
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::{
    JwksAsyncFetch, JwtAuthentication, JwtClaimToHeader, JwtHeader, JwtProvider, JwtRequirement,
    JwtRequirementAndList, JwtRequirementOrList, RemoteJwks, RequirementRule,
    jwt_provider::{JwksSourceSpecifier, NormalizePayload},
    jwt_requirement::RequiresType,
    requirement_rule::RequirementType,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;
use envoy_types::pb::google::protobuf::Empty;
use lateen_config::Duration;
use lateen_config::security::JwtRule;

use crate::model::{DNS_DOMAIN, TokenRule, full_host};

use super::Scope;
use super::http;
use super::wire::{duration, inline};

const FILTER: &str = "envoy.filters.http.jwt_authn";

/// Where the filter leaves a verified payload, in its own metadata. RBAC reads it there.
const PAYLOAD: &str = "payload";

/// Claims that are lists in a text. RFC 8693 §4.2; Istio has `permission` too.
const SPACE_DELIMITED: [&str; 2] = ["scope", "permission"];

/// To fetch keys within, unless the rule says.
const FETCH_TIMEOUT: Duration = Duration::from_millis(5_000);

/// Fetched keys are used for so long, then fetched again. Istio: the same for keys that proxies fetch.
const KEYS_LIFE: Duration = Duration::from_millis(300_000);

/// A public key whose private half was never kept: nothing is signed by it.
const NOBODYS_KEYS: &str = concat!(
    r#"{"keys":[{"kty":"RSA","kid":"nobody","e":"AQAB","n":""#,
    "2H4iBp6tAz1IQgq9P4PPDKNlp-FX6zOB2JKHmvjkwdKDeX5m4ZdXyLcPKOTCjzQREScQPiOYhcxxCCQBdoqYoaV0fSLs457hrPNmSKHtwE3DPF9X",
    "zLIAQFIIGvZCiAoaqEI5_QtxKT_DnRiUcJwXNZ-ajcT1KVf62woYbS3A_MzrM6Zc0krHO8-2EcoorcsqKVQxNF1HyzuLHHolgHHnjVyVKBy_7zc9",
    "y9AVTLyLTwlc1fxcATdAmWd24u_BjTRJMnrTFpZZ46E-GGPUCxTs6sopw4pe8fcZXPLSlb2Yxch-FX0k3-TXm0QDhCWwKx6LtjOqTEB7lC32lAP0",
    r#"_ldnDQ"}]}"#
);

/// The filter, if any tokens are of interest. `port` is the workload's own; none: any of a gateway's.
pub(super) fn http_filter(scope: &Scope<'_>, port: Option<u16>) -> Option<HttpFilter> {
    let found = scope
        .snapshot
        .token_rules(&scope.node.namespace, scope.labels(), port);
    if found.rules.is_empty() {
        return None;
    }
    let mut rules: Vec<&TokenRule> = found.rules.iter().collect();
    rules.sort_by(|a, b| a.rule.issuer.cmp(&b.rule.issuer));
    let name = |index: usize| format!("origins-{index}");
    let named: Vec<JwtRequirement> = (0..rules.len())
        .map(|index| requirement(RequiresType::ProviderName(name(index))))
        .collect();
    Some(http::named(
        FILTER,
        &JwtAuthentication {
            providers: rules
                .iter()
                .enumerate()
                .map(|(index, rule)| (name(index), provider(scope, rule)))
                .collect(),
            rules: vec![RequirementRule {
                r#match: Some(RouteMatch {
                    path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
                    ..Default::default()
                }),
                requirement_type: Some(RequirementType::Requires(if found.required {
                    any_of(named)
                } else {
                    none_or_good(named)
                })),
            }],
            // A browser asks beforehand without any credentials, and nothing is done for it.
            bypass_cors_preflight: !found.required,
            ..Default::default()
        },
    ))
}

/// No token, or good ones: one issuer's, or for several issuers each that is there.
fn none_or_good(named: Vec<JwtRequirement>) -> JwtRequirement {
    let missing = || requirement(RequiresType::AllowMissing(Empty::default()));
    if let [one] = named.as_slice() {
        return any_of(vec![one.clone(), missing()]);
    }
    let each = named
        .iter()
        .map(|one| any_of(vec![one.clone(), missing()]))
        .collect();
    let mut any = named;
    any.push(requirement(RequiresType::RequiresAll(
        JwtRequirementAndList { requirements: each },
    )));
    any_of(any)
}

fn any_of(requirements: Vec<JwtRequirement>) -> JwtRequirement {
    requirement(RequiresType::RequiresAny(JwtRequirementOrList {
        requirements,
    }))
}

fn requirement(of: RequiresType) -> JwtRequirement {
    JwtRequirement {
        requires_type: Some(of),
    }
}

fn provider(scope: &Scope<'_>, TokenRule { rule, origin, .. }: &TokenRule) -> JwtProvider {
    let keys = if rule.jwks.is_empty() {
        remote(scope, rule, &origin.namespace).unwrap_or_else(|why| {
            scope.note(format!(
                "{origin}: tokens of {:?} are refused: {why}",
                rule.issuer
            ));
            JwksSourceSpecifier::LocalJwks(inline(NOBODYS_KEYS).unwrap_or_default())
        })
    } else {
        JwksSourceSpecifier::LocalJwks(inline(key_set(&rule.jwks)).unwrap_or_default())
    };
    JwtProvider {
        issuer: rule.issuer.clone(),
        audiences: rule.audiences.clone(),
        forward: rule.forward_original_token,
        forward_payload_header: rule.output_payload_to_header.clone(),
        from_headers: rule
            .from_headers
            .iter()
            .map(|header| JwtHeader {
                name: header.name.clone(),
                value_prefix: header.prefix.clone(),
            })
            .collect(),
        from_params: rule.from_params.clone(),
        from_cookies: rule.from_cookies.clone(),
        payload_in_metadata: PAYLOAD.to_owned(),
        normalize_payload_in_metadata: Some(NormalizePayload {
            space_delimited_claims: SPACE_DELIMITED
                .into_iter()
                .map(str::to_owned)
                .chain(rule.space_delimited_claims.iter().cloned())
                .collect(),
        }),
        claim_to_headers: rule
            .output_claim_to_headers
            .iter()
            .map(|output| JwtClaimToHeader {
                header_name: output.header.clone(),
                claim_name: output.claim.clone(),
                ..Default::default()
            })
            .collect(),
        jwks_source_specifier: Some(keys),
        ..Default::default()
    }
}

/// One key may stand alone; proxies read sets only.
fn key_set(text: &str) -> String {
    match serde_json::from_str::<serde_json::Value>(text) {
        Ok(one) if one.get("keys").is_none() => serde_json::json!({ "keys": [one] }).to_string(),
        _ => text.to_owned(),
    }
}

/// Keys that the proxy fetches, by way of the mesh. `Err` says why it cannot.
fn remote(
    scope: &Scope<'_>,
    rule: &JwtRule,
    namespace: &str,
) -> Result<JwksSourceSpecifier, String> {
    if rule.jwks_uri.is_empty() {
        return Err("there is neither jwks nor jwksUri".to_owned());
    }
    let (host, port) = server(&rule.jwks_uri)
        .ok_or_else(|| format!("{:?} is no http:// or https:// URL", rule.jwks_uri))?;
    let cluster = scope
        .cluster_of(&[
            host.to_owned(),
            full_host(host, namespace),
            format!("{host}.svc.{DNS_DOMAIN}"),
        ], port)
        .ok_or_else(|| {
            format!("the workload may call no service {host} with port {port} for the keys; write a ServiceEntry for it")
        })?;
    Ok(JwksSourceSpecifier::RemoteJwks(RemoteJwks {
        http_uri: Some(HttpUri {
            uri: rule.jwks_uri.clone(),
            http_upstream_type: Some(HttpUpstreamType::Cluster(cluster)),
            timeout: duration(rule.timeout.unwrap_or(FETCH_TIMEOUT)),
        }),
        cache_duration: duration(KEYS_LIFE),
        // Known keys stay in use while the issuer cannot be reached; nobody waits for its keys to start.
        async_fetch: Some(JwksAsyncFetch {
            fast_listener: true,
            ..Default::default()
        }),
        ..Default::default()
    }))
}

/// Host and port of a URL.
fn server(url: &str) -> Option<(&str, u16)> {
    let (scheme, rest) = url.split_once("://")?;
    let default = match scheme {
        "http" => 80,
        "https" => 443,
        _ => return None,
    };
    let authority = rest.split(['/', '?', '#']).next()?;
    match authority.rsplit_once(':') {
        Some((host, port)) => Some((host, port.parse().ok()?)),
        None => Some((authority, default)),
    }
    .filter(|(host, _)| !host.is_empty())
}

#[cfg(test)]
mod tests {
    use super::server;

    #[test]
    fn urls_name_servers() {
        assert_eq!(server("https://a.b/keys"), Some(("a.b", 443)));
        assert_eq!(server("http://a:8080?x"), Some(("a", 8080)));
        assert_eq!(server("ftp://a/keys"), None);
        assert_eq!(server("http:///keys"), None);
    }
}
