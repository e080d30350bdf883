//! Runs a whole mesh on one machine: the real `auth`, `pilot`, `mixer` and `proxy` programs on loopback
//! addresses of their own, and the workloads that a folder of Kubernetes YAML describes.
//!
//! `address` (a free block of 127/8) → `workload` (what the YAML asks for) → `process` (one program)
//! → `bootstrap` (what a sidecar starts from) → `mesh` (all of it); `http` and `app` are what tests
//! speak with. `lateen up` and the acceptance tests use the same code.

pub mod address;
pub mod app;
pub mod bootstrap;
pub mod http;
pub mod mesh;
pub mod process;
pub mod samples;
pub mod workload;
