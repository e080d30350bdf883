//! Puts a proxy together: bootstrap → main runtime → workers → static configuration → xDS → ready;
//! and takes it apart again: drain, then leave.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    io,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use lateen_service::{
    identity::{IdentityError, Source as Identity},
    shutdown,
};
use tokio::{
    runtime::Handle,
    signal::unix::{SignalKind, signal},
    sync::Notify,
    task::{AbortHandle, JoinSet},
    time::Instant,
};

use crate::{
    admin::{self, Admin},
    bootstrap::{Bootstrap, DiscoverySource, GrpcSource},
    cluster::ClusterManager,
    config::Options,
    config_error::ConfigError,
    control::{Control, Dynamic, Phase},
    drain::Drain,
    layers::RuntimeLayers,
    listener::Listener,
    logging::Logging,
    pages,
    route::RouteSlots,
    secret::{Certificate, SecretSlot, SecretStore, Source, Trust},
    shared::Shared,
    stats::Registry,
    worker::Workers,
    xds::{
        Kind, Sink, Wanted,
        client::{Client, Service},
        file,
        target::Target,
    },
};

/// How often files that secrets name are looked at.
const SECRET_FILES_POLL: Duration = Duration::from_millis(250);
/// How often a drain looks whether everybody has gone.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// Why a proxy does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The identity's flags are wrong.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The admin address cannot be bound.
    #[error("cannot bind the admin address {0}")]
    Admin(SocketAddr, #[source] io::Error),
    /// A file that flags name cannot be written.
    #[error("cannot write {0}")]
    Write(String, #[source] io::Error),
    /// Threads or signal handlers cannot be made.
    #[error("the operating system refuses a thread, a runtime or a signal handler")]
    System(#[from] io::Error),
}

/// A running proxy.
#[derive(Debug)]
pub struct Server {
    control: Arc<Control>,
    admin: Option<SocketAddr>,
    quit: Arc<Notify>,
    /// Everything that runs beside the workers; ends when this is dropped.
    tasks: JoinSet<()>,
    identity: shutdown::Drain,
    shutdown_time: Duration,
}

fn shared(
    bootstrap: &Bootstrap,
    drain: Drain,
    runtime: Handle,
) -> Result<Arc<Shared>, ConfigError> {
    Ok(Arc::new(Shared {
        stats: Registry::new(),
        clusters: ClusterManager::new(),
        routes: RouteSlots::default(),
        destinations: Default::default(),
        secrets: SecretStore::new(),
        drain,
        node: bootstrap.node.clone(),
        layers: RuntimeLayers::new(bootstrap.proto.layered_runtime.as_ref())
            .map_err(|error| error.within("layered_runtime"))?,
        runtime,
    }))
}

/// Compiles everything the bootstrap says without serving any of it.
///
/// # Errors
/// The first thing that is wrong, with the path to it.
pub fn validate(options: &Options, runtime: Handle) -> Result<(), ConfigError> {
    let bootstrap = Bootstrap::load(&options.origin())?;
    let shared = shared(&bootstrap, Drain::new(options.drain_time()), runtime)?;
    let resources = bootstrap.proto.static_resources.clone().unwrap_or_default();
    let within = |field: &'static str| {
        move |e: ConfigError| e.within(format_args!("static_resources.{field}"))
    };
    for secret in &resources.secrets {
        shared
            .secrets
            .slot(&secret.name)
            .set(secret)
            .map_err(within("secrets"))?;
    }
    for cluster in bootstrap.clusters() {
        shared
            .clusters
            .apply(&cluster, &shared)
            .map_err(within("clusters"))?;
    }
    for listener in &resources.listeners {
        Listener::compile(listener, &shared).map_err(within("listeners"))?;
    }
    let streams = bootstrap.ads.iter().chain(
        [&bootstrap.dynamic_clusters, &bootstrap.listeners]
            .into_iter()
            .filter_map(|source| match source {
                Some(DiscoverySource::Grpc(grpc)) => Some(grpc),
                _ => None,
            }),
    );
    for stream in streams {
        target(&bootstrap, &stream.cluster, &shared.secrets)?;
    }
    Ok(())
}

fn target(bootstrap: &Bootstrap, name: &str, secrets: &SecretStore) -> Result<Target, ConfigError> {
    let cluster = bootstrap
        .cluster(name)
        .ok_or_else(|| ConfigError::new(format!("cluster {name}"), "is not in the bootstrap"))?;
    Target::compile(&cluster, secrets)
}

impl Server {
    /// Starts everything; returns when static configuration is in place and the streams are under way.
    /// Must be called on the main runtime.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(options: &Options, logging: Logging) -> Result<Server, StartError> {
        let started = Instant::now();
        let bootstrap = Arc::new(Bootstrap::load(&options.origin())?);
        lateen_protocols::json::unload(); // several MB, not needed again until somebody asks for a dump
        let shared = shared(
            &bootstrap,
            Drain::new(options.drain_time()),
            Handle::current(),
        )?;
        let identity = shutdown::Drain::new();
        let mut tasks = JoinSet::new();
        if let Some(source) = Identity::start(&options.identity, &identity)? {
            let (certificate, roots) = shared.secrets.use_own_identity();
            tasks.spawn(follow_identity(source, certificate, roots));
        }
        let workers = Workers::start(options.workers(), shared.clone())?;
        let dynamic = Dynamic {
            clusters: bootstrap.dynamic_clusters.is_some(),
            listeners: bootstrap.listeners.is_some(),
        };
        let control = Control::new(shared.clone(), workers, dynamic);
        let resources = bootstrap.proto.static_resources.clone().unwrap_or_default();
        control.start(
            &resources.secrets,
            bootstrap.clusters(),
            &resources.listeners,
        )?;
        let mut server = Server {
            control,
            admin: None,
            quit: Arc::default(),
            tasks,
            identity,
            shutdown_time: options.shutdown_time(),
        };
        server.count(options.workers());
        if let Some(address) = bootstrap.admin {
            let admin = Arc::new(Admin {
                control: server.control.clone(),
                bootstrap: bootstrap.clone(),
                options: options.show(),
                started,
                quit: server.quit.clone(),
                logging,
            });
            let (address, serve) = admin
                .bind(address)
                .await
                .map_err(|e| StartError::Admin(address, e))?;
            server.tasks.spawn(serve);
            server.admin = Some(address);
            tracing::info!(%address, "admin bound");
            if let Some(path) = &options.admin_address_path {
                let failed = |e| StartError::Write(path.display().to_string(), e);
                std::fs::write(path, address.to_string()).map_err(failed)?;
            }
        }
        server.discover(&bootstrap)?;
        let mut phase = server.control.phase();
        server.tasks.spawn(async move {
            if phase.wait_for(|phase| *phase == Phase::Live).await.is_ok() {
                pages::give_back();
            }
        });
        Ok(server)
    }

    /// Begins following everything the bootstrap names besides itself.
    fn discover(&mut self, bootstrap: &Arc<Bootstrap>) -> Result<(), ConfigError> {
        let sink: Arc<dyn Sink> = self.control.clone();
        let secrets = &self.control.shared().secrets;
        let client = |grpc: &GrpcSource, service: Service, kinds: &[Kind], source: Source| {
            Ok::<_, ConfigError>(Client {
                sink: sink.clone(),
                target: target(bootstrap, &grpc.cluster, secrets)?,
                service,
                kinds: kinds.to_vec(),
                delta: grpc.delta,
                metadata: grpc.metadata.clone(),
                node: bootstrap.node.clone(),
                source,
            })
        };
        if let Some(ads) = &bootstrap.ads {
            let on_ads =
                |source: &Option<DiscoverySource>| matches!(source, Some(DiscoverySource::Ads));
            let mut kinds = vec![Kind::Endpoint, Kind::Route, Kind::Secret];
            kinds.extend(on_ads(&bootstrap.dynamic_clusters).then_some(Kind::Cluster));
            kinds.extend(on_ads(&bootstrap.listeners).then_some(Kind::Listener));
            self.tasks
                .spawn(client(ads, Service::Aggregated, &kinds, Source::Ads)?.run());
        }
        for (source, service, kind) in [
            (
                &bootstrap.dynamic_clusters,
                Service::Clusters,
                Kind::Cluster,
            ),
            (&bootstrap.listeners, Service::Listeners, Kind::Listener),
        ] {
            match source {
                Some(DiscoverySource::Grpc(grpc)) => {
                    let client = client(grpc, service, &[kind], Source::Ads)?;
                    self.tasks.spawn(client.run());
                }
                Some(DiscoverySource::Path(path)) => {
                    self.tasks
                        .spawn(file::follow(sink.clone(), kind, path.clone(), Source::Ads));
                }
                Some(DiscoverySource::Ads) | None => {}
            }
        }
        self.tasks
            .spawn(follow_sources(self.control.clone(), bootstrap.clone()));
        self.tasks.spawn(reload_secret_files(secrets.clone()));
        self.tasks.spawn(count_state(self.control.clone()));
        self.tasks.spawn(reopen_logs());
        Ok(())
    }

    fn count(&self, workers: usize) {
        let stats = &self.control.shared().stats;
        let scope = stats.scope("server.");
        scope.gauge("concurrency").set(workers as u64);
        scope.gauge("version").set(1);
        scope.gauge("hot_restart_epoch").set(0);
        scope.gauge("live").set(1);
        scope.gauge("state").set(1);
        stats
            .scope("listener_manager.")
            .gauge("workers_started")
            .set(1);
    }

    /// Where admin listens.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// What it runs on.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Waits until everything configured serves.
    pub async fn ready(&self) {
        let mut phase = self.control.phase();
        // The sender lives in the control, so waiting cannot fail.
        drop(phase.wait_for(|phase| *phase == Phase::Live).await);
    }

    /// Serves until `stop` completes or admin says so, then drains and ends.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        // Both branches are cancel-safe: nothing comes after them.
        tokio::select! {
            () = stop => {}
            () = self.quit.notified() => tracing::info!("told to quit by admin"),
        }
        let drain = self.control.shared().drain.clone();
        drain.start();
        self.control.workers().drain_all();
        let limit = drain.time().min(self.shutdown_time);
        let workers = self.control.workers();
        let empty = async {
            while workers.active() > 0 {
                tokio::time::sleep(DRAIN_POLL).await;
            }
        };
        if tokio::time::timeout(limit, empty).await.is_err() {
            tracing::warn!(
                connections = workers.active(),
                "closing what did not finish in time"
            );
        }
        workers.stop();
        self.tasks.shutdown().await;
        self.identity.begin();
        tracing::info!("done");
    }
}

