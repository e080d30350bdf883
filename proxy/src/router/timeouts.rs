//! How long a request may take: the route's word, and the request's own.

use std::time::Duration;

use crate::{
    head::{Known, KnownSet, RequestHead},
    retry::number,
    route::policy::ForwardPolicy,
};

/// The headers with which a request asks for timeouts, and the one in which it is told.
const ASKING: KnownSet = KnownSet::of(&[
    Known::XEnvoyUpstreamRqTimeoutMs,
    Known::XEnvoyUpstreamRqPerTryTimeoutMs,
    Known::XEnvoyExpectedRqTimeoutMs,
]);

/// Limits of one request; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Timeouts {
    /// From the end of the request to the end of the response, all attempts together.
    pub(super) global: Option<Duration>,
    /// One attempt, to the response's head.
    pub(super) per_try: Option<Duration>,
}

impl Timeouts {
    /// Reads, and takes away, the headers that ask for timeouts, and tells the upstream what it has got
    /// (`x-envoy-expected-rq-timeout-ms`, if `tell`). Envoy: `FilterUtility::finalTimeout`.
    pub(super) fn of(policy: &ForwardPolicy, head: &mut RequestHead, tell: bool) -> Timeouts {
        let mut timeouts = Timeouts {
            global: policy.timeout,
            per_try: policy
                .retry
                .as_ref()
                .and_then(|retry| retry.per_try_timeout),
        };
        let by_grpc = policy.grpc_timeout_max.filter(|_| head.is_grpc());
        if let Some(max) = by_grpc {
            timeouts.global = grpc_timeout(head, max, policy.grpc_timeout_offset);
        }
        let asked = |name| {
            let value = head.headers.known(name)?;
            number::<u64>(value).map(Duration::from_millis)
        };
        if let Some(asked) = asked(Known::XEnvoyUpstreamRqTimeoutMs) {
            timeouts.global = Some(asked).filter(|asked| !asked.is_zero());
        }
        if let Some(asked) = asked(Known::XEnvoyUpstreamRqPerTryTimeoutMs) {
            timeouts.per_try = Some(asked).filter(|asked| !asked.is_zero());
        }
        head.headers.remove_all(ASKING);
        // A try that may take as long as everything together has no limit of its own.
        if let (Some(global), Some(per_try)) = (timeouts.global, timeouts.per_try)
            && per_try >= global
        {
            timeouts.per_try = None;
        }
        if let Some(expected) = timeouts.per_try.or(timeouts.global) {
            let ms = expected.as_millis();
            if tell {
                let value = Decimal::of(u64::try_from(ms).unwrap_or(u64::MAX));
                head.headers.set(Known::XEnvoyExpectedRqTimeoutMs, value);
            }
            if by_grpc.is_some() {
                head.headers.set(Known::GrpcTimeout, format!("{ms}m"));
            }
        }
        timeouts
    }
}

/// A number as headers carry it, without memory of its own.
pub(super) struct Decimal {
    digits: [u8; 20],
    from: usize,
}

impl Decimal {
    pub(super) fn of(mut number: u64) -> Decimal {
        let mut digits = [b'0'; 20];
        let mut from = digits.len() - 1;
        for (index, digit) in digits.iter_mut().enumerate().rev() {
            #[allow(clippy::cast_possible_truncation, reason = "less than ten")]
            let low = (number % 10) as u8;
            *digit = b'0' + low;
            from = index;
            number /= 10;
            if number == 0 {
                break;
            }
        }
        Decimal { digits, from }
    }
}

impl AsRef<[u8]> for Decimal {
    fn as_ref(&self) -> &[u8] {
        self.digits.get(self.from..).unwrap_or_default()
    }
}

/// The client's deadline, less the offset, at most `max` (zero: unbounded).
fn grpc_timeout(head: &RequestHead, max: Duration, offset: Option<Duration>) -> Option<Duration> {
    let mut timeout = head
        .headers
        .known(Known::GrpcTimeout)
        .and_then(parse_grpc_timeout);
    if let (Some(asked), Some(offset)) = (timeout, offset)
        && offset < asked
    {
        timeout = Some(asked - offset);
    }
    let max = Some(max).filter(|max| !max.is_zero());
    match (timeout.filter(|t| !t.is_zero()), max) {
        (Some(timeout), Some(max)) => Some(timeout.min(max)),
        (one, other) => one.or(other),
    }
}

/// gRPC over HTTP/2: "TimeoutValue TimeoutUnit", at most eight digits.
fn parse_grpc_timeout(text: &[u8]) -> Option<Duration> {
    let (unit, digits) = text.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let value: u64 = number(digits)?;
    Some(match unit {
        b'H' => Duration::from_secs(value * 3600),
        b'M' => Duration::from_secs(value * 60),
        b'S' => Duration::from_secs(value),
        b'm' => Duration::from_millis(value),
        b'u' => Duration::from_micros(value),
        b'n' => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written() {
        for number in [0, 7, 10, 15_000, u64::MAX] {
            assert_eq!(Decimal::of(number).as_ref(), number.to_string().as_bytes());
        }
    }

    #[test]
    fn grpc_timeouts_are_read() {
        let table: &[(&[u8], Option<u64>)] = &[
            (b"300m", Some(300)),
            (b"5S", Some(5000)),
            (b"300000u", Some(300)),
            (b"1H", Some(3_600_000)),
            (b"123456789S", None),
            (b"S", None),
            (b"5x", None),
        ];
        for (text, want) in table {
            assert_eq!(parse_grpc_timeout(text), want.map(Duration::from_millis));
        }
    }
}
