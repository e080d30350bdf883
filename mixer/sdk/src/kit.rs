//! Runs an adapter on YAML cases, without a server.
//!
//! ```yaml
//! - note: two in five seconds
//!   params: { quotas: [{ name: rq.quota.ns, maxAmount: 2, validDuration: 5s }] }
//!   instances:
//!   - { name: rq.quota.ns, template: quota, types: { dimensions.source: STRING } }
//!   steps:
//!   - quota: rq.quota.ns
//!     fields: { dimensions: { source: a } }
//!     amount: 2
//!     want: { granted: 2 }
//!   - advance: 5s
//!   - check: other.listentry.ns
//!     fields: { value: { ip: 10.0.0.1 } }
//!     want: { code: OK }
//! - note: no such limit
//!   instances: [{ name: x.quota.ns, template: quota }]
//!   want_problems: [has no limit]
//! ```
//!
//! Values are YAML's strings, integers, numbers and booleans, or `{ip: …}`, `{duration: …}`, `{timestamp: …}`,
//! `{map: {…}}`. Time stands still but for `advance`. A step's `want` has any of `code`, `message`,
//! `valid_duration`, `valid_use_count`, `granted`, `remaining`, `reset`, `outputs`, `error`; what is not named is not compared.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use lateen_engine::{Value, ValueType};
use serde::Deserialize;
use serde_json::Value as Json;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::{
    adapter::{Adapter, Candidate, InstanceType},
    clock::Clock,
    env::Env,
    handler::{Call, CheckResult, Handler, HandlerError, Output, QuotaArgs},
    instance::{
        CheckInstance, CheckOutputInstance, FieldValue, Fields, GenerateInstance, QuotaInstance,
        ReportInstance,
    },
    params, template,
    template::{FieldKind, Template, Variety},
    value,
    workload::{NoWorkloads, Workloads},
};

/// A list of cases that is not understood.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadCases(String);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    note: String,
    #[serde(default)]
    params: Json,
    #[serde(default)]
    instances: Vec<Declared>,
    #[serde(default)]
    want_problems: Vec<String>,
    #[serde(default)]
    steps: Vec<Step>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Declared {
    name: String,
    template: String,
    #[serde(default)]
    types: BTreeMap<String, ValueType>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Step {
    check: Option<String>,
    quota: Option<String>,
    report: Option<String>,
    generate: Option<String>,
    advance: Option<String>,
    fields: Json,
    amount: Option<i64>,
    best_effort: bool,
    dedup_id: String,
    times: Option<u32>,
    want: Option<Want>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Want {
    code: Option<String>,
    message: Option<String>,
    valid_duration: Option<String>,
    valid_use_count: Option<i32>,
    granted: Option<i64>,
    remaining: Option<i64>,
    reset: Option<String>,
    outputs: Option<BTreeMap<String, Json>>,
    error: Option<String>,
}

impl Want {
    fn of_check(result: CheckResult) -> Self {
        Self {
            code: Some(result.status.code.name().into()),
            message: Some(result.status.message),
            valid_duration: result.valid_duration.map(|d| format!("{d:?}")),
            valid_use_count: result.valid_use_count,
            ..Self::default()
        }
    }
}

fn outputs(output: &Output) -> BTreeMap<String, Json> {
    output
        .iter()
        .map(|(name, v)| ((*name).to_owned(), Json::String(v.to_string())))
        .collect()
}

/// Runs cases against an adapter.
pub struct Kit {
    adapter: Arc<dyn Adapter>,
    workloads: Arc<dyn Workloads>,
}

impl std::fmt::Debug for Kit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Kit")
            .field(&self.adapter.info().name)
            .finish()
    }
}

impl Kit {
    /// Cases for `adapter`, in a world without workloads.
    pub fn new(adapter: Arc<dyn Adapter>) -> Self {
        Self {
            adapter,
            workloads: Arc::new(NoWorkloads),
        }
    }

    /// With these workloads.
    #[must_use]
    pub fn with_workloads(mut self, workloads: Arc<dyn Workloads>) -> Self {
        self.workloads = workloads;
        self
    }

    /// Runs all cases; answers with what went differently, a sentence each.
    ///
    /// # Errors
    /// When `yaml` is no list of cases.
    pub async fn run(&self, yaml: &str) -> Result<Vec<String>, BadCases> {
        let cases: Vec<Case> = serde_saphyr::from_str(yaml).map_err(|e| BadCases(e.to_string()))?;
        let mut differences = Vec::new();
        for case in &cases {
            if let Err(difference) = self.case(case).await {
                differences.push(format!("{}: {difference}", case.note));
            }
        }
        Ok(differences)
    }

