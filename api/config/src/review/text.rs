//! What texts may look like: names, addresses, durations, header values.

use std::net::IpAddr;
use std::sync::LazyLock;

use regex::Regex;

/// RFC 1123 label, case ignored.
pub(crate) fn is_dns_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    text.len() <= 63
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || *b == b'-')
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
}

/// A label, or `*`, or a label whose beginning is replaced by `*`.
fn is_wildcard_label(text: &str) -> bool {
    match text.strip_prefix('*') {
        Some("") => true,
        Some(rest) => is_dns_label(rest.strip_prefix('-').unwrap_or(rest)),
        None => is_dns_label(text),
    }
}

/// Labels with dots between; a trailing dot is allowed, an all-numeric last label is not.
fn are_labels(text: &str) -> bool {
    let last = text.rsplit('.').next().unwrap_or_default();
    if last.parse::<i64>().is_ok() {
        return false;
    }
    text.strip_suffix('.')
        .unwrap_or(text)
        .split('.')
        .all(is_dns_label)
        || text.is_empty()
}

/// A host name without wildcard.
pub(crate) fn is_fqdn(text: &str) -> bool {
    !text.is_empty() && text.len() <= 255 && are_labels(text)
}

/// A host name whose first label may be `*`, or begin with it.
pub(crate) fn is_wildcard_domain(text: &str) -> bool {
    if text.is_empty() || text.len() > 255 {
        return false;
    }
    match text.split_once('.') {
        None => is_wildcard_label(text),
        Some((first, rest)) => is_wildcard_label(first) && are_labels(rest),
    }
}

/// `*` within a label, such as `*foo.example.com`.
pub(crate) fn is_partial_wildcard(host: &str) -> bool {
    host.contains('*') && host.len() != 1 && !host.starts_with("*.")
}

/// An IP address; IPv6 may carry a zone.
pub(crate) fn is_ip(text: &str) -> bool {
    let plain = match text.split_once('%') {
        Some((address, zone)) if !zone.is_empty() && address.contains(':') => address,
        _ => text,
    };
    plain.parse::<IpAddr>().is_ok()
}

/// An IP address or CIDR block.
pub(crate) fn is_subnet(text: &str) -> bool {
    match text.split_once('/') {
        None => is_ip(text),
        Some((address, length)) => {
            let canonical = !length.is_empty()
                && length.bytes().all(|b| b.is_ascii_digit())
                && (length == "0" || !length.starts_with('0'));
            match (address.parse::<IpAddr>(), length.parse::<u8>()) {
                (Ok(IpAddr::V4(_)), Ok(length)) => canonical && length <= 32,
                (Ok(IpAddr::V6(_)), Ok(length)) => canonical && length <= 128,
                _ => false,
            }
        }
    }
}

/// Kubernetes label value: empty, or up to 63 of letters, digits, `-_.`, beginning and ending with
/// a letter or digit.
pub(crate) fn is_label_value(text: &str) -> bool {
    let bytes = text.as_bytes();
    text.is_empty()
        || text.len() <= 63
            && bytes
                .iter()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
            && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
            && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
}

/// Kubernetes label name: `[PREFIX/]NAME`.
pub(crate) fn is_label_name(text: &str) -> bool {
    let (prefix, name) = match text.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, text),
    };
    !name.is_empty()
        && is_label_value(name)
        && prefix.is_none_or(|prefix| {
            !prefix.is_empty() && prefix.len() <= 253 && prefix.split('.').all(is_dns_label)
        })
}

/// `1.5s`, `200ms`, `1h30m`, `-1s`, in nanoseconds.
pub(crate) fn duration(text: &str) -> Option<i128> {
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut nanos: i128 = 0;
    while !rest.is_empty() {
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .filter(|end| *end > 0)?;
        let (number, tail) = rest.split_at(end);
        let end = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let unit: i128 = match unit {
            "ns" => 1,
            "us" | "µs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || whole.len() > 18 || fraction.contains('.') {
            return None;
        }
        let whole: i128 = if whole.is_empty() {
            0
        } else {
            whole.parse().ok()?
        };
        nanos += whole * unit;
        let mut scale = unit;
        for digit in fraction.bytes().take(18) {
            scale /= 10;
            nanos += i128::from(digit - b'0') * scale;
        }
        rest = tail;
    }
    Some(sign * nanos)
}

