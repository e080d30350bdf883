//! What is asked about a request: descriptors made of its facts as routes, virtual hosts or the filter say.
//! Envoy: `config.route.v3.RateLimit`.

use lateen_protocols::envoy::{
    envoy::{
        config::route::v3::{
            RateLimit as PolicyProto,
            rate_limit::{
                Action as ActionProto, HitsAddend, Override, XRateLimitOption,
                action::{ActionSpecifier, meta_data::Source},
                r#override::OverrideSpecifier,
            },
        },
        extensions::common::ratelimit::v3::{
            RateLimitDescriptor,
            rate_limit_descriptor::{Entry, RateLimitOverride},
        },
        extensions::filters::http::ratelimit::v3::rate_limit_per_route::VhRateLimitsOptions,
        r#type::metadata::v3::{MetadataKey, metadata_key::path_segment::Segment},
    },
    google::protobuf as pb,
};
use pb::value::Kind;

use super::by_key;
use crate::{
    config_error::ConfigError,
    format::{Facts, Format},
    head::{Name, RequestHead},
    http::Cidr,
    info::StreamInfo,
    layers::{Fraction, RuntimeLayers},
    proto::invalid,
    route::{
        Selected,
        matcher::{HeaderMatch, QueryMatch, query_parameter},
    },
};

/// The limits of one level, in order.
#[derive(Debug, Default)]
pub struct Policies(Vec<Policy>);

/// One limit: the descriptor it asks about, if all of its actions have something to say.
#[derive(Debug)]
struct Policy {
    stage: u32,
    enabled: Option<Fraction>,
    actions: Vec<Action>,
    limit: Option<Limit>,
    hits: Option<Hits>,
    /// Whether the client is told; `None` leaves it to the filter.
    told: Option<bool>,
}

#[derive(Debug)]
enum Limit {
    Fixed(RateLimitOverride),
    Metadata(Key),
}

#[derive(Debug)]
struct Hits {
    count: Count,
    negative: bool,
}

#[derive(Debug)]
enum Count {
    Number(u64),
    Format(Format),
}

#[derive(Debug)]
enum Action {
    SourceCluster,
    DestinationCluster,
    Header {
        name: Name,
        key: String,
        skip: bool,
    },
    Query {
        name: String,
        key: String,
        skip: bool,
    },
    RemoteAddress,
    MaskedRemoteAddress {
        v4: u32,
        v6: u32,
    },
    Fixed(Entry),
    /// The entry if whether the conditions hold is as wanted.
    Headers(Vec<HeaderMatch>, bool, Entry),
    Queries(Vec<QueryMatch>, bool, Entry),
    Addresses(Vec<Cidr>, bool, Entry),
    Metadata {
        of_route: bool,
        path: Key,
        key: String,
        default: String,
        skip: bool,
    },
}

/// Where in metadata a value lies.
#[derive(Debug)]
struct Key {
    filter: String,
    path: Vec<String>,
}

/// What descriptors are made of.
pub(in crate::filter) struct Subject<'a> {
    pub(in crate::filter) head: &'a RequestHead,
    pub(in crate::filter) info: &'a StreamInfo,
    pub(in crate::filter) selected: &'a Selected,
    /// The cluster the request goes to.
    pub(in crate::filter) cluster: &'a str,
    /// Our own.
    pub(in crate::filter) us: &'a str,
}

/// The descriptors of one request.
#[derive(Debug, Default)]
pub(in crate::filter) struct Descriptors {
    pub(in crate::filter) all: Vec<RateLimitDescriptor>,
    told: Vec<Option<bool>>,
}

impl Descriptors {
    pub(in crate::filter) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Whether the client is to be told of this one, if that is said of it.
    pub(in crate::filter) fn says(&self, index: usize) -> Option<bool> {
        self.told.get(index).copied().flatten()
    }
}

