//! Permissions and principals of Envoy's RBAC out of one rule's operations, sources and conditions.

#![allow(
    deprecated,
    reason = "the newer form of metadata matchers is younger than proxies in use"
)]

use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::rbac::v3::{
    Permission, Principal, permission, principal, principal::Authenticated,
};
use envoy_types::pb::envoy::config::route::v3::{
    HeaderMatcher, header_matcher::HeaderMatchSpecifier,
};
use envoy_types::pb::envoy::r#type::matcher::v3::{
    ListMatcher, MetadataMatcher, PathMatcher, StringMatcher, ValueMatcher, list_matcher,
    metadata_matcher::PathSegment, metadata_matcher::path_segment::Segment, path_matcher,
    string_matcher::MatchPattern, value_matcher,
};
use ipnet::IpNet;
use lateen_config::authorization::{Condition, Operation, Source};

use super::wire::{exact, prefix, regex, u32_value};

/// Where the JWT filter leaves what it has verified.
const JWT: &str = "envoy.filters.http.jwt_authn";

/// What a filter sees of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layer {
    Http,
    /// Connections only: no methods, paths, headers, tokens.
    Tcp,
}

/// What a rule's values mean depends on these.
pub(super) struct Context<'a> {
    pub(super) layer: Layer,
    /// Whether the rule denies: then what this layer does not see is taken to match.
    pub(super) deny: bool,
    /// The mesh's own and its aliases.
    pub(super) trust_domains: Vec<String>,
    /// Of the policy.
    pub(super) namespace: &'a str,
}

/// What one attribute demands.
type Built<T> = Option<Vec<T>>;

