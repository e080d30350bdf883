//! What a handler of this adapter is configured with.

use std::{path::PathBuf, time::Duration};

use lateen_adapter::params;
use serde::Deserialize;
use serde_json::Value as Json;

/// Most copies of a guest.
const MAX_COPIES: usize = 64;
/// Most memory of a copy, in bytes.
const MAX_MEMORY_BYTES: usize = 1 << 30;
/// Most instructions of a call, more or less: some ten seconds' worth.
const MAX_FUEL: u64 = 10_000_000_000;

/// As written.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Params {
    /// The component.
    pub(crate) file: PathBuf,
    #[serde(rename = "sha256")]
    sha256_text: Option<String>,
    /// What the guest is configured with.
    pub(crate) config: Json,
    /// How much it may compute for a call; an instruction costs about one.
    #[serde(deserialize_with = "params::integer")]
    pub(crate) fuel: u64,
    /// How much memory a copy may have.
    #[serde(alias = "memory_bytes", deserialize_with = "params::integer")]
    pub(crate) memory_bytes: usize,
    /// How long a call may take.
    #[serde(deserialize_with = "params::duration")]
    pub(crate) timeout: Duration,
    /// How many calls may run at a time, each in a copy of its own.
    #[serde(deserialize_with = "params::integer")]
    pub(crate) copies: usize,
    /// Only these bytes are run.
    #[serde(skip)]
    pub(crate) sha256: Option<[u8; 32]>,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            file: PathBuf::new(),
            sha256_text: None,
            config: Json::Null,
            fuel: 100_000_000, // a tenth of a second on today's machines
            memory_bytes: 64 << 20,
            timeout: Duration::from_millis(500),
            copies: 4,
            sha256: None,
        }
    }
}

impl Params {
    /// With everything in range, or what is not.
    pub(crate) fn checked(mut self) -> Result<Self, String> {
        if self.file.as_os_str().is_empty() {
            return Err("file: say where the component is".to_owned());
        }
        if let Some(text) = &self.sha256_text {
            let mut sha256 = [0; 32];
            hex::decode_to_slice(text, &mut sha256)
                .map_err(|_| format!("sha256: {text:?} is not 64 hexadecimal digits"))?;
            self.sha256 = Some(sha256);
        }
        if !(self.config.is_null() || self.config.is_object()) {
            return Err(format!("config: {} is no map", self.config));
        }
        if !(10_000..=MAX_FUEL).contains(&self.fuel) {
            return Err(format!("fuel: {} is not in 10000..{MAX_FUEL}", self.fuel));
        }
        if !(1 << 16..=MAX_MEMORY_BYTES).contains(&self.memory_bytes) {
            let bytes = self.memory_bytes;
            return Err(format!(
                "memoryBytes: {bytes} is not in 65536..{MAX_MEMORY_BYTES}"
            ));
        }
        if self.timeout.is_zero() || self.timeout > Duration::from_secs(60) {
            return Err(format!("timeout: {:?} is not in 0..60 s", self.timeout));
        }
        if !(1..=MAX_COPIES).contains(&self.copies) {
            return Err(format!("copies: {} is not in 1..{MAX_COPIES}", self.copies));
        }
        Ok(self)
    }
}
