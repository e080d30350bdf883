//! The whole service: flags in, ports out.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use lateen_adapter::Clock;
use lateen_identity::{ClientAuth, PeerMatch};
use lateen_protocols::envoy::{
    envoy::config::core::v3::Node,
    google::protobuf::{Struct, Value, value::Kind},
};
use lateen_service::{
    admin::{Admin, Reply},
    identity::{IdentityArgs, IdentityError, Source as Identity},
    prometheus_client::registry::Registry,
    shutdown::Drain,
    telemetry::TelemetryArgs,
    tls,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_util::task::TaskTracker;
use tonic::{service::Routes, transport::Channel};

use crate::{
    adapter::{Inventory, prometheus::Exposition, rbac::PolicyView},
    config::{self, Builder, Snapshot, Update, ads::Ads, folder},
    connection::{self, Api},
    envoy,
    handler::World,
    introspect::Page,
    metrics::Metrics,
    overload::{self, Overload},
    serve::{Role, Service},
    verdicts::Verdicts,
    workloads::WorkloadView,
};

/// Pilot's port without TLS, by Istio's convention. Any other is dialled with TLS by a Mixer that has an identity.
const PILOT_PLAIN_PORT: &str = ":15010";

/// How to serve.
#[derive(Clone, Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("source").required(true))]
pub struct Args {
    /// Address of all ports.
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    pub bind: IpAddr,
    /// Port of the API without TLS.
    #[arg(long, value_name = "PORT", default_value_t = 9091)]
    pub port: u16,
    /// Port of the API with mutual TLS; open when this program has an identity.
    #[arg(long, value_name = "PORT", default_value_t = 15004)]
    pub tls_port: u16,
    /// Port of health, own metrics and debug pages.
    #[arg(long, value_name = "PORT", default_value_t = 15014)]
    pub admin_port: u16,
    /// Port of the metrics that the prometheus adapter keeps.
    #[arg(long, value_name = "PORT", default_value_t = 42422)]
    pub metrics_port: u16,
    /// Folder of YAML files to take rules from.
    #[arg(long, value_name = "DIR", group = "source")]
    pub config_dir: Option<PathBuf>,
    /// Pilot, to take rules from; with TLS if this program has an identity, except at port 15010.
    #[arg(long, value_name = "HOST:PORT", group = "source")]
    pub config_ads: Option<String>,
    /// Namespace whose rules apply everywhere.
    #[arg(long, value_name = "NAMESPACE", default_value = "istio-system")]
    pub config_namespace: String,
    /// Which calls are answered; the other ones are refused. Both kinds of rules are loaded all the same.
    #[arg(long, value_enum, default_value_t)]
    pub role: Role,
    /// Checks under way at a time; further ones are shed.
    #[arg(long, value_name = "N", default_value_t = overload::Limits::default().checks as u32,
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_checks: u32,
    /// Reports under way at a time; further ones are shed.
    #[arg(long, value_name = "N", default_value_t = overload::Limits::default().reports as u32,
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_reports: u32,
    /// When everything is later than this, checks are shed, and reports from half of it; 0: never.
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pub shed_delay_ms: u32,
    /// Who this program is.
    #[command(flatten)]
    pub identity: IdentityArgs,
    /// Logging.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

/// The service cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A port is taken, or the address is not this machine's.
    #[error("cannot bind {address}; is another mixer running?")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The identity flags.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The folder.
    #[error(transparent)]
    Folder(#[from] folder::FolderError),
    /// Pilot's address.
    #[error("--config-ads is wrong")]
    Ads(#[source] tls::AddressError),
}

/// A running service.
#[derive(Debug)]
pub struct Running {
    /// The API without TLS.
    pub address: SocketAddr,
    /// The API with mutual TLS.
    pub tls_address: Option<SocketAddr>,
    /// Health, own metrics, debug pages.
    pub admin_address: SocketAddr,
    /// The prometheus adapter's metrics.
    pub metrics_address: SocketAddr,
    /// What is in force.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// How many updates of the configuration have been taken, good or bad.
    pub updates: watch::Receiver<u64>,
    drain: Drain,
    handlers: TaskTracker,
}

impl Running {
    /// Stops taking requests and waits for those under way, at most `limit` each for requests and reports.
    pub async fn stop(self, limit: Duration) {
        self.drain.finish(limit).await;
        self.handlers.close();
        // Daemons of handlers end with the last snapshot, which the configuration task has just let go.
        self.snapshot.store(Arc::new(Snapshot::empty()));
        if tokio::time::timeout(limit, self.handlers.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                tasks = self.handlers.len(),
                "tasks of handlers did not end in time"
            );
        }
    }
}

/// Starts everything. `adapt` may add adapters to the built-in ones.
///
/// # Errors
/// When a port cannot be bound, or a flag is wrong. Configuration that is wrong is no error: it is refused
/// piece by piece, and `/debug/config` says why.
pub async fn start(
    args: &Args,
    adapt: impl FnOnce(Inventory) -> Inventory,
) -> Result<Running, StartError> {
    let drain = Drain::new();
    let identity = Identity::start(&args.identity, &drain)?;
    start_as(args, identity, drain, adapt).await
}

/// As [`start`], with any identity instead of the one that the flags ask for.
///
/// # Errors
/// As [`start`].
pub async fn start_as(
    args: &Args,
    identity: Option<Identity>,
    drain: Drain,
    adapt: impl FnOnce(Inventory) -> Inventory,
) -> Result<Running, StartError> {
    let handlers = TaskTracker::new();
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let clock = Clock::real();
    let exposition = Arc::new(Exposition::new(clock.clone()));
    let workloads = WorkloadView::default();
    let policies = PolicyView::default();
    let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::empty()));
    if let Some(identity) = &identity {
        identity.register(&mut registry);
    }

    let overload = Overload::new(limits(args), Arc::clone(&metrics));
    let verdicts = Arc::new(Verdicts::default());
    let shown = Arc::clone(&snapshot);
    let admin = Admin::new(registry).route("/debug/config", move |_| {
        let text = shown.load().describe().to_string();
        async { Reply::json(text) }
    });
    let page = Page {
        snapshot: Arc::clone(&snapshot),
        metrics: Arc::clone(&metrics),
        overload: overload.clone(),
        verdicts: Arc::clone(&verdicts),
        readiness: admin.readiness(),
        role: args.role,
    };
    let admin = admin.route("/debug/mixer", move |query| {
        let reply = page.reply(&query);
        async { reply }
    });
    let configured = admin.readiness().gate("configuration");
    let identified = identity
        .as_ref()
        .map(|_| admin.readiness().gate("identity"));

    let world = World {
        clock,
        workloads: Arc::new(workloads.clone()),
        tracker: handlers.clone(),
        metrics: Arc::clone(&metrics),
    };
    let inventory = adapt(Inventory::built_in(
        Arc::clone(&exposition),
        policies.clone(),
    ));
    let kinds = kinds(&inventory);
    let builder = Builder::new(
        inventory,
        world,
        &*args.config_namespace,
        first_generation(),
    );
    let (taken, updates_taken) = watch::channel(0);
    let (updates, receiver) = mpsc::channel(16);
    source(args, identity.as_ref(), kinds, updates, &drain)?;
    drain.spawn_until_stop(config::run(
        receiver,
        builder,
        Arc::clone(&snapshot),
        workloads.clone(),
        policies,
        Arc::clone(&metrics),
        move || {
            configured.open();
            taken.send_modify(|count| *count += 1);
        },
    ));

    drain.spawn_until_stop(overload.clone().watch());
    let service = Service::new(
        Arc::clone(&snapshot),
        metrics,
        args.role,
        overload,
        verdicts,
        handlers.clone(),
    );
    let api = api(service, workloads, &drain);
    let (listener, address) = bind(args.bind, args.port).await?;
    let connections = tls::serve_plain(listener);
    drain.spawn(connection::serve(connections, api.clone(), drain.clone()));
    let mut tls_address = None;
    if let (Some(identity), Some(identified)) = (identity, identified) {
        let (listener, address) = bind(args.bind, args.tls_port).await?;
        let config = identity.server_config(ClientAuth::Required);
        let connections = tls::serve(listener, config);
        drain.spawn(connection::serve(connections, api, drain.clone()));
        tls_address = Some(address);
        drain.spawn_until_stop(async move {
            identity.ready().await;
            identified.open();
            std::future::pending::<()>().await; // the renewal task lives by this handle
        });
    }

    let exposed = Admin::new(Registry::default()).route("/metrics", move |_| {
        let text = exposition.render();
        async {
            Reply {
                content_type: "text/plain; version=0.0.4; charset=utf-8",
                ..Reply::text(text)
            }
        }
    });
    let metrics_address = serve_admin(exposed, args.bind, args.metrics_port, &drain).await?;
    let admin_address = serve_admin(admin, args.bind, args.admin_port, &drain).await?;
    tracing::info!(%address, ?tls_address, %admin_address, %metrics_address, "bound");
    Ok(Running {
        address,
        tls_address,
        admin_address,
        metrics_address,
        snapshot,
        updates: updates_taken,
        drain,
        handlers,
    })
}

