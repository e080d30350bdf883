//! What the service decided, in the terms of a proxy.

use bytes::Bytes;

use crate::{
    head::{Headers, Known, Name, RequestHead},
    info::ResponseFlags,
    reject::Reject,
};

/// The outcome of a question.
#[derive(Debug)]
pub(super) enum Decision {
    Allowed(Allowed),
    Denied(Refusal),
    /// The service could not be asked, or says that it failed and with what to answer.
    Error(Option<Refusal>),
}

/// What happens to a request that goes on.
#[derive(Debug, Default)]
pub(super) struct Allowed {
    pub(super) request: Vec<Change>,
    pub(super) remove: Vec<String>,
    pub(super) query_set: Vec<(String, String)>,
    pub(super) query_remove: Vec<String>,
    pub(super) response: Vec<Change>,
}

/// The answer in the upstream's place.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) headers: Vec<Change>,
    pub(super) body: String,
}

/// A header to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) name: String,
    pub(super) value: Bytes,
    pub(super) how: How,
}

/// How a header is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// Added beside those there are.
    Add,
    /// Joined to the one there is; nothing if there is none.
    AppendIfExists,
    AddIfAbsent,
    Set,
    SetIfExists,
}

impl Change {
    fn is_valid(&self) -> bool {
        let name = self.name.strip_prefix(':').unwrap_or(&self.name);
        let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        !name.is_empty()
            && name.bytes().all(token)
            && !self.value.iter().any(|b| matches!(b, b'\r' | b'\n' | 0))
    }

    /// Changes a list of headers. What could not stand in one is left out: the next hop must see the
    /// headers that were meant, no others.
    pub(super) fn apply(&self, headers: &mut Headers) {
        if !self.is_valid() || self.name.starts_with(':') {
            tracing::debug!(name = %self.name, "the authorization service sent a header that cannot be");
            return;
        }
        let name = Name::new(&self.name);
        match self.how {
            How::Add => headers.append(name, &self.value),
            How::Set => headers.set(name, &self.value),
            How::AddIfAbsent => {
                if headers.get(&name).is_none() {
                    headers.append(name, &self.value);
                }
            }
            How::SetIfExists => {
                if headers.get(&name).is_some() {
                    headers.set(name, &self.value);
                }
            }
            How::AppendIfExists => {
                if let Some(before) = headers.get(&name) {
                    let joined = [before, b",", &self.value].concat();
                    headers.set(name, joined);
                }
            }
        }
    }
}

impl Allowed {
    pub(super) fn is_valid(&self) -> bool {
        self.request
            .iter()
            .chain(&self.response)
            .all(Change::is_valid)
    }

    /// Changes the request; whether there was anything to change.
    pub(super) fn apply(&self, head: &mut RequestHead) -> bool {
        for change in &self.request {
            let field = match change.name.to_ascii_lowercase().as_str() {
                ":path" => &mut head.path,
                ":authority" | "host" => &mut head.authority,
                ":method" => &mut head.method,
                ":scheme" => &mut head.scheme,
                _ => {
                    change.apply(&mut head.headers);
                    continue;
                }
            };
            let visible = change.value.iter().all(|b| (0x21..0x7f).contains(b));
            if change.how != How::AddIfAbsent && visible && !change.value.is_empty() {
                field.clone_from(&change.value);
            }
        }
        for name in &self.remove {
            // Neither a pseudo header nor `host` may go.
            if !name.starts_with(':') && !name.eq_ignore_ascii_case("host") {
                head.headers.remove(&Name::new(name));
            }
        }
        if !self.query_set.is_empty() || !self.query_remove.is_empty() {
            self.rewrite_query(head);
        }
        let Allowed {
            request,
            remove,
            query_set,
            query_remove,
            response: _,
        } = self;
        !(request.is_empty()
            && remove.is_empty()
            && query_set.is_empty()
            && query_remove.is_empty())
    }

    /// Parameters are sorted by name, as Envoy writes them.
    fn rewrite_query(&self, head: &mut RequestHead) {
        let query = head.query().unwrap_or_default();
        let pairs = query.split(|b| *b == b'&').filter(|pair| !pair.is_empty());
        let mut all: Vec<(&[u8], &[u8])> = pairs
            .map(|pair| match pair.iter().position(|b| *b == b'=') {
                Some(at) => (&pair[..at], &pair[at + 1..]),
                None => (pair, &b""[..]),
            })
            .collect();
        let visible = |text: &str| text.bytes().all(|b| (0x21..0x7f).contains(&b) && b != b'#');
        all.retain(|(key, _)| {
            let gone = |name: &str| name.as_bytes() == *key;
            !self.query_remove.iter().any(|name| gone(name))
                && !self.query_set.iter().any(|(name, _)| gone(name))
        });
        for (key, value) in &self.query_set {
            if visible(key) && visible(value) {
                all.push((key.as_bytes(), value.as_bytes()));
            }
        }
        all.sort_by(|a, b| a.0.cmp(b.0));
        let mut path = head.path_only().to_vec();
        for (index, (key, value)) in all.iter().enumerate() {
            path.push(if index == 0 { b'?' } else { b'&' });
            path.extend_from_slice(key);
            path.push(b'=');
            path.extend_from_slice(value);
        }
        head.path = path.into();
    }
}

impl Refusal {
    pub(super) fn is_valid(&self) -> bool {
        self.headers.iter().all(Change::is_valid)
    }

    /// The reply, with a body of at most `limit` bytes.
    pub(super) fn into_reject(mut self, details: &'static str, limit: usize) -> Reject {
        if self.body.len() > limit {
            self.body.truncate(self.body.floor_char_boundary(limit));
        }
        let mut reject = Reject::new(
            self.status,
            self.body,
            ResponseFlags::UNAUTHORIZED_EXTERNAL_SERVICE,
            details,
        );
        for change in &self.headers {
            change.apply(&mut reject.headers);
        }
        // How the reply is framed is our own affair.
        for name in [
            Known::ContentLength,
            Known::TransferEncoding,
            Known::Connection,
            Known::KeepAlive,
            Known::Upgrade,
        ] {
            reject.headers.remove_known(name);
        }
        reject
    }
}
