//! Matchers on strings, headers, query parameters and paths, parsed once when configuration is loaded.

use std::borrow::Cow;

use bytes::Bytes;
use lateen_protocols::envoy::envoy::{config::route::v3 as proto, r#type::matcher::v3 as matcher};
use matcher::string_matcher::MatchPattern;
use proto::{
    header_matcher::HeaderMatchSpecifier, query_parameter_matcher::QueryParameterMatchSpecifier,
};
use regex::bytes::Regex;

use crate::{
    config_error::ConfigError,
    head::{Headers, Known, Name, RequestHead},
    proto::invalid,
};

/// A regular expression that must match the whole text, as Envoy's `safe_regex`.
///
/// # Errors
/// When the expression is not valid or too large.
pub fn whole_regex(path: &str, regex: &matcher::RegexMatcher) -> Result<Regex, ConfigError> {
    compile_regex(path, &format!(r"\A(?:{})\z", regex.regex))
}

fn compile_regex(path: &str, pattern: &str) -> Result<Regex, ConfigError> {
    const PROGRAM_BYTES: usize = 1 << 20; // far above any sane route, far below what hurts
    regex::bytes::RegexBuilder::new(pattern)
        .size_limit(PROGRAM_BYTES)
        .build()
        .map_err(|error| invalid(path, error.to_string()))
}

/// A pattern and what to put in its place (`\1` is the first group).
#[derive(Debug)]
pub struct RegexRewrite {
    regex: Regex,
    substitution: Vec<u8>,
}

impl RegexRewrite {
    /// Compiles Envoy's `RegexMatchAndSubstitute`.
    ///
    /// # Errors
    /// When there is no pattern, it is not valid, or the substitution names a group that does not exist.
    pub fn compile(
        path: &str,
        rewrite: &matcher::RegexMatchAndSubstitute,
    ) -> Result<RegexRewrite, ConfigError> {
        let pattern = rewrite
            .pattern
            .as_ref()
            .ok_or_else(|| invalid(path, "no pattern"))?;
        let regex = compile_regex(path, &pattern.regex)?;
        let mut substitution = Vec::new();
        let mut bytes = rewrite.substitution.bytes();
        while let Some(byte) = bytes.next() {
            match byte {
                b'\\' => match bytes.next() {
                    Some(digit @ b'0'..=b'9') => {
                        if usize::from(digit - b'0') >= regex.captures_len() {
                            return Err(invalid(
                                path,
                                "the substitution names no group of the pattern",
                            ));
                        }
                        substitution.extend_from_slice(b"${");
                        substitution.push(digit);
                        substitution.push(b'}');
                    }
                    Some(b'\\') => substitution.push(b'\\'),
                    _ => {
                        return Err(invalid(
                            path,
                            "a backslash stands before something else than a digit",
                        ));
                    }
                },
                b'$' => substitution.extend_from_slice(b"$$"),
                other => substitution.push(other),
            }
        }
        Ok(RegexRewrite {
            regex,
            substitution,
        })
    }

    /// Replaces every match.
    pub fn apply<'a>(&self, text: &'a [u8]) -> Cow<'a, [u8]> {
        self.regex.replace_all(text, self.substitution.as_slice())
    }
}

/// A pattern for text.
#[derive(Debug)]
pub enum StringMatch {
    /// The whole text; the flag says "case does not matter".
    Exact(Bytes, bool),
    /// Its beginning.
    Prefix(Bytes, bool),
    /// Its end.
    Suffix(Bytes, bool),
    /// Any part.
    Contains(Bytes, bool),
    /// The whole text matches.
    Regex(Regex),
}