fn limits(args: &Args) -> overload::Limits {
    let delay = Duration::from_millis(args.shed_delay_ms.into());
    overload::Limits {
        checks: args.max_checks as usize,
        reports: args.max_reports as usize,
        delay: Some(delay).filter(|delay| !delay.is_zero()),
    }
}

/// Larger than any generation before a restart, unless the configuration changed more than a million times a
/// second.
fn first_generation() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or_default()
}

/// Kinds to ask Pilot for.
fn kinds(inventory: &Inventory) -> Vec<String> {
    let general = [
        "rule",
        "handler",
        "instance",
        "attributemanifest",
        "adapter",
        "template",
        "QuotaSpec",
    ];
    let templates = lateen_adapter::template::ALL.iter().map(|t| t.name);
    general
        .into_iter()
        .chain(inventory.names())
        .chain(config::vendor::names())
        .chain(templates)
        .map(str::to_owned)
        .collect()
}

fn source(
    args: &Args,
    identity: Option<&Identity>,
    kinds: Vec<String>,
    updates: mpsc::Sender<Update>,
    drain: &Drain,
) -> Result<(), StartError> {
    if let Some(directory) = &args.config_dir {
        drain.spawn_until_stop(folder::watch(directory, updates)?);
    } else if let Some(address) = &args.config_ads {
        let channel = pilot(args, address, identity).map_err(StartError::Ads)?;
        let ads = Ads {
            channel,
            node: node(args),
            kinds,
        };
        drain.spawn_until_stop(ads.run(updates));
    }
    Ok(())
}

