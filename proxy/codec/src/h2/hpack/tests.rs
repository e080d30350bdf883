//! RFC 7541 Appendix C, and what both sides must agree on.

use proptest::prelude::*;

use super::*;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(u8::is_ascii_hexdigit)
        .map(|b| (b as char).to_digit(16).unwrap() as u8)
        .collect();
    digits
        .chunks(2)
        .map(|pair| pair[0] << 4 | pair[1])
        .collect()
}

fn decode(decoder: &mut Decoder, block: &[u8]) -> Result<String, DecodeError> {
    let mut text = String::new();
    decoder.begin();
    let used = decoder.decode(block, |_, _, _| true, &mut |field: Field<'_>| {
        text += &format!(
            "{}: {}\n",
            String::from_utf8_lossy(field.text),
            String::from_utf8_lossy(field.value)
        );
    })?;
    if used == block.len() {
        Ok(text)
    } else {
        Err(DecodeError::Truncated)
    }
}

#[test]
fn single_headers_of_appendix_c2() {
    for (block, want) in [
        (
            "400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572",
            "custom-key: custom-header\n",
        ),
        (
            "040c 2f73 616d 706c 652f 7061 7468",
            ":path: /sample/path\n",
        ),
        (
            "1008 7061 7373 776f 7264 0673 6563 7265 74",
            "password: secret\n",
        ),
        ("82", ":method: GET\n"),
    ] {
        let mut decoder = Decoder::new(4096);
        assert_eq!(decode(&mut decoder, &hex(block)).unwrap(), want);
    }
}

#[test]
fn requests_of_appendix_c3_and_c4() {
    let want = [
        ":method: GET\n:scheme: http\n:path: /\n:authority: www.example.com\n",
        ":method: GET\n:scheme: http\n:path: /\n:authority: www.example.com\ncache-control: no-cache\n",
        ":method: GET\n:scheme: https\n:path: /index.html\n:authority: www.example.com\ncustom-key: custom-value\n",
    ];
    for blocks in [
        [
            "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "8286 84be 5808 6e6f 2d63 6163 6865",
            "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
        ],
        [
            "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
            "8286 84be 5886 a8eb 1064 9cbf",
            "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
        ],
    ] {
        let mut decoder = Decoder::new(4096);
        for (block, want) in blocks.into_iter().zip(want) {
            assert_eq!(decode(&mut decoder, &hex(block)).unwrap(), want);
        }
    }
}

#[test]
fn responses_of_appendix_c6_push_each_other_out() {
    let want = [
        ":status: 302\ncache-control: private\ndate: Mon, 21 Oct 2013 20:13:21 GMT\nlocation: https://www.example.com\n",
        ":status: 307\ncache-control: private\ndate: Mon, 21 Oct 2013 20:13:21 GMT\nlocation: https://www.example.com\n",
        ":status: 200\ncache-control: private\ndate: Mon, 21 Oct 2013 20:13:22 GMT\nlocation: https://www.example.com\n\
         content-encoding: gzip\nset-cookie: foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1\n",
    ];
    let blocks = [
        "3fe1 0148 8264 0258 85ae c377 1a4b 6196 d07a be94 1054 d444 a820 0595 040b 8166 e082 a62d 1bff 6e91 9d29 ad17 1863 c78f 0b97 c8e9 ae82 ae43 d3",
        "4883 640e ffc1 c0bf",
        "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07",
    ];
    let mut decoder = Decoder::new(4096);
    for (block, want) in blocks.into_iter().zip(want) {
        assert_eq!(decode(&mut decoder, &hex(block)).unwrap(), want);
    }
}

#[test]
fn what_is_wrong_is_told() {
    for (block, want) in [
        (&[0x80][..], DecodeError::Index),
        (&[0xbe], DecodeError::Index),
        (&[0x7f, 0x00, 0x00], DecodeError::Index),
        (&[0xff, 0xff, 0xff, 0xff, 0xff, 0x0f], DecodeError::Integer),
        (&[0x82, 0x20], DecodeError::TableSize),
        (&[0x3f, 0xff, 0x7f], DecodeError::TableSize),
        (&[0x04, 0x81, 0xfe], DecodeError::Huffman),
        (&[0x04, 0x7f, 0xff, 0xff, 0x07], DecodeError::TooLong),
        (&[0x04], DecodeError::Truncated),
        (&[0x04, 0x02, b'a'], DecodeError::Truncated),
    ] {
        let mut decoder = Decoder::new(4096);
        assert_eq!(decode(&mut decoder, block), Err(want), "{block:x?}");
    }
}

