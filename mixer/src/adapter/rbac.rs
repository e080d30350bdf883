//! Role-based access control: `ServiceRole`s say what may be done to services, `ServiceRoleBinding`s who may
//! do it, `ClusterRbacConfig` (or `RbacConfig`) where that is enforced. What no role permits is denied.
//!
//! The policies come with the configuration ([`PolicyView`]); the instance (template `authorization`) says
//! who wants to do what. Names and meaning are those of Istio 1.0 and 1.1.

mod policy;
mod view;

use std::{sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, CheckHandler, CheckResult, Code, Counter, Env, Handler,
    HandlerError, Info, Status,
    instance::{Authorization, CheckInstance},
    params, template,
};
use serde::Deserialize;

pub use self::{policy::KINDS, view::PolicyView};

/// The adapter.
#[derive(Clone, Debug)]
pub struct Rbac(PolicyView);

impl Rbac {
    /// Decides by the policies in `view`.
    pub fn new(view: PolicyView) -> Self {
        Self(view)
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    #[serde(alias = "config_store_url")]
    config_store_url: String,
    #[serde(alias = "cache_duration", deserialize_with = "params::duration")]
    cache_duration: Duration,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            config_store_url: String::new(),
            cache_duration: Duration::from_secs(60),
        }
    }
}

impl Adapter for Rbac {
    fn info(&self) -> Info {
        Info {
            name: "rbac",
            description: "allows what a ServiceRole permits to those bound to it",
            templates: const { &[&template::AUTHORIZATION] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        let params = match params::parse::<Params>(candidate.params) {
            Ok(params) => params,
            Err(problem) => return vec![problem],
        };
        let mut problems = Vec::new();
        if !matches!(params.config_store_url.as_str(), "" | "k8s://") {
            problems.push(format!(
                "config_store_url: {:?} is not supported; policies come from where Mixer's \
                 configuration comes from (leave it out, or write k8s://)",
                params.config_store_url
            ));
        }
        for instance in candidate.instances {
            for field in ["action.namespace", "action.service"] {
                if instance.field(field).is_none() {
                    problems.push(format!("{} has no {field}", instance.name));
                }
            }
        }
        problems
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let params = params::parse::<Params>(candidate.params).map_err(BuildError)?;
        Ok(Handler::new().with_check(Arc::new(Judge {
            view: self.0.clone(),
            cache_duration: params.cache_duration,
            would_deny: env.counter("permissive_denied"),
            would_allow: env.counter("permissive_allowed"),
        })))
    }
}

struct Judge {
    view: PolicyView,
    cache_duration: Duration,
    /// Requests allowed only because enforcement is permissive.
    would_deny: Counter,
    /// Requests denied that a permissive binding would allow.
    would_allow: Counter,
}

impl CheckHandler for Judge {
    fn check<'a>(
        &'a self,
        instance: CheckInstance,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<CheckResult, HandlerError>> {
        async move {
            let CheckInstance::Authorization(instance) = instance else {
                return Err(HandlerError::invalid("rbac takes authorization only"));
            };
            Ok(CheckResult {
                status: self.judge(&instance),
                valid_duration: Some(self.cache_duration),
                valid_use_count: Some(-1), // a change of the policies ends it
            })
        }
        .boxed()
    }
}

impl Judge {
    fn judge(&self, request: &Authorization) -> Status {
        let denied = || Status::new(Code::PermissionDenied, "RBAC: permission denied.");
        let action = &request.action;
        if action.namespace.is_empty() || action.service.is_empty() {
            return Status::new(
                Code::PermissionDenied,
                "RBAC: the request has no service or namespace.",
            );
        }
        let policies = self.view.policies();
        if !policies.is_enforced(&action.namespace, &action.service) {
            return Status::ok();
        }
        let permitted = policies.permitted(request);
        match (
            policies.is_permissive(),
            permitted.enforced,
            permitted.permissive,
        ) {
            (_, Some(by), _) => {
                tracing::debug!(role = by, service = %action.service, "permitted");
                Status::ok()
            }
            (true, None, by) => {
                if by.is_none() {
                    self.would_deny.inc();
                }
                tracing::debug!(role = by, service = %action.service, "permissive: would be denied");
                Status::ok()
            }
            (false, None, Some(by)) => {
                self.would_allow.inc();
                tracing::debug!(role = by, service = %action.service, "permissive: would be permitted");
                denied()
            }
            (false, None, None) => denied(),
        }
    }
}
