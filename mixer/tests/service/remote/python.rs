//! The sample adapter in Python, with its own configuration.
//!
//! `ADAPTER_PYTHON` names an interpreter that has what its requirements.txt says. Without it this says so and tests
//! nothing.

use std::{path::Path, process::Stdio, time::Duration};

use lateen_adapter::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};

use crate::support::{Mesh, map, seconds, text, told};

async fn start(
    python: &std::ffi::OsStr,
    folder: &Path,
) -> (Child, Lines<BufReader<ChildStdout>>, String) {
    let mut child = Command::new(python)
        .arg(folder.join("adapter.py"))
        .args(["--address", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("ADAPTER_PYTHON runs");
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = next(&mut lines).await;
    let address = first
        .strip_prefix("listening on ")
        .expect("where it listens");
    (child, lines, address.to_owned())
}

async fn next(lines: &mut Lines<BufReader<ChildStdout>>) -> String {
    let line = tokio::time::timeout(Duration::from_secs(60), lines.next_line()).await;
    line.expect("a line in time")
        .unwrap()
        .expect("another line")
}

#[tokio::test]
async fn it_turns_away_counts_and_prints() {
    let Some(python) = std::env::var_os("ADAPTER_PYTHON") else {
        eprintln!("skipped: ADAPTER_PYTHON names no interpreter");
        return;
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples/python");
    let (child, mut lines, address) = start(&python, &folder).await;
    let config = std::fs::read_to_string(folder.join("config.yaml")).unwrap();
    // The window is long enough not to end amid the test; a busy machine may be slow.
    let config = config
        .replace("127.0.0.1:9070", &address)
        .replace("window_seconds: 10", "window_seconds: 3600")
        .replace("timeout: 500ms", "timeout: 5s");
    let mut mesh = Mesh::start(&[("config.yaml", &config)]).await;
    assert_eq!(mesh.problems(), []);
    let request = |user: &str| {
        vec![
            ("destination.service.name", text("productpage")),
            ("request.headers", map(&[("end-user", user)])),
            ("response.size", Value::Int64(70)),
            ("response.code", Value::Int64(200)),
        ]
    };
    let denied = mesh.check(&request("mallory")).await;
    assert_eq!(
        told(&denied),
        "PERMISSION_DENIED:sample.handler.istio-system:mallory is not welcome"
    );
    assert_eq!(denied.valid_use_count, 1000);
    let mut granted = Vec::new();
    for (id, amount, best_effort) in [
        ("1", 3, false),
        ("2", 3, false),
        ("3", 3, true),
        ("4", 1, true),
    ] {
        let quotas = [("requestcount", amount, best_effort)];
        let answer = mesh.check_with(&request("alice"), &quotas, id).await;
        let quota = &answer.quotas["requestcount"];
        granted.push(quota.granted_amount);
        assert_eq!(seconds(quota.valid_duration.as_ref()), 3600.0);
    }
    assert_eq!(
        granted,
        [3, 0, 2, 0],
        "five in all, and less only for those who take less"
    );
    mesh.report(&[&request("alice")]).await;
    assert_eq!(
        next(&mut lines).await,
        "size.instance.istio-system 70 {'code': 200, 'service': 'productpage'}"
    );
    drop(child);
}
