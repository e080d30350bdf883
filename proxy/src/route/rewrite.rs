//! What routes make of paths and hosts: rewrites of what is forwarded, and redirects.

use bytes::Bytes;
use lateen_protocols::envoy::envoy::config::route::v3 as proto;
use proto::redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier};

use super::{
    Action, HostRewrite, Route, Selected,
    conditions::{Conditions, PathMatch},
    matcher::RegexRewrite,
    template::TemplateRewrite,
    without_port,
};
use crate::{
    config_error::ConfigError,
    head::{Headers, Known, Name, RequestHead},
    proto::invalid,
};

/// What becomes of the path when it is forwarded.
#[derive(Debug)]
pub enum PathRewrite {
    /// Stays.
    Keep,
    /// The matched part is replaced.
    Prefix(Bytes),
    /// Every match is replaced.
    Regex(RegexRewrite),
    /// It is made anew of what the route's template found.
    Template(TemplateRewrite),
}

/// A redirect.
#[derive(Debug)]
pub struct Redirect {
    status: u16,
    scheme: Option<Bytes>,
    host: Option<Bytes>,
    port: Option<u16>,
    path: RedirectPath,
    strip_query: bool,
}

#[derive(Debug)]
enum RedirectPath {
    Whole(Bytes),
    Rewrite(PathRewrite),
}

impl Selected {
    /// Applies the route's path and host rewrites (all but the automatic host rewrite, which is the
    /// router's) and leaves the old values in `x-envoy-original-path`, `x-envoy-original-host` and `x-forwarded-host`.
    pub fn rewrite(&self, head: &mut RequestHead, suppress_envoy_headers: bool) {
        let Action::Forward { policy, rewrite } = &self.route().action else {
            return;
        };
        let host = match (
            self.weighted().and_then(|w| w.host_rewrite.as_ref()),
            &policy.host_rewrite,
        ) {
            (Some(host), _) | (None, HostRewrite::Literal(host)) => Some(host.clone()),
            (None, HostRewrite::Header(name)) => head
                .headers
                .get(name)
                .filter(|v| !v.is_empty())
                .map(Bytes::copy_from_slice),
            (None, HostRewrite::PathRegex(rewrite)) => {
                Some(rewrite.apply(head.path_only()).into_owned().into())
            }
            (None, HostRewrite::Keep | HostRewrite::Auto) => None,
        };
        if let Some(path) = rewrite.apply(&self.route().conditions, head) {
            let old = std::mem::replace(&mut head.path, path);
            if !suppress_envoy_headers {
                head.headers.set(Known::XEnvoyOriginalPath, old);
            }
        }
        if let Some(host) = host
            && host != head.authority
        {
            let old = std::mem::replace(&mut head.authority, host);
            if !suppress_envoy_headers {
                head.headers
                    .set(Name::new("x-envoy-original-host"), old.clone());
            }
            if policy.append_x_forwarded_host {
                append_forwarded_host(&mut head.headers, &old);
            }
        }
    }
}

/// Adds an authority to `x-forwarded-host`, after those of earlier proxies.
pub fn append_forwarded_host(headers: &mut Headers, host: &Bytes) {
    let value = match headers.known(Known::XForwardedHost) {
        Some(earlier) => {
            let mut all = earlier.to_vec();
            all.push(b',');
            all.extend_from_slice(host);
            all.into()
        }
        None => host.clone(),
    };
    headers.set(Known::XForwardedHost, value);
}

impl PathRewrite {
    /// The new path with the query, or `None` if it stays.
    fn apply(&self, conditions: &Conditions, head: &RequestHead) -> Option<Bytes> {
        let path = head.path_only();
        let rest = &head.path[path.len()..];
        let mut new = match self {
            PathRewrite::Keep => return None,
            PathRewrite::Prefix(prefix) => {
                let matched = match &conditions.path {
                    PathMatch::Prefix(p) | PathMatch::Separated(p) => p.len(),
                    PathMatch::Exact(_) | PathMatch::Regex(_) | PathMatch::Template(_) => {
                        path.len()
                    }
                    PathMatch::Connect => return None,
                };
                let mut new = prefix.to_vec();
                new.extend_from_slice(&path[matched.min(path.len())..]);
                new
            }
            PathRewrite::Regex(rewrite) => rewrite.apply(path).into_owned(),
            PathRewrite::Template(rewrite) => match &conditions.path {
                PathMatch::Template(template) => rewrite.apply(template, path)?,
                _ => return None,
            },
        };
        new.extend_from_slice(rest);
        Some(new.into())
    }
}

