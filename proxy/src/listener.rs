//! Listeners: an address, what is looked at before a filter chain is chosen, and the chains.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::BytesMut;
use lateen_protocols::envoy::envoy::{
    config::{
        core::v3::{
            Address, address, proxy_protocol_config::Version, socket_address::PortSpecifier,
        },
        listener::v3 as proto,
    },
    extensions::filters::listener::{
        http_inspector::v3::HttpInspector, original_dst::v3::OriginalDst,
        original_src::v3::OriginalSrc as OriginalSrcProto, proxy_protocol::v3::ProxyProtocol,
        tls_inspector::v3::TlsInspector,
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout},
};

use crate::{
    access_log::AccessLog,
    boxed::boxed,
    clock,
    config_error::ConfigError,
    drain::Drain,
    filter_chain::{Candidate, FilterChain, FilterChains, Place, Terminal},
    format::Facts,
    info::{ConnectionInfo, OriginalSrc, ResponseFlags, StreamInfo},
    inspector::{self, InspectError, Inspectors, Sniffed},
    net::Transport,
    proto::{invalid, timeout as optional_timeout, unpack},
    shared::Shared,
    stats::{self, Counter, Gauge, Histogram, Registry, Scope},
    tls::stats::TlsStats,
};

mod destination;

pub use destination::Destinations;

/// What the echo filter reads at once.
const ECHO_BUFFER: usize = 16 * 1024;
/// Envoy's default for `listener_filters_timeout`.
const INSPECT: Duration = Duration::from_secs(15);

/// A compiled listener.
#[derive(Debug)]
pub struct Listener {
    /// Its name.
    pub name: Arc<str>,
    /// Where it listens.
    pub address: SocketAddr,
    /// More addresses.
    pub additional: Vec<SocketAddr>,
    /// Whether it has a socket of its own.
    pub bind_to_port: bool,
    /// Length of the accept queue.
    pub backlog: u32,
    pub(crate) shared: Arc<Shared>,
    /// Drains this listener's connections when it is removed.
    pub(crate) drain: Drain,
    /// Drains all connections of the process.
    process_drain: Drain,
    chains: FilterChains,
    inspectors: Inspectors,
    /// What becomes of the address a connection was meant for.
    original_dst: OriginalDestination,
    /// Connections to upstreams come from the address of the downstream, with this mark. Envoy:
    /// `envoy.filters.listener.original_src`.
    original_src: Option<u32>,
    /// Takes connections to any address. Envoy: `transparent`, for TPROXY.
    pub(crate) transparent: bool,
    inspect_limit: Option<Duration>,
    continue_on_timeout: bool,
    access_log: Vec<AccessLog>,
    stats: Stats,
}

/// Whether the address counts to which a connection went before the kernel redirected it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OriginalDestination {
    /// It is not asked for.
    Ignored,
    /// It is the connection's local address. Envoy: `envoy.filters.listener.original_dst`.
    Restored,
    /// It is, and the listener that has it serves the connection if there is one. Envoy: `use_original_dst`.
    HandedOn,
}

/// Something a listener waits for before it can serve.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Dependency {
    /// A route table of this name.
    Routes(Arc<str>),
    /// A secret of this name.
    Secret(Arc<str>),
}

/// `listener.ADDRESS.*`.
#[derive(Debug)]
struct Stats {
    total: Counter,
    active: Gauge,
    destroy: Counter,
    length: Histogram,
    no_filter_chain: Counter,
    pre_timeout: Counter,
    inspect_error: Counter,
    inspecting: Gauge,
    tls_inspector: TlsInspectorStats,
    tls: TlsStats,
    handshake_timeout: Counter,
    /// Of each worker, made when it takes its first connection: `worker_N.downstream_cx_total` and `…_active`.
    workers: Box<[OnceLock<(Counter, Gauge)>]>,
    scope: Scope,
}