impl Context<'_> {
    /// What is asked for. `None` if nobody can match it here, or it is not understood.
    pub(super) fn permission(
        &self,
        operation: Option<&Operation>,
        when: &[Condition],
    ) -> Option<Permission> {
        let mut all = Vec::new();
        if let Some(operation) = operation {
            self.http_permission(&mut all, &operation.hosts, &operation.not_hosts, |host| {
                Some(header(":authority", host, true))
            })?;
            self.http_permission(
                &mut all,
                &operation.methods,
                &operation.not_methods,
                |method| Some(header(":method", method, false)),
            )?;
            self.http_permission(&mut all, &operation.paths, &operation.not_paths, |text| {
                Some(path(text))
            })?;
            permissions(&mut all, &operation.ports, &operation.not_ports, port)?;
        }
        for condition in when {
            let (values, not_values) = (&condition.values, &condition.not_values);
            match condition.key.as_str() {
                "destination.ip" => permissions(&mut all, values, not_values, |text| {
                    range(text).map(permission::Rule::DestinationIp)
                })?,
                "destination.port" => permissions(&mut all, values, not_values, port)?,
                "connection.sni" => permissions(&mut all, values, not_values, |text| {
                    Some(permission::Rule::RequestedServerName(string(text)))
                })?,
                key if key.starts_with("experimental.envoy.filters.") => {
                    let (filter, field) = experimental(key)?;
                    let mut own = Vec::new();
                    permissions(&mut own, values, not_values, |text| {
                        let item = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
                        let value = match item {
                            Some(item) => one_of(string(item)),
                            None => string_value(string(text)),
                        };
                        Some(permission::Rule::Metadata(metadata(
                            filter,
                            &[field],
                            value,
                        )))
                    })?;
                    all.extend(own.into_iter().map(alone));
                }
                _ => {}
            }
        }
        if all.is_empty() {
            all.push(Permission {
                rule: Some(permission::Rule::Any(true)),
            });
        }
        Some(Permission {
            rule: Some(permission::Rule::AndRules(permission::Set { rules: all })),
        })
    }

    /// Who asks. `None` as [`Context::permission`].
    pub(super) fn principal(
        &self,
        source: Option<&Source>,
        when: &[Condition],
    ) -> Option<Principal> {
        let mut all = Vec::new();
        if let Some(source) = source {
            self.identities(&mut all, &source.principals, &source.not_principals)?;
            self.request_principals(
                &mut all,
                &source.request_principals,
                &source.not_request_principals,
            )?;
            principals(
                &mut all,
                &source.namespaces,
                &source.not_namespaces,
                namespace,
            )?;
            self.accounts(
                &mut all,
                &source.service_accounts,
                &source.not_service_accounts,
            )?;
            principals(
                &mut all,
                &source.trust_domains,
                &source.not_trust_domains,
                trust_domain,
            )?;
            principals(
                &mut all,
                &source.remote_ip_blocks,
                &source.not_remote_ip_blocks,
                |text| range(text).map(principal::Identifier::RemoteIp),
            )?;
            principals(&mut all, &source.ip_blocks, &source.not_ip_blocks, |text| {
                range(text).map(principal::Identifier::DirectRemoteIp)
            })?;
        }
        for condition in when {
            self.condition(&mut all, condition)?;
        }
        if all.is_empty() {
            all.push(Principal {
                identifier: Some(principal::Identifier::Any(true)),
            });
        }
        Some(Principal {
            identifier: Some(principal::Identifier::AndIds(principal::Set { ids: all })),
        })
    }

    fn condition(&self, all: &mut Vec<Principal>, condition: &Condition) -> Option<()> {
        let (values, not_values) = (&condition.values, &condition.not_values);
        match condition.key.as_str() {
            "source.ip" => principals(all, values, not_values, |text| {
                range(text).map(principal::Identifier::DirectRemoteIp)
            }),
            "remote.ip" => principals(all, values, not_values, |text| {
                range(text).map(principal::Identifier::RemoteIp)
            }),
            "source.namespace" => principals(all, values, not_values, namespace),
            "source.principal" => self.identities(all, values, not_values),
            "source.serviceAccount" => self.accounts(all, values, not_values),
            "source.trustDomain" => principals(all, values, not_values, trust_domain),
            "request.auth.principal" => self.request_principals(all, values, not_values),
            "request.auth.audiences" => self.claims(all, &["aud"], values, not_values),
            "request.auth.presenter" => self.claims(all, &["azp"], values, not_values),
            // Permissions.
            "destination.ip" | "destination.port" | "connection.sni" => Some(()),
            key if key.starts_with("experimental.envoy.filters.") => Some(()),
            key => {
                if let Some(name) = bracketed(key, "request.headers") {
                    let [name] = name.as_slice() else { return None };
                    return self.http_principal(all, values, not_values, |text| {
                        Some(principal::Identifier::Header(header_matcher(
                            name, text, false,
                        )))
                    });
                }
                let claim = bracketed(key, "request.auth.claims")?;
                self.claims(all, &claim, values, not_values)
            }
        }
    }

    /// Whether a demand of HTTP's is heard on this layer; `None` if nobody can meet it.
    fn sees_http(&self, values: &[String], not_values: &[String]) -> Option<bool> {
        match self.layer {
            Layer::Http => Some(true),
            Layer::Tcp if values.is_empty() && not_values.is_empty() || self.deny => Some(false),
            Layer::Tcp => None,
        }
    }

    fn http_permission(
        &self,
        all: &mut Vec<Permission>,
        values: &[String],
        not_values: &[String],
        of: impl Fn(&str) -> Option<permission::Rule>,
    ) -> Option<()> {
        if self.sees_http(values, not_values)? {
            permissions(all, values, not_values, of)?;
        }
        Some(())
    }

    fn http_principal(
        &self,
        all: &mut Vec<Principal>,
        values: &[String],
        not_values: &[String],
        of: impl Fn(&str) -> Option<principal::Identifier>,
    ) -> Option<()> {
        if self.sees_http(values, not_values)? {
            principals(all, values, not_values, of)?;
        }
        Some(())
    }

    fn identities(
        &self,
        all: &mut Vec<Principal>,
        values: &[String],
        not_values: &[String],
    ) -> Option<()> {
        let with_aliases = |list: &[String]| -> Vec<String> {
            list.iter().flat_map(|name| self.aliases(name)).collect()
        };
        principals(
            all,
            &with_aliases(values),
            &with_aliases(not_values),
            |name| {
                Some(authenticated(match name {
                    "*" => regex_string(".+"),
                    name => match (name.strip_prefix('*'), name.strip_suffix('*')) {
                        (Some(suffix), _) => regex_string(&format!("spiffe://.*{}", quote(suffix))),
                        (None, Some(start)) => prefix(format!("spiffe://{start}")),
                        (None, None) => exact(format!("spiffe://{name}")),
                    },
                }))
            },
        )
    }

    /// An identity of the mesh's trust domain is the same in each of its aliases.
    fn aliases(&self, name: &str) -> Vec<String> {
        let parts: Vec<&str> = name.split('/').collect();
        let [domain, "ns", namespace, "sa", account] = parts.as_slice() else {
            return vec![name.to_owned()];
        };
        let same = |domain: &str| format!("{domain}/ns/{namespace}/sa/{account}");
        if *domain == "*" {
            return vec![name.to_owned()];
        }
        if let Some(suffix) = domain.strip_prefix('*') {
            let (fit, others): (Vec<&String>, Vec<&String>) = self
                .trust_domains
                .iter()
                .partition(|own| own.ends_with(suffix));
            let mut all = vec![name.to_owned()];
            if !fit.is_empty() {
                all.extend(others.into_iter().map(|own| same(own)));
            }
            return all;
        }
        if *domain == crate::model::DNS_DOMAIN || self.trust_domains.iter().any(|own| own == domain)
        {
            return self.trust_domains.iter().map(|own| same(own)).collect();
        }
        vec![name.to_owned()]
    }

    fn accounts(
        &self,
        all: &mut Vec<Principal>,
        values: &[String],
        not_values: &[String],
    ) -> Option<()> {
        principals(all, values, not_values, |name| {
            let (namespace, account) = name.split_once('/').unwrap_or((self.namespace, name));
            Some(authenticated(regex_string(&format!(
                "spiffe://[^/]+/ns/{}/sa/{}",
                quote(namespace),
                quote(account)
            ))))
        })
    }

    /// `ISSUER/SUBJECT`; wildcards as elsewhere, over the whole.
    fn request_principals(
        &self,
        all: &mut Vec<Principal>,
        values: &[String],
        not_values: &[String],
    ) -> Option<()> {
        self.http_principal(all, values, not_values, |name| {
            let (issuer, subject) = match name {
                "*" => ("*", "*"),
                name => name.rsplit_once('/').unwrap_or((name, "")),
            };
            let claim = |field: &str, text: &str| {
                let matcher = match text {
                    "*" => regex_string(".+"),
                    text => string(text),
                };
                Principal {
                    identifier: Some(principal::Identifier::Metadata(metadata(
                        JWT,
                        &["payload", field],
                        string_value(matcher),
                    ))),
                }
            };
            Some(principal::Identifier::AndIds(principal::Set {
                ids: vec![claim("iss", issuer), claim("sub", subject)],
            }))
        })
    }

    /// A claim is a text, or a list that has it.
    fn claims(
        &self,
        all: &mut Vec<Principal>,
        claim: &[&str],
        values: &[String],
        not_values: &[String],
    ) -> Option<()> {
        let path: Vec<&str> = std::iter::once("payload")
            .chain(claim.iter().copied())
            .collect();
        self.http_principal(all, values, not_values, |text| {
            let matcher = || match text {
                "*" => regex_string(".+"),
                text => string(text),
            };
            let of = |value| Principal {
                identifier: Some(principal::Identifier::Metadata(metadata(JWT, &path, value))),
            };
            Some(principal::Identifier::OrIds(principal::Set {
                ids: vec![of(string_value(matcher())), of(one_of(matcher()))],
            }))
        })
    }
}

