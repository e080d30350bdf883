//! Decisions by a match tree (`matcher`) instead of policies. Envoy: the unified matcher API,
//! `xds.type.matcher.v3.Matcher`, with actions `envoy.config.rbac.v3.Action`.

use std::{borrow::Cow, collections::HashMap, net::IpAddr};

use lateen_protocols::envoy::{
    envoy::{
        config::rbac::v3::{Action as ActionProto, rbac::Action},
        extensions::matching::{
            common_inputs::{
                network::v3::{
                    DestinationIpInput, DestinationPortInput, DirectSourceIpInput, ServerNameInput,
                    SourceIpInput, SourcePortInput,
                },
                ssl::v3::{DnsSanInput, SubjectInput, UriSanInput},
            },
            input_matchers::ip::v3::Ip,
        },
        r#type::matcher::v3::{
            HttpRequestHeaderMatchInput, HttpRequestQueryParamMatchInput, StringMatcher,
        },
    },
    xds::{
        core::v3::TypedExtensionConfig,
        r#type::matcher::v3::{
            Matcher as MatcherProto,
            matcher::{
                self as proto, MatcherType, matcher_list::Predicate as PredicateProto,
                matcher_list::predicate::MatchType,
                matcher_list::predicate::single_predicate::Matcher as ValueProto,
                matcher_tree::TreeType, on_match::OnMatch as OnMatchProto,
            },
        },
    },
};
use prost::Message as _;

use super::{Subject, Verdict};
use crate::{
    config_error::ConfigError,
    http::Cidr,
    proto::{invalid, unpack},
    route::matcher::{HeaderKey, StringMatch, query_parameter},
};

/// Deepest nesting of matchers and predicates.
const MAX_DEPTH: usize = 32;

/// A tree of matchers.
#[derive(Debug)]
pub(super) struct Tree {
    kind: Kind,
    otherwise: Option<Box<OnMatch>>,
}

#[derive(Debug)]
enum Kind {
    /// The first that holds and comes to an end.
    List(Vec<(Predicate, OnMatch)>),
    Exact(Input, HashMap<String, OnMatch>),
    /// The longest prefix first.
    Prefix(Input, Vec<(String, OnMatch)>),
}

#[derive(Debug)]
struct OnMatch {
    to: To,
    /// Only noted: the search goes on.
    goes_on: bool,
}

#[derive(Debug)]
enum To {
    Tree(Tree),
    Action(Box<str>, Action),
}

#[derive(Debug)]
enum Predicate {
    One(Input, Test),
    All(Vec<Predicate>),
    AnyOf(Vec<Predicate>),
    Not(Box<Predicate>),
}

#[derive(Debug)]
enum Test {
    Text(StringMatch),
    Address(Vec<Cidr>),
}

/// What a test looks at.
#[derive(Debug)]
enum Input {
    Header(HeaderKey),
    Query(String),
    SourceIp,
    DirectSourceIp,
    SourcePort,
    DestinationIp,
    DestinationPort,
    ServerName,
    UriSan,
    DnsSan,
    Subject,
}

impl Tree {
    /// Compiles a matcher; `http` says whether there will be requests to look at.
    ///
    /// # Errors
    /// When a part is absent, too deep, or of a kind that is not supported.
    pub(super) fn compile(matcher: &MatcherProto, http: bool) -> Result<Tree, ConfigError> {
        Tree::at(matcher, http, 0)
    }

    fn at(matcher: &MatcherProto, http: bool, depth: usize) -> Result<Tree, ConfigError> {
        if depth > MAX_DEPTH {
            return Err(too_deep());
        }
        let on_match = |on_match: &proto::OnMatch| OnMatch::compile(on_match, http, depth);
        let kind = match matcher.matcher_type.as_ref() {
            // Nothing ever matches.
            None => Kind::List(Vec::new()),
            Some(MatcherType::MatcherList(list)) => {
                let compile = |field: &proto::matcher_list::FieldMatcher| {
                    let predicate = field.predicate.as_ref();
                    let predicate = predicate.ok_or_else(|| invalid("predicate", "absent"))?;
                    let then = field.on_match.as_ref();
                    let then = then.ok_or_else(|| invalid("on_match", "absent"))?;
                    Ok((Predicate::compile(predicate, http, depth)?, on_match(then)?))
                };
                let all: Result<_, ConfigError> = list.matchers.iter().map(compile).collect();
                Kind::List(all.map_err(|error| error.within("matcher_list"))?)
            }
            Some(MatcherType::MatcherTree(tree)) => {
                let within = |error: ConfigError| error.within("matcher_tree");
                let input = Input::compile(tree.input.as_ref(), http).map_err(within)?;
                let entries = |map: &proto::matcher_tree::MatchMap| {
                    let entry = |(key, then): (&String, &proto::OnMatch)| {
                        Ok((key.clone(), on_match(then)?))
                    };
                    let all: Result<Vec<_>, ConfigError> = map.map.iter().map(entry).collect();
                    all.map_err(within)
                };
                match tree.tree_type.as_ref() {
                    Some(TreeType::ExactMatchMap(map)) => {
                        Kind::Exact(input, entries(map)?.into_iter().collect())
                    }
                    Some(TreeType::PrefixMatchMap(map)) => {
                        let mut entries = entries(map)?;
                        entries.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
                        Kind::Prefix(input, entries)
                    }
                    Some(TreeType::CustomMatch(_)) => {
                        return Err(within(invalid("custom_match", "not supported")));
                    }
                    None => return Err(within(invalid("tree_type", "absent"))),
                }
            }
        };
        Ok(Tree {
            kind,
            otherwise: matcher
                .on_no_match
                .as_deref()
                .map(on_match)
                .transpose()
                .map_err(|error| error.within("on_no_match"))?
                .map(Box::new),
        })
    }

