//! Header names that are small integers, and sets of them.

use crate::swar::ONES;

macro_rules! well_known {
    ($($variant:ident = $text:literal),+ $(,)?) => {
        /// Header names that are compared as integers.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        #[allow(missing_docs, reason = "each is the name it spells")]
        pub enum Known { $($variant),+ }

        impl Known {
            pub(crate) const ALL: &[Known] = &[$(Known::$variant),+];
        }

        static TEXTS: [&str; Known::ALL.len()] = [$($text),+];
        static LINES: [&str; Known::ALL.len()] = [$(concat!($text, ": ")),+];
        // A set of names is a number.
        const _: () = assert!(Known::ALL.len() <= 64);
    };
}

well_known! {
    Accept = "accept",
    AcceptEncoding = "accept-encoding",
    Authorization = "authorization",
    B3 = "b3",
    ContentLength = "content-length",
    ContentType = "content-type",
    Connection = "connection",
    Cookie = "cookie",
    Date = "date",
    Expect = "expect",
    Forwarded = "forwarded",
    GrpcMessage = "grpc-message",
    GrpcStatus = "grpc-status",
    GrpcTimeout = "grpc-timeout",
    Host = "host",
    KeepAlive = "keep-alive",
    Location = "location",
    Origin = "origin",
    ProxyConnection = "proxy-connection",
    Referer = "referer",
    Server = "server",
    SetCookie = "set-cookie",
    Te = "te",
    Trailer = "trailer",
    TransferEncoding = "transfer-encoding",
    Upgrade = "upgrade",
    UserAgent = "user-agent",
    Via = "via",
    XB3Flags = "x-b3-flags",
    XB3Sampled = "x-b3-sampled",
    XB3SpanId = "x-b3-spanid",
    XB3TraceId = "x-b3-traceid",
    XB3ParentSpanId = "x-b3-parentspanid",
    TraceParent = "traceparent",
    TraceState = "tracestate",
    XClientTraceId = "x-client-trace-id",
    XEnvoyAttemptCount = "x-envoy-attempt-count",
    XEnvoyDecoratorOperation = "x-envoy-decorator-operation",
    XEnvoyExpectedRqTimeoutMs = "x-envoy-expected-rq-timeout-ms",
    XEnvoyForceTrace = "x-envoy-force-trace",
    XEnvoyInternal = "x-envoy-internal",
    XEnvoyMaxRetries = "x-envoy-max-retries",
    XEnvoyOverloaded = "x-envoy-overloaded",
    XEnvoyRatelimited = "x-envoy-ratelimited",
    XEnvoyRetriableHeaderNames = "x-envoy-retriable-header-names",
    XEnvoyRetriableStatusCodes = "x-envoy-retriable-status-codes",
    XEnvoyRetryGrpcOn = "x-envoy-retry-grpc-on",
    XEnvoyRetryOn = "x-envoy-retry-on",
    XEnvoyUpstreamRqPerTryTimeoutMs = "x-envoy-upstream-rq-per-try-timeout-ms",
    XEnvoyUpstreamRqTimeoutMs = "x-envoy-upstream-rq-timeout-ms",
    XEnvoyUpstreamServiceTime = "x-envoy-upstream-service-time",
    XEnvoyOriginalPath = "x-envoy-original-path",
    XForwardedClientCert = "x-forwarded-client-cert",
    XForwardedFor = "x-forwarded-for",
    XForwardedHost = "x-forwarded-host",
    XForwardedProto = "x-forwarded-proto",
    XIstioAttributes = "x-istio-attributes",
    XRequestId = "x-request-id",
}

impl Known {
    /// The name in lower case.
    #[inline]
    pub const fn as_str(self) -> &'static str {
        TEXTS[self as usize]
    }

    /// The name and what follows it in a line of HTTP/1.
    #[inline]
    pub(super) fn begins_line(self) -> &'static [u8] {
        LINES[self as usize].as_bytes()
    }

    /// Bytes of the longest name.
    pub(super) const LONGEST: usize = {
        let (mut longest, mut index) = (0, 0);
        while index < TEXTS.len() {
            if TEXTS[index].len() > longest {
                longest = TEXTS[index].len();
            }
            index += 1;
        }
        longest
    };

    /// The name that `name`, in lower case, spells.
    #[inline]
    pub(crate) fn lookup(name: &[u8]) -> Option<Known> {
        Known::search(name, 0)
    }

    /// The name that `name`, a token of any case, spells.
    ///
    /// Bytes are compared after bit 5 was set in those of `name`. Of the bytes of a token (RFC 9110 §5.6.2) this
    /// makes a letter, a digit or `-`, which is all that our names have, only of themselves and of the same
    /// letter in the other case: what else has bit 5 clear and becomes a letter is `@` and `[` to `_`, of which
    /// tokens have `^` and `_`, and they become `~` and DEL; what becomes a digit or `-` is a control character.
    #[inline]
    pub(crate) fn lookup_token(name: &[u8]) -> Option<Known> {
        Known::search(name, BIT_5)
    }

    #[inline]
    fn search(name: &[u8], or: u64) -> Option<Known> {
        let key = key(name) | or;
        let mut at = slot(key, name.len());
        loop {
            let index = usize::from(SLOTS[at]);
            let known = *Known::ALL.get(index)?;
            if KEYS[index] == key && same_bytes(known.as_str().as_bytes(), name, or) {
                return Some(known);
            }
            at = (at + 1) % SLOTS.len();
        }
    }

    const fn slots() -> [u8; 256] {
        let mut slots = [u8::MAX; 256];
        let mut index = 0;
        while index < Known::ALL.len() {
            let mut at = slot(KEYS[index], TEXTS[index].len());
            while slots[at] != u8::MAX {
                at = (at + 1) % slots.len();
            }
            slots[at] = Known::ALL[index] as u8;
            index += 1;
        }
        slots
    }
}

