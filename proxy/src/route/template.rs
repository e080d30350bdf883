//! URI templates: `/media/{country}/*/{path=**}.mp4`. Envoy: `envoy.path.match.uri_template` and
//! `envoy.path.rewrite.uri_template`.

use std::collections::HashSet;

use lateen_protocols::envoy::envoy::{
    config::core::v3::TypedExtensionConfig,
    extensions::path::{
        r#match::uri_template::v3::UriTemplateMatchConfig,
        rewrite::uri_template::v3::UriTemplateRewriteConfig,
    },
};
use regex::bytes::{Captures, Regex};

use crate::{
    config_error::ConfigError,
    proto::{invalid, unpack},
};

/// Characters of a segment, as a class of a regular expression. RFC 3986 §3.3, less `*`.
const SEGMENT: &str = r"[a-zA-Z0-9\-._~%!$&'()+,;:@=]";
/// The same, with the slash.
const SEGMENTS: &str = r"[a-zA-Z0-9\-._~%!$&'()+,;:@=/]";
/// Envoy's limits.
const MAX_VARIABLES: usize = 5;
const MAX_NAME: usize = 16;

/// A pattern of paths.
#[derive(Debug)]
pub struct Template {
    regex: Regex,
    variables: HashSet<String>,
}

/// A path made of what a [`Template`] found.
#[derive(Debug)]
pub struct TemplateRewrite {
    parts: Vec<Part>,
}

#[derive(Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Variable(String),
}

impl Template {
    /// Compiles the extension that matches paths.
    ///
    /// # Errors
    /// It is another one, or its pattern is not well formed.
    pub fn of_extension(extension: &TypedExtensionConfig) -> Result<Template, ConfigError> {
        let any = extension.typed_config.as_ref();
        match any.map(unpack::<UriTemplateMatchConfig>).transpose()? {
            Some(Some(config)) => Template::compile(&config.path_template),
            _ => Err(invalid(extension.name.clone(), "not supported")),
        }
    }

    /// Compiles a pattern.
    ///
    /// # Errors
    /// It does not begin with a slash, or is not well formed.
    pub fn compile(pattern: &str) -> Result<Template, ConfigError> {
        let broken = |why: &str| invalid("path_template", format!("{pattern:?}: {why}"));
        if !pattern.starts_with('/') {
            return Err(broken("does not begin with a slash"));
        }
        let mut regex = "^".to_owned();
        let mut variables = HashSet::new();
        let mut rest = pattern;
        // After `**` nothing but text may follow: how much it takes would not be clear.
        let mut ended = false;
        while let Some(first) = rest.chars().next() {
            let (what, name) = match first {
                '*' => {
                    let end = rest.len() - rest.trim_start_matches('*').len();
                    let (glob, after) = rest.split_at(end);
                    rest = after;
                    (glob, None)
                }
                '{' => {
                    let (inner, after) = rest[1..]
                        .split_once('}')
                        .ok_or_else(|| broken("a brace is not closed"))?;
                    rest = after;
                    let (name, what) = inner.split_once('=').unwrap_or((inner, "*"));
                    (what, Some(name))
                }
                _ => {
                    let end = rest.find(['*', '{']).unwrap_or(rest.len());
                    let (text, after) = rest.split_at(end);
                    rest = after;
                    if !text.bytes().all(is_literal) {
                        return Err(broken("a character must be percent-encoded"));
                    }
                    if text.contains("//") {
                        return Err(broken("an empty segment"));
                    }
                    regex.push_str(&regex::escape(text));
                    continue;
                }
            };
            if ended {
                return Err(broken("only text may follow **"));
            }
            let inner = glob(what, &mut ended).ok_or_else(|| broken("a wildcard is * or **"))?;
            match name {
                None => regex.push_str(&inner),
                Some(name) => {
                    let good = name.len() <= MAX_NAME
                        && name.starts_with(|c: char| c.is_ascii_alphabetic())
                        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
                    if !good {
                        return Err(broken("not the name of a variable"));
                    }
                    if !variables.insert(name.to_owned()) {
                        return Err(broken("a variable is named twice"));
                    }
                    regex.push_str(&format!("(?P<{name}>{inner})"));
                }
            }
        }
        if variables.len() > MAX_VARIABLES {
            return Err(broken("more than five variables"));
        }
        regex.push('$');
        Ok(Template {
            regex: Regex::new(&regex).map_err(|error| broken(&error.to_string()))?,
            variables,
        })
    }

    /// Whether a path, without its query, is of this form.
    pub fn matches(&self, path: &[u8]) -> bool {
        self.regex.is_match(path)
    }

    fn captures<'a>(&self, path: &'a [u8]) -> Option<Captures<'a>> {
        self.regex.captures(path)
    }
}

fn is_literal(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~%!$&'()+,;:@=/".contains(&byte)
}