fn permissions(
    all: &mut Vec<Permission>,
    values: &[String],
    not_values: &[String],
    of: impl Fn(&str) -> Option<permission::Rule>,
) -> Option<()> {
    let any_of = |values: &[String]| -> Built<Permission> {
        values
            .iter()
            .map(|value| {
                Some(Permission {
                    rule: Some(of(value)?),
                })
            })
            .collect()
    };
    let or = |rules| Permission {
        rule: Some(permission::Rule::OrRules(permission::Set { rules })),
    };
    if !values.is_empty() {
        all.push(or(any_of(values)?));
    }
    if !not_values.is_empty() {
        all.push(not_permission(or(any_of(not_values)?)));
    }
    Some(())
}

fn principals(
    all: &mut Vec<Principal>,
    values: &[String],
    not_values: &[String],
    of: impl Fn(&str) -> Option<principal::Identifier>,
) -> Option<()> {
    let any_of = |values: &[String]| -> Built<Principal> {
        values
            .iter()
            .map(|value| {
                Some(Principal {
                    identifier: Some(of(value)?),
                })
            })
            .collect()
    };
    let or = |ids| Principal {
        identifier: Some(principal::Identifier::OrIds(principal::Set { ids })),
    };
    if !values.is_empty() {
        all.push(or(any_of(values)?));
    }
    if !not_values.is_empty() {
        all.push(not_principal(or(any_of(not_values)?)));
    }
    Some(())
}

/// Without the brackets that a single value does not need.
fn alone(permission: Permission) -> Permission {
    match permission.rule {
        Some(permission::Rule::NotRule(inner)) => not_permission(alone(*inner)),
        Some(permission::Rule::OrRules(permission::Set { mut rules })) if rules.len() == 1 => {
            rules.pop().unwrap_or_default()
        }
        rule => Permission { rule },
    }
}

pub(super) fn not_permission(of: Permission) -> Permission {
    Permission {
        rule: Some(permission::Rule::NotRule(Box::new(of))),
    }
}

pub(super) fn not_principal(of: Principal) -> Principal {
    Principal {
        identifier: Some(principal::Identifier::NotId(Box::new(of))),
    }
}

fn authenticated(name: StringMatcher) -> principal::Identifier {
    principal::Identifier::Authenticated(Authenticated {
        principal_name: Some(name),
    })
}

