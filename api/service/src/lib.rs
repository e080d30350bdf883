//! What each of the four programs shares: [`telemetry`] → [`identity`] (certificate from Auth, renewed) →
//! [`tls`] (connections that know their peer) → [`admin`] (health, metrics, debug) → [`shutdown`] (drain).
//! No component logic.

pub mod telemetry;
pub mod identity;
pub mod tls;
pub mod admin;
pub mod shutdown;

pub use lateen_identity;
pub use prometheus_client;

/// Installs aws-lc-rs as the process's cryptography, once. Every `main` calls it first; further calls do nothing.
pub fn init_crypto() {
    // An error says that somebody installed one before, which is all we want.
    drop(lateen_identity::rustls::crypto::aws_lc_rs::default_provider().install_default());
}
