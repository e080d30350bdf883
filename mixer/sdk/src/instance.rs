//! Instances: what Mixer hands to a handler, one type per template.

mod fields;

use std::sync::Arc;

use lateen_engine::{Text, Value};

use crate::template::{Template, Variety};

/// Named values, in the order of the configuration.
pub type Values = Vec<(Arc<str>, Value)>;

/// An evaluated instance before it takes its template's type. The server makes these.
#[derive(Clone, Debug, Default)]
pub struct Fields(pub Vec<(&'static str, FieldValue)>);

/// The value of one field.
#[derive(Clone, Debug)]
pub enum FieldValue {
    /// Of a field with one value.
    One(Value),
    /// Of a field that is a map.
    Map(Values),
    /// Of a field that is a message.
    Message(Fields),
}

impl Fields {
    fn take(&mut self, name: &str) -> Option<FieldValue> {
        let at = self.0.iter().position(|(n, _)| *n == name)?;
        Some(self.0.swap_remove(at).1)
    }

    fn value(&mut self, name: &str) -> Option<Value> {
        match self.take(name)? {
            FieldValue::One(value) => Some(value),
            FieldValue::Map(_) | FieldValue::Message(_) => None,
        }
    }

    fn string(&mut self, name: &str) -> Text {
        match self.value(name) {
            Some(Value::String(text)) => text,
            _ => Text::EMPTY,
        }
    }

    fn integer(&mut self, name: &str) -> i64 {
        match self.value(name) {
            Some(Value::Int64(n)) => n,
            _ => 0,
        }
    }

    fn boolean(&mut self, name: &str) -> bool {
        matches!(self.value(name), Some(Value::Bool(true)))
    }

    fn map(&mut self, name: &str) -> Values {
        match self.take(name) {
            Some(FieldValue::Map(values)) => values,
            _ => Values::new(),
        }
    }

    fn message(&mut self, name: &str) -> Self {
        match self.take(name) {
            Some(FieldValue::Message(fields)) => fields,
            _ => Self::default(),
        }
    }
}

/// Instance `instance` of template `template` cannot be made of what was evaluated.
#[derive(Debug, thiserror::Error)]
#[error("{instance} is no instance for {wanted}: its template is {template}")]
pub struct WrongTemplate {
    instance: Arc<str>,
    template: &'static str,
    wanted: &'static str,
}

/// An instance of a template that has no type of its own here.
#[derive(Clone, Debug)]
pub struct Custom {
    /// Full name of the instance.
    pub name: Arc<str>,
    /// Its template.
    pub template: &'static Template,
    /// What it carries.
    pub fields: Fields,
}

/// What a check is about.
#[derive(Clone, Debug)]
pub enum CheckInstance {
    /// Template `checknothing`.
    CheckNothing(CheckNothing),
    /// Template `listentry`.
    ListEntry(ListEntry),
    /// Template `apikey`.
    ApiKey(ApiKey),
    /// Template `authorization`.
    Authorization(Authorization),
    /// Any other template of this variety.
    Custom(Custom),
}

/// The rule matched.
#[derive(Clone, Debug)]
pub struct CheckNothing {
    /// Full name of the instance.
    pub name: Arc<str>,
}

/// A value to be looked up.
#[derive(Clone, Debug)]
pub struct ListEntry {
    /// Full name of the instance.
    pub name: Arc<str>,
    /// What to look up; absent when the instance has no such field.
    pub value: Option<Value>,
}

/// An API call and its key.
#[derive(Clone, Debug)]
pub struct ApiKey {
    /// Full name of the instance.
    pub name: Arc<str>,
    /// The API.
    pub api: Text,
    /// Its version.
    pub api_version: Text,
    /// The operation called.
    pub api_operation: Text,
    /// The key presented.
    pub api_key: Text,
    /// When.
    pub timestamp: Option<Value>,
}

/// Who wants to do what.
#[derive(Clone, Debug)]
pub struct Authorization {
    /// Full name of the instance.
    pub name: Arc<str>,
    /// Who.
    pub subject: Subject,
    /// What.
    pub action: Action,
}

/// Who wants to act.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The user.
    pub user: Text,
    /// The user's groups.
    pub groups: Text,
    /// What else is known.
    pub properties: Values,
}

/// What someone wants to do.
#[derive(Clone, Debug)]
pub struct Action {
    /// Where the service lives.
    pub namespace: Text,
    /// The service.
    pub service: Text,
    /// How: GET, POST.
    pub method: Text,
    /// On what.
    pub path: Text,
    /// What else is known.
    pub properties: Values,
}

impl CheckInstance {
    /// Name of its template.
    pub fn template(&self) -> &'static str {
        match self {
            Self::CheckNothing(_) => "checknothing",
            Self::ListEntry(_) => "listentry",
            Self::ApiKey(_) => "apikey",
            Self::Authorization(_) => "authorization",
            Self::Custom(i) => i.template.name,
        }
    }

    /// Types `fields` as `template` says.
    ///
    /// # Errors
    /// When `template` is not for checks.
    pub fn new(
        template: &'static Template,
        name: Arc<str>,
        mut fields: Fields,
    ) -> Result<Self, WrongTemplate> {
        Ok(match template.name {
            "checknothing" => Self::CheckNothing(CheckNothing { name }),
            "listentry" => Self::ListEntry(ListEntry {
                name,
                value: fields.value("value"),
            }),
            "apikey" => Self::ApiKey(ApiKey {
                name,
                api: fields.string("api"),
                api_version: fields.string("api_version"),
                api_operation: fields.string("api_operation"),
                api_key: fields.string("api_key"),
                timestamp: fields.value("timestamp"),
            }),
            "authorization" => {
                let mut subject = fields.message("subject");
                let mut action = fields.message("action");
                Self::Authorization(Authorization {
                    name,
                    subject: Subject {
                        user: subject.string("user"),
                        groups: subject.string("groups"),
                        properties: subject.map("properties"),
                    },
                    action: Action {
                        namespace: action.string("namespace"),
                        service: action.string("service"),
                        method: action.string("method"),
                        path: action.string("path"),
                        properties: action.map("properties"),
                    },
                })
            }
            _ if template.variety == Variety::Check => Self::Custom(Custom {
                name,
                template,
                fields,
            }),
            other => {
                return Err(WrongTemplate {
                    instance: name,
                    template: other,
                    wanted: "checks",
                });
            }
        })
    }

    /// Full name of the instance.
    pub fn name(&self) -> &Arc<str> {
        match self {
            Self::CheckNothing(i) => &i.name,
            Self::ListEntry(i) => &i.name,
            Self::ApiKey(i) => &i.name,
            Self::Authorization(i) => &i.name,
            Self::Custom(i) => &i.name,
        }
    }
}

