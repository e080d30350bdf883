//! `envoy.service.auth.v3.Authorization`: a check.

use std::net::IpAddr;

use lateen_adapter::Code;
use lateen_engine::{Bag, StringMap};
use lateen_protocols::envoy::envoy::service::auth::v3::{
    AttributeContext, CheckRequest, CheckResponse, attribute_context::Peer,
    authorization_server::Authorization as Api,
};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::{
    FORWARDED, METADATA,
    answer::{Denial, Verdict},
    charges::{self, Compiled},
    claims::{self, Caller, Claims, put},
    facts::{Ends, Head, instant, socket, told},
};
use crate::{
    check::Question,
    metrics::Method,
    serve::{GENERATION, Service, VERDICT},
    workloads::WorkloadView,
};

/// The service.
#[derive(Debug)]
pub struct Authorization {
    service: Service,
    workloads: WorkloadView,
    charges: Compiled,
}

impl Authorization {
    pub(super) fn new(service: Service, workloads: WorkloadView) -> Self {
        Self {
            service,
            workloads,
            charges: Compiled::default(),
        }
    }
}

#[tonic::async_trait]
impl Api for Authorization {
    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let begun = Instant::now();
        let caller = Caller::of(&request);
        let (metadata, _, message) = request.into_parts();
        let Some(mut context) = message.attributes else {
            let status = Status::invalid_argument("the request has no attributes");
            return self.service.count(Method::Check, begun, Err(status));
        };
        let extensions = std::mem::take(&mut context.context_extensions);
        let mut said = Claims::of_call(&metadata);
        for (name, value) in &extensions {
            said.add(name, value);
        }
        // A refusal here is a verdict, not an error: errors are let through where the mesh fails open.
        let refuse = |code, message: String| {
            tracing::warn!(%message, "a caller is refused");
            let verdict = Verdict::Denied(Denial::new(code, message));
            let answer = verdict.encode(&StringMap::default(), "");
            self.service
                .count(Method::Check, begun, Ok(Response::new(answer)))
        };
        if let Err(reason) = caller.vouch(&said, &self.workloads) {
            return refuse(Code::PermissionDenied, reason);
        }
        let charges = match extensions.get(charges::EXTENSION) {
            None => None,
            Some(text) => match self.charges.get(text) {
                Ok(charges) => Some(charges),
                Err(reason) => {
                    let message = format!("{} is not valid: {reason}", charges::EXTENSION);
                    return refuse(Code::Unavailable, message);
                }
            },
        };
        let mut headers = StringMap::default();
        let decided = self.service.decide(&metadata, |snapshot| {
            let mut bag = claims::bag(&snapshot.table, &said);
            headers = fill(&mut bag, context, &said, &self.workloads);
            let quotas = charges.map(|charges| charges.of(&bag)).unwrap_or_default();
            Question {
                bag,
                global_words: 0,
                quotas,
                deduplication_id: String::new(),
                only_quotas: false,
            }
        });
        let (decided, generation, id) = self.service.count(Method::Check, begun, decided.await)?;
        let answer = Verdict::of(decided).encode(&headers, &id);
        let mut response = Response::new(answer);
        let told = response.metadata_mut();
        told.insert(GENERATION, generation.into());
        if let Ok(id) = id.parse() {
            told.insert(VERDICT, id);
        }
        Ok(response)
    }
}

/// Puts what Envoy saw into `bag`; gives the request's headers.
fn fill(
    bag: &mut Bag,
    context: AttributeContext,
    said: &Claims<'_>,
    workloads: &WorkloadView,
) -> StringMap {
    let address = |peer: Option<&Peer>| socket(peer?.address.as_ref());
    let principal = |peer: Option<&Peer>| {
        let principal = peer.map(|peer| peer.principal.as_str());
        principal.filter(|name| !name.is_empty()).map(str::to_owned)
    };
    let remote = address(context.source.as_ref());
    let peer = principal(context.source.as_ref());
    let local = principal(context.destination.as_ref());
    let ends = Ends {
        is_mutual: peer.is_some(),
        peer: peer.as_deref(),
        local: local.as_deref(),
        server_name: context.tls_session.as_ref().map_or("", |tls| &tls.sni),
        remote,
        forwarded: told(context.metadata_context.as_ref(), METADATA, FORWARDED)
            .filter(|_| !said.is_outbound()),
    };
    ends.fill(bag, workloads);
    if !said.is_outbound()
        && let Some((ip, port)) = address(context.destination.as_ref())
    {
        put_missing(bag, ip, port);
    }
    let request = context.request.unwrap_or_default();
    let time = instant(request.time.as_ref());
    let Some(http) = request.http else {
        put(bag, "context.protocol", "tcp");
        if let Some((_, port)) = remote {
            put(bag, "source.port", i64::from(port));
        }
        if let Some(time) = time {
            put(bag, "context.time", time);
        }
        return StringMap::default();
    };
    if let Some(time) = time {
        put(bag, "request.time", time);
    }
    let head = Head {
        method: &http.method,
        scheme: &http.scheme,
        authority: &http.host,
        path: &http.path,
        headers: http.headers,
    };
    head.fill(bag)
}

/// The address that the workload is reached at, unless configuration has said it.
fn put_missing(bag: &mut Bag, ip: IpAddr, port: u16) {
    if bag.get_by_name("destination.ip").is_none() {
        put(bag, "destination.ip", ip);
        put(bag, "destination.port", i64::from(port));
    }
}
