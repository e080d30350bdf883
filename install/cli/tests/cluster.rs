//! `lateen install`, `upgrade` and `uninstall` on a real API server: `make e2e-cluster` with KUBECONFIG.
//!
//! It need not be more than an API server: nothing is waited for that needs controllers or nodes, and the namespace, which no one
//! ends there, is ended here.
#![cfg(test)]

use std::collections::BTreeSet;
use std::process::{Command, Output};

use serde_json::Value;

/// What a cluster without controllers and before 1.28 can do.
const FLAGS: [&str; 4] = ["--skip-checks", "--no-wait", "--profile", "demo"];

struct Cluster(String);

impl Cluster {
    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(program);
        command.args(arguments).env("KUBECONFIG", &self.0);
        command.output().unwrap()
    }

    fn lateen(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = self.run(env!("CARGO_BIN_EXE_lateen"), arguments);
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    }

    fn good(&self, arguments: &[&str]) -> String {
        let (code, text) = self.lateen(arguments);
        assert_eq!(code, Some(0), "lateen {arguments:?}: {text}");
        text
    }

    fn kubectl(&self, arguments: &[&str]) -> String {
        let output = self.run("kubectl", arguments);
        assert!(output.status.success(), "kubectl {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Everything there is of the kinds that are installed.
    fn everything(&self) -> BTreeSet<String> {
        let kinds = "namespaces,configmaps,serviceaccounts,services,deployments.apps,networkpolicies,persistentvolumeclaims,\
            clusterroles,clusterrolebindings,roles,rolebindings,priorityclasses,customresourcedefinitions,leases,\
            mutatingwebhookconfigurations,validatingwebhookconfigurations";
        let output = "jsonpath={range .items[*]}{.kind} {.metadata.namespace} {.metadata.name}{\"\\n\"}{end}";
        let text = self.kubectl(&["get", kinds, "-A", "-o", output]);
        text.lines().map(str::to_owned).collect()
    }

    /// What the namespace controller does.
    fn end_namespace(&self) {
        let get = ["get", "namespace", "istio-system", "-o", "json"];
        let mut namespace: Value = serde_json::from_str(&self.kubectl(&get)).unwrap();
        assert!(!namespace["metadata"]["deletionTimestamp"].is_null());
        namespace["spec"]["finalizers"] = Value::Array(Vec::new());
        let file = file(&namespace);
        let path = file.path().to_str().unwrap();
        let end = "/api/v1/namespaces/istio-system/finalize";
        self.kubectl(&["replace", "--raw", end, "-f", path]);
    }
}

fn file(object: &Value) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), object.to_string()).unwrap();
    file
}

#[test]
fn install_upgrade_uninstall_leaves_nothing() {
    let Ok(kubeconfig) = std::env::var("LATEEN_E2E_KUBECONFIG") else {
        eprintln!("SKIPPED: no cluster; KUBECONFIG=… make e2e-cluster");
        return;
    };
    let cluster = Cluster(kubeconfig);
    let before = cluster.everything();

    let install: Vec<&str> = [&["install"], &FLAGS[..]].concat();
    cluster.good(&install);
    let deployments = ["get", "deployments", "-n", "istio-system", "-o", "name"];
    let running = cluster.kubectl(&deployments);
    assert!(running.contains("deployment.apps/mixer\n"), "{running}");
    let (code, said) = cluster.lateen(&install);
    assert!(
        code == Some(1) && said.contains("is installed already"),
        "{said}"
    );

    // What others own stays theirs: Pilot's roots in the webhooks.
    let patch =
        r#"[{"op": "add", "path": "/webhooks/0/clientConfig/caBundle", "value": "cm9vdHM="}]"#;
    let [kind, name] = ["mutatingwebhookconfiguration", "lateen-sidecar-injector"];
    cluster.kubectl(&["patch", kind, name, "--type=json", "-p", patch]);
    // A value that changed, one component less; the values of the installation are kept.
    let upgrade = [&["upgrade"], &FLAGS[..2]].concat();
    let changed = [
        "--set",
        "pilot.logLevel=debug",
        "--set",
        "mixer.enabled=false",
    ];
    cluster.good(&[upgrade.as_slice(), &changed].concat());
    let pilot = [
        "get",
        "deployment",
        "pilot",
        "-n",
        "istio-system",
        "-o",
        "yaml",
    ];
    let pilot = cluster.kubectl(&pilot);
    assert!(pilot.contains("--log-level=debug"), "{pilot}");
    assert!(!cluster.kubectl(&deployments).contains("mixer"));
    let injector = cluster.kubectl(&["get", kind, name, "-o", "yaml"]);
    assert!(injector.contains("caBundle: cm9vdHM="), "{injector}");

    // Nothing runs there, and it says so.
    let (code, said) = cluster.lateen(&["check", "-o", "json"]);
    assert_eq!(code, Some(3), "{said}");
    let findings: Vec<Value> = serde_json::from_str(&said).unwrap();
    let all = |check: &str, state: &str| {
        let mut of = findings.iter().filter(|f| f["check"] == check).peekable();
        of.peek().is_some() && of.all(|f| f["state"] == state)
    };
    assert!(all("objects", "passed"), "{said}");
    assert!(all("definitions", "passed"), "{said}");
    assert!(all("deployments", "failed"), "{said}");
    assert!(all("webhooks", "failed"), "{said}");
    let version: Value = serde_json::from_str(&cluster.good(&["version", "-o", "json"])).unwrap();
    assert_eq!(
        version["components"].as_array().unwrap().len(),
        4,
        "{version}"
    );

    // Somebody's configuration is not deleted unasked.
    let entry = file(&serde_json::json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"name": "mine", "namespace": "default"},
        "spec": {"hosts": ["a.example"], "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}], "resolution": "DNS"},
    }));
    let path = entry.path().to_str().unwrap();
    cluster.kubectl(&["create", "--validate=false", "-f", path]);
    let (code, said) = cluster.lateen(&["uninstall"]);
    assert!(
        code == Some(1) && said.contains("ServiceEntry default/mine"),
        "{said}"
    );

    let (code, said) = cluster.lateen(&["uninstall", "--delete-configuration", "--timeout", "20"]);
    if code != Some(0) {
        assert!(
            said.contains("Namespace istio-system is still there"),
            "{said}"
        );
        cluster.end_namespace();
    }
    assert_eq!(cluster.everything(), before, "left behind, or taken along");
}
