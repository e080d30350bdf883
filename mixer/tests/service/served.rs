//! An adapter that the SDK serves, called by Mixer: every variety of template, with sessions and without, and what
//! becomes of one that does wrong.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, CheckHandler, CheckOutputHandler, CheckResult, Code, Env,
    Handler, HandlerError, Info, Output, QuotaArgs, QuotaHandler, QuotaResult, ReportHandler,
    Status, Value,
    instance::{CheckInstance, CheckOutputInstance, FieldValue, QuotaInstance, ReportInstance},
    params, serve, template, value,
};
use serde::Deserialize;
use tokio::{net::TcpListener, sync::mpsc};

use crate::support::{Mesh, map, seconds, text, told};

/// Takes a bit of everything, and tells what it got.
struct Desk(mpsc::Sender<String>);

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Params {
    allowed: Vec<String>,
    limit: i64,
}

impl Adapter for Desk {
    fn info(&self) -> Info {
        Info {
            name: "desk",
            description: "takes: everything",
            templates: const {
                &[
                    &template::LISTENTRY,
                    &template::KEYVAL,
                    &template::QUOTA,
                    &template::METRIC,
                    &template::EDGE,
                ]
            },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        match params::parse::<Params>(candidate.params) {
            Err(problem) => vec![problem],
            Ok(params) if params.limit < 0 => vec![format!("limit: {} is negative", params.limit)],
            Ok(_) => Vec::new(),
        }
    }

    fn build(&self, candidate: &Candidate<'_>, _env: Env) -> Result<Handler, BuildError> {
        let params = params::parse::<Params>(candidate.params).map_err(BuildError)?;
        for instance in candidate.instances {
            let fields = instance.fields.iter();
            let fields: Vec<_> = fields.map(|(path, ty)| format!("{path}={ty}")).collect();
            let line = format!("{} {}", instance.name, fields.join(","));
            self.0.try_send(line).unwrap();
        }
        let work = Arc::new(Work {
            left: params.limit.into(),
            params,
            heard: self.0.clone(),
        });
        Ok(Handler::new()
            .with_check(work.clone())
            .with_check_output(work.clone())
            .with_quota(work.clone())
            .with_report(work))
    }
}

struct Work {
    params: Params,
    left: std::sync::atomic::AtomicI64,
    heard: mpsc::Sender<String>,
}

impl CheckHandler for Work {
    fn check<'a>(
        &'a self,
        instance: CheckInstance,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<CheckResult, HandlerError>> {
        async move {
            let CheckInstance::ListEntry(entry) = instance else {
                return Err(HandlerError::invalid("only listentry is taken"));
            };
            let value = entry.value.as_ref().map(value::text).unwrap_or_default();
            match &*value {
                "panic" => panic!("as told"),
                "hang" => std::future::pending().await,
                "fail" => return Err(HandlerError::unavailable("the desk is closed")),
                _ => {}
            }
            let status = match self.params.allowed.iter().any(|allowed| *allowed == value) {
                true => Status::ok(),
                false => Status::new(Code::PermissionDenied, format!("{value} is not allowed")),
            };
            Ok(CheckResult {
                status,
                valid_duration: Some(Duration::from_secs(5)),
                valid_use_count: Some(7),
            })
        }
        .boxed()
    }
}

impl CheckOutputHandler for Work {
    fn check<'a>(
        &'a self,
        instance: CheckOutputInstance,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<(CheckResult, Output), HandlerError>> {
        async move {
            let CheckOutputInstance::KeyVal(entry) = instance else {
                return Err(HandlerError::invalid("only keyval is taken"));
            };
            let result = CheckResult {
                status: Status::ok(),
                valid_duration: None,
                valid_use_count: None,
            };
            let found = value::string(&format!("<{}>", entry.key.as_str()));
            Ok((result, vec![("value", found)]))
        }
        .boxed()
    }
}

impl QuotaHandler for Work {
    fn quota<'a>(
        &'a self,
        instance: QuotaInstance,
        args: &'a QuotaArgs,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<QuotaResult, HandlerError>> {
        use std::sync::atomic::Ordering::SeqCst;
        async move {
            assert_eq!(instance.dimensions.len(), 1);
            let grant = |left: i64| args.amount.min(left);
            let took = self
                .left
                .fetch_update(SeqCst, SeqCst, |left| Some(left - grant(left)));
            Ok(QuotaResult {
                status: Status::ok(),
                valid_duration: Some(Duration::from_secs(3)),
                granted: grant(took.unwrap()),
                window: None,
            })
        }
        .boxed()
    }
}