/// Why a text is no regular expression that a proxy takes; `None` when it is one.
pub(crate) fn regex_fault(pattern: &str) -> Option<String> {
    if pattern.is_empty() {
        return Some("an empty regular expression matches nothing; remove it".into());
    }
    if pattern.len() > 1024 {
        return Some("a regular expression may not be longer than 1024 bytes".into());
    }
    uncompilable(pattern)
}

/// Why an expression does not compile.
pub(crate) fn uncompilable(pattern: &str) -> Option<String> {
    let reason = match translate(pattern) {
        Err(reason) => reason,
        Ok(translated) => {
            let error = Regex::new(&translated).err()?.to_string();
            error.lines().last().unwrap_or_default().trim().to_owned()
        }
    };
    Some(format!("not a regular expression (RE2 syntax): {reason}"))
}

/// RE2 repeats at most so often.
const REPEAT_LIMIT: u32 = 1000;

/// RE2's syntax in that of the `regex` crate, which takes `a++` and refuses a literal `{`.
fn translate(pattern: &str) -> Result<String, String> {
    let mut out = String::with_capacity(pattern.len());
    let mut rest = pattern;
    // Whether what came last was a repetition (`+`, and `?` after it for the shortest match).
    let (mut repeated, mut lazy) = (false, false);
    while let Some(c) = rest.chars().next() {
        let length = match c {
            '\\' => 1 + rest.chars().nth(1).map_or(0, char::len_utf8),
            '[' => class(rest, &mut out)?,
            '{' => repetition(rest)?,
            c => c.len_utf8(),
        };
        let part = rest.get(..length).unwrap_or(rest);
        rest = rest.get(length..).unwrap_or_default();
        let repeats = matches!(c, '*' | '+' | '?') || c == '{' && length > 1;
        if repeats && repeated {
            if c != '?' || lazy {
                return Err(format!("{part:?} repeats a repetition"));
            }
            lazy = true;
        } else {
            lazy = false;
        }
        repeated = repeats;
        match c {
            '[' => {}
            '{' if length == 1 => out.push_str("\\{"),
            '}' => out.push_str("\\}"),
            _ => out.push_str(part),
        }
    }
    Ok(out)
}

/// Length of `{2}`, `{2,}` or `{2,3}` at the beginning of a text; 1 when the brace is literal.
fn repetition(text: &str) -> Result<usize, String> {
    let Some((inside, _)) = text.get(1..).and_then(|rest| rest.split_once('}')) else {
        return Ok(1);
    };
    let (low, high) = inside.split_once(',').unwrap_or((inside, "0"));
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !number(low) || !(high.is_empty() || number(high)) {
        return Ok(1);
    }
    let beyond =
        |text: &str| !text.is_empty() && text.parse::<u32>().is_ok_and(|n| n > REPEAT_LIMIT);
    if beyond(low) || beyond(high) || low.len() > 6 || high.len() > 6 {
        return Err(format!(
            "more than {REPEAT_LIMIT} repetitions in {{{inside}}}"
        ));
    }
    Ok(inside.len() + 2)
}

/// Copies a class such as `[^a-z]`; its length.
fn class(text: &str, out: &mut String) -> Result<usize, String> {
    let mut chars = text.char_indices().peekable();
    let mut first = true;
    while let Some((index, c)) = chars.next() {
        match c {
            '[' if index == 0 => {
                out.push('[');
                if let Some((_, '^')) = chars.peek() {
                    out.push('^');
                    chars.next();
                }
                continue;
            }
            ']' if !first => {
                out.push(']');
                return Ok(index + 1);
            }
            '[' if text.get(index..).is_some_and(|rest| rest.starts_with("[:")) => {
                let end = text.get(index..).and_then(|rest| rest.find(":]"));
                match end {
                    Some(end) => {
                        out.push_str(text.get(index..index + end + 2).unwrap_or_default());
                        while chars.peek().is_some_and(|(at, _)| *at < index + end + 2) {
                            chars.next();
                        }
                    }
                    None => out.push_str("\\["),
                }
            }
            '[' | ']' | '&' | '~' => {
                out.push('\\');
                out.push(c);
            }
            '\\' => {
                out.push(c);
                out.extend(chars.next().map(|(_, escaped)| escaped));
            }
            c => out.push(c),
        }
        first = false;
    }
    Err("missing ]".into())
}