/// Each new certificate goes into the slots; the next handshakes use it.
async fn follow_identity(source: Identity, certificate: Arc<SecretSlot>, roots: Arc<SecretSlot>) {
    let mut newest = source.subscribe();
    loop {
        if let Some(svid) = newest.borrow_and_update().clone() {
            match Trust::from_pem(svid.bundle().all_pem().as_bytes()) {
                Ok(trust) => roots.set_trust(trust),
                Err(error) => tracing::error!(%error, "the trust bundle cannot be used"),
            }
            match Certificate::from_pem(svid.chain_pem().as_bytes(), svid.key_pem().as_bytes()) {
                Ok(own) => {
                    tracing::info!(identity = %svid.spiffe_id(), "certificate in use");
                    certificate.set_certificate(own);
                }
                Err(error) => tracing::error!(%error, "the certificate cannot be used"),
            }
        }
        if newest.changed().await.is_err() {
            return;
        }
    }
}

/// Secrets may come from streams and files of their own, which TLS contexts name as they come; endpoints and
/// routes from files that clusters and listeners name.
async fn follow_sources(control: Arc<Control>, bootstrap: Arc<Bootstrap>) {
    let mut wanted = control.wanted();
    let mut known = BTreeSet::new();
    // Dropped together with this future.
    let mut running = JoinSet::new();
    let mut files = BTreeMap::new();
    loop {
        let present = wanted.borrow_and_update().clone();
        follow_files(&control, &present, &mut files, &mut running);
        let sources: Vec<Source> = present.secrets.into_keys().collect();
        for source in sources {
            if !known.insert(source.clone()) {
                continue;
            }
            let sink: Arc<dyn Sink> = control.clone();
            match &source {
                Source::Grpc(cluster) => {
                    let secrets = &control.shared().secrets;
                    match target(&bootstrap, cluster, secrets) {
                        Ok(target) => {
                            let client = Client {
                                sink,
                                target,
                                service: Service::Secrets,
                                kinds: vec![Kind::Secret],
                                delta: false,
                                metadata: Vec::new(),
                                node: bootstrap.node.clone(),
                                source,
                            };
                            running.spawn(client.run());
                        }
                        Err(error) => tracing::error!(%error, "cannot ask for secrets"),
                    }
                }
                Source::Path(path) => {
                    running.spawn(file::follow(
                        sink,
                        Kind::Secret,
                        path.into(),
                        source.clone(),
                    ));
                }
                Source::Static | Source::Own | Source::Inline | Source::Ads => {}
            }
        }
        if wanted.changed().await.is_err() {
            return;
        }
    }
}

