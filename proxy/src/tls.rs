//! TLS on both sides: Envoy's contexts become rustls configurations, rebuilt when a secret changes.
//! A connection keeps the configuration it began with; a new handshake uses the newest.
//!
//! Sessions are resumed only where nothing was proven by a certificate: a resumed handshake does not
//! look at certificates again, so with mutual TLS a peer could outlive its own.

pub mod hello;
mod stream;
mod gate;
mod hkdf;
mod scratch;
pub mod verify;
pub mod peer;
pub mod stats;

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CommonTlsContext, DownstreamTlsContext, TlsParameters, UpstreamTlsContext,
    common_tls_context::ValidationContextType, tls_parameters::TlsProtocol,
};
use rustls::{
    CipherSuite, CipherSuiteCommon, ClientConfig, CommonState, InvalidMessage, NamedGroup,
    ProtocolVersion, ServerConfig, SupportedCipherSuite, SupportedProtocolVersion,
    Tls13CipherSuite,
    client::{ResolvesClientCert, Resumption},
    crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs},
    pki_types::ServerName,
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
};

use crate::{
    config_error::ConfigError,
    info::TlsInfo,
    net::Transport,
    secret::{Certificate, SecretSlot, SecretStore, Trust},
};
use hello::Hello;
pub(crate) use peer::PeerCertificate;
pub use stream::TlsStream;
use verify::{ClientRules, NoVerification, Rules, ServerRules};

/// The one cryptography provider of this process.
pub fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(as_envoy()));
    &PROVIDER
}

/// rustls' suites and groups in Envoy's order. It takes AES-128 first, the cheaper one and good for decades,
/// and P-384 only where it is asked for.
fn as_envoy() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![
        aws_lc_rs::kx_group::X25519MLKEM768,
        aws_lc_rs::kx_group::X25519,
        aws_lc_rs::kx_group::SECP256R1,
    ];
    for suite in &mut provider.cipher_suites {
        *suite = with_our_hkdf(*suite);
    }
    provider.cipher_suites.sort_by_key(|suite| {
        let tls12 = suite.tls13().is_none();
        let cost = match suite.suite() {
            CipherSuite::TLS13_AES_128_GCM_SHA256
            | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
            | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => 0,
            CipherSuite::TLS13_AES_256_GCM_SHA384
            | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384
            | CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => 1,
            _ => 2,
        };
        (tls12, cost)
    });
    provider
}

/// A suite with our key schedule, if it is one of TLS 1.3 with SHA-256.
fn with_our_hkdf(suite: SupportedCipherSuite) -> SupportedCipherSuite {
    static AES_128: LazyLock<Option<Tls13CipherSuite>> =
        LazyLock::new(|| changed(aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256));
    static CHACHA20: LazyLock<Option<Tls13CipherSuite>> =
        LazyLock::new(|| changed(aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256));
    fn changed(suite: SupportedCipherSuite) -> Option<Tls13CipherSuite> {
        let theirs = suite.tls13()?;
        Some(Tls13CipherSuite {
            common: CipherSuiteCommon {
                suite: theirs.common.suite,
                hash_provider: theirs.common.hash_provider,
                confidentiality_limit: theirs.common.confidentiality_limit,
            },
            hkdf_provider: &hkdf::HkdfSha256,
            aead_alg: theirs.aead_alg,
            quic: None,
        })
    }
    let ours = match suite.suite() {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => AES_128.as_ref(),
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => CHACHA20.as_ref(),
        _ => None,
    };
    ours.map_or(suite, SupportedCipherSuite::Tls13)
}

/// What a client speaks unless told otherwise. Envoy: `tls_maximum_protocol_version`.
const CLIENT_VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS12];

/// What both sides have in common.
struct Common {
    certificates: Vec<Arc<SecretSlot>>,
    /// Where the roots come from; `None` when peers are not verified.
    trust: Option<Arc<SecretSlot>>,
    /// Rules of the context itself, besides those that come with the secret.
    rules: Rules,
    alpn: Vec<Vec<u8>>,
    provider: Arc<CryptoProvider>,
    versions: Vec<&'static SupportedProtocolVersion>,
}

