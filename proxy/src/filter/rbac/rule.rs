//! Permissions and principals as one kind of tree.

use std::{net::IpAddr, ops::Range};

use lateen_protocols::envoy::envoy::{
    config::{rbac::v3 as proto, route::v3::HeaderMatcher},
    r#type::matcher::v3 as matcher,
};
use proto::{permission::Rule as Permission, principal::Identifier};

use super::{Subject, metadata::MetadataMatch};
use crate::{
    config_error::ConfigError,
    head::Headers,
    http::Cidr,
    info::TlsInfo,
    proto::invalid,
    route::{
        Selected,
        matcher::{HeaderMatch, StringMatch},
        template::Template,
    },
};

/// A condition on a request or connection.
#[derive(Debug)]
pub(super) enum Rule {
    /// Holds always or never.
    Constant(bool),
    All(Vec<Rule>),
    AnyOf(Vec<Rule>),
    Not(Box<Rule>),
    Header(HeaderMatch),
    UrlPath(StringMatch),
    UriTemplate(Template),
    Destination(Cidr),
    DestinationPort(Range<i64>),
    ServerName(StringMatch),
    /// TLS, and a name of the peer's certificate.
    Authenticated(Option<StringMatch>),
    Address(Source, Cidr),
    Metadata(MetadataMatch),
}

/// Which address of the client.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    /// Of the connection, as PROXY protocol tells it.
    Connection,
    /// Of the socket.
    Direct,
    /// Of the original client, as `x-forwarded-for` tells it where it is trusted.
    Original,
}

impl Rule {
    pub(super) fn of_permission(
        permission: &proto::Permission,
        http: bool,
    ) -> Result<Rule, ConfigError> {
        Ok(match permission.rule.as_ref() {
            None => return Err(invalid("rule", "absent")),
            Some(Permission::AndRules(set)) => Rule::All(permissions("and_rules", set, http)?),
            Some(Permission::OrRules(set)) => Rule::AnyOf(permissions("or_rules", set, http)?),
            Some(Permission::NotRule(rule)) => Rule::Not(Box::new(
                Rule::of_permission(rule, http).map_err(|error| error.within("not_rule"))?,
            )),
            Some(Permission::Any(any)) => always("any", *any)?,
            Some(Permission::Header(header)) => of_header(header, http)?,
            Some(Permission::UrlPath(path)) => of_path(path, http)?,
            Some(Permission::DestinationIp(range)) => Rule::Destination(Cidr::compile(range)?),
            Some(Permission::DestinationPort(port)) => {
                let port = i64::from(*port);
                if port > 65_535 {
                    return Err(invalid("destination_port", format!("{port} is not a port")));
                }
                Rule::DestinationPort(port..port + 1)
            }
            Some(Permission::DestinationPortRange(range)) => {
                if range.start < 0 || range.start >= range.end || range.end > 65_536 {
                    return Err(invalid("destination_port_range", "not a range of ports"));
                }
                Rule::DestinationPort(i64::from(range.start)..i64::from(range.end))
            }
            Some(Permission::Metadata(metadata)) => {
                Rule::Metadata(MetadataMatch::of_stream(metadata)?)
            }
            Some(Permission::SourcedMetadata(sourced)) => {
                Rule::Metadata(MetadataMatch::sourced(sourced)?)
            }
            Some(Permission::RequestedServerName(name)) => {
                Rule::ServerName(StringMatch::compile("requested_server_name", name)?)
            }
            Some(Permission::Matcher(_)) => return Err(invalid("matcher", "not supported")),
            Some(Permission::UriTemplate(extension)) => {
                let template = Template::of_extension(extension);
                let template = template.map_err(|error| error.within("uri_template"))?;
                match http {
                    true => Rule::UriTemplate(template),
                    false => Rule::Constant(false),
                }
            }
        })
    }

    pub(super) fn of_principal(
        principal: &proto::Principal,
        http: bool,
    ) -> Result<Rule, ConfigError> {
        Ok(match principal.identifier.as_ref() {
            None => return Err(invalid("identifier", "absent")),
            Some(Identifier::AndIds(set)) => Rule::All(principals("and_ids", set, http)?),
            Some(Identifier::OrIds(set)) => Rule::AnyOf(principals("or_ids", set, http)?),
            Some(Identifier::NotId(id)) => Rule::Not(Box::new(
                Rule::of_principal(id, http).map_err(|error| error.within("not_id"))?,
            )),
            Some(Identifier::Any(any)) => always("any", *any)?,
            Some(Identifier::Authenticated(authenticated)) => Rule::Authenticated(
                authenticated
                    .principal_name
                    .as_ref()
                    .map(|name| StringMatch::compile("principal_name", name))
                    .transpose()?,
            ),
            Some(Identifier::SourceIp(range)) => {
                Rule::Address(Source::Connection, Cidr::compile(range)?)
            }
            Some(Identifier::DirectRemoteIp(range)) => {
                Rule::Address(Source::Direct, Cidr::compile(range)?)
            }
            Some(Identifier::RemoteIp(range)) => {
                Rule::Address(Source::Original, Cidr::compile(range)?)
            }
            Some(Identifier::Header(header)) => of_header(header, http)?,
            Some(Identifier::UrlPath(path)) => of_path(path, http)?,
            Some(Identifier::Metadata(metadata)) => {
                Rule::Metadata(MetadataMatch::of_stream(metadata)?)
            }
            Some(Identifier::SourcedMetadata(sourced)) => {
                Rule::Metadata(MetadataMatch::sourced(sourced)?)
            }
            // Nothing of ours leaves such state: a rule to deny by it would never deny.
            Some(Identifier::FilterState(_)) => {
                return Err(invalid("filter_state", "not supported"));
            }
            Some(Identifier::Custom(_)) => return Err(invalid("custom", "not supported")),
        })
    }

