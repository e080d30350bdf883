//! Auth mints the mesh's identities: serve → authenticate → csr → authorize → sign → audit.
//!
//! Beside the path: `ca` (the signing key and its folder), `token` (one-time join tokens). What a caller
//! may become follows from its verified credential alone; its CSR contributes a public key.

mod serve;
mod authenticate;
mod csr;
mod authorize;
mod sign;
mod audit;

mod ca;
mod token;

mod config;
mod run;

pub use authenticate::AuthenticateError;
pub use authorize::AuthorizeError;
pub use ca::{Ca, CaError};
pub use config::{Cli, Clock, Command, Config, Grant, JoinTokenArgs, ServeArgs};
pub use csr::{Csr, CsrError};
pub use run::{Running, StartError, join_token, start};
pub use sign::SignError;
pub use token::{TokenError, Tokens};
