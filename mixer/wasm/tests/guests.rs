//! Guests against the adapter, by the SDK's test kit.
#![cfg(test)]

use std::{fs, path::Path, sync::Arc, time::Duration};

use lateen_adapter::{
    Adapter as _, Call, Candidate, Clock, Code, Counter, Env, Handler, InstanceType, Template,
    env::Closer,
    instance::{CheckInstance, FieldValue, Fields},
    kit::Kit,
    meter::Meter,
    template, value,
    workload::NoWorkloads,
};
use lateen_wasm::{Wasm, testing::component};
use serde_json::json;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

const LIST: &str = include_str!("guests/list.wat");
const QUOTA: &str = include_str!("guests/quota.wat");

async fn run(guest: &str, templates: &[&'static Template], cases: &str) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("guest.wasm");
    fs::write(&file, component(guest, templates).unwrap()).unwrap();
    let cases = cases.replace("FILE", file.to_str().unwrap());
    let differences = Kit::new(Arc::new(Wasm::default())).run(&cases).await;
    assert_eq!(differences.unwrap(), Vec::<String>::new());
}

#[test]
fn the_package_of_all_templates_is_wit() {
    let interfaces = template::ALL
        .iter()
        .map(|t| lateen_adapter::wit::interface(t));
    let interfaces: Vec<_> = interfaces.collect::<Result<_, _>>().unwrap();
    let text = lateen_adapter::wit::package(&interfaces);
    let mut resolve = wit_parser::Resolve::default();
    let package = resolve.push_str("adapter.wit", &text).unwrap();
    let world = resolve.select_world(&[package], Some("adapter")).unwrap();
    assert_eq!(resolve.worlds[world].exports.len(), template::ALL.len() + 1);
    println!("{text}");
}

#[tokio::test]
async fn checks() {
    run(
        LIST,
        &[&template::LISTENTRY],
        include_str!("cases/list.yaml"),
    )
    .await;
}

#[tokio::test]
async fn quota_and_reports() {
    let templates = [&template::QUOTA, &template::METRIC];
    run(QUOTA, &templates, include_str!("cases/quota.yaml")).await;
}

/// Counters by name.
#[derive(Default)]
struct Counters(std::sync::Mutex<std::collections::HashMap<&'static str, Counter>>);

impl Meter for Counters {
    fn counter(&self, event: &'static str) -> Counter {
        self.0.lock().unwrap().entry(event).or_default().clone()
    }
}

struct Built {
    handler: Handler,
    counters: Arc<Counters>,
    _closer: Closer,
}

fn build(params: serde_json::Value, template: &'static Template) -> Result<Built, String> {
    let (env, closer) = Env::new(
        Arc::from("h.handler.ns"),
        Clock::manual(),
        Arc::new(NoWorkloads),
        TaskTracker::new(),
    );
    let counters = Arc::new(Counters::default());
    let env = env.with_meter(counters.clone());
    let candidate = Candidate {
        name: "h.handler.ns",
        params: &params,
        instances: &[InstanceType {
            name: Arc::from("i.instance.ns"),
            template: template.name,
            fields: Vec::new(),
        }],
    };
    let handler = Wasm::default().build(&candidate, env);
    Ok(Built {
        handler: handler.map_err(|e| e.to_string())?,
        counters,
        _closer: closer,
    })
}

impl Built {
    async fn check(&self, text: &str) -> Result<Code, String> {
        let fields = Fields(vec![("value", FieldValue::One(value::string(text)))]);
        let instance = CheckInstance::new(&template::LISTENTRY, Arc::from("i"), fields).unwrap();
        let call = Call {
            deadline: Instant::now() + Duration::from_secs(5),
        };
        let answer = self.handler.check().unwrap().check(instance, &call).await;
        answer.map(|r| r.status.code).map_err(|e| e.to_string())
    }

    fn count(&self, event: &'static str) -> u64 {
        self.counters.counter(event).get()
    }

    /// Until `event` was counted `times` times.
    async fn counted(&self, event: &'static str, times: u64) {
        let wait = async {
            while self.count(event) < times {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(60), wait).await;
        assert!(waited.is_ok(), "{event} is {}", self.count(event));
    }
}

fn refusal(params: serde_json::Value) -> String {
    build(params, &template::LISTENTRY).map(drop).unwrap_err()
}

#[tokio::test]
async fn what_does_not_fit_is_refused_at_load() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let written = |name: &str, bytes: &[u8]| {
        fs::write(at(name), bytes).unwrap();
        json!({"file": at(name)})
    };
    let contains = |text: String, part: &str| assert!(text.contains(part), "{text}");
    contains(refusal(json!({"file": at("none.wasm")})), "none.wasm");
    contains(refusal(json!({"file": folder.path()})), "file");
    contains(refusal(written("text.wasm", b"no wasm")), "no component");
    let module = wat::parse_str("(module)").unwrap();
    contains(refusal(written("module.wasm", &module)), "no component");
    let quota = component(QUOTA, &[&template::QUOTA, &template::METRIC]).unwrap();
    let refused = refusal(written("quota.wasm", &quota));
    contains(refused, "does not export lateen:adapter/listentry@0.1.0");
    let wasi = r#"(component (import "wasi:io/poll@0.2.0" (instance)))"#;
    let wasi = wat::parse_str(wasi).unwrap();
    contains(refusal(written("wasi.wasm", &wasi)), "without WASI");
    let other = r#"(component
        (core module $m (func (export "f") (param i32) (result i32) unreachable))
        (core instance $i (instantiate $m))
        (func $f (param "instance" u32) (result u32) (canon lift (core func $i "f")))
        (instance $h (export "configure" (func $f)))
        (export "lateen:adapter/handler@0.1.0" (instance $h)))"#;
    let other = wat::parse_str(other).unwrap();
    contains(refusal(written("other.wasm", &other)), "function configure");
    // Each table would do, but not both.
    let tables = "(table 600000 funcref) (table 600000 funcref) (memory (export";
    let tables = LIST.replace("(memory (export", tables);
    let tables = component(&tables, &[&template::LISTENTRY]).unwrap();
    contains(refusal(written("tables.wasm", &tables)), "table");
    let list = component(LIST, &[&template::LISTENTRY]).unwrap();
    let mut params = written("list.wasm", &list);
    params["config"] = json!({"bad": 1});
    contains(refusal(params.clone()), "bad is no parameter");
    params["config"] = json!({});
    params["sha256"] = json!("00".repeat(32));
    contains(refusal(params), "sha256");
}

#[tokio::test]
async fn failures_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("guest.wasm");
    fs::write(&file, component(LIST, &[&template::LISTENTRY]).unwrap()).unwrap();
    let params = json!({"file": file, "fuel": 2_000_000, "memoryBytes": 1 << 20, "copies": 2});
    let built = build(params, &template::LISTENTRY).unwrap();
    for (text, event) in [
        ("trap", "guest_traps"),
        ("loop", "guest_out_of_fuel"),
        ("grow", "guest_memory_refused"),
        ("bad", "guest_bad_answers"),
    ] {
        built.check(text).await.unwrap_err();
        assert!(built.count(event) > 0, "{event}");
    }
    for _ in 0..50 {
        assert_eq!(built.check("print").await, Ok(Code::Ok));
    }
    assert!(built.count("guest_log_lines_dropped") > 0);
}