    /// What the tree says of a request or connection; what nothing matches is denied.
    pub(super) fn decide(&self, subject: &Subject<'_>) -> Verdict<'_> {
        match self.find(subject) {
            Some((name, action)) => Verdict {
                allowed: action != Action::Deny,
                policy: Some(name),
            },
            None => Verdict {
                allowed: false,
                policy: None,
            },
        }
    }

    fn find(&self, subject: &Subject<'_>) -> Option<(&str, Action)> {
        let found = match &self.kind {
            Kind::List(list) => list
                .iter()
                .filter(|(predicate, _)| predicate.holds(subject))
                .find_map(|(_, then)| then.find(subject)),
            Kind::Exact(input, map) => input
                .value(subject)
                .and_then(|value| map.get(std::str::from_utf8(&value).ok()?))
                .and_then(|then| then.find(subject)),
            Kind::Prefix(input, list) => input.value(subject).and_then(|value| {
                list.iter()
                    .filter(|(prefix, _)| value.starts_with(prefix.as_bytes()))
                    .find_map(|(_, then)| then.find(subject))
            }),
        };
        found.or_else(|| self.otherwise.as_ref()?.find(subject))
    }
}

fn too_deep() -> ConfigError {
    invalid("matcher", format!("nested deeper than {MAX_DEPTH} levels"))
}

impl OnMatch {
    fn compile(
        on_match: &proto::OnMatch,
        http: bool,
        depth: usize,
    ) -> Result<OnMatch, ConfigError> {
        let to = match on_match.on_match.as_ref() {
            Some(OnMatchProto::Matcher(matcher)) => To::Tree(Tree::at(matcher, http, depth + 1)?),
            Some(OnMatchProto::Action(extension)) => {
                let any = extension.typed_config.as_ref();
                let any = any.ok_or_else(|| invalid("action.typed_config", "absent"))?;
                let Some(action) = unpack::<ActionProto>(any)? else {
                    return Err(invalid(
                        any.type_url.clone(),
                        "only envoy.config.rbac.v3.Action is an action here",
                    ));
                };
                let kind = Action::try_from(action.action)
                    .map_err(|_| invalid("action", format!("{} is no action", action.action)))?;
                if action.name.is_empty() {
                    return Err(invalid("action.name", "absent"));
                }
                To::Action(action.name.into(), kind)
            }
            None => return Err(invalid("on_match", "neither a matcher nor an action")),
        };
        Ok(OnMatch {
            to,
            goes_on: on_match.keep_matching,
        })
    }

