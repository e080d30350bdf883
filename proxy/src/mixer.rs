//! The Mixer filters: asks Mixer whether a request or connection may go on, and reports afterwards.
//!
//! Configured by `istio.mixer.v1.config.client` (`HttpClientConfig`, per route `ServiceConfig`,
//! `TcpClientConfig`). `attributes` are collected once per stream; `client` asks and reports, `cache`
//! answers for it, `presence` knows whether there is anybody to ask; `quota` says what a request is charged;
//! `verdict` turns an answer into a reply.
//! When Mixer cannot be asked, the fail policy of the destination decides.

mod attributes;
mod cache;
mod client;
mod encode;
mod explain;
mod presence;
mod quota;
mod tcp;
mod verdict;

use std::{collections::HashSet, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::{Bytes, BytesMut};
use lateen_protocols::istio::mixer::v1::{
    self as wire, HeaderOperation,
    config::client::{
        HttpClientConfig, NetworkFailPolicy, ServiceConfig, network_fail_policy::FailPolicy,
    },
};
use prost::Message as _;

use self::{
    attributes::{Attributes, KEYS, Key, Value},
    client::{Client, Retries},
    explain::{Asker, Explained},
    quota::Quotas,
    verdict::{RESOURCE_EXHAUSTED, UNAVAILABLE},
};
use crate::{
    config_error::ConfigError,
    filter::{FilterContext, RouteFilterConfig},
    format::Facts,
    head::{Headers, Known, RequestHead, ResponseHead},
    info::{ConnectionInfo, MixerVerdict},
    reject::Reject,
    shared::Shared,
};

pub use self::tcp::{TcpMixer, TcpReport};

/// Sends the reports that wait on this worker, for at most `limit`. For a worker that is about to end.
pub(crate) async fn flush(limit: Duration) {
    client::flush(limit).await;
}

/// Attributes that a proxy believes another proxy about.
const FORWARDED: [&str; 6] = [
    "source.uid",
    "source.namespace",
    "destination.service.name",
    "destination.service.uid",
    "destination.service.host",
    "destination.service.namespace",
];

/// Most bytes of forwarded attributes that are read.
const MAX_FORWARDED_BYTES: usize = 8 * 1024;

/// The HTTP filter `mixer`, compiled.
#[derive(Debug)]
pub struct HttpMixer {
    client: Arc<Client>,
    fail: Fail,
    attributes: Attributes,
    forward: wire::Attributes,
    ignore_forwarded: bool,
    /// Callers may ask why; `None`: nobody. Those of a sidecar's own workload need no certificate.
    explains: Option<Asker>,
    default_service: Arc<Service>,
}

/// A destination service as the filter treats it: the route's configuration.
#[derive(Debug)]
pub struct Service {
    check: bool,
    report: bool,
    attributes: Attributes,
    forward: wire::Attributes,
    quotas: Quotas,
    fail: Option<Fail>,
}

/// What happens when Mixer cannot be asked.
#[derive(Clone, Copy, Debug)]
struct Fail {
    open: bool,
    retries: Retries,
}

/// What the filter keeps until the stream ends.
#[derive(Debug)]
pub struct MixerState {
    shared: Arc<Shared>,
    service: Arc<Service>,
    attributes: Attributes,
    response_operations: Vec<HeaderOperation>,
}

impl Fail {
    fn compile(policy: Option<&NetworkFailPolicy>) -> Fail {
        let default = NetworkFailPolicy::default();
        let policy = policy.unwrap_or(&default);
        let wait = |given: Option<prost_types::Duration>, default| {
            given
                .and_then(|wait| Duration::try_from(wait).ok())
                .unwrap_or(default)
        };
        Fail {
            open: policy.policy() == FailPolicy::FailOpen,
            retries: Retries {
                max: policy.max_retry.min(10),
                base: wait(policy.base_retry_wait, Duration::from_millis(80)),
                longest: wait(policy.max_retry_wait, Duration::from_secs(1)),
            },
        }
    }
}

impl Service {
    /// Compiles a route's configuration for the filter.
    ///
    /// # Errors
    /// A quota's match is not valid.
    pub fn compile(config: &ServiceConfig) -> Result<Service, ConfigError> {
        let plain = |attributes: Option<&wire::Attributes>| {
            attributes.map_or_else(Attributes::default, |a| Attributes::from_plain(a, true))
        };
        Ok(Service {
            check: !config.disable_check_calls,
            report: !config.disable_report_calls,
            attributes: plain(config.mixer_attributes.as_ref()),
            forward: config.forward_attributes.clone().unwrap_or_default(),
            quotas: Quotas::compile(&config.quota_spec)
                .map_err(|error| error.within("quota_spec"))?,
            fail: config
                .network_fail_policy
                .as_ref()
                .map(|policy| Fail::compile(Some(policy))),
        })
    }
}

impl HttpMixer {
    /// Compiles the filter.
    ///
    /// # Errors
    /// No check cluster is named, or a service configuration is not valid.
    pub fn compile(config: &HttpClientConfig, shared: &Shared) -> Result<HttpMixer, ConfigError> {
        let transport = config.transport.clone().unwrap_or_default();
        let default_service = config
            .service_configs
            .get(&config.default_destination_service)
            .map_or_else(
                || Service::compile(&ServiceConfig::default()),
                Service::compile,
            )
            .map_err(|error| {
                error.within(format_args!(
                    "service_configs[{}]",
                    config.default_destination_service
                ))
            })?;
        Ok(HttpMixer {
            client: Client::get(&transport, shared).map_err(|error| error.within("transport"))?,
            fail: Fail::compile(transport.network_fail_policy.as_ref()),
            attributes: config
                .mixer_attributes
                .as_ref()
                .map_or_else(Attributes::default, |a| Attributes::from_plain(a, true)),
            forward: config.forward_attributes.clone().unwrap_or_default(),
            ignore_forwarded: config.ignore_forwarded_attributes,
            explains: config.allow_explanation.then(|| Asker::of(config)),
            default_service: Arc::new(default_service),
        })
    }

    /// Asks about a request; gives what the filter wants back when the stream ends.
    ///
    /// # Errors
    /// Mixer refuses the request, or cannot be asked and the destination fails closed. The state is kept
    /// all the same, so that the refusal is reported.
    pub async fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
        state: &mut Option<MixerState>,
    ) -> Result<(), Reject> {
        let service = match cx.config(head) {
            Some(RouteFilterConfig::Mixer(service)) => service.clone(),
            _ => self.default_service.clone(),
        };
        let why = service.check
            && self.explains.is_some_and(|asker| {
                let info = cx.info.borrow();
                let tls = info.connection.tls.as_ref();
                let is_certified = tls.is_some_and(|tls| tls.is_mutual());
                explain::is_asked(&mut head.headers, asker, is_certified)
            });
        if !service.check && !service.report {
            // No rule of Mixer can matter, or nobody is to ask: what another proxy said goes no further.
            head.headers.take(Known::XIstioAttributes);
            self.forward(&service, head);
            return Ok(());
        }
        let shared = cx.shared.clone();
        let attributes = {
            let info = cx.info.borrow();
            let forwarded = head.headers.take(Known::XIstioAttributes);
            let mut all = forwarded
                .filter(|_| !self.ignore_forwarded)
                .map(|header| forwarded_attributes(&header, &info.connection))
                .unwrap_or_default();
            all.overlay(&self.attributes);
            all.overlay(&service.attributes);
            of_connection(&info.connection, &mut all);
            all.set(KEYS.origin_ip, info.downstream_remote.ip());
            all.set(KEYS.source_ip, info.downstream_remote.ip());
            all.set(KEYS.request_time, info.start_time);
            of_request(head, &mut all);
            all
        };
        let kept = state.insert(MixerState {
            shared: shared.clone(),
            service: service.clone(),
            attributes,
            response_operations: Vec::new(),
        });
        if service.check {
            self.check(cx, head, &shared, kept, why).await?;
        }
        self.forward(&service, head);
        Ok(())
    }

    async fn check(
        &self,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
        shared: &Arc<Shared>,
        state: &mut MixerState,
        why: bool,
    ) -> Result<(), Reject> {
        let service = state.service.clone();
        let quotas = if service.quotas.is_empty() {
            Vec::new()
        } else {
            service.quotas.of(&state.attributes)
        };
        let fail = service.fail.unwrap_or(self.fail);
        let checked = self
            .client
            .check(shared, &state.attributes, &quotas, &fail.retries, why)
            .await;
        let explained = why.then(|| match &checked {
            Ok(checked) => Explained::of_check(checked),
            Err(error) => Explained::because(format!("Mixer cannot be asked: {error}")),
        });
        let mut told = MixerVerdict::default();
        let refusal = match checked {
            Ok(checked) => {
                told.check_cache_hit = checked.cached;
                if let Some(reject) = checked.verdict.refusal() {
                    told.code = checked.verdict.code;
                    told.message.clone_from(&checked.verdict.message);
                    Some(reject)
                } else if let Some(quota) = checked.exhausted {
                    told.code = RESOURCE_EXHAUSTED;
                    told.message = format!("Quota is exhausted for: {quota}");
                    // The caller is told when to come back.
                    if let Some(directive) = &checked.verdict.directive {
                        state
                            .response_operations
                            .clone_from(&directive.response_header_operations);
                    }
                    Some(verdict::refusal(told.code, &told.message))
                } else {
                    if let Some(directive) = &checked.verdict.directive {
                        self.redirect(directive, cx, head, state);
                    }
                    None
                }
            }
            Err(error) if fail.open => {
                tracing::debug!(%error, "Mixer cannot be asked; the request goes on");
                None
            }
            Err(error) => {
                told.code = UNAVAILABLE;
                told.message = error.to_string();
                Some(verdict::refusal(told.code, &told.message))
            }
        };
        cx.info.borrow_mut().mixer = Some(told);
        if let Some(explained) = explained {
            state.response_operations.extend(explained.operations());
        }
        refusal.map_or(Ok(()), Err)
    }

    /// Does to the request what the verdict says; routes are then selected anew.
    fn redirect(
        &self,
        directive: &wire::RouteDirective,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
        state: &mut MixerState,
    ) {
        state
            .response_operations
            .clone_from(&directive.response_header_operations);
        if directive.request_header_operations.is_empty() {
            return;
        }
        let (pseudo, headers): (Vec<_>, Vec<_>) = directive
            .request_header_operations
            .iter()
            .cloned()
            .partition(|operation| operation.name.starts_with(':'));
        verdict::apply(&headers, &mut head.headers);
        for operation in pseudo {
            let value = Bytes::from(operation.value);
            match operation.name.as_str() {
                ":path" if value.starts_with(b"/") => head.path = value,
                ":authority" if !value.is_empty() => head.authority = value,
                ":method" if !value.is_empty() => head.method = value,
                name => tracing::debug!(name, "Mixer may not set this pseudo header so"),
            }
        }
        cx.clear_route_cache();
    }

    /// Tells the next proxy who we are and whom we meant.
    fn forward(&self, service: &Service, head: &mut RequestHead) {
        if self.forward.attributes.is_empty() && service.forward.attributes.is_empty() {
            return;
        }
        let mut all = self.forward.clone();
        all.attributes.extend(service.forward.attributes.clone());
        head.headers
            .append(Known::XIstioAttributes, BASE64.encode(all.encode_to_vec()));
    }

    /// Does to the response what the verdict said.
    pub fn on_response(&self, state: &MixerState, head: &mut ResponseHead) {
        verdict::apply(&state.response_operations, &mut head.headers);
    }

    /// Reports a stream that has ended.
    pub fn on_complete(&self, state: &MixerState, facts: &Facts<'_>) {
        if !state.service.report {
            return;
        }
        let mut all = state.attributes.clone();
        of_outcome(facts, &mut all);
        self.client.report(&state.shared, all);
    }
}

