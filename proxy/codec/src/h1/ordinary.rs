//! The ordinary head, eight bytes at a time: what nearly every peer sends is read here, at a fraction of the
//! cost of `httparse`. Everything else (a head that is not complete, a line that ends in LF only, bytes that
//! need a second look) gives `None` and is read by `httparse`, which decides: what is taken here it takes
//! too, and reads alike (a test says so).

use crate::{
    head::Place,
    swar::{HIGH, LOW, ONES, below_or_del, differs},
};

/// The first line of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RequestLine<'a> {
    pub(super) method: &'a [u8],
    /// Visible ASCII.
    pub(super) target: &'a [u8],
    pub(super) http_10: bool,
    /// Bytes of the line.
    pub(super) used: usize,
}

/// The first line of a response.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StatusLine {
    pub(super) status: u16,
    pub(super) http_10: bool,
    /// Bytes of the line.
    pub(super) used: usize,
}

pub(super) fn request_line(text: &[u8]) -> Option<RequestLine<'_>> {
    let method = text.iter().position(|b| !b.is_ascii_uppercase())?;
    if method == 0 || text.get(method) != Some(&b' ') {
        return None;
    }
    let target = text.get(method + 1..)?;
    let rest = after_visible(target);
    let target = target.get(..target.len() - rest.len())?;
    if target.is_empty() {
        return None;
    }
    let (version, rest) = rest.split_first_chunk::<11>()?;
    let http_10 = match version {
        b" HTTP/1.1\r\n" => false,
        b" HTTP/1.0\r\n" => true,
        _ => return None,
    };
    Some(RequestLine {
        method: text.get(..method)?,
        target,
        http_10,
        used: text.len() - rest.len(),
    })
}

pub(super) fn status_line(text: &[u8]) -> Option<StatusLine> {
    let (version, rest) = text.split_first_chunk::<9>()?;
    let http_10 = match version {
        b"HTTP/1.1 " => false,
        b"HTTP/1.0 " => true,
        _ => return None,
    };
    let ([a, b, c, b' '], reason) = rest.split_first_chunk::<4>()? else {
        return None;
    };
    let digit = |byte: &u8| byte.is_ascii_digit().then(|| u16::from(byte - b'0'));
    let status = digit(a)? * 100 + digit(b)? * 10 + digit(c)?;
    let end = reason.iter().position(|b| !matches!(b, b' '..=b'~'))?;
    (reason.get(end..end + 2)? == b"\r\n").then_some(StatusLine {
        status,
        http_10,
        used: 13 + end + 2,
    })
}

/// Tells `each` the headers that follow the first line, and where in `text` they are. Returns where they end,
/// with the empty line, and whether a name may have upper case; `None` when there are more than `most`, too.
#[inline]
pub(super) fn headers<'a>(
    text: &'a [u8],
    most: usize,
    mut each: impl FnMut(&'a [u8], &'a [u8], Place),
) -> Option<(usize, bool)> {
    if text.len() > u32::MAX as usize {
        return None;
    }
    let mut rest = text;
    let mut left = most;
    let mut upper = 0;
    loop {
        let line = rest;
        rest = after_token(rest, &mut upper);
        let name = line.get(..line.len() - rest.len())?;
        rest = match rest {
            [b':', rest @ ..] if !name.is_empty() => rest,
            [b'\r', b'\n', rest @ ..] if name.is_empty() => {
                return Some((text.len() - rest.len(), upper != 0));
            }
            _ => return None,
        };
        left = left.checked_sub(1)?;
        let mut line_as_written = false;
        rest = match rest {
            [b' ', next, ..] if !matches!(next, b' ' | b'\t') => {
                line_as_written = true;
                rest.get(1..)?
            }
            _ => {
                let spaces = rest.iter().take_while(|b| matches!(b, b' ' | b'\t'));
                rest.get(spaces.count()..)?
            }
        };
        let value = rest;
        rest = after_value(rest);
        let value_at = (text.len() - value.len()) as u32;
        let mut value = value.get(..value.len() - rest.len())?;
        while let [trimmed @ .., b' ' | b'\t'] = value {
            value = trimmed;
            line_as_written = false;
        }
        let [b'\r', b'\n', next @ ..] = rest else {
            return None;
        };
        rest = next;
        let place = Place {
            name_at: (text.len() - line.len()) as u32,
            name_len: name.len() as u32,
            value_at,
            value_len: value.len() as u32,
            line: line_as_written,
        };
        each(name, value, place);
    }
}

