//! A program's own identity: asks Auth for a certificate with a join token, later with the certificate it
//! holds, renews long before the end, keeps serving the old one while Auth is away.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lateen_identity::{
    BundleError, ClientAuth, PeerMatch, SpiffeClientVerifier, SpiffeId, SpiffeServerVerifier, Svid,
    SvidCell, Trust, TrustBundle,
};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use rand::Rng as _;
use rustls::{ClientConfig, ServerConfig};
use tokio::sync::watch;
use zeroize::Zeroizing;

use crate::shutdown::Drain;

mod request;
mod store;

pub use request::RequestError;
pub use store::StoreError;

/// Renewal happens at this part of what was left of the certificate's life when it arrived ...
const RENEW_AT: f64 = 0.5;
/// ... give or take this much, so that programs started together do not renew together.
const RENEW_JITTER: f64 = 0.1;
/// First pause after a failed request; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(250);
/// Longest pause between requests.
const RETRY_MAX: Duration = Duration::from_secs(30);
/// The wall clock is looked at again after this time, because a suspended machine's timers stand still.
const CLOCK_CHECK: Duration = Duration::from_secs(30);
/// Whose roots those are that do not say it.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
/// Largest file read as token or root bundle.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Flags about a program's own identity. Without `--auth-address` it has none.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct IdentityArgs {
    /// Where Auth listens; without it this program has no identity and serves plain ports only.
    #[arg(long, value_name = "HOST:PORT", requires = "auth_root")]
    pub auth_address: Option<String>,
    /// PEM file with the root certificates that Auth's own certificate must chain to.
    #[arg(long, value_name = "FILE", requires = "auth_address")]
    pub auth_root: Option<PathBuf>,
    /// File with the one-time token that proves this program's identity the first time.
    #[arg(long, value_name = "FILE", requires = "auth_address")]
    pub join_token_file: Option<PathBuf>,
    /// Folder of this program alone where certificate and key are kept, so that a restart needs no new token.
    #[arg(long, value_name = "DIR", requires = "auth_address")]
    pub svid_dir: Option<PathBuf>,
    /// SPIFFE ID that Auth must have [default: /ns/istio-system/sa/auth in the trust domain that the roots
    /// name by their own URI name, or else in cluster.local]
    #[arg(long, value_name = "ID", requires = "auth_address")]
    pub auth_id: Option<SpiffeId>,
}

