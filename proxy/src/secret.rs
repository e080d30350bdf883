//! Certificates and trust bundles by name, wherever they come from: our own identity, SDS, the
//! bootstrap, files. TLS contexts hold slots; whoever learns of a new secret puts it into its slot,
//! and the next handshake uses it.

pub mod material;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwapOption;
use envoy_types::pb::envoy::{
    config::core::v3::{
        ConfigSource, config_source::ConfigSourceSpecifier, grpc_service::TargetSpecifier,
    },
    extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, SdsSecretConfig, Secret, TlsCertificate, secret::Type,
    },
};
use tokio::sync::watch;

use crate::config_error::ConfigError;
pub use material::{Certificate, Trust};

/// Names under which our own certificate and trust bundle are asked for (Istio's).
pub const OWN_CERTIFICATE: &str = "default";
/// See [`OWN_CERTIFICATE`].
pub const OWN_ROOTS: &str = "ROOTCA";

/// Where a secret is to come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// The bootstrap's `static_resources.secrets`.
    Static,
    /// The certificate this process asked Auth for.
    Own,
    /// Written in the TLS context itself, perhaps as file names.
    Inline,
    /// The ADS stream.
    Ads,
    /// An SDS stream of its own to this cluster of the bootstrap.
    Grpc(String),
    /// A file with one or more Secret resources.
    Path(String),
}

/// A place for one secret. Filled by whoever owns the source; read by TLS contexts.
pub struct SecretSlot {
    name: Arc<str>,
    source: Source,
    certificate: ArcSwapOption<Certificate>,
    trust: ArcSwapOption<Trust>,
    version: AtomicU64,
    /// What the slot was last filled with when that names files, to read them again.
    files: Mutex<Option<Secret>>,
    store: Arc<Inner>,
}

impl SecretSlot {
    /// The resource's name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Where it comes from.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The certificate with its key, once there.
    pub fn certificate(&self) -> Option<Arc<Certificate>> {
        self.certificate.load_full()
    }

    /// The trust bundle with its rules, once there.
    pub fn trust(&self) -> Option<Arc<Trust>> {
        self.trust.load_full()
    }

    /// Grows with each change; 0 until the first.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Whether there is anything in it.
    pub fn is_ready(&self) -> bool {
        self.version() > 0
    }

    /// Puts a certificate in.
    pub fn set_certificate(&self, certificate: Certificate) {
        self.certificate.store(Some(Arc::new(certificate)));
        self.changed();
    }

    /// Puts a trust bundle in.
    pub fn set_trust(&self, trust: Trust) {
        self.trust.store(Some(Arc::new(trust)));
        self.changed();
    }

    /// Puts an SDS resource in.
    ///
    /// # Errors
    /// The secret is of a kind not known here, or its material does not parse; what was there stays.
    pub fn set(&self, secret: &Secret) -> Result<(), ConfigError> {
        let filled = self.fill(secret);
        if material::names_files(secret) {
            *lock(&self.files) = Some(secret.clone());
        }
        filled
    }

    fn fill(&self, secret: &Secret) -> Result<(), ConfigError> {
        let within = |e: ConfigError| match self.source {
            Source::Inline => e,
            _ => e.within(format_args!("secret {}", self.name)),
        };
        match &secret.r#type {
            Some(Type::TlsCertificate(certificate)) => {
                let certificate = Certificate::load(certificate).map_err(within)?;
                if self.certificate().is_none_or(|old| !old.same(&certificate)) {
                    self.set_certificate(certificate);
                }
            }
            Some(Type::ValidationContext(context)) => {
                let trust = Trust::load(context).map_err(within)?;
                if self.trust().is_none_or(|old| !old.same(&trust)) {
                    self.set_trust(trust);
                }
            }
            Some(Type::SessionTicketKeys(_) | Type::GenericSecret(_)) | None => {
                return Err(within(ConfigError::new(
                    "type",
                    "only tls_certificate and validation_context are supported",
                )));
            }
        }
        Ok(())
    }

    fn changed(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
        self.store.changed.send_modify(|n| *n += 1);
    }
}

