//! Laws: what is written is read again; the pieces in which bytes arrive do not matter.

use proptest::{collection::vec, option, prelude::*, sample::select};

use super::*;

fn value() -> impl Strategy<Value = Vec<u8>> {
    vec(
        prop_oneof![8 => 0x21..0x7fu8, 1 => Just(b' '), 1 => 0x80..=0xffu8],
        0..40,
    )
    .prop_map(|value| value.trim_ascii().to_vec())
}

fn headers() -> impl Strategy<Value = Headers> {
    let name = prop_oneof![
        "x-[a-z0-9!#$%&'*+.^_`|~-]{0,20}",
        select(vec!["accept", "cookie", "set-cookie", "user-agent", "via"]).prop_map(str::to_owned),
    ];
    vec((name, value()), 0..12).prop_map(|all| {
        let mut headers = Headers::default();
        for (name, value) in all {
            headers.append(Name::new(name), value);
        }
        headers
    })
}

/// What a reader makes of the headers that a writer adds.
fn with_length(mut headers: Headers, framing: Framing) -> Headers {
    if let Framing::Length(length) = framing {
        headers.append(Known::ContentLength, length.to_string());
    }
    headers
}

fn framing() -> impl Strategy<Value = Framing> {
    prop_oneof![
        Just(Framing::None),
        (1..u64::MAX).prop_map(Framing::Length),
        Just(Framing::Chunked),
    ]
}

/// Reads a head that arrives in pieces.
fn in_pieces<T>(
    text: &[u8],
    cuts: &[usize],
    mut parse: impl FnMut(&[u8], &mut Scan) -> Result<Parsed<T>, ParseError>,
) -> Result<Parsed<T>, ParseError> {
    let mut scan = Scan::default();
    let mut at = 0;
    for cut in cuts {
        at = (at + cut).min(text.len());
        match parse(&text[..at], &mut scan)? {
            Parsed::Partial => {}
            complete => return Ok(complete),
        }
    }
    parse(text, &mut scan)
}

