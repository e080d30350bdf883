//! What the interfaces of all templates share: values, verdicts, and the interfaces `handler`, which every guest
//! exports, and `host`, which it may import.

use lateen_engine::ValueType;

use super::{Enum, Function, Interface, Record, Shape, Variant};

/// How a value of each type is called in the variant `value`.
pub fn case(ty: ValueType) -> &'static str {
    match ty {
        ValueType::String => "string-value",
        ValueType::Int64 => "int64-value",
        ValueType::Double => "double-value",
        ValueType::Bool => "bool-value",
        ValueType::Timestamp => "timestamp-value",
        ValueType::IpAddress => "ip-address-value",
        ValueType::EmailAddress => "email-address-value",
        ValueType::Uri => "uri-value",
        ValueType::DnsName => "dns-name-value",
        ValueType::Duration => "duration-value",
        ValueType::StringMap => "string-map-value",
    }
}

/// How each type is called in the enum `value-type`.
pub fn type_case(ty: ValueType) -> &'static str {
    let case = case(ty);
    case.strip_suffix("-value").unwrap_or(case)
}

/// What a value of type `ty` is made of.
pub fn payload(ty: ValueType) -> Shape {
    match ty {
        ValueType::String | ValueType::EmailAddress | ValueType::Uri | ValueType::DnsName => {
            Shape::String
        }
        ValueType::Int64 => Shape::S64,
        ValueType::Double => Shape::F64,
        ValueType::Bool => Shape::Bool,
        ValueType::Timestamp => record(
            "timestamp",
            [("seconds", Shape::S64), ("nanoseconds", Shape::U32)],
        ),
        ValueType::Duration => record(
            "duration",
            [("seconds", Shape::S64), ("nanoseconds", Shape::S32)],
        ),
        ValueType::IpAddress => list(Shape::U8),
        ValueType::StringMap => pairs(),
    }
}

/// A value of any type.
pub fn value() -> Shape {
    Shape::Variant(Variant {
        name: "value".to_owned(),
        cases: ValueType::ALL
            .into_iter()
            .map(|ty| (case(ty).to_owned(), Some(payload(ty))))
            .collect(),
    })
}

/// A verdict.
pub fn status() -> Shape {
    record(
        "status",
        [
            ("code", Shape::U32),
            ("message", Shape::String),
            ("direct-response", option(direct_response())),
        ],
    )
}

/// The proxy's answer in the service's stead.
pub fn direct_response() -> Shape {
    record(
        "direct-response",
        [
            ("code", Shape::U32),
            ("body", Shape::String),
            ("headers", pairs()),
        ],
    )
}

/// The answer to a check.
pub fn check_result() -> Shape {
    record(
        "check-result",
        [
            ("status", status()),
            ("valid-milliseconds", option(Shape::U64)),
            ("valid-use-count", option(Shape::S32)),
        ],
    )
}

/// How much is asked for.
pub fn quota_args() -> Shape {
    record(
        "quota-args",
        [
            ("dedup-id", Shape::String),
            ("amount", Shape::S64),
            ("best-effort", Shape::Bool),
        ],
    )
}

/// How a limit stands.
pub fn quota_window() -> Shape {
    record(
        "quota-window",
        [
            ("limit", Shape::S64),
            ("remaining", Shape::S64),
            ("reset-milliseconds", Shape::U64),
        ],
    )
}

/// How much is granted.
pub fn quota_result() -> Shape {
    record(
        "quota-result",
        [
            ("status", status()),
            ("valid-milliseconds", option(Shape::U64)),
            ("granted", Shape::S64),
            ("window", option(quota_window())),
        ],
    )
}

/// The type of an expression.
pub fn value_type() -> Shape {
    Shape::Enum(Enum {
        name: "value-type".to_owned(),
        cases: ValueType::ALL
            .into_iter()
            .map(|ty| type_case(ty).to_owned())
            .collect(),
    })
}

/// The types of an instance's expressions.
pub fn instance_type() -> Shape {
    record(
        "instance-type",
        [
            ("name", Shape::String),
            ("template", Shape::String),
            (
                "fields",
                list(Shape::Tuple(vec![Shape::String, value_type()])),
            ),
        ],
    )
}

/// What every guest exports.
pub fn handler() -> Interface {
    Interface {
        name: "handler".to_owned(),
        doc: "What every adapter exports.".to_owned(),
        functions: vec![Function {
            name: "configure",
            doc: "Called first, and once for each copy of the adapter that runs: the handler's parameters as JSON, and the \
                  instances that rules will send. An error lists what is wrong with the parameters.",
            params: vec![
                ("params", Shape::String),
                ("instances", list(instance_type())),
            ],
            result: Some(Shape::Result(None, Some(Box::new(list(Shape::String))))),
        }],
    }
}

/// The levels of a log line.
pub fn level() -> Shape {
    Shape::Enum(Enum {
        name: "level".to_owned(),
        cases: ["debug", "info", "warn", "error"]
            .map(str::to_owned)
            .to_vec(),
    })
}

/// What a guest may import.
pub fn host() -> Interface {
    Interface {
        name: "host".to_owned(),
        doc: "What Mixer lends to an adapter. There is nothing else: no files, no network."
            .to_owned(),
        functions: vec![
            Function {
                name: "log",
                doc: "Says something in Mixer's log, at most 1024 bytes; a flood is dropped and counted.",
                params: vec![("level", level()), ("message", Shape::String)],
                result: None,
            },
            Function {
                name: "now",
                doc: "Milliseconds that pass steadily, from an arbitrary moment.",
                params: vec![],
                result: Some(Shape::U64),
            },
        ],
    }
}

/// Types that stand in the interface `types`, in order of use, with what their author should know.
pub(super) fn types() -> [(Shape, &'static str); 11] {
    [
        (
            payload(ValueType::Timestamp),
            "An instant: seconds since 1970-01-01T00:00:00Z.",
        ),
        (
            payload(ValueType::Duration),
            "A span of time; both parts have the same sign.",
        ),
        (
            value(),
            "The value of an expression. An IP address is 4 or 16 bytes in network order.",
        ),
        (
            direct_response(),
            "An HTTP response that the proxy gives in the service's stead.",
        ),
        (
            status(),
            "A verdict: a code of google.rpc.Code, 0 lets the request go on.",
        ),
        (
            check_result(),
            "A verdict, for how long it holds and how often it may be used; none: not again. A negative count: without limit.",
        ),
        (
            quota_args(),
            "How much is asked for. Attempts of one request have the same dedup-id; empty: unknown.",
        ),
        (quota_window(), "How a limit stands after an answer."),
        (
            quota_result(),
            "How much was granted, and for how long that is good.",
        ),
        (value_type(), "The type of an expression."),
        (
            instance_type(),
            "An instance that will come: its template, and path and type of each field that has an expression.",
        ),
    ]
}

fn record<const N: usize>(name: &str, fields: [(&str, Shape); N]) -> Shape {
    Shape::Record(Record {
        name: name.to_owned(),
        fields: fields
            .into_iter()
            .map(|(label, shape)| (label.to_owned(), shape))
            .collect(),
    })
}

fn list(of: Shape) -> Shape {
    Shape::List(Box::new(of))
}

fn option(of: Shape) -> Shape {
    Shape::Option(Box::new(of))
}

fn pairs() -> Shape {
    list(Shape::Tuple(vec![Shape::String, Shape::String]))
}