impl Common {
    fn compile(
        context: &CommonTlsContext,
        store: &SecretStore,
        fallback: &[&'static SupportedProtocolVersion],
    ) -> Result<Common, ConfigError> {
        let unsupported = [
            (
                context.custom_tls_certificate_selector.is_some(),
                "custom_tls_certificate_selector",
            ),
            (
                context.tls_certificate_provider_instance.is_some(),
                "tls_certificate_provider_instance",
            ),
            (
                context.tls_certificate_certificate_provider.is_some()
                    || context
                        .tls_certificate_certificate_provider_instance
                        .is_some(),
                "tls_certificate_certificate_provider",
            ),
            (context.custom_handshaker.is_some(), "custom_handshaker"),
        ];
        if let Some((_, name)) = unsupported.into_iter().find(|(used, _)| *used) {
            return Err(ConfigError::new(name, "is not supported"));
        }
        let mut certificates = Vec::new();
        for (index, inline) in context.tls_certificates.iter().enumerate() {
            let slot = store
                .inline_certificate(inline)
                .map_err(|e| e.within(format_args!("tls_certificates[{index}]")))?;
            certificates.push(slot);
        }
        for (index, config) in context
            .tls_certificate_sds_secret_configs
            .iter()
            .enumerate()
        {
            let slot = store.subscribe(config).map_err(|e| {
                e.within(format_args!("tls_certificate_sds_secret_configs[{index}]"))
            })?;
            certificates.push(slot);
        }
        let (trust, rules) = validation(context, store)?;
        let (provider, versions) = parameters(context.tls_params.as_ref(), fallback)?;
        Ok(Common {
            certificates,
            trust,
            rules,
            alpn: context
                .alpn_protocols
                .iter()
                .map(|p| p.clone().into_bytes())
                .collect(),
            provider,
            versions,
        })
    }

    fn slots(&self) -> impl Iterator<Item = &Arc<SecretSlot>> {
        self.certificates.iter().chain(&self.trust)
    }

    /// Each version only grows, so equal sums mean equal versions.
    fn version(&self) -> u64 {
        self.slots().map(|slot| slot.version()).sum()
    }

    fn certificates(&self) -> Result<Vec<Arc<Certificate>>, NotReady> {
        let of = |slot: &Arc<SecretSlot>| {
            slot.certificate()
                .ok_or_else(|| NotReady(slot.name().clone()))
        };
        self.certificates.iter().map(of).collect()
    }

    /// The first of our groups that a client knows, as Envoy chooses; rustls would take the client's first.
    fn group(&self, hello: &hello::ClientHello) -> Option<NamedGroup> {
        let speaks = |version| self.versions.iter().any(|ours| ours.version == version);
        let version = if hello.tls13 && speaks(ProtocolVersion::TLSv1_3) {
            ProtocolVersion::TLSv1_3
        } else {
            ProtocolVersion::TLSv1_2
        };
        let mut usable = self
            .provider
            .kx_groups
            .iter()
            .filter(|group| group.usable_for_version(version))
            .map(|group| group.name());
        usable.find(|name| hello.groups.contains(&u16::from(*name)))
    }

    fn trust(&self) -> Result<Option<Arc<Trust>>, NotReady> {
        let of = |slot: &Arc<SecretSlot>| slot.trust().ok_or_else(|| NotReady(slot.name().clone()));
        self.trust.as_ref().map(of).transpose()
    }
}

/// A secret has not come yet; no handshake can be made without it.
struct NotReady(Arc<str>);

fn refused(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionRefused, reason)
}

impl From<NotReady> for io::Error {
    fn from(missing: NotReady) -> io::Error {
        refused(format!("TLS secret {} is not there yet", missing.0))
    }
}

