//! Conditions in CEL on one stream: of access logs (`envoy.access_loggers.extension_filters.cel`) and of RBAC
//! policies. Names and types are those of Envoy's attributes (its documentation: "Attributes").
//!
//! An attribute that a stream lacks is an error to the expression that reads it, `has()` aside, and an
//! expression that ends in an error, or in something other than a truth value, does not hold.

use std::{
    cell::OnceCell,
    collections::HashMap,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use cel::{Context, Env, Program, Value, objects::Map};
use lateen_protocols::envoy::{google::api::expr::v1alpha1::Expr, google::protobuf as pb};

use crate::{
    config_error::ConfigError,
    format::Facts,
    head::{Headers, Known, RequestHead, ResponseHead},
    info::{StreamInfo, TlsInfo},
    proto::invalid,
};

mod text;

/// Longest text of an expression, in bytes; Envoy's own parser stops far earlier.
const MAX_TEXT: usize = 64 * 1024;

/// A compiled condition.
pub(crate) struct Condition {
    program: Program,
    /// The attributes' roots it speaks of.
    roots: Vec<Root>,
}

/// The first names of attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Root {
    Request,
    Response,
    Source,
    Destination,
    Connection,
    Upstream,
    Metadata,
    Xds,
}

const ROOTS: [(&str, Root); 8] = [
    ("request", Root::Request),
    ("response", Root::Response),
    ("source", Root::Source),
    ("destination", Root::Destination),
    ("connection", Root::Connection),
    ("upstream", Root::Upstream),
    ("metadata", Root::Metadata),
    ("xds", Root::Xds),
];

impl std::fmt::Debug for Condition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Condition")
            .field("roots", &self.roots)
            .finish_non_exhaustive()
    }
}

impl Condition {
    /// Compiles the text of an expression.
    ///
    /// # Errors
    /// When it is not CEL, or too long, with the place.
    pub(crate) fn parse(text: &str) -> Result<Condition, ConfigError> {
        if text.len() > MAX_TEXT {
            return Err(invalid(
                "expression",
                format!("longer than {MAX_TEXT} bytes"),
            ));
        }
        let program =
            Program::compile(text).map_err(|error| invalid("expression", error.to_string()))?;
        let references = program.references();
        let roots = ROOTS
            .into_iter()
            .filter(|(name, _)| references.has_variable(name))
            .map(|(_, root)| root)
            .collect();
        Ok(Condition { program, roots })
    }

    /// Compiles an expression that was parsed already.
    ///
    /// # Errors
    /// When it has a part that text could not have, or a macro's expansion; or speaks of something that no stream has,
    /// by which a rule to deny would never deny.
    pub(crate) fn of_tree(tree: &Expr) -> Result<Condition, ConfigError> {
        let condition = Condition::parse(&text::of(tree)?)?;
        let references = condition.program.references();
        // Without macros every variable is an attribute's.
        let unknown = references
            .variables()
            .into_iter()
            .find(|name| ROOTS.iter().all(|(root, _)| root != name));
        if let Some(name) = unknown {
            let roots = ROOTS.map(|(root, _)| root).join(", ");
            let reason = format!("{name} is not known; attributes begin with {roots}");
            return Err(invalid("expr", reason));
        }
        drop(references);
        Ok(condition)
    }

    /// Whether it holds for a stream.
    pub(crate) fn holds(&self, facts: &Facts<'_>) -> bool {
        thread_local! {
            static STANDARD: OnceCell<Arc<Env>> = const { OnceCell::new() };
        }
        let standard = STANDARD.with(|cell| cell.get_or_init(|| Arc::new(Env::stdlib())).clone());
        let mut context = Context::with_env(standard);
        for root in &self.roots {
            if let Some((name, _)) = ROOTS.iter().find(|(_, of)| of == root)
                && let Some(value) = root.value(facts)
            {
                context.add_variable_from_value(*name, value);
            }
        }
        matches!(self.program.execute(&context), Ok(Value::Bool(true)))
    }
}