/// What a check with output is about.
#[derive(Clone, Debug)]
pub enum CheckOutputInstance {
    /// Template `keyval`.
    KeyVal(KeyVal),
    /// Any other template of this variety.
    Custom(Custom),
}

/// A key to be looked up.
#[derive(Clone, Debug)]
pub struct KeyVal {
    /// Full name of the instance.
    pub name: Arc<str>,
    /// What to look up.
    pub key: Text,
}

impl CheckOutputInstance {
    /// Name of its template.
    pub fn template(&self) -> &'static str {
        match self {
            Self::KeyVal(_) => "keyval",
            Self::Custom(i) => i.template.name,
        }
    }

    /// Types `fields` as `template` says.
    ///
    /// # Errors
    /// When `template` is not for checks with output.
    pub fn new(
        template: &'static Template,
        name: Arc<str>,
        mut fields: Fields,
    ) -> Result<Self, WrongTemplate> {
        match template.name {
            "keyval" => Ok(Self::KeyVal(KeyVal {
                name,
                key: fields.string("key"),
            })),
            _ if template.variety == Variety::CheckWithOutput => Ok(Self::Custom(Custom {
                name,
                template,
                fields,
            })),
            other => Err(WrongTemplate {
                instance: name,
                template: other,
                wanted: "checks with output",
            }),
        }
    }
}

/// What a report is about.
#[derive(Clone, Debug)]
pub enum ReportInstance {
    /// Template `reportnothing`.
    ReportNothing(ReportNothing),
    /// Template `metric`.
    Metric(Metric),
    /// Template `logentry`.
    LogEntry(LogEntry),
    /// Template `tracespan`.
    TraceSpan(Box<TraceSpan>),
    /// Any other template of this variety.
    Custom(Custom),
}