/// Letters, digits, `-`, `_`: the header names Istio's API takes.
pub(crate) fn is_header_name(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// A header as requests carry it: RFC 9110 §5.6.2 token, or a pseudo-header such as `:authority`.
pub(crate) fn is_header_token(name: &str) -> bool {
    let name = name.strip_prefix(':').unwrap_or(name);
    !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

/// `@request.auth.claims.NAME` or `@request.auth.claims[NAME]`: routing by a token's claim.
pub(crate) fn is_claim_route(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    lower
        .strip_prefix("@request.auth.claims")
        .is_some_and(|rest| {
            rest.strip_prefix('.').is_some_and(|name| !name.is_empty())
                || rest.starts_with('[') && rest.ends_with(']') && rest.len() > 2
        })
}

/// What is wrong with a header value, in which Envoy substitutes `%COMMAND(…)%`.
///
/// Source: Envoy, custom request and response headers.
pub(crate) fn header_value_fault(value: &str) -> Option<&'static str> {
    enum State {
        Literal,
        Name,
        Arguments,
        Text,
        Quoted,
        NextQuoted,
        AfterQuoted,
        AfterArray,
        End,
    }
    if value.chars().any(|c| c != '\t' && c < ' ' || c == '\u{7f}') {
        return Some("a header value may hold no control characters");
    }
    let mut state = State::Literal;
    let mut bytes = value.bytes().peekable();
    let mut in_array = false;
    while let Some(byte) = bytes.next() {
        state = match (state, byte) {
            (State::Literal, b'%') => match bytes.peek() {
                None => return Some("a lone % must be written %%"),
                Some(b'%') => {
                    bytes.next();
                    State::Literal
                }
                Some(_) => State::Name,
            },
            (State::Literal, _) => State::Literal,
            (State::Name, b'%') => State::Literal,
            (State::Name, b'(') => State::Arguments,
            (State::Name, _) => State::Name,
            (State::Arguments, b'[') => {
                in_array = true;
                State::NextQuoted
            }
            (State::Arguments, b' ') => State::Arguments,
            (State::Arguments, _) => State::Text,
            (State::NextQuoted, b'"') => State::Quoted,
            (State::NextQuoted, b' ') => State::NextQuoted,
            (State::NextQuoted, _) => return Some("the arguments of %COMMAND([…])% are in quotes"),
            (State::Text | State::Quoted, b'\\') => {
                if bytes.next().is_none() {
                    return Some("nothing follows the backslash");
                }
                if in_array { State::Quoted } else { State::Text }
            }
            (State::Text | State::Quoted, b')') => State::End,
            (State::Text | State::Quoted, b'"') => State::AfterQuoted,
            (State::Text, _) => State::Text,
            (State::Quoted, _) => State::Quoted,
            (State::AfterQuoted, b',') => State::NextQuoted,
            (State::AfterQuoted, b']') => State::AfterArray,
            (State::AfterQuoted, b' ') => State::AfterQuoted,
            (State::AfterQuoted, _) => return Some("arguments are separated by commas"),
            (State::AfterArray, b')') => State::End,
            (State::AfterArray, b' ') => State::AfterArray,
            (State::AfterArray, _) => return Some("%COMMAND([…])% is not closed"),
            (State::End, b'%') => State::Literal,
            (State::End, b' ') => State::End,
            (State::End, _) => return Some("%COMMAND(…) must end with %"),
        };
    }
    match state {
        State::Literal => None,
        _ => Some("a lone % must be written %%; %COMMAND% must end with %"),
    }
}

/// What a protocol of Istio's API is carried on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http,
    Tls,
    Tcp,
    Udp,
    Unknown,
}

/// The protocol of a port, by its name in the API.
pub(crate) fn protocol(name: &str) -> Protocol {
    match name.to_ascii_uppercase().as_str() {
        "HTTP" | "HTTP2" | "GRPC" | "GRPC-WEB" | "HTTP_PROXY" | "HBONE" => Protocol::Http,
        "HTTPS" | "TLS" | "DOUBLEHBONE" => Protocol::Tls,
        "TCP" | "MONGO" | "REDIS" | "MYSQL" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        _ => Protocol::Unknown,
    }
}

