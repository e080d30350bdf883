//! The templates Mixer knows: the fields of each, and what kind of work its instances are for.
//!
//! Names and types are those of Istio's templates, so that instances written for it load unchanged.

use lateen_engine::ValueType;

/// What an instance of a template asks of a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Variety {
    /// May the request go on?
    Check,
    /// Something happened.
    Report,
    /// May the request take this much?
    Quota,
    /// What else is known about the request?
    AttributeGenerator,
    /// May the request go on, and what was found out? Rules put that into headers.
    CheckWithOutput,
}

/// The schema of instances.
#[derive(Debug)]
pub struct Template {
    /// As `compiledTemplate` and the legacy kinds spell it.
    pub name: &'static str,
    /// Which of the handler traits takes its instances.
    pub variety: Variety,
    /// What an instance carries.
    pub fields: &'static [Field],
    /// What a generator or a check with output returns: the fields behind `$out.` and `output.`.
    pub outputs: &'static [(&'static str, ValueType)],
}

/// One field of a template or of a message inside one.
#[derive(Debug)]
pub struct Field {
    /// In the spelling of the proto.
    pub name: &'static str,
    /// Of which type.
    pub kind: FieldKind,
}

/// The type of a field.
#[derive(Debug)]
pub enum FieldKind {
    /// Exactly this type.
    Exact(ValueType),
    /// Any type; the handler is told which at build time.
    Any,
    /// Named values of any types.
    Map,
    /// Fields inside a field.
    Message(&'static [Field]),
}

impl Field {
    /// Whether YAML key `key` names this field, in snake case or camel case.
    pub fn is_named(&self, key: &str) -> bool {
        key == self.name || camel(self.name) == key
    }
}

impl Template {
    /// The field that YAML key `key` names.
    pub fn field(&self, key: &str) -> Option<&'static Field> {
        self.fields.iter().find(|f| f.is_named(key))
    }

    /// The type of output `name`.
    pub fn output(&self, name: &str) -> Option<ValueType> {
        self.outputs
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, t)| *t)
    }
}

/// The template called `name`.
pub fn find(name: &str) -> Option<&'static Template> {
    ALL.iter().copied().find(|t| t.name == name)
}

/// `source_uid` as JSON spells it: `sourceUid`.
fn camel(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut upper = false;
    for c in name.chars() {
        match c {
            '_' => upper = true,
            c if upper => {
                out.extend(c.to_uppercase());
                upper = false;
            }
            c => out.push(c),
        }
    }
    out
}

const fn exact(name: &'static str, value_type: ValueType) -> Field {
    Field {
        name,
        kind: FieldKind::Exact(value_type),
    }
}

const fn string(name: &'static str) -> Field {
    exact(name, ValueType::String)
}

const fn map(name: &'static str) -> Field {
    Field {
        name,
        kind: FieldKind::Map,
    }
}

/// Nothing but the fact that the rule matched, for a check.
pub static CHECKNOTHING: Template = check("checknothing", &[]);

/// A value to be looked up in a list.
pub static LISTENTRY: Template = check(
    "listentry",
    &[Field {
        name: "value",
        kind: FieldKind::Any,
    }],
);

/// An API call and the key presented with it.
pub static APIKEY: Template = check(
    "apikey",
    &[
        string("api"),
        string("api_version"),
        string("api_operation"),
        string("api_key"),
        exact("timestamp", ValueType::Timestamp),
    ],
);

/// Who wants to do what.
pub static AUTHORIZATION: Template = check(
    "authorization",
    &[
        Field {
            name: "subject",
            kind: FieldKind::Message(&[string("user"), string("groups"), map("properties")]),
        },
        Field {
            name: "action",
            kind: FieldKind::Message(&[
                string("namespace"),
                string("service"),
                string("method"),
                string("path"),
                map("properties"),
            ]),
        },
    ],
);

/// The counter an amount is taken from, named by its dimensions.
pub static QUOTA: Template = Template {
    name: "quota",
    variety: Variety::Quota,
    fields: &[map("dimensions")],
    outputs: &[],
};

/// Nothing but the fact that the rule matched, for a report.
pub static REPORTNOTHING: Template = report("reportnothing", &[]);

/// A sample of a metric.
pub static METRIC: Template = report(
    "metric",
    &[
        Field {
            name: "value",
            kind: FieldKind::Any,
        },
        map("dimensions"),
        string("monitored_resource_type"),
        map("monitored_resource_dimensions"),
    ],
);

/// A line of a log.
pub static LOGENTRY: Template = report(
    "logentry",
    &[
        map("variables"),
        exact("timestamp", ValueType::Timestamp),
        string("severity"),
        string("monitored_resource_type"),
        map("monitored_resource_dimensions"),
    ],
);