fn namespace(name: &str) -> Option<principal::Identifier> {
    let pattern = quote(name).replace(r"\*", ".*");
    Some(authenticated(regex_string(&format!(".*/ns/{pattern}/.*"))))
}

fn trust_domain(name: &str) -> Option<principal::Identifier> {
    Some(authenticated(if name.contains('*') {
        let pattern = quote(name).replace(r"\*", "[^/]*");
        regex_string(&format!("spiffe://{pattern}/.*"))
    } else {
        prefix(format!("spiffe://{name}/"))
    }))
}

fn port(text: &str) -> Option<permission::Rule> {
    let number: u16 = text.parse().ok()?;
    Some(permission::Rule::DestinationPort(number.into()))
}

/// An address or a range.
fn range(text: &str) -> Option<CidrRange> {
    let range = match text.parse::<IpNet>() {
        Ok(range) => range,
        Err(_) => IpNet::from(text.parse::<IpAddr>().ok()?),
    };
    Some(CidrRange {
        address_prefix: range.addr().to_string(),
        prefix_len: u32_value(range.prefix_len().into()),
    })
}

/// A text as a pattern of itself, as RE2 writes it.
fn quote(text: &str) -> String {
    regex::escape(text).replace(r"\-", "-")
}

fn regex_string(pattern: &str) -> StringMatcher {
    StringMatcher {
        match_pattern: Some(MatchPattern::SafeRegex(regex(pattern))),
        ignore_case: false,
    }
}

/// `*`: anything but nothing; `PREFIX*`; `*SUFFIX`; else the whole.
fn string(text: &str) -> StringMatcher {
    match (text.strip_prefix('*'), text.strip_suffix('*')) {
        (Some(""), _) => regex_string(".+"),
        (Some(suffix), _) => StringMatcher {
            match_pattern: Some(MatchPattern::Suffix(suffix.to_owned())),
            ignore_case: false,
        },
        (None, Some(start)) => prefix(start),
        (None, None) => exact(text),
    }
}

fn header_matcher(name: &str, text: &str, ignore_case: bool) -> HeaderMatcher {
    HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: Some(if text == "*" {
            HeaderMatchSpecifier::PresentMatch(true)
        } else {
            HeaderMatchSpecifier::StringMatch(StringMatcher {
                ignore_case,
                ..string(text)
            })
        }),
        ..Default::default()
    }
}

fn header(name: &str, text: &str, ignore_case: bool) -> permission::Rule {
    permission::Rule::Header(header_matcher(name, text, ignore_case))
}

/// A path, or a template: `{*}` is one segment, `{**}` any number of them.
fn path(text: &str) -> permission::Rule {
    let matcher = if text.contains("{*}") || text.contains("{**}") {
        let pattern = quote(text)
            .replace(r"\{\*\*\}", ".*")
            .replace(r"\{\*\}", "[^/]+");
        regex_string(&pattern)
    } else {
        string(text)
    };
    permission::Rule::UrlPath(PathMatcher {
        rule: Some(path_matcher::Rule::Path(matcher)),
    })
}

fn string_value(matcher: StringMatcher) -> ValueMatcher {
    ValueMatcher {
        match_pattern: Some(value_matcher::MatchPattern::StringMatch(matcher)),
    }
}

/// A list with an item that fits.
fn one_of(matcher: StringMatcher) -> ValueMatcher {
    ValueMatcher {
        match_pattern: Some(value_matcher::MatchPattern::ListMatch(Box::new(
            ListMatcher {
                match_pattern: Some(list_matcher::MatchPattern::OneOf(Box::new(string_value(
                    matcher,
                )))),
            },
        ))),
    }
}

fn metadata(filter: &str, path: &[&str], value: ValueMatcher) -> MetadataMatcher {
    MetadataMatcher {
        filter: filter.to_owned(),
        path: path
            .iter()
            .map(|key| PathSegment {
                segment: Some(Segment::Key((*key).to_owned())),
            })
            .collect(),
        value: Some(value),
        invert: false,
    }
}

/// `experimental.FILTER[FIELD]`.
fn experimental(key: &str) -> Option<(&str, &str)> {
    key.strip_prefix("experimental.")?
        .strip_suffix(']')?
        .split_once('[')
}

/// `NAME[a][b]` as `a`, `b`.
fn bracketed<'a>(key: &'a str, name: &str) -> Option<Vec<&'a str>> {
    let inner = key
        .strip_prefix(name)?
        .strip_prefix('[')?
        .strip_suffix(']')?;
    let parts: Vec<&str> = inner.split("][").collect();
    (!parts.iter().any(|part| part.is_empty())).then_some(parts)
}
