//! Trace headers of a peer; what is read of them must survive being written.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use proxy::{
    head::{Headers, Known},
    trace::context::{SpanContext, extract, inject, parse_b3, parse_traceparent},
};

fuzz_target!(|data: &[u8]| {
    parse_traceparent(data);
    parse_b3(data);
    // One header a line, in this order.
    let names = [
        Known::TraceParent,
        Known::B3,
        Known::XB3TraceId,
        Known::XB3SpanId,
        Known::XB3Sampled,
        Known::XB3Flags,
        Known::TraceState,
    ];
    let mut headers = Headers::default();
    for (name, value) in names.into_iter().zip(data.split(|byte| *byte == b'\n')) {
        headers.append(name, Bytes::copy_from_slice(value));
    }
    let incoming = extract(&headers);
    let Some((trace, span)) = incoming.parent else {
        return;
    };
    let context = SpanContext {
        trace,
        span,
        parent: None,
        sampled: incoming.sampled.unwrap_or(true),
        flags: incoming.flags,
    };
    inject(&context, &incoming, &mut headers);
    let again = extract(&headers);
    assert_eq!(again.parent, Some((trace, span)));
    assert_eq!(again.sampled, Some(context.sampled));
});