/// The rule matched.
#[derive(Clone, Debug)]
pub struct ReportNothing {
    /// Full name of the instance.
    pub name: Arc<str>,
}

/// A sample of a metric.
#[derive(Clone, Debug)]
pub struct Metric {
    /// Full name of the instance.
    pub name: Arc<str>,
    /// The sample; absent when the instance has no such field.
    pub value: Option<Value>,
    /// What it is a sample of.
    pub dimensions: Values,
    /// Stackdriver's resource type.
    pub monitored_resource_type: Text,
    /// Stackdriver's resource labels.
    pub monitored_resource_dimensions: Values,
}

/// A line of a log.
#[derive(Clone, Debug)]
pub struct LogEntry {
    /// Full name of the instance.
    pub name: Arc<str>,
    /// What it says.
    pub variables: Values,
    /// When.
    pub timestamp: Option<Value>,
    /// How grave, in the words of the configuration.
    pub severity: Text,
    /// Stackdriver's resource type.
    pub monitored_resource_type: Text,
    /// Stackdriver's resource labels.
    pub monitored_resource_dimensions: Values,
}

/// One request as one of its ends saw it.
#[derive(Clone, Debug)]
pub struct TraceSpan {
    /// Full name of the instance.
    pub name: Arc<str>,
    /// The trace, in hexadecimal digits: 16 or 32.
    pub trace_id: Text,
    /// This span, in 16 hexadecimal digits.
    pub span_id: Text,
    /// The span that caused this one; empty: none.
    pub parent_span_id: Text,
    /// What was done.
    pub span_name: Text,
    /// When it began.
    pub start_time: Option<Value>,
    /// When it ended.
    pub end_time: Option<Value>,
    /// What else is known.
    pub span_tags: Values,
    /// Status of the response; 0: unknown.
    pub http_status_code: i64,
    /// Whether the caller's side reports.
    pub client_span: bool,
    /// Whether the two sides of a request share a span id, and the caller's is to be given another.
    pub rewrite_client_span_id: bool,
    /// Who called.
    pub source_name: Text,
    /// From where.
    pub source_ip: Option<Value>,
    /// Who was called.
    pub destination_name: Text,
    /// And where.
    pub destination_ip: Option<Value>,
    /// Bytes of the request's body.
    pub request_size: i64,
    /// Bytes of the request.
    pub request_total_size: i64,
    /// Bytes of the response's body.
    pub response_size: i64,
    /// Bytes of the response.
    pub response_total_size: i64,
    /// `http`, `grpc`.
    pub api_protocol: Text,
}

impl ReportInstance {
    /// Name of its template.
    pub fn template(&self) -> &'static str {
        match self {
            Self::ReportNothing(_) => "reportnothing",
            Self::Metric(_) => "metric",
            Self::LogEntry(_) => "logentry",
            Self::TraceSpan(_) => "tracespan",
            Self::Custom(i) => i.template.name,
        }
    }

    /// Types `fields` as `template` says.
    ///
    /// # Errors
    /// When `template` is not for reports.
    pub fn new(
        template: &'static Template,
        name: Arc<str>,
        mut fields: Fields,
    ) -> Result<Self, WrongTemplate> {
        Ok(match template.name {
            "reportnothing" => Self::ReportNothing(ReportNothing { name }),
            "metric" => Self::Metric(Metric {
                name,
                value: fields.value("value"),
                dimensions: fields.map("dimensions"),
                monitored_resource_type: fields.string("monitored_resource_type"),
                monitored_resource_dimensions: fields.map("monitored_resource_dimensions"),
            }),
            "logentry" => Self::LogEntry(LogEntry {
                name,
                variables: fields.map("variables"),
                timestamp: fields.value("timestamp"),
                severity: fields.string("severity"),
                monitored_resource_type: fields.string("monitored_resource_type"),
                monitored_resource_dimensions: fields.map("monitored_resource_dimensions"),
            }),
            "tracespan" => Self::TraceSpan(Box::new(TraceSpan {
                name,
                trace_id: fields.string("trace_id"),
                span_id: fields.string("span_id"),
                parent_span_id: fields.string("parent_span_id"),
                span_name: fields.string("span_name"),
                start_time: fields.value("start_time"),
                end_time: fields.value("end_time"),
                span_tags: fields.map("span_tags"),
                http_status_code: fields.integer("http_status_code"),
                client_span: fields.boolean("client_span"),
                rewrite_client_span_id: fields.boolean("rewrite_client_span_id"),
                source_name: fields.string("source_name"),
                source_ip: fields.value("source_ip"),
                destination_name: fields.string("destination_name"),
                destination_ip: fields.value("destination_ip"),
                request_size: fields.integer("request_size"),
                request_total_size: fields.integer("request_total_size"),
                response_size: fields.integer("response_size"),
                response_total_size: fields.integer("response_total_size"),
                api_protocol: fields.string("api_protocol"),
            })),
            _ if template.variety == Variety::Report => Self::Custom(Custom {
                name,
                template,
                fields,
            }),
            other => {
                return Err(WrongTemplate {
                    instance: name,
                    template: other,
                    wanted: "reports",
                });
            }
        })
    }
}

