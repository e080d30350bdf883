//! Users' configuration: YAML text -> located documents -> typed objects -> validated -> one set.
//!
//! [`parse`] turns a file into [`Object`]s and [`Problem`]s, [`validate`] judges one object alone,
//! [`reference`] judges objects against each other, [`store`] keeps the last good state of all sources as a
//! [`ConfigSet`], [`folder`] is the one that is a watched directory. Kinds are Istio's and Kubernetes', unmodified; every served version of a
//! kind is one kind. What proxies are told about all this is Pilot's business, not ours.

pub mod yaml;
pub mod parse;
pub mod problem;
pub mod object;
pub mod value;
pub mod networking;
pub mod security;
pub mod authorization;
pub mod envoy_filter;
pub mod telemetry;
pub mod policy;
pub mod kubernetes;
pub mod gateway_api;
pub mod ingress;
pub mod secret;
pub mod mesh;
pub mod provider;
pub mod review;
pub mod definitions;
pub mod validate;
pub mod reference;
pub mod analyze;
pub mod store;
pub mod folder;

pub use definitions::definitions;
pub use folder::Folder;
pub use mesh::MeshConfig;
pub use object::{Key, Labels, ORIGIN, Object, Order, Origin, Spec};
pub use parse::{is_read, parse_file, parse_value};
pub use policy::MixerObject;
pub use problem::{Problem, Severity};
pub use reference::check_references;
pub use review::{Finding, review};
pub use secret::Secret;
pub use store::{ConfigSet, Source, Store};
pub use validate::validate;
pub use value::{Duration, Percent, StringMatch};
