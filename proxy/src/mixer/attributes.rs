//! Attributes of a request or connection as Mixer's vocabulary names them: a list sorted by the names'
//! dictionary indexes, so that nothing is hashed until a message has to be written.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use lateen_engine::dictionary::{GLOBAL_WORDS, global_index};
use lateen_protocols::istio::mixer::v1::{self as wire, attributes::attribute_value};

use super::encode::Words;

/// The name of an attribute: an index of the global dictionary, or beyond it one of [`EXTRA`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key(u32);

/// Names that configuration uses and the global dictionary lacks. They come from the control plane only,
/// never from a request.
static EXTRA: Mutex<Vec<Arc<str>>> = Mutex::new(Vec::new());

/// Most names beyond the dictionary; more of them are a mistake of the control plane.
const MAX_EXTRA: usize = 1024;

impl Key {
    /// The key of a name; `None` when too many names beyond the dictionary are in use.
    pub(crate) fn of(name: &str) -> Option<Key> {
        if let Some(index) = global_index(name) {
            return u32::try_from(index).ok().map(Key);
        }
        let mut extra = EXTRA.lock().unwrap_or_else(PoisonError::into_inner);
        let position = match extra.iter().position(|known| **known == *name) {
            Some(position) => position,
            None if extra.len() < MAX_EXTRA => {
                extra.push(name.into());
                extra.len() - 1
            }
            None => return None,
        };
        u32::try_from(GLOBAL_WORDS.len() + position).ok().map(Key)
    }

    /// The number of its name in a message.
    pub(super) fn number(self, words: &mut Words<'_>) -> i32 {
        match i32::try_from(self.0) {
            Ok(index) if (self.0 as usize) < GLOBAL_WORDS.len() => index,
            _ => {
                let extra = EXTRA.lock().unwrap_or_else(PoisonError::into_inner);
                let name = extra.get(self.0 as usize - GLOBAL_WORDS.len()).cloned();
                drop(extra);
                words.number(name.as_deref().unwrap_or_default().to_owned().into())
            }
        }
    }
}

macro_rules! keys {
    ($($name:ident = $text:literal),+ $(,)?) => {
        /// Keys of the attributes that a proxy sends.
        #[derive(Debug)]
        pub(crate) struct Keys { $(pub(crate) $name: Key),+ }

        /// Looked up once.
        pub(crate) static KEYS: std::sync::LazyLock<Keys> = std::sync::LazyLock::new(|| Keys {
            $($name: Key::of($text).expect("the first names fit")),+
        });
    };
}

keys! {
    check_cache_hit = "check.cache_hit",
    check_error_code = "check.error_code",
    check_error_message = "check.error_message",
    connection_duration = "connection.duration",
    connection_event = "connection.event",
    connection_id = "connection.id",
    connection_mtls = "connection.mtls",
    connection_received = "connection.received.bytes",
    connection_received_total = "connection.received.bytes_total",
    connection_sent = "connection.sent.bytes",
    connection_sent_total = "connection.sent.bytes_total",
    connection_sni = "connection.requested_server_name",
    context_protocol = "context.protocol",
    context_proxy_error_code = "context.proxy_error_code",
    context_time = "context.time",
    destination_ip = "destination.ip",
    destination_port = "destination.port",
    destination_principal = "destination.principal",
    origin_ip = "origin.ip",
    quota_cache_hit = "quota.cache_hit",
    request_headers = "request.headers",
    request_host = "request.host",
    request_id = "request.id",
    request_method = "request.method",
    request_path = "request.path",
    request_query_params = "request.query_params",
    request_referer = "request.referer",
    request_scheme = "request.scheme",
    request_size = "request.size",
    request_time = "request.time",
    request_total_size = "request.total_size",
    request_url_path = "request.url_path",
    request_useragent = "request.useragent",
    response_code = "response.code",
    response_duration = "response.duration",
    response_grpc_message = "response.grpc_message",
    response_grpc_status = "response.grpc_status",
    response_headers = "response.headers",
    response_size = "response.size",
    response_time = "response.time",
    response_total_size = "response.total_size",
    source_ip = "source.ip",
    source_port = "source.port",
    source_principal = "source.principal",
    source_user = "source.user",
}

/// A value; text may be any bytes until it is written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Text(Bytes),
    Int(i64),
    Double(f64),
    Bool(bool),
    Bytes(Bytes),
    Time(SystemTime),
    Span(Duration),
    Map(Arc<[(Bytes, Bytes)]>),
}

