//! Trace context in headers: W3C `traceparent` and B3, single and multi. Both are written upstream, so
//! that an application which forwards only one of them still joins its traces.
//!
//! W3C Trace Context §3 and <https://github.com/openzipkin/b3-propagation>. W3C wins when both are valid:
//! a library that speaks it makes spans of its own, while B3 headers may be forwarded untouched.

use bytes::Bytes;
use opentelemetry::trace::{SpanId, TraceId};

use crate::head::{Headers, Known, Name};

/// What headers say of the trace a request belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Incoming {
    /// The trace and the caller's span.
    pub parent: Option<(TraceId, SpanId)>,
    /// Whether the caller records; `None` leaves it to us.
    pub sampled: Option<bool>,
    /// The context came in `traceparent`, so `tracestate` belongs to it.
    pub w3c: bool,
    /// Flags of `traceparent` that are handed on as they came (`random`, Trace Context level 2).
    pub flags: u8,
}

/// A span's identity, as it goes upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanContext {
    /// The trace.
    pub trace: TraceId,
    /// The span.
    pub span: SpanId,
    /// The span that caused it.
    pub parent: Option<SpanId>,
    /// Whether the trace is recorded.
    pub sampled: bool,
    /// As [`Incoming::flags`].
    pub flags: u8,
}

const SAMPLED: u8 = 1;
const RANDOM: u8 = 2;

/// Reads the context of a request.
pub fn extract(headers: &Headers) -> Incoming {
    // More than one traceparent is as good as none (§3.2).
    let name = Name::Known(Known::TraceParent);
    let mut all = headers.all(&name);
    if let (Some(value), None) = (all.next(), all.next())
        && let Some(incoming) = parse_traceparent(value)
    {
        return incoming;
    }
    match headers.known(Known::B3).and_then(parse_b3) {
        Some(incoming) => incoming,
        None => b3_multi(headers),
    }
}

/// Reads the value of `traceparent`; `None` if it is not valid.
pub fn parse_traceparent(value: &[u8]) -> Option<Incoming> {
    let value = value.trim_ascii();
    let (fixed, rest) = value.split_at_checked(55)?;
    let [version @ .., b'-'] = &fixed[..3] else {
        return None;
    };
    let version = lower_hex::<1>(version)?;
    // A later version may have more fields, none may be 255.
    let valid = match version {
        [0] => rest.is_empty(),
        [255] => false,
        _ => rest.is_empty() || rest.starts_with(b"-"),
    };
    if !valid || fixed[35] != b'-' || fixed[52] != b'-' {
        return None;
    }
    let trace = TraceId::from_bytes(lower_hex(&fixed[3..35])?);
    let span = SpanId::from_bytes(lower_hex(&fixed[36..52])?);
    let [flags] = lower_hex(&fixed[53..55])?;
    (trace != TraceId::INVALID && span != SpanId::INVALID).then_some(Incoming {
        parent: Some((trace, span)),
        sampled: Some(flags & SAMPLED != 0),
        w3c: true,
        flags: flags & RANDOM,
    })
}

/// Reads the value of the single `b3` header; `None` if it is not valid.
pub fn parse_b3(value: &[u8]) -> Option<Incoming> {
    let value = value.trim_ascii();
    let mut parts = value.split(|byte| *byte == b'-');
    let first = parts.next()?;
    let Some(span) = parts.next() else {
        return Some(Incoming {
            sampled: Some(decision(first)?),
            ..Incoming::default()
        });
    };
    let parent = (trace_id(first)?, span_id(span)?);
    let sampled = parts.next().map(decision);
    if sampled == Some(None) {
        return None;
    }
    if let Some(grandparent) = parts.next() {
        span_id(grandparent)?;
    }
    parts.next().is_none().then_some(Incoming {
        parent: Some(parent),
        sampled: sampled.flatten(),
        ..Incoming::default()
    })
}