/// Follows the files that are named now. One of which other names are wanted is read anew.
fn follow_files(
    control: &Arc<Control>,
    wanted: &Wanted,
    followed: &mut BTreeMap<(Kind, String), (BTreeSet<String>, AbortHandle)>,
    running: &mut JoinSet<()>,
) {
    followed.retain(|file, (names, task)| {
        let same = wanted.files.get(file) == Some(names);
        if !same {
            task.abort();
        }
        same
    });
    for ((kind, path), names) in &wanted.files {
        let key = (*kind, path.clone());
        followed.entry(key).or_insert_with(|| {
            let source = Source::Path(path.clone());
            let follow = file::follow(control.clone(), *kind, path.into(), source);
            (names.clone(), running.spawn(follow))
        });
    }
}

/// Logs are opened anew at each SIGUSR1, as log rotation wants it.
async fn reopen_logs() {
    match signal(SignalKind::user_defined1()) {
        Ok(mut rotated) => {
            while rotated.recv().await.is_some() {
                crate::access_log::reopen();
            }
        }
        Err(error) => tracing::warn!(%error, "SIGUSR1 cannot be handled"),
    }
}

async fn reload_secret_files(secrets: SecretStore) {
    let mut ticks = tokio::time::interval(SECRET_FILES_POLL);
    loop {
        ticks.tick().await;
        secrets.reload_files();
    }
}

/// `server.state` as Envoy numbers it: 0 live, 1 draining, 2 pre-initializing, 3 initializing.
async fn count_state(control: Arc<Control>) {
    let scope = control.shared().stats.scope("server.");
    let (state, live) = (scope.gauge("state"), scope.gauge("live"));
    let mut phase = control.phase();
    let drain = control.shared().drain.clone();
    loop {
        let number = match admin::state(&control) {
            "LIVE" => 0,
            "DRAINING" => 1,
            "PRE_INITIALIZING" => 2,
            _ => 3,
        };
        state.set(number);
        live.set(u64::from(number != 1));
        // Both branches are cancel-safe; a drain that has begun never ends.
        tokio::select! {
            changed = phase.changed() => if changed.is_err() { return },
            () = drain.started(), if number != 1 => {}
        }
    }
}
