//! Requests and answers as bytes: the parts of a call put together, and taken apart again.

use bytes::{Buf as _, Bytes};
use lateen_adapter::{
    CheckResult, Code, DirectResponse, HandlerError, QuotaArgs, QuotaResult, Status, Variety,
};
use lateen_protocols::{
    google::rpc,
    istio::{mixer::adapter::model::v1beta1 as model, policy::v1beta1::DirectHttpResponse},
};
use prost::{
    Message as _,
    encoding::{DecodeContext, WireType, decode_key, skip_field},
};
use std::time::Duration;

use crate::{
    config::remote::{
        RemoteTemplate,
        encode::{write_bytes, write_varint},
    },
    instance::Found,
};

/// The request of a call: `instances` of `template`, the handler's parameters if they go with each call, and an id
/// that is the same for all attempts.
pub(super) fn request(
    template: &RemoteTemplate,
    instances: &[Bytes],
    adapter_config: Option<&[u8]>,
    dedup_id: &str,
    quota: Option<(&str, &QuotaArgs)>,
) -> Bytes {
    let numbers = &template.numbers;
    let length: usize = instances.iter().map(|i| i.len() + 8).sum();
    let mut buffer = Vec::with_capacity(length + adapter_config.map_or(0, <[u8]>::len) + 64);
    for instance in instances {
        write_bytes(numbers.instance, instance, &mut buffer);
    }
    if let Some(config) = adapter_config {
        write_bytes(numbers.adapter_config, config, &mut buffer);
    }
    if !dedup_id.is_empty() {
        write_bytes(numbers.dedup_id, dedup_id.as_bytes(), &mut buffer);
    }
    if let Some((name, args)) = quota {
        let mut params = Vec::new();
        write_varint(1, args.amount, &mut params);
        if args.best_effort {
            write_varint(2, 1, &mut params);
        }
        let mut entry = Vec::new();
        write_bytes(1, name.as_bytes(), &mut entry);
        write_bytes(2, &params, &mut entry);
        let mut quotas = Vec::new();
        write_bytes(1, &entry, &mut quotas);
        write_bytes(numbers.quota_request, &quotas, &mut buffer);
    }
    buffer.into()
}

/// `request` with the id of its session, in the place of the parameters: an Any of type
/// `google.protobuf.Any.type_url` whose value is the id, as the API has it.
///
/// reference: istio.io/istio `mixer/template/*/template_handler_service.proto`, `adapter_config`.
pub(super) fn with_session(template: &RemoteTemplate, request: &[u8], id: &str) -> Bytes {
    let any = prost_types::Any {
        type_url: SESSION_TYPE.to_owned(),
        value: id.as_bytes().to_vec(),
    };
    let mut buffer = Vec::with_capacity(request.len() + id.len() + 48);
    buffer.extend_from_slice(request);
    write_bytes(
        template.numbers.adapter_config,
        &any.encode_to_vec(),
        &mut buffer,
    );
    buffer.into()
}

/// The type of an Any that is a session's id.
const SESSION_TYPE: &str = "google.protobuf.Any.type_url";

fn senseless(error: impl std::fmt::Display) -> HandlerError {
    HandlerError::unavailable(format!("the adapter's answer makes no sense: {error}"))
}

/// The verdict in the answer to a check, and what was found out.
pub(super) fn checked(
    template: &RemoteTemplate,
    answer: Bytes,
) -> Result<(CheckResult, Found), HandlerError> {
    let plan = match (&template.output, template.variety) {
        (Some(plan), Variety::CheckWithOutput) => plan,
        _ => return Ok((verdict(answer)?, Found::nothing())),
    };
    let numbers = &template.numbers;
    let result = field(&answer, numbers.result).map_err(senseless)?;
    let output = field(&answer, numbers.output).map_err(senseless)?;
    let found = plan.decode(output).map_err(senseless)?;
    Ok((verdict(result)?, Found::Remote(found)))
}

fn verdict(message: Bytes) -> Result<CheckResult, HandlerError> {
    let result = model::CheckResult::decode(message).map_err(senseless)?;
    Ok(CheckResult {
        status: status(result.status)?,
        valid_duration: span(result.valid_duration),
        valid_use_count: Some(result.valid_use_count).filter(|uses| *uses != 0),
    })
}

/// The bytes of the last field `number`, which is a message; empty when it is not there.
fn field(message: &Bytes, number: u32) -> Result<Bytes, prost::DecodeError> {
    let mut rest = message.clone();
    let mut found = Bytes::new();
    while rest.has_remaining() {
        let (key, wire_type) = decode_key(&mut rest)?;
        if key == number && wire_type == WireType::LengthDelimited {
            prost::encoding::bytes::merge(
                wire_type,
                &mut found,
                &mut rest,
                DecodeContext::default(),
            )?;
        } else {
            skip_field(wire_type, key, &mut rest, DecodeContext::default())?;
        }
    }
    Ok(found)
}

/// What was granted of quota `name`.
pub(super) fn granted(name: &str, answer: Bytes) -> Result<QuotaResult, HandlerError> {
    let mut answer = model::QuotaResult::decode(answer).map_err(senseless)?;
    let granted = answer.quotas.remove(name).ok_or_else(|| {
        let others: Vec<&str> = answer.quotas.keys().map(String::as_str).take(8).collect();
        HandlerError::unavailable(format!(
            "the adapter says nothing about {name}, only about [{}]",
            others.join(", ")
        ))
    })?;
    Ok(QuotaResult {
        status: status(granted.status)?,
        valid_duration: span(granted.valid_duration),
        granted: granted.granted_amount,
        window: None,
    })
}

/// What a generator found.
pub(super) fn generated(template: &RemoteTemplate, answer: Bytes) -> Result<Found, HandlerError> {
    let Some(plan) = &template.output else {
        return Ok(Found::nothing());
    };
    plan.decode(answer).map(Found::Remote).map_err(senseless)
}

/// A status as the adapter has it; none is OK.
pub(crate) fn status(status: Option<rpc::Status>) -> Result<Status, HandlerError> {
    let Some(status) = status else {
        return Ok(Status::ok());
    };
    let code = Code::from_number(status.code.into())
        .ok_or_else(|| HandlerError::unavailable(format!("{} is no status", status.code)))?;
    let direct_response = status.details.iter().find_map(|detail| {
        let direct = detail.to_msg::<DirectHttpResponse>().ok()?;
        Some(DirectResponse {
            code: u32::try_from(direct.code).ok()?,
            body: direct.body,
            headers: direct.headers.into_iter().collect(),
        })
    });
    Ok(Status {
        code,
        message: status.message,
        direct_response,
    })
}

pub(crate) fn span(duration: Option<prost_types::Duration>) -> Option<Duration> {
    Duration::try_from(duration?).ok()
}