/// The expression of what a wildcard or a variable takes: segments and wildcards between slashes.
fn glob(what: &str, ended: &mut bool) -> Option<String> {
    let mut regex = String::new();
    for (index, segment) in what.split('/').enumerate() {
        if *ended {
            return None;
        }
        if index > 0 {
            regex.push('/');
        }
        match segment {
            "*" => {
                regex.push_str(SEGMENT);
                regex.push('+');
            }
            "**" => {
                regex.push_str(SEGMENTS);
                regex.push('*');
                *ended = true;
            }
            "" => return None,
            text if text.bytes().all(is_literal) => regex.push_str(&regex::escape(text)),
            _ => return None,
        }
    }
    Some(regex)
}

impl TemplateRewrite {
    /// Compiles the extension that rewrites paths.
    ///
    /// # Errors
    /// It is another one, or see [`TemplateRewrite::compile`].
    pub fn of_extension(
        extension: &TypedExtensionConfig,
        template: &Template,
    ) -> Result<TemplateRewrite, ConfigError> {
        let any = extension.typed_config.as_ref();
        match any.map(unpack::<UriTemplateRewriteConfig>).transpose()? {
            Some(Some(config)) => TemplateRewrite::compile(&config.path_template_rewrite, template),
            _ => Err(invalid(extension.name.clone(), "not supported")),
        }
    }

    /// Compiles what becomes of paths that `template` matches.
    ///
    /// # Errors
    /// It is not well formed, or names a variable that the template has not.
    pub fn compile(pattern: &str, template: &Template) -> Result<TemplateRewrite, ConfigError> {
        let broken = |why: &str| invalid("path_template_rewrite", format!("{pattern:?}: {why}"));
        if !pattern.starts_with('/') {
            return Err(broken("does not begin with a slash"));
        }
        let mut parts = Vec::new();
        let mut rest = pattern;
        while !rest.is_empty() {
            let (text, after) = match rest.find('{') {
                Some(0) => {
                    let (name, after) = rest[1..]
                        .split_once('}')
                        .ok_or_else(|| broken("a brace is not closed"))?;
                    if !template.variables.contains(name) {
                        return Err(broken("a variable that the match has not"));
                    }
                    parts.push(Part::Variable(name.to_owned()));
                    rest = after;
                    continue;
                }
                Some(at) => rest.split_at(at),
                None => (rest, ""),
            };
            if !text.bytes().all(is_literal) {
                return Err(broken("a character must be percent-encoded"));
            }
            parts.push(Part::Text(text.to_owned()));
            rest = after;
        }
        Ok(TemplateRewrite { parts })
    }

    /// The new path; `None` if the template does not match.
    pub fn apply(&self, template: &Template, path: &[u8]) -> Option<Vec<u8>> {
        let found = template.captures(path)?;
        let mut out = Vec::with_capacity(path.len());
        for part in &self.parts {
            match part {
                Part::Text(text) => out.extend_from_slice(text.as_bytes()),
                Part::Variable(name) => out.extend_from_slice(found.name(name)?.as_bytes()),
            }
        }
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_take_segments() {
        for (pattern, path, holds) in [
            ("/a/*", "/a/b", true),
            ("/a/*", "/a/b/c", false),
            ("/a/*", "/a/", false),
            ("/a/**", "/a/b/c", true),
            ("/a/**", "/a/", true),
            ("/a/**", "/a", false),
            ("/**.mpd", "/x/y.mpd", true),
            ("/a.b", "/axb", false),
            ("/{x}/c", "/b/c", true),
            ("/{x=b/*}/c", "/b/y/c", true),
            ("/{x=b/*}/c", "/d/y/c", false),
            ("/{x=**}", "/b/y/c", true),
            ("/a/*", "/a/b=c", true),
        ] {
            let template = Template::compile(pattern).unwrap();
            assert_eq!(template.matches(path.as_bytes()), holds, "{pattern} {path}");
        }
        for broken in [
            "",
            "a",
            "/{x",
            "/***",
            "/**/b/*",
            "/{x}/{x}",
            "/{1}",
            "/a b",
            "//",
            "/{x=}",
            "/{a}{b}{c}{d}{e}{f}",
            "/{x=**/*}",
        ] {
            assert!(Template::compile(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn what_was_found_makes_the_new_path() {
        let template = Template::compile("/{country}/{lang=*}/{path=**}").unwrap();
        let rewrite = TemplateRewrite::compile("/{path}/in/{country}.{lang}", &template).unwrap();
        assert_eq!(
            rewrite.apply(&template, b"/at/de/a/b.html").as_deref(),
            Some(&b"/a/b.html/in/at.de"[..])
        );
        assert_eq!(rewrite.apply(&template, b"/at"), None);
        for broken in ["{path}", "/{nope}", "/{path", "/a*"] {
            assert!(
                TemplateRewrite::compile(broken, &template).is_err(),
                "{broken}"
            );
        }
    }
}