    /// Whether the condition is met.
    pub(super) fn holds(&self, subject: &Subject<'_>) -> bool {
        match self {
            Rule::Constant(value) => *value,
            Rule::All(rules) => rules.iter().all(|rule| rule.holds(subject)),
            Rule::AnyOf(rules) => rules.iter().any(|rule| rule.holds(subject)),
            Rule::Not(rule) => !rule.holds(subject),
            Rule::Header(header) => subject.request.is_some_and(|head| header.matches(head)),
            Rule::UrlPath(path) => subject
                .request
                .is_some_and(|head| path.matches(head.path_only())),
            Rule::UriTemplate(template) => subject
                .request
                .is_some_and(|head| template.matches(head.path_only())),
            Rule::Destination(range) => range.contains(subject.connection.local.ip()),
            Rule::DestinationPort(ports) => {
                ports.contains(&i64::from(subject.connection.local.port()))
            }
            Rule::ServerName(name) => {
                let asked = subject.connection.requested_server_name.as_deref();
                name.matches(asked.unwrap_or_default().as_bytes())
            }
            Rule::Authenticated(name) => match (&subject.connection.tls, name) {
                (None, _) => false,
                (Some(_), None) => true,
                (Some(tls), Some(name)) => names_peer(tls, name),
            },
            Rule::Address(source, range) => {
                let address: IpAddr = match source {
                    Source::Connection => subject.connection.remote.ip(),
                    Source::Direct => subject.connection.direct_remote.ip(),
                    Source::Original => subject.info.downstream_remote.ip(),
                };
                range.contains(address)
            }
            Rule::Metadata(metadata) => {
                metadata.holds(subject.route.map(Selected::route), subject.info)
            }
        }
    }
}

/// Whether one of the peer's names matches: URI SANs, then DNS SANs, then the subject. Envoy:
/// `AuthenticatedMatcher`.
fn names_peer(tls: &TlsInfo, name: &StringMatch) -> bool {
    tls.peer_uri_san
        .iter()
        .chain(&tls.peer_more_uri_sans)
        .chain(&tls.peer_dns_sans)
        .any(|san| name.matches(san.as_bytes()))
        || name.matches(tls.peer_subject.as_deref().unwrap_or_default().as_bytes())
}

/// Envoy allows `true` only.
fn always(field: &str, value: bool) -> Result<Rule, ConfigError> {
    if value {
        Ok(Rule::Constant(true))
    } else {
        Err(invalid(field, "may only be true"))
    }
}

fn permissions(
    field: &str,
    set: &proto::permission::Set,
    http: bool,
) -> Result<Vec<Rule>, ConfigError> {
    if set.rules.is_empty() {
        return Err(invalid(field, "there are none"));
    }
    set.rules
        .iter()
        .map(|rule| Rule::of_permission(rule, http))
        .collect::<Result<_, _>>()
        .map_err(|error| error.within(field))
}

fn principals(
    field: &str,
    set: &proto::principal::Set,
    http: bool,
) -> Result<Vec<Rule>, ConfigError> {
    if set.ids.is_empty() {
        return Err(invalid(field, "there are none"));
    }
    set.ids
        .iter()
        .map(|id| Rule::of_principal(id, http))
        .collect::<Result<_, _>>()
        .map_err(|error| error.within(field))
}

/// A connection has no headers, so what a condition on them says is known at once.
fn of_header(header: &HeaderMatcher, http: bool) -> Result<Rule, ConfigError> {
    let compiled = HeaderMatch::compile(header).map_err(|error| error.within("header"))?;
    Ok(match http {
        true => Rule::Header(compiled),
        false => Rule::Constant(compiled.matches_response(0, &Headers::default())),
    })
}

fn of_path(path: &matcher::PathMatcher, http: bool) -> Result<Rule, ConfigError> {
    let Some(matcher::path_matcher::Rule::Path(path)) = path.rule.as_ref() else {
        return Err(invalid("url_path", "no path"));
    };
    let compiled = StringMatch::compile("url_path", path)?;
    Ok(match http {
        true => Rule::UrlPath(compiled),
        false => Rule::Constant(false),
    })
}