impl fmt::Debug for SecretSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "SecretSlot({} from {:?}, version {})",
            self.name,
            self.source,
            self.version()
        )
    }
}

type Slots = HashMap<(Arc<str>, Source), Arc<SecretSlot>>;

struct Inner {
    slots: Mutex<Slots>,
    inline: Mutex<Vec<std::sync::Weak<SecretSlot>>>,
    own: AtomicBool,
    changed: watch::Sender<u64>,
}

/// All slots. Clones share them.
#[derive(Clone)]
pub struct SecretStore(Arc<Inner>);

impl Default for SecretStore {
    fn default() -> SecretStore {
        SecretStore(Arc::new(Inner {
            slots: Mutex::default(),
            inline: Mutex::default(),
            own: AtomicBool::new(false),
            changed: watch::Sender::new(0),
        }))
    }
}

impl SecretStore {
    /// An empty store.
    pub fn new() -> SecretStore {
        SecretStore::default()
    }

    /// From now on [`OWN_CERTIFICATE`] and [`OWN_ROOTS`] are answered from our own identity, whatever
    /// source a TLS context names for them. Gives the two slots to fill.
    pub fn use_own_identity(&self) -> (Arc<SecretSlot>, Arc<SecretSlot>) {
        self.0.own.store(true, Ordering::Release);
        (
            self.slot_from(OWN_CERTIFICATE, Source::Own),
            self.slot_from(OWN_ROOTS, Source::Own),
        )
    }

    /// The slot of a name in the bootstrap's static secrets (or our own identity, when it has the name).
    pub fn slot(&self, name: &str) -> Arc<SecretSlot> {
        self.slot_from(name, self.own_or(name, Source::Static))
    }

    /// The slot a TLS context asks for; whoever serves the source is told that it is wanted.
    ///
    /// # Errors
    /// The source is of a kind we cannot ask.
    pub fn subscribe(&self, config: &SdsSecretConfig) -> Result<Arc<SecretSlot>, ConfigError> {
        if config.name.is_empty() {
            return Err(ConfigError::new("name", "an SDS secret needs a name"));
        }
        let source = match &config.sds_config {
            None => Source::Static,
            Some(source) => source_of(source).map_err(|e| e.within("sds_config"))?,
        };
        Ok(self.slot_from(&config.name, self.own_or(&config.name, source)))
    }

    /// A slot for a certificate written in a TLS context.
    ///
    /// # Errors
    /// The material does not parse or a file is not there.
    pub fn inline_certificate(
        &self,
        certificate: &TlsCertificate,
    ) -> Result<Arc<SecretSlot>, ConfigError> {
        self.inline(Type::TlsCertificate(certificate.clone()))
    }

    /// A slot for a validation context written in a TLS context.
    ///
    /// # Errors
    /// The material does not parse or a file is not there.
    pub fn inline_trust(
        &self,
        context: &CertificateValidationContext,
    ) -> Result<Arc<SecretSlot>, ConfigError> {
        self.inline(Type::ValidationContext(context.clone()))
    }

    fn inline(&self, kind: Type) -> Result<Arc<SecretSlot>, ConfigError> {
        let slot = Arc::new(self.empty("inline".into(), Source::Inline));
        let secret = Secret {
            name: String::new(),
            r#type: Some(kind),
        };
        slot.set(&secret)?;
        let mut inline = lock(&self.0.inline);
        if inline.len() == inline.capacity() {
            // Once in a while, so that thousands of clusters do not look at each other.
            inline.retain(|slot| slot.strong_count() > 0);
        }
        inline.push(Arc::downgrade(&slot));
        drop(inline);
        Ok(slot)
    }

