//! What one adapter does wrong is felt by its own rules only.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, CheckHandler, CheckResult, Env, GenerateHandler, Handler,
    HandlerError, Info, Output, ReportHandler, Status,
    instance::{CheckInstance, GenerateInstance, ReportInstance},
    template,
};
use tokio::time::Instant;

use crate::support::{Mesh, get, seconds, text, told};

/// Fails in the way its parameters name.
struct Faulty;

impl Adapter for Faulty {
    fn info(&self) -> Info {
        Info {
            name: "faulty",
            description: "fails",
            templates: const {
                &[
                    &template::CHECKNOTHING,
                    &template::REPORTNOTHING,
                    &template::KUBERNETES,
                ]
            },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        assert_ne!(candidate.params["how"], "in validate");
        Vec::new()
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let how = candidate.params["how"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        assert_ne!(how, "in build");
        env.spawn(async { panic!("a daemon of mine") })
            .map_err(|e| BuildError(e.to_string()))?;
        let handler = Arc::new(How(how));
        Ok(Handler::new()
            .with_check(handler.clone())
            .with_generate(handler.clone())
            .with_report(handler))
    }
}

struct How(String);

impl How {
    async fn fail(&self) -> Result<(), HandlerError> {
        match self.0.as_str() {
            "panic" => panic!("as told"),
            "stall" => std::future::pending().await,
            "error" => Err(HandlerError::invalid("as told")),
            _ => Ok(()),
        }
    }
}

impl CheckHandler for How {
    fn check<'a>(
        &'a self,
        _instance: CheckInstance,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<CheckResult, HandlerError>> {
        assert_ne!(self.0, "panic at once");
        async {
            self.fail().await?;
            Ok(CheckResult {
                status: Status::ok(),
                valid_duration: None,
                valid_use_count: None,
            })
        }
        .boxed()
    }
}

impl ReportHandler for How {
    fn report<'a>(
        &'a self,
        _batch: Vec<ReportInstance>,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        self.fail().boxed()
    }
}

impl GenerateHandler for How {
    fn generate<'a>(
        &'a self,
        _instance: GenerateInstance,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Output, HandlerError>> {
        async {
            self.fail().await?;
            Ok(Output::new())
        }
        .boxed()
    }
}

/// A rule for requests to `/HOW` in namespace istio-system.
fn rule(how: &str, fail_mode: &str) -> String {
    let name = how.replace(' ', "-");
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: {name}-{fail_mode}, namespace: istio-system }}
spec: {{ compiledAdapter: faulty, params: {{ how: {how} }} }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata:
  name: {name}-{fail_mode}
  namespace: istio-system
  annotations: {{ policy.istio.io/fail-mode: {fail_mode} }}
spec:
  match: (request.path | "") == "/{name}-{fail_mode}"
  actions: [ {{ handler: {name}-{fail_mode}, instances: [ nothing.checknothing ] }} ]
---
"#
    )
}

const NOTHING: &str = "
apiVersion: config.istio.io/v1alpha2
kind: checknothing
metadata: { name: nothing, namespace: istio-system }
";

#[tokio::test]
async fn panics_stalls_and_errors_cost_their_own_rules_only() {
    let mut rules = String::new();
    for how in ["panic", "panic at once", "stall", "error", "nothing"] {
        rules += &rule(how, "closed");
        rules += &rule(how, "open");
    }
    rules += NOTHING;
    let mut mesh = Mesh::start_with(&[("rules.yaml", &rules)], |i| i.with(Arc::new(Faulty))).await;
    assert_eq!(mesh.refused(), [""; 0]);
    for (path, want) in [
        (
            "panic-closed",
            "UNAVAILABLE:panic-closed.handler.istio-system:the handler panicked",
        ),
        ("panic-open", "OK:"),
        (
            "panic-at-once-closed",
            "UNAVAILABLE:panic-at-once-closed.handler.istio-system:the handler panicked",
        ),
        (
            "stall-closed",
            "UNAVAILABLE:stall-closed.handler.istio-system:the handler did not answer in time",
        ),
        ("stall-open", "OK:"),
        (
            "error-closed",
            "INVALID_ARGUMENT:error-closed.handler.istio-system:as told",
        ),
        ("error-open", "OK:"),
        ("nothing-closed", "OK:"),
        ("elsewhere", "OK:"),
    ] {
        let begun = Instant::now();
        let attributes = [("request.path", text(&format!("/{path}")))];
        let deadline = [("grpc-timeout", "500m")];
        let answer = mesh
            .call(&attributes, &[], "", &deadline)
            .await
            .into_inner();
        let answer = answer.precondition.unwrap();
        assert_eq!(told(&answer), want);
        assert!(
            begun.elapsed() < Duration::from_millis(500),
            "{path}: {:?}",
            begun.elapsed()
        );
        let is_cacheable = seconds(answer.valid_duration.as_ref()) > 0.0;
        assert_eq!(is_cacheable, path == "elsewhere", "{path}");
    }
    let own = get(mesh.running.admin_address, "/metrics").await;
    for (handler, outcome) in [
        ("panic-closed", "Panicked"),
        ("stall-open", "Late"),
        ("error-open", "Failed"),
    ] {
        let line = format!(
            "mixer_dispatches_total{{handler=\"{handler}.handler.istio-system\",adapter=\"faulty\",template=\"checknothing\",outcome=\"{outcome}\"}} 1"
        );
        assert!(own.contains(&line), "{line}\n{own}");
    }
}

#[tokio::test]
async fn a_failing_generator_denies_where_a_rule_may_have_needed_it() {
    let rules = format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: error, namespace: istio-system }}
