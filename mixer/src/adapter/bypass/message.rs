//! What adapter processes get: the messages that Istio generates from its templates
//! (istio.io/istio `mixer/template/*/template_handler_service.proto`).

use std::{collections::HashMap, net::IpAddr};

use lateen_adapter::{Value, instance::Values};
use lateen_protocols::istio::{
    mixer::adapter::model::v1beta1 as model,
    policy::v1beta1::{self as policy, value::Value as Kind},
};

/// An instance without fields. Its name has a number that no field of a template has.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Name {
    #[prost(string, tag = "72295727")]
    pub(super) name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct CheckNothingRequest {
    #[prost(message, optional, tag = "1")]
    pub(super) instance: Option<Name>,
    #[prost(message, optional, tag = "2")]
    pub(super) adapter_config: Option<prost_types::Any>,
    #[prost(string, tag = "3")]
    pub(super) dedup_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ReportNothingRequest {
    #[prost(message, repeated, tag = "1")]
    pub(super) instances: Vec<Name>,
    #[prost(message, optional, tag = "2")]
    pub(super) adapter_config: Option<prost_types::Any>,
    #[prost(string, tag = "3")]
    pub(super) dedup_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Metric {
    #[prost(string, tag = "72295727")]
    pub(super) name: String,
    #[prost(message, optional, tag = "1")]
    pub(super) value: Option<policy::Value>,
    #[prost(map = "string, message", tag = "2")]
    pub(super) dimensions: HashMap<String, policy::Value>,
    #[prost(string, tag = "3")]
    pub(super) monitored_resource_type: String,
    #[prost(map = "string, message", tag = "4")]
    pub(super) monitored_resource_dimensions: HashMap<String, policy::Value>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct MetricRequest {
    #[prost(message, repeated, tag = "1")]
    pub(super) instances: Vec<Metric>,
    #[prost(message, optional, tag = "2")]
    pub(super) adapter_config: Option<prost_types::Any>,
    #[prost(string, tag = "3")]
    pub(super) dedup_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Quota {
    #[prost(string, tag = "72295727")]
    pub(super) name: String,
    #[prost(map = "string, message", tag = "1")]
    pub(super) dimensions: HashMap<String, policy::Value>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct QuotaRequest {
    #[prost(message, optional, tag = "1")]
    pub(super) instance: Option<Quota>,
    #[prost(message, optional, tag = "2")]
    pub(super) adapter_config: Option<prost_types::Any>,
    #[prost(string, tag = "3")]
    pub(super) dedup_id: String,
    #[prost(message, optional, tag = "4")]
    pub(super) quota_request: Option<model::QuotaRequest>,
}

impl From<lateen_adapter::instance::Metric> for Metric {
    fn from(metric: lateen_adapter::instance::Metric) -> Self {
        Self {
            name: metric.name.to_string(),
            value: metric.value.map(value),
            dimensions: dimensions(metric.dimensions),
            monitored_resource_type: metric.monitored_resource_type.to_string(),
            monitored_resource_dimensions: dimensions(metric.monitored_resource_dimensions),
        }
    }
}

pub(super) fn dimensions(values: Values) -> HashMap<String, policy::Value> {
    let all = values.into_iter();
    all.map(|(name, v)| (name.to_string(), value(v))).collect()
}

fn value(value: Value) -> policy::Value {
    let kind = match value {
        Value::String(text) => Kind::StringValue(text.to_string()),
        Value::Int64(n) => Kind::Int64Value(n),
        Value::Double(n) => Kind::DoubleValue(n),
        Value::Bool(b) => Kind::BoolValue(b),
        Value::Ip(ip) => Kind::IpAddressValue(policy::IpAddress {
            value: match ip {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            },
        }),
        Value::Timestamp(time) => Kind::TimestampValue(policy::TimeStamp {
            value: Some(prost_types::Timestamp {
                seconds: time.timestamp(),
                nanos: i32::try_from(time.timestamp_subsec_nanos().min(999_999_999)).unwrap_or(0),
            }),
        }),
        Value::Duration(span) => Kind::DurationValue(policy::Duration {
            value: Some(prost_types::Duration {
                seconds: span.num_seconds(),
                nanos: span.subsec_nanos(),
            }),
        }),
        Value::Email(text) => Kind::EmailAddressValue(policy::EmailAddress {
            value: text.to_string(),
        }),
        Value::DnsName(text) => Kind::DnsNameValue(policy::DnsName {
            value: text.to_string(),
        }),
        Value::Uri(text) => Kind::UriValue(policy::Uri {
            value: text.to_string(),
        }),
        Value::StringMap(map) => Kind::StringMapValue(policy::StringMap {
            value: map
                .iter()
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect(),
        }),
    };
    policy::Value { value: Some(kind) }
}
