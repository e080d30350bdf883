//! Who Mixer is to an adapter, and who the adapter must be: files, which are read again when they change, and
//! tokens.

use std::{
    io::Read as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use lateen_adapter::Env;
use tokio::time::{Instant, sleep};
use tonic::{
    Request,
    metadata::{Ascii, MetadataKey, MetadataValue},
};
use zeroize::Zeroizing;

use super::{channel::TlsSettings, oauth::Tokens, tls};
use crate::config::remote::handler::{AuthHeader, Authentication};

/// How often files are looked at. A change is in force after this time.
const LOOK: Duration = Duration::from_secs(1);
/// Largest file that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// What the files of a connection hold.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Material {
    /// `caCertificates`; `None`: it names no file.
    pub(super) roots: Option<Vec<u8>>,
    /// `clientCertificate`.
    pub(super) chain: Vec<u8>,
    /// `privateKey`.
    pub(super) key: Zeroizing<Vec<u8>>,
    /// `tokenPath`.
    pub(super) token: Zeroizing<Vec<u8>>,
    /// `oauth.clientSecret`.
    pub(super) secret: Zeroizing<Vec<u8>>,
}

impl Material {
    fn read(authentication: &Authentication) -> Result<Self, String> {
        let mut material = Self::default();
        let roots = match authentication {
            Authentication::Plain => return Ok(material),
            Authentication::Tls(tls) => {
                if is_named(&tls.token_path) {
                    material.token = read("tokenPath", &tls.token_path)?;
                }
                if let Some(oauth) = &tls.oauth {
                    material.secret = read("oauth.clientSecret", &oauth.client_secret)?;
                }
                &tls.ca_certificates
            }
            Authentication::Mutual(mutual) => {
                material.key = read("privateKey", &mutual.private_key)?;
                material.chain = read("clientCertificate", &mutual.client_certificate)?.to_vec();
                &mutual.ca_certificates
            }
        };
        if is_named(roots) {
            material.roots = Some(read("caCertificates", roots)?.to_vec());
        }
        Ok(material)
    }
}

fn is_named(path: &Path) -> bool {
    !path.as_os_str().is_empty()
}

fn read(field: &str, path: &Path) -> Result<Zeroizing<Vec<u8>>, String> {
    let fail = |reason: &dyn std::fmt::Display| format!("{field} {}: {reason}", path.display());
    let file = std::fs::File::open(path).map_err(|error| fail(&error))?;
    let mut content = Zeroizing::new(Vec::new());
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut content)
        .map_err(|error| fail(&error))?;
    if content.len() as u64 > MAX_FILE_BYTES {
        return Err(fail(&format_args!(
            "it has more than {MAX_FILE_BYTES} bytes"
        )));
    }
    Ok(content)
}

/// Where a token goes.
#[derive(Debug)]
struct Place {
    header: MetadataKey<Ascii>,
    prefix: &'static str,
}

impl Place {
    fn value(&self, token: &[u8]) -> Result<MetadataValue<Ascii>, String> {
        let token = std::str::from_utf8(token)
            .map(str::trim)
            .unwrap_or_default();
        if token.is_empty() {
            return Err("tokenPath: the file has no token".to_owned());
        }
        let text = Zeroizing::new(format!("{}{token}", self.prefix));
        let mut value: MetadataValue<Ascii> = text
            .parse()
            .map_err(|_| "tokenPath: the token is no header's value".to_owned())?;
        value.set_sensitive(true);
        Ok(value)
    }
}

enum Token {
    Nothing,
    File(ArcSwap<MetadataValue<Ascii>>),
    OAuth(Box<Tokens>),
}

/// Who dials anew when TLS changes.
pub(super) trait Renew: Send + Sync + 'static {
    /// Has calls from now on use new connections with `tls`.
    fn renew(&self, tls: TlsSettings) -> Result<(), String>;
}

/// The credentials of one connection.
pub(super) struct Credentials {
    /// `HOST:PORT`.
    address: String,
    authentication: Authentication,
    /// For ALPN.
    protocol: &'static [u8],
    material: Mutex<Arc<Material>>,
    place: Place,
    token: Token,
}

