//! A response of an upstream: whole, in pieces, and what would be sent on for it.
#![no_main]

use bytes::BytesMut;
use lateen_codec::h1::{Framing, Limits, Parsed, Reply, Scan, parse_response, write_response};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((options, text)) = data.split_first() else {
        return;
    };
    let limits = Limits {
        head_bytes: 4096,
        headers: 20,
        allow_chunked_length: options & 1 != 0,
        ..Limits::default()
    };
    let method: &[u8] = match options >> 1 & 3 {
        0 | 1 => b"GET",
        2 => b"HEAD",
        _ => b"CONNECT",
    };
    let whole = parse_response(text, &limits, method, &mut Scan::default());
    let mut scan = Scan::default();
    let step = usize::from(options >> 3) + 1;
    let mut pieces = Ok(Parsed::Partial);
    for end in (step..text.len()).step_by(step).chain([text.len()]) {
        pieces = parse_response(&text[..end], &limits, method, &mut scan);
        if !matches!(pieces, Ok(Parsed::Partial)) {
            break;
        }
    }
    let Ok(Parsed::Complete { head, used }) = whole else {
        assert!(!matches!(pieces, Ok(Parsed::Complete { .. })));
        return;
    };
    assert!(used <= text.len());
    let (response, meta) = head;
    let alike = matches!(&pieces, Ok(Parsed::Complete { head, used: n })
        if *head == (response.clone(), meta) && *n == used);
    assert!(alike, "{pieces:?}");
    if response.status < 200 || response.status == 204 {
        assert!(matches!(meta.framing, Framing::None | Framing::UntilClose));
    }

    let mut out = BytesMut::new();
    let reply = Reply {
        to_head: method == b"HEAD",
        ..Reply::default()
    };
    write_response(&mut out, &response, meta.framing, reply).expect("a head that was read");
    match parse_response(&out, &limits, method, &mut Scan::default()) {
        Ok(Parsed::Complete {
            head: (sent, sent_meta),
            used,
        }) => {
            assert_eq!(used, out.len());
            assert_eq!(sent.status, response.status);
            assert_eq!(sent_meta.framing, meta.framing);
        }
        Err(_) => {
            assert!(
                out.len() > limits.head_bytes - 64 || response.headers.len() + 2 > limits.headers
            );
        }
        Ok(Parsed::Partial) => panic!("no whole head was written"),
    }
});
