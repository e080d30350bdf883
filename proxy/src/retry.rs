//! When a request is sent again, and how long to wait before that.
//!
//! [`RetryPolicy`] is what a route says, compiled; [`RetryState`] is that and the request's own wishes
//! (`x-envoy-retry-on` and its kin) for one request. Whether a retry is *possible* (body kept, circuit
//! breaker) is the router's business.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lateen_protocols::envoy::envoy::{
    config::route::v3::{
        RetryPolicy as Proto,
        retry_policy::{
            RateLimitedRetryBackOff, ResetHeaderFormat, retry_host_predicate, retry_priority,
        },
    },
    extensions::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig,
};

use crate::{
    config_error::ConfigError,
    head::{Headers, Known, KnownSet, Name, RequestHead},
    proto::{invalid, optional_duration, timeout, unpack},
    route::matcher::HeaderMatch,
};

/// First back-off interval when a policy names none. Envoy: `upstream.base_retry_backoff_ms`.
const BASE_BACK_OFF: Duration = Duration::from_millis(25);

macro_rules! conditions {
    ($($name:ident = $bit:literal, $text:literal;)+) => {
        impl RetryOn {
            $(#[doc = concat!("`", $text, "`")] pub const $name: RetryOn = RetryOn(1 << $bit);)+
            const NAMES: &[(&'static str, RetryOn)] = &[$(($text, RetryOn::$name)),+];
        }
    };
}

/// A set of conditions on which to retry, named as in Envoy's `retry_on`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetryOn(u32);

conditions! {
    SERVER_ERROR = 0, "5xx";
    GATEWAY_ERROR = 1, "gateway-error";
    RESET = 2, "reset";
    RESET_BEFORE_REQUEST = 3, "reset-before-request";
    CONNECT_FAILURE = 4, "connect-failure";
    REFUSED_STREAM = 5, "refused-stream";
    RETRIABLE_4XX = 6, "retriable-4xx";
    RETRIABLE_STATUS_CODES = 7, "retriable-status-codes";
    RETRIABLE_HEADERS = 8, "retriable-headers";
    RATE_LIMITED = 9, "envoy-ratelimited";
    CANCELLED = 10, "cancelled";
    DEADLINE_EXCEEDED = 11, "deadline-exceeded";
    INTERNAL = 12, "internal";
    RESOURCE_EXHAUSTED = 13, "resource-exhausted";
    UNAVAILABLE = 14, "unavailable";
    HTTP3_POST_CONNECT_FAILURE = 15, "http3-post-connect-failure";
}

impl RetryOn {
    /// Reads a comma-separated list; names we do not know are passed to `unknown`.
    pub fn parse(list: &str, mut unknown: impl FnMut(&str)) -> RetryOn {
        let mut set = RetryOn::default();
        for name in list
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty())
        {
            match RetryOn::NAMES.iter().find(|(text, _)| *text == name) {
                Some((_, condition)) => set.add(*condition),
                None => unknown(name),
            }
        }
        set
    }

    /// Adds conditions.
    pub fn add(&mut self, other: RetryOn) {
        self.0 |= other.0;
    }

    /// Whether any of `other` is in the set.
    pub fn any(self, other: RetryOn) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether there are no conditions.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// Exponential back-off with full jitter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackOff {
    base: Duration,
    max: Duration,
}

impl Default for BackOff {
    fn default() -> BackOff {
        BackOff {
            base: BASE_BACK_OFF,
            max: BASE_BACK_OFF * 10,
        }
    }
}

impl BackOff {
    /// Longest wait before retry number `retry` (from 0): doubles, up to the maximum.
    pub fn bound(self, retry: u32) -> Duration {
        let factor = 1_u32.checked_shl(retry).unwrap_or(u32::MAX);
        self.base.saturating_mul(factor).min(self.max)
    }

    /// The wait before retry number `retry`: anything from nothing to the bound, so that callers who
    /// failed together do not come back together.
    pub fn wait(self, retry: u32) -> Duration {
        self.bound(retry).mul_f64(rand::random_range(0.0..1.0))
    }
}

/// A route's retry policy, compiled.
#[derive(Debug)]
pub struct RetryPolicy {
    /// Conditions.
    pub on: RetryOn,
    /// Most retries (attempts beyond the first).
    pub num_retries: u32,
    /// Longest time of one attempt.
    pub per_try_timeout: Option<Duration>,
    /// Waiting between attempts.
    pub back_off: BackOff,
    /// Waiting as long as the answer says.
    pub told_back_off: Option<ToldBackOff>,
    /// Statuses for `retriable-status-codes`.
    pub status_codes: Vec<u16>,
    /// Response headers for `retriable-headers`.
    pub response_headers: Vec<HeaderMatch>,
    /// When not empty, only requests with one of these are retried.
    pub request_headers: Vec<HeaderMatch>,
    /// How often another host is asked for when the balancer gives one that was tried.
    pub host_selection_attempts: u32,
    /// Prefer hosts that were not tried for this request.
    pub avoid_previous_hosts: bool,
    /// Prefer priorities that were not tried; every so many retries.
    pub avoid_previous_priorities: Option<u32>,
}

impl RetryPolicy {
    /// Compiles a retry policy.
    ///
    /// # Errors
    /// When something is invalid or not supported.
    pub fn compile(config: &Proto) -> Result<RetryPolicy, ConfigError> {
        RetryPolicy::read(config).map_err(|error| error.within("retry_policy"))
    }

    fn read(config: &Proto) -> Result<RetryPolicy, ConfigError> {
        if config
            .per_try_idle_timeout
            .as_ref()
            .is_some_and(|d| d.seconds != 0 || d.nanos != 0)
        {
            return Err(invalid("per_try_idle_timeout", "not supported"));
        }
        if !config.retry_options_predicates.is_empty() {
            return Err(invalid("retry_options_predicates", "not supported"));
        }
        let mut avoid_previous_hosts = false;
        for predicate in &config.retry_host_predicate {
            let type_url = predicate.config_type.as_ref().map(|config| {
                let retry_host_predicate::ConfigType::TypedConfig(any) = config;
                any.type_url.as_str()
            });
            let by_type = type_url.is_some_and(|url| url.ends_with("PreviousHostsPredicate"));
            if !by_type && predicate.name != "envoy.retry_host_predicates.previous_hosts" {
                return Err(invalid(
                    "retry_host_predicate",
                    format!("{} is not supported", predicate.name),
                ));
            }
            avoid_previous_hosts = true;
        }
        let avoid_previous_priorities = match config.retry_priority.as_ref() {
            None => None,
            Some(priority) => {
                let Some(retry_priority::ConfigType::TypedConfig(any)) =
                    priority.config_type.as_ref()
                else {
                    return Err(invalid("retry_priority", "has no configuration"));
                };
                match unpack::<PreviousPrioritiesConfig>(any)? {
                    Some(config) if config.update_frequency > 0 => {
                        Some(config.update_frequency.unsigned_abs())
                    }
                    Some(_) => return Err(invalid("update_frequency", "must be positive")),
                    None => {
                        return Err(invalid(
                            "retry_priority",
                            format!("{} is not supported", any.type_url),
                        ));
                    }
                }
            }
        };
        let mut status_codes = Vec::with_capacity(config.retriable_status_codes.len());
        for code in &config.retriable_status_codes {
            let code = u16::try_from(*code)
                .map_err(|_| invalid("retriable_status_codes", "not an HTTP status"))?;
            status_codes.push(code);
        }
        let headers = |path: &str, list: &[_]| -> Result<Vec<HeaderMatch>, ConfigError> {
            list.iter()
                .map(HeaderMatch::compile)
                .collect::<Result<_, _>>()
                .map_err(|e: ConfigError| e.within(path))
        };
        Ok(RetryPolicy {
            on: RetryOn::parse(&config.retry_on, |name| {
                tracing::warn!(retry_on = name, "unknown retry condition is ignored");
            }),
            num_retries: config.num_retries.as_ref().map_or(1, |n| n.value),
            per_try_timeout: timeout("per_try_timeout", config.per_try_timeout.as_ref(), None)?,
            back_off: back_off(config)?,
            told_back_off: config
                .rate_limited_retry_back_off
                .as_ref()
                .map(ToldBackOff::compile)
                .transpose()
                .map_err(|error| error.within("rate_limited_retry_back_off"))?,
            status_codes,
            response_headers: headers("retriable_headers", &config.retriable_headers)?,
            request_headers: headers(
                "retriable_request_headers",
                &config.retriable_request_headers,
            )?,
            host_selection_attempts: u32::try_from(config.host_selection_retry_max_attempts)
                .unwrap_or(0),
            avoid_previous_hosts,
            avoid_previous_priorities,
        })
    }
}

/// A wait that an answer's headers ask for. Envoy: `rate_limited_retry_back_off`.
#[derive(Debug)]
pub struct ToldBackOff {
    /// In the order in which they are looked for; whether the value is a point in time (Unix seconds), and not a number
    /// of seconds.
    headers: Vec<(Name, bool)>,
    /// Longer waits are not heeded.
    max: Duration,
}

impl ToldBackOff {
    fn compile(config: &RateLimitedRetryBackOff) -> Result<ToldBackOff, ConfigError> {
        const DEFAULT_MAX: Duration = Duration::from_secs(300);
        if config.reset_headers.is_empty() {
            return Err(invalid("reset_headers", "there are none"));
        }
        let mut headers = Vec::with_capacity(config.reset_headers.len());
        for header in &config.reset_headers {
            if header.name.is_empty() {
                return Err(invalid("reset_headers.name", "absent"));
            }
            let format = ResetHeaderFormat::try_from(header.format)
                .map_err(|_| invalid("reset_headers.format", "unknown"))?;
            headers.push((
                Name::new(&header.name),
                format == ResetHeaderFormat::UnixTimestamp,
            ));
        }
        let max = optional_duration("max_interval", config.max_interval.as_ref())?;
        let max = max.unwrap_or(DEFAULT_MAX);
        if max.is_zero() {
            return Err(invalid("max_interval", "must be positive"));
        }
        Ok(ToldBackOff { headers, max })
    }

    /// What the first header with a sensible value asks for, and up to half as much again, so that callers who were
    /// turned away together do not come back together.
    fn wait(&self, headers: &Headers, now: SystemTime) -> Option<Duration> {
        let told = |(name, is_time): &(Name, bool)| {
            let text = std::str::from_utf8(headers.get(name)?).ok()?;
            let value = Duration::from_secs(text.trim().parse().ok()?);
            let wait = match is_time {
                true => value.checked_sub(now.duration_since(UNIX_EPOCH).ok()?)?,
                false => value,
            };
            Some(wait).filter(|wait| !wait.is_zero() && *wait <= self.max)
        };
        let wait = self.headers.iter().find_map(told)?;
        Some(wait.mul_f64(rand::random_range(1.0..1.5)))
    }
}

fn back_off(config: &Proto) -> Result<BackOff, ConfigError> {
    let Some(given) = config.retry_back_off.as_ref() else {
        return Ok(BackOff::default());
    };
    let base = optional_duration("base_interval", given.base_interval.as_ref())?
        .filter(|base| !base.is_zero())
        .ok_or_else(|| invalid("retry_back_off.base_interval", "must be positive"))?
        // Envoy: "base intervals below 1 ms will be rounded up".
        .max(Duration::from_millis(1));
    let max = match optional_duration("max_interval", given.max_interval.as_ref())? {
        None => base * 10,
        Some(max) if max < base => {
            return Err(invalid(
                "retry_back_off.max_interval",
                "is shorter than base_interval",
            ));
        }
        Some(max) => max,
    };
    Ok(BackOff { base, max })
}

/// What ended an attempt before response headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// A circuit breaker refused it.
    Overflow,
    /// Connecting took too long.
    ConnectTimeout,
    /// Connecting was refused or broke, TLS included.
    ConnectFailure,
    /// The peer closed the connection.
    Termination,
    /// The peer reset the stream.
    Remote,
    /// The peer refused the stream, so that it may be sent again.
    Refused,
    /// The peer reset the stream, since a tunnel could not be opened or broke.
    RemoteConnect,
    /// The peer reset the stream, since it found that we broke the protocol.
    RemoteProtocol,
    /// The peer broke the protocol.
    Protocol,
    /// We gave up: the attempt's own timeout.
    Local,
}

/// The headers with which a request asks for retries.
const ASKING: KnownSet = KnownSet::of(&[
    Known::XEnvoyRetryOn,
    Known::XEnvoyRetryGrpcOn,
    Known::XEnvoyMaxRetries,
    Known::XEnvoyRetriableStatusCodes,
    Known::XEnvoyRetriableHeaderNames,
]);

/// Policy and the request's own wishes for one request.
#[derive(Debug)]
pub struct RetryState<'a> {
    policy: Option<&'a RetryPolicy>,
    on: RetryOn,
    remaining: u32,
    retries: u32,
    status_codes: Vec<u16>,
    header_names: Vec<Name>,
}

