//! DNS names, e-mail addresses and URIs: what counts as one, and when two are the same.
//!
//! Validity follows what Istio's rules have always met (IDNA labels, RFC 5322 addresses without a display
//! name, the URLs Go's `net/url` takes). Comparing two ASCII names allocates nothing.

use std::borrow::Cow;

use idna::uts46::{AsciiDenyList, Hyphens, Uts46};

/// Text is not the name it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(String);

impl NameError {
    fn new(text: impl Into<String>) -> NameError {
        NameError(text.into())
    }
}

/// Longest DNS name, without a trailing dot.
const MAX_NAME: usize = 253;
/// Longest label of a DNS name.
const MAX_LABEL: usize = 63;

/// Checks a DNS name; one trailing dot is allowed.
pub(crate) fn check_dns(name: &str) -> Result<(), NameError> {
    let labels = name.strip_suffix('.').unwrap_or(name);
    if labels.split('.').any(str::is_empty) {
        return Err(NameError::new("idna: invalid label \"\""));
    }
    if is_plain_ascii(labels) {
        check_ascii(labels)?;
        if let Some(long) = labels.split('.').find(|l| l.len() > MAX_LABEL) {
            return Err(NameError::new(format!("idna: invalid label {long:?}")));
        }
        if labels.len() > MAX_NAME {
            return Err(NameError::new(format!(
                "idna: invalid length of {} bytes",
                labels.len()
            )));
        }
        return Ok(());
    }
    idna::uts46::Uts46::new()
        .to_ascii(
            labels.as_bytes(),
            AsciiDenyList::STD3,
            Hyphens::Check,
            idna::uts46::DnsLength::Verify,
        )
        .map(|_| ())
        .map_err(|_| NameError::new(format!("idna: invalid name {name:?}")))
}

/// Whether two DNS names are the same: letter case, Unicode or Punycode, and one trailing dot do not count.
pub(crate) fn dns_equal(a: &str, b: &str) -> Result<bool, NameError> {
    let (a, b) = (
        a.strip_suffix('.').unwrap_or(a),
        b.strip_suffix('.').unwrap_or(b),
    );
    if is_plain_ascii(a) && is_plain_ascii(b) {
        check_ascii(a)?;
        check_ascii(b)?;
        return Ok(a.eq_ignore_ascii_case(b));
    }
    Ok(lookup_form(a)? == lookup_form(b)?)
}

fn lookup_form(name: &str) -> Result<Cow<'_, str>, NameError> {
    let (unicode, valid) =
        Uts46::new().to_unicode(name.as_bytes(), AsciiDenyList::STD3, Hyphens::Check);
    match valid {
        Ok(()) => Ok(unicode),
        Err(_) => Err(NameError::new(format!("idna: invalid name {name:?}"))),
    }
}

/// No Unicode and no Punycode: labels mean what they say.
fn is_plain_ascii(name: &str) -> bool {
    name.is_ascii()
        && !name
            .split('.')
            .any(|l| l.get(..4).is_some_and(|p| p.eq_ignore_ascii_case("xn--")))
}

/// Letters, digits and hyphens, no hyphen in a label's first, last, or third and fourth place.
fn check_ascii(name: &str) -> Result<(), NameError> {
    if let Some(bad) = name
        .chars()
        .find(|c| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '.'))
    {
        return Err(NameError::new(format!(
            "idna: disallowed rune U+{:04X}",
            u32::from(bad)
        )));
    }
    let bad = |l: &&str| {
        l.starts_with('-') || l.ends_with('-') || (l.len() > 4 && l.get(2..4) == Some("--"))
    };
    match name.split('.').find(bad) {
        Some(label) => Err(NameError::new(format!("idna: invalid label {label:?}"))),
        None => Ok(()),
    }
}