/// What follows a token. `upper` becomes other than 0 if the token may have upper case.
#[inline]
fn after_token<'a>(mut text: &'a [u8], upper: &mut u64) -> &'a [u8] {
    loop {
        // Letters and `-`, of which nearly all names are.
        while let Some((word, rest)) = text.split_first_chunk::<8>() {
            let word = u64::from_le_bytes(*word);
            let folded = (word & LOW) | (0x20 * ONES);
            let from_a = folded + (0x80 - u64::from(b'a')) * ONES;
            let above_z = folded + (0x7f - u64::from(b'z')) * ONES;
            let stop = (!from_a | above_z | word) & differs(word, b'-') & HIGH;
            // Of bytes before the first other one: bit 5 is clear in upper case only.
            let before = stop.wrapping_sub(1) & !stop;
            *upper |= !word & before & (0x20 * ONES);
            if stop == 0 {
                text = rest;
                continue;
            }
            text = text.get(first(stop)..).unwrap_or_default();
            break;
        }
        match text {
            [byte, rest @ ..] if TOKEN[usize::from(*byte)] => {
                *upper |= u64::from(byte.is_ascii_uppercase());
                text = rest;
            }
            _ => return text,
        }
    }
}

/// What follows the bytes that a value may have.
#[inline]
fn after_value(mut text: &[u8]) -> &[u8] {
    loop {
        while let Some((word, rest)) = text.split_first_chunk::<8>() {
            let stop = below_or_del(u64::from_le_bytes(*word), b' ');
            if stop == 0 {
                text = rest;
                continue;
            }
            text = text.get(first(stop)..).unwrap_or_default();
            break;
        }
        match text {
            [b'\t' | b' '..=b'~' | 0x80.., rest @ ..] => text = rest,
            _ => return text,
        }
    }
}

/// Which byte is the first whose highest bit is set.
#[inline]
fn first(found: u64) -> usize {
    found.trailing_zeros() as usize / 8
}

/// What follows visible ASCII.
#[inline]
fn after_visible(mut text: &[u8]) -> &[u8] {
    while let Some((word, rest)) = text.split_first_chunk::<8>() {
        let word = u64::from_le_bytes(*word);
        let stop = below_or_del(word, b'!') | word & HIGH;
        if stop == 0 {
            text = rest;
            continue;
        }
        return text.get(first(stop)..).unwrap_or_default();
    }
    while let [b'!'..=b'~', rest @ ..] = text {
        text = rest;
    }
    text
}