fn broken(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

fn validation(
    context: &CommonTlsContext,
    store: &SecretStore,
) -> Result<(Option<Arc<SecretSlot>>, Rules), ConfigError> {
    let none = (None, Rules::default());
    match &context.validation_context_type {
        None => Ok(none),
        Some(ValidationContextType::ValidationContext(inline)) => {
            let within = |e: ConfigError| e.within("validation_context");
            let slot = store.inline_trust(inline).map_err(within)?;
            let has_roots = slot.trust().is_some_and(|t| !t.roots.is_empty());
            let rules = Rules::compile(inline).map_err(within)?;
            match (has_roots, rules.is_empty()) {
                (true, _) => Ok((Some(slot), rules)),
                (false, true) => Ok(none),
                // Names in a certificate mean nothing when anybody may have signed it.
                (false, false) => Err(within(ConfigError::new(
                    "trusted_ca",
                    "must be set when peers are held to names or hashes",
                ))),
            }
        }
        Some(ValidationContextType::ValidationContextSdsSecretConfig(config)) => {
            let slot = store
                .subscribe(config)
                .map_err(|e| e.within("validation_context_sds_secret_config"))?;
            Ok((Some(slot), Rules::default()))
        }
        Some(ValidationContextType::CombinedValidationContext(combined)) => {
            let within = |e: ConfigError| e.within("combined_validation_context");
            let default = combined
                .default_validation_context
                .clone()
                .unwrap_or_default();
            // The rules' own checks of what we cannot enforce apply here too.
            Trust::load(&default).map_err(within)?;
            let rules = Rules::compile(&default).map_err(within)?;
            let config = combined
                .validation_context_sds_secret_config
                .as_ref()
                .ok_or_else(|| {
                    within(ConfigError::new(
                        "validation_context_sds_secret_config",
                        "must be set",
                    ))
                })?;
            let slot = store.subscribe(config).map_err(within)?;
            Ok((Some(slot), rules))
        }
        Some(
            ValidationContextType::ValidationContextCertificateProvider(_)
            | ValidationContextType::ValidationContextCertificateProviderInstance(_),
        ) => Err(ConfigError::new(
            "validation_context_type",
            "certificate providers are not supported",
        )),
    }
}

type Parameters = (Arc<CryptoProvider>, Vec<&'static SupportedProtocolVersion>);

fn parameters(
    params: Option<&TlsParameters>,
    fallback: &[&'static SupportedProtocolVersion],
) -> Result<Parameters, ConfigError> {
    let Some(params) = params else {
        return Ok((provider().clone(), fallback.to_vec()));
    };
    let protocol = |value: i32| TlsProtocol::try_from(value).unwrap_or(TlsProtocol::TlsAuto);
    let minimum = protocol(params.tls_minimum_protocol_version);
    let maximum = protocol(params.tls_maximum_protocol_version);
    let versions: Vec<_> = match (minimum, maximum) {
        (TlsProtocol::TlSv13, TlsProtocol::TlsAuto | TlsProtocol::TlSv13) => {
            vec![&rustls::version::TLS13]
        }
        (TlsProtocol::TlSv13, _) | (_, TlsProtocol::TlSv10 | TlsProtocol::TlSv11) => {
            return Err(ConfigError::new(
                "tls_params",
                "no supported version lies in the range",
            ));
        }
        (_, TlsProtocol::TlSv12) => vec![&rustls::version::TLS12],
        (_, TlsProtocol::TlsAuto) => fallback.to_vec(),
        (_, TlsProtocol::TlSv13) => {
            vec![&rustls::version::TLS13, &rustls::version::TLS12]
        }
    };
    let groups = curves(&params.ecdh_curves)?;
    if params.cipher_suites.is_empty() {
        let Some(kx_groups) = groups else {
            return Ok((provider().clone(), versions));
        };
        let limited = CryptoProvider {
            kx_groups,
            ..as_envoy()
        };
        return Ok((Arc::new(limited), versions));
    }
    // The list is for TLS 1.2 and below, as Envoy has it; names in brackets are alternatives.
    let wanted: Vec<&str> = params
        .cipher_suites
        .iter()
        .flat_map(|s| s.trim_matches(['[', ']']).split('|'))
        .collect();
    let mut limited = as_envoy();
    if let Some(groups) = groups {
        limited.kx_groups = groups;
    }
    limited.cipher_suites.retain(|suite| match suite {
        SupportedCipherSuite::Tls13(_) => true,
        SupportedCipherSuite::Tls12(_) => wanted.contains(&cipher_name(*suite)),
    });
    let usable = |suite: &SupportedCipherSuite| versions.contains(&suite.version());
    if !limited.cipher_suites.iter().any(usable) {
        return Err(ConfigError::new(
            "tls_params.cipher_suites",
            "none of them is supported",
        ));
    }
    Ok((Arc::new(limited), versions))
}

/// The groups of these names, in their order; `None` is as we like it.
fn curves(names: &[String]) -> Result<Option<Vec<&'static dyn SupportedKxGroup>>, ConfigError> {
    if names.is_empty() {
        return Ok(None);
    }
    let group = |name: &String| {
        aws_lc_rs::ALL_KX_GROUPS
            .iter()
            .copied()
            .find(|group| curve_name(*group) == Some(name))
            .ok_or_else(|| {
                ConfigError::new(
                    "tls_params.ecdh_curves",
                    format!("{name:?} is not supported"),
                )
            })
    };
    names.iter().map(group).collect::<Result<_, _>>().map(Some)
}

/// BoringSSL's name of a group, which Envoy uses.
fn curve_name(group: &dyn SupportedKxGroup) -> Option<&'static str> {
    match group.name() {
        NamedGroup::X25519 => Some("X25519"),
        NamedGroup::secp256r1 => Some("P-256"),
        NamedGroup::secp384r1 => Some("P-384"),
        NamedGroup::X25519MLKEM768 => Some("X25519MLKEM768"),
        _ => None,
    }
}

/// Whether somebody speaks plain HTTP. BoringSSL tells them so in no alert.
fn is_plain_http(read: &[u8]) -> bool {
    [&b"GET "[..], b"POST", b"HEAD", b"PUT ", b"CONNE"]
        .iter()
        .any(|start| read.starts_with(start))
}

/// A configuration and the versions of the secrets it was made of.
struct Built<C> {
    version: u64,
    config: Arc<C>,
    local: Option<Arc<PeerCertificate>>,
}

/// The newest configuration; made anew by the first who finds a secret changed.
struct Cache<C> {
    built: ArcSwapOption<Built<C>>,
    building: Mutex<()>,
}

impl<C> Cache<C> {
    fn new() -> Cache<C> {
        Cache {
            built: ArcSwapOption::empty(),
            building: Mutex::new(()),
        }
    }

    fn get(
        &self,
        version: impl Fn() -> u64,
        build: impl FnOnce() -> io::Result<(C, Option<Arc<PeerCertificate>>)>,
    ) -> io::Result<Arc<Built<C>>> {
        let current = |wanted: u64| {
            self.built
                .load_full()
                .filter(|built| built.version == wanted)
        };
        if let Some(built) = current(version()) {
            return Ok(built);
        }
        let _building = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        // Read before the secrets, so that one changing meanwhile makes us build once more.
        let version = version();
        if let Some(built) = current(version) {
            return Ok(built);
        }
        let (config, local) = build()?;
        let built = Arc::new(Built {
            version,
            config: Arc::new(config),
            local,
        });
        self.built.store(Some(built.clone()));
        Ok(built)
    }
}

/// How we answer TLS clients.
pub struct ServerContext {
    common: Common,
    require_client_certificate: bool,
    require_sni: bool,
    resumption: bool,
    cache: Cache<ServerConfigs>,
}

impl ServerContext {
    /// Reads Envoy's context; secrets it names may come later ([`ServerContext::ready`]).
    ///
    /// # Errors
    /// Something in it is malformed, or could not be enforced.
    pub fn compile(
        context: &DownstreamTlsContext,
        store: &SecretStore,
    ) -> Result<ServerContext, ConfigError> {
        let common_context = context
            .common_tls_context
            .as_ref()
            .ok_or_else(|| ConfigError::new("common_tls_context", "must be set"))?;
        let common = Common::compile(common_context, store, rustls::ALL_VERSIONS)
            .map_err(|e| e.within("common_tls_context"))?;
        if common.certificates.is_empty() {
            return Err(ConfigError::new(
                "common_tls_context",
                "a server needs a certificate",
            ));
        }
        let require_client_certificate =
            context.require_client_certificate.is_some_and(|v| v.value);
        if require_client_certificate && common.trust.is_none() {
            return Err(ConfigError::new(
                "require_client_certificate",
                "needs a validation context with trusted_ca",
            ));
        }
        Ok(ServerContext {
            resumption: common.trust.is_none() && !context.disable_stateful_session_resumption,
            common,
            require_client_certificate,
            require_sni: context.require_sni.is_some_and(|v| v.value),
            cache: Cache::new(),
        })
    }

    /// Whether all secrets are there.
    pub fn ready(&self) -> bool {
        self.waiting_for().is_empty()
    }

    /// Secrets that are not there yet.
    pub fn waiting_for(&self) -> Vec<Arc<SecretSlot>> {
        self.common
            .slots()
            .filter(|slot| !slot.is_ready())
            .cloned()
            .collect()
    }

    /// Protocols we offer, in order.
    pub fn alpn(&self) -> &[Vec<u8>] {
        &self.common.alpn
    }

    /// Does the handshake; `read` is what was read of the connection already. The caller bounds the time;
    /// dropping the future drops the connection.
    ///
    /// # Errors
    /// A secret is missing, or the handshake failed (`source` is a [`rustls::Error`] then).
    pub async fn accept(
        &self,
        mut io: Transport,
        read: Vec<u8>,
    ) -> io::Result<(TlsStream, TlsInfo)> {
        let built = self.cache.get(|| self.common.version(), || self.build())?;
        let mut read = read;
        let hello = loop {
            match hello::read(&read) {
                Hello::Incomplete => {
                    if stream::read_more(&mut io, &mut read).await? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Hello::Complete(hello) => break Some(hello),
                Hello::NotTls if is_plain_http(&read) => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType),
                    ));
                }
                // rustls will tell the peer what is wrong with it.
                Hello::NotTls | Hello::Broken => break None,
            }
        };
        let name = hello.as_ref().and_then(|hello| hello.server_name.clone());
        if self.require_sni && name.is_none() {
            return Err(refused("the client sent no SNI"));
        }
        let group = hello.as_ref().and_then(|hello| self.common.group(hello));
        let speaks = hello.is_none_or(|hello| {
            hello.protocols.is_empty()
                || hello.protocols.iter().any(|p| self.common.alpn.contains(p))
        });
        // As Envoy: who offers only what we do not know goes on without ALPN; rustls would end it.
        let config = built.config.choose(group, speaks).clone();
        let mutual = self.common.trust.is_some();
        let stream = TlsStream::accept(io, read, config, mutual).await?;
        let mut info = info(stream.common(), mutual, built.local.as_deref());
        info.server_name = name;
        Ok((stream, info))
    }

    fn build(&self) -> io::Result<(ServerConfigs, Option<Arc<PeerCertificate>>)> {
        let certificates = self.common.certificates()?;
        let local = certificates.first().map(|c| c.facts.clone());
        let verifier = match self.common.trust()? {
            None => WebPkiClientVerifier::no_client_auth(),
            Some(trust) => {
                let chains = WebPkiClientVerifier::builder_with_provider(
                    trust.roots.clone(),
                    self.common.provider.clone(),
                );
                let chains = if self.require_client_certificate {
                    chains
                } else {
                    chains.allow_unauthenticated()
                };
                let chains = chains
                    .build()
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
                let rules = vec![trust.rules.clone(), self.common.rules.clone()];
                Arc::new(ClientRules::new(chains, rules))
            }
        };
        let resolver = Arc::new(BySni { certificates });
        // Its keys change every few hours and are those of these configurations alone.
        let ticketer = if self.resumption {
            Some(aws_lc_rs::Ticketer::new().map_err(broken)?)
        } else {
            None
        };
        let with = |provider: Arc<CryptoProvider>| {
            let mut config = ServerConfig::builder_with_provider(provider)
                .with_protocol_versions(&self.common.versions)
                .map_err(broken)?
                .with_client_cert_verifier(verifier.clone())
                .with_cert_resolver(resolver.clone());
            // As Envoy: our order of suites, not the client's.
            config.ignore_client_order = true;
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            if let Some(ticketer) = &ticketer {
                config.ticketer = ticketer.clone();
                // Who resumes gets a new one; more would only be made to be thrown away.
                config.send_tls13_tickets = 1;
            }
            let silent = Arc::new(config.clone());
            config.alpn_protocols.clone_from(&self.common.alpn);
            let speaking = Arc::new(config);
            Ok::<_, io::Error>(ByAlpn { speaking, silent })
        };
        let all = &self.common.provider;
        let only = |group: &&'static dyn SupportedKxGroup| {
            let limited = CryptoProvider {
                kx_groups: vec![*group],
                ..CryptoProvider::clone(all)
            };
            Ok::<_, io::Error>((group.name(), with(Arc::new(limited))?))
        };
        let configs = ServerConfigs {
            by_group: all.kx_groups.iter().map(only).collect::<Result<_, _>>()?,
            any: with(all.clone())?,
        };
        Ok((configs, local))
    }
}