/// Whether `wide` (a host or wildcard) covers `narrow`.
pub(crate) fn covers(wide: &str, narrow: &str) -> bool {
    match (wide.strip_prefix('*'), narrow.strip_prefix('*')) {
        (Some(wide), Some(narrow)) => narrow.ends_with(wide),
        (Some(wide), None) => narrow.ends_with(wide),
        (None, Some(_)) => false,
        (None, None) => wide == narrow,
    }
}

/// Whether some host matches both.
pub(crate) fn overlap(a: &str, b: &str) -> bool {
    covers(a, b) || covers(b, a)
}

/// `SCHEME://HOST[:PORT][/…]` with a port that is a number.
pub(crate) fn url_parts(text: &str) -> Option<(&str, &str, Option<u16>)> {
    static URL: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(
            r"^([a-zA-Z][a-zA-Z0-9+.-]*)://([^/?#\s\\@:\[\]]*|\[[0-9a-fA-F:.]+\])(?::([0-9]*))?(?:[/?#][^\s\x00-\x1f]*)?$",
        )
        .expect("a constant")
    });
    let found = URL.captures(text)?;
    let part = |index: usize| found.get(index).map(|part| part.as_str());
    let port = match part(3) {
        None | Some("") => None,
        Some(number) => Some(number.parse().ok()?),
    };
    Some((part(1)?, part(2)?, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_hosts() {
        for good in [
            "a",
            "a.b",
            "a.b.",
            "*",
            "*.a",
            "*-x.a.b",
            "xn--bcher-kva.example",
            "1.example",
            "A.b",
            "*a.b",
        ] {
            assert!(is_wildcard_domain(good), "{good}");
        }
        for bad in [
            "", "a..b", "-a", "a-", "a_b", "a.*.b", "**", "1.2.3.4", "a/b", ".",
        ] {
            assert!(!is_wildcard_domain(bad), "{bad}");
        }
        assert!(!is_fqdn("*.a"));
        assert!(is_partial_wildcard("*a.b") && !is_partial_wildcard("*.b"));
    }

    #[test]
    fn durations() {
        assert_eq!(duration("1.5s"), Some(1_500_000_000));
        assert_eq!(duration("1h30m"), Some(5_400_000_000_000));
        assert_eq!(duration("-1s"), Some(-1_000_000_000));
        assert_eq!(duration("0.000000001s"), Some(1));
        for bad in ["", "1", "s", "1x", "1..2s", ".s"] {
            assert_eq!(duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn values_of_headers() {
        for good in [
            "",
            "a",
            "100%%",
            "a %HOSTNAME% b",
            "%REQ(x)%",
            r#"%UPSTREAM_METADATA(["a", "b"])%"#,
        ] {
            assert_eq!(header_value_fault(good), None, "{good}");
        }
        for bad in [
            "%",
            "abc%123",
            "%START_TIME%%",
            "%REQ(x",
            "%X([a])%",
            "%REQ(x)y%",
        ] {
            assert!(header_value_fault(bad).is_some(), "{bad}");
        }
    }

    #[test]
    fn expressions_are_re2s() {
        for good in [
            "a+?",
            "a{2,3}?",
            "/foo/{id}",
            "{",
            "[^[]",
            "[a&&b]",
            "[[:alpha:]_]+",
            "[]a]",
            r"\{x\}",
            "(?i)x",
            r"[\]a]",
            "^(.*?;)?(user=jason)(;.*)?$",
        ] {
            assert_eq!(uncompilable(good), None, "{good}");
        }
        for bad in ["(", "a++", "a**", "a+??", "a{1001}", "[a", "%#@~++=="] {
            assert!(uncompilable(bad).is_some(), "{bad}");
        }
    }

    #[test]
    fn addresses() {
        for good in ["1.2.3.4", "1.2.3.4/24", "2001::1/64", "::1"] {
            assert!(is_subnet(good), "{good}");
        }
        for bad in [
            "1.2.3",
            "1.2.3.4/33",
            "1.2.3.4/024",
            "1.2.3.4/",
            "a/8",
            "1.2.3.4/8/8",
        ] {
            assert!(!is_subnet(bad), "{bad}");
        }
        assert_eq!(
            url_parts("https://a.b:80/x"),
            Some(("https", "a.b", Some(80)))
        );
        for bad in ["a.b", "https://a:x", "hTPp\\\\blah", "https://a b"] {
            assert_eq!(url_parts(bad), None, "{bad}");
        }
    }
}
