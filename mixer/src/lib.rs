//! Mixer: attribute-based policy and telemetry.
//!
//! One check, from left to right: [`connection`] (HTTP/2) → [`door`] (bytes in, messages out) → [`serve`] ([`overload`], deadline) → [`attribute`] (decode) → [`preprocess`]
//! (attribute generators) → [`check`] (rules that apply, their instances, all handlers at once) → [`merge`]
//! (one verdict of many) → quota → [`encode`]. A [`report`] goes the same way up to its handlers. [`config`]
//! makes the snapshot that a request reads from start to end, [`handler`] keeps what adapters do wrong from
//! everybody else, [`adapter`] has the built-in ones. `envoy` is the same for stock Envoy: its own protocols in place of [`serve`]. The expression language and the choice of rules are
//! `lateen_engine`'s.

pub mod connection;
pub mod door;
pub mod serve;
pub mod overload;
pub mod envoy;
pub mod attribute;
pub mod preprocess;
pub mod check;
pub mod explain;
pub mod report;
pub mod merge;
pub mod encode;
pub mod instance;
pub mod handler;
pub mod remote;
pub mod adapter;
pub mod config;
pub mod workloads;
pub mod metrics;
pub mod verdicts;
mod introspect;
pub mod server;
pub mod command;

pub use server::{Args, Running, StartError, start};