/// Believes another proxy only about a workload of the namespace that its certificate is for.
fn forwarded_attributes(header: &[u8], connection: &ConnectionInfo) -> Attributes {
    let namespace = connection
        .tls
        .as_ref()
        .filter(|tls| tls.is_mutual())
        .and_then(|tls| tls.peer_uri_san.as_deref())
        .and_then(|id| id.parse::<lateen_identity::SpiffeId>().ok())
        .and_then(|id| id.namespace().map(str::to_owned));
    let Some(namespace) = namespace.filter(|_| header.len() <= MAX_FORWARDED_BYTES) else {
        return Attributes::default();
    };
    let Some(plain) = BASE64
        .decode(header)
        .ok()
        .and_then(|bytes| wire::Attributes::decode(bytes.as_slice()).ok())
    else {
        return Attributes::default();
    };
    let mut all = Attributes::from_plain(&plain, false);
    let keys = FORWARDED.map(|name| Key::of(name).expect("a word of the dictionary"));
    all.retain(&keys);
    let suffix = format!(".{namespace}");
    let fits = |key, fits: &dyn Fn(&[u8]) -> bool| match all.get(key) {
        None => true,
        Some(Value::Text(text)) => fits(text),
        Some(_) => false,
    };
    let honest = fits(keys[0], &|uid| {
        uid.starts_with(b"kubernetes://") && uid.ends_with(suffix.as_bytes())
    }) && fits(keys[1], &|text| text == namespace.as_bytes());
    if honest { all } else { Attributes::default() }
}