/// Why there is no identity source.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Flags that do not make sense together.
    #[error("{0}")]
    Flags(&'static str),
    /// The address of Auth.
    #[error("--auth-address is wrong")]
    Address(#[source] crate::tls::AddressError),
    /// What was stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The program's identity. Clones are one and the same; one task behind it renews.
#[derive(Clone, Debug)]
pub struct Source {
    cell: Arc<SvidCell>,
    newest: Arc<watch::Sender<Option<Arc<Svid>>>>,
    metrics: Metrics,
}

#[derive(Clone, Debug, Default)]
struct Metrics {
    not_after_seconds: Gauge,
    issued: Counter,
    failed: Counter,
}

impl Source {
    /// Starts obtaining and renewing the certificate, or answers `None` without `--auth-address`. A stored
    /// certificate that is still good is there when this returns; wait for a new one by [`Source::ready`].
    ///
    /// # Errors
    /// When the flags are unusable. Auth being away is no error: it is asked again until it answers.
    pub fn start(args: &IdentityArgs, drain: &Drain) -> Result<Option<Self>, IdentityError> {
        let Some(address) = args.auth_address.clone() else {
            return Ok(None);
        };
        let roots = args
            .auth_root
            .clone()
            .ok_or(IdentityError::Flags("--auth-address needs --auth-root"))?;
        crate::tls::channel_plain(&address).map_err(IdentityError::Address)?;
        let stored = match &args.svid_dir {
            Some(dir) => store::load(dir)?,
            None => None,
        };
        if stored.is_none() && args.join_token_file.is_none() {
            return Err(IdentityError::Flags(
                "no usable certificate is stored, so --join-token-file is needed; `auth join-token` makes one",
            ));
        }
        let source = Self::empty();
        if let Some(svid) = stored {
            tracing::info!(identity = %svid.spiffe_id(), "using the stored certificate");
            source.publish(svid);
        }
        let renewer = Renewer {
            source: source.clone(),
            address,
            roots,
            token: args.join_token_file.clone(),
            dir: args.svid_dir.clone(),
            auth_id: args.auth_id.clone(),
        };
        drain.spawn_until_stop(renewer.run());
        Ok(Some(source))
    }

    /// A source that holds nothing until somebody [`Source::publish`]es.
    pub fn empty() -> Self {
        Self {
            cell: SvidCell::empty(),
            newest: Arc::new(watch::Sender::new(None)),
            metrics: Metrics::default(),
        }
    }

    /// A source of this one certificate.
    pub fn fixed(svid: Svid) -> Self {
        let source = Self::empty();
        source.publish(Arc::new(svid));
        source
    }

    /// Replaces the certificate: new handshakes use it, connections stay.
    pub fn publish(&self, svid: Arc<Svid>) {
        let end = svid
            .not_after()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        self.metrics
            .not_after_seconds
            .set(i64::try_from(end.as_secs()).unwrap_or(i64::MAX));
        self.cell.store(Arc::clone(&svid));
        self.newest.send_replace(Some(svid));
    }

    /// Registers `identity_*` metrics.
    pub fn register(&self, registry: &mut Registry) {
        let metrics = &self.metrics;
        registry.register(
            "identity_certificate_not_after_seconds",
            "Unix time at which the newest certificate of this program ends",
            metrics.not_after_seconds.clone(),
        );
        registry.register(
            "identity_certificates_received",
            "Certificates received from Auth",
            metrics.issued.clone(),
        );
        registry.register(
            "identity_requests_failed",
            "Certificate requests that Auth refused or did not answer",
            metrics.failed.clone(),
        );
    }

    /// The newest certificate.
    pub fn current(&self) -> Option<Arc<Svid>> {
        self.cell.load()
    }

    /// Follows the newest certificate.
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<Svid>>> {
        self.newest.subscribe()
    }

    /// Waits for the first certificate. Cancel-safe.
    pub async fn ready(&self) -> Arc<Svid> {
        let mut newest = self.subscribe();
        loop {
            if let Some(svid) = newest.borrow_and_update().clone() {
                return svid;
            }
            if newest.changed().await.is_err() {
                // The sender lives in `self`, so this does not happen; never answer without identity.
                std::future::pending::<()>().await;
            }
        }
    }

    /// The cell that TLS configurations resolve from.
    pub fn cell(&self) -> Arc<SvidCell> {
        Arc::clone(&self.cell)
    }

    /// A TLS configuration for gRPC servers: presents the newest certificate, verifies clients against the
    /// newest roots.
    pub fn server_config(&self, auth: ClientAuth) -> Arc<ServerConfig> {
        let verifier =
            SpiffeClientVerifier::new(Trust::Live(self.cell()), PeerMatch::AnyTrusted, auth);
        Arc::new(lateen_identity::server_config(
            self.cell(),
            verifier,
            &[crate::tls::ALPN_H2],
        ))
    }

    /// A TLS configuration for gRPC clients: presents the newest certificate, accepts `expected` servers only.
    pub fn client_config(&self, expected: PeerMatch) -> Arc<ClientConfig> {
        let verifier = SpiffeServerVerifier::new(Trust::Live(self.cell()), expected);
        Arc::new(lateen_identity::client_config(
            Some(self.cell()),
            verifier,
            &[crate::tls::ALPN_H2],
        ))
    }
}

/// The one task that asks Auth. Takes files and the present certificate in, puts new certificates out.
struct Renewer {
    source: Source,
    address: String,
    roots: PathBuf,
    token: Option<PathBuf>,
    dir: Option<PathBuf>,
    auth_id: Option<SpiffeId>,
}

impl Renewer {
    async fn run(self) {
        loop {
            if let Some(svid) = self.source.current() {
                wait_until(renewal_time(&svid, SystemTime::now())).await;
            }
            let svid = self.obtain().await;
            tracing::info!(identity = %svid.spiffe_id(), serial = svid.serial(), "certificate received");
            self.source.metrics.issued.inc();
            if let Some(dir) = &self.dir
                && let Err(error) = store::save(dir, &svid)
            {
                // It works from memory all the same; the next restart will need a token.
                tracing::error!(error = %chain(&error), "cannot store the certificate");
            }
            self.source.publish(svid);
        }
    }

    /// Asks until there is an answer.
    async fn obtain(&self) -> Arc<Svid> {
        let mut pause = RETRY_MIN;
        loop {
            match self.attempt().await {
                Ok(svid) => return Arc::new(svid),
                Err(error) => {
                    self.source.metrics.failed.inc();
                    let left = self
                        .source
                        .current()
                        .map(|svid| svid.remaining(SystemTime::now()));
                    tracing::warn!(error = %chain(&error), ?left, ?pause, "no certificate from Auth; will ask again");
                }
            }
            let jittered = pause.mul_f64(rand::rng().random_range(0.75..1.25));
            tokio::time::sleep(jittered).await;
            // Towards the end of a short life a long pause would let it run out.
            let left = self
                .source
                .current()
                .map_or(RETRY_MAX, |svid| svid.remaining(SystemTime::now()) / 4);
            pause = (pause * 2).min(RETRY_MAX).min(left.max(RETRY_MIN));
        }
    }

    async fn attempt(&self) -> Result<Svid, RequestError> {
        let held = self
            .source
            .current()
            .filter(|svid| !svid.remaining(SystemTime::now()).is_zero());
        match held {
            Some(held) => request::renew(&self.address, self.auth_id.as_ref(), held).await,
            None => {
                let token = self.token.as_deref().ok_or(RequestError::Expired)?;
                let token = Zeroizing::new(read(token).await?.trim().to_owned());
                let bundle = Arc::new(
                    self.roots(&read(&self.roots).await?)
                        .map_err(RequestError::Roots)?,
                );
                let before = self.source.current();
                request::join(
                    &self.address,
                    self.auth_id.as_ref(),
                    &token,
                    bundle,
                    before.as_deref(),
                )
                .await
            }
        }
    }

    /// The roots for the first contact. Whose they are is said by `--auth-id`, or by the roots, or is the
    /// mesh's default.
    fn roots(&self, pem: &str) -> Result<TrustBundle, BundleError> {
        if let Some(id) = &self.auth_id {
            return TrustBundle::from_pem(id.trust_domain().clone(), pem);
        }
        match TrustBundle::from_described_pem(pem) {
            Err(undescribed @ BundleError::Domain(_)) => match DEFAULT_TRUST_DOMAIN.parse() {
                Ok(domain) => TrustBundle::from_pem(domain, pem),
                Err(_) => Err(undescribed),
            },
            answer => answer,
        }
    }
}

/// When to renew, counted from what is left now: right for short lives, for back-dated starts and for
/// certificates found at a restart alike.
fn renewal_time(svid: &Svid, now: SystemTime) -> SystemTime {
    let part = rand::rng().random_range(RENEW_AT - RENEW_JITTER..RENEW_AT + RENEW_JITTER);
    now + svid.remaining(now).mul_f64(part)
}

async fn wait_until(time: SystemTime) {
    while let Ok(left) = time.duration_since(SystemTime::now()) {
        tokio::time::sleep(left.min(CLOCK_CHECK)).await;
    }
}

async fn read(path: &Path) -> Result<Zeroizing<String>, RequestError> {
    use tokio::io::AsyncReadExt as _;
    let read = async {
        let mut text = Zeroizing::new(String::new());
        let file = tokio::fs::File::open(path).await?;
        file.take(MAX_FILE_BYTES).read_to_string(&mut text).await?;
        Ok(text)
    };
    read.await.map_err(|source| RequestError::Read {
        path: path.to_owned(),
        source,
    })
}

/// An error with its causes, for one log line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
