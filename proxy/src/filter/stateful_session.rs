//! Sends the requests of a session to the host that served its first one; which that is, the client keeps in
//! a cookie or header. Envoy: `envoy.filters.http.stateful_session`.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use lateen_protocols::envoy::envoy::extensions::{
    filters::http::stateful_session::v3::{
        StatefulSession as SessionProto, StatefulSessionPerRoute,
        stateful_session_per_route::Override,
    },
    http::stateful_session::{
        cookie::v3::CookieBasedSessionState, header::v3::HeaderBasedSessionState,
    },
};
use prost::Message;

use crate::{
    config_error::ConfigError,
    filter::{FilterContext, ResponseContext, RouteFilterConfig},
    head::{Known, Name, RequestHead, ResponseHead},
    info::{OverrideHost, ResponseFlags},
    proto::{invalid, optional_duration, unpack},
    route::matcher::cookie,
    stats::{Counter, Scope},
};

/// The filter of one connection manager.
#[derive(Debug)]
pub struct StatefulSession {
    sessions: Option<Arc<Sessions>>,
    stats: Option<Arc<Stats>>,
}

/// Where the client keeps its host, and how much that binds.
#[derive(Debug)]
pub struct Sessions {
    store: Store,
    strict: bool,
    not_found: u16,
}

#[derive(Debug)]
enum Store {
    Cookie {
        name: String,
        ttl: Duration,
        path: String,
        attributes: String,
    },
    Header(Name),
}

#[derive(Debug)]
struct Stats {
    routed: Counter,
    failed_open: Counter,
    failed_closed: Counter,
}

/// A request that is part of a session.
#[derive(Debug)]
pub(crate) struct Active {
    sessions: Arc<Sessions>,
    stats: Option<Arc<Stats>>,
    asked: Option<SocketAddr>,
}

/// What the cookie says. Envoy: `envoy.Cookie`.
#[derive(Clone, PartialEq, Message)]
struct Cookie {
    #[prost(string, tag = "1")]
    address: String,
    /// Seconds since 1970; 0 is never.
    #[prost(uint64, tag = "2")]
    expires: u64,
}

impl StatefulSession {
    /// Compiles the filter; counts in `http.PREFIX.stateful_session.` if it has a prefix of its own.
    ///
    /// # Errors
    /// See [`Sessions::compile`].
    pub fn compile(config: &SessionProto, scope: &Scope) -> Result<StatefulSession, ConfigError> {
        let prefix = &config.stat_prefix;
        Ok(StatefulSession {
            sessions: Sessions::compile(config)?,
            stats: (!prefix.is_empty()).then(|| {
                let counter =
                    |name: &str| scope.counter(&format!("stateful_session.{prefix}.{name}"));
                Arc::new(Stats {
                    routed: counter("routed"),
                    failed_open: counter("failed_open"),
                    failed_closed: counter("failed_closed"),
                })
            }),
        })
    }

    pub(super) fn on_request(&self, cx: &mut FilterContext<'_>, head: &RequestHead) {
        let (sessions, stats) = match cx.config(head) {
            Some(RouteFilterConfig::StatefulSession(own)) => (own.clone(), None),
            _ => match &self.sessions {
                Some(sessions) => (sessions.clone(), self.stats.clone()),
                None => return,
            },
        };
        if !sessions.store.covers(&head.path) {
            return;
        }
        let asked = sessions.store.host(head, SystemTime::now());
        if let Some(address) = asked {
            cx.info.borrow_mut().override_host = Some(Box::new(OverrideHost {
                address,
                strict: sessions.strict,
                not_found: sessions.not_found,
            }));
        }
        cx.state.stateful_session = Some(Box::new(Active {
            sessions,
            stats,
            asked,
        }));
    }
}