fn of_connection(connection: &ConnectionInfo, all: &mut Attributes) {
    let principal = |san: &Option<Arc<str>>| {
        let id = san.as_deref()?.strip_prefix("spiffe://")?;
        Some(id.to_owned())
    };
    let tls = connection.tls.as_ref();
    let mutual = tls.filter(|tls| tls.is_mutual());
    all.set(KEYS.connection_mtls, mutual.is_some());
    if let Some(tls) = mutual {
        let source = principal(&tls.peer_uri_san);
        all.set_some(KEYS.source_user, source.clone());
        all.set_some(KEYS.source_principal, source);
        all.set_some(KEYS.destination_principal, principal(&tls.local_uri_san));
    }
    let sni = connection.requested_server_name.as_deref();
    all.set_some(KEYS.connection_sni, sni.map(str::to_owned));
}

fn of_request(head: &RequestHead, all: &mut Attributes) {
    all.set(
        KEYS.context_protocol,
        if head.is_grpc() { "grpc" } else { "http" },
    );
    all.set(KEYS.request_method, head.method.clone());
    all.set(KEYS.request_scheme, head.scheme.clone());
    all.set(KEYS.request_host, head.authority.clone());
    all.set(KEYS.request_path, head.path.clone());
    all.set(
        KEYS.request_url_path,
        head.path.slice(..head.path_only().len()),
    );
    let header = |name| head.headers.known(name).map(Bytes::copy_from_slice);
    all.set_some(KEYS.request_useragent, header(Known::UserAgent));
    all.set_some(KEYS.request_referer, header(Known::Referer));
    all.set_some(KEYS.request_id, header(Known::XRequestId));
    let pseudo = [
        (":authority", &head.authority),
        (":method", &head.method),
        (":path", &head.path),
    ];
    all.set(
        KEYS.request_headers,
        Value::Map(map(&pseudo, &head.headers)),
    );
    if let Some(query) = head.query() {
        all.set(KEYS.request_query_params, Value::Map(query_map(query)));
    }
}