impl Subject<'_> {
    /// The descriptors of `inline`, if there are any; else those of the route and, as `rule` says, the virtual
    /// host.
    pub(in crate::filter) fn descriptors(
        &self,
        inline: &Policies,
        stage: u32,
        rule: VhRateLimitsOptions,
    ) -> Descriptors {
        let mut descriptors = Descriptors::default();
        if !inline.is_empty() {
            inline.populate(None, self, &mut descriptors);
            return descriptors;
        }
        let of_route = &self.selected.route().rate_limits;
        of_route.populate(Some(stage), self, &mut descriptors);
        let include = match rule {
            _ if self.selected.route().include_vhost_rate_limits => true,
            VhRateLimitsOptions::Override => of_route.is_empty(),
            VhRateLimitsOptions::Include => true,
            VhRateLimitsOptions::Ignore => false,
        };
        if include {
            let of_vhost = &self.selected.virtual_host().rate_limits;
            of_vhost.populate(Some(stage), self, &mut descriptors);
        }
        descriptors
    }
}

impl Policies {
    /// Compiles the limits of a route or virtual host.
    ///
    /// # Errors
    /// When one is not valid, or asks for what is not supported.
    pub fn compile(list: &[PolicyProto], layers: &RuntimeLayers) -> Result<Policies, ConfigError> {
        Policies::read(list, layers, false)
    }

    /// Compiles the limits of a filter's own configuration.
    ///
    /// # Errors
    /// As [`Policies::compile`].
    pub(in crate::filter) fn inline(
        list: &[PolicyProto],
        layers: &RuntimeLayers,
    ) -> Result<Policies, ConfigError> {
        Policies::read(list, layers, true)
    }

    fn read(
        list: &[PolicyProto],
        layers: &RuntimeLayers,
        inline: bool,
    ) -> Result<Policies, ConfigError> {
        let one = |(index, proto)| {
            Policy::compile(proto, layers, inline)
                .map_err(|error| error.within(format_args!("rate_limits[{index}]")))
        };
        let all: Result<_, _> = list.iter().enumerate().map(one).collect();
        all.map(Policies)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds the descriptors of the limits of this stage, or of all.
    pub(in crate::filter) fn populate(
        &self,
        stage: Option<u32>,
        subject: &Subject<'_>,
        out: &mut Descriptors,
    ) {
        for policy in &self.0 {
            if stage.is_some_and(|stage| stage != policy.stage)
                || policy
                    .enabled
                    .as_ref()
                    .is_some_and(|enabled| !enabled.hits())
            {
                continue;
            }
            if let Some(descriptor) = policy.descriptor(subject) {
                out.all.push(descriptor);
                out.told.push(policy.told);
            }
        }
    }
}

impl Policy {
    fn compile(
        proto: &PolicyProto,
        layers: &RuntimeLayers,
        inline: bool,
    ) -> Result<Policy, ConfigError> {
        if proto.apply_on_stream_done {
            return Err(invalid("apply_on_stream_done", "not supported"));
        }
        let stage = proto.stage.as_ref().map_or(0, |stage| stage.value);
        if stage > 10 {
            return Err(invalid("stage", "greater than 10"));
        }
        if proto.actions.is_empty() {
            return Err(invalid("actions", "empty"));
        }
        if inline && (proto.stage.is_some() || !proto.disable_key.is_empty()) {
            return Err(invalid("stage or disable_key", "not of use here"));
        }
        Ok(Policy {
            stage,
            enabled: (!proto.disable_key.is_empty()).then(|| {
                let key = format!("ratelimit.{}.http_filter_enabled", proto.disable_key);
                by_key(layers, &key)
            }),
            actions: proto
                .actions
                .iter()
                .enumerate()
                .map(|(index, action)| {
                    Action::compile(action)
                        .map_err(|error| error.within(format_args!("actions[{index}]")))
                })
                .collect::<Result<_, _>>()?,
            limit: proto.limit.as_ref().map(Limit::compile).transpose()?,
            hits: proto.hits_addend.as_ref().map(Hits::compile).transpose()?,
            told: match proto.x_ratelimit_option() {
                XRateLimitOption::Unspecified => None,
                XRateLimitOption::Off => Some(false),
                XRateLimitOption::DraftVersion03 => Some(true),
            },
        })
    }

