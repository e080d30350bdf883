//! A request of a downstream: whole, in pieces, and what would be sent on for it.
#![no_main]

use bytes::BytesMut;
use lateen_codec::h1::{Limits, Parsed, Scan, parse_request, write_request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((options, text)) = data.split_first() else {
        return;
    };
    let limits = Limits {
        head_bytes: 4096,
        headers: 20,
        allow_chunked_length: options & 1 != 0,
        allow_absolute_url: options & 2 != 0,
        allow_custom_methods: options & 4 != 0,
        enable_trailers: false,
    };
    let whole = parse_request(text, &limits, &mut Scan::default());
    let mut scan = Scan::default();
    let step = usize::from(options >> 3) + 1;
    let mut pieces = Ok(Parsed::Partial);
    for end in (step..text.len()).step_by(step).chain([text.len()]) {
        pieces = parse_request(&text[..end], &limits, &mut scan);
        if !matches!(pieces, Ok(Parsed::Partial)) {
            break;
        }
    }
    let Ok(Parsed::Complete { head, used }) = whole else {
        assert!(!matches!(pieces, Ok(Parsed::Complete { .. })));
        return;
    };
    assert!(used <= text.len());
    let (request, meta) = head;
    let alike = matches!(&pieces, Ok(Parsed::Complete { head, used: n })
        if *head == (request.clone(), meta) && *n == used);
    assert!(alike, "{pieces:?}");

    // One message goes out, and a strict reader finds the same in it.
    let mut out = BytesMut::new();
    if write_request(&mut out, &request, meta.framing).is_err() {
        assert!(request.path.is_empty() || !limits.allow_absolute_url);
        return;
    }
    let again = parse_request(&out, &limits, &mut Scan::default());
    match again {
        Ok(Parsed::Complete {
            head: (sent, sent_meta),
            used,
        }) => {
            assert_eq!(used, out.len());
            assert_eq!(sent.method, request.method);
            assert_eq!(sent.authority, request.authority);
            assert_eq!(sent_meta.upgrade, meta.upgrade);
            assert_eq!(sent_meta.framing, meta.framing);
        }
        // The head may have grown over the limits, and a target that is no path is refused.
        Err(_) => assert!(
            out.len() > limits.head_bytes - 64
                || request.headers.len() + 3 > limits.headers
                || !request.path.starts_with(b"/")
        ),
        Ok(Parsed::Partial) => panic!("no whole head was written"),
    }
});
