//! `security.istio.io` AuthorizationPolicy: who may do what at a workload.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::object::Labels;
use crate::security::PolicyTarget;
use crate::value::MatchLabels;

macro_rules! kinds {
    ($( $(#[$meta:meta])* $name:ident { $( $(#[$field_meta:meta])* $field:ident : $type:ty, )* } )*) => {$(
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
        pub struct $name { $( $(#[$field_meta])* pub $field: $type, )* }
    )*};
}

/// What becomes of requests that a policy's rules match.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum AuthorizationAction {
    /// Let through; whatever no such policy of the workload matches is refused.
    #[default]
    Allow,
    /// Refused, whatever others say.
    Deny,
    /// Marked for the log.
    Audit,
    /// A provider is asked.
    Custom,
}

kinds! {
    /// Rules for some workloads, with one action.
    AuthorizationPolicy {
        /// Workloads; none: the namespace, or from the root namespace the mesh.
        selector: Option<MatchLabels>,
        /// The old form of `target_refs`.
        target_ref: Option<PolicyTarget>,
        /// What it is for, instead of a selector.
        target_refs: Vec<PolicyTarget>,
        /// What the rules mean.
        action: AuthorizationAction,
        /// Who is asked, for CUSTOM.
        provider: Option<Provider>,
        /// Any of them matches; none match nothing.
        rules: Vec<AuthorizationRule>,
    }

    /// One of the mesh's `extensionProviders`.
    Provider {
        /// Its name.
        name: String,
    }

    /// Who, what and when: all of those that are there must fit.
    AuthorizationRule {
        /// Any of these.
        from: Vec<RuleFrom>,
        /// Any of these.
        to: Vec<RuleTo>,
        /// All of these.
        when: Vec<Condition>,
    }

    /// Boxes a source, as users write it.
    RuleFrom {
        /// The source.
        source: Option<Source>,
    }

    /// Who asks: all fields that are there must fit, each by any of its values. `*`, `PREFIX*` and `*SUFFIX`.
    Source {
        /// Identities, `TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT`.
        principals: Vec<String>,
        /// None of these.
        not_principals: Vec<String>,
        /// `ISSUER/SUBJECT` of a JWT.
        request_principals: Vec<String>,
        /// None of these.
        not_request_principals: Vec<String>,
        /// Namespaces of identities.
        namespaces: Vec<String>,
        /// None of these.
        not_namespaces: Vec<String>,
        /// `ACCOUNT` of the policy's namespace, or `NAMESPACE/ACCOUNT`.
        service_accounts: Vec<String>,
        /// None of these.
        not_service_accounts: Vec<String>,
        /// Trust domains of identities.
        trust_domains: Vec<String>,
        /// None of these.
        not_trust_domains: Vec<String>,
        /// Addresses or ranges of the peer.
        ip_blocks: Vec<String>,
        /// None of these.
        not_ip_blocks: Vec<String>,
        /// Addresses or ranges of the client, as far as proxies in front are trusted.
        remote_ip_blocks: Vec<String>,
        /// None of these.
        not_remote_ip_blocks: Vec<String>,
    }

    /// Boxes an operation, as users write it.
    RuleTo {
        /// The operation.
        operation: Option<Operation>,
    }

    /// What is asked for: all fields that are there must fit, each by any of its values.
    Operation {
        /// Hosts.
        hosts: Vec<String>,
        /// None of these.
        not_hosts: Vec<String>,
        /// Ports of the workload.
        ports: Vec<String>,
        /// None of these.
        not_ports: Vec<String>,
        /// Methods.
        methods: Vec<String>,
        /// None of these.
        not_methods: Vec<String>,
        /// Paths; also templates with `{*}` and `{**}`.
        paths: Vec<String>,
        /// None of these.
        not_paths: Vec<String>,
    }

    /// An attribute and its values.
    Condition {
        /// Name: `request.headers[x]`, `source.ip`, …
        key: String,
        /// Any of these.
        values: Vec<String>,
        /// None of these.
        not_values: Vec<String>,
    }
}

impl AuthorizationPolicy {
    /// The labels it selects by; none: everything in its scope.
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
}

/// Whether a policy is only counted, not enforced: annotation `istio.io/dry-run`.
#[must_use]
pub fn is_dry_run(annotations: &BTreeMap<String, String>) -> bool {
    annotations
        .get("istio.io/dry-run")
        .is_some_and(|text| text == "true")
}