/// The same configuration for each group that we may choose, and for who knows none of them.
struct ServerConfigs {
    by_group: Vec<(NamedGroup, ByAlpn)>,
    any: ByAlpn,
}

impl ServerConfigs {
    fn choose(&self, group: Option<NamedGroup>, speaking: bool) -> &Arc<ServerConfig> {
        let limited = self.by_group.iter().find(|(name, _)| Some(*name) == group);
        let pair = limited.map_or(&self.any, |(_, pair)| pair);
        if speaking {
            &pair.speaking
        } else {
            &pair.silent
        }
    }
}

/// The same configuration with our protocols and without.
struct ByAlpn {
    speaking: Arc<ServerConfig>,
    silent: Arc<ServerConfig>,
}

impl fmt::Debug for ServerContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerContext")
            .field("certificates", &self.common.certificates)
            .field("trust", &self.common.trust)
            .field(
                "require_client_certificate",
                &self.require_client_certificate,
            )
            .finish_non_exhaustive()
    }
}

/// The certificate whose DNS SAN the client asked for, else the first.
#[derive(Debug)]
struct BySni {
    certificates: Vec<Arc<Certificate>>,
}

impl ResolvesServerCert for BySni {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let named = hello.server_name().and_then(|name| {
            self.certificates
                .iter()
                .find(|c| c.facts.has_dns_name(name))
        });
        named.or(self.certificates.first()).map(|c| c.key.clone())
    }
}

