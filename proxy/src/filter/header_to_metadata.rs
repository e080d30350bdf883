//! Turns headers and cookies into dynamic metadata, which the subset balancer, access logs and other filters
//! read. Envoy: `envoy.filters.http.header_to_metadata`.

use std::{borrow::Cow, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use lateen_protocols::envoy::{
    envoy::extensions::filters::http::header_to_metadata::v3::{
        Config,
        config::{KeyValuePair, Rule as RuleProto, ValueEncode, ValueType},
    },
    google::protobuf as pb,
};
use pb::value::Kind;
use prost::Message as _;

use crate::{
    config_error::ConfigError,
    filter::{FilterContext, ResponseContext, RouteFilterConfig},
    head::{Headers, Name, RequestHead, ResponseHead},
    info::StreamInfo,
    proto::invalid,
    route::matcher::{HeaderKey, RegexRewrite, cookie, joined},
};

/// Where values go that name no place.
const DEFAULT_NAMESPACE: &str = "envoy.filters.http.header_to_metadata";
/// Longest value that is taken. Envoy: `MAX_HEADER_VALUE_LEN`.
const MAX_VALUE_BYTES: usize = 8 * 1024;

/// The filter of one connection manager or route.
#[derive(Debug)]
pub struct HeaderToMetadata {
    request: Vec<Rule>,
    response: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    from: From,
    present: Option<Target>,
    missing: Option<Target>,
}

#[derive(Debug)]
enum From {
    Header {
        key: HeaderKey,
        name: Name,
        remove: bool,
    },
    Cookie(String),
}

/// Where a value goes, and as what.
#[derive(Debug)]
struct Target {
    namespace: String,
    key: String,
    /// Taken instead of what the header says, unless it is empty.
    value: String,
    rewrite: Option<RegexRewrite>,
    kind: ValueType,
    base64: bool,
}

impl HeaderToMetadata {
    /// Compiles the filter, or what a route has in its place.
    ///
    /// # Errors
    /// When a rule is not valid.
    pub fn compile(config: &Config) -> Result<HeaderToMetadata, ConfigError> {
        let list = |field: &str, rules: &[RuleProto]| {
            let one = |(index, rule)| {
                Rule::compile(rule).map_err(|error| error.within(format_args!("{field}[{index}]")))
            };
            rules.iter().enumerate().map(one).collect::<Result<_, _>>()
        };
        Ok(HeaderToMetadata {
            request: list("request_rules", &config.request_rules)?,
            response: list("response_rules", &config.response_rules)?,
        })
    }

    pub(super) fn on_request(&self, cx: &mut FilterContext<'_>, head: &mut RequestHead) {
        let own: Option<Arc<HeaderToMetadata>> = match cx.config(head) {
            Some(RouteFilterConfig::HeaderToMetadata(own)) => Some(own.clone()),
            _ => None,
        };
        for rule in &own.as_deref().unwrap_or(self).request {
            let value = match &rule.from {
                From::Header { key, .. } => key.in_request(head),
                From::Cookie(name) => cookie(&head.headers, name).map(Cow::Borrowed),
            };
            rule.apply(value.as_deref(), &mut cx.info.borrow_mut());
            let found = value.is_some();
            rule.remove(found, &mut head.headers);
        }
    }

    pub(super) fn on_response(
        &self,
        cx: &ResponseContext<'_>,
        own: Option<&RouteFilterConfig>,
        head: &mut ResponseHead,
    ) {
        let own = match own {
            Some(RouteFilterConfig::HeaderToMetadata(own)) => Some(&**own),
            _ => None,
        };
        for rule in &own.unwrap_or(self).response {
            let status = head.status.to_string();
            let value = match &rule.from {
                From::Header {
                    key: HeaderKey::Status,
                    ..
                } => Some(Cow::Borrowed(status.as_bytes())),
                From::Header { name, .. } => joined(&head.headers, name),
                From::Cookie(name) => cookie(&head.headers, name).map(Cow::Borrowed),
            };
            rule.apply(value.as_deref(), &mut cx.info.borrow_mut());
            let found = value.is_some();
            rule.remove(found, &mut head.headers);
        }
    }
}

impl Rule {
    fn compile(rule: &RuleProto) -> Result<Rule, ConfigError> {
        let from = match (rule.header.as_str(), rule.cookie.as_str()) {
            (name, "") if !name.is_empty() => From::Header {
                key: HeaderKey::new(name),
                name: Name::new(name),
                remove: rule.remove,
            },
            ("", name) if !name.is_empty() => {
                if rule.remove {
                    return Err(invalid("remove", "a cookie cannot be removed"));
                }
                From::Cookie(name.to_owned())
            }
            _ => return Err(invalid("header", "either header or cookie must be given")),
        };
        if rule.on_header_present.is_none() && rule.on_header_missing.is_none() {
            return Err(invalid(
                "on_header_present",
                "neither this nor on_header_missing is given",
            ));
        }
        let target = |field, target: Option<&KeyValuePair>| {
            let target = target.map(Target::compile).transpose();
            target.map_err(|error: ConfigError| error.within(field))
        };
        let missing = target("on_header_missing", rule.on_header_missing.as_ref())?;
        if missing.as_ref().is_some_and(|to| to.value.is_empty()) {
            return Err(invalid("on_header_missing.value", "absent"));
        }
        Ok(Rule {
            from,
            present: target("on_header_present", rule.on_header_present.as_ref())?,
            missing,
        })
    }

    fn apply(&self, value: Option<&[u8]>, info: &mut StreamInfo) {
        let (target, value) = match (value, &self.present, &self.missing) {
            (Some(value), Some(target), _) => (target, value),
            (None, _, Some(target)) => (target, &b""[..]),
            _ => return,
        };
        if let Some(kind) = target.value_of(value) {
            let value = pb::Value { kind: Some(kind) };
            let fields = [(target.key.clone(), value)].into();
            info.add_metadata(&target.namespace, pb::Struct { fields });
        }
    }

    fn remove(&self, found: bool, headers: &mut Headers) {
        if let From::Header {
            name, remove: true, ..
        } = &self.from
            && found
            && self.present.is_some()
        {
            headers.remove(name);
        }
    }
}

impl Target {
    fn compile(target: &KeyValuePair) -> Result<Target, ConfigError> {
        if target.key.is_empty() {
            return Err(invalid("key", "absent"));
        }
        let rewrite = target.regex_value_rewrite.as_ref();
        if rewrite.is_some() && !target.value.is_empty() {
            return Err(invalid("regex_value_rewrite", "cannot stand beside value"));
        }
        Ok(Target {
            namespace: match target.metadata_namespace.as_str() {
                "" => DEFAULT_NAMESPACE.to_owned(),
                name => name.to_owned(),
            },
            key: target.key.clone(),
            value: target.value.clone(),
            rewrite: rewrite
                .map(|rewrite| RegexRewrite::compile("regex_value_rewrite", rewrite))
                .transpose()?,
            kind: ValueType::try_from(target.r#type).map_err(|_| invalid("type", "unknown"))?,
            base64: target.encode() == ValueEncode::Base64,
        })
    }

    /// The value for metadata; `None` for one that is empty, too long or not of the type.
    fn value_of(&self, header: &[u8]) -> Option<Kind> {
        let text = match (&self.rewrite, self.value.as_str()) {
            (Some(rewrite), _) => rewrite.apply(header),
            (None, "") => Cow::Borrowed(header),
            (None, value) => Cow::Borrowed(value.as_bytes()),
        };
        if text.is_empty() || text.len() >= MAX_VALUE_BYTES {
            return None;
        }
        let bytes = match self.base64 {
            true => Cow::Owned(STANDARD.decode(&text).ok().filter(|b| !b.is_empty())?),
            false => text,
        };
        match self.kind {
            ValueType::String => Some(Kind::StringValue(
                String::from_utf8_lossy(&bytes).into_owned(),
            )),
            ValueType::Number => {
                let number = std::str::from_utf8(&bytes).ok()?.trim().parse().ok()?;
                Some(Kind::NumberValue(number))
            }
            ValueType::ProtobufValue => pb::Value::decode(&*bytes).ok()?.kind,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(kind: ValueType, base64: bool) -> Target {
        Target::compile(&KeyValuePair {
            key: "k".to_owned(),
            r#type: kind.into(),
            encode: i32::from(base64),
            ..KeyValuePair::default()
        })
        .unwrap()
    }

    #[test]
    fn values_are_of_the_type_asked_for_or_not_taken() {
        let text = |text: &str| Some(Kind::StringValue(text.to_owned()));
        assert_eq!(target(ValueType::String, false).value_of(b"v"), text("v"));
        assert_eq!(target(ValueType::String, false).value_of(b""), None);
        let long = vec![b'x'; MAX_VALUE_BYTES];
        assert_eq!(target(ValueType::String, false).value_of(&long), None);
        assert_eq!(
            target(ValueType::String, true).value_of(b"aGk="),
            text("hi")
        );
        assert_eq!(target(ValueType::String, true).value_of(b"!"), None);
        assert_eq!(
            target(ValueType::Number, false).value_of(b"1.5"),
            Some(Kind::NumberValue(1.5))
        );
        assert_eq!(target(ValueType::Number, false).value_of(b"x"), None);
        let value = pb::Value {
            kind: Some(Kind::BoolValue(true)),
        };
        let encoded = STANDARD.encode(value.encode_to_vec());
        assert_eq!(
            target(ValueType::ProtobufValue, true).value_of(encoded.as_bytes()),
            Some(Kind::BoolValue(true))
        );
    }

    #[test]
    fn rules_that_say_nothing_are_refused() {
        let rule = RuleProto {
            header: "x".to_owned(),
            ..RuleProto::default()
        };
        assert!(Rule::compile(&rule).is_err());
        let missing = RuleProto {
            on_header_missing: Some(KeyValuePair {
                key: "k".to_owned(),
                ..KeyValuePair::default()
            }),
            ..rule
        };
        assert_eq!(
            Rule::compile(&missing).unwrap_err().path,
            "on_header_missing.value"
        );
    }
}