/// A span of a trace.
pub static TRACESPAN: Template = report(
    "tracespan",
    &[
        string("trace_id"),
        string("span_id"),
        string("parent_span_id"),
        string("span_name"),
        exact("start_time", ValueType::Timestamp),
        exact("end_time", ValueType::Timestamp),
        map("span_tags"),
        exact("http_status_code", ValueType::Int64),
        exact("client_span", ValueType::Bool),
        exact("rewrite_client_span_id", ValueType::Bool),
        string("source_name"),
        exact("source_ip", ValueType::IpAddress),
        string("destination_name"),
        exact("destination_ip", ValueType::IpAddress),
        exact("request_size", ValueType::Int64),
        exact("request_total_size", ValueType::Int64),
        exact("response_size", ValueType::Int64),
        exact("response_total_size", ValueType::Int64),
        string("api_protocol"),
    ],
);

/// That one workload called another.
pub static EDGE: Template = report(
    "edge",
    &[
        exact("timestamp", ValueType::Timestamp),
        string("source_workload_namespace"),
        string("source_workload_name"),
        string("source_owner"),
        string("source_uid"),
        string("destination_workload_namespace"),
        string("destination_workload_name"),
        string("destination_owner"),
        string("destination_uid"),
        string("destination_service_namespace"),
        string("destination_service_name"),
        string("context_protocol"),
        string("api_protocol"),
    ],
);

/// A call, as Istio 1.0's service control wants to know it.
pub static SERVICECONTROLREPORT: Template = report(
    "servicecontrolreport",
    &[
        string("api_version"),
        string("api_operation"),
        string("api_protocol"),
        string("api_service"),
        string("api_key"),
        exact("request_time", ValueType::Timestamp),
        string("request_method"),
        string("request_path"),
        exact("request_bytes", ValueType::Int64),
        exact("response_time", ValueType::Timestamp),
        exact("response_code", ValueType::Int64),
        exact("response_bytes", ValueType::Int64),
        exact("response_latency", ValueType::Duration),
    ],
);

/// The workloads at both ends, from their uid or address.
pub static KUBERNETES: Template = Template {
    name: "kubernetes",
    variety: Variety::AttributeGenerator,
    fields: &[
        string("source_uid"),
        exact("source_ip", ValueType::IpAddress),
        string("destination_uid"),
        exact("destination_ip", ValueType::IpAddress),
        exact("destination_port", ValueType::Int64),
    ],
    outputs: &[
        ("source_pod_uid", ValueType::String),
        ("source_pod_ip", ValueType::IpAddress),
        ("source_pod_name", ValueType::String),
        ("source_labels", ValueType::StringMap),
        ("source_namespace", ValueType::String),
        ("source_service_account_name", ValueType::String),
        ("source_host_ip", ValueType::IpAddress),
        ("source_workload_uid", ValueType::String),
        ("source_workload_name", ValueType::String),
        ("source_workload_namespace", ValueType::String),
        ("source_owner", ValueType::String),
        ("destination_pod_uid", ValueType::String),
        ("destination_pod_ip", ValueType::IpAddress),
        ("destination_pod_name", ValueType::String),
        ("destination_container_name", ValueType::String),
        ("destination_labels", ValueType::StringMap),
        ("destination_namespace", ValueType::String),
        ("destination_service_account_name", ValueType::String),
        ("destination_host_ip", ValueType::IpAddress),
        ("destination_workload_uid", ValueType::String),
        ("destination_workload_name", ValueType::String),
        ("destination_workload_namespace", ValueType::String),
        ("destination_owner", ValueType::String),
    ],
};

/// A key to be looked up in a table: Istio's sample of a check with output.
pub static KEYVAL: Template = Template {
    name: "keyval",
    variety: Variety::CheckWithOutput,
    fields: &[string("key")],
    outputs: &[("value", ValueType::String)],
};

/// All of them.
pub static ALL: &[&Template] = &[
    &CHECKNOTHING,
    &LISTENTRY,
    &APIKEY,
    &AUTHORIZATION,
    &QUOTA,
    &REPORTNOTHING,
    &METRIC,
    &LOGENTRY,
    &TRACESPAN,
    &EDGE,
    &SERVICECONTROLREPORT,
    &KUBERNETES,
    &KEYVAL,
];

const fn check(name: &'static str, fields: &'static [Field]) -> Template {
    Template {
        name,
        variety: Variety::Check,
        fields,
        outputs: &[],
    }
}

const fn report(name: &'static str, fields: &'static [Field]) -> Template {
    Template {
        name,
        variety: Variety::Report,
        fields,
        outputs: &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_answer_to_both_spellings() {
        for key in ["monitored_resource_type", "monitoredResourceType"] {
            assert_eq!(
                METRIC.field(key).map(|f| f.name),
                Some("monitored_resource_type")
            );
        }
        assert!(METRIC.field("monitoredresourcetype").is_none());
    }

    #[test]
    fn names_are_unique() {
        for (i, a) in ALL.iter().enumerate() {
            assert!(
                ALL.iter().skip(i + 1).all(|b| a.name != b.name),
                "{}",
                a.name
            );
        }
    }
}