    fn own_or(&self, name: &str, source: Source) -> Source {
        let own =
            self.0.own.load(Ordering::Acquire) && (name == OWN_CERTIFICATE || name == OWN_ROOTS);
        if own { Source::Own } else { source }
    }

    fn slot_from(&self, name: &str, source: Source) -> Arc<SecretSlot> {
        let name: Arc<str> = name.into();
        let mut slots = lock(&self.0.slots);
        if let Some(slot) = slots.get(&(name.clone(), source.clone())) {
            return slot.clone();
        }
        let slot = Arc::new(self.empty(name.clone(), source.clone()));
        slots.insert((name, source), slot.clone());
        drop(slots);
        self.0.changed.send_modify(|n| *n += 1);
        slot
    }

    fn empty(&self, name: Arc<str>, source: Source) -> SecretSlot {
        SecretSlot {
            name,
            source,
            certificate: ArcSwapOption::empty(),
            trust: ArcSwapOption::empty(),
            version: AtomicU64::new(0),
            files: Mutex::new(None),
            store: self.0.clone(),
        }
    }

    /// Slots that a TLS context holds, by source; those nobody holds any more are forgotten.
    pub fn wanted(&self) -> Vec<Arc<SecretSlot>> {
        let mut slots = lock(&self.0.slots);
        slots.retain(|(_, source), slot| {
            matches!(source, Source::Static | Source::Own) || Arc::strong_count(slot) > 1
        });
        let mut wanted: Vec<_> = slots.values().cloned().collect();
        wanted.sort_by(|a, b| (&a.source, &a.name).cmp(&(&b.source, &b.name)));
        wanted
    }

    /// Changes when a slot is made or filled.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    /// All slots that somebody holds, those without a name included.
    pub fn held(&self) -> Vec<Arc<SecretSlot>> {
        let mut slots = self.wanted();
        let inline = lock(&self.0.inline);
        slots.extend(inline.iter().filter_map(std::sync::Weak::upgrade));
        slots
    }

    /// Reads files that secrets name once more, for those that were rotated in place. What does not
    /// parse (perhaps half written) leaves the old material.
    pub fn reload_files(&self) {
        let mut slots: Vec<Arc<SecretSlot>> = lock(&self.0.slots).values().cloned().collect();
        let inline = lock(&self.0.inline);
        slots.extend(inline.iter().filter_map(std::sync::Weak::upgrade));
        drop(inline);
        for slot in slots {
            let files = lock(&slot.files).clone();
            if let Some(Err(error)) = files.map(|secret| slot.fill(&secret)) {
                tracing::warn!(%error, "keeping the old secret: its files cannot be read");
            }
        }
    }
}

impl fmt::Debug for SecretStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(lock(&self.0.slots).values())
            .finish()
    }
}

/// Where a config source says a secret is.
fn source_of(source: &ConfigSource) -> Result<Source, ConfigError> {
    match &source.config_source_specifier {
        Some(ConfigSourceSpecifier::Ads(_)) => Ok(Source::Ads),
        Some(ConfigSourceSpecifier::Path(path)) => Ok(Source::Path(path.clone())),
        Some(ConfigSourceSpecifier::PathConfigSource(path)) => Ok(Source::Path(path.path.clone())),
        Some(ConfigSourceSpecifier::ApiConfigSource(api)) => {
            let service = api
                .grpc_services
                .first()
                .and_then(|s| s.target_specifier.as_ref());
            match service {
                Some(TargetSpecifier::EnvoyGrpc(grpc)) => {
                    Ok(Source::Grpc(grpc.cluster_name.clone()))
                }
                _ => Err(ConfigError::new(
                    "api_config_source.grpc_services",
                    "one envoy_grpc service is needed",
                )),
            }
        }
        Some(ConfigSourceSpecifier::Self_(_)) => Ok(Source::Ads),
        None => Err(ConfigError::new("config_source_specifier", "must be set")),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here panics halfway through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
