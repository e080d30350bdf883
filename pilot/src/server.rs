//! The service put together: ports, TLS, readiness. What `main.rs` runs and tests start in process.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lateen_config::{self as config, Folder, Store};
use lateen_identity::{ClientAuth, SpiffeId};
use lateen_kubernetes::{ConnectError, Health, Kubernetes, KubernetesArgs, Observed};
use lateen_service::admin::Admin;
use lateen_service::identity::{self, IdentityArgs, IdentityError};
use lateen_service::prometheus_client::registry::Registry;
use lateen_service::shutdown::Drain;
use lateen_service::tls::{self, PeerIdentity};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Server;
use tracing::{error, info};

use crate::controller::{ControllerArgs, Controllers, naked};
use crate::debug;
use crate::encode::Encoder;
use crate::metrics::Metrics;
use crate::push::{self, Source};
use crate::serve::{Discovery, Trust};
use crate::webhook::certificate::Certificate;
use crate::webhook::{self, WebhookArgs, WebhookError};

/// A client that does not answer a ping within this time is gone.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often idle connections are pinged.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);

/// Streams on one connection; a proxy needs one, an agent that multiplexes a few.
const STREAMS_PER_CONNECTION: u32 = 100;

/// Flags.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// Folder with Kubernetes and Istio YAML, watched. Its objects win over a cluster's of the same name.
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present_any = ["kubeconfig", "kube"]
    )]
    pub config_dir: Option<PathBuf>,
    /// The cluster.
    #[command(flatten)]
    pub kubernetes: KubernetesArgs,
    /// Address all ports bind to.
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    pub bind: IpAddr,
    /// Plain xDS.
    #[arg(long, value_name = "PORT", default_value_t = 15010)]
    pub grpc_port: u16,
    /// xDS over mTLS; served when this program has an identity.
    #[arg(long, value_name = "PORT", default_value_t = 15012)]
    pub tls_port: u16,
    /// Health, metrics and debug pages.
    #[arg(long, value_name = "PORT", default_value_t = 15014)]
    pub http_port: u16,
    /// Webhooks for an API server.
    #[command(flatten)]
    pub webhook: WebhookArgs,
    /// What is written to the cluster.
    #[command(flatten)]
    pub controller: ControllerArgs,
    /// This program's own identity.
    #[command(flatten)]
    pub identity: IdentityArgs,
}

