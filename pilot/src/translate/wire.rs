//! Small change of protobuf: wrappers, durations, addresses, metadata.

use std::collections::HashMap;
use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::{
    Address, AggregatedConfigSource, ApiVersion, ConfigSource, DataSource, Metadata, Pipe,
    SocketAddress, address::Address as AddressKind, config_source::ConfigSourceSpecifier,
    data_source::Specifier, socket_address::PortSpecifier,
};
use envoy_types::pb::envoy::r#type::matcher::v3::{
    RegexMatcher, StringMatcher, string_matcher::MatchPattern,
};
use envoy_types::pb::envoy::r#type::v3::{FractionalPercent, fractional_percent::DenominatorType};
use envoy_types::pb::google::protobuf::{
    Any, BoolValue, Duration, ListValue, Struct, UInt32Value, Value, value::Kind,
};
use prost::{Message, Name};

use lateen_config::StringMatch;

/// Packs a message by its full name.
pub(super) fn any<M: Message + Name>(message: &M) -> Any {
    Any {
        type_url: format!("type.googleapis.com/{}", M::full_name()),
        value: message.encode_to_vec(),
    }
}

pub(super) fn u32_value(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

pub(super) fn bool_value(value: bool) -> Option<BoolValue> {
    Some(BoolValue { value })
}

/// A count users may write as a signed number.
pub(super) fn count(value: i32) -> Option<UInt32Value> {
    u32::try_from(value).ok().and_then(u32_value)
}

pub(super) fn duration(of: lateen_config::Duration) -> Option<Duration> {
    Some(Duration {
        seconds: i64::try_from(of.0.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(of.0.subsec_nanos()).unwrap_or(0),
    })
}

pub(super) const ZERO: Option<Duration> = Some(Duration {
    seconds: 0,
    nanos: 0,
});

/// Percent into millionths, as Envoy's sampling wants them.
pub(super) fn fraction(percent: f64) -> Option<FractionalPercent> {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0..=1e6"
    )]
    let numerator = (percent.clamp(0.0, 100.0) * 10_000.0).round() as u32;
    Some(FractionalPercent {
        numerator,
        denominator: DenominatorType::Million as i32,
    })
}

pub(super) fn socket_address(host: &str, port: u16) -> Option<Address> {
    Some(Address {
        address: Some(AddressKind::SocketAddress(SocketAddress {
            address: host.to_owned(),
            port_specifier: Some(PortSpecifier::PortValue(port.into())),
            ..Default::default()
        })),
    })
}

pub(super) fn ip_address(ip: IpAddr, port: u16) -> Option<Address> {
    socket_address(&ip.to_string(), port)
}

/// `unix:///path` or a host.
pub(super) fn endpoint_address(address: &str, port: u16) -> Option<Address> {
    match address.strip_prefix("unix://") {
        Some(path) => Some(Address {
            address: Some(AddressKind::Pipe(Pipe {
                path: path.to_owned(),
                mode: 0,
            })),
        }),
        None => socket_address(address, port),
    }
}

pub(super) fn file(path: &str) -> Option<DataSource> {
    Some(DataSource {
        specifier: Some(Specifier::Filename(path.to_owned())),
        ..Default::default()
    })
}

pub(super) fn inline(text: impl Into<String>) -> Option<DataSource> {
    Some(DataSource {
        specifier: Some(Specifier::InlineString(text.into())),
        ..Default::default()
    })
}

/// From this very stream. No fetch timeout: a listener without routes, or a cluster without
/// endpoints, would answer wrongly rather than wait.
pub(super) fn ads() -> Option<ConfigSource> {
    Some(ConfigSource {
        initial_fetch_timeout: ZERO,
        resource_api_version: ApiVersion::V3 as i32,
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..Default::default()
    })
}

pub(super) fn text(value: impl Into<String>) -> Value {
    Value {
        kind: Some(Kind::StringValue(value.into())),
    }
}

pub(super) fn structure<const N: usize>(fields: [(&str, Value); N]) -> Struct {
    Struct {
        fields: fields
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect(),
    }
}

pub(super) fn nested<const N: usize>(fields: [(&str, Value); N]) -> Value {
    Value {
        kind: Some(Kind::StructValue(structure(fields))),
    }
}

pub(super) fn list(values: Vec<Value>) -> Value {
    Value {
        kind: Some(Kind::ListValue(ListValue { values })),
    }
}

pub(super) fn metadata(
    fields: impl IntoIterator<Item = (&'static str, Struct)>,
) -> Option<Metadata> {
    let filter_metadata: HashMap<String, Struct> = fields
        .into_iter()
        .map(|(key, fields)| (key.to_owned(), fields))
        .collect();
    (!filter_metadata.is_empty()).then(|| Metadata {
        filter_metadata,
        ..Default::default()
    })
}

/// JSON into protobuf's own JSON.
pub(super) fn json(value: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    Value {
        kind: Some(match value {
            Json::Null => Kind::NullValue(0),
            Json::Bool(flag) => Kind::BoolValue(*flag),
            Json::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
            Json::String(text) => Kind::StringValue(text.clone()),
            Json::Array(all) => Kind::ListValue(ListValue {
                values: all.iter().map(json).collect(),
            }),
            Json::Object(map) => Kind::StructValue(Struct {
                fields: map
                    .iter()
                    .map(|(key, value)| (key.clone(), json(value)))
                    .collect(),
            }),
        }),
    }
}

pub(super) fn regex(pattern: &str) -> RegexMatcher {
    RegexMatcher {
        regex: pattern.to_owned(),
        engine_type: None,
    }
}

pub(super) fn exact(text: impl Into<String>) -> StringMatcher {
    StringMatcher {
        match_pattern: Some(MatchPattern::Exact(text.into())),
        ignore_case: false,
    }
}

pub(super) fn prefix(text: impl Into<String>) -> StringMatcher {
    StringMatcher {
        match_pattern: Some(MatchPattern::Prefix(text.into())),
        ignore_case: false,
    }
}

/// `None` for what only has to be there. An empty prefix is there as well: Envoy refuses one.
pub(super) fn string_matcher(matcher: &StringMatch) -> Option<StringMatcher> {
    match matcher {
        StringMatch::Present => None,
        StringMatch::Exact(text) => Some(exact(text)),
        StringMatch::Prefix(text) if text.is_empty() => None,
        StringMatch::Prefix(text) => Some(prefix(text)),
        StringMatch::Regex(pattern) => Some(StringMatcher {
            match_pattern: Some(MatchPattern::SafeRegex(regex(pattern))),
            ignore_case: false,
        }),
    }
}