impl From<bool> for Value {
    fn from(value: bool) -> Value {
        Value::Bool(value)
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Value {
        Value::Int(value)
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Value {
        Value::Int(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl From<Bytes> for Value {
    fn from(value: Bytes) -> Value {
        Value::Text(value)
    }
}

impl From<&'static str> for Value {
    fn from(value: &'static str) -> Value {
        Value::Text(Bytes::from_static(value.as_bytes()))
    }
}

impl From<String> for Value {
    fn from(value: String) -> Value {
        Value::Text(Bytes::from(value))
    }
}

impl From<IpAddr> for Value {
    fn from(value: IpAddr) -> Value {
        Value::Bytes(match value {
            IpAddr::V4(ip) => Bytes::copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => Bytes::copy_from_slice(&ip.octets()),
        })
    }
}

impl From<SystemTime> for Value {
    fn from(value: SystemTime) -> Value {
        Value::Time(value)
    }
}

impl From<Duration> for Value {
    fn from(value: Duration) -> Value {
        Value::Span(value)
    }
}

/// A set of attributes, sorted by key.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Attributes {
    list: Vec<(Key, Value)>,
}

impl Attributes {
    pub(crate) fn get(&self, key: Key) -> Option<&Value> {
        let index = self.list.binary_search_by_key(&key, |(k, _)| *k).ok()?;
        self.list.get(index).map(|(_, value)| value)
    }

    pub(crate) fn set(&mut self, key: Key, value: impl Into<Value>) {
        match self.list.binary_search_by_key(&key, |(k, _)| *k) {
            Ok(index) => self.list[index].1 = value.into(),
            Err(index) => self.list.insert(index, (key, value.into())),
        }
    }

    pub(crate) fn set_some(&mut self, key: Key, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.set(key, value);
        }
    }

    /// Puts another set over this one.
    pub(crate) fn overlay(&mut self, other: &Attributes) {
        for (key, value) in &other.list {
            self.set(*key, value.clone());
        }
    }

    /// Address and port under two keys.
    pub(crate) fn set_address(&mut self, ip: Key, port: Key, address: SocketAddr) {
        self.set(ip, address.ip());
        self.set(port, i64::from(address.port()));
    }

    /// Reads what configuration or another proxy says in clear. Names beyond the dictionary are kept
    /// when `trusted` and skipped otherwise.
    pub(crate) fn from_plain(plain: &wire::Attributes, trusted: bool) -> Attributes {
        use attribute_value::Value as Plain;
        let mut all = Attributes::default();
        for (name, value) in &plain.attributes {
            if !trusted && global_index(name).is_none() {
                continue;
            }
            let (Some(key), Some(value)) = (Key::of(name), &value.value) else {
                continue;
            };
            all.set(
                key,
                match value {
                    Plain::StringValue(text) => Value::Text(Bytes::from(text.clone())),
                    Plain::Int64Value(n) => Value::Int(*n),
                    Plain::DoubleValue(n) => Value::Double(*n),
                    Plain::BoolValue(b) => Value::Bool(*b),
                    Plain::BytesValue(bytes) => Value::Bytes(Bytes::from(bytes.clone())),
                    Plain::TimestampValue(time) => Value::Time(
                        UNIX_EPOCH
                            + Duration::new(
                                u64::try_from(time.seconds).unwrap_or(0),
                                u32::try_from(time.nanos.clamp(0, 999_999_999)).unwrap_or(0),
                            ),
                    ),
                    Plain::DurationValue(span) => Value::Span(Duration::new(
                        u64::try_from(span.seconds).unwrap_or(0),
                        u32::try_from(span.nanos.clamp(0, 999_999_999)).unwrap_or(0),
                    )),
                    Plain::StringMapValue(map) => Value::Map(
                        map.entries
                            .iter()
                            .map(|(k, v)| (Bytes::from(k.clone()), Bytes::from(v.clone())))
                            .collect(),
                    ),
                },
            );
        }
        all
    }

    /// Keeps only attributes whose key is in `keys`.
    pub(crate) fn retain(&mut self, keys: &[Key]) {
        self.list.retain(|(key, _)| keys.contains(key));
    }

    /// All of them, by key.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Key, &Value)> {
        self.list.iter().map(|(key, value)| (*key, value))
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::{super::encode, *};

    #[test]
    fn what_is_written_is_read_back_by_the_engine() {
        let mut all = Attributes::default();
        all.set(KEYS.request_path, "/a");
        all.set(KEYS.response_code, 200_i64);
        all.set(KEYS.connection_mtls, true);
        all.set(KEYS.source_ip, IpAddr::from([127, 0, 0, 1]));
        let entries = [(Bytes::from("x-user"), Bytes::from("john"))];
        all.set(KEYS.request_headers, Value::Map(entries.into()));
        let (mut words, mut out) = (Words::default(), Vec::new());
        encode::attributes(&all, &mut words, &mut out);
        words.write(&mut out, 1);
        let message = wire::CompressedAttributes::decode(out.as_slice()).unwrap();
        let table = lateen_engine::AttributeTable::default_vocabulary();
        let count = u32::try_from(GLOBAL_WORDS.len()).unwrap();
        let bag = lateen_engine::wire::decode(
            &message,
            count,
            &table,
            &lateen_engine::wire::Limits::default(),
        )
        .unwrap();
        assert_eq!(bag.ignored(), 0);
        let text = |name: &str| {
            bag.get_by_name(name)
                .and_then(|v| v.as_str().map(str::to_owned))
        };
        assert_eq!(text("request.path").as_deref(), Some("/a"));
        assert!(format!("{:?}", bag.get_by_name("request.headers")).contains("john"));
    }

    #[test]
    fn the_later_value_wins_and_order_does_not_matter() {
        let mut all = Attributes::default();
        all.set(KEYS.source_user, "a");
        all.set(KEYS.request_path, "/");
        all.set(KEYS.source_user, "b");
        assert_eq!(all.get(KEYS.source_user), Some(&Value::from("b")));
        assert_eq!(all.get(KEYS.request_host), None);
    }
}