impl ReportHandler for Work {
    fn report<'a>(
        &'a self,
        batch: Vec<ReportInstance>,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        let told = |fields: &[(Arc<str>, Value)]| {
            let one = |(name, value): &(Arc<str>, Value)| format!("{name}={}", value::text(value));
            fields.iter().map(one).collect::<Vec<_>>().join(",")
        };
        async move {
            for instance in batch {
                let line = match instance {
                    ReportInstance::Metric(m) => {
                        let size = m.value.as_ref().map(value::text).unwrap_or_default();
                        format!("metric {size} {}", told(&m.dimensions))
                    }
                    ReportInstance::Custom(edge) => {
                        let one = |(name, value): &(&'static str, FieldValue)| match value {
                            FieldValue::One(value) => (Arc::from(*name), value.clone()),
                            other => panic!("{name}: {other:?}"),
                        };
                        let mut fields: Vec<(Arc<str>, Value)> =
                            edge.fields.0.iter().map(one).collect();
                        fields.retain(|(_, value)| !value::text(value).is_empty());
                        fields.sort_by(|a, b| a.0.cmp(&b.0));
                        format!("{} {}", edge.template.name, told(&fields))
                    }
                    other => panic!("{other:?}"),
                };
                self.heard.try_send(line).unwrap();
            }
            Ok(())
        }
        .boxed()
    }
}

const RULES: &str = r#"
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: who, namespace: istio-system }
spec: { template: listentry, params: { value: 'request.headers["user"] | "nobody"' } }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: from, namespace: istio-system }
spec: { template: listentry, params: { value: 'source.ip | ip("10.0.0.1")' } }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: group, namespace: istio-system }
spec: { template: keyval, params: { key: 'request.headers["user"] | "nobody"' } }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: rq, namespace: istio-system }
spec: { template: quota, params: { dimensions: { user: 'request.headers["user"] | "nobody"' } } }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: size, namespace: istio-system }
spec: { template: metric, params: { value: response.size | 0, dimensions: { code: 'response.code | 0' } } }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: call, namespace: istio-system }
spec:
  template: edge
  params:
    timestamp: timestamp("2026-01-02T03:04:05Z")
    sourceWorkloadNamespace: '"one"'
    destinationUid: '"five"'
    destinationServiceName: '"six"'
    contextProtocol: '"http"'
    apiProtocol: '"grpc"'
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: everything, namespace: istio-system }
spec:
  match: (request.path | "") != "/from"
  actions:
  - { handler: desk, instances: [ who, rq, size, call ] }
  - { handler: desk, instances: [ group ], name: found }
  requestHeaderOperations:
  - { name: user-group, values: [ found.output.value ] }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: from, namespace: istio-system }
spec:
  match: (request.path | "") == "/from"
  actions: [ { handler: desk, instances: [ from ] } ]
"#;

