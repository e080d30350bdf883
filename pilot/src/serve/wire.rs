//! Requests and responses of both protocols, in and out of the session's terms.

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3 as xds;

use super::session::{DeltaAsk, Misuse, Mode, Response, Session, Verdict};
use crate::encode::Kind;
use tokio::time::Instant;

/// A message a client sends on either stream.
pub(crate) trait Ask: Send + 'static {
    /// Which protocol it belongs to.
    const MODE: Mode;

    fn node(&self) -> Option<&Node>;
    fn type_url(&self) -> &str;

    /// Hands it to the session.
    fn apply(self, session: &mut Session, kind: &Kind, now: Instant) -> Result<Verdict, Misuse>;
}

impl Ask for xds::DiscoveryRequest {
    const MODE: Mode = Mode::Sotw;

    fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    fn type_url(&self) -> &str {
        &self.type_url
    }

    fn apply(self, session: &mut Session, kind: &Kind, now: Instant) -> Result<Verdict, Misuse> {
        let error = self.error_detail.map(|status| status.message);
        session.sotw(
            kind,
            &self.version_info,
            &self.resource_names,
            &self.response_nonce,
            error,
            now,
        )
    }
}

impl Ask for xds::DeltaDiscoveryRequest {
    const MODE: Mode = Mode::Delta;

    fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    fn type_url(&self) -> &str {
        &self.type_url
    }

    fn apply(self, session: &mut Session, kind: &Kind, now: Instant) -> Result<Verdict, Misuse> {
        let error = self.error_detail.map(|status| status.message);
        let ask = DeltaAsk {
            subscribe: self.resource_names_subscribe,
            unsubscribe: self.resource_names_unsubscribe,
            initial: self.initial_resource_versions,
        };
        session.delta(kind, ask, &self.response_nonce, error, now)
    }
}

impl From<Response> for xds::DiscoveryResponse {
    fn from(response: Response) -> Self {
        Self {
            version_info: response.version,
            resources: response
                .set
                .iter()
                .map(|encoded| encoded.body.clone())
                .collect(),
            type_url: response.kind.type_url().to_owned(),
            nonce: response.nonce,
            ..Self::default()
        }
    }
}

impl From<Response> for xds::DeltaDiscoveryResponse {
    fn from(response: Response) -> Self {
        Self {
            system_version_info: response.version,
            resources: response
                .set
                .iter()
                .map(|encoded| xds::Resource {
                    name: encoded.name.to_string(),
                    version: encoded.version.to_string(),
                    resource: Some(encoded.body.clone()),
                    ..xds::Resource::default()
                })
                .collect(),
            type_url: response.kind.type_url().to_owned(),
            removed_resources: response.removed.iter().map(ToString::to_string).collect(),
            nonce: response.nonce,
            ..Self::default()
        }
    }
}