/// RFC 9110 §5.6.2.
static TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = b'!';
    while byte <= b'~' {
        table[byte as usize] = byte.is_ascii_alphanumeric()
            || matches!(
                byte,
                b'!' | b'#'
                    | b'$'
                    | b'%'
                    | b'&'
                    | b'\''
                    | b'*'
                    | b'+'
                    | b'-'
                    | b'.'
                    | b'^'
                    | b'_'
                    | b'`'
                    | b'|'
                    | b'~'
            );
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::select};

    use super::*;

    /// A head, and sometimes a byte that does not belong where it is.
    fn text(first: &'static [&'static str]) -> impl Strategy<Value = Vec<u8>> {
        let name = prop_oneof![
            "[A-Za-z-]{0,24}",
            "[A-Za-z0-9!#$%&'*+.^_`|~-]{1,20}",
            select(vec!["Content-Length", "x-b3-traceid", "HOST"]).prop_map(str::to_owned),
        ];
        let space = select(vec![" ", " ", " ", "", "  ", "\t", " \t "]);
        let value = vec(
            prop_oneof![20 => b' '..=b'~', 1 => Just(b'\t'), 1 => 0x80..=0xffu8],
            0..40,
        );
        let line = (name, space.clone(), value, space).prop_map(|(name, before, value, after)| {
            let parts = [
                name.as_bytes(),
                b":",
                before.as_bytes(),
                &value,
                after.as_bytes(),
            ];
            parts.concat()
        });
        let end = select(vec![
            "\r\n", "\r\n", "\r\n", "\r\n", "\n", "\r", "\r\r\n", "\r\n ",
        ]);
        let lines = vec(line, 0..6);
        let body = vec(any::<u8>(), 0..12);
        let fault =
            prop_oneof![3 => Just(None), 1 => any::<(prop::sample::Index, u8)>().prop_map(Some)];
        (select(first), lines, end, body, fault).prop_map(|(first, lines, end, body, fault)| {
            let mut text = first.as_bytes().to_vec();
            let last = lines.len().saturating_sub(1);
            for (number, line) in lines.into_iter().enumerate() {
                text.extend_from_slice(&line);
                let end = if number == last { end } else { "\r\n" };
                text.extend_from_slice(end.as_bytes());
            }
            text.extend_from_slice(b"\r\n");
            text.extend_from_slice(&body);
            if let Some((at, byte)) = fault {
                let at = at.index(text.len());
                text[at] = byte;
            }
            text
        })
    }

    /// What is read here from the end of the first line on, as `httparse` gives it; 4 headers at most.
    type Read = (Vec<(Vec<u8>, Vec<u8>)>, usize);

    fn read(text: &[u8], from: usize) -> Option<Read> {
        let lines = &text[from..];
        let mut all = Vec::new();
        let mut upper_seen = false;
        let part = |at: u32, len: u32| &lines[at as usize..][..len as usize];
        let (used, upper) = headers(lines, 4, |name, value, place| {
            assert_eq!(
                (name, value),
                (
                    part(place.name_at, place.name_len),
                    part(place.value_at, place.value_len)
                )
            );
            let line = [name, b": ", value, b"\r\n"].concat();
            let is_line = lines[place.name_at as usize..].starts_with(&line);
            assert_eq!(place.line, is_line);
            upper_seen |= name.iter().any(u8::is_ascii_uppercase);
            all.push((name.to_vec(), value.to_vec()));
        })?;
        assert!(upper || !upper_seen);
        Some((all, from + used))
    }

    fn theirs(fields: &[httparse::Header<'_>], used: usize) -> Read {
        let fields = fields.iter();
        let all = fields.map(|f| (f.name.as_bytes().to_vec(), f.value.to_vec()));
        (all.collect(), used)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn httparse_takes_requests_that_are_taken_here_and_reads_them_alike(text in text(&[
            "GET / HTTP/1.1\r\n", "POST /a?b=c HTTP/1.0\r\n", "CONNECT a.example:443 HTTP/1.1\r\n",
            "get / HTTP/1.1\r\n", "GET  / HTTP/1.1\r\n", "GET / HTTP/1.2\r\n", "GET / HTTP/1.1\n",
            "GET http://a.example/%20 HTTP/1.1\r\n", "GET /\u{e9} HTTP/1.1\r\n",
        ])) {
            let Some(line) = request_line(&text) else { return Ok(()) };
            let Some(ours) = read(&text, line.used) else { return Ok(()) };
            let mut fields = [httparse::EMPTY_HEADER; 4];
            let mut request = httparse::Request::new(&mut fields);
            let used = request.parse(&text).unwrap().unwrap();
            prop_assert_eq!(request.method.map(str::as_bytes), Some(line.method));
            prop_assert_eq!(request.path.map(str::as_bytes), Some(line.target));
            prop_assert_eq!(request.version, Some(u8::from(!line.http_10)));
            prop_assert_eq!(ours, theirs(request.headers, used));
        }

        #[test]
        fn httparse_takes_responses_that_are_taken_here_and_reads_them_alike(text in text(&[
            "HTTP/1.1 200 OK\r\n", "HTTP/1.0 404 Not Found\r\n", "HTTP/1.1 99 \r\n", "HTTP/1.1 200\r\n",
            "HTTP/1.1 200 \u{e9}\r\n", "HTTP/1.1  200 OK\r\n", "HTTP/1.1 099 \t\r\n", "HTTP/1.1 500 \r\n",
        ])) {
            let Some(line) = status_line(&text) else { return Ok(()) };
            let Some(ours) = read(&text, line.used) else { return Ok(()) };
            let mut fields = [httparse::EMPTY_HEADER; 4];
            let mut response = httparse::Response::new(&mut fields);
            let used = response.parse(&text).unwrap().unwrap();
            prop_assert_eq!(response.code, Some(line.status));
            prop_assert_eq!(response.version, Some(u8::from(!line.http_10)));
            prop_assert_eq!(ours, theirs(response.headers, used));
        }
    }

    #[test]
    fn ordinary_heads_are_taken() {
        let text =
            b"GET /a HTTP/1.1\r\nHost: a\r\nX-B3-TraceId: 1\r\nempty:\r\nspaced:  b \r\n\r\nbody";
        let line = request_line(text).unwrap();
        assert_eq!(
            (line.method, line.target, line.http_10),
            (&b"GET"[..], &b"/a"[..], false)
        );
        let (all, used) = read(text, line.used).unwrap();
        assert_eq!(used, text.len() - 4);
        let want = [
            ("Host", "a"),
            ("X-B3-TraceId", "1"),
            ("empty", ""),
            ("spaced", "b"),
        ];
        assert_eq!(all, want.map(|(name, value)| (name.into(), value.into())));
        let text = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        let line = status_line(text).unwrap();
        assert_eq!((line.status, line.http_10), (200, false));
        assert_eq!(read(text, line.used).unwrap().1, text.len());
    }
}