/// Decoded parameters of a query; of several with the same name the first, as Istio's client has it. Mixer
/// and the cache of its answers must see the same one.
fn query_map(query: &[u8]) -> Arc<[(Bytes, Bytes)]> {
    let mut seen = HashSet::new();
    url::form_urlencoded::parse(query)
        .map(|(name, value)| (name.into_owned().into(), value.into_owned().into()))
        .filter(|(name, _): &(Bytes, Bytes)| seen.insert(name.clone()))
        .collect()
}

/// Headers as a map: values of one name joined by commas, as RFC 9110 §5.2 reads them.
fn map(pseudo: &[(&'static str, &Bytes)], headers: &Headers) -> Arc<[(Bytes, Bytes)]> {
    let mut entries: Vec<(Bytes, Bytes)> = Vec::with_capacity(pseudo.len() + headers.len());
    let pseudo = pseudo
        .iter()
        .map(|(name, value)| (Bytes::from_static(name.as_bytes()), (*value).clone()));
    entries.extend(pseudo);
    // One copy of all text, of which the entries are parts.
    let mut text = BytesMut::with_capacity(usize::try_from(header_bytes(headers)).unwrap_or(0));
    for (name, value) in headers.iter() {
        if name.known().is_none() {
            text.extend_from_slice(name.as_bytes());
        }
        text.extend_from_slice(value);
    }
    let mut text = text.freeze();
    for (name, value) in headers.iter() {
        let key = match name.known() {
            Some(known) => Bytes::from_static(known.as_str().as_bytes()),
            None => text.split_to(name.as_bytes().len()),
        };
        let part = text.split_to(value.len());
        match entries.iter_mut().find(|(known, _)| *known == key) {
            Some((_, present)) => *present = [&present[..], b",", value].concat().into(),
            None => entries.push((key, part)),
        }
    }
    entries.into()
}

fn header_bytes(headers: &Headers) -> u64 {
    headers
        .iter()
        .map(|(name, value)| (name.as_bytes().len() + value.len()) as u64)
        .sum()
}

fn of_outcome(facts: &Facts<'_>, all: &mut Attributes) {
    let info = facts.info;
    if all.get(KEYS.destination_ip).is_none()
        && let Some(host) = info.upstream_host
    {
        all.set_address(KEYS.destination_ip, KEYS.destination_port, host);
    }
    let took = info.response_end.unwrap_or_else(|| info.start.elapsed());
    all.set(KEYS.request_size, info.bytes_received);
    let request_head = facts.request.map_or(0, |head| header_bytes(&head.headers));
    all.set(KEYS.request_total_size, info.bytes_received + request_head);
    all.set(KEYS.response_code, i64::from(info.response_code));
    all.set(KEYS.response_duration, took);
    all.set(KEYS.response_time, info.start_time + took);
    all.set(KEYS.response_size, info.bytes_sent);
    let response_head = facts.response.map_or(0, |head| header_bytes(&head.headers));
    all.set(KEYS.response_total_size, info.bytes_sent + response_head);
    if let Some(response) = facts.response {
        all.set(
            KEYS.response_headers,
            Value::Map(map(&[], &response.headers)),
        );
    }
    all.set_some(
        KEYS.response_grpc_status,
        info.grpc_status.map(|status| status.to_string()),
    );
    let grpc_message = facts
        .trailers
        .or(facts.response.map(|head| &head.headers))
        .and_then(|headers| {
            headers
                .known(Known::GrpcMessage)
                .map(Bytes::copy_from_slice)
        });
    all.set_some(KEYS.response_grpc_message, grpc_message);
    all.set(KEYS.context_proxy_error_code, info.flags.short());
    if let Some(told) = &info.mixer {
        all.set(KEYS.check_cache_hit, told.check_cache_hit);
        all.set(KEYS.quota_cache_hit, told.quota_cache_hit);
        if told.code != 0 {
            all.set(KEYS.check_error_code, i64::from(told.code));
            all.set(KEYS.check_error_message, told.message.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::info::TlsInfo;
    use lateen_protocols::istio::mixer::v1::attributes::{AttributeValue, attribute_value};
    use tokio::time::Instant;

    fn connection(peer: Option<&str>) -> ConnectionInfo {
        ConnectionInfo {
            id: 1,
            remote: ([127, 0, 0, 1], 1).into(),
            direct_remote: ([127, 0, 0, 1], 1).into(),
            local: ([127, 0, 0, 1], 2).into(),
            local_restored: false,
            tls: peer.map(|id| {
                Box::new(TlsInfo {
                    peer_uri_san: Some(id.into()),
                    peer_certificate_der: Some(Bytes::from_static(b"der")),
                    ..TlsInfo::default()
                })
            }),
            requested_server_name: None,
            filter_chain: None,
            original_src: None,
            started: Instant::now(),
        }
    }

    #[test]
    fn the_first_of_several_query_parameters_counts() {
        let all = query_map(b"user=a&x=1&user=b&%75ser=c&y");
        let want = [("user", "a"), ("x", "1"), ("y", "")];
        assert_eq!(*all, want.map(|(k, v)| (Bytes::from(k), Bytes::from(v))));
    }

    fn header(entries: &[(&str, &str)]) -> String {
        let attributes = entries
            .iter()
            .map(|(name, value)| {
                let value = attribute_value::Value::StringValue((*value).to_owned());
                ((*name).to_owned(), AttributeValue { value: Some(value) })
            })
            .collect();
        BASE64.encode(wire::Attributes { attributes }.encode_to_vec())
    }

    #[tokio::test]
    async fn another_proxy_is_believed_only_about_its_own_namespace() {
        let uid = Key::of("source.uid").unwrap();
        let believed = |peer: Option<&str>, entries: &[(&str, &str)]| {
            let all = forwarded_attributes(header(entries).as_bytes(), &connection(peer));
            all.get(uid).is_some()
        };
        let me = Some("spiffe://cluster.local/ns/foo/sa/a");
        assert!(believed(me, &[("source.uid", "kubernetes://a.foo")]));
        assert!(!believed(me, &[("source.uid", "kubernetes://a.bar")]));
        assert!(!believed(None, &[("source.uid", "kubernetes://a.foo")]));
        let other = [
            ("source.uid", "kubernetes://a.foo"),
            ("source.namespace", "bar"),
        ];
        assert!(!believed(me, &other));
    }

    #[tokio::test]
    async fn nothing_else_is_taken_from_another_proxy() {
        let me = Some("spiffe://cluster.local/ns/foo/sa/a");
        let entries = [
            ("source.principal", "admin"),
            ("destination.service.name", "b"),
        ];
        let all = forwarded_attributes(header(&entries).as_bytes(), &connection(me));
        assert_eq!(all.get(KEYS.source_principal), None);
        assert!(
            all.get(Key::of("destination.service.name").unwrap())
                .is_some()
        );
        let noise = forwarded_attributes(b"%%%", &connection(me));
        assert_eq!(noise, Attributes::default());
    }
}