/// Bit 5 of every byte: upper case to lower case.
const BIT_5: u64 = 0x20 * ONES;

/// Well-known names by [`slot`], open addressing; 255 is free.
static SLOTS: [u8; 256] = Known::slots();

/// [`key`] of each name.
static KEYS: [u64; Known::ALL.len()] = {
    let mut keys = [0; Known::ALL.len()];
    let mut index = 0;
    while index < keys.len() {
        keys[index] = key(TEXTS[index].as_bytes());
        index += 1;
    }
    keys
};

/// The last eight bytes of a name, or all there are of a shorter one, some of them twice.
#[inline]
const fn key(name: &[u8]) -> u64 {
    if let Some(last) = name.last_chunk::<8>() {
        return u64::from_le_bytes(*last);
    }
    if let (Some(first), Some(last)) = (name.first_chunk::<4>(), name.last_chunk::<4>()) {
        let (first, last) = (u32::from_le_bytes(*first), u32::from_le_bytes(*last));
        return ((first as u64) << 32) | last as u64;
    }
    // Bit 5 is set in all bytes of the names, and so where there are none.
    u64::from_le_bytes(match *name {
        [a, b, c] => [a, b, c, b' ', b' ', b' ', b' ', b' '],
        [a, b] => [a, b, b' ', b' ', b' ', b' ', b' ', b' '],
        [a] => [a, b' ', b' ', b' ', b' ', b' ', b' ', b' '],
        _ => [b' '; 8],
    })
}

/// Where a name of this key and length is looked for first.
#[inline]
const fn slot(key: u64, len: usize) -> usize {
    ((key | BIT_5).wrapping_add(len as u64).wrapping_mul(SPREAD) >> 56) as usize
}

/// An odd number under which few names fall together.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// Whether `text` is `other` with the bits of `or` set in each byte; their keys say so.
#[inline]
fn same_bytes(text: &[u8], other: &[u8], or: u64) -> bool {
    let word = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
    // The key has what is behind the last whole word, and all of a short name.
    let (words, _) = text.as_chunks::<8>();
    let (others, _) = other.as_chunks::<8>();
    text.len() == other.len()
        && words
            .iter()
            .zip(others)
            .all(|(text, other)| word(text) == word(other) | or)
}

/// A set of well-known names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KnownSet(u64);

impl KnownSet {
    /// These names.
    pub const fn of(names: &[Known]) -> KnownSet {
        let mut bits = 0;
        let mut index = 0;
        while index < names.len() {
            bits |= 1 << names[index] as u8;
            index += 1;
        }
        KnownSet(bits)
    }

    /// Those that begin so.
    pub const fn beginning_with(prefix: &str) -> KnownSet {
        let prefix = prefix.as_bytes();
        let mut bits = 0;
        let mut index = 0;
        while index < Known::ALL.len() {
            let known = Known::ALL[index];
            if let Some((begin, _)) = known.as_str().as_bytes().split_at_checked(prefix.len())
                && same(begin, prefix)
            {
                bits |= 1 << known as u8;
            }
            index += 1;
        }
        KnownSet(bits)
    }

    /// Whether the name is in it.
    #[inline]
    pub const fn contains(self, name: Known) -> bool {
        self.0 & (1 << name as u8) != 0
    }

    /// The names in both.
    #[inline]
    pub const fn and(self, other: KnownSet) -> KnownSet {
        KnownSet(self.0 & other.0)
    }

    /// The names that are not in `other`.
    #[inline]
    pub(super) const fn without(self, other: KnownSet) -> KnownSet {
        KnownSet(self.0 & !other.0)
    }

    /// Whether no name is in it.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    #[inline]
    pub(super) fn insert(&mut self, name: Known) {
        self.0 |= 1 << name as u8;
    }
}

const fn same(one: &[u8], other: &[u8]) -> bool {
    let mut index = 0;
    while index < one.len() && index < other.len() && one[index] == other[index] {
        index += 1;
    }
    index == one.len() && index == other.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_spell_a_name_in_any_case_and_nothing_else_does() {
        for known in Known::ALL {
            let text = known.as_str();
            assert!(
                text.bytes()
                    .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-')),
                "{text}"
            );
            assert_eq!(Known::lookup(text.as_bytes()), Some(*known));
            assert_eq!(
                Known::lookup_token(text.to_ascii_uppercase().as_bytes()),
                Some(*known)
            );
            for at in 0..text.len() {
                for byte in 0..=u8::MAX {
                    let token = byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
                    let mut other = text.as_bytes().to_vec();
                    other[at] = byte;
                    let is = Known::ALL
                        .iter()
                        .find(|known| known.as_str().as_bytes() == other.to_ascii_lowercase());
                    if token {
                        assert_eq!(Known::lookup_token(&other), is.copied(), "{other:?}");
                    }
                    let is = is.filter(|_| !byte.is_ascii_uppercase());
                    assert_eq!(Known::lookup(&other), is.copied(), "{other:?}");
                }
            }
        }
        assert_eq!(Known::lookup(b""), None);
    }
}