    fn descriptor(&self, subject: &Subject<'_>) -> Option<RateLimitDescriptor> {
        let mut entries = Vec::with_capacity(self.actions.len());
        for action in &self.actions {
            match action.entry(subject) {
                Said::Entry(entry) => entries.push(entry),
                Said::Nothing => {}
                Said::Stop => return None,
            }
        }
        let (hits_addend, is_negative_hits) = match &self.hits {
            None => (None, false),
            Some(hits) => (hits.count(subject), hits.negative),
        };
        (!entries.is_empty()).then(|| RateLimitDescriptor {
            entries,
            limit: self.limit.as_ref().and_then(|limit| limit.of(subject)),
            is_negative_hits: is_negative_hits && hits_addend.is_some(),
            hits_addend: hits_addend.map(|value| pb::UInt64Value { value }),
        })
    }
}

/// What an action adds.
enum Said {
    Entry(Entry),
    Nothing,
    /// There is nothing to ask.
    Stop,
}

fn entry(key: &str, value: impl Into<String>) -> Entry {
    Entry {
        key: key.to_owned(),
        value: value.into(),
    }
}

fn named(key: &str, default: &str, value: &str) -> Result<Entry, ConfigError> {
    if value.is_empty() {
        return Err(invalid("descriptor_value", "empty"));
    }
    Ok(entry(if key.is_empty() { default } else { key }, value))
}

fn given(field: &str, value: &str) -> Result<String, ConfigError> {
    match value {
        "" => Err(invalid(field, "empty")),
        value => Ok(value.to_owned()),
    }
}

impl Action {
    fn compile(proto: &ActionProto) -> Result<Action, ConfigError> {
        use ActionSpecifier as A;
        let wanted = |expect: Option<&pb::BoolValue>| expect.is_none_or(|expect| expect.value);
        Ok(match proto.action_specifier.as_ref() {
            None => return Err(invalid("action", "absent")),
            Some(A::SourceCluster(_)) => Action::SourceCluster,
            Some(A::DestinationCluster(_)) => Action::DestinationCluster,
            Some(A::RequestHeaders(header)) => Action::Header {
                name: Name::new(given("header_name", &header.header_name)?),
                key: given("descriptor_key", &header.descriptor_key)?,
                skip: header.skip_if_absent,
            },
            Some(A::QueryParameters(query)) => Action::Query {
                name: given("query_parameter_name", &query.query_parameter_name)?,
                key: given("descriptor_key", &query.descriptor_key)?,
                skip: query.skip_if_absent,
            },
            Some(A::RemoteAddress(_)) => Action::RemoteAddress,
            Some(A::MaskedRemoteAddress(masked)) => {
                let length = |value: Option<&pb::UInt32Value>, most: u32| match value {
                    None => Ok(most),
                    Some(value) if value.value <= most => Ok(value.value),
                    Some(_) => Err(invalid("prefix_mask_len", format!("greater than {most}"))),
                };
                Action::MaskedRemoteAddress {
                    v4: length(masked.v4_prefix_mask_len.as_ref(), 32)?,
                    v6: length(masked.v6_prefix_mask_len.as_ref(), 128)?,
                }
            }
            Some(A::GenericKey(generic)) => Action::Fixed(named(
                &generic.descriptor_key,
                "generic_key",
                &generic.descriptor_value,
            )?),
            Some(A::HeaderValueMatch(rule)) => Action::Headers(
                rule.headers
                    .iter()
                    .map(HeaderMatch::compile)
                    .collect::<Result<_, _>>()?,
                wanted(rule.expect_match.as_ref()),
                named(&rule.descriptor_key, "header_match", &rule.descriptor_value)?,
            ),
            Some(A::QueryParameterValueMatch(rule)) => Action::Queries(
                rule.query_parameters
                    .iter()
                    .map(QueryMatch::compile)
                    .collect::<Result<_, _>>()?,
                wanted(rule.expect_match.as_ref()),
                named(&rule.descriptor_key, "query_match", &rule.descriptor_value)?,
            ),
            Some(A::RemoteAddressMatch(rule)) => {
                let matcher = rule
                    .address_matcher
                    .as_ref()
                    .ok_or_else(|| invalid("address_matcher", "absent"))?;
                Action::Addresses(
                    matcher
                        .ranges
                        .iter()
                        .map(|range| {
                            Cidr::compile(
                                &lateen_protocols::envoy::envoy::config::core::v3::CidrRange {
                                    address_prefix: range.address_prefix.clone(),
                                    prefix_len: range.prefix_len,
                                },
                            )
                        })
                        .collect::<Result<_, _>>()?,
                    !matcher.invert_match,
                    named(
                        &rule.descriptor_key,
                        "remote_address_match",
                        &rule.descriptor_value,
                    )?,
                )
            }
            Some(A::DynamicMetadata(metadata)) => Action::Metadata {
                of_route: false,
                path: Key::compile(metadata.metadata_key.as_ref())?,
                key: given("descriptor_key", &metadata.descriptor_key)?,
                default: metadata.default_value.clone(),
                skip: false,
            },
            Some(A::Metadata(metadata)) => Action::Metadata {
                of_route: match metadata.source() {
                    Source::Dynamic => false,
                    Source::RouteEntry => true,
                    Source::ClusterEntry | Source::ClusterLocalityEntry => {
                        return Err(invalid("source", "metadata of clusters is not supported"));
                    }
                },
                path: Key::compile(metadata.metadata_key.as_ref())?,
                key: given("descriptor_key", &metadata.descriptor_key)?,
                default: metadata.default_value.clone(),
                skip: metadata.skip_if_absent,
            },
            Some(A::Extension(extension)) => {
                return Err(invalid(
                    format!("extension {}", extension.name),
                    "not supported",
                ));
            }
        })
    }