impl Redirect {
    pub(super) fn compile(redirect: &proto::RedirectAction) -> Result<Redirect, ConfigError> {
        let text = |text: &str| (!text.is_empty()).then(|| Bytes::from(text.to_owned()));
        let path = match redirect.path_rewrite_specifier.as_ref() {
            None => RedirectPath::Rewrite(PathRewrite::Keep),
            Some(PathRewriteSpecifier::PathRedirect(path)) => match text(path) {
                Some(path) => RedirectPath::Whole(path),
                None => RedirectPath::Rewrite(PathRewrite::Keep),
            },
            Some(PathRewriteSpecifier::PrefixRewrite(prefix)) => {
                RedirectPath::Rewrite(PathRewrite::Prefix(prefix.clone().into()))
            }
            Some(PathRewriteSpecifier::RegexRewrite(regex)) => RedirectPath::Rewrite(
                PathRewrite::Regex(RegexRewrite::compile("regex_rewrite", regex)?),
            ),
            Some(PathRewriteSpecifier::PathRewrite(_)) => {
                return Err(invalid("path_rewrite", "not supported"));
            }
        };
        let port = match redirect.port_redirect {
            0 => None,
            port => Some(u16::try_from(port).map_err(|_| invalid("port_redirect", "not a port"))?),
        };
        Ok(Redirect {
            status: match redirect.response_code() {
                RedirectResponseCode::MovedPermanently => 301,
                RedirectResponseCode::Found => 302,
                RedirectResponseCode::SeeOther => 303,
                RedirectResponseCode::TemporaryRedirect => 307,
                RedirectResponseCode::PermanentRedirect => 308,
            },
            scheme: match redirect.scheme_rewrite_specifier.as_ref() {
                Some(SchemeRewriteSpecifier::HttpsRedirect(true)) => {
                    Some(Bytes::from_static(b"https"))
                }
                Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) => text(scheme),
                Some(SchemeRewriteSpecifier::HttpsRedirect(false)) | None => None,
            },
            host: text(&redirect.host_redirect),
            port,
            path,
            strip_query: redirect.strip_query,
        })
    }

    /// Status of the answer.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// `location` for a request. Envoy: `RouteEntryImplBase::newUri`.
    pub fn location(&self, route: &Route, head: &RequestHead) -> Bytes {
        let scheme = self.scheme.as_ref().unwrap_or(&head.scheme);
        let host = match &self.host {
            Some(host) => host.as_ref(),
            None => self.request_host(head, scheme),
        };
        let mut location = scheme.to_vec();
        location.extend_from_slice(b"://");
        location.extend_from_slice(host);
        if let Some(port) = self.port {
            location.extend_from_slice(format!(":{port}").as_bytes());
        }
        let query_of = |path: &Bytes| {
            path.iter()
                .position(|b| *b == b'?')
                .map(|at| path.slice(at..))
        };
        match &self.path {
            RedirectPath::Whole(path) => {
                location.extend_from_slice(path);
                if !self.strip_query
                    && !path.contains(&b'?')
                    && let Some(query) = query_of(&head.path)
                {
                    location.extend_from_slice(&query);
                }
            }
            RedirectPath::Rewrite(rewrite) => {
                let path = rewrite
                    .apply(&route.conditions, head)
                    .unwrap_or_else(|| head.path.clone());
                let end = match (self.strip_query, path.iter().position(|b| *b == b'?')) {
                    (true, Some(query)) => query,
                    _ => path.len(),
                };
                location.extend_from_slice(&path[..end]);
            }
        }
        location.into()
    }

    /// The request's host; its port goes when another is given, or when it was the old scheme's default.
    fn request_host<'a>(&self, head: &'a RequestHead, scheme: &[u8]) -> &'a [u8] {
        let host = without_port(&head.authority);
        let port = &head.authority[host.len()..];
        let old_default = scheme != head.scheme.as_ref()
            && matches!(
                (head.scheme.as_ref(), port),
                (b"https", b":443") | (b"http", b":80")
            );
        if self.port.is_some() || old_default {
            host
        } else {
            &head.authority
        }
    }
}
