//! The certificate that webhooks are served with, and the roots that API servers shall check it by: this program's own
//! from Auth, or files. New ones are used from the next handshake on.

use std::path::PathBuf;
use std::sync::Arc;

use lateen_identity::pki_types::pem::PemObject as _;
use lateen_identity::pki_types::{CertificateDer, PrivateKeyDer};
use lateen_identity::rustls::server::{ClientHello, ResolvesServerCert, ServerConfig};
use lateen_identity::rustls::sign::CertifiedKey;
use lateen_identity::{provider, rustls};
use lateen_service::identity;
use lateen_service::shutdown::Drain;
use tokio::sync::watch;

use super::file::{self, FileError};
use super::{WebhookArgs, WebhookError};

/// HTTP, newest first; API servers speak HTTP/2 where they can.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// See the module.
#[derive(Clone, Debug)]
pub struct Certificate {
    resolver: Arc<dyn ResolvesServerCert>,
    roots: watch::Receiver<Option<String>>,
}

impl Certificate {
    /// By the flags: from files if they name some, else from Auth.
    ///
    /// # Errors
    /// Neither is to be had.
    pub fn new(
        args: &WebhookArgs,
        identity: Option<&identity::Source>,
        drain: &Drain,
    ) -> Result<Self, WebhookError> {
        let files = [
            &args.webhook_certificate,
            &args.webhook_key,
            &args.webhook_roots,
        ];
        if let [Some(chain), Some(key), Some(roots)] = files {
            return Ok(Self::of_files(
                [chain, key, roots].map(Clone::clone),
                drain,
            )?);
        }
        let identity = identity.ok_or(WebhookError::NoCertificate)?;
        Ok(Self::of_identity(identity, drain))
    }

    fn of_identity(identity: &identity::Source, drain: &Drain) -> Self {
        let (out, roots) = watch::channel(None);
        let mut newest = identity.subscribe();
        drain.spawn_until_stop(async move {
            loop {
                let svid = newest.borrow_and_update().clone();
                if let Some(svid) = svid {
                    let domain = svid.spiffe_id().trust_domain().clone();
                    // Those of the own trust domain: nobody else's may vouch for a webhook.
                    let pem = svid.bundle().pem(&domain).map(str::to_owned);
                    out.send_if_modified(|roots| std::mem::replace(roots, pem.clone()) != pem);
                }
                if newest.changed().await.is_err() {
                    return;
                }
            }
        });
        Self {
            resolver: identity.cell(),
            roots,
        }
    }

    fn of_files(files: [PathBuf; 3], drain: &Drain) -> Result<Self, FileError> {
        let mut pairs = file::follow(files.to_vec(), Pair::parse, drain)?;
        let (out, roots) = watch::channel(Some(pairs.borrow().roots.clone()));
        let resolver = Arc::new(Files(pairs.clone()));
        drain.spawn_until_stop(async move {
            while pairs.changed().await.is_ok() {
                let pem = Some(pairs.borrow_and_update().roots.clone());
                out.send_if_modified(|roots| std::mem::replace(roots, pem.clone()) != pem);
            }
        });
        Ok(Self { resolver, roots })
    }

    /// The roots, as PEM; `None` before Auth has answered.
    #[must_use]
    pub fn roots(&self) -> watch::Receiver<Option<String>> {
        self.roots.clone()
    }

    /// For a listener. Clients need no certificate: whoever asks learns only what the request says anyway.
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(rustls::ALL_VERSIONS)
            .expect("aws-lc-rs supports the versions rustls has")
            .with_no_client_auth()
            .with_cert_resolver(self.resolver.clone());
        config.alpn_protocols = PROTOCOLS.iter().map(|name| name.to_vec()).collect();
        Arc::new(config)
    }
}

/// What three files say.
#[derive(Debug)]
struct Pair {
    key: Arc<CertifiedKey>,
    roots: String,
}

impl Pair {
    fn parse(texts: &[String]) -> Result<Self, String> {
        let [chain, key, roots] = texts else {
            return Err("three files are needed".to_owned());
        };
        let certificates = |pem: &str| {
            let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
            match all {
                Ok(all) if all.is_empty() => Err("no PEM block CERTIFICATE".to_owned()),
                Ok(all) => Ok(all),
                Err(error) => Err(error.to_string()),
            }
        };
        let chain = certificates(chain).map_err(|error| format!("the certificate: {error}"))?;
        certificates(roots).map_err(|error| format!("the roots: {error}"))?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
            .map_err(|error| format!("the key: {error}"))?;
        // Refuses a key that is another certificate's.
        let key = CertifiedKey::from_der(chain, key, &provider())
            .map_err(|error| format!("certificate and key: {error}"))?;
        Ok(Self {
            key: Arc::new(key),
            roots: roots.clone(),
        })
    }
}

#[derive(Debug)]
struct Files(watch::Receiver<Arc<Pair>>);

impl ResolvesServerCert for Files {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.borrow().key.clone())
    }
}
