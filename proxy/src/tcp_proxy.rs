//! The network filter `tcp_proxy`: carries a connection to a host of a cluster, bytes as they are.

mod copy;
mod tunnel;

use std::{
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use bytes::Bytes;
use lateen_protocols::envoy::{
    envoy::{
        config::core::v3 as core,
        extensions::filters::network::tcp_proxy::v3::{self as proto, tcp_proxy::ClusterSpecifier},
        r#type::v3::hash_policy::PolicySpecifier,
    },
    google::protobuf as pb,
};
use tokio::time::Instant;

use self::tunnel::{Downstream, Tunnel, Tunneling};
use crate::{
    balance::xxh64,
    circuit::{Permit, Resource},
    cluster::Host,
    config_error::ConfigError,
    info::ResponseFlags,
    net::Transport,
    outlier::Outcome,
    proto::{invalid, timeout},
    route::policy::SubsetMatch,
    router::{SharedInfo, original_destination},
    shared::Shared,
    stats::{Counter, Scope},
    upstream::{ConnectError, LocalCluster, Pick, WorkerClusters, connect},
};

/// Envoy: "idle timeout ... defaults to 1 hour".
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// The filter, compiled. Its `access_log` is the listener's to compile and write.
#[derive(Debug)]
pub struct TcpProxy {
    clusters: Vec<Weighted>,
    total: u64,
    idle_timeout: Option<Duration>,
    max_duration: Option<Duration>,
    max_connect_attempts: u32,
    hash_source_ip: bool,
    /// The bytes go through a tunnel of HTTP.
    tunneling: Option<Tunneling>,
    stats: Stats,
}

#[derive(Debug)]
struct Weighted {
    name: Arc<str>,
    weight: u64,
    subset: Option<SubsetMatch>,
}

#[derive(Debug)]
struct Stats {
    downstream_cx_total: Counter,
    downstream_cx_no_route: Counter,
    downstream_cx_rx_bytes_total: Counter,
    downstream_cx_tx_bytes_total: Counter,
    idle_timeout: Counter,
    max_downstream_connection_duration: Counter,
}

impl Stats {
    fn new(scope: &Scope) -> Stats {
        Stats {
            downstream_cx_total: scope.counter("downstream_cx_total"),
            downstream_cx_no_route: scope.counter("downstream_cx_no_route"),
            downstream_cx_rx_bytes_total: scope.counter("downstream_cx_rx_bytes_total"),
            downstream_cx_tx_bytes_total: scope.counter("downstream_cx_tx_bytes_total"),
            idle_timeout: scope.counter("idle_timeout"),
            max_downstream_connection_duration: scope.counter("max_downstream_connection_duration"),
        }
    }
}

impl TcpProxy {
    /// Compiles the filter.
    ///
    /// # Errors
    /// When something is invalid or not supported.
    pub fn compile(config: &proto::TcpProxy, shared: &Shared) -> Result<TcpProxy, ConfigError> {
        TcpProxy::read(config, shared).map_err(|error| error.within("tcp_proxy"))
    }

    fn read(config: &proto::TcpProxy, shared: &Shared) -> Result<TcpProxy, ConfigError> {
        let unsupported = [
            ("on_demand", config.on_demand.is_some()),
            ("backoff_options", config.backoff_options.is_some()),
            (
                "proxy_protocol_tlvs",
                !config.proxy_protocol_tlvs.is_empty(),
            ),
            ("upstream_connect_mode", config.upstream_connect_mode != 0),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
            return Err(invalid(*field, "not supported"));
        }
        let common = subset(config.metadata_match.as_ref());
        let clusters: Vec<Weighted> = match config.cluster_specifier.as_ref() {
            Some(ClusterSpecifier::Cluster(name)) if !name.is_empty() => vec![Weighted {
                name: name.as_str().into(),
                weight: 1,
                subset: common,
            }],
            Some(ClusterSpecifier::WeightedClusters(weighted)) => weighted
                .clusters
                .iter()
                .map(|cluster| Weighted {
                    name: cluster.name.as_str().into(),
                    weight: u64::from(cluster.weight),
                    subset: merge(common.as_ref(), subset(cluster.metadata_match.as_ref())),
                })
                .collect(),
            _ => return Err(invalid("cluster", "no cluster is named")),
        };
        let total = clusters.iter().map(|cluster| cluster.weight).sum();
        if total == 0 {
            return Err(invalid(
                "weighted_clusters",
                "the sum of the weights is zero",
            ));
        }
        let mut hash_source_ip = false;
        for policy in &config.hash_policy {
            match policy.policy_specifier {
                Some(PolicySpecifier::SourceIp(_)) => hash_source_ip = true,
                _ => return Err(invalid("hash_policy", "not supported")),
            }
        }
        let scope = shared.stats.scope(&format!("tcp.{}.", config.stat_prefix));
        Ok(TcpProxy {
            clusters,
            total,
            idle_timeout: timeout(
                "idle_timeout",
                config.idle_timeout.as_ref(),
                Some(IDLE_TIMEOUT),
            )?,
            max_duration: timeout(
                "max_downstream_connection_duration",
                config.max_downstream_connection_duration.as_ref(),
                None,
            )?,
            max_connect_attempts: config
                .max_connect_attempts
                .as_ref()
                .map_or(1, |n| n.value.max(1)),
            hash_source_ip,
            tunneling: config
                .tunneling_config
                .as_ref()
                .map(Tunneling::compile)
                .transpose()
                .map_err(|error| error.within("tunneling_config"))?,
            stats: Stats::new(&scope),
        })
    }

    /// Clusters it may use.
    pub fn clusters(&self) -> Vec<Arc<str>> {
        self.clusters
            .iter()
            .map(|cluster| cluster.name.clone())
            .collect()
    }

    /// Carries the connection to its end. `info` is kept up to date all the while (bytes, upstream host,
    /// flags), so that whoever watches may read it at any time; the caller writes the record afterwards.
    /// `read` is what was read of the connection already. Dropping the future closes both connections.
    pub async fn serve(
        &self,
        shared: &Arc<Shared>,
        downstream: Transport,
        read: Bytes,
        info: &SharedInfo,
    ) {
        self.stats.downstream_cx_total.inc();
        let limits = copy::Limits {
            idle: self.idle_timeout,
            deadline: self.max_duration.map(|limit| info.borrow().start + limit),
        };
        let ended = if let Some(tunneling) = &self.tunneling {
            self.carry(tunneling, shared, downstream, read, info, &limits)
                .await
        } else if let Some((upstream, counted)) = self.connect(shared, info).await {
            let cluster = &counted.local.cluster.stats;
            // Bytes of the connection are counted when read from the downstream, and when written to it.
            let tell = |place, n: u64| match place {
                copy::Passed::FromDownstream => {
                    self.stats.downstream_cx_rx_bytes_total.add(n);
                    info.borrow_mut().bytes_received += n;
                }
                copy::Passed::ToUpstream => cluster.upstream_cx_tx_bytes_total.add(n),
                copy::Passed::FromUpstream => cluster.upstream_cx_rx_bytes_total.add(n),
                copy::Passed::ToDownstream => {
                    self.stats.downstream_cx_tx_bytes_total.add(n);
                    info.borrow_mut().bytes_sent += n;
                }
            };
            Some(copy::both(downstream, read, upstream, &limits, tell).await)
        } else {
            None
        };
        match ended {
            None | Some(copy::Ended::Finished) => {}
            Some(copy::Ended::Idle) => self.stats.idle_timeout.inc(),
            Some(copy::Ended::TooLong) => {
                self.stats.max_downstream_connection_duration.inc();
                info.borrow_mut().flags.set(ResponseFlags::DURATION_TIMEOUT);
            }
            Some(copy::Ended::Failed(side, error)) => note_failure(info, side, &error),
        }
        let mut info = info.borrow_mut();
        info.response_end = Some(info.start.elapsed());
    }

    /// Carries the connection through a tunnel; `None` if there is none to be had.
    async fn carry(
        &self,
        tunneling: &Tunneling,
        shared: &Arc<Shared>,
        downstream: Transport,
        read: Bytes,
        info: &SharedInfo,
        limits: &copy::Limits,
    ) -> Option<copy::Ended> {
        let (received, sent) = (
            self.stats.downstream_cx_rx_bytes_total.clone(),
            self.stats.downstream_cx_tx_bytes_total.clone(),
        );
        let facts = info.clone();
        // What passes upstream is counted by the connection that the tunnel is part of.
        let tell: tunnel::Tell = Rc::new(move |place, n| match place {
            copy::Passed::FromDownstream => {
                received.add(n);
                facts.borrow_mut().bytes_received += n;
            }
            copy::Passed::ToDownstream => {
                sent.add(n);
                facts.borrow_mut().bytes_sent += n;
            }
            copy::Passed::ToUpstream | copy::Passed::FromUpstream => {}
        });
        let before = read.len() as u64;
        let downstream = Downstream::new(downstream, read, tell.clone());
        let tunnel = self.tunnel(tunneling, shared, &downstream, info).await?;
        tell(copy::Passed::FromDownstream, before);
        Some(tunnel.carry(limits).await)
    }

    /// A tunnel, in as many attempts as allowed; what went wrong is in `info`.
    async fn tunnel(
        &self,
        tunneling: &Tunneling,
        shared: &Arc<Shared>,
        downstream: &Downstream,
        info: &SharedInfo,
    ) -> Option<Tunnel> {
        let mut choice = self.choose(shared, info)?;
        loop {
            let (local, host) = self.next_host(&choice, info)?;
            match downstream.ask(tunneling, &local, &host, info).await {
                Ok(tunnel) => {
                    info.borrow_mut().upstream_transport_failure = None;
                    return Some(tunnel);
                }
                Err(reason) => {
                    info.borrow_mut().upstream_transport_failure = reason;
                    if !self.may_try_again(&mut choice, &local, host, info) {
                        return None;
                    }
                }
            }
        }
    }

    /// A connection to a host, in as many attempts as allowed; what went wrong is in `info`.
    async fn connect(
        &self,
        shared: &Arc<Shared>,
        info: &SharedInfo,
    ) -> Option<(Transport, Counted)> {
        let mut choice = self.choose(shared, info)?;
        loop {
            let (local, host) = self.next_host(&choice, info)?;
            let permit = local
                .cluster
                .circuits
                .of(false)
                .try_acquire(Resource::Connections);
            let Some(permit) = permit else {
                local.cluster.stats.upstream_cx_overflow.inc();
                info.borrow_mut()
                    .flags
                    .set(ResponseFlags::UPSTREAM_OVERFLOW);
                return None;
            };
            let counted = Counted::new(&local, host.clone(), permit);
            let source = info.borrow().original_src;
            match connect(&local.cluster, &host, None, None, source).await {
                Ok(connected) => {
                    local.cluster.report(&host, Outcome::Connected);
                    local.cluster.stats.upstream_rq_total.inc();
                    let mut info = info.borrow_mut();
                    info.upstream_local = connected.local;
                    info.upstream_tls = connected.tls;
                    info.upstream_transport_failure = None;
                    return Some((connected.transport, counted));
                }
                Err(error) => {
                    let stats = &local.cluster.stats;
                    stats.upstream_rq_pending_failure_eject.inc();
                    let outcome = match error {
                        ConnectError::Timeout => Outcome::TimedOut,
                        ConnectError::Refused(_) | ConnectError::Tls(_) => Outcome::Failed,
                    };
                    local.cluster.report(&host, outcome);
                    info.borrow_mut().upstream_transport_failure = Some(error.to_string());
                    if !self.may_try_again(&mut choice, &local, host, info) {
                        return None;
                    }
                }
            }
        }
    }

    /// Chooses the cluster; a connection stays with it.
    fn choose(&self, shared: &Arc<Shared>, info: &SharedInfo) -> Option<Choice<'_>> {
        let chosen = self.draw(rand::random_range(0..self.total))?;
        let mut info = info.borrow_mut();
        // A filter before this one may have named the cluster.
        let name = info
            .upstream_cluster
            .get_or_insert_with(|| chosen.name.clone())
            .clone();
        let remote = info.connection.remote.ip();
        Some(Choice {
            worker: WorkerClusters::of(&shared.clusters),
            name,
            subset: chosen.subset.as_ref(),
            hash: self
                .hash_source_ip
                .then(|| xxh64(remote.to_string().as_bytes(), 0)),
            original: original_destination(&info.connection),
            tried: Vec::new(),
        })
    }

    /// The host for the next attempt; why there is none is in `info`.
    fn next_host(
        &self,
        choice: &Choice<'_>,
        info: &SharedInfo,
    ) -> Option<(Rc<LocalCluster>, Arc<Host>)> {
        let Some(local) = choice.worker.get(&choice.name) else {
            self.stats.downstream_cx_no_route.inc();
            info.borrow_mut().flags.set(ResponseFlags::NO_CLUSTER_FOUND);
            return None;
        };
        let host = local.pick(&Pick {
            subset: choice.subset,
            hash: choice.hash,
            original: choice.original,
            tried: &choice.tried,
            ..Pick::default()
        });
        let Some(host) = host else {
            local.cluster.stats.upstream_cx_none_healthy.inc();
            info.borrow_mut()
                .flags
                .set(ResponseFlags::NO_HEALTHY_UPSTREAM);
            return None;
        };
        let mut info = info.borrow_mut();
        info.meet(&host);
        info.upstream_attempts = u32::try_from(choice.tried.len())
            .unwrap_or(u32::MAX)
            .saturating_add(1);
        Some((local, host))
    }

    /// Whether another attempt is allowed after one with `host` failed.
    fn may_try_again(
        &self,
        choice: &mut Choice<'_>,
        local: &LocalCluster,
        host: Arc<Host>,
        info: &SharedInfo,
    ) -> bool {
        choice.tried.push(host);
        if choice.tried.len() < self.max_connect_attempts as usize {
            return true;
        }
        let stats = &local.cluster.stats;
        stats.upstream_cx_connect_attempts_exceeded.inc();
        let mut info = info.borrow_mut();
        info.flags.set(ResponseFlags::UPSTREAM_CONNECTION_FAILURE);
        info.flags.set(ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED);
        false
    }

    /// The cluster for a value below the sum of the weights. Drawn once: a connection stays where it is.
    fn draw(&self, value: u64) -> Option<&Weighted> {
        let mut sum = 0;
        self.clusters.iter().find(|cluster| {
            sum += cluster.weight;
            value < sum
        })
    }
}

