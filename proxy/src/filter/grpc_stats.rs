//! Counts gRPC calls and messages for each cluster. Envoy: `envoy.filters.http.grpc_stats`.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet, HashMap},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use arc_swap::ArcSwap;
use lateen_protocols::envoy::envoy::extensions::filters::http::grpc_stats::v3::{
    FilterConfig as GrpcStatsProto, filter_config::PerMethodStatSpecifier,
};

use crate::{
    body::{Body, BodyError, Frame, Source},
    config_error::ConfigError,
    filter::{FilterContext, FilterState, per_cluster::PerCluster},
    format::Facts,
    head::RequestHead,
    proto::invalid,
    reject::Reject,
    stats::{Counter, Histogram, Scope},
};

/// Methods counted for one cluster when clients choose the names; calls of more are counted together.
const MAX_METHODS: usize = 1000;

/// The filter of one connection manager.
#[derive(Debug)]
pub struct GrpcStats {
    methods: Methods,
    underscores: bool,
    times: bool,
    clusters: PerCluster<Cluster>,
}

/// Which methods have counters of their own.
#[derive(Debug)]
enum Methods {
    None,
    All,
    /// By service.
    Listed(BTreeMap<String, BTreeSet<String>>),
}

/// The counters of one cluster.
#[derive(Debug)]
struct Cluster {
    scope: Scope,
    all: Arc<Calls>,
    /// By path.
    methods: ArcSwap<HashMap<Box<[u8]>, Arc<Calls>>>,
}

/// The counters of one method, or of all.
#[derive(Debug)]
struct Calls {
    scope: Scope,
    total: Counter,
    success: Counter,
    failure: Counter,
    ok: Counter,
    requests: Counter,
    responses: Counter,
    time: Option<Histogram>,
}

/// A call that is counted when it ends.
#[derive(Debug)]
pub(crate) struct Active {
    calls: Arc<Calls>,
    requests: Rc<Cell<u64>>,
    responses: Rc<Cell<u64>>,
}

impl GrpcStats {
    /// Compiles the filter.
    ///
    /// # Errors
    /// Filter state is wanted, which there is none of.
    pub fn compile(config: &GrpcStatsProto) -> Result<GrpcStats, ConfigError> {
        if config.emit_filter_state {
            return Err(invalid("emit_filter_state", "not supported"));
        }
        let methods = match config.per_method_stat_specifier.as_ref() {
            None => Methods::None,
            Some(PerMethodStatSpecifier::StatsForAllMethods(all)) if all.value => Methods::All,
            Some(PerMethodStatSpecifier::StatsForAllMethods(_)) => Methods::None,
            Some(PerMethodStatSpecifier::IndividualMethodStatsAllowlist(list)) => Methods::Listed(
                list.services
                    .iter()
                    .map(|service| {
                        let methods = service.method_names.iter().cloned().collect();
                        (service.name.clone(), methods)
                    })
                    .collect(),
            ),
        };
        Ok(GrpcStats {
            methods,
            underscores: config.replace_dots_in_grpc_service_name,
            times: config.enable_upstream_stats,
            clusters: PerCluster::default(),
        })
    }

    pub(super) fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &RequestHead,
        body: &mut Body,
    ) -> Result<(), Reject> {
        if !head.is_grpc() {
            return Ok(());
        }
        let Some(target) = cx.route(head).and_then(|route| route.target(head)) else {
            return Ok(());
        };
        let cluster = self.clusters.get(cx.shared, &target.cluster, |scope| {
            let scope = scope.scope("grpc.");
            Cluster {
                all: Arc::new(Calls::new(scope.clone(), self.times)),
                scope,
                methods: ArcSwap::default(),
            }
        });
        let Some(cluster) = cluster else {
            return Ok(());
        };
        let active = Active {
            calls: self.calls(&cluster, head.path_only()),
            requests: Rc::default(),
            responses: Rc::default(),
        };
        count(body, &active.requests);
        cx.state.grpc_stats = Some(active);
        Ok(())
    }

    /// The counters of a method.
    fn calls(&self, cluster: &Cluster, path: &[u8]) -> Arc<Calls> {
        if matches!(self.methods, Methods::None) {
            return cluster.all.clone();
        }
        if let Some(found) = cluster.methods.load().get(path) {
            return found.clone();
        }
        let Some((service, method)) = split(path).filter(|(s, m)| self.methods.has(s, m)) else {
            return cluster.all.clone();
        };
        if cluster.methods.load().len() >= MAX_METHODS {
            return cluster.all.clone();
        }
        let service = match self.underscores {
            true => service.replace('.', "_"),
            false => service.to_owned(),
        };
        let scope = cluster.scope.scope(&format!("{service}.{method}."));
        let calls = Arc::new(Calls::new(scope, self.times));
        cluster.methods.rcu(|known| {
            let mut all = HashMap::clone(known);
            all.insert(path.into(), calls.clone());
            all
        });
        calls
    }

    /// Counts the messages of a response.
    pub(super) fn on_response(&self, state: &FilterState, body: &mut Body) {
        if let Some(active) = &state.grpc_stats {
            count(body, &active.responses);
        }
    }

    /// Counts a call that has ended.
    pub(super) fn on_complete(&self, active: &Active, facts: &Facts<'_>) {
        let calls = &active.calls;
        calls.requests.add(active.requests.get());
        calls.responses.add(active.responses.get());
        let Some(status) = facts.info.grpc_status else {
            return;
        };
        calls.total.inc();
        match status {
            0 => {
                calls.success.inc();
                calls.ok.inc();
            }
            code => {
                calls.failure.inc();
                // What is no code of gRPC's has no counter.
                if (1..=16).contains(&code) {
                    calls.scope.counter(&code.to_string()).inc();
                }
            }
        }
        let times = facts
            .info
            .response_end
            .zip(facts.info.request_end)
            .and_then(|(end, start)| end.checked_sub(start));
        if let (Some(histogram), Some(time)) = (&calls.time, times) {
            histogram.record(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        }
    }
}