fn b3_multi(headers: &Headers) -> Incoming {
    let debug = headers
        .known(Known::XB3Flags)
        .is_some_and(|flags| flags == b"1");
    let sampled = headers.known(Known::XB3Sampled).and_then(decision);
    Incoming {
        parent: headers
            .known(Known::XB3TraceId)
            .and_then(trace_id)
            .zip(headers.known(Known::XB3SpanId).and_then(span_id)),
        sampled: if debug { Some(true) } else { sampled },
        ..Incoming::default()
    }
}

/// B3's sampling state; the old `true` and `false` are still sent. `d` (debug) records, too.
fn decision(value: &[u8]) -> Option<bool> {
    match value {
        b"1" | b"d" => Some(true),
        b"0" => Some(false),
        _ if value.eq_ignore_ascii_case(b"true") => Some(true),
        _ if value.eq_ignore_ascii_case(b"false") => Some(false),
        _ => None,
    }
}

/// A trace id of B3: 128 or 64 bits.
fn trace_id(value: &[u8]) -> Option<TraceId> {
    let mut bytes = [0; 16];
    match value.len() {
        32 => bytes = hex(value)?,
        16 => bytes[8..].copy_from_slice(&hex::<8>(value)?),
        _ => return None,
    }
    let id = TraceId::from_bytes(bytes);
    (id != TraceId::INVALID).then_some(id)
}

fn span_id(value: &[u8]) -> Option<SpanId> {
    let id = SpanId::from_bytes(hex(value)?);
    (id != SpanId::INVALID).then_some(id)
}

fn lower_hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    (!text.iter().any(u8::is_ascii_uppercase))
        .then(|| hex(text))
        .flatten()
}

fn hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    };
    let (pairs, []) = text.as_chunks::<2>() else {
        return None;
    };
    if pairs.len() != N {
        return None;
    }
    let mut out = [0; N];
    for (byte, [high, low]) in out.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(out)
}

