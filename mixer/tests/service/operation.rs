//! Running it: overload, roles, readiness, the page, draining.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, CheckHandler, CheckResult, Env, Handler, HandlerError,
    Info, Status, instance::CheckInstance, template,
};
use lateen_protocols::istio::mixer::v1::ReportRequest;
use mixer::serve::Role;
use serde_json::Value as Json;
use tokio::{sync::Semaphore, time::Instant};
use tonic::Code;

use crate::support::{Mesh, args, client, compress, get, request, text, told};

/// Answers when it is let.
struct Gate(Arc<Semaphore>);

impl Adapter for Gate {
    fn info(&self) -> Info {
        Info {
            name: "gate",
            description: "waits",
            templates: const { &[&template::CHECKNOTHING] },
        }
    }

    fn validate(&self, _candidate: &Candidate<'_>) -> Vec<String> {
        Vec::new()
    }

    fn build(&self, _candidate: &Candidate<'_>, _env: Env) -> Result<Handler, BuildError> {
        Ok(Handler::new().with_check(Arc::new(Gate(Arc::clone(&self.0)))))
    }
}

impl CheckHandler for Gate {
    fn check<'a>(
        &'a self,
        _instance: CheckInstance,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<CheckResult, HandlerError>> {
        async {
            let permit = self.0.acquire().await;
            permit
                .map_err(|e| HandlerError::unavailable(e.to_string()))?
                .forget();
            Ok(CheckResult {
                status: Status::ok(),
                valid_duration: None,
                valid_use_count: None,
            })
        }
        .boxed()
    }
}

const RULES: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: gate, namespace: istio-system }
spec: { compiledAdapter: gate }
---
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: denier, namespace: istio-system }
spec: { compiledAdapter: denier, params: { status: { code: 7, message: "<b>no</b>" } } }
---
apiVersion: config.istio.io/v1alpha2
kind: checknothing
metadata: { name: nothing, namespace: istio-system }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: waits, namespace: istio-system }
spec:
  match: (request.path | "") == "/wait"
  actions: [ { handler: gate, instances: [ nothing.checknothing ] } ]
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: denies, namespace: istio-system }
spec:
  match: (request.path | "") == "/no"
  actions: [ { handler: denier, instances: [ nothing.checknothing ] } ]
"#;

async fn mesh(change: impl FnOnce(&mut mixer::Args)) -> (Mesh, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let adapter = Gate(Arc::clone(&gate));
    let mesh = Mesh::start_as(&[("rules.yaml", RULES)], change, |i| {
        i.with(Arc::new(adapter))
    })
    .await;
    assert_eq!(mesh.refused(), [""; 0]);
    (mesh, gate)
}

/// Looks until Mixer's own metrics have this line.
async fn counted(mesh: &Mesh, line: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let own = get(mesh.running.admin_address, "/metrics").await;
        if own.lines().any(|l| l == line) {
            return;
        }
        assert!(Instant::now() < deadline, "no {line}\n{own}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn beyond_its_limit_checks_are_refused_at_once_and_counted() {
    let (mut mesh, gate) = mesh(|args| args.max_checks = 2).await;
    let wait = [("request.path", text("/wait"))];
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let mut client = mesh.client.clone();
        let request = request(&wait, &[], "");
        waiting.spawn(async move { client.check(request).await });
    }
    counted(
        &mesh,
        r#"mixer_handler_calls{handler="gate.handler.istio-system",adapter="gate"} 2"#,
    )
    .await;
    let begun = Instant::now();
    let shed = mesh.client.check(request(&[], &[], "")).await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_millis(500));
    assert_eq!(
        (shed.code(), shed.message()),
        (
            Code::Unavailable,
            "mixer is overloaded: 2 checks are under way"
        )
    );
    counted(
        &mesh,
        r#"mixer_shed_total{method="Check",reason="TooMany"} 1"#,
    )
    .await;
    // Reports have a limit of their own, and the two are answered as if nothing had been.
    mesh.report(&[&[]]).await;
    gate.add_permits(2);
    while let Some(answer) = waiting.join_next().await {
        let answer = answer.unwrap().unwrap().into_inner();
        assert_eq!(answer.precondition.unwrap().status.unwrap().code, 0);
    }
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
}

#[tokio::test]
async fn a_deployment_does_what_its_role_says() {
    for (role, checks, reports) in [
        (Role::Check, true, false),
        (Role::Report, false, true),
        (Role::Both, true, true),
    ] {
        let (mut mesh, _) = mesh(|args| args.role = role).await;
        let check = mesh.client.check(request(&[], &[], "")).await;
        let report = mesh.client.report(ReportRequest {
            attributes: vec![compress(&[])],
            ..ReportRequest::default()
        });
        let report = report.await;
        assert_eq!(
            (check.is_ok(), report.is_ok()),
            (checks, reports),
            "{role:?}"
        );
        for refused in [check.err(), report.err()].into_iter().flatten() {
            assert_eq!(refused.code(), Code::Unimplemented);
            assert!(refused.message().contains("Server should name another"));
        }
    }
}