    async fn case(&self, case: &Case) -> Result<(), String> {
        let instances = case
            .instances
            .iter()
            .map(declared)
            .collect::<Result<Vec<_>, _>>()?;
        let candidate = Candidate {
            name: "h.handler.kit",
            params: &case.params,
            instances: &instances,
        };
        let problems = self.adapter.validate(&candidate);
        if !case.want_problems.is_empty() || !problems.is_empty() {
            let are_told = case.want_problems.len() == problems.len()
                && case
                    .want_problems
                    .iter()
                    .all(|w| problems.iter().any(|p| p.contains(w)));
            return if are_told {
                Ok(())
            } else {
                Err(format!(
                    "problems are {problems:?}, not {:?}",
                    case.want_problems
                ))
            };
        }
        let clock = Clock::manual();
        let (env, _closer) = Env::new(
            Arc::from(candidate.name),
            clock.clone(),
            Arc::clone(&self.workloads),
            TaskTracker::new(),
        );
        let handler = self
            .adapter
            .build(&candidate, env)
            .map_err(|e| e.to_string())?;
        for (i, step) in case.steps.iter().enumerate() {
            for _ in 0..step.times.unwrap_or(1) {
                run_step(&handler, &clock, case, step)
                    .await
                    .map_err(|difference| format!("step {}: {difference}", i + 1))?;
            }
        }
        Ok(())
    }
}

fn declared(raw: &Declared) -> Result<InstanceType, String> {
    let template = template::find(&raw.template)
        .ok_or_else(|| format!("there is no template {}", raw.template))?;
    Ok(InstanceType {
        name: Arc::from(raw.name.as_str()),
        template: template.name,
        fields: raw
            .types
            .iter()
            .map(|(path, t)| (Arc::from(path.as_str()), *t))
            .collect(),
    })
}

async fn run_step(
    handler: &Handler,
    clock: &Clock,
    case: &Case,
    step: &Step,
) -> Result<(), String> {
    if let Some(by) = &step.advance {
        let by = params::parse_duration(by).ok_or_else(|| format!("{by} is no duration"))?;
        clock.advance(by);
        return Ok(());
    }
    let name = [&step.check, &step.quota, &step.report, &step.generate]
        .into_iter()
        .find_map(|n| n.as_deref())
        .ok_or("it says neither check, quota, report, generate nor advance")?;
    let template = case
        .instances
        .iter()
        .find(|i| i.name == name)
        .and_then(|i| template::find(&i.template))
        .ok_or_else(|| format!("{name} is not among the instances"))?;
    let fields = fields(template, &step.fields)?;
    let name: Arc<str> = Arc::from(name);
    let call = Call {
        deadline: Instant::now() + Duration::from_secs(5),
    };
    let got = if step.check.is_some() && template.variety == Variety::CheckWithOutput {
        let instance =
            CheckOutputInstance::new(template, name, fields).map_err(|e| e.to_string())?;
        let part = handler
            .check_output()
            .ok_or("the handler takes no checks with output")?;
        let answer = part.check(instance, &call).await;
        answer.map(|(r, output)| Want {
            outputs: Some(outputs(&output)),
            ..Want::of_check(r)
        })
    } else if step.check.is_some() {
        let instance = CheckInstance::new(template, name, fields).map_err(|e| e.to_string())?;
        let part = handler.check().ok_or("the handler takes no checks")?;
        part.check(instance, &call).await.map(Want::of_check)
    } else if step.quota.is_some() {
        let instance = QuotaInstance::new(template, name, fields).map_err(|e| e.to_string())?;
        let args = QuotaArgs {
            dedup_id: Arc::from(step.dedup_id.as_str()),
            amount: step.amount.unwrap_or(1),
            best_effort: step.best_effort,
        };
        let part = handler.quota().ok_or("the handler grants no quota")?;
        part.quota(instance, &args, &call).await.map(|r| Want {
            code: Some(r.status.code.name().into()),
            message: Some(r.status.message),
            valid_duration: r.valid_duration.map(|d| format!("{d:?}")),
            granted: Some(r.granted),
            remaining: r.window.map(|w| w.remaining),
            reset: r.window.map(|w| format!("{:?}", w.reset)),
            ..Want::default()
        })
    } else if step.report.is_some() {
        let instance = ReportInstance::new(template, name, fields).map_err(|e| e.to_string())?;
        let part = handler.report().ok_or("the handler takes no reports")?;
        part.report(vec![instance], &call)
            .await
            .map(|()| Want::default())
    } else {
        let instance = GenerateInstance::new(template, name, fields).map_err(|e| e.to_string())?;
        let part = handler
            .generate()
            .ok_or("the handler produces no attributes")?;
        part.generate(instance, &call).await.map(|output| Want {
            outputs: Some(outputs(&output)),
            ..Want::default()
        })
    };
    match &step.want {
        Some(want) => compare(want, got),
        None => got.map(|_| ()).map_err(|e| format!("it failed: {e}")),
    }
}

