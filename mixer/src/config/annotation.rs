//! What annotations say about a rule.

use super::{
    object::{Fault, Source},
    rule::FailMode,
};

/// What a rule does when it cannot do its work: `closed` (usual) or `open`. A rule that says `closed` itself
/// also protects while it is refused.
pub const FAIL_MODE: &str = "policy.istio.io/fail-mode";
/// As [`FAIL_MODE`], for a match or an instance that has no value.
pub const MATCH_FAIL_MODE: &str = "policy.istio.io/match-fail-mode";
/// As [`FAIL_MODE`], for an adapter that fails.
pub const ADAPTER_FAIL_MODE: &str = "policy.istio.io/adapter-fail-mode";
/// Puts a rule before those with a lower number; 0 is usual.
pub const PRIORITY: &str = "policy.istio.io/priority";
/// Tells callers how their quota stands, in headers: `true` or `false`.
pub const RATE_LIMIT_HEADERS: &str = "policy.istio.io/rate-limit-headers";
/// Tries a rule without effect: `true` or `false`.
pub const DRY_RUN: &str = "policy.istio.io/dry-run";

/// The annotations of a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Annotations {
    /// [`MATCH_FAIL_MODE`], else [`FAIL_MODE`].
    pub match_fail_mode: FailMode,
    /// [`ADAPTER_FAIL_MODE`], else [`FAIL_MODE`].
    pub adapter_fail_mode: FailMode,
    /// Whether [`FAIL_MODE`] is written and says `closed`.
    pub says_closed: bool,
    /// [`PRIORITY`].
    pub priority: i32,
    /// [`RATE_LIMIT_HEADERS`].
    pub tells_quota: bool,
    /// [`DRY_RUN`].
    pub is_dry_run: bool,
}

impl Annotations {
    /// Reads them; what is wrong is added to `faults`, and is as if it were not written.
    pub fn read(source: &Source, faults: &mut Vec<Fault>) -> Self {
        let written = |name: &str| source.annotations.get(name).map(String::as_str);
        let mut wrong = |name: &str, value: &str, want: &str| {
            faults.push(Fault::new("", format!("{name} is {value:?}, not {want}")));
        };
        let mut flag = |name: &str| match written(name) {
            None | Some("false") => false,
            Some("true") => true,
            Some(other) => {
                wrong(name, other, "true or false");
                false
            }
        };
        let tells_quota = flag(RATE_LIMIT_HEADERS);
        let is_dry_run = flag(DRY_RUN);
        let mut mode = |name: &str, default: FailMode| match written(name) {
            None => default,
            Some("closed") => FailMode::Closed,
            Some("open") => FailMode::Open,
            Some(other) => {
                wrong(name, other, "open or closed");
                FailMode::Closed
            }
        };
        let fail_mode = mode(FAIL_MODE, FailMode::Closed);
        let match_fail_mode = mode(MATCH_FAIL_MODE, fail_mode);
        let adapter_fail_mode = mode(ADAPTER_FAIL_MODE, fail_mode);
        let priority = match written(PRIORITY).map(str::parse) {
            None => 0,
            Some(Ok(priority)) => priority,
            Some(Err(_)) => {
                wrong(
                    PRIORITY,
                    written(PRIORITY).unwrap_or_default(),
                    "an integer",
                );
                0
            }
        };
        Self {
            match_fail_mode,
            adapter_fail_mode,
            says_closed: written(FAIL_MODE) == Some("closed"),
            priority,
            tells_quota,
            is_dry_run,
        }
    }
}
