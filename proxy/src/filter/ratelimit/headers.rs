//! `x-ratelimit-*` (draft-polli-ratelimit-headers-03) and `retry-after`, out of what the service says of each
//! descriptor.

use std::fmt::Write as _;

use lateen_protocols::envoy::envoy::service::ratelimit::v3::rate_limit_response::{
    Code, DescriptorStatus, rate_limit::Unit,
};

use crate::head::{Headers, Name};

/// Adds the headers, of those descriptors that `wanted` wants.
pub(super) fn limits(
    statuses: &[DescriptorStatus],
    wanted: impl Fn(usize) -> bool,
    out: &mut Headers,
) {
    let mut least: Option<&DescriptorStatus> = None;
    let mut policy = String::new();
    for (_, status) in statuses.iter().enumerate().filter(|(at, _)| wanted(*at)) {
        let Some(limit) = &status.current_limit else {
            continue;
        };
        if least.is_none_or(|least| status.limit_remaining < least.limit_remaining) {
            least = Some(status);
        }
        let window = seconds(limit.unit());
        if window > 0 {
            // Writing to a string cannot fail.
            let _ok = write!(policy, ", {};w={window}", limit.requests_per_unit);
            if !limit.name.is_empty() {
                let name = limit.name.replace(|c: char| c.is_ascii_control(), "");
                let _ok = write!(policy, ";name=\"{name}\"");
            }
        }
    }
    let Some((status, limit)) = least.and_then(|s| Some((s, s.current_limit.as_ref()?))) else {
        return;
    };
    let reset = status
        .duration_until_reset
        .as_ref()
        .map_or(0, |reset| reset.seconds);
    let limit = format!("{}{policy}", limit.requests_per_unit);
    out.append(Name::new("x-ratelimit-limit"), limit);
    out.append(
        Name::new("x-ratelimit-remaining"),
        status.limit_remaining.to_string(),
    );
    out.append(Name::new("x-ratelimit-reset"), reset.to_string());
}

/// Adds when to come again, unless the service has said so, or no limit is over.
pub(super) fn retry_after(statuses: &[DescriptorStatus], out: &mut Headers) {
    let name = Name::new("retry-after");
    let longest = statuses
        .iter()
        .filter(|status| status.code() == Code::OverLimit)
        .map(|status| {
            status
                .duration_until_reset
                .as_ref()
                .map_or(0, |d| d.seconds)
        })
        .max();
    if let Some(longest) = longest
        && out.get(&name).is_none()
    {
        out.append(name, longest.max(1).to_string());
    }
}

fn seconds(unit: Unit) -> u64 {
    match unit {
        Unit::Unknown => 0,
        Unit::Second => 1,
        Unit::Minute => 60,
        Unit::Hour => 3600,
        Unit::Day => 86_400,
        Unit::Week => 604_800,
        Unit::Month => 2_592_000,
        Unit::Year => 31_536_000,
    }
}

#[cfg(test)]
mod tests {
    use lateen_protocols::envoy::{
        envoy::service::ratelimit::v3::rate_limit_response::RateLimit, google::protobuf as pb,
    };

    use super::*;

    fn status(
        code: Code,
        requests: u32,
        unit: Unit,
        remaining: u32,
        reset: i64,
    ) -> DescriptorStatus {
        DescriptorStatus {
            code: code.into(),
            current_limit: Some(RateLimit {
                name: if requests == 5 {
                    "five".into()
                } else {
                    String::new()
                },
                requests_per_unit: requests,
                unit: unit.into(),
            }),
            limit_remaining: remaining,
            duration_until_reset: Some(pb::Duration {
                seconds: reset,
                nanos: 0,
            }),
            quota: None,
        }
    }

    fn text(headers: &Headers) -> Vec<String> {
        let line = |(name, value): (crate::head::NameRef<'_>, &[u8])| {
            format!(
                "{}: {}",
                String::from_utf8_lossy(name.as_bytes()),
                String::from_utf8_lossy(value)
            )
        };
        headers.iter().map(line).collect()
    }

    #[test]
    fn the_limit_nearest_to_its_end_is_told_with_all_policies() {
        let statuses = [
            status(Code::Ok, 10, Unit::Minute, 7, 30),
            DescriptorStatus::default(),
            status(Code::OverLimit, 5, Unit::Second, 0, 0),
        ];
        let mut all = Headers::default();
        limits(&statuses, |_| true, &mut all);
        assert_eq!(
            text(&all),
            [
                "x-ratelimit-limit: 5, 10;w=60, 5;w=1;name=\"five\"",
                "x-ratelimit-remaining: 0",
                "x-ratelimit-reset: 0"
            ]
        );
        let mut one = Headers::default();
        limits(&statuses, |at| at == 0, &mut one);
        assert_eq!(text(&one)[0], "x-ratelimit-limit: 10, 10;w=60");
        let mut none = Headers::default();
        limits(&statuses, |at| at == 1, &mut none);
        assert!(none.is_empty());
    }

    #[test]
    fn a_refused_client_is_told_when_to_come_again() {
        let mut headers = Headers::default();
        retry_after(&[status(Code::Ok, 1, Unit::Hour, 1, 99)], &mut headers);
        assert!(headers.is_empty(), "no limit is over");
        let over = [
            status(Code::OverLimit, 1, Unit::Hour, 0, 0),
            status(Code::OverLimit, 1, Unit::Hour, 0, 42),
        ];
        retry_after(&over[..1], &mut headers);
        assert_eq!(text(&headers), ["retry-after: 1"]);
        retry_after(&over, &mut headers);
        assert_eq!(
            text(&headers),
            ["retry-after: 1"],
            "the service's own stays"
        );
    }
}
