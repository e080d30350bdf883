//! A body, whole and in pieces, and the same sent on in chunks.
#![no_main]

use bytes::BytesMut;
use lateen_codec::{
    h1::{BodyDecoder, Framing, Limits, ParseError, Piece, write_chunk, write_last_chunk},
    head::Headers,
};
use libfuzzer_sys::fuzz_target;

/// The body, its trailers if it is complete, and what is left behind it.
type Read = (Vec<u8>, Result<Option<Option<Headers>>, ParseError>, usize);

fn read(framing: Framing, text: &[u8], step: usize, head_bytes: usize) -> Read {
    let limits = Limits {
        head_bytes,
        headers: 10,
        enable_trailers: true,
        ..Limits::default()
    };
    let mut decoder = BodyDecoder::new(framing, &limits);
    let mut input = BytesMut::new();
    let mut body = Vec::new();
    let mut pieces = text.chunks(step);
    loop {
        match decoder.decode(&mut input) {
            Ok(Some(Piece::Data(data))) => {
                assert!(!data.is_empty());
                body.extend_from_slice(&data);
            }
            Ok(Some(Piece::End(trailers))) => {
                assert!(decoder.is_end());
                let left = input.len() + pieces.map(<[u8]>::len).sum::<usize>();
                return (body, Ok(Some(trailers)), left);
            }
            Ok(None) => match pieces.next() {
                Some(piece) => input.extend_from_slice(piece),
                None => return (body, Ok(None), 0),
            },
            Err(error) => {
                assert_eq!(decoder.decode(&mut input), Err(error));
                return (body, Err(error), 0);
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((options, text)) = data.split_first() else {
        return;
    };
    let framing = match options & 3 {
        0 | 1 => Framing::Chunked,
        2 => Framing::Length(u64::from(*options)),
        _ => Framing::UntilClose,
    };
    let whole = read(framing, text, usize::MAX, 2048);
    assert_eq!(
        whole,
        read(framing, text, usize::from(options >> 2) + 1, 2048)
    );

    let (body, end, _) = whole;
    if let Ok(Some(trailers)) = end {
        let mut out = BytesMut::new();
        for chunk in body.chunks(7) {
            write_chunk(&mut out, chunk);
        }
        write_last_chunk(&mut out, trailers.as_ref());
        assert_eq!(
            // A space after each colon may make them longer.
            read(Framing::Chunked, &out, 5, 4096),
            (body, Ok(Some(trailers)), 0)
        );
    }
});