/// `tls_inspector.*`.
#[derive(Debug)]
struct TlsInspectorStats {
    tls_found: Counter,
    tls_not_found: Counter,
    alpn_found: Counter,
    alpn_not_found: Counter,
    sni_found: Counter,
    sni_not_found: Counter,
    connection_closed: Counter,
}

impl TlsInspectorStats {
    fn new(scope: &Scope) -> TlsInspectorStats {
        TlsInspectorStats {
            tls_found: scope.counter("tls_found"),
            tls_not_found: scope.counter("tls_not_found"),
            alpn_found: scope.counter("alpn_found"),
            alpn_not_found: scope.counter("alpn_not_found"),
            sni_found: scope.counter("sni_found"),
            sni_not_found: scope.counter("sni_not_found"),
            connection_closed: scope.counter("connection_closed"),
        }
    }

    fn count(&self, sniffed: &Sniffed) {
        if !sniffed.tls {
            self.tls_not_found.inc();
            return;
        }
        self.tls_found.inc();
        match sniffed.protocols.is_empty() {
            false => self.alpn_found.inc(),
            true => self.alpn_not_found.inc(),
        }
        match sniffed.server_name {
            Some(_) => self.sni_found.inc(),
            None => self.sni_not_found.inc(),
        }
    }
}

impl Stats {
    fn new(scope: &Scope, registry: &Registry) -> Stats {
        Stats {
            total: scope.counter("downstream_cx_total"),
            active: scope.gauge("downstream_cx_active"),
            destroy: scope.counter("downstream_cx_destroy"),
            length: scope.histogram("downstream_cx_length_ms"),
            no_filter_chain: scope.counter("no_filter_chain_match"),
            pre_timeout: scope.counter("downstream_pre_cx_timeout"),
            inspect_error: scope.counter("downstream_listener_filter_error"),
            inspecting: scope.gauge("downstream_pre_cx_active"),
            tls_inspector: TlsInspectorStats::new(&registry.scope("tls_inspector.")),
            tls: TlsStats::new(scope),
            handshake_timeout: scope.counter("downstream_cx_transport_socket_connect_timeout"),
            workers: (0..stats::SHARDS).map(|_| OnceLock::new()).collect(),
            scope: scope.clone(),
        }
    }

    /// Of the worker that calls this.
    fn worker(&self) -> Option<&(Counter, Gauge)> {
        let worker = stats::worker();
        let make = || {
            // The first place is everybody else's.
            let scope = &self.scope;
            let name = format!("worker_{}.downstream_cx_", worker.saturating_sub(1));
            (
                scope.counter(&format!("{name}total")),
                scope.gauge(&format!("{name}active")),
            )
        };
        Some(self.workers.get(worker)?.get_or_init(make))
    }
}

impl Listener {
    /// Compiles Envoy's `Listener`.
    ///
    /// # Errors
    /// When something is invalid, or not supported and would change what happens.
    pub fn compile(
        config: &proto::Listener,
        shared: &Arc<Shared>,
    ) -> Result<Arc<Listener>, ConfigError> {
        compile(config, shared)
            .map(Arc::new)
            .map_err(|error| error.within(format_args!("listener {}", config.name)))
    }

    /// What it waits for; empty when it can serve.
    pub fn waiting_for(&self) -> Vec<Dependency> {
        let mut waiting = Vec::new();
        for chain in self.chains.all() {
            if let Terminal::Http(manager) = &chain.terminal
                && let Some(slot) = manager.waiting_for()
            {
                waiting.push(Dependency::Routes(slot.name().clone()));
            }
            for secret in chain.tls.iter().flat_map(|tls| tls.waiting_for()) {
                waiting.push(Dependency::Secret(secret.name().clone()));
            }
        }
        waiting
    }