/// Writes the context into a request in place of the one it came with.
pub fn inject(context: &SpanContext, incoming: &Incoming, headers: &mut Headers) {
    let flags = context.flags | if context.sampled { SAMPLED } else { 0 };
    let traceparent = format!("00-{}-{}-{flags:02x}", context.trace, context.span);
    headers.set(Known::TraceParent, traceparent);
    if !incoming.w3c {
        headers.remove(&Name::Known(Known::TraceState));
    }
    let trace = context.trace.to_string();
    // A trace that began with 64 bits goes on with 64, for peers that know no more.
    let trace = trace
        .strip_prefix("0000000000000000")
        .map_or_else(|| trace.clone(), str::to_owned);
    let sampled = if context.sampled { "1" } else { "0" };
    if headers.known(Known::B3).is_some() {
        let single = match context.parent {
            Some(parent) => format!("{trace}-{}-{sampled}-{parent}", context.span),
            None => format!("{trace}-{}-{sampled}", context.span),
        };
        headers.set(Known::B3, single);
    }
    headers.set(Known::XB3TraceId, trace);
    headers.set(Known::XB3SpanId, context.span.to_string());
    match context.parent {
        Some(parent) => headers.set(Known::XB3ParentSpanId, parent.to_string()),
        None => {
            headers.remove(&Name::Known(Known::XB3ParentSpanId));
        }
    }
    headers.set(Known::XB3Sampled, Bytes::from_static(sampled.as_bytes()));
    if !context.sampled {
        headers.remove(&Name::Known(Known::XB3Flags));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    fn ids() -> (TraceId, SpanId) {
        (
            TraceId::from_hex(TRACE).unwrap(),
            SpanId::from_hex(SPAN).unwrap(),
        )
    }

    fn headers(list: &[(&str, &str)]) -> Headers {
        let mut headers = Headers::default();
        for (name, value) in list {
            headers.append(Name::new(name), *value);
        }
        headers
    }

    #[test]
    fn traceparents() {
        for (value, want) in [
            (format!("00-{TRACE}-{SPAN}-01"), Some((true, 0))),
            (format!("00-{TRACE}-{SPAN}-00"), Some((false, 0))),
            (format!("00-{TRACE}-{SPAN}-03"), Some((true, 2))),
            (format!(" 00-{TRACE}-{SPAN}-01 "), Some((true, 0))),
            (format!("cc-{TRACE}-{SPAN}-01-what-comes"), Some((true, 0))),
            (format!("cc-{TRACE}-{SPAN}-01"), Some((true, 0))),
            (format!("cc-{TRACE}-{SPAN}-01x"), None),
            (format!("00-{TRACE}-{SPAN}-01-x"), None),
            (format!("ff-{TRACE}-{SPAN}-01"), None),
            (format!("00-{}-{SPAN}-01", TRACE.to_uppercase()), None),
            (format!("00-{}-{SPAN}-01", "0".repeat(32)), None),
            (format!("00-{TRACE}-{}-01", "0".repeat(16)), None),
            (format!("00-{TRACE}-{SPAN}-0"), None),
            (format!("00-{TRACE}-{SPAN}-0g"), None),
            (format!("00_{TRACE}-{SPAN}-01"), None),
            (format!("00-{TRACE}x{SPAN}-01"), None),
            (String::new(), None),
        ] {
            let want = want.map(|(sampled, flags)| Incoming {
                parent: Some(ids()),
                sampled: Some(sampled),
                w3c: true,
                flags,
            });
            assert_eq!(parse_traceparent(value.as_bytes()), want, "{value}");
        }
    }

    #[test]
    fn single_b3() {
        for (value, want) in [
            (format!("{TRACE}-{SPAN}-1"), Some((true, Some(true)))),
            (
                format!("{TRACE}-{SPAN}-0-05e3ac9a4f6e3b90"),
                Some((true, Some(false))),
            ),
            (format!("{TRACE}-{SPAN}-d"), Some((true, Some(true)))),
            (format!("{TRACE}-{SPAN}"), Some((true, None))),
            ("0".to_owned(), Some((false, Some(false)))),
            ("1".to_owned(), Some((false, Some(true)))),
            ("d".to_owned(), Some((false, Some(true)))),
            ("x".to_owned(), None),
            (format!("{TRACE}-{SPAN}-2"), None),
            (format!("{TRACE}-{SPAN}-1-{SPAN}-1"), None),
            (format!("{TRACE}-{SPAN}-1-5"), None),
            (format!("{TRACE}-0000000000000000-1"), None),
            (format!("{}-{SPAN}-1", &TRACE[1..]), None),
        ] {
            let want = want.map(|(known, sampled)| Incoming {
                parent: known.then(ids),
                sampled,
                ..Incoming::default()
            });
            assert_eq!(parse_b3(value.as_bytes()), want, "{value}");
        }
    }

    #[test]
    fn of_several_contexts_the_first_valid_one_counts() {
        let w3c = format!("00-{TRACE}-{SPAN}-00");
        let other = "463ac35c9f6413ad48485a3953bb6124";
        let b3 = [
            ("x-b3-traceid", other),
            ("x-b3-spanid", "a2fb4a1d1a96d312"),
            ("x-b3-sampled", "1"),
        ];
        let mut list = vec![("traceparent", w3c.as_str())];
        list.extend(b3);
        assert_eq!(
            extract(&headers(&list)),
            parse_traceparent(w3c.as_bytes()).unwrap()
        );
        list.insert(0, ("traceparent", w3c.as_str()));
        let got = extract(&headers(&list));
        assert_eq!(
            got.parent.unwrap().0.to_string(),
            other,
            "two traceparents are none"
        );
        assert_eq!(got.sampled, Some(true));
        assert_eq!(extract(&headers(&[])), Incoming::default());
        let denied = extract(&headers(&[("x-b3-sampled", "0")]));
        assert_eq!((denied.parent, denied.sampled), (None, Some(false)));
        let debug = extract(&headers(&[("x-b3-flags", "1"), ("x-b3-sampled", "0")]));
        assert_eq!(debug.sampled, Some(true));
        let single = format!("{TRACE}-{SPAN}-0");
        let got = extract(&headers(&[("b3", single.as_str()), b3[0], b3[1], b3[2]]));
        assert_eq!((got.parent, got.sampled), (Some(ids()), Some(false)));
    }

    #[test]
    fn both_forms_are_written_and_nothing_stale_stays() {
        let mut request = headers(&[
            ("b3", "0"),
            ("x-b3-parentspanid", "a2fb4a1d1a96d312"),
            ("x-b3-flags", "1"),
            ("tracestate", "a=b"),
            ("x-other", "kept"),
        ]);
        let (trace, span) = ids();
        let context = SpanContext {
            trace,
            span,
            parent: None,
            sampled: false,
            flags: 0,
        };
        inject(&context, &Incoming::default(), &mut request);
        assert_eq!(
            request,
            headers(&[
                ("b3", &format!("{TRACE}-{SPAN}-0")),
                ("x-other", "kept"),
                ("traceparent", &format!("00-{TRACE}-{SPAN}-00")),
                ("x-b3-traceid", TRACE),
                ("x-b3-spanid", SPAN),
                ("x-b3-sampled", "0"),
            ])
        );
    }

    #[test]
    fn a_trace_of_64_bits_stays_one() {
        let mut request = headers(&[("x-b3-traceid", SPAN), ("x-b3-spanid", SPAN)]);
        let incoming = extract(&request);
        let (trace, parent) = incoming.parent.unwrap();
        let context = SpanContext {
            trace,
            span: SpanId::from(1),
            parent: Some(parent),
            sampled: true,
            flags: 0,
        };
        inject(&context, &incoming, &mut request);
        let get = |name| request.known(name).unwrap();
        assert_eq!(get(Known::XB3TraceId), SPAN.as_bytes());
        assert_eq!(get(Known::XB3ParentSpanId), SPAN.as_bytes());
        assert_eq!(
            get(Known::TraceParent),
            format!("00-0000000000000000{SPAN}-0000000000000001-01").as_bytes()
        );
    }

    proptest! {
        #[test]
        fn no_bytes_panic(
            parent in prop::collection::vec(any::<u8>(), 0..80),
            shaped in "[0-9a-fx]{2}-[0-9a-fA-F]{31,33}-[0-9a-f]{15,17}-[0-9a-f]{1,3}-?.{0,9}",
            single in "[0-9a-fd-]{0,90}",
        ) {
            for value in [parent.as_slice(), shaped.as_bytes(), single.as_bytes()] {
                parse_traceparent(value);
                parse_b3(value);
                let mut headers = Headers::default();
                for name in [Known::XB3TraceId, Known::XB3SpanId, Known::XB3Sampled, Known::XB3Flags] {
                    headers.append(name, value);
                }
                extract(&headers);
            }
        }

        #[test]
        fn what_is_written_is_read_back(
            trace in 1u128.., span in 1u64.., parent in 1u64.., root: bool, sampled: bool, random: bool, first: bool,
        ) {
            let context = SpanContext {
                trace: TraceId::from(trace),
                span: SpanId::from(span),
                parent: (!root).then(|| SpanId::from(parent)),
                sampled,
                flags: if random { RANDOM } else { 0 },
            };
            let mut headers = headers(if first { &[("b3", "1")] } else { &[] });
            inject(&context, &Incoming::default(), &mut headers);
            let want = (Some((context.trace, context.span)), Some(sampled));
            let read = extract(&headers);
            prop_assert_eq!((read.parent, read.sampled, read.flags), (want.0, want.1, context.flags));
            headers.remove(&Name::Known(Known::TraceParent));
            let read = extract(&headers);
            prop_assert_eq!((read.parent, read.sampled), want);
            headers.remove(&Name::Known(Known::B3));
            let read = extract(&headers);
            prop_assert_eq!((read.parent, read.sampled), want);
        }
    }
}