impl Credentials {
    /// Reads the files of `authentication`, for connections to `address` (`HOST:PORT`) that speak `protocol`.
    pub(super) fn load(
        address: &str,
        authentication: &Authentication,
        protocol: &'static [u8],
    ) -> Result<(Self, Option<TlsSettings>), String> {
        let material = Material::read(authentication)?;
        let settings = tls::settings(authentication, &material, address, protocol)?;
        let mut place = Place {
            header: MetadataKey::from_static("authorization"),
            prefix: "",
        };
        let mut token = Token::Nothing;
        if let Authentication::Tls(tls) = authentication {
            if !tls.custom_header.is_empty() {
                let header = tls.custom_header.to_ascii_lowercase();
                place.header = header
                    .parse()
                    .map_err(|_| format!("customHeader {header:?} is no header's name"))?;
            } else if tls.auth_header == AuthHeader::Bearer || tls.oauth.is_some() {
                place.prefix = "Bearer ";
            }
            if let Some(oauth) = &tls.oauth {
                token = Token::OAuth(Box::new(Tokens::new(oauth.clone())?));
            } else if is_named(&tls.token_path) {
                token = Token::File(ArcSwap::from_pointee(place.value(&material.token)?));
            }
        }
        let credentials = Self {
            address: address.to_owned(),
            authentication: authentication.clone(),
            protocol,
            material: Mutex::new(Arc::new(material)),
            place,
            token,
        };
        Ok((credentials, settings))
    }

    fn material(&self) -> Arc<Material> {
        let material = self.material.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&material)
    }

    /// Looks at the files from now on, and fetches tokens.
    pub(super) fn watch(self: &Arc<Self>, link: &Arc<impl Renew>, env: &Env) -> Result<(), String> {
        if self.authentication == Authentication::Plain {
            return Ok(());
        }
        let spawn = |task| env.spawn(task).map_err(|error| error.to_string());
        if let Token::OAuth(_) = &self.token {
            let (owner, failures) = (Arc::clone(self), env.counter("token_failures"));
            let fetched = env.counter("tokens_fetched");
            spawn(Box::pin(async move {
                if let Token::OAuth(tokens) = &owner.token {
                    tokens.keep(|| owner.material(), &fetched, &failures).await;
                }
            }) as futures::future::BoxFuture<'static, ()>)?;
        }
        let (owner, link) = (Arc::clone(self), Arc::clone(link));
        let reloaded = env.counter("credentials_reloaded");
        let refused = env.counter("credentials_refused");
        spawn(Box::pin(async move {
            let mut last_problem = None;
            loop {
                sleep(LOOK).await;
                match owner.look(&*link).await {
                    Ok(false) => {}
                    Ok(true) => {
                        reloaded.inc();
                        last_problem = None;
                        tracing::info!(address = owner.address, "credentials changed");
                    }
                    // Files are not replaced all at once: what is in force stays.
                    Err(problem) => {
                        if last_problem.as_ref() != Some(&problem) {
                            refused.inc();
                            tracing::warn!(
                                address = owner.address,
                                problem,
                                "credentials changed and cannot be used; the former ones stay"
                            );
                            last_problem = Some(problem);
                        }
                    }
                }
            }
        }))
    }

    /// Takes what the files hold now. `true`: it is something else.
    async fn look(&self, link: &impl Renew) -> Result<bool, String> {
        let authentication = self.authentication.clone();
        let read = tokio::task::spawn_blocking(move || Material::read(&authentication)).await;
        let material = read.map_err(|error| error.to_string())??;
        let before = self.material();
        if *before == material {
            return Ok(false);
        }
        let token = match &self.token {
            Token::File(_) => Some(self.place.value(&material.token)?),
            Token::Nothing | Token::OAuth(_) => None,
        };
        let is_tls_same = before.roots == material.roots
            && before.chain == material.chain
            && before.key == material.key;
        if !is_tls_same {
            let settings = tls::settings(
                &self.authentication,
                &material,
                &self.address,
                self.protocol,
            )?;
            settings.map_or(Ok(()), |settings| link.renew(settings))?;
        }
        if let (Token::File(place), Some(token)) = (&self.token, token) {
            place.store(Arc::new(token));
        }
        let has_secret = before.secret != material.secret;
        *self.material.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(material);
        if has_secret {
            self.refuse();
        }
        Ok(true)
    }

    /// The header that carries the token; `None`: there is no token. Waits for one that is on its way.
    pub(super) async fn header(
        &self,
        deadline: Instant,
    ) -> Result<Option<(&MetadataKey<Ascii>, MetadataValue<Ascii>)>, String> {
        let value = match &self.token {
            Token::Nothing => return Ok(None),
            Token::File(token) => MetadataValue::clone(&token.load()),
            Token::OAuth(tokens) => {
                let token = tokens.token(deadline).await?;
                self.place.value(token.as_bytes())?
            }
        };
        Ok(Some((&self.place.header, value)))
    }

    /// Adds the token to a call. Waits for one that is on its way.
    pub(super) async fn sign(
        &self,
        request: &mut Request<Bytes>,
        deadline: Instant,
    ) -> Result<(), String> {
        if let Some((header, value)) = self.header(deadline).await? {
            request.metadata_mut().insert(header.clone(), value);
        }
        Ok(())
    }

    /// The adapter does not take the token: another is fetched.
    pub(super) fn refuse(&self) {
        if let Token::OAuth(tokens) = &self.token {
            tokens.refuse();
        }
    }
}
