//! `telemetry.istio.io` Telemetry: what is traced, logged and counted.

mod condition;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use self::condition::{Compare, Condition, Text};
use crate::object::Labels;
use crate::security::PolicyTarget;
use crate::value::{Duration, MatchLabels};

macro_rules! kinds {
    ($( $(#[$meta:meta])* $name:ident { $( $(#[$field_meta:meta])* $field:ident : $type:ty, )* } )*) => {$(
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
        pub struct $name { $( $(#[$field_meta])* pub $field: $type, )* }
    )*};
}

kinds! {
    /// What some workloads tell of their traffic.
    Telemetry {
        /// Workloads; none: the namespace, or in the root namespace the mesh.
        selector: Option<MatchLabels>,
        /// A gateway instead.
        target_ref: Option<PolicyTarget>,
        /// Gateways instead.
        target_refs: Vec<PolicyTarget>,
        /// Traces.
        tracing: Vec<Tracing>,
        /// Metrics; not served.
        metrics: Vec<Metrics>,
        /// Access logs.
        access_logging: Vec<AccessLogging>,
    }

    /// A provider's name.
    ProviderRef {
        /// The name.
        name: String,
    }

    /// Which side of traffic is meant.
    ModeMatch {
        /// The side.
        mode: Mode,
    }

    /// How requests are traced.
    Tracing {
        /// For which side.
        #[serde(rename = "match")] matches: Option<ModeMatch>,
        /// Where spans go: the first.
        providers: Vec<ProviderRef>,
        /// Share of requests, in percent.
        random_sampling_percentage: Option<f64>,
        /// No spans.
        disable_span_reporting: Option<bool>,
        /// Whether the request id decides; not served.
        use_request_id_for_trace_sampling: Option<bool>,
        /// Tags of Istio's own; not served.
        enable_istio_tags: Option<bool>,
        /// Further tags of spans.
        custom_tags: BTreeMap<String, CustomTag>,
    }

    /// A tag; one of these.
    CustomTag {
        /// Always the same.
        literal: Option<LiteralTag>,
        /// Of the proxy's environment.
        environment: Option<NamedTag>,
        /// Of the request.
        header: Option<NamedTag>,
        /// A format, as of access logs.
        formatter: Option<LiteralTag>,
    }

    /// A text.
    LiteralTag {
        /// The text.
        value: String,
    }

    /// A name, and what holds when there is nothing of it.
    NamedTag {
        /// The name.
        name: String,
        /// Otherwise.
        default_value: String,
    }

    /// How metrics are changed; not served.
    Metrics {
        /// Where they go.
        providers: Vec<ProviderRef>,
        /// Changes.
        overrides: Vec<serde_json::Value>,
        /// How often.
        reporting_interval: Option<Duration>,
    }

    /// What is logged, and where.
    AccessLogging {
        /// For which side.
        #[serde(rename = "match")] matches: Option<ModeMatch>,
        /// Where; none: as before.
        providers: Vec<ProviderRef>,
        /// Nothing there.
        disabled: Option<bool>,
        /// What.
        filter: Option<LogFilter>,
    }

    /// A condition of logging.
    LogFilter {
        /// CEL over Envoy's attributes.
        expression: String,
        /// The same as conditions that need no CEL; `None` if there are none that say it.
        #[serde(skip)] condition: Option<Condition>,
    }
}

/// A side of traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Mode {
    /// Both.
    #[default]
    ClientAndServer,
    /// What a workload sends, and all of a gateway.
    Client,
    /// What a workload receives.
    Server,
}

impl Mode {
    /// Whether what is meant for it is for `side`, which is one side.
    #[must_use]
    pub fn covers(self, side: Self) -> bool {
        self == Self::ClientAndServer || self == side
    }
}

impl ModeMatch {
    /// Whether what is matched so is for that side.
    #[must_use]
    pub fn covers(of: Option<&Self>, side: Mode) -> bool {
        of.is_none_or(|of| of.mode.covers(side))
    }
}

impl Telemetry {
    /// The labels it selects by; empty: everything in its scope.
    #[must_use]
    pub fn labels(&self) -> Option<&Labels> {
        self.selector
            .as_ref()
            .map(|selector| &selector.match_labels)
            .filter(|labels| !labels.is_empty())
    }

    /// What it is for by reference.
    pub fn targets(&self) -> impl Iterator<Item = &PolicyTarget> {
        self.target_ref.iter().chain(&self.target_refs)
    }

    /// Reads the conditions of its access logs.
    pub(crate) fn read_conditions(&mut self) {
        for filter in self
            .access_logging
            .iter_mut()
            .filter_map(|log| log.filter.as_mut())
        {
            filter.condition = Condition::read(&filter.expression);
        }
    }
}
