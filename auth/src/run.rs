//! Builds the service from its configuration and keeps it going: own certificate, token sweep, listeners.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lateen_identity::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use lateen_identity::{ClientAuth, IdError, SpiffeId, Svid, SvidError};
use lateen_kubernetes::{ConnectError, Reviewer, Roots};
use lateen_protocols::istio::v1::auth::istio_certificate_service_server::IstioCertificateServiceServer;
use lateen_service::admin::Admin;
use lateen_service::identity::Source;
use lateen_service::shutdown::Drain;
use lateen_service::tls;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use tokio::net::TcpListener;
use tonic::transport::Server;
use zeroize::Zeroizing;

use crate::audit::Audit;
use crate::authenticate::Credentials;
use crate::authorize::Permit;
use crate::ca::{Ca, CaError};
use crate::config::{Clock, Config, JoinTokenArgs};
use crate::serve::{MAX_MESSAGE_BYTES, Service};
use crate::sign::{MIN_TTL, ServerNames, SignError, Signer};
use crate::token::{TokenError, Tokens};

/// Life of Auth's own certificate; renewed at half of it.
const OWN_TTL: Duration = Duration::from_secs(24 * 3600);
/// After a failed renewal of it.
const OWN_RETRY: Duration = Duration::from_secs(60);
/// How often expired tokens are removed. They are refused without that.
const SWEEP: Duration = Duration::from_secs(60);
/// A request that takes longer is given up.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections are closed at this age: a client needs one for a single request, so older ones are
/// forgotten or hostile.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(300);
const MAX_CONNECTION_AGE_GRACE: Duration = Duration::from_secs(30);
/// Requests at once on one connection; a client needs one.
const MAX_STREAMS: u32 = 16;
/// Decoded request headers; the token is the largest.
const MAX_HEADER_BYTES: u32 = 16 * 1024;