#[tokio::test]
async fn the_page_tells_what_is_in_force_and_what_was_decided() {
    let (mut mesh, _) = mesh(|_| ()).await;
    let denied = [
        ("request.path", text("/no")),
        ("source.principal", text("<script>alert(1)</script>")),
        ("destination.service.host", text("reviews")),
    ];
    for _ in 0..3 {
        mesh.check(&denied).await;
    }
    let admin = mesh.running.admin_address;
    let json: Json = serde_json::from_str(&get(admin, "/debug/mixer?format=json").await).unwrap();
    assert_eq!(json["generation"], mesh.generation().to_string());
    assert_eq!(json["role"], "both");
    assert_eq!(json["waitingFor"], serde_json::json!([]));
    let rule = &json["rules"][0];
    assert_eq!(rule["name"], "denies.rule.istio-system");
    assert_eq!(rule["handlers"][0], "denier.handler.istio-system");
    assert_eq!((&rule["matched"], &rule["denied"]), (&3.into(), &3.into()));
    let handler = &json["handlers"][0];
    assert_eq!(handler["name"], "denier.handler.istio-system");
    assert_eq!(
        (&handler["calls"], &handler["failures"]),
        (&3.into(), &0.into())
    );
    let verdicts = json["verdicts"].as_array().unwrap();
    assert_eq!(verdicts.len(), 3);
    assert_eq!(verdicts[0]["code"], "PERMISSION_DENIED");
    assert_eq!(verdicts[0]["destination"], "reviews");
    assert_eq!(
        verdicts[0]["message"],
        "denier.handler.istio-system:<b>no</b>"
    );

    let html = get(admin, "/debug/mixer").await;
    assert!(html.starts_with("<!doctype html>"));
    assert!(html.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    assert!(
        !html.contains("<script>") && !html.contains("<b>"),
        "{html}"
    );
}

#[tokio::test]
async fn calls_under_way_are_answered_when_it_stops() {
    let (mut mesh, gate) = mesh(|_| ()).await;
    let mut caller = mesh.client.clone();
    let asked = request(&[("request.path", text("/wait"))], &[], "");
    let waiting = tokio::spawn(async move { caller.check(asked).await });
    counted(
        &mesh,
        r#"mixer_handler_calls{handler="gate.handler.istio-system",adapter="gate"} 1"#,
    )
    .await;
    let address = mesh.running.admin_address;
    let stopping = tokio::spawn(mesh.running.stop(Duration::from_secs(20)));
    // It says that it takes no more, by which a balancer or a client knows: GOAWAY, and a closed door.
    let deadline = Instant::now() + Duration::from_secs(10);
    while tokio::net::TcpStream::connect(address).await.is_ok() {
        assert!(Instant::now() < deadline, "the monitoring port stays open");
        tokio::task::yield_now().await;
    }
    assert!(!waiting.is_finished());
    gate.add_permits(1);
    let answer = waiting.await.unwrap().unwrap().into_inner();
    assert_eq!(answer.precondition.unwrap().status.unwrap().code, 0);
    stopping.await.unwrap();
    let refused = mesh.client.check(request(&[], &[], "")).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn it_is_not_ready_before_it_is_configured() {
    // A Pilot that takes connections and says nothing.
    let pilot = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut args = args();
    args.config_ads = Some(pilot.local_addr().unwrap().to_string());
    let running = mixer::start(&args, |i| i).await.unwrap();
    let ready = get(running.admin_address, "/healthz/ready").await;
    assert_eq!(ready, "waiting for: configuration\n");
    let refused = client(&running).await.check(request(&[], &[], "")).await;
    let refused = refused.unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::Unavailable, "mixer has no configuration yet")
    );
}

#[tokio::test]
async fn every_metric_is_documented() {
    let (mut mesh, _) = mesh(|_| ()).await;
    mesh.check(&[("request.path", text("/no"))]).await;
    mesh.report(&[&[]]).await;
    let page = include_str!("../../../docs/operations/mixer.md");
    let own = get(mesh.running.admin_address, "/metrics").await;
    let kinds = own.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let names: Vec<&str> = kinds.filter_map(|line| line.split(' ').next()).collect();
    assert!(names.len() > 15, "{own}");
    for name in names {
        let is_told = [format!("`{name}"), format!("`{name}_total")]
            .iter()
            .any(|told| page.contains(told.as_str()));
        assert!(is_told, "{name} is not in docs/operations/mixer.md");
    }
}
