//! What Mixer decided about a request, in the terms of a proxy.

use lateen_protocols::istio::mixer::v1::{
    HeaderOperation, RouteDirective, header_operation::Operation,
};

use crate::{
    head::{Headers, Name},
    info::ResponseFlags,
    reject::Reject,
};

/// google.rpc.Code OK.
pub(super) const OK: i32 = 0;
/// google.rpc.Code RESOURCE_EXHAUSTED.
pub(super) const RESOURCE_EXHAUSTED: i32 = 8;
/// google.rpc.Code UNAVAILABLE.
pub(super) const UNAVAILABLE: i32 = 14;

/// The precondition's outcome.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Verdict {
    /// google.rpc.Code.
    pub(super) code: i32,
    pub(super) message: String,
    pub(super) directive: Option<RouteDirective>,
}

impl Verdict {
    /// The reply that a refusal becomes; `None` when the request goes on.
    pub(super) fn refusal(&self) -> Option<Reject> {
        if let Some(directive) = &self.directive
            && directive.direct_response_code != 0
        {
            let status = u16::try_from(directive.direct_response_code).unwrap_or(500);
            let mut reject = Reject::new(
                status,
                directive.direct_response_body.clone(),
                flags(self.code),
                "mixer_direct_response",
            );
            apply(&directive.response_header_operations, &mut reject.headers);
            return Some(reject);
        }
        (self.code != OK).then(|| refusal(self.code, &self.message))
    }
}

/// `CODE:message` with the HTTP status of the code.
pub(super) fn refusal(code: i32, message: &str) -> Reject {
    let mut reject = Reject::new(
        http_status(code),
        format!("{}:{message}", name(code)),
        flags(code),
        "mixer_denied",
    );
    reject.grpc_status = Some(code);
    reject
}

fn flags(code: i32) -> ResponseFlags {
    match code {
        RESOURCE_EXHAUSTED => ResponseFlags::RATE_LIMITED,
        _ => ResponseFlags::UNAUTHORIZED_EXTERNAL_SERVICE,
    }
}

/// Changes headers as a route directive says.
pub(super) fn apply(operations: &[HeaderOperation], headers: &mut Headers) {
    for operation in operations {
        let name = Name::new(&operation.name);
        match operation.operation() {
            Operation::Replace => headers.set(name, operation.value.clone()),
            Operation::Append => headers.append(name, operation.value.clone()),
            Operation::Remove => {
                headers.remove(&name);
            }
        }
    }
}

/// HTTP status of a google.rpc.Code, as Istio's client maps it.
fn http_status(code: i32) -> u16 {
    match code {
        0 => 200,
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 500, // UNKNOWN, INTERNAL, DATA_LOSS and what nobody has defined
    }
}

fn name(code: i32) -> &'static str {
    match code {
        0 => "OK",
        1 => "CANCELLED",
        3 => "INVALID_ARGUMENT",
        4 => "DEADLINE_EXCEEDED",
        5 => "NOT_FOUND",
        6 => "ALREADY_EXISTS",
        7 => "PERMISSION_DENIED",
        8 => "RESOURCE_EXHAUSTED",
        9 => "FAILED_PRECONDITION",
        10 => "ABORTED",
        11 => "OUT_OF_RANGE",
        12 => "UNIMPLEMENTED",
        13 => "INTERNAL",
        14 => "UNAVAILABLE",
        15 => "DATA_LOSS",
        16 => "UNAUTHENTICATED",
        _ => "UNKNOWN",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_says_code_and_message() {
        let reject = refusal(7, "h.handler.default:Not allowed");
        assert_eq!(reject.status, 403);
        assert_eq!(
            reject.body,
            "PERMISSION_DENIED:h.handler.default:Not allowed"
        );
        assert_eq!(Verdict::default().refusal(), None);
    }

    #[test]
    fn a_direct_response_wins_over_ok() {
        let verdict = Verdict {
            directive: Some(RouteDirective {
                direct_response_code: 302,
                response_header_operations: vec![HeaderOperation {
                    name: "Location".into(),
                    value: "/login".into(),
                    operation: Operation::Replace.into(),
                }],
                ..RouteDirective::default()
            }),
            ..Verdict::default()
        };
        let reject = verdict.refusal().unwrap();
        assert_eq!(reject.status, 302);
        assert_eq!(
            reject.headers.get(&Name::new("location")),
            Some(b"/login".as_slice())
        );
    }
}