/// Local part, unquoted, and domain of an e-mail address.
fn split_email(text: &str) -> Result<(Cow<'_, str>, &str), NameError> {
    let text = text.trim_matches([' ', '\t', '\r', '\n']);
    let inner = text
        .strip_prefix('<')
        .and_then(|t| t.strip_suffix('>'))
        .unwrap_or(text);
    let (local, rest) = match inner.strip_prefix('"') {
        Some(quoted) => unquote_local(quoted)?,
        None => {
            let end = inner.find(|c| !is_atext(c)).unwrap_or(inner.len());
            let (local, rest) = inner.split_at(end);
            check_dot_atom(local)?;
            (Cow::Borrowed(local), rest)
        }
    };
    let Some(domain) = rest.strip_prefix('@') else {
        return Err(NameError::new(if text.ends_with('>') {
            "display names are not allowed"
        } else {
            "mail: missing '@' in address"
        }));
    };
    check_dot_atom(domain)?;
    if let Some(bad) = domain.chars().find(|c| !is_atext(*c)) {
        return Err(NameError::new(format!(
            "mail: unexpected {bad:?} in address"
        )));
    }
    Ok((local, domain))
}

fn unquote_local(quoted: &str) -> Result<(Cow<'_, str>, &str), NameError> {
    let mut unescaped: Option<String> = None; // only when there is something to unescape
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => {
                let (raw, rest) = quoted.split_at(at);
                let local = unescaped.map_or(Cow::Borrowed(raw), Cow::Owned);
                if local.is_empty() {
                    return Err(NameError::new("mail: empty quoted string in address"));
                }
                return Ok((local, rest.strip_prefix('"').unwrap_or(rest)));
            }
            '\\' => {
                let text = unescaped.get_or_insert_with(|| quoted.split_at(at).0.to_owned());
                match chars.next() {
                    Some((_, escaped)) if !escaped.is_control() || escaped == '\t' => {
                        text.push(escaped);
                    }
                    _ => break,
                }
            }
            c if c.is_control() && c != '\t' => {
                return Err(NameError::new("mail: bad character in quoted string"));
            }
            c => {
                if let Some(text) = &mut unescaped {
                    text.push(c);
                }
            }
        }
    }
    Err(NameError::new("mail: unclosed quoted string"))
}

fn is_atext(c: char) -> bool {
    c == '.' || c.is_ascii_alphanumeric() || "!#$%&'*+-/=?^_`{|}~".contains(c) || !c.is_ascii()
}

fn check_dot_atom(text: &str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::new("mail: no address"));
    }
    if text.split('.').any(str::is_empty) {
        return Err(NameError::new(
            "mail: leading, trailing or double dot in address",
        ));
    }
    Ok(())
}

/// Checks an e-mail address.
pub(crate) fn check_email(text: &str) -> Result<(), NameError> {
    let (_, domain) = split_email(text)?;
    check_dns(domain)
}

/// Whether two e-mail addresses are the same: local parts exactly, once unquoted; domains as DNS names.
pub(crate) fn email_equal(a: &str, b: &str) -> Result<bool, NameError> {
    let (local_a, domain_a) = split_email(a)?;
    let (local_b, domain_b) = split_email(b)?;
    let domains = dns_equal(domain_a, domain_b)
        .map_err(|e| NameError::new(format!("error comparing e-mails '{a}' and '{b}': {e}")))?;
    Ok(domains && local_a == local_b)
}

/// The parts of a URI that comparison treats apart.
struct Uri<'a> {
    scheme: &'a str,
    user: Option<&'a str>,
    host: &'a str, // brackets off
    port: &'a str,
    authority: Option<&'a str>, // as written
    rest: &'a str,              // path, query and fragment, or the opaque part
}