impl Root {
    /// The attributes under a name; `None` when the stream has none of them.
    fn value(self, facts: &Facts<'_>) -> Option<Value> {
        let info = facts.info;
        let mut fields = Fields::default();
        match self {
            Root::Request => fields.request(facts.request?, info),
            Root::Response => fields.response(facts.response, facts),
            Root::Source => fields.address(info.downstream_remote),
            Root::Destination => fields.address(info.connection.local),
            Root::Connection => {
                let connection = &info.connection;
                let mutual = connection.tls.as_ref().is_some_and(|tls| tls.is_mutual());
                fields.add("mtls", mutual);
                fields.number("id", connection.id);
                if let Some(name) = &connection.requested_server_name {
                    fields.add("requested_server_name", &**name);
                }
                if let Some(tls) = &connection.tls {
                    fields.tls(tls);
                }
            }
            Root::Upstream => {
                fields.address(info.upstream_host?);
                if let Some(local) = info.upstream_local {
                    fields.add("local_address", local.to_string());
                }
                if let Some(reason) = &info.upstream_transport_failure {
                    fields.add("transport_failure_reason", reason.as_str());
                }
                fields.number("request_attempt_count", info.upstream_attempts.into());
                if let Some(tls) = &info.upstream_tls {
                    fields.tls(tls);
                }
            }
            Root::Metadata => fields.add("filter_metadata", of_metadata(info.metadata.as_deref())),
            Root::Xds => {
                let names = [
                    ("route_name", &info.route_name),
                    ("virtual_host_name", &info.virtual_host),
                    ("cluster_name", &info.upstream_cluster),
                    ("filter_chain_name", &info.connection.filter_chain),
                ];
                for (name, value) in names {
                    if let Some(value) = value {
                        fields.add(name, &**value);
                    }
                }
                if let Some(route) = facts.route {
                    let metadata = of_metadata(Some(&route.route().metadata));
                    fields.add("route_metadata", one("filter_metadata", metadata));
                }
            }
        }
        Some(fields.0.into())
    }
}

/// What a root has.
#[derive(Debug, Default)]
struct Fields(HashMap<String, Value>);

impl Fields {
    fn add(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.to_owned(), value.into());
    }

    fn number(&mut self, name: &str, value: u64) {
        self.add(name, i64::try_from(value).unwrap_or(i64::MAX));
    }

    fn bytes(&mut self, name: &str, value: Option<&[u8]>) {
        if let Some(value) = value {
            self.add(name, &*String::from_utf8_lossy(value));
        }
    }

    fn duration(&mut self, name: &str, value: Option<Duration>) {
        if let Some(value) = value.and_then(|value| chrono::Duration::from_std(value).ok()) {
            self.0.insert(name.to_owned(), Value::Duration(value));
        }
    }

    fn address(&mut self, address: std::net::SocketAddr) {
        self.add("address", address.to_string());
        self.number("port", address.port().into());
    }

    fn request(&mut self, head: &RequestHead, info: &StreamInfo) {
        self.bytes("path", Some(&head.path));
        self.bytes("url_path", Some(head.path_only()));
        self.bytes("query", Some(head.query().unwrap_or_default()));
        self.bytes("host", Some(&head.authority));
        self.bytes("scheme", Some(&head.scheme));
        self.bytes("method", Some(&head.method));
        self.bytes(
            "referer",
            head.headers.get(&crate::head::Name::new("referer")),
        );
        self.bytes("useragent", head.headers.known(Known::UserAgent));
        self.bytes("id", head.headers.known(Known::XRequestId));
        let protocol = info.protocol.unwrap_or(head.protocol);
        self.add("protocol", protocol.as_str());
        self.number("size", info.bytes_received);
        self.number(
            "total_size",
            info.bytes_received + super::format::request_bytes(head),
        );
        self.duration("duration", info.response_end);
        if let Ok(since) = info.start_time.duration_since(UNIX_EPOCH)
            && let Some(time) = chrono::DateTime::from_timestamp(
                i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
                since.subsec_nanos(),
            )
        {
            self.0
                .insert("time".to_owned(), Value::Timestamp(time.fixed_offset()));
        }
        let pseudo = [
            (":path", &head.path),
            (":authority", &head.authority),
            (":method", &head.method),
            (":scheme", &head.scheme),
        ];
        let mut headers = of_headers(&head.headers);
        for (name, value) in pseudo {
            headers.add(name, &*String::from_utf8_lossy(value));
        }
        self.add("headers", headers.0);
    }

    fn response(&mut self, head: Option<&ResponseHead>, facts: &Facts<'_>) {
        let info = facts.info;
        if info.response_code > 0 {
            self.number("code", info.response_code.into());
        }
        if !info.response_code_details.is_empty() {
            self.add("code_details", &*info.response_code_details);
        }
        self.number("flags", info.flags.bits().into());
        if let Some(status) = super::format::grpc_status_of(facts) {
            self.add("grpc_status", i64::from(status));
        }
        self.number("size", info.bytes_sent);
        let heads = head.map_or(0, super::format::response_bytes)
            + facts.trailers.map_or(0, super::format::headers_bytes);
        self.number("total_size", info.bytes_sent + heads);
        self.duration("backend_latency", info.upstream_first_byte);
        if let Some(head) = head {
            self.add("headers", of_headers(&head.headers).0);
        }
        if let Some(trailers) = facts.trailers {
            self.add("trailers", of_headers(trailers).0);
        }
    }

    fn tls(&mut self, tls: &TlsInfo) {
        self.add("tls_version", tls.version);
        let texts = [
            ("subject_peer_certificate", &tls.peer_subject),
            ("subject_local_certificate", &tls.local_subject),
            ("uri_san_peer_certificate", &tls.peer_uri_san),
            ("uri_san_local_certificate", &tls.local_uri_san),
            ("sha256_peer_certificate_digest", &tls.peer_fingerprint),
        ];
        for (name, value) in texts {
            if let Some(value) = value {
                self.add(name, &**value);
            }
        }
        if let Some(name) = tls.peer_dns_sans.first() {
            self.add("dns_san_peer_certificate", &**name);
        }
    }
}