/// A mesh whose rules ask a desk that is served, and what the desk hears.
async fn mesh(json: &str, has_sessions: bool) -> (Mesh, mpsc::Receiver<String>) {
    let (heard, lines) = mpsc::channel(64);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let desk = Arc::new(Desk(heard));
    let mut rules = serve::describe::yaml(desk.info(), &address, "istio-system");
    tokio::spawn(serve::serve(desk, listener, std::future::pending()));
    rules = rules.replace("json: '{}'", &format!("json: '{json}'"));
    if !has_sessions {
        rules = rules.replace("sessionBased: true", "sessionBased: false");
    }
    let mesh = Mesh::start(&[("rules.yaml", &format!("{rules}{RULES}"))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    (mesh, lines)
}

fn user(name: &str) -> Vec<(&'static str, Value)> {
    vec![("request.headers", map(&[("user", name)]))]
}

async fn every_variety(has_sessions: bool) {
    let json = r#"{"allowed": ["ann", "10.1.2.3"], "limit": 5}"#;
    let (mut mesh, mut heard) = mesh(json, has_sessions).await;
    let answer = mesh.check_with(&user("ann"), &[("rq", 3, true)], "a").await;
    let verdict = answer.precondition.unwrap();
    assert_eq!(told(&verdict), "OK:");
    let directive = verdict.route_directive.unwrap();
    let header = &directive.request_header_operations[0];
    assert_eq!((&*header.name, &*header.value), ("user-group", "<ann>"));
    let quota = &answer.quotas["rq"];
    assert_eq!(quota.granted_amount, 3);
    assert_eq!(seconds(quota.valid_duration.as_ref()), 3.0);
    // The same handler, whose quota is nearly spent.
    let answer = mesh.check_with(&user("ann"), &[("rq", 3, true)], "b").await;
    assert_eq!(answer.quotas["rq"].granted_amount, 2);

    let denied = mesh.check(&user("bob")).await;
    assert_eq!(
        told(&denied),
        "PERMISSION_DENIED:desk.handler.istio-system:bob is not allowed"
    );
    let from = [
        ("request.path", text("/from")),
        ("source.ip", value::address([10, 1, 2, 3].into())),
    ];
    let verdict = mesh.check(&from).await;
    assert_eq!(told(&verdict), "OK:");
    assert_eq!(verdict.valid_use_count, 7);
    assert_eq!(
        seconds(verdict.valid_duration.as_ref()),
        1.0,
        "the most there is"
    );

    let mut set = user("ann");
    set.push(("response.size", Value::Int64(70)));
    set.push(("response.code", Value::Int64(200)));
    mesh.report(&[&set]).await;
    let mut lines = Vec::new();
    let wanted = if has_sessions { 8 } else { 2 };
    while lines.len() < wanted {
        let line = tokio::time::timeout(Duration::from_secs(10), heard.recv()).await;
        lines.push(line.expect("the desk hears of it").unwrap());
    }
    lines.sort();
    let mut want = vec![
        "edge api_protocol=grpc,context_protocol=http,destination_service_name=six,destination_uid=five,\
         source_workload_namespace=one,timestamp=2026-01-02T03:04:05Z",
        "metric 70 code=200",
    ];
    if has_sessions {
        want.extend([
            "call.instance.istio-system ",
            "from.instance.istio-system value=IP_ADDRESS",
            "group.instance.istio-system ",
            "rq.instance.istio-system dimensions.user=STRING",
            "size.instance.istio-system dimensions.code=INT64,value=INT64",
            "who.instance.istio-system value=STRING",
        ]);
        want.sort_unstable();
    }
    assert_eq!(lines, want);
}

#[tokio::test]
async fn every_variety_with_sessions() {
    every_variety(true).await;
}

#[tokio::test]
async fn every_variety_with_parameters_in_each_call() {
    every_variety(false).await;
}

#[tokio::test]
async fn what_an_adapter_does_wrong_is_the_calls_own() {
    let (mut mesh, _heard) = mesh(r#"{"allowed": ["ann"], "limit": 1}"#, true).await;
    for (name, want) in [
        ("panic", "the adapter panicked"),
        ("fail", "the desk is closed"),
        ("hang", ""),
    ] {
        let verdict = told(&mesh.check(&user(name)).await);
        assert!(
            !verdict.starts_with("OK") && verdict.contains(want),
            "{name}: {verdict}"
        );
        assert_eq!(told(&mesh.check(&user("ann")).await), "OK:", "after {name}");
    }
}

#[tokio::test]
async fn parameters_that_the_adapter_refuses_fail_the_rule_and_say_why() {
    for (json, want) in [
        (r#"{"limit": -1}"#, "limit: -1 is negative"),
        (r#"{"alowed": []}"#, "alowed"),
        ("{", "json"),
    ] {
        for has_sessions in [true, false] {
            let (mut mesh, _heard) = mesh(json, has_sessions).await;
            let verdict = told(&mesh.check(&user("ann")).await);
            assert!(
                !verdict.starts_with("OK") && verdict.contains(want),
                "{json}: {verdict}"
            );
        }
    }
}
