//! The whole service in process, over real gRPC.

#![cfg(test)]

mod support;
mod served;
mod statsd;
mod abuse;
mod adapters;
mod ads;
mod audit;
mod config;
mod envoy;
mod examples;
mod bypass;
mod collector;
mod corpus;
mod fluentd;
mod identity;
mod isolation;
mod keyval;
mod msgpack;
mod opa;
mod operation;
mod opentelemetry;
mod policy;
mod quota;
mod rbac;
mod redis;
mod redisquota;
mod remote;
mod rules;
mod telemetry;
mod wasm;
mod zipkin;