/// Why Pilot does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A port is taken, or the address is not ours.
    #[error("cannot bind {address}")]
    Bind {
        /// What was to be bound.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The operator's endpoint.
    #[error("cannot serve health and metrics")]
    Admin(#[source] std::io::Error),
    /// The folder.
    #[error("cannot read the folder {folder}")]
    Folder {
        /// Which.
        folder: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The folder's changes.
    #[error("cannot watch the folder {folder}; is fs.inotify.max_user_watches used up?")]
    Watch {
        /// Which.
        folder: PathBuf,
        /// Why not.
        #[source]
        source: notify::Error,
    },
    /// The cluster's flags.
    #[error(transparent)]
    Kubernetes(#[from] ConnectError),
    /// The identity flags.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The webhooks' flags.
    #[error(transparent)]
    Webhook(#[from] WebhookError),
    /// Where to?
    #[error("--controllers needs a cluster: --kube or --kubeconfig FILE")]
    NoCluster,
}

/// A running Pilot.
#[derive(Debug)]
pub struct Pilot {
    /// Plain xDS.
    pub grpc: SocketAddr,
    /// xDS over mTLS.
    pub tls: Option<SocketAddr>,
    /// Health, metrics, debug pages.
    pub http: SocketAddr,
    /// Webhooks, if they are served.
    pub webhook: Option<SocketAddr>,
    /// The streams.
    pub discovery: Arc<Discovery>,
}

impl Pilot {
    /// Starts with the folder and the cluster that the flags name as sources.
    ///
    /// # Errors
    /// A port cannot be bound, the folder cannot be watched, or the flags of the cluster or the identity are wrong.
    pub async fn start(config: &Config, drain: &Drain) -> Result<Self, StartError> {
        let mut registry = Registry::default();
        let folder = config
            .config_dir
            .is_some()
            .then_some(config::Source::Folder);
        let cluster = config.kubernetes.cluster.is_wanted();
        let cluster = cluster.then_some(config::Source::Kubernetes);
        let store = Store::new(folder.into_iter().chain(cluster));
        let source = store.subscribe();
        if let Some(folder) = &config.config_dir {
            Folder::open_in(folder, store.clone())
                .map_err(|source| StartError::Folder {
                    folder: folder.clone(),
                    source,
                })?
                .watch()
                .map_err(|source| StartError::Watch {
                    folder: folder.clone(),
                    source,
                })?;
        }
        let mut observed = None;
        if config.kubernetes.cluster.is_wanted() {
            let health = Health::new(&mut registry);
            let cluster = Kubernetes::new(&config.kubernetes, store, health).await?;
            if let Some(cluster) = cluster {
                observed = Some(cluster.observed());
                drain.spawn_until_stop(cluster.run());
            }
        }
        let identity = identity::Source::start(&config.identity, drain)?;
        Self::serve(config, source, observed, identity, registry, drain).await
    }

    /// Starts with any source, and any identity.
    ///
    /// # Errors
    /// As [`Pilot::start`].
    pub async fn with_source(
        config: &Config,
        source: Source,
        identity: Option<identity::Source>,
        drain: &Drain,
    ) -> Result<Self, StartError> {
        Self::serve(config, source, None, identity, Registry::default(), drain).await
    }

    async fn serve(
        config: &Config,
        source: Source,
        observed: Option<Observed>,
        identity: Option<identity::Source>,
        mut registry: Registry,
        drain: &Drain,
    ) -> Result<Self, StartError> {
        let metrics = Metrics::new(&mut registry);
        if let Some(identity) = &identity {
            identity.register(&mut registry);
        }

        let encoder = Arc::new(Encoder::default());
        let (out, served) = watch::channel(None);
        let mut first = served.clone();
        let discovery = Discovery::new(
            served.clone(),
            encoder.clone(),
            metrics.clone(),
            drain.token(),
        );
        let naked = naked::Finder::new(&mut registry);
        let certificate = match config.webhook.webhooks {
            true => Some(Certificate::new(&config.webhook, identity.as_ref(), drain)?),
            false => None,
        };
        let (webhook, settings) = match &certificate {
            None => (None, webhook::settings(&config.webhook, drain)?),
            Some(certificate) => {
                let bound = bind(config.bind, config.webhook.webhook_port).await?;
                let address = bound.0;
                let args = &config.webhook;
                let settings = webhook::start(bound, certificate, args, &mut registry, drain)?;
                (Some(address), settings)
            }
        };
        if config.controller.controllers {
            let observed = observed.ok_or(StartError::NoCluster)?;
            let roots = certificate.as_ref().map(Certificate::roots);
            let cluster = &config.kubernetes.cluster;
            let controllers =
                Controllers::new(&config.controller, cluster, observed, roots, &mut registry)
                    .await?;
            if let Some(controllers) = controllers {
                controllers.run(source.clone(), served.clone(), drain);
            }
        }

        drain.spawn_until_stop(push::run(
            source.clone(),
            encoder,
            metrics,
            discovery.ledger().clone(),
            out,
        ));

        let admin = naked.page(debug::routes(Admin::new(registry), &discovery));
        drain.spawn_until_stop(naked.run(source, settings));
        let synced = admin.readiness().gate("configuration");
        drain.spawn_until_stop(async move {
            if first.wait_for(Option::is_some).await.is_ok() {
                synced.open();
            }
        });

        let (grpc, listener) = bind(config.bind, config.grpc_port).await?;
        serve(
            drain,
            "grpc",
            tls::serve_plain(listener),
            &discovery,
            Trust::Network,
        );
        let tls = match identity {
            None => None,
            Some(identity) => {
                let (address, listener) = bind(config.bind, config.tls_port).await?;
                let incoming = tls::serve(listener, identity.server_config(ClientAuth::Required));
                serve(
                    drain,
                    "grpc over mTLS",
                    incoming,
                    &discovery,
                    Trust::Certificate(peer),
                );
                let certified = admin.readiness().gate("certificate");
                drain.spawn_until_stop(async move {
                    identity.ready().await;
                    certified.open();
                });
                Some(address)
            }
        };
        let http = admin
            .serve(SocketAddr::new(config.bind, config.http_port), drain)
            .await
            .map_err(StartError::Admin)?;
        info!(%grpc, ?tls, %http, ?webhook, "serving");

        let streams = discovery.clone();
        let stopping = drain.stopping();
        drain.spawn(async move {
            stopping.await;
            streams.drained().await;
        });
        Ok(Self {
            grpc,
            tls,
            http,
            webhook,
            discovery,
        })
    }
}

async fn bind(ip: IpAddr, port: u16) -> Result<(SocketAddr, TcpListener), StartError> {
    let address = SocketAddr::new(ip, port);
    let fail = |source| StartError::Bind { address, source };
    let listener = TcpListener::bind(address).await.map_err(fail)?;
    Ok((listener.local_addr().map_err(fail)?, listener))
}

fn serve<S>(
    drain: &Drain,
    name: &'static str,
    incoming: S,
    discovery: &Arc<Discovery>,
    trust: Trust,
) where
    S: tokio_stream::Stream<Item = std::io::Result<tls::Conn>> + Send + 'static,
{
    let service = discovery.service(trust);
    let stopping = drain.stopping();
    drain.spawn(async move {
        let served = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .max_concurrent_streams(STREAMS_PER_CONNECTION)
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, stopping)
            .await;
        if let Err(e) = served {
            error!(error = %e, name, "server failed");
        }
    });
}

/// The identity in the certificate of the connection.
fn peer(extensions: &tonic::Extensions) -> Option<SpiffeId> {
    extensions.get::<PeerIdentity>()?.spiffe_id().cloned()
}
