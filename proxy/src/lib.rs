//! The data plane: sidecar, ingress and egress gateway.
//!
//! One request: `listener` → `filter_chain` → `tls` → `http` (codec) → `filter` (fault, cors, mixer, …)
//! → `route` → `router` → `cluster` → `balance` → `upstream`; `access_log` and the Mixer report hang on
//! the end of the stream. Beside the path: `bootstrap`, `xds`, `secret`, `outlier`, `stats`, `admin`, `drain`.
//!
//! Two worlds: the workers (one single-threaded tokio runtime each; nothing on them waits for another)
//! and the main runtime (xDS, admin, SDS, telemetry export). They meet in [`shared::Shared`]: immutable
//! tables behind `ArcSwap`, replaced whole by the main runtime and only read by the workers.

#![allow(
    deprecated,
    reason = "Envoy deprecates fields that control planes still send"
)]

pub mod worker;
pub mod listener;
pub mod net;
pub mod inspector;
pub mod filter_chain;
pub mod tls;
pub mod http;
pub mod filter;
pub mod mixer;
pub mod route;
pub mod router;
pub mod retry;
pub mod cluster;
pub mod balance;
pub mod outlier;
pub mod pages;
pub mod allocator;
pub mod circuit;
pub mod upstream;
pub mod tcp_proxy;
pub mod access_log;
pub mod format;
mod cel;
pub mod trace;
pub mod grpc;

pub use lateen_codec::head;
pub mod body;
mod boxed;
pub mod clock;
pub mod timer;
pub mod info;
pub mod reject;
pub mod config_error;
pub mod proto;

pub mod config;
pub mod bootstrap;
pub mod server;
pub mod control;
pub mod layers;
pub mod shared;
pub mod xds;
pub mod secret;
pub mod stats;
pub mod drain;
pub mod admin;
pub mod logging;
pub mod agent;
pub mod sidecar;
pub mod iptables;

#[cfg(test)]
mod testing;