impl Sessions {
    /// Compiles where sessions are kept; `None` if nowhere is said.
    ///
    /// # Errors
    /// The state is of a kind that is not known, or not valid.
    fn compile(config: &SessionProto) -> Result<Option<Arc<Sessions>>, ConfigError> {
        let Some(state) = config.session_state.as_ref() else {
            return Ok(None);
        };
        let within = |error: ConfigError| error.within("session_state");
        let any = state
            .typed_config
            .as_ref()
            .ok_or_else(|| within(invalid("typed_config", "absent")))?;
        let store = if let Some(by_cookie) =
            unpack::<CookieBasedSessionState>(any).map_err(within)?
        {
            let cookie = by_cookie
                .cookie
                .ok_or_else(|| within(invalid("cookie", "absent")))?;
            if cookie.name.is_empty() {
                return Err(within(invalid("cookie.name", "empty")));
            }
            let mut attributes = String::new();
            for attribute in &cookie.attributes {
                attributes.push_str("; ");
                attributes.push_str(&attribute.name);
                if !attribute.value.is_empty() {
                    attributes.push('=');
                    attributes.push_str(&attribute.value);
                }
            }
            Store::Cookie {
                name: cookie.name,
                ttl: optional_duration("cookie.ttl", cookie.ttl.as_ref())
                    .map_err(within)?
                    .unwrap_or_default(),
                path: cookie.path,
                attributes,
            }
        } else if let Some(by_header) = unpack::<HeaderBasedSessionState>(any).map_err(within)? {
            if by_header.name.is_empty() {
                return Err(within(invalid("name", "empty")));
            }
            Store::Header(Name::new(by_header.name))
        } else {
            return Err(within(invalid(
                any.type_url.clone(),
                "this kind of session state is not supported",
            )));
        };
        Ok(Some(Arc::new(Sessions {
            store,
            strict: config.strict,
            not_found: match config.status_on_strict_destination_not_found {
                0 => 503,
                status => u16::try_from(status)
                    .ok()
                    .filter(|status| (200..600).contains(status))
                    .ok_or_else(|| {
                        invalid("status_on_strict_destination_not_found", "no HTTP status")
                    })?,
            },
        })))
    }

    /// Compiles a route's configuration.
    ///
    /// # Errors
    /// See [`Sessions::compile`].
    pub(super) fn compile_route(
        config: &StatefulSessionPerRoute,
    ) -> Result<RouteFilterConfig, ConfigError> {
        match config.r#override.as_ref() {
            Some(Override::Disabled(true)) => Ok(RouteFilterConfig::Disabled),
            Some(Override::Disabled(false)) => Err(invalid("disabled", "must be true")),
            Some(Override::StatefulSession(session)) => Ok(match Sessions::compile(session)? {
                Some(sessions) => RouteFilterConfig::StatefulSession(sessions),
                None => RouteFilterConfig::Disabled,
            }),
            None => Err(invalid("override", "absent")),
        }
    }
}

impl Store {
    /// Whether requests for this path are part of sessions.
    fn covers(&self, path: &[u8]) -> bool {
        match self {
            Store::Header(_) => true,
            Store::Cookie { path: root, .. } if root.is_empty() || root == "/" => true,
            Store::Cookie { path: root, .. } => match path.strip_prefix(root.as_bytes()) {
                None => false,
                Some(rest) => {
                    root.ends_with('/') || matches!(rest.first(), None | Some(b'/' | b'?' | b'#'))
                }
            },
        }
    }

    /// The host that the client came from.
    fn host(&self, head: &RequestHead, now: SystemTime) -> Option<SocketAddr> {
        match self {
            Store::Header(name) => {
                let value = STANDARD.decode(head.headers.get(name)?).ok()?;
                std::str::from_utf8(&value).ok()?.parse().ok()
            }
            Store::Cookie { name, .. } => {
                let value = STANDARD.decode(cookie(&head.headers, name)?).ok()?;
                match Cookie::decode(value.as_slice()) {
                    Ok(cookie) => {
                        let now = now.duration_since(UNIX_EPOCH).ok()?.as_secs();
                        let fresh = cookie.expires == 0 || now <= cookie.expires;
                        fresh.then(|| cookie.address.parse().ok())?
                    }
                    // As Envoy, which wrote the bare address once.
                    Err(_) => std::str::from_utf8(&value).ok()?.parse().ok(),
                }
            }
        }
    }