impl Methods {
    fn has(&self, service: &str, method: &str) -> bool {
        match self {
            Methods::None => false,
            Methods::All => true,
            Methods::Listed(services) => services
                .get(service)
                .is_some_and(|methods| methods.contains(method)),
        }
    }
}

/// Service and method of `/service/method`, if both are names.
pub(super) fn split(path: &[u8]) -> Option<(&str, &str)> {
    let text = std::str::from_utf8(path).ok()?.strip_prefix('/')?;
    let (service, method) = text.split_once('/')?;
    let name = |text: &str| {
        !text.is_empty()
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    };
    (name(service) && name(method)).then_some((service, method))
}

impl Calls {
    fn new(scope: Scope, times: bool) -> Calls {
        Calls {
            total: scope.counter("total"),
            success: scope.counter("success"),
            failure: scope.counter("failure"),
            ok: scope.counter("0"),
            requests: scope.counter("request_message_count"),
            responses: scope.counter("response_message_count"),
            time: times.then(|| scope.histogram("upstream_rq_time")),
            scope,
        }
    }
}

/// Puts a counter of messages around a body.
fn count(body: &mut Body, messages: &Rc<Cell<u64>>) {
    if !body.is_end_stream() {
        *body = Body::stream(Counted {
            body: std::mem::take(body),
            seen: Seen::default(),
            messages: messages.clone(),
        });
    }
}

/// A body whose gRPC messages are counted when their heads pass.
struct Counted {
    body: Body,
    seen: Seen,
    messages: Rc<Cell<u64>>,
}

impl Source for Counted {
    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let frame = self.body.poll_frame(cx);
        if let Poll::Ready(Some(Ok(Frame::Data(data)))) = &frame {
            let new = self.seen.pass(data);
            self.messages.set(self.messages.get() + new);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn exact_length(&self) -> Option<u64> {
        self.body.exact_length()
    }
}

/// How far a stream of messages has come. A message is a flag, four bytes of length, and the rest.
#[derive(Debug, Default)]
struct Seen {
    /// Bytes of the next message's head that have come.
    head: u8,
    length: u32,
    /// Bytes of the message that are still to come.
    left: u32,
}

impl Seen {
    /// The number of messages whose heads end in this piece.
    fn pass(&mut self, mut data: &[u8]) -> u64 {
        let mut messages = 0;
        loop {
            let skip = data.len().min(self.left as usize);
            self.left -= u32::try_from(skip).unwrap_or(self.left);
            let Some((byte, rest)) = data[skip..].split_first() else {
                return messages;
            };
            data = rest;
            if self.head > 0 {
                self.length = self.length << 8 | u32::from(*byte);
            }
            self.head += 1;
            if self.head == 5 {
                messages += 1;
                self.left = std::mem::take(&mut self.length);
                self.head = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        let mut stream = Vec::new();
        for length in [0_u32, 3, 300] {
            stream.push(0);
            stream.extend_from_slice(&length.to_be_bytes());
            stream.extend(std::iter::repeat_n(7, length as usize));
        }
        for size in 1..=stream.len() {
            let mut seen = Seen::default();
            let count: u64 = stream.chunks(size).map(|piece| seen.pass(piece)).sum();
            assert_eq!((count, seen.left, seen.head), (3, 0, 0), "pieces of {size}");
        }
    }

    #[test]
    fn only_names_become_statistics() {
        assert_eq!(split(b"/a.B/C"), Some(("a.B", "C")));
        for path in [&b"/a"[..], b"/a/", b"//b", b"/a/b/c", b"/a b/c", b"a/b"] {
            assert_eq!(split(path), None);
        }
    }
}
