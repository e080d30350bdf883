//! Policies evaluated here, by `regorus`.

use std::{
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use regorus::{Engine, utils::limits::ExecutionTimerConfig};
use serde_json::Value as Json;
use tokio::{sync::Semaphore, time::Instant};

/// Longest evaluation. A policy that needs more is a mistake or an attack on it.
const LIMIT: Duration = Duration::from_millis(250);
/// Steps between looks at the clock.
const STEPS: NonZeroU32 = NonZeroU32::new(128).expect("it is not zero");

/// Compiled policies.
pub(super) struct Embedded {
    rule: String,
    template: Engine,
    /// Evaluations use the processor only: more of them than processors only wait for each other.
    running: Arc<Semaphore>,
    /// Engines that have been used and are not now.
    idle: Arc<Mutex<Vec<Engine>>>,
}

impl Embedded {
    pub(super) fn new(policies: &[String], rule: &str) -> Result<Self, String> {
        let mut engine = Engine::new();
        // Istio's policies are of OPA's first syntax; those of the second say `import rego.v1`.
        engine.set_rego_v0(true);
        engine.set_gather_prints(true); // and not on standard error
        engine.set_execution_timer_config(ExecutionTimerConfig {
            limit: LIMIT,
            check_interval: STEPS,
        });
        for (i, policy) in policies.iter().enumerate() {
            engine
                .add_policy(format!("policy[{i}]"), policy.clone())
                .map_err(|e| format!("policy[{i}]: {e}"))?;
        }
        let mut probe = engine.clone();
        probe.set_input(regorus::Value::new_object());
        // Whether the rule is there at all; that it fails without an input is no mistake.
        let name: std::sync::Arc<str> = rule.into();
        if let Err(error) = probe.compile_with_entrypoint(&name) {
            return Err(format!("policy: {rule} cannot be asked: {error}"));
        }
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            rule: rule.to_owned(),
            template: engine,
            running: Arc::new(Semaphore::new(processors)),
            idle: Arc::default(),
        })
    }

    /// The policy's answer; `None`: undefined.
    pub(super) async fn ask(&self, input: Json, deadline: Instant) -> Result<Option<Json>, String> {
        let waiting = Arc::clone(&self.running).acquire_owned();
        let slot = tokio::time::timeout_at(deadline, waiting)
            .await
            .map_err(|_| "the policy has no time left: others are evaluated".to_owned())?
            .map_err(|_| "the handler is closed".to_owned())?;
        let rule = self.rule.clone();
        let idle = Arc::clone(&self.idle);
        let reused = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut engine = reused.unwrap_or_else(|| self.template.clone());
        // Off the threads that serve requests: it may take as long as LIMIT.
        let work = tokio::task::spawn_blocking(move || {
            engine.set_input(regorus::Value::from(input));
            let answer = engine.eval_rule(rule);
            let printed = engine.take_prints().unwrap_or_default();
            for line in printed {
                tracing::debug!(line, "a policy prints");
            }
            let answer = match answer {
                Ok(regorus::Value::Undefined) => Ok(None),
                Ok(value) => serde_json::to_value(&value)
                    .map(Some)
                    .map_err(|e| e.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if answer.is_ok() {
                idle.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(engine);
            }
            drop(slot);
            answer
        });
        work.await
            .unwrap_or_else(|panicked| Err(panicked.to_string()))
            .map_err(|e| format!("the policy fails: {e}"))
    }
}
