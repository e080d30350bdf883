//! Rewrites heads that Envoy's parser takes though their form is not that of RFC 9112, so that one strict
//! reader decides on all of them.

/// The length of a head up to and with its empty line; the end is looked for from `from`.
pub(super) fn end(text: &[u8], from: usize) -> Option<usize> {
    let mut at = from;
    loop {
        let rest = text.get(at..)?;
        at += rest.iter().position(|b| *b == b'\n')? + 1;
        match text.get(at..)? {
            [b'\n', ..] => return Some(at + 1),
            [b'\r', b'\n', ..] => return Some(at + 2),
            _ => {}
        }
    }
}

/// The head that whole `lines` mean: each on a line of its own, ended by CR LF. `None` if none is meant.
pub(super) fn head(
    lines: &[u8],
    first_line: fn(&[u8], &mut Vec<u8>) -> Option<()>,
) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(lines.len() + 16);
    let Some(first) = lines.iter().position(|b| *b == b'\n') else {
        return Some(out);
    };
    first_line(trim_end(lines.get(..first)?), &mut out)?;
    out.extend_from_slice(b"\r\n");
    fields(lines.get(first + 1..)?, &mut out)?;
    Some(out)
}

/// The headers, or trailers, that whole `lines` mean, an empty line at the end included.
pub(super) fn fields(lines: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let mut begun = false;
    let mut framing = false;
    let mut ended = false;
    for line in lines.split_inclusive(|b| *b == b'\n') {
        if ended {
            // An empty line that not every reader takes for one.
            return None;
        }
        let line = line.strip_suffix(b"\n")?;
        match line.iter().find(|b| **b != b'\r') {
            // A line that continues the value of the one before: as if there were no break. RFC 9112 §5.2.
            Some(b' ' | b'\t') => {
                if !begun {
                    return None;
                }
                let line = line.strip_suffix(b"\r").unwrap_or(line);
                if framing && line.contains(&b'\r') {
                    return None;
                }
                out.truncate(out.len() - 2);
                value(line, out);
            }
            Some(_) => {
                let colon = line.iter().position(|b| *b == b':')?;
                let (name, rest) = line.split_at(colon);
                let rest = rest.strip_suffix(b"\r").unwrap_or(rest);
                framing = is_framing(name);
                if framing && rest.contains(&b'\r') {
                    return None;
                }
                out.extend_from_slice(name);
                value(rest, out);
                begun = true;
            }
            None => ended = true,
        }
        out.extend_from_slice(b"\r\n");
    }
    Some(())
}

/// `METHOD target HTTP/1.x`; without a version it is HTTP/0.9, which counts as 1.0 like all that are not 1.1.
pub(super) fn request_line(line: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let mut parts = parts(line);
    let (method, target) = (parts.next()?, parts.next()?);
    let version = match parts.next() {
        Some(version) => self::version(version)?,
        None => b"HTTP/1.0",
    };
    if parts.next().is_some() {
        return None;
    }
    for part in [method, b" ", target, b" ", version] {
        out.extend_from_slice(part);
    }
    Some(())
}

/// `HTTP/1.x status reason`
pub(super) fn status_line(line: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let mut parts = parts(line);
    out.extend_from_slice(version(parts.next()?)?);
    for part in parts {
        out.push(b' ');
        value(part, out);
    }
    Some(())
}

fn parts(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|b| matches!(b, b' ' | b'\t'))
        .filter(|part| !part.is_empty())
}

fn version(given: &[u8]) -> Option<&'static [u8]> {
    match given.strip_prefix(b"HTTP/")? {
        b"1.1" => Some(b"HTTP/1.1"),
        [major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => {
            Some(b"HTTP/1.0")
        }
        _ => None,
    }
}

/// A CR that ends no line is as if it were not there.
fn value(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend(bytes.iter().filter(|b| **b != b'\r'));
}

fn trim_end(mut line: &[u8]) -> &[u8] {
    while let [rest @ .., b' ' | b'\t' | b'\r'] = line {
        line = rest;
    }
    line
}

/// Where a reader that keeps the CR would find another message.
fn is_framing(name: &[u8]) -> bool {
    [
        &b"content-length"[..],
        b"transfer-encoding",
        b"host",
        b"connection",
        b"upgrade",
    ]
    .iter()
    .any(|framing| name.eq_ignore_ascii_case(framing))
}