    /// Serves an accepted connection to its end.
    #[expect(
        clippy::manual_async_fn,
        reason = "an async fn keeps its arguments twice, and a connection that waits should weigh little"
    )]
    pub(crate) fn serve(
        self: Arc<Self>,
        socket: TcpStream,
        peer: SocketAddr,
        accepted: Instant,
    ) -> impl Future<Output = ()> {
        // Boxes go when what is in them has been done.
        async move {
            let (listener, original) = self.destination(&socket);
            let _open = Open::new(&listener.stats, accepted);
            let Some(prepared) = boxed(|| listener.begin(socket, peer, original, accepted)).await
            else {
                return;
            };
            let _places = prepared.places;
            let (transport, read, info) = (prepared.transport, prepared.read, prepared.connection);
            if let Terminal::Http(manager) = &prepared.chain.terminal {
                // It holds what it needs; a chain that was replaced goes when its connections have begun.
                let manager = manager.clone();
                drop(prepared.chain);
                let drains = vec![listener.process_drain.clone(), listener.drain.clone()];
                let mut serving = boxed(|| manager.serve(transport, read, info, drains));
                poll_fn(|task| clock::turn(|| serving.as_mut().poll(task))).await;
            } else {
                boxed(|| listener.tcp(prepared.chain, transport, read, info)).await;
            }
        }
    }

    /// The listener that serves a connection accepted here, and where the connection was going if that is known.
    fn destination(self: Arc<Self>, socket: &TcpStream) -> (Arc<Listener>, Option<SocketAddr>) {
        if self.original_dst == OriginalDestination::Ignored {
            return (self, None);
        }
        let original = destination::of(socket, self.transparent);
        let handed_on = match (self.original_dst, original) {
            (OriginalDestination::HandedOn, Some(address)) => {
                self.shared.destinations.find(address)
            }
            _ => None,
        };
        (handed_on.unwrap_or(self), original)
    }

    /// All addresses, whether bound or not.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        std::iter::once(self.address).chain(self.additional.iter().copied())
    }

    /// All that comes before the protocol is spoken.
    async fn begin(
        &self,
        socket: TcpStream,
        peer: SocketAddr,
        original: Option<SocketAddr>,
        accepted: Instant,
    ) -> Option<Prepared> {
        let mut prepared = self.prepare(socket, peer, original, accepted).await?;
        let chain = &prepared.chain;
        if matches!(chain.terminal, Terminal::Http(_)) {
            if !chain.rbac.is_empty() {
                let mut info = StreamInfo::new(prepared.connection.clone(), None);
                if !chain.rbac.iter().all(|rbac| rbac.admits(&mut info)) {
                    self.log(info);
                    return None;
                }
            }
            prepared.places = chain.admit().await?;
        }
        Some(prepared)
    }

    /// What comes before the first network filter: inspectors, the choice of a chain, TLS. `None` if the
    /// connection is not to be served.
    async fn prepare(
        &self,
        mut socket: TcpStream,
        direct_remote: SocketAddr,
        original: Option<SocketAddr>,
        accepted: Instant,
    ) -> Option<Prepared> {
        let socket_local = socket.local_addr().ok()?;
        let mut read = BytesMut::new();
        let mut sniffed = Sniffed::default();
        if self.inspectors.any() {
            let _inspecting = Counting::new(&self.stats.inspecting);
            match self
                .inspectors
                .inspect(&mut socket, &mut read, self.inspect_limit)
                .await
            {
                Ok((found, false)) => {
                    if self.inspectors.tls {
                        self.stats.tls_inspector.count(&found);
                    }
                    sniffed = found;
                }
                Ok((found, true)) => {
                    self.stats.pre_timeout.inc();
                    if !self.continue_on_timeout {
                        return None;
                    }
                    sniffed = found;
                }
                Err(error) => {
                    self.stats.inspect_error.inc();
                    if self.inspectors.tls && matches!(error, InspectError::Closed) {
                        self.stats.tls_inspector.connection_closed.inc();
                    }
                    tracing::debug!(%error, listener = %self.name, "connection dropped before a filter chain was chosen");
                    return None;
                }
            }
        }
        let (remote, local) = match (sniffed.proxied, original) {
            (Some((source, destination)), _) => (source, destination),
            (None, Some(original)) => (direct_remote, original),
            (None, None) => (direct_remote, socket_local),
        };
        let candidate = Candidate {
            local,
            remote,
            direct_remote,
            sniffed: &sniffed,
        };
        let chain = self.chains.find(&candidate);
        let mut connection = ConnectionInfo {
            id: next_id(),
            remote,
            direct_remote,
            local,
            local_restored: sniffed.proxied.is_some() || original.is_some(),
            tls: None,
            requested_server_name: sniffed.server_name,
            filter_chain: None,
            original_src: self.original_src.map(|mark| OriginalSrc {
                ip: remote.ip(),
                mark,
            }),
            started: accepted,
        };
        let Some(chain) = chain else {
            self.stats.no_filter_chain.inc();
            self.refuse(
                connection,
                ResponseFlags::NO_ROUTE_FOUND,
                "filter_chain_not_found",
            );
            return None;
        };
        connection.filter_chain.clone_from(&chain.name);
        let mut transport = Transport::from(socket);
        if let Some(tls) = &chain.tls {
            let handshake = tls.accept(transport, std::mem::take(&mut read).into());
            match timeout(chain.handshake, handshake).await {
                Ok(Ok((stream, info))) => {
                    self.stats.tls.done(stream.common());
                    connection.tls = Some(Box::new(info));
                    transport = stream.into();
                }
                Ok(Err(error)) => {
                    self.stats.tls.failed(&error);
                    if let Terminal::Http(manager) = &chain.terminal {
                        manager.count_stillborn();
                    }
                    tracing::debug!(%error, listener = %self.name, %remote, "TLS handshake failed");
                    self.refuse(connection, ResponseFlags::default(), "");
                    return None;
                }
                Err(_) => {
                    self.stats.handshake_timeout.inc();
                    self.refuse(
                        connection,
                        ResponseFlags::default(),
                        "transport_socket_timeout",
                    );
                    return None;
                }
            }
        }
        Some(Prepared {
            chain,
            places: Vec::new(),
            transport,
            read,
            connection: Rc::new(connection),
        })
    }

    async fn tcp(
        &self,
        chain: Arc<FilterChain>,
        transport: Transport,
        read: BytesMut,
        connection: Rc<ConnectionInfo>,
    ) {
        let record = TcpRecord {
            info: Rc::new(RefCell::new(StreamInfo::new(connection, None))),
            logs: match &chain.terminal {
                Terminal::Tcp(_, logs) => logs,
                _ => &[],
            },
        };
        if !chain
            .rbac
            .iter()
            .all(|rbac| rbac.admits(&mut record.info.borrow_mut()))
        {
            return;
        }
        let Some(_places) = chain.admit().await else {
            return;
        };
        // Reports until it is dropped, which is before the record is.
        let _report = match &chain.mixer {
            None => None,
            Some(mixer) => match mixer.open(&self.shared, &record.info).await {
                Some(report) => Some(report),
                None => return,
            },
        };
        let served = match &chain.terminal {
            Terminal::Tcp(proxy, _) => {
                if chain.sni_cluster {
                    let mut info = record.info.borrow_mut();
                    info.upstream_cluster = info.connection.requested_server_name.clone();
                }
                proxy
                    .serve(&self.shared, transport, read.freeze(), &record.info)
                    .await;
                Ok(())
            }
            Terminal::Echo => echo(transport, &read).await,
            Terminal::Answer(bytes) => answer(transport, bytes).await,
            // Not here.
            Terminal::Http(_) => Ok(()),
        };
        if let Err(error) = served {
            tracing::debug!(%error, listener = %self.name, "connection failed");
        }
    }

    /// Writes the listener's access log for a connection that no chain took.
    fn refuse(&self, connection: ConnectionInfo, flags: ResponseFlags, details: &'static str) {
        if self.access_log.is_empty() {
            return;
        }
        let mut info = StreamInfo::new(Rc::new(connection), None);
        info.flags = flags;
        info.response_code_details = details.into();
        self.log(info);
    }

    fn log(&self, mut info: StreamInfo) {
        info.response_end = Some(info.start.elapsed());
        for log in &self.access_log {
            log.write(&Facts::of_connection(&info));
        }
    }
}