impl StringMatch {
    /// Compiles Envoy's `StringMatcher`.
    ///
    /// # Errors
    /// When it is empty, not valid or of a custom kind.
    pub fn compile(
        path: &str,
        matcher: &matcher::StringMatcher,
    ) -> Result<StringMatch, ConfigError> {
        let fold = matcher.ignore_case;
        Ok(match matcher.match_pattern.as_ref() {
            Some(MatchPattern::Exact(text)) => StringMatch::Exact(text.clone().into(), fold),
            Some(MatchPattern::Prefix(text)) => StringMatch::Prefix(text.clone().into(), fold),
            Some(MatchPattern::Suffix(text)) => StringMatch::Suffix(text.clone().into(), fold),
            Some(MatchPattern::Contains(text)) => {
                let text = if fold {
                    text.to_ascii_lowercase()
                } else {
                    text.clone()
                };
                StringMatch::Contains(text.into(), fold)
            }
            Some(MatchPattern::SafeRegex(regex)) => StringMatch::Regex(whole_regex(path, regex)?),
            Some(MatchPattern::Custom(_)) => {
                return Err(invalid(path, "custom matchers are not supported"));
            }
            None => return Err(invalid(path, "no pattern")),
        })
    }

    /// Whether `text` matches.
    pub fn matches(&self, text: &[u8]) -> bool {
        match self {
            StringMatch::Exact(want, fold) => same(want, text, *fold),
            StringMatch::Prefix(want, fold) => text
                .get(..want.len())
                .is_some_and(|head| same(want, head, *fold)),
            StringMatch::Suffix(want, fold) => text
                .len()
                .checked_sub(want.len())
                .is_some_and(|start| same(want, &text[start..], *fold)),
            StringMatch::Contains(want, false) => contains(text, want),
            StringMatch::Contains(want, true) => contains(&text.to_ascii_lowercase(), want),
            StringMatch::Regex(regex) => regex.is_match(text),
        }
    }
}

fn same(want: &[u8], text: &[u8], fold: bool) -> bool {
    if fold {
        want.eq_ignore_ascii_case(text)
    } else {
        want == text
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    part.is_empty() || text.windows(part.len()).any(|window| window == part)
}

/// A header by the name configuration uses for it, pseudo headers included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeaderKey {
    /// `:method`.
    Method,
    /// `:path`.
    Path,
    /// `:authority` or `host`.
    Authority,
    /// `:scheme`.
    Scheme,
    /// `:status`, of responses.
    Status,
    /// Any other.
    Header(Name),
}

impl HeaderKey {
    /// Reads a name of any case.
    pub fn new(name: &str) -> HeaderKey {
        match name.to_ascii_lowercase().as_str() {
            ":method" => HeaderKey::Method,
            ":path" => HeaderKey::Path,
            ":authority" | "host" => HeaderKey::Authority,
            ":scheme" => HeaderKey::Scheme,
            ":status" => HeaderKey::Status,
            other => HeaderKey::Header(Name::new(other)),
        }
    }

    /// The value in a request, several values joined by commas.
    pub fn in_request<'a>(&self, head: &'a RequestHead) -> Option<Cow<'a, [u8]>> {
        let value = match self {
            HeaderKey::Method => &head.method,
            HeaderKey::Path => &head.path,
            HeaderKey::Authority => &head.authority,
            HeaderKey::Scheme => &head.scheme,
            HeaderKey::Status => return None,
            HeaderKey::Header(name) => return joined(&head.headers, name),
        };
        Some(Cow::Borrowed(value.as_ref()))
    }
}

/// All values of a header joined by commas.
pub fn joined<'a>(headers: &'a Headers, name: &Name) -> Option<Cow<'a, [u8]>> {
    let mut values = headers.iter().filter(|(n, _)| *n == *name).map(|(_, v)| v);
    let first = values.next()?;
    let Some(second) = values.next() else {
        return Some(Cow::Borrowed(first));
    };
    let mut all = first.to_vec();
    for value in std::iter::once(second).chain(values) {
        all.push(b',');
        all.extend_from_slice(value);
    }
    Some(Cow::Owned(all))
}