fn pilot(
    args: &Args,
    address: &str,
    identity: Option<&Identity>,
) -> Result<Channel, tls::AddressError> {
    match identity {
        Some(identity) if !address.ends_with(PILOT_PLAIN_PORT) => {
            let namespace = args.config_namespace.clone();
            let is_pilot = PeerMatch::Predicate(Arc::new(move |id| {
                id.namespace() == Some(&namespace)
                    && matches!(id.service_account(), Some("pilot" | "istiod"))
            }));
            tls::channel(address, identity.client_config(is_pilot))
        }
        _ => tls::channel_plain(address),
    }
}

fn node(args: &Args) -> Node {
    let namespace = &args.config_namespace;
    let text = |text: &str| Value {
        kind: Some(Kind::StringValue(text.to_owned())),
    };
    Node {
        id: format!(
            "mixer~{}~mixer-{}.{namespace}~{namespace}.svc.cluster.local",
            args.bind, args.bind
        ),
        cluster: format!("mixer.{namespace}"),
        metadata: Some(Struct {
            fields: [("NAMESPACE".to_owned(), text(namespace))]
                .into_iter()
                .collect(),
        }),
        user_agent_name: "lateen-mixer".to_owned(),
        ..Node::default()
    }
}

async fn bind(ip: IpAddr, port: u16) -> Result<(TcpListener, SocketAddr), StartError> {
    let address = SocketAddr::new(ip, port);
    let fail = |source| StartError::Bind { address, source };
    let listener = TcpListener::bind(address).await.map_err(fail)?;
    let address = listener.local_addr().map_err(fail)?;
    Ok((listener, address))
}

async fn serve_admin(
    admin: Admin,
    ip: IpAddr,
    port: u16,
    drain: &Drain,
) -> Result<SocketAddr, StartError> {
    let address = SocketAddr::new(ip, port);
    admin
        .serve(address, drain)
        .await
        .map_err(|source| StartError::Bind { address, source })
}

/// What the ports of the API serve.
fn api(service: Service, workloads: WorkloadView, drain: &Drain) -> Api {
    let others = Routes::new(envoy::authorization(service.clone(), workloads.clone()))
        .add_service(envoy::rate_limits(service.clone(), workloads.clone()))
        .add_service(envoy::access_logs(service.clone(), workloads, drain))
        .prepare();
    Api { service, others }
}