/// Sends back what comes, until no more does.
async fn echo(mut transport: Transport, read: &[u8]) -> io::Result<()> {
    transport.write_all(read).await?;
    let mut buffer = vec![0; ECHO_BUFFER];
    loop {
        transport.flush().await?;
        let n = transport.read(&mut buffer).await?;
        if n == 0 {
            return transport.shutdown().await;
        }
        transport
            .write_all(buffer.get(..n).unwrap_or_default())
            .await?;
    }
}

/// Sends the bytes, and closes.
async fn answer(mut transport: Transport, bytes: &[u8]) -> io::Result<()> {
    transport.write_all(bytes).await?;
    transport.flush().await?;
    transport.shutdown().await
}

/// A connection that has its filter chain, and TLS if that ends here.
struct Prepared {
    chain: Arc<FilterChain>,
    /// In the limits of the chain.
    places: Vec<Place>,
    transport: Transport,
    /// What was read of it already.
    read: BytesMut,
    connection: Rc<ConnectionInfo>,
}

/// Writes the access log of a TCP connection when it ends.
struct TcpRecord<'a> {
    info: Rc<RefCell<StreamInfo>>,
    logs: &'a [AccessLog],
}

impl Drop for TcpRecord<'_> {
    fn drop(&mut self) {
        let mut info = self.info.borrow_mut();
        info.response_end = Some(info.start.elapsed());
        for log in self.logs {
            log.write(&Facts::of_connection(&info));
        }
    }
}