/// A condition on a header.
#[derive(Debug)]
pub struct HeaderMatch {
    key: HeaderKey,
    invert: bool,
    missing_is_empty: bool,
    test: HeaderTest,
}

#[derive(Debug)]
enum HeaderTest {
    Present(bool),
    Range(i64, i64),
    Text(StringMatch),
}

impl HeaderMatch {
    /// Compiles Envoy's `HeaderMatcher`.
    ///
    /// # Errors
    /// When a pattern is not valid.
    pub fn compile(header: &proto::HeaderMatcher) -> Result<HeaderMatch, ConfigError> {
        if header.name.is_empty() {
            return Err(invalid("headers", "a header matcher has no name"));
        }
        let path = header.name.as_str();
        let test = match header.header_match_specifier.as_ref() {
            None => HeaderTest::Present(true),
            Some(HeaderMatchSpecifier::PresentMatch(present)) => HeaderTest::Present(*present),
            Some(HeaderMatchSpecifier::RangeMatch(range)) => {
                HeaderTest::Range(range.start, range.end)
            }
            Some(HeaderMatchSpecifier::ExactMatch(text)) => {
                HeaderTest::Text(StringMatch::Exact(text.clone().into(), false))
            }
            Some(HeaderMatchSpecifier::PrefixMatch(text)) => {
                HeaderTest::Text(StringMatch::Prefix(text.clone().into(), false))
            }
            Some(HeaderMatchSpecifier::SuffixMatch(text)) => {
                HeaderTest::Text(StringMatch::Suffix(text.clone().into(), false))
            }
            Some(HeaderMatchSpecifier::ContainsMatch(text)) => {
                HeaderTest::Text(StringMatch::Contains(text.clone().into(), false))
            }
            Some(HeaderMatchSpecifier::SafeRegexMatch(regex)) => {
                HeaderTest::Text(StringMatch::Regex(whole_regex(path, regex)?))
            }
            Some(HeaderMatchSpecifier::StringMatch(text)) => {
                HeaderTest::Text(StringMatch::compile(path, text)?)
            }
        };
        Ok(HeaderMatch {
            key: HeaderKey::new(&header.name),
            invert: header.invert_match,
            missing_is_empty: header.treat_missing_header_as_empty,
            test,
        })
    }

    /// Whether a request meets the condition.
    pub fn matches(&self, head: &RequestHead) -> bool {
        self.decide(self.key.in_request(head))
    }

    /// Whether a response meets the condition.
    pub fn matches_response(&self, status: u16, headers: &Headers) -> bool {
        match &self.key {
            HeaderKey::Status => self.decide(Some(status.to_string().into_bytes().into())),
            HeaderKey::Header(name) => self.decide(joined(headers, name)),
            _ => self.decide(None),
        }
    }

    fn decide(&self, value: Option<Cow<'_, [u8]>>) -> bool {
        if let HeaderTest::Present(wanted) = self.test {
            return (value.is_some() == wanted) != self.invert;
        }
        let value = match value {
            Some(value) => value,
            None if self.missing_is_empty => Cow::Borrowed(&b""[..]),
            // Envoy: a rule about the value never holds for a header that is not there, unless inverted.
            None => return self.invert,
        };
        let matched = match &self.test {
            HeaderTest::Present(_) => true,
            HeaderTest::Range(start, end) => std::str::from_utf8(&value)
                .ok()
                .and_then(|text| text.parse::<i64>().ok())
                .is_some_and(|number| (*start..*end).contains(&number)),
            HeaderTest::Text(pattern) => pattern.matches(&value),
        };
        matched != self.invert
    }
}

/// A condition on a query parameter; names and values are compared as sent, not decoded.
#[derive(Debug)]
pub struct QueryMatch {
    name: Bytes,
    pattern: Option<StringMatch>,
    present: bool,
}

