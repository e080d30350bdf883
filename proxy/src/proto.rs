//! Small readings of Envoy's messages that every compiler of configuration needs.

use std::time::Duration;

use lateen_protocols::envoy::{
    envoy::{
        config::core::v3 as core,
        r#type::v3::{FractionalPercent, fractional_percent::DenominatorType},
    },
    google::protobuf as pb,
};
use prost::{Message, Name};

use crate::config_error::ConfigError;

pub(crate) mod wire;

/// A configuration error at `path`.
pub fn invalid(path: impl Into<String>, reason: impl Into<String>) -> ConfigError {
    ConfigError {
        path: path.into(),
        reason: reason.into(),
    }
}

/// A duration that is not negative.
///
/// # Errors
/// When it is negative or out of range.
pub fn duration(path: &str, duration: &pb::Duration) -> Result<Duration, ConfigError> {
    match (
        u64::try_from(duration.seconds),
        u32::try_from(duration.nanos),
    ) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => Ok(Duration::new(seconds, nanos)),
        _ => Err(invalid(path, "the duration is negative or out of range")),
    }
}

/// As [`duration`] of a field that may be absent.
///
/// # Errors
/// When it is negative or out of range.
pub fn optional_duration(
    path: &str,
    value: Option<&pb::Duration>,
) -> Result<Option<Duration>, ConfigError> {
    value.map(|value| duration(path, value)).transpose()
}

/// A duration whose absence means `default` and whose zero means "none".
///
/// # Errors
/// When it is negative or out of range.
pub fn timeout(
    path: &str,
    value: Option<&pb::Duration>,
    default: Option<Duration>,
) -> Result<Option<Duration>, ConfigError> {
    match value {
        None => Ok(default),
        Some(value) => Ok(Some(duration(path, value)?).filter(|d| !d.is_zero())),
    }
}

/// Decodes `any` as a `T`; `None` if it is of another type.
///
/// # Errors
/// When the type is right and the bytes are not.
pub fn unpack<T: Message + Name + Default>(any: &pb::Any) -> Result<Option<T>, ConfigError> {
    if any.type_url.rsplit('/').next() != Some(T::full_name().as_str()) {
        return Ok(None);
    }
    T::decode(any.value.as_slice())
        .map(Some)
        .map_err(|error| invalid(any.type_url.clone(), error.to_string()))
}

/// The file a resource is to come from, if it is to come from one.
pub fn source_file(source: Option<&core::ConfigSource>) -> Option<&str> {
    use core::config_source::ConfigSourceSpecifier as From;
    match source?.config_source_specifier.as_ref()? {
        From::Path(path) => Some(path),
        From::PathConfigSource(source) => Some(&source.path),
        _ => None,
    }
}

/// A chance in parts of a million.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chance(pub u32);

impl Chance {
    /// Always.
    pub const ALWAYS: Chance = Chance(1_000_000);
    /// Never.
    pub const NEVER: Chance = Chance(0);

    /// Reads Envoy's fraction; more than one means always.
    pub fn new(percent: &FractionalPercent) -> Chance {
        let denominator = match percent.denominator() {
            DenominatorType::Hundred => 10_000,
            DenominatorType::TenThousand => 100,
            DenominatorType::Million => 1,
        };
        Chance(percent.numerator.saturating_mul(denominator).min(1_000_000))
    }

    /// Reads the default value of a runtime fraction; absent means `default`.
    pub fn of_runtime(percent: Option<&core::RuntimeFractionalPercent>, default: Chance) -> Chance {
        match percent.and_then(|percent| percent.default_value.as_ref()) {
            Some(value) => Chance::new(value),
            None => default,
        }
    }

    /// Draws.
    pub fn hits(self) -> bool {
        match self.0 {
            0 => false,
            1_000_000.. => true,
            parts => rand::random_range(0..1_000_000) < parts,
        }
    }
}