/// A gauge that is one higher as long as this lives.
struct Counting<'a>(&'a Gauge);

impl<'a> Counting<'a> {
    fn new(gauge: &'a Gauge) -> Counting<'a> {
        gauge.inc();
        Counting(gauge)
    }
}

impl Drop for Counting<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Counts an open connection as long as it lives.
struct Open<'a> {
    stats: &'a Stats,
    since: Instant,
}

impl<'a> Open<'a> {
    fn new(stats: &'a Stats, since: Instant) -> Open<'a> {
        stats.total.inc();
        stats.active.inc();
        if let Some((total, active)) = stats.worker() {
            total.inc();
            active.inc();
        }
        Open { stats, since }
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.stats.active.dec();
        if let Some((_, active)) = self.stats.worker() {
            active.dec();
        }
        self.stats.destroy.inc();
        let lived = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.stats.length.record(lived);
    }
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn compile(config: &proto::Listener, shared: &Arc<Shared>) -> Result<Listener, ConfigError> {
    let unsupported = [
        (
            "filter_chain_matcher",
            config.filter_chain_matcher.is_some(),
        ),
        ("fcds_config", config.fcds_config.is_some()),
        ("udp_listener_config", config.udp_listener_config.is_some()),
        ("api_listener", config.api_listener.is_some()),
        ("listener_specifier", config.listener_specifier.is_some()),
        ("socket_options", !config.socket_options.is_empty()),
    ];
    if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
        return Err(invalid(*field, "not supported"));
    }
    let address = socket_address(config.address.as_ref())?;
    let additional = config
        .additional_addresses
        .iter()
        .map(|additional| socket_address(additional.address.as_ref()))
        .collect::<Result<_, _>>()?;
    let (inspectors, mut original_dst, original_src) = listener_filters(config)?;
    if config.use_original_dst.as_ref().is_some_and(|on| on.value) {
        if inspectors.proxy_protocol.is_some() {
            return Err(invalid(
                "use_original_dst",
                "not together with the PROXY protocol: each says where a connection was going",
            ));
        }
        original_dst = OriginalDestination::HandedOn;
    }
    let chains = FilterChains::compile(config, shared)?;
    let scope = match config.stat_prefix.as_str() {
        "" => format!("listener.{}.", address.to_string().replace(':', "_")),
        prefix => format!("listener.{prefix}."),
    };
    let deprecated = config
        .deprecated_v1
        .as_ref()
        .and_then(|v1| v1.bind_to_port.as_ref());
    Ok(Listener {
        name: match config.name.as_str() {
            "" => address.to_string().into(),
            name => name.into(),
        },
        address,
        additional,
        bind_to_port: config
            .bind_to_port
            .as_ref()
            .or(deprecated)
            .is_none_or(|bind| bind.value),
        backlog: config
            .tcp_backlog_size
            .as_ref()
            .map_or(1024, |size| size.value),
        shared: shared.clone(),
        drain: Drain::new(shared.drain.time()),
        process_drain: match config.drain_type() {
            proto::listener::DrainType::Default => shared.drain.clone(),
            proto::listener::DrainType::ModifyOnly => shared.drain.clone().patient(),
        },
        chains,
        inspectors,
        original_dst,
        original_src,
        transparent: config.transparent.as_ref().is_some_and(|on| on.value),
        inspect_limit: optional_timeout(
            "listener_filters_timeout",
            config.listener_filters_timeout.as_ref(),
            Some(INSPECT),
        )?,
        continue_on_timeout: config.continue_on_listener_filters_timeout,
        access_log: AccessLog::compile_all(&config.access_log)?,
        stats: Stats::new(&shared.stats.scope(&scope), &shared.stats),
    })
}

fn listener_filters(
    config: &proto::Listener,
) -> Result<(Inspectors, OriginalDestination, Option<u32>), ConfigError> {
    let mut inspectors = Inspectors::default();
    let mut original_dst = OriginalDestination::Ignored;
    let mut original_src = None;
    for filter in &config.listener_filters {
        let within =
            |error: ConfigError| error.within(format_args!("listener filter {}", filter.name));
        if filter.filter_disabled.is_some() {
            return Err(within(invalid("filter_disabled", "not supported")));
        }
        let Some(proto::listener_filter::ConfigType::TypedConfig(any)) =
            filter.config_type.as_ref()
        else {
            return Err(within(invalid("typed_config", "absent")));
        };
        if unpack::<TlsInspector>(any).map_err(within)?.is_some() {
            inspectors.tls = true;
        } else if unpack::<HttpInspector>(any).map_err(within)?.is_some() {
            inspectors.http = true;
        } else if unpack::<OriginalDst>(any).map_err(within)?.is_some() {
            original_dst = OriginalDestination::Restored;
        } else if let Some(source) = unpack::<OriginalSrcProto>(any).map_err(within)? {
            original_src = Some(source.mark);
        } else if let Some(proxy) = unpack::<ProxyProtocol>(any).map_err(within)? {
            if !proxy.rules.is_empty() {
                return Err(within(invalid("rules", "not supported")));
            }
            let refuses = |version: Version| proxy.disallowed_versions().any(|v| v == version);
            inspectors.proxy_protocol = Some(inspector::ProxyProtocol {
                optional: proxy.allow_requests_without_proxy_protocol,
                refuses_v1: refuses(Version::V1),
                refuses_v2: refuses(Version::V2),
            });
        } else {
            return Err(within(invalid(
                any.type_url.clone(),
                "this listener filter is not supported",
            )));
        }
    }
    Ok((inspectors, original_dst, original_src))
}

fn socket_address(address: Option<&Address>) -> Result<SocketAddr, ConfigError> {
    let path = "address";
    match address.and_then(|address| address.address.as_ref()) {
        Some(address::Address::SocketAddress(socket)) => {
            let ip = socket
                .address
                .parse()
                .map_err(|_| invalid(path, format!("malformed IP address: {}", socket.address)))?;
            match socket.port_specifier.as_ref() {
                Some(PortSpecifier::PortValue(port)) => {
                    let port = u16::try_from(*port)
                        .map_err(|_| invalid(path, format!("{port} is not a port")))?;
                    Ok(SocketAddr::new(ip, port))
                }
                Some(PortSpecifier::NamedPort(_)) | None => Err(invalid(path, "no port_value")),
            }
        }
        Some(_) => Err(invalid(path, "only socket addresses are supported")),
        None => Err(invalid(path, "absent")),
    }
}
