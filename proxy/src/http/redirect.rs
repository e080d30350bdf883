//! Redirects that the proxy follows itself: whether it does, and the request that is sent instead. Envoy:
//! `Filter::convertRequestHeadersForInternalRedirect`.

use std::sync::Arc;

use bytes::Bytes;

use super::Stats;
use crate::{
    body::Body,
    head::{Known, Name, RequestHead, ResponseHead},
    info::TlsInfo,
    route::{
        Action, RouteTable, Selected, Unmatched,
        internal_redirect::{InternalRedirect, Leads, Taken},
    },
    router::SharedInfo,
};

/// What is needed to judge a redirect.
pub(super) struct Judge<'a> {
    pub(super) policy: &'a InternalRedirect,
    pub(super) table: &'a Arc<RouteTable>,
    /// The route whose response it is.
    pub(super) left: &'a Selected,
    pub(super) tls: Option<&'a TlsInfo>,
    pub(super) internal: bool,
    pub(super) stats: &'a Stats,
    pub(super) info: &'a SharedInfo,
}

impl Judge<'_> {
    /// Makes `head` the request that the response asks for, and gives its body; `None` if the response is
    /// for the client. `body` is the request's, if all of it has come and was kept.
    pub(super) fn follow(
        &self,
        response: &ResponseHead,
        head: &mut RequestHead,
        body: Option<Body>,
        taken: &mut Taken,
    ) -> Option<Body> {
        let body = body?;
        let location = response.headers.known(Known::Location)?;
        let Some(target) = Target::parse(location) else {
            self.stats.redirect_bad_location.inc();
            return None;
        };
        let from_https = self.tls.is_some()
            && head.headers.known(Known::XForwardedProto) != Some(b"http".as_slice());
        let to_https = !target.scheme.eq_ignore_ascii_case(b"http");
        if from_https != to_https && !self.policy.cross_scheme {
            self.stats.redirect_unsafe_scheme.inc();
            return None;
        }
        if taken.count >= self.policy.max {
            self.stats.redirect_too_many.inc();
            return None;
        }
        let mut next = head.clone();
        for name in &self.policy.copy {
            next.headers.remove(name);
            let values = response.headers.iter();
            for (_, value) in values.filter(|(own, _)| own.as_bytes() == name.as_bytes()) {
                next.headers.append(name.clone(), value);
            }
        }
        next.scheme = Bytes::copy_from_slice(&target.scheme.to_ascii_lowercase());
        next.authority = Bytes::copy_from_slice(target.authority);
        next.path = target.path.into();
        if !self.allows(&next, from_https, to_https, taken) {
            return None;
        }
        let safe = matches!(&*next.method, b"GET" | b"HEAD");
        let body = if response.status == 303 && !safe {
            // RFC 9110 §15.4.4.
            next.method = Bytes::from_static(b"GET");
            next.headers.remove_known(Known::ContentLength);
            Body::empty()
        } else {
            body
        };
        let mut url = if from_https { "https://" } else { "http://" }
            .as_bytes()
            .to_vec();
        url.extend_from_slice(&head.authority);
        url.extend_from_slice(&head.path);
        next.headers.set(Name::new("x-envoy-original-url"), url);
        taken.count += 1;
        *head = next;
        Some(body)
    }

    /// Whether the route of `next` may be taken. The facts name it from here on even if not, as in Envoy.
    fn allows(
        &self,
        next: &RequestHead,
        from_https: bool,
        to_https: bool,
        taken: &mut Taken,
    ) -> bool {
        let selected = match self.table.select(next, self.tls, self.internal) {
            Ok(selected) => Some(selected),
            // A route, too, if one without a name: to `https`.
            Err(Unmatched::NeedsTls) => None,
            Err(Unmatched::NotFound) => {
                self.name(None, next);
                self.stats.redirect_no_route.inc();
                return false;
            }
        };
        self.name(selected.as_ref(), next);
        let name = selected.and_then(|selected| selected.route().name.clone());
        let leads = Leads {
            from: &self.left.route().name,
            to: &name,
            from_https,
            to_https,
        };
        let allowed = self.policy.allows(leads, taken);
        if !allowed {
            self.stats.redirect_predicate.inc();
        }
        allowed
    }

    fn name(&self, selected: Option<&Selected>, head: &RequestHead) {
        let mut info = self.info.borrow_mut();
        info.route_name = selected.and_then(|selected| selected.route().name.clone());
        info.virtual_host = selected.map(|selected| selected.virtual_host().name.clone());
        info.upstream_cluster = selected
            .filter(|selected| matches!(selected.route().action, Action::Forward { .. }))
            .and_then(|selected| selected.target(head))
            .map(|target| target.cluster);
    }
}

