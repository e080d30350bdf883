//! Access logs as the mesh configuration wants them.

use envoy_types::pb::envoy::config::accesslog::v3::{
    AccessLog, AccessLogFilter, AndFilter, ComparisonFilter, ExtensionFilter, HeaderFilter,
    OrFilter, StatusCodeFilter, access_log::ConfigType, access_log_filter::FilterSpecifier,
    comparison_filter::Op, extension_filter::ConfigType as FilterConfig,
};
use envoy_types::pb::envoy::config::core::v3::{
    RuntimeUInt32, SubstitutionFormatString, substitution_format_string::Format,
};
use envoy_types::pb::envoy::config::route::v3::{
    HeaderMatcher, header_matcher::HeaderMatchSpecifier,
};
use envoy_types::pb::envoy::extensions::access_loggers::file::v3::{
    FileAccessLog, file_access_log::AccessLogFormat,
};
use envoy_types::pb::envoy::extensions::access_loggers::filters::cel::v3::ExpressionFilter;
use envoy_types::pb::envoy::r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern};
use envoy_types::pb::google::protobuf::Struct;
use lateen_config::MeshConfig;
use lateen_config::mesh::AccessLogEncoding;
use lateen_config::provider::FileLog;
use lateen_config::telemetry::{Compare, Condition, Text};

use super::wire::{any, inline, json, text};

/// Fields of a line, in Istio's order, by the name they have in JSON. The quoted ones are strings
/// that may hold spaces.
const FIELDS: &[(&str, &str)] = &[
    ("start_time", "[%START_TIME%]"),
    ("method", "\"%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%\""),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    (
        "connection_termination_details",
        "%CONNECTION_TERMINATION_DETAILS%",
    ),
    (
        "upstream_transport_failure_reason",
        "\"%UPSTREAM_TRANSPORT_FAILURE_REASON%\"",
    ),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("duration", "%DURATION%"),
    (
        "upstream_service_time",
        "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",
    ),
    ("x_forwarded_for", "\"%REQ(X-FORWARDED-FOR)%\""),
    ("user_agent", "\"%REQ(USER-AGENT)%\""),
    ("request_id", "\"%REQ(X-REQUEST-ID)%\""),
    ("authority", "\"%REQ(:AUTHORITY)%\""),
    ("upstream_host", "\"%UPSTREAM_HOST%\""),
    ("upstream_cluster", "%UPSTREAM_CLUSTER%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    ("route_name", "%ROUTE_NAME%"),
];

pub(super) fn of(mesh: &MeshConfig) -> Vec<AccessLog> {
    if mesh.access_log_file.is_empty() {
        return Vec::new();
    }
    vec![to_file(
        mesh,
        &FileLog {
            path: mesh.access_log_file.clone(),
            ..FileLog::default()
        },
    )]
}

/// A log of a provider; without a format of its own, in the mesh's.
pub(super) fn to_file(mesh: &MeshConfig, log: &FileLog) -> AccessLog {
    let text = |custom: &str| {
        Format::TextFormatSource(
            inline(if custom.is_empty() {
                default_text()
            } else {
                with_newline(custom)
            })
            .unwrap_or_default(),
        )
    };
    let custom = mesh.access_log_format.as_str();
    let own = log.log_format.as_ref();
    let format = match (own, own.and_then(|own| own.labels.as_ref())) {
        (Some(_), Some(labels)) => Format::JsonFormat(if labels.is_empty() {
            json_format("")
        } else {
            Struct {
                fields: labels
                    .iter()
                    .map(|(key, value)| (key.clone(), json(value)))
                    .collect(),
            }
        }),
        (Some(own), None) => text(own.text.as_deref().unwrap_or_default()),
        (None, _) => match mesh.access_log_encoding {
            AccessLogEncoding::Text => text(custom),
            AccessLogEncoding::Json => Format::JsonFormat(json_format(custom)),
        },
    };
    AccessLog {
        name: "envoy.access_loggers.file".to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(&FileAccessLog {
            path: log.path.clone(),
            access_log_format: Some(AccessLogFormat::LogFormat(SubstitutionFormatString {
                format: Some(format),
                omit_empty_values: log.omit_empty_values,
                ..Default::default()
            })),
        }))),
        ..Default::default()
    }
}