/// Where a connection goes, and what was tried.
struct Choice<'a> {
    worker: Rc<WorkerClusters>,
    name: Arc<str>,
    subset: Option<&'a SubsetMatch>,
    hash: Option<u64>,
    original: Option<SocketAddr>,
    tried: Vec<Arc<Host>>,
}

/// Counts one upstream connection while it stands.
struct Counted {
    local: Rc<LocalCluster>,
    host: Arc<Host>,
    began: Instant,
    _permit: Permit,
}

impl Counted {
    fn new(local: &Rc<LocalCluster>, host: Arc<Host>, permit: Permit) -> Counted {
        local.cluster.stats.upstream_cx_total.inc();
        local.cluster.stats.upstream_cx_active.inc();
        // As Envoy, to which a connection is a request to the pool of connections.
        local.cluster.stats.upstream_rq_pending_total.inc();
        host.state.numbers.cx_total.fetch_add(1, Relaxed);
        host.state.numbers.cx_active.fetch_add(1, Relaxed);
        // For least request: a connection is what a request is to HTTP.
        host.state.request_began();
        Counted {
            local: local.clone(),
            host,
            began: Instant::now(),
            _permit: permit,
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let stats = &self.local.cluster.stats;
        stats.upstream_cx_active.dec();
        stats.upstream_cx_destroy.inc();
        let ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        stats.upstream_cx_length_ms.record(ms);
        self.host.state.numbers.cx_active.fetch_sub(1, Relaxed);
        self.host.state.request_ended();
    }
}

fn note_failure(info: &SharedInfo, side: copy::Side, error: &io::Error) {
    tracing::debug!(?side, %error, "connection broke");
    info.borrow_mut().flags.set(match side {
        copy::Side::Downstream => ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION,
        copy::Side::Upstream => ResponseFlags::UPSTREAM_CONNECTION_TERMINATION,
    });
}

fn subset(metadata: Option<&core::Metadata>) -> Option<SubsetMatch> {
    let labels: &pb::Struct = metadata?.filter_metadata.get("envoy.lb")?;
    Some(Arc::new(
        labels
            .fields
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
    ))
}

fn merge(common: Option<&SubsetMatch>, own: Option<SubsetMatch>) -> Option<SubsetMatch> {
    match (common, own) {
        (None, own) => own,
        (Some(common), None) => Some(common.clone()),
        (Some(common), Some(own)) => {
            let mut all = (**common).clone();
            all.extend(own.iter().map(|(key, value)| (key.clone(), value.clone())));
            Some(Arc::new(all))
        }
    }
}

#[cfg(test)]
mod tests;
