//! Looks a key up in a table and says what it found, for rules to put into headers: Istio's sample of a check
//! with output, as a part of Mixer.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, CheckOutputHandler, CheckResult, Code, Env, Handler,
    HandlerError, Info, Output, Status, instance::CheckOutputInstance, params, template, value,
};
use serde::Deserialize;

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct KeyVal;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    table: HashMap<String, String>,
    #[serde(alias = "valid_duration", deserialize_with = "params::duration")]
    valid_duration: Duration,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            table: HashMap::new(),
            valid_duration: Duration::from_secs(5), // as in Istio's sample
        }
    }
}

impl Adapter for KeyVal {
    fn info(&self) -> Info {
        Info {
            name: "keyval",
            description: "looks keys up in a table",
            templates: const { &[&template::KEYVAL] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        let mut problems: Vec<String> = params::parse::<Params>(candidate.params)
            .err()
            .into_iter()
            .collect();
        let keyless = candidate
            .instances
            .iter()
            .filter(|i| i.field("key").is_none());
        problems.extend(keyless.map(|i| format!("{} has no key to look up", i.name)));
        problems
    }

    fn build(&self, candidate: &Candidate<'_>, _env: Env) -> Result<Handler, BuildError> {
        let params = params::parse::<Params>(candidate.params).map_err(BuildError)?;
        Ok(Handler::new().with_check_output(Arc::new(Table(params))))
    }
}

struct Table(Params);

impl CheckOutputHandler for Table {
    fn check<'a>(
        &'a self,
        instance: CheckOutputInstance,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<(CheckResult, Output), HandlerError>> {
        async move {
            let CheckOutputInstance::KeyVal(instance) = instance else {
                return Err(HandlerError::invalid("keyval takes keyval only"));
            };
            let (status, output) = match self.0.table.get(instance.key.as_str()) {
                Some(found) => (Status::ok(), vec![("value", value::string(found))]),
                None => {
                    let message = format!("key {:?} is not in the table", instance.key.as_str());
                    (Status::new(Code::NotFound, message), Output::new())
                }
            };
            let result = CheckResult {
                status,
                valid_duration: Some(self.0.valid_duration),
                valid_use_count: Some(-1), // the table is all that counts
            };
            Ok((result, output))
        }
        .boxed()
    }
}