/// What holds where an expression does; what cannot be evaluated does not hold.
pub(super) fn by_expression(expression: &str) -> AccessLogFilter {
    filter(FilterSpecifier::ExtensionFilter(ExtensionFilter {
        name: "envoy.access_loggers.extension_filters.cel".to_owned(),
        config_type: Some(FilterConfig::TypedConfig(any(&ExpressionFilter {
            expression: expression.to_owned(),
            ..Default::default()
        }))),
    }))
}

/// The same in filters that need no CEL.
pub(super) fn by_condition(condition: &Condition) -> AccessLogFilter {
    let all = |list: &[Condition]| list.iter().map(by_condition).collect();
    match condition {
        Condition::All(list) => {
            filter(FilterSpecifier::AndFilter(AndFilter { filters: all(list) }))
        }
        Condition::Any(list) => filter(FilterSpecifier::OrFilter(OrFilter { filters: all(list) })),
        Condition::Status(compare, value) => {
            let op = match compare {
                Compare::Equal => Op::Eq,
                Compare::NotEqual => Op::Ne,
                Compare::AtLeast => Op::Ge,
                Compare::AtMost => Op::Le,
            };
            filter(FilterSpecifier::StatusCodeFilter(StatusCodeFilter {
                comparison: Some(ComparisonFilter {
                    op: op as i32,
                    value: Some(RuntimeUInt32 {
                        default_value: *value,
                        // Envoy wants a name by which operators may change it.
                        runtime_key: "access_log.status".to_owned(),
                    }),
                }),
            }))
        }
        Condition::Present { name, negated } => header(HeaderMatcher {
            name: name.clone(),
            header_match_specifier: Some(HeaderMatchSpecifier::PresentMatch(true)),
            invert_match: *negated,
            ..Default::default()
        }),
        Condition::Header {
            name,
            text,
            negated,
        } => {
            let pattern = match text.clone() {
                Text::Exact(text) => MatchPattern::Exact(text),
                Text::Prefix(text) => MatchPattern::Prefix(text),
                Text::Suffix(text) => MatchPattern::Suffix(text),
                Text::Contains(text) => MatchPattern::Contains(text),
            };
            let holds = header(HeaderMatcher {
                name: name.clone(),
                header_match_specifier: Some(HeaderMatchSpecifier::StringMatch(StringMatcher {
                    match_pattern: Some(pattern),
                    ignore_case: false,
                })),
                invert_match: *negated,
                ..Default::default()
            });
            if !negated {
                return holds;
            }
            // A header that is not there is neither.
            let present = Condition::Present {
                name: name.clone(),
                negated: false,
            };
            filter(FilterSpecifier::AndFilter(AndFilter {
                filters: vec![by_condition(&present), holds],
            }))
        }
    }
}

fn filter(specifier: FilterSpecifier) -> AccessLogFilter {
    AccessLogFilter {
        filter_specifier: Some(specifier),
    }
}

fn header(matcher: HeaderMatcher) -> AccessLogFilter {
    filter(FilterSpecifier::HeaderFilter(HeaderFilter {
        header: Some(matcher),
    }))
}

fn default_text() -> String {
    let fields: Vec<&str> = FIELDS.iter().map(|(_, format)| *format).collect();
    fields.join(" ") + "\n"
}

fn with_newline(format: &str) -> String {
    if format.ends_with('\n') {
        format.to_owned()
    } else {
        format!("{format}\n")
    }
}

/// A custom format that is no JSON object is reported when the mesh configuration is read by the
/// operator's tools; here the default stands in for it.
fn json_format(custom: &str) -> Struct {
    if let Ok(serde_json::Value::Object(map)) = serde_json::from_str(custom) {
        return Struct {
            fields: map
                .iter()
                .map(|(key, value)| (key.clone(), json(value)))
                .collect(),
        };
    }
    Struct {
        fields: FIELDS
            .iter()
            .map(|(name, format)| {
                (
                    (*name).to_owned(),
                    text(format.trim_matches(['"', '[', ']'])),
                )
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_line_is_istios() {
        assert_eq!(
            default_text(),
            "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% \
             %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \
             \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
             %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \
             \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER% \
             %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% \
             %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n"
        );
        let json = json_format("");
        assert_eq!(json.fields["method"], text("%REQ(:METHOD)%"));
        assert_eq!(json.fields.len(), 24);
        assert_eq!(json_format(r#"{"a":"%PROTOCOL%"}"#).fields.len(), 1);
    }
}
