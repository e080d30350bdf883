//! Renders the chart in `install/chart` to objects, as Helm does. `lateen install` and Helm have one source that way, and the
//! tests hold both to the manifests in `install/manifests`.
//!
//! [`values`] (profile, files, `--set`, over the chart's; held against its schema) → [`template`] (text into a tree) →
//! [`run`] (tree and values into text; [`function`] has what templates call) → [`chart`] (text into objects, in the order in
//! which they can be applied).

pub mod values;
pub mod template;
mod function;
mod run;
pub mod chart;

pub use chart::{Chart, PROFILES, Release, RenderError};
pub use run::{RunError, run};