fn compare(want: &Want, got: Result<Want, HandlerError>) -> Result<(), String> {
    let got = match (got, &want.error) {
        (Err(error), Some(text)) if error.message.contains(text) => return Ok(()),
        (Err(error), _) => return Err(format!("it failed: {error}")),
        (Ok(_), Some(text)) => return Err(format!("it did not fail with \"{text}\"")),
        (Ok(got), None) => got,
    };
    fn same<T: PartialEq + std::fmt::Debug>(
        what: &str,
        want: Option<&T>,
        got: Option<&T>,
    ) -> Result<(), String> {
        match want {
            Some(want) if got != Some(want) => Err(format!("{what} is {got:?}, not {want:?}")),
            _ => Ok(()),
        }
    }
    same("code", want.code.as_ref(), got.code.as_ref())?;
    same("message", want.message.as_ref(), got.message.as_ref())?;
    same(
        "valid_duration",
        want.valid_duration.as_ref(),
        got.valid_duration.as_ref(),
    )?;
    same(
        "valid_use_count",
        want.valid_use_count.as_ref(),
        got.valid_use_count.as_ref(),
    )?;
    same("granted", want.granted.as_ref(), got.granted.as_ref())?;
    same("remaining", want.remaining.as_ref(), got.remaining.as_ref())?;
    same("reset", want.reset.as_ref(), got.reset.as_ref())?;
    let outputs = want.outputs.as_ref().map(|all| {
        all.iter()
            .map(|(k, v)| {
                (
                    k.clone(),
                    scalar(v).map_or(Json::Null, |v| v.to_string().into()),
                )
            })
            .collect::<BTreeMap<_, _>>()
    });
    same("outputs", outputs.as_ref(), got.outputs.as_ref())
}

fn fields(template: &'static Template, json: &Json) -> Result<Fields, String> {
    message(template.fields, json)
}

fn message(known: &'static [template::Field], json: &Json) -> Result<Fields, String> {
    let Json::Object(entries) = json else {
        return if json.is_null() {
            Ok(Fields::default())
        } else {
            Err("fields is no map".into())
        };
    };
    let mut fields = Fields::default();
    for (key, written) in entries {
        let field = known
            .iter()
            .find(|f| f.is_named(key))
            .ok_or_else(|| format!("there is no field {key}"))?;
        let value = match (&field.kind, written) {
            (FieldKind::Exact(_) | FieldKind::Any, v) => {
                FieldValue::One(scalar(v).ok_or_else(|| format!("{key}: {v} is no value"))?)
            }
            (FieldKind::Map, Json::Object(entries)) => FieldValue::Map(
                entries
                    .iter()
                    .map(|(k, v)| {
                        let value = scalar(v).ok_or_else(|| format!("{k}: {v} is no value"))?;
                        Ok((Arc::from(k.as_str()), value))
                    })
                    .collect::<Result<_, String>>()?,
            ),
            (FieldKind::Message(known), v) => FieldValue::Message(message(known, v)?),
            (FieldKind::Map, _) => return Err(format!("{key} is no map")),
        };
        fields.0.push((field.name, value));
    }
    Ok(fields)
}

fn scalar(json: &Json) -> Option<Value> {
    match json {
        Json::Bool(b) => Some(Value::Bool(*b)),
        Json::Number(n) => match n.as_i64() {
            Some(n) => Some(Value::Int64(n)),
            None => n.as_f64().map(Value::Double),
        },
        Json::String(text) => Some(value::string(text)),
        Json::Object(one) => {
            let (kind, v) = one.iter().next()?;
            match kind.as_str() {
                "ip" => Some(value::address(v.as_str()?.parse().ok()?)),
                "duration" => lateen_engine::parse_duration(v.as_str()?).map(Value::Duration),
                "timestamp" => lateen_engine::parse_timestamp(v.as_str()?)
                    .ok()
                    .map(Value::Timestamp),
                "map" => Some(value::string_map(
                    v.as_object()?
                        .iter()
                        .filter_map(|(k, v)| Some((k.as_str(), v.as_str()?))),
                )),
                _ => None,
            }
        }
        Json::Null | Json::Array(_) => None,
    }
}
