//! A verdict in Envoy's words.

use std::collections::BTreeMap;

use lateen_adapter::Code;
use lateen_engine::StringMap;
use lateen_protocols::{
    envoy::{
        envoy::{
            config::core::v3::{
                HeaderValue, HeaderValueOption, header_value_option::HeaderAppendAction,
            },
            service::auth::v3::{
                CheckResponse, DeniedHttpResponse, OkHttpResponse, check_response::HttpResponse,
            },
            r#type::v3::HttpStatus,
        },
        google::{
            protobuf::{BoolValue, Struct, Value, value::Kind},
            rpc,
        },
    },
    istio::mixer::v1::{
        CheckResponse as Decided, HeaderOperation, RouteDirective, header_operation::Operation,
    },
};

/// What a verdict comes to.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    /// The request goes on.
    Allowed(RouteDirective),
    /// It does not.
    Denied(Denial),
}

/// Why a request does not go on, and what its sender is told.
#[derive(Debug, PartialEq)]
pub(super) struct Denial {
    pub(super) code: Code,
    pub(super) message: String,
    pub(super) directive: RouteDirective,
}

impl Denial {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            directive: RouteDirective::default(),
        }
    }

    /// The body that our own proxy answers with.
    pub(super) fn body(&self) -> String {
        match self.directive.direct_response_code {
            0 => format!("{}:{}", self.code, self.message),
            _ => self.directive.direct_response_body.clone(),
        }
    }
}

impl Verdict {
    /// What our own proxy would do by this answer: the precondition first, then the first quota that is not granted.
    pub(super) fn of(decided: Decided) -> Self {
        let exhausted = decided
            .quotas
            .into_iter()
            .filter(|(_, quota)| quota.granted_amount <= 0)
            .map(|(name, _)| name)
            .min();
        let precondition = decided.precondition.unwrap_or_default();
        let directive = precondition.route_directive.unwrap_or_default();
        let status = precondition.status.unwrap_or_default();
        let code = Code::from_number(status.code.into()).unwrap_or(Code::Unknown);
        let (code, message) = match (code, exhausted) {
            (Code::Ok, None) => return Self::Allowed(directive),
            (Code::Ok, Some(quota)) => (
                Code::ResourceExhausted,
                format!("Quota is exhausted for: {quota}"),
            ),
            (code, _) => (code, status.message),
        };
        Self::Denied(Denial {
            code,
            message,
            directive,
        })
    }

    /// The answer to a request with these headers. `id` names the verdict in the access log.
    pub(super) fn encode(self, headers: &StringMap, id: &str) -> CheckResponse {
        match self {
            Self::Allowed(directive) => allowed(&directive, headers),
            Self::Denied(denial) => denied(&denial, id),
        }
    }
}

fn denied(denial: &Denial, id: &str) -> CheckResponse {
    let code = match denial.directive.direct_response_code {
        0 => denial.code.http_status().into(),
        code => code,
    };
    let text = |text: &str| Kind::StringValue(text.to_owned());
    let told = [
        ("code", Kind::NumberValue(f64::from(denial.code as i32))),
        ("message", text(&denial.message)),
        ("verdict_id", text(id)),
    ];
    CheckResponse {
        status: Some(rpc::Status {
            code: denial.code as i32,
            message: denial.message.clone(),
            details: Vec::new(),
        }),
        http_response: Some(HttpResponse::DeniedResponse(DeniedHttpResponse {
            status: Some(HttpStatus {
                code: i32::try_from(code).unwrap_or(500),
            }),
            headers: response_headers(&denial.directive.response_header_operations),
            body: denial.body(),
        })),
        // Envoy puts it where the access log finds it.
        dynamic_metadata: Some(Struct {
            fields: told
                .map(|(key, kind)| (key.to_owned(), Value { kind: Some(kind) }))
                .into(),
        }),
    }
}

fn allowed(directive: &RouteDirective, headers: &StringMap) -> CheckResponse {
    let (set, remove) = request_headers(&directive.request_header_operations, headers);
    CheckResponse {
        status: Some(rpc::Status::default()),
        http_response: Some(HttpResponse::OkResponse(OkHttpResponse {
            headers: set,
            headers_to_remove: remove,
            response_headers_to_add: response_headers(&directive.response_header_operations),
            ..OkHttpResponse::default()
        })),
        ..CheckResponse::default()
    }
}

/// What operations in their order come to for one header.
#[derive(Default)]
struct Header {
    /// The values that the request came with are gone.
    is_replaced: bool,
    values: Vec<String>,
}

/// Envoy removes last and appends only to what is there; so what the operations come to is worked out here.
fn request_headers(
    operations: &[HeaderOperation],
    headers: &StringMap,
) -> (Vec<HeaderValueOption>, Vec<String>) {
    let mut changed: BTreeMap<String, Header> = BTreeMap::new();
    for operation in operations {
        let name = operation.name.to_ascii_lowercase();
        let name = match name.as_str() {
            "host" => ":authority".to_owned(),
            _ => name,
        };
        if !may_change(&name, operation) {
            tracing::debug!(name, "Mixer may not change this header so");
            continue;
        }
        let header = changed.entry(name).or_default();
        match operation.operation() {
            Operation::Append => header.values.push(operation.value.clone()),
            Operation::Replace => {
                header.is_replaced = true;
                header.values = vec![operation.value.clone()];
            }
            Operation::Remove => {
                header.is_replaced = true;
                header.values.clear();
            }
        }
    }
    let mut set = Vec::new();
    let mut remove = Vec::new();
    for (name, header) in changed {
        let mut append = !header.is_replaced && headers.get(&name).is_some();
        if header.values.is_empty() && header.is_replaced {
            remove.push(name.clone());
        }
        for value in header.values {
            let action = if append {
                HeaderAppendAction::AppendIfExistsOrAdd
            } else {
                HeaderAppendAction::OverwriteIfExistsOrAdd
            };
            set.push(option(&name, value, action));
            append = true;
        }
    }
    (set, remove)
}

