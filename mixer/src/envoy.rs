//! The API for stock Envoy, on the same ports and by the same rules as `istio.mixer.v1`: external authorization,
//! rate limits, access logs.
//!
//! What Envoy's configuration says of itself and of the destination are [`claims`], what it saw are [`facts`];
//! together they are the attributes of a check ([`authorization`]), of a quota ([`rate_limit`], [`charges`]) or of
//! a report ([`access_log`], [`entry`]). [`answer`] says a verdict in Envoy's words. docs/reference/mixer.md has the mapping.

mod claims;
mod facts;
mod charges;
mod answer;
mod authorization;
mod rate_limit;
mod entry;
mod access_log;

use lateen_protocols::envoy::envoy::service::{
    accesslog::v3::access_log_service_server::AccessLogServiceServer,
    auth::v3::authorization_server::AuthorizationServer,
    ratelimit::v3::rate_limit_service_server::RateLimitServiceServer,
};
use lateen_service::shutdown::Drain;

use self::{access_log::AccessLogs, authorization::Authorization, rate_limit::RateLimits};
use crate::{
    serve::{MAX_MESSAGE_BYTES, Service},
    workloads::WorkloadView,
};

/// Namespace of the dynamic metadata that Envoy is configured to bring along.
const METADATA: &str = "lateen.mixer";
/// The value in it: the header `x-istio-attributes` as the proxy before has sent it.
const FORWARDED: &str = "forwarded";

/// `envoy.service.auth.v3.Authorization`, for a tonic server.
pub fn authorization(
    service: Service,
    workloads: WorkloadView,
) -> AuthorizationServer<Authorization> {
    AuthorizationServer::new(Authorization::new(service, workloads))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
}

/// `envoy.service.ratelimit.v3.RateLimitService`, for a tonic server.
pub fn rate_limits(
    service: Service,
    workloads: WorkloadView,
) -> RateLimitServiceServer<RateLimits> {
    RateLimitServiceServer::new(RateLimits::new(service, workloads))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
}

/// `envoy.service.accesslog.v3.AccessLogService`, for a tonic server. Streams end when `drain` begins.
pub fn access_logs(
    service: Service,
    workloads: WorkloadView,
    drain: &Drain,
) -> AccessLogServiceServer<AccessLogs> {
    AccessLogServiceServer::new(AccessLogs::new(service, workloads, drain.clone()))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
}
