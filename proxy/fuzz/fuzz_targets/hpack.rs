//! Blocks of headers for the HPACK decoder, in fragments; what it made of them goes through our encoder and back.
#![no_main]

use lateen_codec::h2::hpack::{Decoder, Encoder, Field, Name};
use libfuzzer_sys::fuzz_target;

type Headers = Vec<(Vec<u8>, Vec<u8>)>;

/// Decodes in fragments of `step` bytes; `None` when it is malformed.
fn decode(decoder: &mut Decoder, block: &[u8], step: usize) -> Option<Headers> {
    let mut headers = Headers::new();
    let mut carry = Vec::new();
    let mut bytes = 0;
    decoder.begin();
    for fragment in block.chunks(step) {
        carry.extend_from_slice(fragment);
        let used = decoder
            .decode(&carry, |_, _, _| true, &mut |field: Field<'_>| {
                assert_eq!(field.name, Name::of(field.text));
                bytes += field.bytes();
                if bytes < 1 << 20 {
                    headers.push((field.text.to_vec(), field.value.to_vec()));
                }
            })
            .ok()?;
        carry.drain(..used);
    }
    carry.is_empty().then_some(headers)
}

fuzz_target!(|data: &[u8]| {
    let Some((&first, blocks)) = data.split_first() else {
        return;
    };
    let step = usize::from(first % 64) + 1;
    let mut decoder = Decoder::new(4096);
    let mut whole = Decoder::new(4096);
    let mut encoder = Encoder::new(4096, first & 0x80 != 0);
    let mut back = Decoder::new(4096);
    for block in blocks.split(|byte| *byte == 0xfe) {
        let headers = decode(&mut decoder, block, step);
        assert_eq!(headers, decode(&mut whole, block, usize::MAX));
        let Some(headers) = headers else { return };
        let mut coded = Vec::new();
        encoder.begin(&mut coded);
        for (name, value) in &headers {
            encoder.header(Name::of(name), name, value, &mut coded);
        }
        // Strings of a head are bounded before they come to an encoder.
        if headers.iter().all(|(n, v)| n.len().max(v.len()) < 60_000) {
            assert_eq!(decode(&mut back, &coded, usize::MAX), Some(headers));
        }
    }
});