impl QueryMatch {
    /// Compiles Envoy's `QueryParameterMatcher`.
    ///
    /// # Errors
    /// When a pattern is not valid.
    pub fn compile(parameter: &proto::QueryParameterMatcher) -> Result<QueryMatch, ConfigError> {
        let (pattern, present) = match parameter.query_parameter_match_specifier.as_ref() {
            Some(QueryParameterMatchSpecifier::StringMatch(text)) => {
                (Some(StringMatch::compile(&parameter.name, text)?), true)
            }
            Some(QueryParameterMatchSpecifier::PresentMatch(present)) => (None, *present),
            None => (None, true),
        };
        Ok(QueryMatch {
            name: parameter.name.clone().into(),
            pattern,
            present,
        })
    }

    /// Whether a query (what follows `?`) meets the condition.
    pub fn matches(&self, query: Option<&[u8]>) -> bool {
        let value = query.and_then(|query| query_parameter(query, &self.name));
        match &self.pattern {
            None => value.is_some() == self.present,
            Some(pattern) => value.is_some_and(|value| pattern.matches(value)),
        }
    }
}

/// The first value of a query parameter, as sent; the query ends at `#`.
pub fn query_parameter<'a>(query: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let end = query.iter().position(|b| *b == b'#').unwrap_or(query.len());
    query[..end].split(|b| *b == b'&').find_map(|pair| {
        let equals = pair.iter().position(|b| *b == b'=');
        let (key, value) = match equals {
            Some(at) => (&pair[..at], &pair[at + 1..]),
            None => (pair, &b""[..]),
        };
        (key == name).then_some(value)
    })
}

/// A cookie's value.
pub fn cookie<'a>(headers: &'a Headers, name: &str) -> Option<&'a [u8]> {
    let key = Name::Known(Known::Cookie);
    headers
        .iter()
        .filter(|(n, _)| *n == key)
        .flat_map(|(_, line)| line.split(|b| *b == b';'))
        .find_map(|pair| {
            let pair = pair.trim_ascii();
            let equals = pair.iter().position(|b| *b == b'=')?;
            (pair[..equals] == *name.as_bytes())
                .then(|| pair[equals + 1..].trim_ascii())
                .map(|value| {
                    value
                        .strip_prefix(b"\"")
                        .and_then(|v| v.strip_suffix(b"\""))
                        .unwrap_or(value)
                })
        })
}

/// A condition on a cookie.
#[derive(Debug)]
pub struct CookieMatch {
    name: String,
    pattern: StringMatch,
    invert: bool,
}

impl CookieMatch {
    /// Compiles Envoy's `CookieMatcher`.
    ///
    /// # Errors
    /// When the pattern is absent or not valid.
    pub fn compile(cookie: &proto::CookieMatcher) -> Result<CookieMatch, ConfigError> {
        let pattern = cookie
            .string_match
            .as_ref()
            .ok_or_else(|| invalid(cookie.name.clone(), "no pattern"))?;
        Ok(CookieMatch {
            pattern: StringMatch::compile(&cookie.name, pattern)?,
            name: cookie.name.clone(),
            invert: cookie.invert_match,
        })
    }

    /// Whether the request meets the condition.
    pub fn matches(&self, headers: &Headers) -> bool {
        let matched = cookie(headers, &self.name).is_some_and(|value| self.pattern.matches(value));
        matched != self.invert
    }
}

#[cfg(test)]
mod tests {
    use lateen_protocols::envoy::envoy::r#type::v3::Int64Range;

    use super::*;

    fn head(headers: &[(&str, &str)]) -> RequestHead {
        let mut list = Headers::default();
        for (name, value) in headers {
            list.append(Name::new(name), value);
        }
        RequestHead {
            method: "GET".into(),
            scheme: "http".into(),
            authority: "reviews:9080".into(),
            path: "/a?b=c".into(),
            protocol: crate::head::Protocol::Http11,
            headers: list,
        }
    }