    fn entry(&self, subject: &Subject<'_>) -> Said {
        let absent = |skip: bool| if skip { Said::Nothing } else { Said::Stop };
        let held = |holds: bool, wanted: bool, entry: &Entry| match holds == wanted {
            true => Said::Entry(entry.clone()),
            false => Said::Stop,
        };
        let remote = subject.info.downstream_remote.ip();
        match self {
            Action::SourceCluster => Said::Entry(entry("source_cluster", subject.us)),
            Action::DestinationCluster => {
                Said::Entry(entry("destination_cluster", subject.cluster))
            }
            Action::Header { name, key, skip } => {
                let all = &subject.head.headers;
                match all.get(name).or_else(|| pseudo(subject.head, name)) {
                    Some(value) => Said::Entry(entry(key, String::from_utf8_lossy(value))),
                    None => absent(*skip),
                }
            }
            Action::Query { name, key, skip } => {
                let query = subject.head.query();
                match query.and_then(|query| query_parameter(query, name.as_bytes())) {
                    Some(value) if !value.is_empty() => {
                        Said::Entry(entry(key, String::from_utf8_lossy(value)))
                    }
                    _ => absent(*skip),
                }
            }
            Action::RemoteAddress => Said::Entry(entry("remote_address", remote.to_string())),
            Action::MaskedRemoteAddress { v4, v6 } => {
                let masked = match remote {
                    std::net::IpAddr::V4(ip) => {
                        let mask = u32::MAX.checked_shl(32 - v4).unwrap_or(0);
                        format!(
                            "{}/{v4}",
                            std::net::Ipv4Addr::from_bits(ip.to_bits() & mask)
                        )
                    }
                    std::net::IpAddr::V6(ip) => {
                        let mask = u128::MAX.checked_shl(128 - v6).unwrap_or(0);
                        format!(
                            "{}/{v6}",
                            std::net::Ipv6Addr::from_bits(ip.to_bits() & mask)
                        )
                    }
                };
                Said::Entry(entry("masked_remote_address", masked))
            }
            Action::Fixed(entry) => Said::Entry(entry.clone()),
            Action::Headers(rules, wanted, entry) => held(
                rules.iter().all(|rule| rule.matches(subject.head)),
                *wanted,
                entry,
            ),
            Action::Queries(rules, wanted, entry) => {
                let query = subject.head.query();
                held(rules.iter().all(|rule| rule.matches(query)), *wanted, entry)
            }
            Action::Addresses(ranges, wanted, entry) => held(
                ranges.iter().any(|range| range.contains(remote)),
                *wanted,
                entry,
            ),
            Action::Metadata {
                of_route,
                path,
                key,
                default,
                skip,
            } => {
                let found = match of_route {
                    true => path.find(Some(&subject.selected.route().metadata)),
                    false => path.find(subject.info.metadata.as_deref()),
                };
                match found {
                    Some(Kind::StringValue(text)) if !text.is_empty() => {
                        Said::Entry(entry(key, text.as_str()))
                    }
                    _ if !default.is_empty() => Said::Entry(entry(key, default.as_str())),
                    _ => absent(*skip),
                }
            }
        }
    }
}

fn pseudo<'a>(head: &'a RequestHead, name: &Name) -> Option<&'a [u8]> {
    Some(match name.as_bytes() {
        b":path" => &head.path,
        b":authority" | b"host" => &head.authority,
        b":method" => &head.method,
        b":scheme" => &head.scheme,
        _ => return None,
    })
}

