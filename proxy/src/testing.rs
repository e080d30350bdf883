//! What tests of several modules need: shared state without a control plane, configuration from YAML,
//! and small servers and clients that speak plain HTTP over real sockets.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use lateen_protocols::{
    envoy::envoy::config::{
        cluster::v3::Cluster, listener::v3::Listener as ListenerProto,
        route::v3::RouteConfiguration,
    },
    json,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{
    cluster::ClusterManager, drain::Drain, listener::Listener, route::RouteTable,
    secret::SecretStore, shared::Shared, stats::Registry, worker::Workers,
};

/// Nothing on loopback takes this long unless it hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// Shared state with nothing in it. Needs a tokio runtime around it.
pub(crate) fn shared() -> Arc<Shared> {
    Arc::new(Shared {
        stats: Registry::new(),
        clusters: ClusterManager::new(),
        routes: crate::route::RouteSlots::default(),
        destinations: Default::default(),
        secrets: SecretStore::new(),
        drain: Drain::new(Duration::from_secs(5)),
        node: Default::default(),
        layers: Default::default(),
        runtime: tokio::runtime::Handle::current(),
    })
}

/// Compiles a route table from YAML.
pub(crate) fn table(yaml: &str) -> Arc<RouteTable> {
    try_table(yaml).expect("a valid route table")
}

/// Compiles a route table from YAML, or says why not.
pub(crate) fn try_table(yaml: &str) -> Result<Arc<RouteTable>, String> {
    let config: RouteConfiguration = json::from_yaml(yaml).map_err(|error| error.to_string())?;
    RouteTable::compile(&config, &shared())
        .map(Arc::new)
        .map_err(|error| error.to_string())
}

/// A proxy of one worker in this process.
pub(crate) struct Proxy {
    pub(crate) shared: Arc<Shared>,
    pub(crate) workers: Workers,
}

impl Proxy {
    pub(crate) fn start() -> Proxy {
        let shared = shared();
        Proxy {
            workers: Workers::start(1, shared.clone()).expect("threads"),
            shared,
        }
    }

    /// Adds a listener on 127.0.0.1, port 0; gives its address. `rest` is YAML beside name and address.
    pub(crate) fn listen(&self, name: &str, rest: &str) -> SocketAddr {
        let listener = self.compile(name, rest).expect("a valid listener");
        self.workers.add_listener(listener).expect("a free port");
        self.workers.addresses(name)[0]
    }

    pub(crate) fn compile(&self, name: &str, rest: &str) -> Result<Arc<Listener>, String> {
        let yaml = format!(
            "name: {name}\naddress: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}\n{rest}"
        );
        let proto: ListenerProto = json::from_yaml(&yaml).map_err(|error| error.to_string())?;
        Listener::compile(&proto, &self.shared).map_err(|error| error.to_string())
    }

    /// Adds a static cluster with one endpoint; `rest` is YAML beside name and endpoints.
    pub(crate) fn cluster(&self, name: &str, endpoint: SocketAddr, rest: &str) {
        let yaml = format!(
            "name: {name}\nconnect_timeout: 1s\nload_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: \
             [{{endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}}}]}}]}}\n{rest}",
            endpoint.ip(),
            endpoint.port()
        );
        let proto: Cluster = json::from_yaml(&yaml).expect("a cluster in YAML");
        self.shared
            .clusters
            .apply(&proto, &self.shared)
            .expect("a valid cluster");
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        self.shared.stats.value(name).unwrap_or_default()
    }

    /// Waits until a statistic has a value; they are written when a stream ends, which its client does not see.
    pub(crate) async fn wait_for(&self, name: &str, value: u64) {
        let reached = async {
            while self.counter(name) != value {
                tokio::task::yield_now().await;
            }
        };
        if timeout(LIMIT, reached).await.is_err() {
            panic!("{name} is {} instead of {value}", self.counter(name));
        }
    }
}

/// YAML of a listener whose one chain has a connection manager; `rest` is YAML of more fields of it.
pub(crate) fn http(vhosts: &str, rest: &str) -> String {
    format!("filter_chains:\n- filters: [{}]\n", manager(vhosts, rest))
}

/// YAML of a connection manager filter.
pub(crate) fn manager(vhosts: &str, rest: &str) -> String {
    let rest = if rest.is_empty() {
        String::new()
    } else {
        format!(", {rest}")
    };
    format!(
        "{{name: hcm, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.network.\
         http_connection_manager.v3.HttpConnectionManager, stat_prefix: t, route_config: {{virtual_hosts: {vhosts}}}, \
         http_filters: [{{name: envoy.filters.http.router, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]{rest}}}}}"
    )
}

/// Sends bytes, reads until the peer closes.
pub(crate) async fn exchange(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.expect("connect");
    stream.write_all(request).await.expect("write");
    read_all(&mut stream).await
}

/// Reads until the peer closes or resets.
pub(crate) async fn read_all(stream: &mut TcpStream) -> String {
    let mut all = Vec::new();
    let read = async {
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(n) => all.extend_from_slice(&buffer[..n]),
            }
        }
    };
    timeout(LIMIT, read).await.expect("the peer closes");
    String::from_utf8_lossy(&all).into_owned()
}