/// Why Auth does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The CA.
    #[error("the CA cannot be used")]
    Ca(#[from] CaError),
    /// The lives configured.
    #[error("--workload-ttl must be between {} seconds and --max-workload-ttl", MIN_TTL.as_secs())]
    Ttl,
    /// The token folder.
    #[error("the token folder cannot be used")]
    Tokens(#[source] io::Error),
    /// The cluster.
    #[error("tokens of Kubernetes cannot be reviewed")]
    Kubernetes(#[from] ConnectError),
    /// Where to?
    #[error("--publish-roots needs a cluster: --kube or --kubeconfig FILE")]
    NoCluster,
    /// Whom names are given to.
    #[error("--dns-names-of names no service account")]
    Grant(#[source] IdError),
    /// Own identity.
    #[error("Auth has no name of its own")]
    Name(#[source] IdError),
    /// Own key.
    #[error("cannot make a key for Auth's own certificate")]
    Key(#[source] rcgen::Error),
    /// Own certificate.
    #[error(
        "the CA cannot sign Auth's own certificate; does cert-chain.pem lead to root-cert.pem?"
    )]
    Sign(#[source] SignError),
    /// Own certificate.
    #[error("Auth's own certificate is unusable")]
    Svid(#[source] SvidError),
    /// The address.
    #[error("cannot bind {0}")]
    Bind(SocketAddr, #[source] io::Error),
}

/// A running Auth.
#[derive(Debug)]
pub struct Running {
    /// Where certificate requests are served.
    pub address: SocketAddr,
    /// Where health and metrics are served.
    pub admin_address: SocketAddr,
}

/// Starts Auth; it runs until `drain` stops.
///
/// # Errors
/// When state, configuration or addresses are unusable.
pub async fn start(config: Config, drain: &Drain) -> Result<Running, StartError> {
    let ttls = MIN_TTL..=config.max_workload_ttl;
    if !ttls.contains(&config.workload_ttl) {
        return Err(StartError::Ttl);
    }
    let now = config.clock.now();
    let ca = Ca::open(
        &config.state,
        config.ca_dir.as_deref(),
        &config.trust_domain,
        now,
    )?;
    let ca = Arc::new(ca);
    let tokens = Tokens::open(&config.state).map_err(StartError::Tokens)?;
    let reviewer = Reviewer::new(&config.cluster, config.token_audiences).await?;
    let signer = Signer::new(
        Arc::clone(&ca),
        config.workload_ttl,
        config.max_workload_ttl,
    );
    let own = SpiffeId::workload(&config.trust_domain, "istio-system", "auth")
        .map_err(StartError::Name)?;

    let mut granted: BTreeMap<SpiffeId, ServerNames> = BTreeMap::new();
    for grant in config.dns_names_of {
        let id = SpiffeId::workload(&config.trust_domain, &grant.namespace, &grant.account)
            .map_err(StartError::Grant)?;
        granted.entry(id).or_default().dns.extend(grant.names);
    }

    let mut registry = Registry::default();
    let audit = Audit::new(&mut registry, &ca);
    if config.publish_roots {
        let roots = Roots::new(&config.cluster, ca.bundle().all_pem()).await?;
        let roots = roots.ok_or(StartError::NoCluster)?;
        let failures = Counter::default();
        registry.register(
            "auth_root_publish_failure_count",
            "Rounds in which the root certificates could not be written to every namespace",
            failures.clone(),
        );
        drain.spawn_until_stop(roots.keep(failures));
    }
    let listener = TcpListener::bind(config.address)
        .await
        .map_err(|error| StartError::Bind(config.address, error))?;
    let address = listener
        .local_addr()
        .map_err(|error| StartError::Bind(config.address, error))?;

    let mut names = ServerNames {
        dns: config.dns_names.clone(),
        addresses: Vec::new(),
    };
    if !address.ip().is_unspecified() {
        names.addresses.push(address.ip());
    }
    let source = Source::empty();
    let identity = OwnIdentity {
        id: own.clone(),
        names,
        signer: signer.clone(),
        source: source.clone(),
    };
    identity.renew(config.clock.now())?;
    drain.spawn_until_stop(identity.keep());
    drain.spawn_until_stop(sweep(tokens.clone(), config.clock.clone()));

    let admin = Admin::new(registry);
    let serving = admin.readiness().gate("serving");
    let admin_address = admin
        .serve(config.admin_address, drain)
        .await
        .map_err(|error| StartError::Bind(config.admin_address, error))?;

    let credentials = Credentials { tokens, reviewer };
    let service = Service::new(credentials, signer, audit, config.clock, own, granted);
    let service =
        IstioCertificateServiceServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let incoming = tls::serve(listener, source.server_config(ClientAuth::Optional));
    let server = Server::builder()
        .timeout(REQUEST_TIMEOUT)
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .http2_keepalive_interval(Some(Duration::from_secs(60)))
        .max_connection_age(MAX_CONNECTION_AGE)
        .max_connection_age_grace(MAX_CONNECTION_AGE_GRACE)
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, drain.stopping());
    serving.open();
    drain.spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(%error, "the certificate service ended");
        }
        serving.close();
    });
    tracing::info!(%address, trust_domain = %config.trust_domain, "certificate service bound");
    Ok(Running {
        address,
        admin_address,
    })
}

/// Auth's own certificate, signed by itself, for its own listener.
struct OwnIdentity {
    id: SpiffeId,
    names: ServerNames,
    signer: Signer,
    source: Source,
}

impl OwnIdentity {
    fn renew(&self, now: SystemTime) -> Result<(), StartError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(StartError::Key)?;
        let issued = self
            .signer
            .sign(
                &Permit::own(self.id.clone()),
                &key,
                &self.names,
                OWN_TTL,
                now,
            )
            .map_err(StartError::Sign)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let svid = Svid::new(issued.chain, key, Arc::clone(self.signer.ca().bundle()))
            .map_err(StartError::Svid)?;
        tracing::info!(identity = %self.id, serial = issued.serial, "own certificate signed");
        self.source.publish(Arc::new(svid));
        Ok(())
    }

    async fn keep(self) {
        loop {
            let now = SystemTime::now();
            let left = self
                .source
                .current()
                .map(|svid| svid.remaining(now))
                .unwrap_or_default();
            tokio::time::sleep((left / 2).max(OWN_RETRY)).await;
            if let Err(error) = self.renew(SystemTime::now()) {
                tracing::error!(%error, "cannot renew Auth's own certificate; will try again");
            }
        }
    }
}

async fn sweep(tokens: Tokens, clock: Clock) {
    loop {
        let (tokens, now) = (tokens.clone(), clock.now());
        match tokio::task::spawn_blocking(move || tokens.sweep(now)).await {
            Ok(Ok(0)) | Err(_) => {}
            Ok(Ok(files)) => tracing::debug!(files, "expired join tokens removed"),
            Ok(Err(error)) => tracing::warn!(%error, "cannot sweep the join tokens"),
        }
        tokio::time::sleep(SWEEP).await;
    }
}

/// `auth join-token`: makes a token and gives it back.
///
/// # Errors
/// When the identity is not one that Auth would certify, or the folder cannot be written.
pub fn join_token(args: &JoinTokenArgs, now: SystemTime) -> Result<Zeroizing<String>, TokenError> {
    if args.identity.namespace().is_none() {
        return Err(TokenError::Identity(args.identity.clone()));
    }
    Tokens::open(&args.state)?.create(&args.identity, args.ttl, now)
}