/// How we speak TLS to upstreams.
pub struct ClientContext {
    common: Common,
    sni: String,
    auto_sni_san_validation: bool,
    cache: Cache<ClientConfig>,
}

impl ClientContext {
    /// Reads Envoy's context; secrets it names may come later ([`ClientContext::ready`]).
    ///
    /// # Errors
    /// Something in it is malformed, or could not be enforced.
    pub fn compile(
        context: &UpstreamTlsContext,
        store: &SecretStore,
    ) -> Result<ClientContext, ConfigError> {
        let empty = CommonTlsContext::default();
        let common_context = context.common_tls_context.as_ref().unwrap_or(&empty);
        let common = Common::compile(common_context, store, CLIENT_VERSIONS)
            .map_err(|e| e.within("common_tls_context"))?;
        if context.auto_sni_san_validation && common.trust.is_none() {
            return Err(ConfigError::new(
                "auto_sni_san_validation",
                "needs a validation context with trusted_ca",
            ));
        }
        if common.certificates.len() > 1 {
            return Err(ConfigError::new(
                "common_tls_context.tls_certificates",
                "a client has at most one certificate",
            ));
        }
        if !context.sni.is_empty() {
            server_name(&context.sni).map_err(|e| ConfigError::new("sni", e.to_string()))?;
        }
        Ok(ClientContext {
            common,
            sni: context.sni.clone(),
            auto_sni_san_validation: context.auto_sni_san_validation,
            cache: Cache::new(),
        })
    }

