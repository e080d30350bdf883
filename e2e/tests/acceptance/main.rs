//! The acceptance table as tests: given a configuration, this traffic has that outcome. Test names begin
//! with the row's id. Every test runs the real programs; rows about routing, policy and telemetry run with stock Envoy as
//! every sidecar too (`ENVOY_BIN`, which `make test` sets).
#![cfg(test)]

mod adapters;
mod authorization;
mod changes;
// Mixer's tests listen the same way.
#[path = "../../../mixer/tests/service/collector.rs"]
mod collector;
mod envoy;
mod external;
mod faults;
mod floods;
mod gateway;
mod gateway_api;
mod hostile;
mod lists;
mod locality;
// Mixer's tests read the same protocol.
#[path = "../../../mixer/tests/service/msgpack.rs"]
mod msgpack;
mod mtls;
mod operation;
mod patches;
mod policy;
mod providers;
mod quota;
mod redis;
mod routing;
mod rules;
mod samples;
mod scope;
mod secure_gateway;
mod support;
mod telemetry;
mod tokens;
mod tracing;
mod traffic;
mod workloads;