impl<'a> RetryState<'a> {
    /// Reads, and takes away, the `x-envoy-*` headers that ask for retries.
    pub fn new(policy: Option<&'a RetryPolicy>, head: &mut RequestHead) -> RetryState<'a> {
        let mut on = policy.map(|policy| policy.on).unwrap_or_default();
        if let Some(policy) = policy
            && !policy.request_headers.is_empty()
            && !policy
                .request_headers
                .iter()
                .any(|matcher| matcher.matches(head))
        {
            on = RetryOn::default();
        }
        let headers = &head.headers;
        for name in [Known::XEnvoyRetryOn, Known::XEnvoyRetryGrpcOn] {
            if let Some(list) = headers.known(name) {
                on.add(RetryOn::parse(&String::from_utf8_lossy(list), |_| {}));
            }
        }
        let mut remaining = policy.map_or(1, |policy| policy.num_retries);
        if let Some(most) = headers.known(Known::XEnvoyMaxRetries).and_then(number) {
            remaining = most;
        }
        let mut status_codes = Vec::new();
        if let Some(list) = headers.known(Known::XEnvoyRetriableStatusCodes) {
            status_codes.extend(list.split(|b| *b == b',').filter_map(number::<u16>));
        }
        let mut header_names = Vec::new();
        if let Some(list) = headers.known(Known::XEnvoyRetriableHeaderNames) {
            header_names.extend(
                list.split(|b| *b == b',')
                    .map(|name| Name::new(name.trim_ascii())),
            );
        }
        head.headers.remove_all(ASKING);
        RetryState {
            policy,
            on,
            remaining,
            retries: 0,
            status_codes,
            header_names,
        }
    }

    /// Whether anything could be retried, so that the body must be kept.
    pub fn is_enabled(&self) -> bool {
        !self.on.is_empty() && self.remaining > 0
    }

    /// Whether this response calls for a retry (if there are retries left).
    pub fn wants_response(&self, status: u16, headers: &Headers) -> bool {
        // A peer that sheds load is not to be asked again.
        if self.on.is_empty() || headers.known(Known::XEnvoyOverloaded).is_some() {
            return false;
        }
        if headers.known(Known::XEnvoyRatelimited).is_some() {
            return self.on.any(RetryOn::RATE_LIMITED);
        }
        let listed = |code: u16| {
            self.status_codes.contains(&code)
                || self
                    .policy
                    .is_some_and(|policy| policy.status_codes.contains(&code))
        };
        (self.on.any(RetryOn::SERVER_ERROR) && (500..600).contains(&status))
            || (self.on.any(RetryOn::GATEWAY_ERROR) && (502..=504).contains(&status))
            || (self.on.any(RetryOn::RETRIABLE_4XX) && status == 409)
            || (self.on.any(RetryOn::RETRIABLE_STATUS_CODES) && listed(status))
            || (self.on.any(RetryOn::RETRIABLE_HEADERS)
                && self.has_retriable_header(status, headers))
            || self.wants_grpc(headers)
    }

    fn has_retriable_header(&self, status: u16, headers: &Headers) -> bool {
        self.policy.is_some_and(|policy| {
            policy
                .response_headers
                .iter()
                .any(|matcher| matcher.matches_response(status, headers))
        }) || self
            .header_names
            .iter()
            .any(|name| headers.get(name).is_some())
    }

    fn wants_grpc(&self, headers: &Headers) -> bool {
        let Some(status) = headers.known(Known::GrpcStatus) else {
            return false;
        };
        let condition = match status {
            b"1" => RetryOn::CANCELLED,
            b"4" => RetryOn::DEADLINE_EXCEEDED,
            b"8" => RetryOn::RESOURCE_EXHAUSTED,
            b"13" => RetryOn::INTERNAL,
            b"14" => RetryOn::UNAVAILABLE,
            _ => return false,
        };
        self.on.any(condition)
    }

    /// Whether this reset calls for a retry; `sent` tells whether request bytes may have left.
    pub fn wants_reset(&self, reset: Reset, sent: bool) -> bool {
        // Envoy counts a reset as a 5xx, since it will be one.
        let all = RetryOn(RetryOn::RESET.0 | RetryOn::SERVER_ERROR.0 | RetryOn::GATEWAY_ERROR.0);
        match reset {
            Reset::Overflow => false,
            _ if self.on.any(all) => true,
            _ if !sent && self.on.any(RetryOn::RESET_BEFORE_REQUEST) => true,
            Reset::ConnectTimeout | Reset::ConnectFailure => self.on.any(RetryOn::CONNECT_FAILURE),
            Reset::Refused => self.on.any(RetryOn::REFUSED_STREAM),
            Reset::Termination
            | Reset::Remote
            | Reset::RemoteConnect
            | Reset::RemoteProtocol
            | Reset::Protocol
            | Reset::Local => false,
        }
    }

    /// Takes one of the retries that are left and gives the time to wait; `None` when none is left.
    pub fn take_retry(&mut self) -> Option<Duration> {
        self.remaining = self.remaining.checked_sub(1)?;
        let back_off = self
            .policy
            .map(|policy| policy.back_off)
            .unwrap_or_default();
        let wait = back_off.wait(self.retries);
        self.retries = self.retries.saturating_add(1);
        Some(wait)
    }

    /// The wait that an answer asks for, where the policy heeds such wishes.
    pub fn told(&self, headers: &Headers) -> Option<Duration> {
        let told = self.policy?.told_back_off.as_ref()?;
        told.wait(headers, SystemTime::now())
    }

    /// Retries taken so far.
    pub fn retries(&self) -> u32 {
        self.retries
    }

    /// The route's policy.
    pub fn policy(&self) -> Option<&'a RetryPolicy> {
        self.policy
    }
}