#[test]
fn a_peer_must_shrink_its_table_once_it_knows() {
    let mut decoder = Decoder::new(100);
    assert!(decode(&mut decoder, &[0x82]).is_ok());
    decoder.settings_acknowledged();
    assert_eq!(decode(&mut decoder, &[0x82]), Err(DecodeError::TableSize));
    assert!(decode(&mut decoder, &[0x3f, 69, 0x82]).is_ok()); // 31 + 69
    assert!(decode(&mut decoder, &[0x82]).is_ok());
}

#[test]
fn secrets_are_never_indexed_and_repeated_headers_are() {
    let mut encoder = Encoder::new(4096, false);
    let mut block = |name: &[u8], value: &[u8]| {
        let mut out = Vec::new();
        encoder.header(Name::of(name), name, value, &mut out);
        out
    };
    assert_eq!(block(b"authorization", b"Basic x")[0] & 0xf0, 0x10);
    assert_eq!(block(b"cookie", b"a=b")[0] & 0xf0, 0x10);
    assert_eq!(block(b"user-agent", b"test")[0], 0x40 | 58);
    assert_eq!(block(b"user-agent", b"test"), [0xbe]);
    // A path only when it comes again; an ID never, but its name.
    assert_eq!(block(b":path", b"/a")[0], 0x04);
    assert_eq!(block(b":path", b"/a")[0], 0x44);
    assert_eq!(block(b":path", b"/a"), [0xbe]);
    assert_eq!(block(b"x-request-id", b"1")[0], 0x40);
    assert_eq!(block(b"x-request-id", b"2")[..2], [0x0f, 62 - 15]);
}

fn headers() -> impl Strategy<Value = Vec<(String, Vec<u8>)>> {
    let name = prop_oneof![
        Just(":path".to_owned()),
        Just(":status".to_owned()),
        Just("content-type".to_owned()),
        Just("x-request-id".to_owned()),
        Just("authorization".to_owned()),
        "[a-z-]{1,12}",
    ];
    let value = prop_oneof![
        "[a-c]{0,2}".prop_map(String::into_bytes),
        prop::collection::vec(any::<u8>(), 0..300),
    ];
    prop::collection::vec((name, value), 0..12)
}

proptest! {
    #[test]
    fn what_is_encoded_decodes(
        blocks in prop::collection::vec((headers(), prop::option::of(0usize..5000)), 1..12),
        huffman: bool,
        cuts in prop::collection::vec(1usize..40, 1..5),
    ) {
        let mut encoder = Encoder::new(4096, huffman);
        let mut decoder = Decoder::new(4096);
        decoder.settings_acknowledged();
        let mut cuts = cuts.into_iter().cycle();
        for (headers, resize) in blocks {
            if let Some(size) = resize {
                encoder.set_allowed(size);
            }
            let mut block = Vec::new();
            encoder.begin(&mut block);
            for (name, value) in &headers {
                encoder.header(Name::of(name.as_bytes()), name.as_bytes(), value, &mut block);
            }
            // In fragments of any size.
            decoder.begin();
            let mut got = Vec::new();
            let mut carry = Vec::new();
            let mut rest = &block[..];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(cuts.next().unwrap().min(rest.len()));
                rest = later;
                carry.extend_from_slice(now);
                let used = decoder.decode(&carry, |_, _, _| true, &mut |field: Field<'_>| {
                    assert_eq!(field.name, Name::of(field.text));
                    got.push((String::from_utf8(field.text.to_vec()).unwrap(), field.value.to_vec()));
                }).unwrap();
                carry.drain(..used);
            }
            prop_assert!(carry.is_empty());
            prop_assert_eq!(got, headers);
        }
    }

    #[test]
    fn no_bytes_are_too_strange(blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..5)) {
        let mut decoder = Decoder::new(4096);
        for block in blocks {
            drop(decode(&mut decoder, &block));
        }
    }
}