/// Splits a URI, refusing what `net/url` refuses.
fn split_uri(text: &str) -> Result<Uri<'_>, NameError> {
    let fail = |reason: &str| Err(NameError::new(format!("parse {text}: {reason}")));
    if text.bytes().any(|b| b < b' ' || b == 0x7f) {
        return fail("net/url: invalid control character in URL");
    }
    let (scheme, after) = match text.find(|c: char| !is_scheme_char(c)) {
        Some(0) if text.starts_with(':') => return fail("missing protocol scheme"),
        Some(at)
            if text.get(at..).is_some_and(|t| t.starts_with(':'))
                && text.starts_with(|c: char| c.is_ascii_alphabetic()) =>
        {
            (
                text.get(..at).unwrap_or_default(),
                text.get(at + 1..).unwrap_or_default(),
            )
        }
        _ => ("", text),
    };
    let (before_fragment, fragment) = after.split_once('#').unwrap_or((after, ""));
    let (before_query, _) = before_fragment
        .split_once('?')
        .unwrap_or((before_fragment, ""));
    if !escapes_are_valid(fragment) {
        return fail("invalid URL escape");
    }
    let mut uri = Uri {
        scheme,
        user: None,
        host: "",
        port: "",
        authority: None,
        rest: after,
    };
    if !before_query.starts_with('/') {
        if scheme.is_empty() {
            let first = before_query.split('/').next().unwrap_or_default();
            if first.contains(':') {
                return fail("first path segment in URL cannot contain colon");
            }
            if !escapes_are_valid(before_query) {
                return fail("invalid URL escape");
            }
        }
        return Ok(uri); // with a scheme: opaque
    }
    let mut path = before_query;
    let has_authority =
        before_query.starts_with("//") && (!scheme.is_empty() || !before_query.starts_with("///"));
    if has_authority {
        let after_slashes = after.get(2..).unwrap_or_default();
        let in_path = before_query.get(2..).unwrap_or_default();
        let end = in_path.find('/').unwrap_or(in_path.len());
        let (authority, rest) = after_slashes.split_at(end);
        path = in_path.get(end..).unwrap_or_default();
        let (user, host) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        if user.is_some_and(|user| !is_userinfo(user)) {
            return fail("net/url: invalid userinfo");
        }
        let Some((host, port)) = split_host(host) else {
            return fail("invalid host or port");
        };
        uri = Uri {
            scheme,
            user,
            host,
            port,
            authority: Some(authority),
            rest,
        };
    }
    if !escapes_are_valid(path) {
        return fail("invalid URL escape");
    }
    Ok(uri)
}

fn is_scheme_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.')
}

fn escapes_are_valid(text: &str) -> bool {
    text.split('%').skip(1).all(|after| {
        after
            .as_bytes()
            .get(..2)
            .is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit))
    })
}

fn is_userinfo(text: &str) -> bool {
    text.chars()
        .all(|c| c.is_ascii_alphanumeric() || "-._:~!$&'()*+,;=%@".contains(c))
        && escapes_are_valid(text)
}

/// Host without brackets, and port without its colon.
fn split_host(text: &str) -> Option<(&str, &str)> {
    let (host, port) = if let Some(inside) = text.strip_prefix('[') {
        let (host, port) = inside.rsplit_once(']')?;
        (host, port)
    } else {
        let at = text.rfind(':').unwrap_or(text.len());
        text.split_at(at)
    };
    let port = match port.strip_prefix(':') {
        Some(port) => port,
        None if port.is_empty() => "",
        None => return None,
    };
    // What net/url leaves alone in a host; a percent sign starts an escape of a non-ASCII byte or a zone.
    let host_char = |c: char| {
        !c.is_ascii() || c.is_ascii_alphanumeric() || "-._~!$&'()*+,;=:[]<>\"%".contains(c)
    };
    (port.bytes().all(|b| b.is_ascii_digit()) && host.chars().all(host_char))
        .then_some((host, port))
}

/// Checks a URI.
pub(crate) fn check_uri(text: &str) -> Result<(), NameError> {
    split_uri(text).map(|_| ())
}

