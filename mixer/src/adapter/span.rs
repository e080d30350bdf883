//! Spans of template `tracespan`, read: what the adapters for traces share.

use std::net::IpAddr;

use chrono::{DateTime, Utc};
use lateen_adapter::{HandlerError, Value, instance::TraceSpan, value};

/// Who a span is of, and what else is certain about it.
#[derive(Clone, Debug)]
pub(super) struct Ids {
    pub(super) trace: [u8; 16],
    pub(super) span: [u8; 8],
    pub(super) parent: Option<[u8; 8]>,
    pub(super) start: DateTime<Utc>,
    pub(super) end: DateTime<Utc>,
}

/// One end of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct End<'a> {
    pub(super) name: &'a str,
    pub(super) ip: Option<IpAddr>,
}

impl Ids {
    /// `None`: the request is part of no trace.
    pub(super) fn read(span: &TraceSpan) -> Result<Option<Self>, HandlerError> {
        if span.trace_id.is_empty() || span.span_id.is_empty() {
            return Ok(None);
        }
        let wrong = |what: &str| HandlerError::invalid(format!("{}: {what}", span.name));
        let mut trace = [0; 16];
        let trace_digits: &str = &span.trace_id;
        let at = match trace_digits.len() {
            16 => 8,
            32 => 0,
            _ => return Err(wrong("trace_id has neither 16 nor 32 digits")),
        };
        let id = trace.get_mut(at..).unwrap_or_default();
        hex::decode_to_slice(trace_digits, id).map_err(|_| wrong("trace_id is not hexadecimal"))?;
        let read = |text: &str, what: &str| {
            let mut id = [0; 8];
            hex::decode_to_slice(text, &mut id)
                .map_err(|_| wrong(&format!("{what} has not 16 hexadecimal digits")))?;
            Ok(id)
        };
        let mut own = read(&span.span_id, "span_id")?;
        let mut parent = match &*span.parent_span_id {
            "" => None,
            text => Some(read(text, "parent_span_id")?),
        };
        if span.rewrite_client_span_id {
            // Both sides were told one id. The caller's span takes another, which the callee's names as its
            // parent: both can work it out.
            if span.client_span {
                own = another(own);
            } else {
                parent = Some(another(own));
            }
        }
        let moment = |value: &Option<Value>, what: &str| match value {
            Some(Value::Timestamp(time)) => Ok(*time),
            _ => Err(wrong(&format!("there is no {what}"))),
        };
        let start = moment(&span.start_time, "start_time")?;
        Ok(Some(Self {
            trace,
            span: own,
            parent,
            start,
            end: moment(&span.end_time, "end_time")?.max(start),
        }))
    }
}

/// Another id that follows from `id`, not 0. SplitMix64's last steps, which give every id its own.
fn another(id: [u8; 8]) -> [u8; 8] {
    let mut n = u64::from_be_bytes(id).wrapping_add(0x9e37_79b9_7f4a_7c15);
    n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^= n >> 31;
    n.max(1).to_be_bytes()
}

/// The end that reports, and the other one.
pub(super) fn ends(span: &TraceSpan) -> (End<'_>, End<'_>) {
    let ip = |value: &Option<Value>| {
        value
            .as_ref()
            .and_then(value::ip)
            .filter(|ip| !ip.is_unspecified())
    };
    let source = End {
        name: &span.source_name,
        ip: ip(&span.source_ip),
    };
    let destination = End {
        name: &span.destination_name,
        ip: ip(&span.destination_ip),
    };
    if span.client_span {
        (source, destination)
    } else {
        (destination, source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_are_rewritten_differ_and_are_the_same_on_both_sides() {
        let id = 7_u64.to_be_bytes();
        assert_ne!(another(id), id);
        assert_eq!(another(id), another(id));
        assert_ne!(another(id), another(8_u64.to_be_bytes()));
    }
}
