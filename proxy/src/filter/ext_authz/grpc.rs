//! Asking by gRPC: `envoy.service.auth.v3.Authorization/Check`.

use std::{sync::Arc, time::Duration};

use lateen_protocols::envoy::{
    envoy::{
        config::core::v3::{self as core, header_value_option::HeaderAppendAction},
        service::auth::v3::{CheckResponse, DeniedHttpResponse, check_response::HttpResponse},
    },
    google::protobuf as pb,
};

use super::{
    Question,
    decision::{Allowed, Change, Decision, How, Refusal},
    encode,
};
use crate::{config_error::ConfigError, filter::grpc_service, proto::timeout, shared::Shared};

/// Envoy's default for the gRPC client of this filter.
const DEFAULT_TIMEOUT: Duration = Duration::from_millis(200);
/// Longest answer; headers and a body for the client fit many times.
const MAX_ANSWER_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct GrpcService(grpc_service::GrpcService);

impl GrpcService {
    pub(super) fn compile(service: &core::GrpcService) -> Result<GrpcService, ConfigError> {
        // Envoy waits for ever when told 0; a bound is kept all the same.
        let timeout = timeout("timeout", service.timeout.as_ref(), Some(DEFAULT_TIMEOUT))?
            .unwrap_or(Duration::from_secs(3600));
        grpc_service::GrpcService::compile(service, timeout).map(GrpcService)
    }

    /// The decision, and what the service says besides.
    pub(super) async fn ask(
        &self,
        shared: &Arc<Shared>,
        question: &Question<'_>,
    ) -> (Decision, pb::Struct) {
        let mut message = Vec::with_capacity(1024);
        encode::check_request(question, &mut message);
        let answer = self
            .0
            .unary::<CheckResponse>(
                shared,
                "/envoy.service.auth.v3.Authorization/Check",
                &message,
                MAX_ANSWER_BYTES,
            )
            .await;
        match answer {
            Ok(mut answer) => {
                let metadata = metadata(&mut answer);
                (decision(answer), metadata)
            }
            Err(error) => {
                tracing::debug!(%error, cluster = %self.0.cluster(), "the authorization service cannot be asked");
                (Decision::Error(None), pb::Struct::default())
            }
        }
    }
}

/// Dynamic metadata; the old field goes before the new one.
fn metadata(answer: &mut CheckResponse) -> pb::Struct {
    let own = answer.dynamic_metadata.take();
    match &mut answer.http_response {
        Some(HttpResponse::OkResponse(ok)) => ok.dynamic_metadata.take().or(own),
        _ => own,
    }
    .unwrap_or_default()
}

/// Reads the answer.
pub(super) fn decision(answer: CheckResponse) -> Decision {
    let code = answer.status.as_ref().map_or(0, |status| status.code);
    match (code, answer.http_response) {
        (_, Some(HttpResponse::ErrorResponse(error))) => Decision::Error(Some(refusal(error))),
        (0, Some(HttpResponse::OkResponse(ok))) => Decision::Allowed(Allowed {
            request: ok.headers.into_iter().filter_map(on_request).collect(),
            remove: ok.headers_to_remove,
            query_set: ok
                .query_parameters_to_set
                .into_iter()
                .map(|parameter| (parameter.key, parameter.value))
                .collect(),
            query_remove: ok.query_parameters_to_remove,
            response: ok
                .response_headers_to_add
                .into_iter()
                .filter_map(on_response)
                .collect(),
        }),
        (0, _) => Decision::Allowed(Allowed::default()),
        (_, Some(HttpResponse::DeniedResponse(denied))) => Decision::Denied(refusal(denied)),
        (_, _) => Decision::Denied(refusal(DeniedHttpResponse::default())),
    }
}

fn refusal(denied: DeniedHttpResponse) -> Refusal {
    let status = denied.status.map_or(0, |status| status.code);
    Refusal {
        status: u16::try_from(status)
            .ok()
            .filter(|status| (200..600).contains(status))
            .unwrap_or(403),
        headers: denied
            .headers
            .into_iter()
            .filter_map(|option| match option.append.as_ref().map(|a| a.value) {
                Some(true) => change(option, How::Add),
                _ => change(option, How::Set),
            })
            .collect(),
        body: denied.body,
    }
}

/// Unless told otherwise the service's header replaces the client's.
fn on_request(option: core::HeaderValueOption) -> Option<Change> {
    let how = match (option.append.as_ref(), option.append_action()) {
        (Some(append), _) if append.value => How::AppendIfExists,
        (Some(_), _) | (None, HeaderAppendAction::AppendIfExistsOrAdd) => How::Set,
        (None, action) => by_action(action),
    };
    change(option, how)
}

fn on_response(option: core::HeaderValueOption) -> Option<Change> {
    let how = match option.append.as_ref() {
        Some(append) if append.value => How::Add,
        Some(_) => How::Set,
        None => by_action(option.append_action()),
    };
    change(option, how)
}

fn by_action(action: HeaderAppendAction) -> How {
    match action {
        HeaderAppendAction::AppendIfExistsOrAdd => How::Add,
        HeaderAppendAction::AddIfAbsent => How::AddIfAbsent,
        HeaderAppendAction::OverwriteIfExistsOrAdd => How::Set,
        HeaderAppendAction::OverwriteIfExists => How::SetIfExists,
    }
}

fn change(option: core::HeaderValueOption, how: How) -> Option<Change> {
    let header = option.header?;
    Some(Change {
        name: header.key,
        value: if header.raw_value.is_empty() {
            header.value.into()
        } else {
            header.raw_value.into()
        },
        how,
    })
}
