//! How connections to a cluster's hosts are protected: one transport socket, or one by host metadata.

use std::{collections::HashMap, sync::Arc};

use lateen_protocols::envoy::{
    envoy::{
        config::{
            cluster::v3::Cluster as Proto,
            core::v3::{self as core, transport_socket::ConfigType},
        },
        extensions::transport_sockets::{raw_buffer::v3::RawBuffer, tls::v3::UpstreamTlsContext},
    },
    google::protobuf as pb,
};

use crate::{
    config_error::ConfigError,
    proto::{invalid, unpack},
    secret::SecretStore,
    tls::ClientContext,
};

/// One transport socket.
#[derive(Clone, Debug)]
pub enum Transport {
    /// Bytes as they are.
    Plain,
    /// TLS.
    Tls(Arc<ClientContext>),
}

impl Transport {
    /// Whether its secrets are there.
    pub fn ready(&self) -> bool {
        match self {
            Transport::Plain => true,
            Transport::Tls(context) => context.ready(),
        }
    }
}

#[derive(Debug)]
struct Match {
    wanted: HashMap<String, pb::Value>,
    transport: Transport,
}

/// The transport sockets of a cluster.
#[derive(Debug)]
pub struct Transports {
    default: Transport,
    matches: Vec<Match>,
}

impl Transports {
    /// Index of the transport socket for hosts that no match wants.
    pub const DEFAULT: usize = usize::MAX;

    pub(super) fn compile(
        config: &Proto,
        secrets: &SecretStore,
        validate_sni: bool,
    ) -> Result<Transports, ConfigError> {
        if config.transport_socket_matcher.is_some() {
            return Err(invalid("transport_socket_matcher", "not supported"));
        }
        let default = transport(config.transport_socket.as_ref(), secrets, validate_sni)
            .map_err(|error| error.within("transport_socket"))?;
        let mut matches = Vec::with_capacity(config.transport_socket_matches.len());
        for one in &config.transport_socket_matches {
            matches.push(Match {
                wanted: one
                    .r#match
                    .as_ref()
                    .map(|m| m.fields.clone())
                    .unwrap_or_default(),
                transport: transport(one.transport_socket.as_ref(), secrets, validate_sni)
                    .map_err(|error| {
                        error.within(format!("transport_socket_matches '{}'", one.name))
                    })?,
            });
        }
        Ok(Transports { default, matches })
    }

    /// No transport sockets but plain ones.
    pub(super) fn none() -> Transports {
        Transports {
            default: Transport::Plain,
            matches: Vec::new(),
        }
    }

    /// The transport socket with this index.
    pub fn get(&self, index: usize) -> &Transport {
        self.matches
            .get(index)
            .map_or(&self.default, |m| &m.transport)
    }

    /// Whether the secrets of all are there.
    pub fn ready(&self) -> bool {
        self.default.ready() && self.matches.iter().all(|m| m.transport.ready())
    }

    /// The first match that the endpoint's metadata fulfils; an endpoint without any asks its locality.
    pub(super) fn matching(
        &self,
        endpoint: Option<&core::Metadata>,
        locality: Option<&core::Metadata>,
    ) -> usize {
        if self.matches.is_empty() {
            return Transports::DEFAULT;
        }
        let of = |metadata: Option<&core::Metadata>| {
            metadata
                .and_then(|metadata| metadata.filter_metadata.get("envoy.transport_socket_match"))
                .map(|labels| labels.fields.clone())
        };
        let labels = of(endpoint).or_else(|| of(locality)).unwrap_or_default();
        self.matches
            .iter()
            .position(|m| {
                m.wanted
                    .iter()
                    .all(|(key, value)| labels.get(key) == Some(value))
            })
            .unwrap_or(Transports::DEFAULT)
    }
}

fn transport(
    socket: Option<&core::TransportSocket>,
    secrets: &SecretStore,
    validate_sni: bool,
) -> Result<Transport, ConfigError> {
    let Some(socket) = socket else {
        return Ok(Transport::Plain);
    };
    let Some(ConfigType::TypedConfig(any)) = socket.config_type.as_ref() else {
        return match socket.name.as_str() {
            "envoy.transport_sockets.raw_buffer" => Ok(Transport::Plain),
            name => Err(invalid(name, "has no typed_config")),
        };
    };
    if let Some(mut context) = unpack::<UpstreamTlsContext>(any)? {
        context.auto_sni_san_validation |= validate_sni;
        return Ok(Transport::Tls(Arc::new(ClientContext::compile(
            &context, secrets,
        )?)));
    }
    if unpack::<RawBuffer>(any)?.is_some() {
        return Ok(Transport::Plain);
    }
    Err(invalid(
        any.type_url.clone(),
        "this transport socket is not supported",
    ))
}