/// Whether two URIs are the same: the scheme's letter case does not count, for http and https the host is a
/// DNS name and an empty port is none; all else counts as written.
pub(crate) fn uri_equal(a: &str, b: &str) -> Result<bool, NameError> {
    let read = |text| {
        split_uri(text)
            .map_err(|e| NameError::new(format!("error converting string to uri '{text}': '{e}'")))
    };
    let (a, b) = (read(a)?, read(b)?);
    if !a.scheme.eq_ignore_ascii_case(b.scheme) {
        return Ok(false);
    }
    let web = a.scheme.eq_ignore_ascii_case("http") || a.scheme.eq_ignore_ascii_case("https");
    let authority = match (a.authority, b.authority) {
        (Some(_), Some(_)) if web => {
            a.user == b.user && a.port == b.port && host_equal(a.host, b.host)?
        }
        (first, second) => first == second,
    };
    Ok(authority && a.rest == b.rest)
}

fn host_equal(a: &str, b: &str) -> Result<bool, NameError> {
    if a.contains(':') || b.contains(':') {
        return Ok(a.eq_ignore_ascii_case(b)); // IPv6 literals are no DNS names
    }
    dns_equal(a, b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dns_names() {
        let long = "a".repeat(64);
        for good in [
            "a",
            "a.b.",
            "A-1.b",
            "xn--bcher-kva.example",
            "bücher.example",
        ] {
            assert!(check_dns(good).is_ok(), "{good}");
        }
        for bad in [
            "", ".", "a..b", ".a", "-a", "a-", "a_b", "a b", "ab--cd.e", "*.a", &long, "xn--a",
        ] {
            assert!(check_dns(bad).is_err(), "{bad}");
        }
        assert!(check_dns(&["abcdefg."; 40].concat()).is_err());
        assert_eq!(dns_equal("A.b.", "a.B"), Ok(true));
        assert_eq!(
            dns_equal("BÜCHER.example", "xn--bcher-kva.example"),
            Ok(true)
        );
        assert_eq!(dns_equal("a", "b"), Ok(false));
        assert!(dns_equal("a_", "a").is_err());
    }

    #[test]
    fn emails() {
        for good in ["a@b", "<a@b.c>", r#""a b\"@"@c"#, "a.b+c@d.e", " a@b "] {
            assert!(check_email(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "a",
            "@b",
            "a@",
            "a@b c",
            "A <a@b>",
            ".a@b",
            "a.@b",
            "a..b@c",
            r#"""@b"#,
            r#""a@b"#,
            "a@-b",
            "a@b.",
            "a@[1.2.3.4]",
            "a@b,c@d",
            "\"a\nb\"@c",
        ] {
            assert!(check_email(bad).is_err(), "{bad}");
        }
        assert_eq!(email_equal(r#""a\b"@c.D"#, "ab@C.d"), Ok(true));
        assert_eq!(email_equal("A@b", "a@b"), Ok(false));
    }

    #[test]
    fn uris() {
        for good in [
            "a",
            "a/b:c",
            "/a",
            "//h/p",
            "///p",
            "http://u:p@h:80/p?q#f",
            "mailto:a@b",
            "http://[::1]:8/",
            "http://h:/",
            "*",
            "?q",
            "a%20b",
            "urn:%zz",
        ] {
            assert!(check_uri(good).is_ok(), "{good}");
        }
        for bad in [
            ":/",
            "1:b",
            "a b:c",
            "http://h:x/",
            "http://[::1/",
            "/%zz",
            "#%",
            "http://a b/",
            "\u{7f}",
        ] {
            assert!(check_uri(bad).is_err(), "{bad}");
        }
        for (a, b, want) in [
            ("HTTP://a.b:/x", "http://A.B/x", true),
            ("http://a:80", "http://a", false),
            ("http://u@a", "http://a", false),
            ("ftp://A", "ftp://a", false),
            ("http:/a", "http://a", false),
            ("http://[::A]/", "http://[::a]/", true),
            ("http://a?q=1#f", "http://a?q=1#g", false),
        ] {
            assert_eq!(uri_equal(a, b), Ok(want), "{a} {b}");
        }
        assert!(uri_equal("http://a_", "http://b").is_err());
    }
}