    fn find(&self, subject: &Subject<'_>) -> Option<(&str, Action)> {
        match &self.to {
            _ if self.goes_on => None,
            To::Tree(tree) => tree.find(subject),
            To::Action(name, action) => Some((name, *action)),
        }
    }
}

impl Predicate {
    fn compile(
        predicate: &PredicateProto,
        http: bool,
        depth: usize,
    ) -> Result<Predicate, ConfigError> {
        if depth > MAX_DEPTH {
            return Err(too_deep());
        }
        let all = |list: &proto::matcher_list::predicate::PredicateList| {
            let each = list.predicate.iter();
            each.map(|one| Predicate::compile(one, http, depth + 1))
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(match predicate.match_type.as_ref() {
            Some(MatchType::SinglePredicate(single)) => {
                let input = Input::compile(single.input.as_ref(), http)?;
                let test = match single.matcher.as_ref() {
                    Some(ValueProto::ValueMatch(text)) => {
                        // The same message under another name.
                        let text = StringMatcher::decode(text.encode_to_vec().as_slice())
                            .map_err(|error| invalid("value_match", error.to_string()))?;
                        Test::Text(StringMatch::compile("value_match", &text)?)
                    }
                    Some(ValueProto::CustomMatch(extension)) => {
                        let any = extension.typed_config.as_ref();
                        let any =
                            any.ok_or_else(|| invalid("custom_match.typed_config", "absent"))?;
                        let Some(ip) = unpack::<Ip>(any)? else {
                            return Err(invalid(
                                any.type_url.clone(),
                                "this matcher is not supported",
                            ));
                        };
                        let ranges = ip.cidr_ranges.iter().map(Cidr::compile);
                        Test::Address(ranges.collect::<Result<_, _>>()?)
                    }
                    None => return Err(invalid("single_predicate", "there is no matcher")),
                };
                Predicate::One(input, test)
            }
            Some(MatchType::OrMatcher(list)) => Predicate::AnyOf(all(list)?),
            Some(MatchType::AndMatcher(list)) => Predicate::All(all(list)?),
            Some(MatchType::NotMatcher(one)) => {
                Predicate::Not(Box::new(Predicate::compile(one, http, depth + 1)?))
            }
            None => return Err(invalid("predicate", "absent")),
        })
    }

    fn holds(&self, subject: &Subject<'_>) -> bool {
        match self {
            Predicate::One(input, test) => input.value(subject).is_some_and(|value| match test {
                Test::Text(text) => text.matches(&value),
                Test::Address(ranges) => std::str::from_utf8(&value)
                    .ok()
                    .and_then(|text| text.parse::<IpAddr>().ok())
                    .is_some_and(|ip| ranges.iter().any(|range| range.contains(ip))),
            }),
            Predicate::All(list) => list.iter().all(|one| one.holds(subject)),
            Predicate::AnyOf(list) => list.iter().any(|one| one.holds(subject)),
            Predicate::Not(one) => !one.holds(subject),
        }
    }
}

impl Input {
    fn compile(input: Option<&TypedExtensionConfig>, http: bool) -> Result<Input, ConfigError> {
        let any = input.and_then(|input| input.typed_config.as_ref());
        let any = any.ok_or_else(|| invalid("input.typed_config", "absent"))?;
        if http && let Some(header) = unpack::<HttpRequestHeaderMatchInput>(any)? {
            return Ok(Input::Header(HeaderKey::new(&header.header_name)));
        }
        if http && let Some(query) = unpack::<HttpRequestQueryParamMatchInput>(any)? {
            return Ok(Input::Query(query.query_param));
        }
        if unpack::<SourceIpInput>(any)?.is_some() {
            return Ok(Input::SourceIp);
        }
        if unpack::<DirectSourceIpInput>(any)?.is_some() {
            return Ok(Input::DirectSourceIp);
        }
        if unpack::<SourcePortInput>(any)?.is_some() {
            return Ok(Input::SourcePort);
        }
        if unpack::<DestinationIpInput>(any)?.is_some() {
            return Ok(Input::DestinationIp);
        }
        if unpack::<DestinationPortInput>(any)?.is_some() {
            return Ok(Input::DestinationPort);
        }
        if unpack::<ServerNameInput>(any)?.is_some() {
            return Ok(Input::ServerName);
        }
        if unpack::<UriSanInput>(any)?.is_some() {
            return Ok(Input::UriSan);
        }
        if unpack::<DnsSanInput>(any)?.is_some() {
            return Ok(Input::DnsSan);
        }
        if unpack::<SubjectInput>(any)?.is_some() {
            return Ok(Input::Subject);
        }
        Err(invalid(
            any.type_url.clone(),
            "this input is not supported here",
        ))
    }

    /// What is there to be looked at; `None` when there is nothing, and then nothing matches.
    fn value<'a>(&self, subject: &Subject<'a>) -> Option<Cow<'a, [u8]>> {
        let connection = subject.connection;
        let tls = connection.tls.as_deref();
        let text = |text: String| Some(Cow::Owned(text.into_bytes()));
        let borrowed = |text: &'a str| Some(Cow::Borrowed(text.as_bytes()));
        match self {
            Input::Header(key) => key.in_request(subject.request?),
            Input::Query(name) => {
                query_parameter(subject.request?.query()?, name.as_bytes()).map(Cow::Borrowed)
            }
            Input::SourceIp => text(match subject.request {
                Some(_) => subject.info.downstream_remote.ip().to_string(),
                None => connection.remote.ip().to_string(),
            }),
            Input::DirectSourceIp => text(connection.direct_remote.ip().to_string()),
            Input::SourcePort => text(connection.remote.port().to_string()),
            Input::DestinationIp => text(connection.local.ip().to_string()),
            Input::DestinationPort => text(connection.local.port().to_string()),
            Input::ServerName => borrowed(connection.requested_server_name.as_deref()?),
            Input::UriSan => {
                let tls = tls?;
                let first = tls.peer_uri_san.as_deref()?;
                if tls.peer_more_uri_sans.is_empty() {
                    return borrowed(first);
                }
                let all = std::iter::once(first).chain(tls.peer_more_uri_sans.iter().map(|s| &**s));
                text(all.collect::<Vec<_>>().join(","))
            }
            Input::DnsSan => {
                let names: Vec<&str> = tls?.peer_dns_sans.iter().map(|name| &**name).collect();
                (!names.is_empty()).then(|| Cow::Owned(names.join(",").into_bytes()))
            }
            Input::Subject => borrowed(tls?.peer_subject.as_deref()?),
        }
    }
}
