//! `istio.v1.auth.IstioCertificateService`: one request from its bytes to its answer.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::sync::Arc;

use lateen_identity::SpiffeId;
use lateen_protocols::istio::v1::auth::istio_certificate_service_server::IstioCertificateService;
use lateen_protocols::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use lateen_service::tls::{PeerIdentity, peer};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use crate::audit::Audit;
use crate::authenticate::{AuthenticateError, Credentials};
use crate::authorize::{AuthorizeError, authorize};
use crate::config::Clock;
use crate::csr::{Csr, CsrError};
use crate::sign::{Issued, ServerNames, SignError, Signer};

/// Largest request message.
pub(crate) const MAX_MESSAGE_BYTES: usize = 64 * 1024;
/// Requests under way at once. More are refused with RESOURCE_EXHAUSTED, which clients retry with back-off.
const MAX_REQUESTS: usize = 256;
/// What a caller learns who could not be authenticated, or may not: nothing.
const UNAUTHENTICATED: &str = "the caller could not be authenticated";

/// Why a request was refused, by stage.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("too many requests are under way")]
    Overload,
    #[error(transparent)]
    Authenticate(#[from] AuthenticateError),
    #[error(transparent)]
    Csr(#[from] CsrError),
    #[error(transparent)]
    Ttl(SignError),
    #[error(transparent)]
    Authorize(#[from] AuthorizeError),
    #[error(transparent)]
    Sign(SignError),
}

impl Refusal {
    /// The code and text that the caller gets.
    fn status(&self) -> Status {
        match self {
            Self::Overload => {
                Status::resource_exhausted("too many requests are under way; try again")
            }
            Self::Authenticate(error) if error.is_temporary() => {
                Status::unavailable("the token cannot be checked now; try again")
            }
            Self::Authenticate(_) | Self::Authorize(_) => Status::unauthenticated(UNAUTHENTICATED),
            Self::Csr(error) => Status::invalid_argument(error.to_string()),
            Self::Ttl(error) => Status::invalid_argument(error.to_string()),
            Self::Sign(_) => Status::internal("the certificate could not be signed"),
        }
    }

    /// The error and its causes, for the audit log.
    pub(crate) fn reason(&self) -> String {
        let mut text = self.to_string();
        let mut next = self.source();
        while let Some(cause) = next {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            next = cause.source();
        }
        text
    }
}

#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) credentials: Credentials,
    pub(crate) signer: Signer,
    pub(crate) audit: Audit,
    pub(crate) clock: Clock,
    /// Auth's own ID, which nobody else gets.
    pub(crate) own: SpiffeId,
    /// DNS names beside the SPIFFE ID, of those who have some.
    pub(crate) names: BTreeMap<SpiffeId, ServerNames>,
    pub(crate) slots: Arc<Semaphore>,
}

impl Service {
    pub(crate) fn new(
        credentials: Credentials,
        signer: Signer,
        audit: Audit,
        clock: Clock,
        own: SpiffeId,
        names: BTreeMap<SpiffeId, ServerNames>,
    ) -> Self {
        Self {
            credentials,
            signer,
            audit,
            clock,
            own,
            names,
            slots: Arc::new(Semaphore::new(MAX_REQUESTS)),
        }
    }

    /// One request. The token is used up only when nothing but signing can fail any more.
    async fn create(
        &self,
        peer: &PeerIdentity,
        request: Request<IstioCertificateRequest>,
    ) -> Result<(&'static str, Csr, Issued), Refusal> {
        let _slot = self.slots.try_acquire().map_err(|_| Refusal::Overload)?;
        let now = self.clock.now();
        let trust_domain = self.signer.ca().trust_domain();
        let caller = self
            .credentials
            .authenticate(peer, request.metadata(), trust_domain, now)
            .await?;
        let method = caller.method();
        let request = request.into_inner();
        let csr = Csr::parse(&request.csr)?;
        let ttl = self
            .signer
            .ttl(request.validity_duration)
            .map_err(Refusal::Ttl)?;
        let permit = authorize(caller, trust_domain, &self.own).await?;
        let none = ServerNames::default();
        let names = self.names.get(permit.identity()).unwrap_or(&none);
        let issued = self
            .signer
            .sign(&permit, csr.public_key(), names, ttl, now)
            .map_err(Refusal::Sign)?;
        Ok((method, csr, issued))
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer = peer(&request).cloned().unwrap_or_default();
        match self.create(&peer, request).await {
            Ok((method, csr, issued)) => {
                self.audit
                    .issued(peer.remote(), method, &issued, csr.key_hash());
                Ok(Response::new(IstioCertificateResponse {
                    cert_chain: issued.answer,
                }))
            }
            Err(refusal) => {
                self.audit.refused(peer.remote(), &refusal);
                Err(refusal.status())
            }
        }
    }
}