fn may_change(name: &str, operation: &HeaderOperation) -> bool {
    let value = operation.value.as_str();
    match (name, operation.operation()) {
        (":path", Operation::Replace) => value.starts_with('/'),
        (":authority" | ":method", Operation::Replace) => !value.is_empty(),
        _ => !name.starts_with(':') && !name.is_empty(),
    }
}

/// Envoy has no way to remove a response header on our word: its value is made empty.
pub(super) fn response_headers(operations: &[HeaderOperation]) -> Vec<HeaderValueOption> {
    operations
        .iter()
        .filter(|operation| !operation.name.starts_with(':'))
        .map(|operation| {
            let (value, action) = match operation.operation() {
                Operation::Append => (&*operation.value, HeaderAppendAction::AppendIfExistsOrAdd),
                Operation::Replace => (
                    &*operation.value,
                    HeaderAppendAction::OverwriteIfExistsOrAdd,
                ),
                Operation::Remove => ("", HeaderAppendAction::OverwriteIfExists),
            };
            HeaderValueOption {
                keep_empty_value: true,
                ..option(&operation.name, value.to_owned(), action)
            }
        })
        .collect()
}

#[allow(
    deprecated,
    reason = "Envoy's client for external authorization reads `append`, not `append_action`, for request headers"
)]
fn option(name: &str, value: String, action: HeaderAppendAction) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue {
            key: name.to_owned(),
            value,
            raw_value: Vec::new(),
        }),
        append: (action == HeaderAppendAction::AppendIfExistsOrAdd)
            .then_some(BoolValue { value: true }),
        append_action: action as i32,
        ..HeaderValueOption::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lateen_protocols::google::rpc::Status;
    use lateen_protocols::istio::mixer::v1::check_response::{PreconditionResult, QuotaResult};

    fn operation(name: &str, value: &str, operation: Operation) -> HeaderOperation {
        HeaderOperation {
            name: name.into(),
            value: value.into(),
            operation: operation.into(),
        }
    }

    fn decided(code: Code, message: &str) -> Decided {
        Decided {
            precondition: Some(PreconditionResult {
                status: Some(Status {
                    code: code as i32,
                    message: message.into(),
                    details: Vec::new(),
                }),
                ..PreconditionResult::default()
            }),
            ..Decided::default()
        }
    }

    #[test]
    fn a_denial_has_the_status_and_body_of_our_proxy() {
        let verdict = Verdict::of(decided(
            Code::PermissionDenied,
            "h.handler.default:Not allowed",
        ));
        let answer = verdict.encode(&StringMap::default(), "id-1");
        assert_eq!(answer.status.unwrap().code, 7);
        let Some(HttpResponse::DeniedResponse(denied)) = answer.http_response else {
            panic!("not denied");
        };
        assert_eq!(denied.status.unwrap().code, 403);
        assert_eq!(
            denied.body,
            "PERMISSION_DENIED:h.handler.default:Not allowed"
        );
    }

    #[test]
    fn a_quota_that_is_exhausted_is_429_and_a_denial_comes_first() {
        let mut answer = decided(Code::Ok, "");
        for (name, granted) in [("b", 0), ("a", 0), ("0", 1)] {
            let result = QuotaResult {
                granted_amount: granted,
                ..QuotaResult::default()
            };
            answer.quotas.insert(name.into(), result);
        }
        let Verdict::Denied(denial) = Verdict::of(answer.clone()) else {
            panic!("not denied");
        };
        assert_eq!(denial.code.http_status(), 429);
        assert_eq!(
            denial.body(),
            "RESOURCE_EXHAUSTED:Quota is exhausted for: a"
        );
        let status = answer
            .precondition
            .as_mut()
            .unwrap()
            .status
            .as_mut()
            .unwrap();
        status.code = Code::Unavailable as i32;
        let Verdict::Denied(denial) = Verdict::of(answer) else {
            panic!("not denied");
        };
        assert_eq!(denial.code.http_status(), 503);
    }

    #[test]
    fn header_operations_come_to_what_their_order_says() {
        use Operation::{Append, Remove, Replace};
        let headers: StringMap = [("a", "1"), ("b", "1"), ("c", "1")].into_iter().collect();
        let operations = [
            operation("A", "2", Append),
            operation("b", "2", Replace),
            operation("b", "3", Append),
            operation("c", "", Remove),
            operation("d", "1", Append),
            operation("d", "2", Append),
            operation("e", "1", Replace),
            operation("e", "", Remove),
            operation("f", "", Remove),
            operation("f", "1", Append),
            operation(":path", "nowhere", Replace),
            operation(":scheme", "x", Replace),
            operation("Host", "other", Replace),
        ];
        let (set, remove) = request_headers(&operations, &headers);
        let set: Vec<_> = set
            .iter()
            .map(|option| {
                let header = option.header.as_ref().unwrap();
                let sign = match option.append_action() {
                    HeaderAppendAction::AppendIfExistsOrAdd => "+",
                    _ => "=",
                };
                format!("{}{sign}{}", header.key, header.value)
            })
            .collect();
        assert_eq!(
            set,
            [":authority=other", "a+2", "b=2", "b+3", "d=1", "d+2", "f=1"]
        );
        assert_eq!(remove, ["c", "e"]);
    }
}