    /// Whether all secrets are there.
    pub fn ready(&self) -> bool {
        self.waiting_for().is_empty()
    }

    /// Secrets that are not there yet.
    pub fn waiting_for(&self) -> Vec<Arc<SecretSlot>> {
        self.common
            .slots()
            .filter(|slot| !slot.is_ready())
            .cloned()
            .collect()
    }

    /// Protocols the context itself offers, in order; empty when it leaves that to the caller.
    pub fn alpn(&self) -> &[Vec<u8>] {
        &self.common.alpn
    }

    /// The server name the context sends, if it has one.
    pub fn sni(&self) -> Option<&str> {
        Some(self.sni.as_str()).filter(|s| !s.is_empty())
    }

    /// Whether the server's certificate is checked against anything.
    pub fn verifies_peer(&self) -> bool {
        self.common.trust.is_some()
    }

    /// Grows when a secret changes: connections made before carry older credentials.
    pub fn version(&self) -> u64 {
        self.common.version()
    }

    /// Does the handshake. `sni` replaces the context's server name, `alpn` its protocols. The caller
    /// bounds the time; dropping the future drops the connection.
    ///
    /// # Errors
    /// A secret is missing, or the handshake failed (`source` is a [`rustls::Error`] then).
    pub async fn connect(
        &self,
        io: Transport,
        sni: Option<&str>,
        alpn: Option<&[Vec<u8>]>,
    ) -> io::Result<(TlsStream, TlsInfo)> {
        let built = self.cache.get(|| self.common.version(), || self.build())?;
        let name = server_name(sni.unwrap_or(&self.sni))?;
        let config = built.config.clone();
        let stream = TlsStream::connect(io, config, name, alpn.map(<[_]>::to_vec)).await?;
        let info = info(
            stream.common(),
            self.common.trust.is_some(),
            built.local.as_deref(),
        );
        Ok((stream, info))
    }

