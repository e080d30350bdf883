//! What the author of a Mixer adapter depends on.
//!
//! A *template* ([`template`]) says which data an adapter of one kind of work gets, and Mixer makes typed
//! *instances* ([`instance`]) of it from a request's attributes. An [`Adapter`] checks the parameters of a
//! *handler* and builds it; a [`Handler`] answers checks, takes reports, grants quota or produces attributes,
//! one trait for each ([`handler`]). [`Env`] lends it a clock, a bounded task spawner, counters and the workload view.
//! With feature `kit`, the module of that name runs an adapter on YAML cases without a server; with `serve`, one serves
//! an adapter as a process of its own, and `program` is the `main` of one.
//!
//! What a handler does wrong stays its own: a panic becomes an error of that call, a call that outlives the
//! caller's deadline is abandoned, and tasks are counted and stopped with the handler. A handler must not
//! block the thread, though: use [`Env::spawn_blocking`] for that.

pub mod adapter;
pub mod clock;
#[cfg(feature = "codec")]
pub mod codec;
pub mod env;
pub mod handler;
pub mod instance;
#[cfg(feature = "kit")]
pub mod kit;
pub mod meter;
pub mod params;
#[cfg(feature = "program")]
pub mod program;
#[cfg(feature = "serve")]
pub mod serve;
pub mod status;
pub mod template;
pub mod value;
pub mod wit;
pub mod workload;

pub use adapter::{Adapter, BuildError, Candidate, Info, InstanceType};
pub use clock::Clock;
pub use env::Env;
pub use futures::future::BoxFuture;
pub use handler::{
    Call, CheckHandler, CheckOutputHandler, CheckResult, GenerateHandler, Handler, HandlerError,
    Output, QuotaArgs, QuotaHandler, QuotaResult, QuotaWindow, ReportHandler,
};
pub use lateen_engine::{StringMap, Text, Value, ValueType};
pub use meter::Counter;
pub use status::{Code, DirectResponse, Status};
pub use template::{Field, FieldKind, Template, Variety};
