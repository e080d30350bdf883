//! Who AuthorizationPolicies of action CUSTOM ask: Envoy's external authorization, out of the mesh's
//! `extensionProviders`.
//!
//! A first RBAC filter only marks which requests are meant (its shadow rules refuse nothing); the filter that asks is
//! on for those that bear the mark. So a request no rule is about costs no question.

use envoy_types::pb::envoy::config::core::v3::{
    ApiVersion, GrpcService, HeaderValue, HttpUri, grpc_service::EnvoyGrpc,
    grpc_service::TargetSpecifier, http_uri::HttpUpstreamType,
};
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::{
    AuthorizationRequest, AuthorizationResponse, BufferSettings, ExtAuthz, HttpService,
    ext_authz::Services,
};
use envoy_types::pb::envoy::r#type::matcher::v3::{
    ListStringMatcher, MetadataMatcher, StringMatcher, ValueMatcher, metadata_matcher::PathSegment,
    metadata_matcher::path_segment::Segment, string_matcher::MatchPattern, value_matcher,
};
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use lateen_config::Duration;
use lateen_config::mesh::{Authorizer, AuthorizerKind};

use crate::model::{DNS_DOMAIN, full_host};

use super::Scope;
use super::authorization::HTTP;
use super::wire::{duration, exact, prefix};

/// Before the names of shadow rules and of what they leave in metadata.
pub(super) const MARK: &str = "istio_ext_authz_";

/// Where the shadow rules leave which policy is about the request.
const MARKED: &str = "istio_ext_authz_shadow_effective_policy_id";

/// An answer is waited for so long unless the provider says. Istio: the same.
const TIMEOUT: Duration = Duration::from_millis(600_000);

/// What a request gets when nobody answers.
const FORBIDDEN: i32 = 403;

/// Names of the policies that ask a provider begin so.
pub(super) fn policy_prefix(provider: &str) -> String {
    format!("istio-ext-authz-{provider}")
}

/// The filter that asks. `Err` says why nobody can be asked.
pub(super) fn filter(scope: &Scope<'_>, provider: &str) -> Result<ExtAuthz, String> {
    let authorizer = scope.snapshot.mesh().authorizer(provider)?;
    let host = match authorizer.service.split_once('/') {
        Some((_, host)) => host,
        None => &authorizer.service,
    };
    let names = [
        host.to_owned(),
        full_host(host, &scope.snapshot.mesh().root_namespace),
        format!("{host}.svc.{DNS_DOMAIN}"),
    ];
    let cluster = scope.cluster_of(&names, authorizer.port).ok_or_else(|| {
        format!(
            "the workload may call no service {host} with port {}",
            authorizer.port
        )
    })?;
    let wait = duration(authorizer.timeout.unwrap_or(TIMEOUT));
    let services = match authorizer.kind {
        AuthorizerKind::Grpc => Services::GrpcService(GrpcService {
            target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
                cluster_name: cluster,
                authority: host.to_owned(),
                ..Default::default()
            })),
            timeout: wait,
            ..Default::default()
        }),
        AuthorizerKind::Http => Services::HttpService(HttpService {
            server_uri: Some(HttpUri {
                uri: format!("http://{host}"),
                timeout: wait,
                http_upstream_type: Some(HttpUpstreamType::Cluster(cluster)),
            }),
            path_prefix: authorizer.path_prefix.clone(),
            authorization_request: headers_to_add(&authorizer),
            authorization_response: answers(&authorizer),
            ..Default::default()
        }),
    };
    Ok(ExtAuthz {
        services: Some(services),
        transport_api_version: ApiVersion::V3 as i32,
        failure_mode_allow: authorizer.fail_open,
        clear_route_cache: authorizer.clear_route_cache,
        status_on_error: Some(HttpStatus {
            code: authorizer.status_on_error.map_or(FORBIDDEN, i32::from),
        }),
        filter_enabled_metadata: Some(MetadataMatcher {
            filter: HTTP.to_owned(),
            path: vec![PathSegment {
                segment: Some(Segment::Key(MARKED.to_owned())),
            }],
            value: Some(ValueMatcher {
                match_pattern: Some(value_matcher::MatchPattern::StringMatch(prefix(
                    policy_prefix(provider),
                ))),
            }),
            ..Default::default()
        }),
        with_request_body: authorizer.body.map(|body| BufferSettings {
            max_request_bytes: body.max_request_bytes,
            allow_partial_message: body.allow_partial_message,
            pack_as_bytes: body.pack_as_bytes,
        }),
        allowed_headers: patterns(&authorizer.request_headers),
        ..Default::default()
    })
}

fn headers_to_add(authorizer: &Authorizer) -> Option<AuthorizationRequest> {
    let headers_to_add: Vec<HeaderValue> = authorizer
        .additional_headers
        .iter()
        .map(|(key, value)| HeaderValue {
            key: key.clone(),
            value: value.clone(),
            ..Default::default()
        })
        .collect();
    (!headers_to_add.is_empty()).then(|| AuthorizationRequest {
        headers_to_add,
        ..Default::default()
    })
}

fn answers(authorizer: &Authorizer) -> Option<AuthorizationResponse> {
    let response = AuthorizationResponse {
        allowed_upstream_headers: patterns(&authorizer.to_upstream_on_allow),
        allowed_client_headers: patterns(&authorizer.to_downstream_on_deny),
        allowed_client_headers_on_success: patterns(&authorizer.to_downstream_on_allow),
        ..Default::default()
    };
    (response != AuthorizationResponse::default()).then_some(response)
}

/// `x`, `x*`, `*x`, `*`; headers have no case.
fn patterns(names: &[String]) -> Option<ListStringMatcher> {
    let pattern = |name: &String| {
        let matcher = match (name.strip_suffix('*'), name.strip_prefix('*')) {
            (Some(start), _) => prefix(start),
            (None, Some(end)) => StringMatcher {
                match_pattern: Some(MatchPattern::Suffix(end.to_owned())),
                ..Default::default()
            },
            (None, None) => exact(name.clone()),
        };
        StringMatcher {
            ignore_case: true,
            ..matcher
        }
    };
    (!names.is_empty()).then(|| ListStringMatcher {
        patterns: names.iter().map(pattern).collect(),
    })
}