    fn build(&self) -> io::Result<(ClientConfig, Option<Arc<PeerCertificate>>)> {
        let certificate = self.common.certificates()?.into_iter().next();
        let trust = self.common.trust()?;
        let builder = ClientConfig::builder_with_provider(self.common.provider.clone())
            .with_protocol_versions(&self.common.versions)
            .map_err(broken)?
            .dangerous();
        let resumable = trust.is_none() && certificate.is_none();
        let builder = match trust {
            None => builder.with_custom_certificate_verifier(Arc::new(NoVerification::new(
                self.common.provider.clone(),
            ))),
            Some(trust) => {
                let rules = vec![trust.rules.clone(), self.common.rules.clone()];
                builder.with_custom_certificate_verifier(Arc::new(ServerRules::new(
                    trust.roots.clone(),
                    rules,
                    self.auto_sni_san_validation,
                    self.common.provider.clone(),
                )))
            }
        };
        let local = certificate.as_ref().map(|c| c.facts.clone());
        let mut config = match certificate {
            None => builder.with_no_client_auth(),
            Some(certificate) => {
                builder.with_client_cert_resolver(Arc::new(Always(certificate.key.clone())))
            }
        };
        config.alpn_protocols.clone_from(&self.common.alpn);
        if !resumable {
            config.resumption = Resumption::disabled();
        }
        Ok((config, local))
    }
}

impl fmt::Debug for ClientContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientContext")
            .field("sni", &self.sni)
            .field("certificates", &self.common.certificates)
            .field("trust", &self.common.trust)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Always(Arc<CertifiedKey>);

impl ResolvesClientCert for Always {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// The name for the handshake. rustls sends none for an address, so an address stands for "no SNI".
fn server_name(sni: &str) -> io::Result<ServerName<'static>> {
    if sni.is_empty() {
        return Ok(ServerName::IpAddress(
            IpAddr::V4(Ipv4Addr::UNSPECIFIED).into(),
        ));
    }
    ServerName::try_from(sni.to_owned()).map_err(|_| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{sni:?} cannot be sent as SNI"),
        )
    })
}

fn info(connection: &CommonState, verified: bool, local: Option<&PeerCertificate>) -> TlsInfo {
    let mut info = TlsInfo {
        version: match connection.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
            _ => "TLSv1.2",
        },
        cipher: connection
            .negotiated_cipher_suite()
            .map(cipher_name)
            .unwrap_or_default()
            .to_owned(),
        alpn: connection.alpn_protocol().map(Bytes::copy_from_slice),
        ..TlsInfo::default()
    };
    if let Some(local) = local {
        info.local_uri_san = local.uri_sans.first().cloned();
        info.local_more_uri_sans = local.uri_sans.iter().skip(1).cloned().collect();
        info.local_subject = Some(local.subject.clone());
    }
    // What a peer says of itself is nothing until somebody we trust has signed it.
    let chain = connection.peer_certificates().filter(|_| verified);
    if let Some((leaf, rest)) = chain.and_then(<[_]>::split_first)
        && let Ok(peer) = PeerCertificate::of(leaf)
    {
        info.peer_chain_der = rest.iter().map(|der| Bytes::copy_from_slice(der)).collect();
        info.peer_uri_san = peer.uri_sans.first().cloned();
        info.peer_more_uri_sans = peer.uri_sans.iter().skip(1).cloned().collect();
        info.peer_subject = Some(peer.subject.clone());
        info.peer_fingerprint = Some(peer.fingerprint.clone());
        info.peer_dns_sans.clone_from(&peer.dns_sans);
        info.peer_certificate_der = Some(Bytes::copy_from_slice(leaf));
    }
    info
}

/// OpenSSL's name of a suite, which Envoy logs.
fn cipher_name(suite: SupportedCipherSuite) -> &'static str {
    match suite.suite() {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => "TLS_AES_128_GCM_SHA256",
        CipherSuite::TLS13_AES_256_GCM_SHA384 => "TLS_AES_256_GCM_SHA384",
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => "TLS_CHACHA20_POLY1305_SHA256",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 => "ECDHE-ECDSA-AES128-GCM-SHA256",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 => "ECDHE-ECDSA-AES256-GCM-SHA384",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256 => {
            "ECDHE-ECDSA-CHACHA20-POLY1305"
        }
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => "ECDHE-RSA-AES128-GCM-SHA256",
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => "ECDHE-RSA-AES256-GCM-SHA384",
        CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 => "ECDHE-RSA-CHACHA20-POLY1305",
        // The provider has no others.
        _ => "",
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