/// The counter an amount is taken from.
#[derive(Clone, Debug)]
pub struct QuotaInstance {
    /// Full name of the instance.
    pub name: Arc<str>,
    /// Which of its counters.
    pub dimensions: Values,
    /// Of a template for quota that is not `quota`: all that it carries. It has no dimensions then.
    pub custom: Option<Custom>,
}

impl QuotaInstance {
    /// Types `fields` as `template` says.
    ///
    /// # Errors
    /// When `template` is not for quota.
    pub fn new(
        template: &'static Template,
        name: Arc<str>,
        mut fields: Fields,
    ) -> Result<Self, WrongTemplate> {
        if template.variety != Variety::Quota {
            return Err(WrongTemplate {
                instance: name,
                template: template.name,
                wanted: "quota",
            });
        }
        if template.name != "quota" {
            let custom = Custom {
                name: Arc::clone(&name),
                template,
                fields,
            };
            return Ok(Self {
                name,
                dimensions: Values::new(),
                custom: Some(custom),
            });
        }
        Ok(Self {
            name,
            dimensions: fields.map("dimensions"),
            custom: None,
        })
    }
}

/// What attributes are generated from.
#[derive(Clone, Debug)]
pub enum GenerateInstance {
    /// Template `kubernetes`.
    Kubernetes(Kubernetes),
    /// Any other template of this variety.
    Custom(Custom),
}

/// What is known of the two ends of a request.
#[derive(Clone, Debug)]
pub struct Kubernetes {
    /// Full name of the instance.
    pub name: Arc<str>,
    /// `kubernetes://POD.NAMESPACE`, or empty.
    pub source_uid: Text,
    /// Address of the caller.
    pub source_ip: Option<Value>,
    /// `kubernetes://POD.NAMESPACE`, or empty.
    pub destination_uid: Text,
    /// Address called.
    pub destination_ip: Option<Value>,
    /// Port called; 0: unknown.
    pub destination_port: i64,
}

impl GenerateInstance {
    /// Name of its template.
    pub fn template(&self) -> &'static str {
        match self {
            Self::Kubernetes(_) => "kubernetes",
            Self::Custom(i) => i.template.name,
        }
    }

    /// Types `fields` as `template` says.
    ///
    /// # Errors
    /// When `template` is not for attribute generators.
    pub fn new(
        template: &'static Template,
        name: Arc<str>,
        mut fields: Fields,
    ) -> Result<Self, WrongTemplate> {
        match template.name {
            "kubernetes" => Ok(Self::Kubernetes(Kubernetes {
                name,
                source_uid: fields.string("source_uid"),
                source_ip: fields.value("source_ip"),
                destination_uid: fields.string("destination_uid"),
                destination_ip: fields.value("destination_ip"),
                destination_port: fields.integer("destination_port"),
            })),
            _ if template.variety == Variety::AttributeGenerator => Ok(Self::Custom(Custom {
                name,
                template,
                fields,
            })),
            other => Err(WrongTemplate {
                instance: name,
                template: other,
                wanted: "attribute generators",
            }),
        }
    }
}