/// A `location`, taken apart; only absolute ones are followed.
#[derive(Debug, PartialEq, Eq)]
struct Target<'a> {
    scheme: &'a [u8],
    authority: &'a [u8],
    /// With the query, without the fragment.
    path: Vec<u8>,
}

impl Target<'_> {
    fn parse(location: &[u8]) -> Option<Target<'_>> {
        let colon = location.iter().position(|b| *b == b':')?;
        let (scheme, rest) = location.split_at(colon);
        let rest = rest.strip_prefix(b"://")?;
        if scheme.is_empty() || !scheme.iter().all(u8::is_ascii_alphabetic) {
            return None;
        }
        let end = rest.iter().position(|b| b"/?#".contains(b));
        let (authority, rest) = rest.split_at(end.unwrap_or(rest.len()));
        // Whoever the upstream would have the client be is nobody to us.
        let authority = match authority.iter().rposition(|b| *b == b'@') {
            Some(at) => authority.get(at + 1..)?,
            None => authority,
        };
        let printable = |b: &u8| *b > b' ' && *b != 0x7f;
        if !is_host_and_port(authority) || !rest.iter().all(printable) {
            return None;
        }
        let path = rest.split(|b| *b == b'#').next().unwrap_or_default();
        let slash = if path.starts_with(b"/") { "" } else { "/" };
        Some(Target {
            scheme,
            authority,
            path: [slash.as_bytes(), path].concat(),
        })
    }
}

/// `name`, `address` or `[address]`, perhaps with a port.
fn is_host_and_port(authority: &[u8]) -> bool {
    let (host, port) = match authority.strip_prefix(b"[") {
        Some(literal) => {
            let Some(end) = literal.iter().position(|b| *b == b']') else {
                return false;
            };
            let (address, rest) = literal.split_at(end);
            let part = |b: &u8| b.is_ascii_hexdigit() || b":.%".contains(b);
            if !address.iter().all(part) {
                return false;
            }
            (address, rest.get(1..).unwrap_or_default())
        }
        None => {
            let colon = authority.iter().position(|b| *b == b':');
            let (name, rest) = authority.split_at(colon.unwrap_or(authority.len()));
            if !name
                .iter()
                .all(|b| b.is_ascii_alphanumeric() || b".-_".contains(b))
            {
                return false;
            }
            (name, rest)
        }
    };
    let port_fits = match port.strip_prefix(b":") {
        None => port.is_empty(),
        Some(port) => std::str::from_utf8(port)
            .is_ok_and(|port| !port.starts_with('+') && port.parse::<u16>().is_ok()),
    };
    !host.is_empty() && port_fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations() {
        for (location, want) in [
            ("http://a.test/b?c#d", Some(("http", "a.test", "/b?c"))),
            ("https://a:8443", Some(("https", "a:8443", "/"))),
            ("http://a?b", Some(("http", "a", "/?b"))),
            ("http://u:p@a/", Some(("http", "a", "/"))),
            ("http://[::1]:80/x", Some(("http", "[::1]:80", "/x"))),
            ("ftp://a/b", Some(("ftp", "a", "/b"))),
            ("/b", None),
            ("//a/b", None),
            ("a.test/b", None),
            ("http:///b", None),
            ("http://a:/b", None),
            ("http://a:70000/b", None),
            ("http://a b/", None),
            ("http://a/b c", None),
            ("http://a/b\nc", None),
            ("http://[::1/x", None),
            ("", None),
        ] {
            let got = Target::parse(location.as_bytes());
            let want = want.map(|(scheme, authority, path): (&str, &str, &str)| Target {
                scheme: scheme.as_bytes(),
                authority: authority.as_bytes(),
                path: path.into(),
            });
            assert_eq!(got, want, "{location}");
        }
    }
}