/// A thread that has a guest in a loop still does other work: the guest gives way.
#[tokio::test(flavor = "current_thread")]
async fn a_loop_takes_no_thread() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("guest.wasm");
    fs::write(&file, component(LIST, &[&template::LISTENTRY]).unwrap()).unwrap();
    let params = json!({"file": file, "fuel": 10_000_000_000_u64, "timeout": "200ms"});
    let built = build(params, &template::LISTENTRY).unwrap();
    let mut turns = 0_u32;
    let others = async {
        loop {
            tokio::task::yield_now().await;
            turns += 1;
        }
    };
    tokio::select! {
        answer = built.check("loop") => { answer.unwrap_err(); }
        () = others => {}
    }
    assert!(turns > 10, "{turns}");
    assert_eq!(built.count("guest_late"), 1);
}

#[tokio::test]
async fn a_changed_file_takes_over_and_a_bad_one_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("guest.wasm");
    let replace = |bytes: &[u8]| {
        let next = folder.path().join("next.wasm");
        fs::write(&next, bytes).unwrap();
        fs::rename(&next, Path::new(&file)).unwrap();
    };
    let list = |text: &str| component(text, &[&template::LISTENTRY]).unwrap();
    replace(&list(LIST));
    let built = build(json!({"file": file}), &template::LISTENTRY).unwrap();
    assert_eq!(built.check("no").await, Ok(Code::NotFound));
    replace(b"broken");
    built.counted("reloads_failed", 1).await;
    assert_eq!(built.check("no").await, Ok(Code::NotFound));
    let strict = LIST.replace(
        "(i32.store (i32.const 520) (i32.const 5))\n        (i32.store (i32.const 524) (i32.const 16))",
        "(i32.store (i32.const 520) (i32.const 7))\n        (i32.store (i32.const 524) (i32.const 16))",
    );
    assert_ne!(strict, LIST);
    replace(&list(&strict));
    built.counted("reloads", 1).await;
    assert_eq!(built.check("no").await, Ok(Code::PermissionDenied));
}
