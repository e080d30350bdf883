//! Handlers of remote adapters: their parameters as the adapter's own message, and how the adapter is reached.

use std::{path::PathBuf, sync::Arc, time::Duration};

use lateen_engine::parse_duration;
use prost::Message as _;
use prost_reflect::{DeserializeOptions, DynamicMessage};
use serde::Deserialize;
use serde_json::Value as Json;

use super::RemoteAdapter;
use crate::config::object::Fault;

/// A handler of a remote adapter.
#[derive(Debug)]
pub struct RemoteHandler {
    /// `NAME.handler.NAMESPACE`.
    pub name: Arc<str>,
    /// Its adapter.
    pub adapter: Arc<RemoteAdapter>,
    /// The parameters, as calls carry them in `adapter_config`.
    pub params: prost_types::Any,
    /// How the adapter is reached.
    pub connection: Connection,
}

/// Where an adapter is, and how it is spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// `HOST:PORT`.
    pub address: String,
    /// At most so long for a call; `None`: as long as the caller waits.
    pub timeout: Option<Duration>,
    /// Who each side is.
    pub authentication: Authentication,
}

/// How Mixer and an adapter know each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authentication {
    /// Not at all: no TLS.
    Plain,
    /// The adapter by TLS, Mixer by a token.
    Tls(Tls),
    /// Both by TLS.
    Mutual(Mutual),
}

/// TLS, and a token with each call. Files are read again when they change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Tls {
    /// PEM of who signs the adapter's certificate; empty: the system's.
    #[serde(alias = "ca_certificates")]
    pub ca_certificates: PathBuf,
    /// File of a token.
    #[serde(alias = "token_path")]
    pub token_path: PathBuf,
    /// Who gives tokens.
    pub oauth: Option<OAuth>,
    /// How the token is sent in `authorization`.
    #[serde(alias = "auth_header")]
    pub auth_header: AuthHeader,
    /// The header the token is sent in instead of `authorization`.
    #[serde(alias = "custom_header")]
    pub custom_header: String,
    /// The name in the adapter's certificate; empty: the host of the address.
    #[serde(alias = "server_name")]
    pub server_name: String,
}

/// How a token is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum AuthHeader {
    /// By itself.
    #[default]
    Plain,
    /// After `Bearer`.
    Bearer,
}

/// OAuth 2 client credentials (RFC 6749 §4.4).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct OAuth {
    /// Mixer's name there.
    #[serde(alias = "client_id")]
    pub client_id: String,
    /// File of Mixer's secret.
    #[serde(alias = "client_secret")]
    pub client_secret: PathBuf,
    /// Who gives the token.
    #[serde(alias = "token_url")]
    pub token_url: String,
    /// What the token is for.
    pub scopes: Vec<String>,
    /// Sent along with the request for a token.
    #[serde(alias = "endpoint_params")]
    pub endpoint_params: std::collections::BTreeMap<String, String>,
}

