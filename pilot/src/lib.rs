//! Pilot: discovery and routing rules into Envoy configuration, served over xDS.
//!
//! sources → [`push`] (debounce, generations) → [`gateway_api`] (Gateway API and Ingress as Istio's objects) → [`model`]
//! (snapshot) → [`translate`] (pure) → [`encode`]
//! (bytes, versions) → [`serve`] (ADS streams, ACKs, ledger). Beside the path: [`generic`] (objects as they
//! are, for Mixer), [`webhook`] (what API servers ask: sidecars for pods, verdicts about objects), [`controller`] (what is
//! written to a cluster), [`debug`] (HTTP pages), [`metrics`], [`tool`] (translation at the command line).

pub mod push;
pub mod gateway_api;
pub mod model;
pub mod translate;
pub mod encode;
pub mod generic;
pub mod serve;
pub mod webhook;
pub mod controller;
pub mod debug;
pub mod metrics;
pub mod server;
pub mod tool;
