//! Instances made for one request, and what comes back besides a verdict.

use std::sync::Arc;

use bytes::Bytes;
use lateen_adapter::{
    Output, Value,
    instance::{
        CheckInstance, CheckOutputInstance, GenerateInstance, QuotaInstance, ReportInstance,
    },
    value,
};

use crate::config::remote::{instance::RemoteInstance, output::Decoded};

/// An instance for one request.
#[derive(Clone, Debug)]
pub enum Made {
    /// Of a check.
    Check(CheckInstance),
    /// Of a check with output.
    CheckOutput(CheckOutputInstance),
    /// Of a report.
    Report(ReportInstance),
    /// Of a quota.
    Quota(QuotaInstance),
    /// Of an attribute generator.
    Generate(GenerateInstance),
    /// Of any template that an adapter process takes.
    Remote(Encoded),
}

/// The dimension that keeps what a rule on trial counts apart.
const TRIAL: &str = "policy.istio.io/dry-run";

impl Made {
    /// Makes the counters of a quota those of the rule on trial, apart from those that grant. `false`: it cannot.
    pub fn set_apart(&mut self, rule: &Arc<str>) -> bool {
        let Self::Quota(instance) = self else {
            return false;
        };
        let whose = (Arc::from(TRIAL), value::string(rule));
        instance.dimensions.push(whose);
        true
    }
}

/// An instance as an adapter process gets it.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// What it is made of.
    pub instance: Arc<RemoteInstance>,
    /// The template's `InstanceMsg`.
    pub message: Bytes,
}

impl Encoded {
    /// Name of its template.
    pub fn template(&self) -> Arc<str> {
        Arc::clone(&self.instance.template.name)
    }
}

/// Values of a template's outputs.
#[derive(Clone, Debug)]
pub enum Found {
    /// By an adapter that is part of this program.
    Compiled(Output),
    /// By an adapter process.
    Remote(Decoded),
}

impl Found {
    /// Nothing.
    pub fn nothing() -> Self {
        Self::Compiled(Output::new())
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Compiled(output) => output.is_empty(),
            Self::Remote(output) => output.is_empty(),
        }
    }

    /// The value of `name`.
    pub fn get(&self, name: &str) -> Option<&Value> {
        match self {
            Self::Compiled(output) => output.iter().find(|(n, _)| *n == name).map(|(_, v)| v),
            Self::Remote(output) => output.iter().find(|(n, _)| **n == *name).map(|(_, v)| v),
        }
    }
}

/// Instances of reports for one handler.
#[derive(Debug)]
pub enum Batch {
    /// Of an adapter that is part of this program.
    Compiled(Vec<ReportInstance>),
    /// Of an adapter process.
    Remote(Vec<Encoded>),
}

impl Batch {
    /// A batch that begins with `made`; `None`: that is for no report.
    pub fn of(made: Made) -> Option<Self> {
        match made {
            Made::Report(instance) => Some(Self::Compiled(vec![instance])),
            Made::Remote(instance) => Some(Self::Remote(vec![instance])),
            Made::Check(_) | Made::CheckOutput(_) | Made::Quota(_) | Made::Generate(_) => None,
        }
    }

    /// Adds `made`, which is for the same handler.
    pub fn push(&mut self, made: Made) {
        match (self, made) {
            (Self::Compiled(batch), Made::Report(instance)) => batch.push(instance),
            (Self::Remote(batch), Made::Remote(instance)) => batch.push(instance),
            // A handler takes instances of one of the two only.
            _ => {}
        }
    }
}