    /// Tells the client its host.
    fn tell(&self, host: SocketAddr, now: SystemTime, head: &mut ResponseHead) {
        match self {
            Store::Header(name) => {
                head.headers
                    .set(name.clone(), STANDARD.encode(host.to_string()));
            }
            Store::Cookie {
                name,
                ttl,
                path,
                attributes,
            } => {
                let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                let value = Cookie {
                    address: host.to_string(),
                    expires: if ttl.is_zero() {
                        0
                    } else {
                        seconds + ttl.as_secs()
                    },
                };
                let mut text = format!("{name}=\"{}\"", STANDARD.encode(value.encode_to_vec()));
                if !ttl.is_zero() {
                    text.push_str(&format!("; Max-Age={}", ttl.as_secs()));
                }
                if !path.is_empty() {
                    text.push_str("; Path=");
                    text.push_str(path);
                }
                text.push_str(attributes);
                text.push_str("; HttpOnly");
                head.headers.append(Known::SetCookie, text);
            }
        }
    }
}

impl Active {
    pub(super) fn on_response(&self, cx: &ResponseContext<'_>, head: &mut ResponseHead) {
        let (host, no_host) = {
            let info = cx.info.borrow();
            let no_host = info.flags.contains(ResponseFlags::NO_HEALTHY_UPSTREAM);
            (info.upstream_host, no_host)
        };
        if let Some((stats, asked)) = self.stats.as_ref().zip(self.asked) {
            match host {
                Some(host) if host == asked => stats.routed.inc(),
                Some(_) => stats.failed_open.inc(),
                None if no_host && self.sessions.strict => stats.failed_closed.inc(),
                None => {}
            }
        }
        if let Some(host) = host.filter(|host| self.asked != Some(*host)) {
            self.sessions.store.tell(host, SystemTime::now(), head);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::{Headers, Protocol};

    fn request(name: Known, value: &str) -> RequestHead {
        let mut headers = Headers::default();
        headers.append(name, value);
        RequestHead {
            method: "GET".into(),
            scheme: "http".into(),
            authority: "a".into(),
            path: "/".into(),
            protocol: Protocol::Http11,
            headers,
        }
    }

    fn cookie_store(path: &str) -> Store {
        Store::Cookie {
            name: "sticky".into(),
            ttl: Duration::from_secs(120),
            path: path.into(),
            attributes: "; SameSite=Lax".into(),
        }
    }

    #[test]
    fn what_a_client_is_told_leads_it_back_until_it_expires() {
        let host: SocketAddr = "10.1.2.3:80".parse().unwrap();
        let then = UNIX_EPOCH + Duration::from_secs(1000);
        let mut head = ResponseHead {
            status: 200,
            headers: Headers::default(),
        };
        cookie_store("/").tell(host, then, &mut head);
        let told = head.headers.known(Known::SetCookie).unwrap();
        let told = String::from_utf8(told.to_vec()).unwrap();
        let (pair, rest) = told.split_once("; ").unwrap();
        assert_eq!(rest, "Max-Age=120; Path=/; SameSite=Lax; HttpOnly");
        let back = request(Known::Cookie, &format!("other=1; {pair}"));
        let at = |seconds| cookie_store("/").host(&back, UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(1120), Some(host));
        assert_eq!(at(1121), None);
        // This one cannot be read as a message; as Envoy, others might be.
        let bare = STANDARD.encode("127.0.0.1:8080");
        let bare = request(Known::Cookie, &format!("sticky={bare}"));
        let host = "127.0.0.1:8080".parse().ok();
        assert_eq!(cookie_store("/").host(&bare, then), host);
        for broken in ["sticky=", "sticky=%%", "sticky=AAAA", "other=1"] {
            assert_eq!(
                cookie_store("/").host(&request(Known::Cookie, broken), then),
                None
            );
        }
    }

    #[test]
    fn a_header_holds_the_bare_address() {
        let host: SocketAddr = "[::1]:80".parse().unwrap();
        let store = Store::Header(Name::new("x-host"));
        let mut head = ResponseHead {
            status: 200,
            headers: Headers::default(),
        };
        store.tell(host, UNIX_EPOCH, &mut head);
        let mut back = request(Known::Accept, "");
        back.headers = head.headers;
        assert_eq!(store.host(&back, UNIX_EPOCH), Some(host));
    }

    #[test]
    fn a_cookie_covers_its_path() {
        for (root, path, covered) in [
            ("/", "/x", true),
            ("/a", "/a", true),
            ("/a", "/a/b", true),
            ("/a", "/a?q", true),
            ("/a", "/ab", false),
            ("/a/", "/a/b", true),
            ("/a/", "/a", false),
        ] {
            assert_eq!(
                cookie_store(root).covers(path.as_bytes()),
                covered,
                "{root} {path}"
            );
        }
    }
}