/// Pieces of messages, well formed and not, that are put together at random.
fn soup() -> impl Strategy<Value = Vec<u8>> {
    let part = select(vec![
        "GET / HTTP/1.1\r\n",
        "HTTP/1.1 200 OK\r\n",
        "Host: a\r\n",
        "x: y\r\n",
        " folded\r\n",
        "Content-Length: 3\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Connection: x, upgrade\r\n",
        "Upgrade: b\r\n",
        "\r\n",
        "\n",
        "\r",
        " ",
        "\t",
        ":",
        "\0",
        "3\r\nabc\r\n",
        "3;x\r\nabc\r\n",
        "0\r\n",
        "3",
        "\u{e4}",
    ]);
    let start = select(vec![
        "GET / HTTP/1.1\r\nHost: a\r\n",
        "HTTP/1.1 200 OK\r\n",
        "",
    ]);
    (start, vec(part, 0..12)).prop_map(|(start, parts)| {
        let mut text = start.to_owned().into_bytes();
        text.extend(parts.into_iter().flat_map(str::bytes));
        text
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn requests_are_read_as_written(
        method in select(vec!["GET", "POST", "PATCH", "OPTIONS"]),
        path in "/[!-~]{0,40}",
        authority in "[a-z0-9.-]{1,20}(:[0-9]{1,4})?",
        headers in headers(),
        framing in framing(),
    ) {
        let head = RequestHead {
            method: method.into(),
            scheme: "http".into(),
            authority: authority.into(),
            path: path.into(),
            protocol: Protocol::Http11,
            headers,
        };
        let mut out = BytesMut::new();
        write_request(&mut out, &head, framing).unwrap();
        let (found, meta) = request(&out).unwrap();
        prop_assert_eq!(meta.framing, framing);
        let mut want = head.clone();
        want.headers = with_length(want.headers, framing);
        if framing == Framing::None && matches!(method, "POST" | "PATCH" | "OPTIONS") {
            want.headers.append(Known::ContentLength, "0");
        }
        prop_assert_eq!(found, want);
    }

    #[test]
    fn responses_are_read_as_written(
        status in 200..1000u16,
        headers in headers(),
        framing in framing(),
        close in any::<bool>(),
    ) {
        prop_assume!(!matches!(status, 204 | 304));
        let head = ResponseHead { status, headers };
        let connection = if close { Connection::Close } else { Connection::Unsaid };
        let reply = Reply { connection, ..Reply::default() };
        let mut out = BytesMut::new();
        write_response(&mut out, &head, framing, reply).unwrap();
        let limits = Limits::default();
        let parsed = parse_response(&out, &limits, b"GET", &mut Scan::default()).unwrap();
        let mut want = head.clone();
        want.headers = with_length(want.headers, framing);
        if framing == Framing::None {
            want.headers.append(Known::ContentLength, "0");
        }
        let meta = ResponseMeta { framing, keep_alive: !close, http_10: false };
        prop_assert_eq!(parsed, Parsed::Complete { head: (want, meta), used: out.len() });
    }

    #[test]
    fn a_head_is_read_alike_however_it_arrives(
        mut text in soup(),
        cuts in vec(1..20usize, 0..30),
        custom in any::<bool>(),
    ) {
        // A head that never ends may be refused at once or be waited for.
        text.extend_from_slice(b"\r\n\r\n");
        let limits = Limits { allow_custom_methods: custom, headers: 8, ..Limits::default() };
        let whole = in_pieces(&text, &[], |text, scan| parse_request(text, &limits, scan));
        let cut = in_pieces(&text, &cuts, |text, scan| parse_request(text, &limits, scan));
        prop_assert_eq!(whole.is_err(), cut.is_err());
        prop_assert_eq!(whole.ok(), cut.ok());
        let whole = in_pieces(&text, &[], |text, scan| parse_response(text, &limits, b"GET", scan));
        let cut = in_pieces(&text, &cuts, |text, scan| parse_response(text, &limits, b"GET", scan));
        prop_assert_eq!(whole.is_err(), cut.is_err());
        prop_assert_eq!(whole.ok(), cut.ok());
    }

    /// What was taken is written so that a reader finds the same message and nothing behind it.
    #[test]
    fn what_is_taken_is_forwarded_as_one_message(text in soup()) {
        let limits = Limits::default();
        let parsed = parse_request(&text, &limits, &mut Scan::default());
        if let Ok(Parsed::Complete { head: (head, meta), .. }) = parsed {
            let mut out = BytesMut::new();
            write_request(&mut out, &head, meta.framing).unwrap();
            let again = parse_request(&out, &limits, &mut Scan::default()).unwrap();
            let Parsed::Complete { head: (found, again), used } = again else {
                return Err(TestCaseError::fail("not complete"));
            };
            prop_assert_eq!(used, out.len());
            prop_assert_eq!((found.path, found.authority), (head.path, head.authority));
            prop_assert_eq!((again.framing, again.upgrade), (meta.framing, meta.upgrade));
        }
    }

    #[test]
    fn a_body_is_read_alike_however_it_arrives(
        chunks in vec((vec(any::<u8>(), 1..64), option::of("[ -:<-~]{0,10}")), 0..6),
        large in option::of(2_000..20_000usize),
        trailers in headers(),
        garbled in option::of((any::<prop::sample::Index>(), any::<u8>())),
        cuts in vec(1..50usize, 0..60),
    ) {
        let mut text = BytesMut::new();
        let mut body = Vec::new();
        for (data, extension) in &chunks {
            match extension {
                Some(extension) => {
                    let head = format!("{:X};{extension}\r\n", data.len());
                    text.extend_from_slice(head.as_bytes());
                    text.extend_from_slice(data);
                    text.extend_from_slice(CHUNK_END);
                }
                None => write_chunk(&mut text, data),
            }
            body.extend_from_slice(data);
        }
        if let Some(large) = large {
            write_chunk(&mut text, &vec![7; large]);
            body.resize(body.len() + large, 7);
        }
        write_last_chunk(&mut text, Some(&trailers));
        text.extend_from_slice(b"GET /");
        let limits = Limits { enable_trailers: true, ..Limits::default() };
        if let Some((at, byte)) = &garbled {
            let at = at.index(text.len());
            text[at] = *byte;
        }
        let whole = decode(Framing::Chunked, &limits, &text, &[]);
        let cut = decode(Framing::Chunked, &limits, &text, &cuts);
        prop_assert_eq!(&whole, &cut);
        if garbled.is_none() {
            let trailers = (!trailers.is_empty()).then_some(trailers);
            prop_assert_eq!(whole, (body, Ok(Some(trailers)), 5));
        }
    }

    #[test]
    fn chunk_soup_is_read_alike_however_it_arrives(
        text in soup(),
        cuts in vec(1..10usize, 0..60),
    ) {
        let limits = Limits::default();
        prop_assert_eq!(
            decode(Framing::Chunked, &limits, &text, &[]),
            decode(Framing::Chunked, &limits, &text, &cuts)
        );
    }
}
