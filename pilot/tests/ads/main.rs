//! The service in process, on ports of its own, spoken to by plain gRPC clients.
#![cfg(test)]

mod world;
mod objects;
mod proxies;
mod kubernetes;
mod webhooks;