/// Headers by their names, values of the same name joined by commas.
fn of_headers(headers: &Headers) -> Fields {
    let mut all: HashMap<String, String> = HashMap::with_capacity(headers.len());
    for (name, value) in headers.iter() {
        let name = String::from_utf8_lossy(name.as_bytes()).into_owned();
        let value = String::from_utf8_lossy(value);
        all.entry(name)
            .and_modify(|present| {
                present.push(',');
                present.push_str(&value);
            })
            .or_insert_with(|| value.into_owned());
    }
    let values = all.into_iter().map(|(name, value)| (name, value.into()));
    Fields(values.collect())
}

fn one(name: &str, value: Value) -> Value {
    HashMap::from([(name.to_owned(), value)]).into()
}

fn of_metadata(all: Option<&HashMap<String, pb::Struct>>) -> Value {
    let fields = all.into_iter().flatten();
    let fields = fields.map(|(name, fields)| (name.clone(), of_struct(fields)));
    fields.collect::<HashMap<String, Value>>().into()
}

fn of_struct(fields: &pb::Struct) -> Value {
    let fields = fields.fields.iter();
    let map: HashMap<_, _> = fields
        .map(|(name, value)| (name.as_str().into(), of_value(value)))
        .collect();
    Value::Map(Map { map: Arc::new(map) })
}

fn of_value(value: &pb::Value) -> Value {
    use pb::value::Kind;
    match &value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::NumberValue(number)) => Value::Float(*number),
        Some(Kind::StringValue(text)) => text.as_str().into(),
        Some(Kind::BoolValue(value)) => Value::Bool(*value),
        Some(Kind::StructValue(fields)) => of_struct(fields),
        Some(Kind::ListValue(list)) => {
            Value::List(Arc::new(list.values.iter().map(of_value).collect()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::tests::{connection, request};

    fn holds(text: &str) -> bool {
        let mut info = StreamInfo::new(connection(), None);
        info.response_code = 503;
        let fields = pb::Struct {
            fields: HashMap::from([(
                "n".to_owned(),
                pb::Value {
                    kind: Some(pb::value::Kind::NumberValue(2.0)),
                },
            )]),
        };
        info.add_metadata("com.test", fields);
        let mut head = request();
        head.path = "/a/b?c=d".into();
        head.headers.append(crate::head::Name::new("x-two"), "1");
        head.headers.append(crate::head::Name::new("x-two"), "2");
        Condition::parse(text).unwrap().holds(&Facts {
            request: Some(&head),
            ..Facts::of_connection(&info)
        })
    }

    #[test]
    fn attributes_have_their_types() {
        for text in [
            "request.url_path == '/a/b' && request.query == 'c=d'",
            "request.headers['x-two'] == '1,2'",
            "request.headers[':path'].startsWith('/a')",
            "response.code >= 500 && response.code < 600",
            "metadata.filter_metadata['com.test']['n'] == 2.0",
            "request.time > timestamp('2020-01-01T00:00:00Z')",
            "source.port != 0 && source.address.contains(':')",
            "!connection.mtls",
            "request.path.matches('^/[a-z]/')",
            "['x', 'x-two'].exists(h, h in request.headers)",
        ] {
            assert!(holds(text), "{text}");
        }
    }

    #[test]
    fn what_a_stream_lacks_decides_nothing() {
        assert!(!holds("request.headers['x-none'] == 'a'"));
        assert!(!holds("request.headers['x-none'] != 'a'"));
        assert!(holds(
            "request.headers['x-none'] == 'a' || response.code == 503"
        ));
        assert!(!holds("has(request.nothing)"));
        assert!(!holds("upstream.port == 1"));
        assert!(!holds("unknown.name == 1"));
        assert!(!holds("'text'"));
    }

    #[test]
    fn a_tree_that_speaks_of_nothing_known_is_refused() {
        let tree = |name: &str| {
            let yaml =
                format!("select_expr: {{operand: {{ident_expr: {{name: {name}}}}}, field: x}}");
            Condition::of_tree(&lateen_protocols::json::from_yaml(&yaml).unwrap())
        };
        assert!(tree("request").is_ok());
        let error = tree("filter_state").unwrap_err().to_string();
        assert!(
            error.contains("filter_state") && error.contains("request"),
            "{error}"
        );
    }

    #[test]
    fn what_is_not_cel_is_refused() {
        assert!(Condition::parse("request.path ==").is_err());
        assert!(Condition::parse(&"a".repeat(MAX_TEXT + 1)).is_err());
    }
}
