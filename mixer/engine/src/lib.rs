//! What Mixer knows and decides, without I/O. The flow: a request's compressed attributes ([`wire`],
//! [`dictionary`]) become a [`Bag`] laid out by an [`AttributeTable`]; a [`Plan`] of rules picks those
//! whose match, an [`Expression`], holds; instance parameters are expressions too; and a [`Tracker`]
//! remembers what was looked at, which is what the answer's cache key is made of.
//!
//! Servers, adapters and handlers live elsewhere; so do files, sockets and clocks.

mod text;
mod value;
mod json;
mod names;
mod table;
mod vocabulary;
pub mod dictionary;
mod bag;
mod tracker;
pub mod wire;
pub mod expression;
pub mod rules;

pub use bag::{Bag, UnknownAttribute};
pub use expression::{CompileError, EvalError, Expression, Language, Outcome, Verdict};
pub use names::NameError;
pub use rules::{Decision, OnMatchError, Plan, Rule, RuleSpec, Selected};
pub use table::{AttributeTable, ManifestError, Slot};
pub use text::Text;
pub use tracker::Tracker;
pub use value::{ConversionError, StringMap, Value, ValueType, parse_duration, parse_timestamp};
pub use wire::{DecodeError, Limits};
