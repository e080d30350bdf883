//! audit: what is answered is on the disk, in a chain that goes on over reloads, restarts and rotations.

use std::{fs, path::Path};

use lateen_adapter::Value;
use serde_json::Value as Json;
use sha2::{Digest as _, Sha256};

use crate::support::{Mesh, get, text};

fn rules(params: &str) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: audit, namespace: istio-system }}
spec: {{ compiledAdapter: audit, params: {params} }}
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: {{ name: access, namespace: istio-system }}
spec:
  compiledTemplate: logentry
  params:
    severity: '"info"'
    timestamp: request.time
    variables: {{ principal: source.principal | "", path: request.path | "", code: response.code | 0 }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: audit, namespace: istio-system }}
spec: {{ actions: [ {{ handler: audit, instances: [ access ] }} ] }}
"#
    )
}

fn access(path: &str) -> Vec<(&'static str, Value)> {
    vec![
        ("source.principal", text("cluster.local/ns/default/sa/a")),
        ("request.path", text(path)),
        ("response.code", Value::Int64(200)),
        (
            "request.time",
            Value::Timestamp(lateen_engine::parse_timestamp("2026-11-24T01:02:03.5Z").unwrap()),
        ),
    ]
}

/// The paths in the file's lines, if the chain that ends with hash `previous` goes on in them.
fn verified(file: &Path, previous: &mut String, sequence: &mut u64) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap();
    let mut paths = Vec::new();
    for line in text.lines() {
        let record: Json = serde_json::from_str(line).unwrap();
        *sequence += 1;
        assert_eq!(record["sequence"], *sequence);
        assert_eq!(record["previous"], **previous);
        assert_eq!(record["time"], "2026-11-24T01:02:03.500000Z");
        assert_eq!(record["instance"], "access.instance.istio-system");
        assert_eq!(record["variables"]["code"], 200);
        paths.push(record["variables"]["path"].as_str().unwrap().to_owned());
        *previous = hex::encode(Sha256::digest(line));
    }
    paths
}

#[tokio::test]
async fn the_chain_goes_on_over_reloads_and_restarts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("audit.log");
    let params = |more: &str| format!("{{ path: \"{}\" {more} }}", file.display());
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&params("")))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    mesh.report(&[&access("/1"), &access("/2")]).await;
    // Answered is written.
    assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), 2);
    mesh.apply("rules.yaml", Some(&rules(&params(", maxFiles: 5"))))
        .await;
    mesh.report(&[&access("/3")]).await;
    mesh.running.stop(std::time::Duration::from_secs(5)).await;
    // The machine stopped within a line.
    let mut all = fs::read(&file).unwrap();
    all.extend(b"{\"instance\":\"acc");
    fs::write(&file, all).unwrap();
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&params("")))]).await;
    mesh.report(&[&access("/4")]).await;
    let (mut previous, mut sequence) = ("0".repeat(64), 0);
    assert_eq!(
        verified(&file, &mut previous, &mut sequence),
        ["/1", "/2", "/3", "/4"]
    );
}

#[tokio::test]
async fn and_over_rotations() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("audit.log");
    let params = format!("{{ path: \"{}\", maxMegabytes: 1 }}", file.display());
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&params))]).await;
    let long = format!("/{}", "x".repeat(60_000));
    let one = access(&long);
    for _ in 0..4 {
        let ten: Vec<&[_]> = vec![&one; 10];
        mesh.report(&ten).await;
    }
    let (mut previous, mut sequence) = ("0".repeat(64), 0);
    for name in ["audit.log.2", "audit.log.1", "audit.log"] {
        let all = verified(&folder.path().join(name), &mut previous, &mut sequence);
        assert!(!all.is_empty());
    }
    assert_eq!(sequence, 40);
}

#[tokio::test]
async fn a_file_that_cannot_be_taken_up_or_written_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("audit.log");
    fs::write(&file, "something else\n").unwrap();
    let params = format!("{{ path: \"{}\" }}", file.display());
    let mesh = Mesh::start(&[("rules.yaml", &rules(&params))]).await;
    let refused = mesh.refused();
    assert!(
        refused
            .iter()
            .any(|r| r.contains("is none of an audit log")),
        "{refused:?}"
    );

    for (params, reason) in [
        ("{ path: audit.log }", "is not absolute"),
        ("{ path: /a, maxFiles: 0 }", "must not be 0"),
        (
            "{ path: /proc/nowhere/audit.log }",
            "/proc/nowhere/audit.log",
        ),
    ] {
        let mesh = Mesh::start(&[("rules.yaml", &rules(params))]).await;
        assert!(
            mesh.refused().iter().any(|r| r.contains(reason)),
            "{:?}",
            mesh.refused()
        );
    }

    // A disk that is full.
    let mut mesh = Mesh::start(&[("rules.yaml", &rules("{ path: /dev/full }"))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    mesh.report(&[&access("/1"), &access("/2")]).await;
    let metrics = get(mesh.running.admin_address, "/metrics").await;
    assert!(
        metrics.contains("adapter=\"audit\",event=\"records_lost\"} 2\n"),
        "{metrics}"
    );
}