impl Key {
    fn compile(key: Option<&MetadataKey>) -> Result<Key, ConfigError> {
        let within = |error: ConfigError| error.within("metadata_key");
        let key = key.ok_or_else(|| within(invalid("key", "absent")))?;
        let segment = |segment: &lateen_protocols::envoy::envoy::r#type::metadata::v3::metadata_key::PathSegment| {
            match segment.segment.as_ref() {
                Some(Segment::Key(key)) if !key.is_empty() => Ok(key.clone()),
                _ => Err(within(invalid("path", "a segment has no key"))),
            }
        };
        let path: Vec<_> = key.path.iter().map(segment).collect::<Result<_, _>>()?;
        if path.is_empty() {
            return Err(within(invalid("path", "empty")));
        }
        Ok(Key {
            filter: given("key", &key.key).map_err(within)?,
            path,
        })
    }

    fn find<'a>(
        &self,
        all: Option<&'a std::collections::HashMap<String, pb::Struct>>,
    ) -> Option<&'a Kind> {
        let mut fields = all?.get(&self.filter)?;
        let (last, parents) = self.path.split_last()?;
        for key in parents {
            match fields.fields.get(key)?.kind.as_ref()? {
                Kind::StructValue(inner) => fields = inner,
                _ => return None,
            }
        }
        fields.fields.get(last)?.kind.as_ref()
    }
}

impl Limit {
    fn compile(proto: &Override) -> Result<Limit, ConfigError> {
        Ok(match proto.override_specifier.as_ref() {
            None => return Err(invalid("limit", "absent")),
            Some(OverrideSpecifier::RateLimit(limit)) => Limit::Fixed(RateLimitOverride {
                requests_per_unit: limit.requests_per_unit,
                unit: limit.unit,
            }),
            Some(OverrideSpecifier::DynamicMetadata(metadata)) => {
                Limit::Metadata(Key::compile(metadata.metadata_key.as_ref())?)
            }
        })
    }

    fn of(&self, subject: &Subject<'_>) -> Option<RateLimitOverride> {
        let key = match self {
            Limit::Fixed(limit) => return Some(*limit),
            Limit::Metadata(key) => key,
        };
        let Kind::StructValue(limit) = key.find(subject.info.metadata.as_deref())? else {
            return None;
        };
        let requests = match limit.fields.get("requests_per_unit")?.kind.as_ref()? {
            Kind::NumberValue(number) if (0.0..=f64::from(u32::MAX)).contains(number) => *number,
            _ => return None,
        };
        let unit = match limit.fields.get("unit")?.kind.as_ref()? {
            Kind::StringValue(unit) => unit,
            _ => return None,
        };
        let unit = lateen_protocols::envoy::envoy::r#type::v3::RateLimitUnit::from_str_name(unit)?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "between 0 and the largest number, as was just checked"
        )]
        Some(RateLimitOverride {
            requests_per_unit: requests as u32,
            unit: unit.into(),
        })
    }
}

impl Hits {
    fn compile(proto: &HitsAddend) -> Result<Hits, ConfigError> {
        let count = match (proto.number.as_ref(), proto.format.as_str()) {
            (Some(number), "") => Count::Number(number.value),
            (None, "") => return Err(invalid("hits_addend", "neither number nor format")),
            (Some(_), _) => return Err(invalid("hits_addend", "both number and format")),
            (None, format) => Count::Format(
                Format::text(format, true).map_err(|error| error.within("hits_addend.format"))?,
            ),
        };
        Ok(Hits {
            count,
            negative: proto.is_negative_hits,
        })
    }

    fn count(&self, subject: &Subject<'_>) -> Option<u64> {
        match &self.count {
            Count::Number(number) => Some(*number),
            Count::Format(format) => {
                let mut text = Vec::new();
                let facts = Facts {
                    request: Some(subject.head),
                    route: Some(subject.selected),
                    ..Facts::of_connection(subject.info)
                };
                format.write(&facts, &mut text);
                std::str::from_utf8(&text).ok()?.parse().ok()
            }
        }
    }
}

#[cfg(test)]
mod tests;