/// A decimal number, as headers carry it.
pub(crate) fn number<T: std::str::FromStr>(text: impl AsRef<[u8]>) -> Option<T> {
    std::str::from_utf8(text.as_ref()).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use lateen_protocols::envoy::google::protobuf as pb;

    use super::*;
    use crate::head::Protocol;

    fn head(headers: &[(&str, &str)]) -> RequestHead {
        let mut list = Headers::default();
        for (name, value) in headers {
            list.append(Name::new(name), value);
        }
        RequestHead {
            method: "GET".into(),
            scheme: "http".into(),
            authority: "a".into(),
            path: "/".into(),
            protocol: Protocol::Http11,
            headers: list,
        }
    }

    fn policy(on: &str, codes: &[u32]) -> RetryPolicy {
        RetryPolicy::compile(&Proto {
            retry_on: on.to_owned(),
            num_retries: Some(pb::UInt32Value { value: 2 }),
            retriable_status_codes: codes.to_vec(),
            ..Proto::default()
        })
        .unwrap()
    }

    fn response(headers: &[(&str, &str)]) -> Headers {
        head(headers).headers
    }

    #[test]
    fn conditions_decide_by_status() {
        let plain = Headers::default();
        type Case = (&'static str, &'static [u32], &'static [(u16, bool)]);
        let table: &[Case] = &[
            (
                "5xx",
                &[],
                &[(500, true), (503, true), (499, false), (200, false)],
            ),
            (
                "gateway-error",
                &[],
                &[
                    (500, false),
                    (502, true),
                    (503, true),
                    (504, true),
                    (505, false),
                ],
            ),
            ("retriable-4xx", &[], &[(409, true), (404, false)]),
            (
                "retriable-status-codes",
                &[418],
                &[(418, true), (500, false)],
            ),
            ("connect-failure,refused-stream", &[], &[(503, false)]),
        ];
        for (on, codes, cases) in table {
            let policy = policy(on, codes);
            let state = RetryState::new(Some(&policy), &mut head(&[]));
            for (status, want) in *cases {
                assert_eq!(
                    state.wants_response(*status, &plain),
                    *want,
                    "{on} {status}"
                );
            }
        }
    }

    #[test]
    fn an_overloaded_upstream_is_left_alone() {
        let policy = policy("5xx", &[]);
        let state = RetryState::new(Some(&policy), &mut head(&[]));
        assert!(!state.wants_response(503, &response(&[("x-envoy-overloaded", "true")])));
        assert!(!state.wants_response(503, &response(&[("x-envoy-ratelimited", "true")])));
    }

    #[test]
    fn resets_are_told_apart() {
        let all = [
            Reset::Overflow,
            Reset::ConnectFailure,
            Reset::Refused,
            Reset::Termination,
            Reset::Local,
        ];
        let table = [
            ("5xx", [false, true, true, true, true]),
            ("reset", [false, true, true, true, true]),
            ("connect-failure", [false, true, false, false, false]),
            ("refused-stream", [false, false, true, false, false]),
            ("retriable-4xx", [false; 5]),
        ];
        for (on, want) in table {
            let policy = policy(on, &[]);
            let state = RetryState::new(Some(&policy), &mut head(&[]));
            assert_eq!(
                all.map(|reset| state.wants_reset(reset, true)),
                want,
                "{on}"
            );
        }
        let policy = policy("reset-before-request", &[]);
        let state = RetryState::new(Some(&policy), &mut head(&[]));
        assert!(
            state.wants_reset(Reset::Termination, false)
                && !state.wants_reset(Reset::Termination, true)
        );
    }

    #[test]
    fn the_request_may_ask_by_headers() {
        let mut request = head(&[
            ("x-envoy-retry-on", "retriable-status-codes, bogus"),
            ("x-envoy-retry-grpc-on", "unavailable"),
            ("x-envoy-max-retries", "3"),
            ("x-envoy-retriable-status-codes", "418, 419"),
            ("x-other", "stays"),
        ]);
        let mut state = RetryState::new(None, &mut request);
        assert!(state.is_enabled());
        assert!(state.wants_response(419, &Headers::default()));
        assert!(state.wants_response(200, &response(&[("grpc-status", "14")])));
        assert!(!state.wants_response(200, &response(&[("grpc-status", "5")])));
        assert_eq!(request.headers.len(), 1);
        let granted = std::iter::from_fn(|| state.take_retry()).count();
        assert_eq!(granted, 3);
    }

    #[test]
    fn a_request_without_a_retriable_header_is_not_retried() {
        let mut config = Proto {
            retry_on: "5xx".to_owned(),
            ..Proto::default()
        };
        config.retriable_request_headers.push(
            lateen_protocols::envoy::envoy::config::route::v3::HeaderMatcher {
                name: "x-may".to_owned(),
                header_match_specifier: Some(
                    lateen_protocols::envoy::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier::PresentMatch(true),
                ),
                ..Default::default()
            },
        );
        let policy = RetryPolicy::compile(&config).unwrap();
        assert!(RetryState::new(Some(&policy), &mut head(&[("x-may", "1")])).is_enabled());
        assert!(!RetryState::new(Some(&policy), &mut head(&[])).is_enabled());
    }

    #[test]
    fn back_off_doubles_up_to_ten_times_the_base() {
        let back_off = BackOff::default();
        let bounds: Vec<u128> = (0..6).map(|n| back_off.bound(n).as_millis()).collect();
        assert_eq!(bounds, [25, 50, 100, 200, 250, 250]);
        assert_eq!(back_off.bound(u32::MAX), Duration::from_millis(250));
        for retry in 0..6 {
            assert!(back_off.wait(retry) <= back_off.bound(retry));
        }
    }

    #[test]
    fn what_would_be_ignored_is_refused() {
        let config = Proto {
            retry_back_off: Some(
                lateen_protocols::envoy::envoy::config::route::v3::retry_policy::RetryBackOff {
                    base_interval: Some(pb::Duration {
                        seconds: 2,
                        nanos: 0,
                    }),
                    max_interval: Some(pb::Duration {
                        seconds: 1,
                        nanos: 0,
                    }),
                },
            ),
            ..Proto::default()
        };
        let error = RetryPolicy::compile(&config).unwrap_err();
        assert_eq!(
            error.to_string(),
            "retry_policy: retry_back_off.max_interval: is shorter than base_interval"
        );
    }
}
