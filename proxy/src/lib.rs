//! The data plane: sidecar, ingress and egress gateway.
//!
//! One request: `listener` → `filter_chain` → `tls` → `http` (codec) → `filter` (fault, cors, mixer, …)
//! → `route` → `router` → `cluster` → `balance` → `upstream`; `access_log` and the Mixer report hang on
//! the end of the stream. Beside the path: `bootstrap`, `xds`, `secret`, `outlier`, `stats`, `admin`, `drain`.
//!
//! Two worlds: the workers (one single-threaded tokio runtime each; nothing on them waits for another)
//! and the main runtime (xDS, admin, SDS, telemetry export). They meet in [`shared::Shared`]: immutable
//! tables behind `ArcSwap`, replaced whole by the main runtime and only read by the workers.

#![allow(deprecated, reason = "Envoy deprecates fields that control planes still send")]

pub mod head;
pub mod info;
pub mod tls;
pub mod secret;
pub mod stats;
pub mod drain;
pub mod config_error;
pub mod bootstrap;
pub mod xds;
pub mod body;
pub mod reject;
pub mod format;
pub mod filter;
pub mod route;
pub mod proto;
