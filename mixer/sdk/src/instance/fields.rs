//! Typed instances back in the general form, for handlers that take any template: they hand instances on.

use std::sync::Arc;

use lateen_engine::{Text, Value};

use super::{
    CheckInstance, CheckOutputInstance, Custom, FieldValue, Fields, GenerateInstance,
    QuotaInstance, ReportInstance, Values,
};
use crate::template::{self, Template};

impl Fields {
    /// The value of field `name`.
    pub fn get(&self, name: &str) -> Option<&FieldValue> {
        self.0.iter().find(|(n, _)| *n == name).map(|(_, v)| v)
    }

    fn with(mut self, name: &'static str, value: impl Into<Option<Value>>) -> Self {
        let value = value.into().map(FieldValue::One);
        self.0.extend(value.map(|value| (name, value)));
        self
    }

    fn text(self, name: &'static str, text: Text) -> Self {
        self.with(name, Value::String(text))
    }

    fn map_of(mut self, name: &'static str, values: Values) -> Self {
        self.0.push((name, FieldValue::Map(values)));
        self
    }

    fn message_of(mut self, name: &'static str, fields: Self) -> Self {
        self.0.push((name, FieldValue::Message(fields)));
        self
    }
}

fn custom(name: Arc<str>, template: &'static Template, fields: Fields) -> Custom {
    Custom {
        name,
        template,
        fields,
    }
}

impl From<CheckInstance> for Custom {
    fn from(instance: CheckInstance) -> Self {
        let fields = Fields::default();
        match instance {
            CheckInstance::CheckNothing(i) => custom(i.name, &template::CHECKNOTHING, fields),
            CheckInstance::ListEntry(i) => {
                custom(i.name, &template::LISTENTRY, fields.with("value", i.value))
            }
            CheckInstance::ApiKey(i) => {
                let fields = fields
                    .text("api", i.api)
                    .text("api_version", i.api_version)
                    .text("api_operation", i.api_operation)
                    .text("api_key", i.api_key)
                    .with("timestamp", i.timestamp);
                custom(i.name, &template::APIKEY, fields)
            }
            CheckInstance::Authorization(i) => {
                let subject = Fields::default()
                    .text("user", i.subject.user)
                    .text("groups", i.subject.groups)
                    .map_of("properties", i.subject.properties);
                let action = Fields::default()
                    .text("namespace", i.action.namespace)
                    .text("service", i.action.service)
                    .text("method", i.action.method)
                    .text("path", i.action.path)
                    .map_of("properties", i.action.properties);
                let fields = fields
                    .message_of("subject", subject)
                    .message_of("action", action);
                custom(i.name, &template::AUTHORIZATION, fields)
            }
            CheckInstance::Custom(i) => i,
        }
    }
}

impl From<CheckOutputInstance> for Custom {
    fn from(instance: CheckOutputInstance) -> Self {
        match instance {
            CheckOutputInstance::KeyVal(i) => {
                let fields = Fields::default().text("key", i.key);
                custom(i.name, &template::KEYVAL, fields)
            }
            CheckOutputInstance::Custom(i) => i,
        }
    }
}

impl From<ReportInstance> for Custom {
    fn from(instance: ReportInstance) -> Self {
        let fields = Fields::default();
        match instance {
            ReportInstance::ReportNothing(i) => custom(i.name, &template::REPORTNOTHING, fields),
            ReportInstance::Metric(i) => {
                let fields = fields
                    .with("value", i.value)
                    .map_of("dimensions", i.dimensions)
                    .text("monitored_resource_type", i.monitored_resource_type)
                    .map_of(
                        "monitored_resource_dimensions",
                        i.monitored_resource_dimensions,
                    );
                custom(i.name, &template::METRIC, fields)
            }
            ReportInstance::LogEntry(i) => {
                let fields = fields
                    .map_of("variables", i.variables)
                    .with("timestamp", i.timestamp)
                    .text("severity", i.severity)
                    .text("monitored_resource_type", i.monitored_resource_type)
                    .map_of(
                        "monitored_resource_dimensions",
                        i.monitored_resource_dimensions,
                    );
                custom(i.name, &template::LOGENTRY, fields)
            }
            ReportInstance::TraceSpan(i) => {
                let fields = fields
                    .text("trace_id", i.trace_id)
                    .text("span_id", i.span_id)
                    .text("parent_span_id", i.parent_span_id)
                    .text("span_name", i.span_name)
                    .with("start_time", i.start_time)
                    .with("end_time", i.end_time)
                    .map_of("span_tags", i.span_tags)
                    .with("http_status_code", Value::Int64(i.http_status_code))
                    .with("client_span", Value::Bool(i.client_span))
                    .with(
                        "rewrite_client_span_id",
                        Value::Bool(i.rewrite_client_span_id),
                    )
                    .text("source_name", i.source_name)
                    .with("source_ip", i.source_ip)
                    .text("destination_name", i.destination_name)
                    .with("destination_ip", i.destination_ip)
                    .with("request_size", Value::Int64(i.request_size))
                    .with("request_total_size", Value::Int64(i.request_total_size))
                    .with("response_size", Value::Int64(i.response_size))
                    .with("response_total_size", Value::Int64(i.response_total_size))
                    .text("api_protocol", i.api_protocol);
                custom(i.name, &template::TRACESPAN, fields)
            }
            ReportInstance::Custom(i) => i,
        }
    }
}

impl From<QuotaInstance> for Custom {
    fn from(instance: QuotaInstance) -> Self {
        match instance.custom {
            Some(i) => i,
            None => {
                let fields = Fields::default().map_of("dimensions", instance.dimensions);
                custom(instance.name, &template::QUOTA, fields)
            }
        }
    }
}

impl From<GenerateInstance> for Custom {
    fn from(instance: GenerateInstance) -> Self {
        match instance {
            GenerateInstance::Kubernetes(i) => {
                let fields = Fields::default()
                    .text("source_uid", i.source_uid)
                    .with("source_ip", i.source_ip)
                    .text("destination_uid", i.destination_uid)
                    .with("destination_ip", i.destination_ip)
                    .with("destination_port", Value::Int64(i.destination_port));
                custom(i.name, &template::KUBERNETES, fields)
            }
            GenerateInstance::Custom(i) => i,
        }
    }
}