/// Mutual TLS by files, which are read again when they change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Mutual {
    /// PEM of Mixer's key.
    #[serde(alias = "private_key")]
    pub private_key: PathBuf,
    /// PEM of Mixer's certificate chain.
    #[serde(alias = "client_certificate")]
    pub client_certificate: PathBuf,
    /// PEM of who signs the adapter's certificate.
    #[serde(alias = "ca_certificates")]
    pub ca_certificates: PathBuf,
    /// The name in the adapter's certificate; empty: Mixer's own SPIFFE ID is asked for, as Istio did.
    #[serde(alias = "server_name")]
    pub server_name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawConnection {
    address: String,
    timeout: Option<String>,
    authentication: RawAuthentication,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawAuthentication {
    tls: Option<Tls>,
    mutual: Option<Mutual>,
}

impl Authentication {
    /// Reads `authentication`, of a handler's connection or of a compiled adapter's parameters; null: none.
    ///
    /// # Errors
    /// What is wrong with it, and at which field: empty, or `.tls.oauth`.
    pub fn read(json: &Json) -> Result<Self, Fault> {
        let raw = match json {
            Json::Null => RawAuthentication::default(),
            json => RawAuthentication::deserialize(json).map_err(|error| Fault::new("", error))?,
        };
        Self::of(raw)
    }

    fn of(raw: RawAuthentication) -> Result<Self, Fault> {
        let fail = |field: &str, reason: &str| Err(Fault::new(field, reason));
        match raw {
            RawAuthentication {
                tls: None,
                mutual: None,
            } => Ok(Self::Plain),
            RawAuthentication {
                tls: Some(_),
                mutual: Some(_),
            } => fail("", "it is either tls or mutual"),
            RawAuthentication { tls: Some(tls), .. } => {
                let has_file = !tls.token_path.as_os_str().is_empty();
                if has_file && tls.oauth.is_some() {
                    return fail(
                        ".tls",
                        "the token comes either from tokenPath or from oauth",
                    );
                }
                if let Some(oauth) = &tls.oauth
                    && (oauth.client_id.is_empty()
                        || oauth.client_secret.as_os_str().is_empty()
                        || url::Url::parse(&oauth.token_url).is_err())
                {
                    let reason = "it needs clientId, clientSecret (a file) and tokenUrl (a URL)";
                    return fail(".tls.oauth", reason);
                }
                Ok(Self::Tls(tls))
            }
            RawAuthentication {
                mutual: Some(mutual),
                ..
            } => {
                let is_there = |path: &PathBuf| !path.as_os_str().is_empty();
                if !is_there(&mutual.private_key) || !is_there(&mutual.client_certificate) {
                    let reason = "it needs privateKey and clientCertificate, which are files";
                    return fail(".mutual", reason);
                }
                Ok(Self::Mutual(mutual))
            }
        }
    }
}

impl Connection {
    /// Reads `connection` of a handler.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(json: &Json) -> Result<Self, Fault> {
        let fail =
            |field: &str, reason: String| Err(Fault::new(format!("connection{field}"), reason));
        let raw = match json {
            Json::Null => RawConnection::default(),
            json => match RawConnection::deserialize(json) {
                Ok(raw) => raw,
                Err(error) => return fail("", error.to_string()),
            },
        };
        if raw.address.is_empty() {
            return fail(".address", "say where the adapter is: HOST:PORT".to_owned());
        }
        let has_port = raw
            .address
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        if !has_port {
            return fail(".address", format!("{:?} is no HOST:PORT", raw.address));
        }
        let timeout = match raw.timeout.as_deref() {
            None | Some("") => None,
            Some(text) => match parse_duration(text).and_then(|span| span.to_std().ok()) {
                Some(span) if !span.is_zero() => Some(span),
                _ => {
                    return fail(
                        ".timeout",
                        format!("{text:?} is no time; write 100ms or 2s"),
                    );
                }
            },
        };
        let authentication =
            Authentication::of(raw.authentication).map_err(|Fault { field, reason }| {
                Fault::new(format!("connection.authentication{field}"), reason)
            })?;
        Ok(Self {
            address: raw.address,
            timeout,
            authentication,
        })
    }
}

impl RemoteHandler {
    /// Reads a handler of `adapter`.
    ///
    /// # Errors
    /// Parameters that are not the adapter's, or a connection that makes no sense.
    pub fn read(
        name: Arc<str>,
        adapter: Arc<RemoteAdapter>,
        params: &Json,
        connection: &Json,
    ) -> Result<Self, Fault> {
        let connection = Connection::read(connection)?;
        let is_empty =
            params.is_null() || params.as_object().is_some_and(serde_json::Map::is_empty);
        let params = match &adapter.params {
            None if is_empty => prost_types::Any::default(),
            None => {
                let reason = format!("{} takes no parameters: it has no config", adapter.name);
                return Err(Fault::new("params", reason));
            }
            Some(message) => {
                let options = DeserializeOptions::new().deny_unknown_fields(true);
                let nothing = Json::Object(serde_json::Map::new());
                let written = if is_empty { &nothing } else { params };
                let value =
                    DynamicMessage::deserialize_with_options(message.clone(), written, &options)
                        .map_err(|error| Fault::new("params", error))?;
                prost_types::Any {
                    type_url: format!("type.googleapis.com/{}", message.full_name()),
                    value: value.encode_to_vec(),
                }
            }
        };
        Ok(Self {
            name,
            adapter,
            params,
            connection,
        })
    }
}
