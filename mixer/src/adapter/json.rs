//! Values as JSON, for the adapters that write it.

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use lateen_adapter::Value;
use serde_json::Value as Json;

/// A moment in RFC 3339, to the microsecond.
pub(super) fn rfc3339(time: &DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// A value; spans and moments as text.
pub(super) fn json(value: &Value) -> Json {
    match value {
        Value::Int64(n) => Json::from(*n),
        Value::Double(n) => Json::from(*n),
        Value::Bool(b) => Json::from(*b),
        Value::Duration(span) => Json::from(go_duration(*span)),
        Value::Timestamp(time) => Json::from(rfc3339(time)),
        Value::StringMap(map) => Json::Object(
            map.iter()
                .map(|(k, v)| (k.to_string(), Json::from(&**v)))
                .collect(),
        ),
        other => Json::from(other.to_string()),
    }
}

/// A span as Go prints it: `6.848ms`, `1m0.5s`.
pub(super) fn go_duration(span: TimeDelta) -> String {
    let Some(nanos) = span.num_nanoseconds() else {
        return Value::Duration(span).to_string();
    };
    let sign = if nanos < 0 { "-" } else { "" };
    let nanos = nanos.unsigned_abs();
    let decimal = |per: u64| {
        let text = format!(
            "{}.{:0width$}",
            nanos / per,
            nanos % per,
            width = per.ilog10() as usize
        );
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    match nanos {
        0 => "0s".into(),
        1..1_000 => format!("{sign}{nanos}ns"),
        1_000..1_000_000 => format!("{sign}{}µs", decimal(1_000)),
        1_000_000..1_000_000_000 => format!("{sign}{}ms", decimal(1_000_000)),
        _ => {
            let minutes = nanos / 60_000_000_000;
            let rest = nanos % 60_000_000_000;
            let seconds = format!("{}.{:09}", rest / 1_000_000_000, rest % 1_000_000_000);
            let seconds = seconds.trim_end_matches('0').trim_end_matches('.');
            match (minutes / 60, minutes % 60) {
                (0, 0) => format!("{sign}{seconds}s"),
                (0, m) => format!("{sign}{m}m{seconds}s"),
                (h, m) => format!("{sign}{h}h{m}m{seconds}s"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_printed_as_go_does() {
        for (nanos, text) in [
            (0, "0s"),
            (7, "7ns"),
            (1_500, "1.5µs"),
            (6_848_000, "6.848ms"),
            (-20_000_000, "-20ms"),
            (60_500_000_000, "1m0.5s"),
            (3_600_000_000_000, "1h0m0s"),
        ] {
            assert_eq!(go_duration(TimeDelta::nanoseconds(nanos)), text);
        }
    }
}