    fn header(specifier: Option<HeaderMatchSpecifier>, name: &str) -> proto::HeaderMatcher {
        proto::HeaderMatcher {
            name: name.to_owned(),
            header_match_specifier: specifier,
            ..Default::default()
        }
    }

    #[test]
    fn header_conditions() {
        let exact = |text: &str| {
            Some(HeaderMatchSpecifier::StringMatch(matcher::StringMatcher {
                ignore_case: false,
                match_pattern: Some(MatchPattern::Exact(text.to_owned())),
            }))
        };
        let range = Some(HeaderMatchSpecifier::RangeMatch(Int64Range {
            start: 1,
            end: 5,
        }));
        const JASON: &[(&str, &str)] = &[("end-user", "jason")];
        type Case = (
            &'static str,
            proto::HeaderMatcher,
            &'static [(&'static str, &'static str)],
            bool,
        );
        let cases: Vec<Case> = vec![
            ("exact", header(exact("jason"), "end-user"), JASON, true),
            ("absent", header(exact("jason"), "end-user"), &[], false),
            (
                "two values are joined",
                header(exact("a,b"), "x"),
                &[("x", "a"), ("x", "b")],
                true,
            ),
            ("pseudo", header(exact("GET"), ":method"), &[], true),
            (
                "host is the authority",
                header(exact("reviews:9080"), "Host"),
                &[],
                true,
            ),
            ("range", header(range.clone(), "n"), &[("n", "4")], true),
            (
                "range ends before end",
                header(range.clone(), "n"),
                &[("n", "5")],
                false,
            ),
            ("range of text", header(range, "n"), &[("n", "4x")], false),
            (
                "present",
                header(Some(HeaderMatchSpecifier::PresentMatch(true)), "n"),
                &[("n", "")],
                true,
            ),
            (
                "not present",
                header(Some(HeaderMatchSpecifier::PresentMatch(false)), "n"),
                &[],
                true,
            ),
            ("no specifier means present", header(None, "n"), &[], false),
            (
                "inverted and absent",
                proto::HeaderMatcher {
                    invert_match: true,
                    ..header(exact("jason"), "end-user")
                },
                &[],
                true,
            ),
            (
                "missing as empty",
                proto::HeaderMatcher {
                    treat_missing_header_as_empty: true,
                    ..header(exact(""), "n")
                },
                &[],
                true,
            ),
        ];
        for (note, matcher, headers, want) in cases {
            let matcher = HeaderMatch::compile(&matcher).unwrap();
            assert_eq!(matcher.matches(&head(headers)), want, "{note}");
        }
    }

    #[test]
    fn queries_are_compared_as_sent() {
        assert_eq!(query_parameter(b"debug&v=2.1", b"debug"), Some(&b""[..]));
        assert_eq!(query_parameter(b"id=x&id=5", b"id"), Some(&b"x"[..]));
        assert_eq!(query_parameter(b"%66lag=1", b"flag"), None);
        assert_eq!(query_parameter(b"a=1#&flag=1", b"flag"), None);
    }

    #[test]
    fn cookies() {
        let head = head(&[("cookie", "a=1; user=\"jason\";b=2"), ("cookie", "c=3")]);
        assert_eq!(cookie(&head.headers, "user"), Some(&b"jason"[..]));
        assert_eq!(cookie(&head.headers, "c"), Some(&b"3"[..]));
        assert_eq!(cookie(&head.headers, "d"), None);
    }

    #[test]
    fn substitutions_use_backslash_groups() {
        let rewrite = matcher::RegexMatchAndSubstitute {
            pattern: Some(matcher::RegexMatcher {
                regex: "^/regex/([a-z]+)/?.*$".into(),
                engine_type: None,
            }),
            substitution: "\\1.$svc".into(),
        };
        let rewrite = RegexRewrite::compile("x", &rewrite).unwrap();
        assert_eq!(rewrite.apply(b"/regex/abc/def").as_ref(), b"abc.$svc");
    }
}