spec: {{ compiledAdapter: faulty, params: {{ how: error }} }}
---
apiVersion: config.istio.io/v1alpha2
kind: kubernetes
metadata: {{ name: who, namespace: istio-system }}
spec:
  attribute_bindings: {{ source.labels: $out.source_labels | emptyStringMap() }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: who, namespace: istio-system }}
spec: {{ actions: [ {{ handler: error, instances: [ who.kubernetes ] }} ] }}
---{}
---{}"#,
        rule("nothing", "closed").replace(
            "(request.path | \"\") == \"/nothing-closed\"",
            "(source.labels[\"app\"] | \"\") == \"a\" && match(destination.service.name, \"pay*\")",
        ),
        NOTHING
    );
    let mut mesh = Mesh::start_with(&[("rules.yaml", &rules)], |i| i.with(Arc::new(Faulty))).await;
    assert_eq!(mesh.refused(), [""; 0]);
    for (service, want) in [
        ("payment", "UNAVAILABLE:error.handler.istio-system:as told"),
        ("shop", "OK:"),
    ] {
        let attributes = [("destination.service.name", text(service))];
        let answer = mesh.check(&attributes).await;
        assert!(told(&answer).starts_with(want), "{service}: {answer:?}");
        // Without what the generator would have told, nothing is said of the next request.
        assert_eq!(answer.valid_use_count, 0, "{service}");
    }
}

#[tokio::test]
async fn a_failing_report_costs_no_other_handler() {
    let rules = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: bad, namespace: istio-system }
spec: { compiledAdapter: faulty, params: { how: panic } }
---
apiVersion: config.istio.io/v1alpha2
kind: reportnothing
metadata: { name: nothing, namespace: istio-system }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: a, namespace: istio-system }
spec: { actions: [ { handler: bad, instances: [ nothing.reportnothing ] } ] }
---
apiVersion: config.istio.io/v1alpha2
kind: stdio
metadata: { name: log, namespace: istio-system }
---
apiVersion: config.istio.io/v1alpha2
kind: logentry
metadata: { name: entry, namespace: istio-system }
spec: { variables: { path: request.path | "" } }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: b, namespace: istio-system }
spec: { actions: [ { handler: log.stdio, instances: [ entry.logentry ] } ] }
"#;
    let mut mesh = Mesh::start_with(&[("rules.yaml", rules)], |i| i.with(Arc::new(Faulty))).await;
    assert_eq!(mesh.refused(), [""; 0]);
    mesh.report(&[&[("request.path", text("/a"))], &[]]).await;
    assert_eq!(mesh.stdout.0.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn an_adapter_that_panics_while_it_builds_is_a_refused_handler() {
    for how in ["in validate", "in build"] {
        let rules = format!("{}{NOTHING}", rule(how, "closed"));
        let mesh = Mesh::start_with(&[("rules.yaml", &rules)], |i| i.with(Arc::new(Faulty))).await;
        let refused = mesh.refused();
        assert!(
            refused
                .iter()
                .any(|p| p.contains("adapter faulty panicked")),
            "{refused:?}"
        );
        assert!(
            refused
                .iter()
                .any(|p| p.contains("cannot be built") || p.contains("or it is refused")),
            "{refused:?}"
        );
    }
}

#[tokio::test]
async fn matches_and_adapters_fail_each_in_its_own_mode() {
    let with = |path: &str, annotations: &str, how: &str, condition: &str| {
        rule(how, "closed")
            .replace(&format!("name: {how}-closed"), &format!("name: {path}"))
            .replace(
                &format!("handler: {how}-closed"),
                &format!("handler: {path}"),
            )
            .replace("policy.istio.io/fail-mode: closed", annotations)
            .replace(
                &format!("(request.path | \"\") == \"/{how}-closed\""),
                &format!("request.path == \"/{path}\"{condition}"),
            )
    };
    let absent = " && source.namespace == \"a\"";
    let (open_match, open_adapter) = (
        "policy.istio.io/match-fail-mode: open",
        "policy.istio.io/adapter-fail-mode: open",
    );
    let back = "policy.istio.io/fail-mode: open, policy.istio.io/adapter-fail-mode: closed";
    let rules = [
        with("a", open_match, "error", ""),
        with("b", open_match, "error", absent),
        with("c", open_adapter, "error", ""),
        with("d", open_adapter, "error", absent),
        with("e", back, "error", ""),
        with("f", back, "error", absent),
        NOTHING.to_owned(),
    ]
    .concat();
    let mut mesh = Mesh::start_with(&[("rules.yaml", &rules)], |i| i.with(Arc::new(Faulty))).await;
    assert_eq!(mesh.refused(), [""; 0]);
    for (path, want) in [
        ("a", "INVALID_ARGUMENT:a.handler.istio-system:as told"),
        ("b", "OK:"),
        ("c", "OK:"),
        ("d", "PERMISSION_DENIED:d.rule.istio-system:"),
        ("e", "INVALID_ARGUMENT:e.handler.istio-system:as told"),
        ("f", "OK:"),
    ] {
        let answer = mesh
            .check(&[("request.path", text(&format!("/{path}")))])
            .await;
        assert!(told(&answer).starts_with(want), "{path}: {}", told(&answer));
    }
    // A mode must be one of the two.
    let wrong = rules.replace(open_match, "policy.istio.io/match-fail-mode: ajar");
    mesh.apply("rules.yaml", Some(&wrong)).await;
    let refused = mesh.refused();
    assert!(
        refused
            .iter()
            .any(|p| p.contains("match-fail-mode is \"ajar\", not open or closed")),
        "{refused:?}"
    );
}
