//! Conditions on metadata: of the stream, as other filters left it, or of the route, as configuration has it.

use lateen_protocols::{
    envoy::envoy::{
        config::rbac::v3::{MetadataSource, SourcedMetadata},
        r#type::matcher::v3 as proto,
    },
    envoy::google::protobuf as pb,
};
use pb::value::Kind;
use proto::{double_matcher, list_matcher, value_matcher::MatchPattern};

use crate::{
    config_error::ConfigError,
    info::StreamInfo,
    proto::invalid,
    route::{Route, matcher::StringMatch},
};

/// Envoy's `MetadataMatcher`, compiled.
#[derive(Debug)]
pub(crate) struct MetadataMatch {
    of_route: bool,
    filter: String,
    path: Vec<String>,
    value: ValueMatch,
    invert: bool,
}

#[derive(Debug)]
enum ValueMatch {
    Null,
    Number(f64),
    /// From, up to but not including.
    Range(f64, f64),
    Text(StringMatch),
    Bool(bool),
    Present(bool),
    /// Some value of a list.
    Element(Box<ValueMatch>),
    AnyOf(Vec<ValueMatch>),
}

impl MetadataMatch {
    /// A condition on dynamic metadata.
    pub(crate) fn of_stream(matcher: &proto::MetadataMatcher) -> Result<Self, ConfigError> {
        MetadataMatch::compile(matcher, false).map_err(|error| error.within("metadata"))
    }

    /// A condition on the metadata that is named with it.
    pub(super) fn sourced(sourced: &SourcedMetadata) -> Result<Self, ConfigError> {
        let within = |error: ConfigError| error.within("sourced_metadata");
        let matcher = sourced
            .metadata_matcher
            .as_ref()
            .ok_or_else(|| within(invalid("metadata_matcher", "absent")))?;
        let source = MetadataSource::try_from(sourced.metadata_source)
            .map_err(|_| within(invalid("metadata_source", "unknown")))?;
        MetadataMatch::compile(matcher, source == MetadataSource::Route).map_err(within)
    }

    fn compile(matcher: &proto::MetadataMatcher, of_route: bool) -> Result<Self, ConfigError> {
        let mut path = Vec::with_capacity(matcher.path.len());
        for segment in &matcher.path {
            let Some(proto::metadata_matcher::path_segment::Segment::Key(key)) = &segment.segment
            else {
                return Err(invalid("path", "a segment has no key"));
            };
            path.push(key.clone());
        }
        if path.is_empty() {
            return Err(invalid("path", "empty"));
        }
        let value = matcher
            .value
            .as_ref()
            .ok_or_else(|| invalid("value", "absent"))?;
        Ok(MetadataMatch {
            of_route,
            filter: matcher.filter.clone(),
            path,
            value: ValueMatch::compile(value)?,
            invert: matcher.invert,
        })
    }

    pub(in crate::filter) fn holds(&self, route: Option<&Route>, info: &StreamInfo) -> bool {
        let all = match self.of_route {
            true => route.map(|route| &route.metadata),
            false => info.metadata.as_deref(),
        };
        let value = all.and_then(|all| self.find(all.get(&self.filter)?));
        value.is_some_and(|kind| self.value.matches(kind)) != self.invert
    }

    /// Whether dynamic metadata has the value; `None` if the key is absent.
    pub(crate) fn finds(&self, info: &StreamInfo) -> Option<bool> {
        let all = info.metadata.as_deref()?;
        let kind = self.find(all.get(&self.filter)?)?;
        Some(self.value.matches(kind) != self.invert)
    }

    fn find<'a>(&self, fields: &'a pb::Struct) -> Option<&'a Kind> {
        let (last, parents) = self.path.split_last()?;
        let mut fields = fields;
        for key in parents {
            match fields.fields.get(key)?.kind.as_ref()? {
                Kind::StructValue(inner) => fields = inner,
                _ => return None,
            }
        }
        fields.fields.get(last)?.kind.as_ref()
    }
}

impl ValueMatch {
    fn compile(value: &proto::ValueMatcher) -> Result<ValueMatch, ConfigError> {
        Ok(match value.match_pattern.as_ref() {
            None => return Err(invalid("value", "no pattern")),
            Some(MatchPattern::NullMatch(_)) => ValueMatch::Null,
            Some(MatchPattern::DoubleMatch(number)) => match number.match_pattern.as_ref() {
                Some(double_matcher::MatchPattern::Exact(number)) => ValueMatch::Number(*number),
                Some(double_matcher::MatchPattern::Range(range)) => {
                    ValueMatch::Range(range.start, range.end)
                }
                None => return Err(invalid("double_match", "no pattern")),
            },
            Some(MatchPattern::StringMatch(text)) => {
                ValueMatch::Text(StringMatch::compile("string_match", text)?)
            }
            Some(MatchPattern::BoolMatch(value)) => ValueMatch::Bool(*value),
            Some(MatchPattern::PresentMatch(present)) => ValueMatch::Present(*present),
            Some(MatchPattern::ListMatch(list)) => match list.match_pattern.as_ref() {
                Some(list_matcher::MatchPattern::OneOf(value)) => {
                    ValueMatch::Element(Box::new(ValueMatch::compile(value)?))
                }
                None => return Err(invalid("list_match", "no pattern")),
            },
            Some(MatchPattern::OrMatch(or)) => ValueMatch::AnyOf(
                or.value_matchers
                    .iter()
                    .map(ValueMatch::compile)
                    .collect::<Result<_, _>>()?,
            ),
        })
    }

    #[allow(
        clippy::float_cmp,
        reason = "configuration asks for exactly this number"
    )]
    fn matches(&self, kind: &Kind) -> bool {
        match (self, kind) {
            (ValueMatch::Present(wanted), _) => *wanted,
            (ValueMatch::AnyOf(all), _) => all.iter().any(|one| one.matches(kind)),
            (ValueMatch::Null, Kind::NullValue(_)) => true,
            (ValueMatch::Number(want), Kind::NumberValue(number)) => want == number,
            (ValueMatch::Range(from, to), Kind::NumberValue(number)) => {
                from <= number && number < to
            }
            (ValueMatch::Text(pattern), Kind::StringValue(text)) => {
                pattern.matches(text.as_bytes())
            }
            (ValueMatch::Bool(want), Kind::BoolValue(value)) => want == value,
            (ValueMatch::Element(one), Kind::ListValue(list)) => list
                .values
                .iter()
                .filter_map(|value| value.kind.as_ref())
                .any(|kind| one.matches(kind)),
            _ => false,
        }
    }
}
