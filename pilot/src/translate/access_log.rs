//! Access logs as the mesh configuration wants them.

use envoy_types::pb::envoy::config::accesslog::v3::{AccessLog, access_log::ConfigType};
use envoy_types::pb::envoy::config::core::v3::{
    SubstitutionFormatString, substitution_format_string::Format,
};
use envoy_types::pb::envoy::extensions::access_loggers::file::v3::{
    FileAccessLog, file_access_log::AccessLogFormat,
};
use envoy_types::pb::google::protobuf::Struct;
use lateen_config::MeshConfig;
use lateen_config::mesh::AccessLogEncoding;

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
    let custom = mesh.access_log_format.as_str();
    let format = match mesh.access_log_encoding {
        AccessLogEncoding::Text => Format::TextFormatSource(
            inline(if custom.is_empty() {
                default_text()
            } else {
                with_newline(custom)
            })
            .unwrap_or_default(),
        ),
        AccessLogEncoding::Json => Format::JsonFormat(json_format(custom)),
    };
    vec![AccessLog {
        name: "envoy.access_loggers.file".to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(&FileAccessLog {
            path: mesh.access_log_file.clone(),
            access_log_format: Some(AccessLogFormat::LogFormat(SubstitutionFormatString {
                format: Some(format),
                ..Default::default()
            })),
        }))),
        ..Default::default()
    }]
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
