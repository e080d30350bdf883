//! The real kubectl.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

/// Talks to the cluster of `KUBECONFIG`.
#[derive(Clone, Debug)]
pub(crate) struct Kubectl;

impl Kubectl {
    /// `None`, and says so, where there is no cluster to talk to.
    pub(crate) fn found() -> Option<Self> {
        if std::env::var_os("KUBECONFIG").is_none() {
            eprintln!("SKIPPED: KUBECONFIG names no cluster");
            return None;
        }
        let version = Command::new("kubectl")
            .args(["version", "--client"])
            .output();
        if !version.is_ok_and(|output| output.status.success()) {
            eprintln!("SKIPPED: there is no kubectl (Debian: kubernetes-client)");
            return None;
        }
        Some(Self)
    }

    fn output(&self, args: &[&str], input: &str) -> Output {
        let mut child = Command::new("kubectl")
            .args(args)
            .arg("--request-timeout=30s")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(input.as_bytes())
            .unwrap();
        child.wait_with_output().unwrap()
    }

    fn try_run(&self, args: &[&str], input: &str) -> Result<String, String> {
        let output = self.output(args, input);
        let text =
            [output.stdout, output.stderr].map(|part| String::from_utf8_lossy(&part).into_owned());
        match output.status.success() {
            true => Ok(text.concat()),
            false => Err(text.concat()),
        }
    }

    /// Standard output and error of one that succeeds.
    pub(crate) fn run(&self, args: &[&str]) -> String {
        self.try_run(args, "")
            .unwrap_or_else(|text| panic!("kubectl {args:?}: {text}"))
    }

    /// What it says, of success or failure.
    pub(crate) fn try_apply(&self, object: &Value) -> Result<String, String> {
        self.try_run(
            &["apply", "--validate=false", "-f", "-"],
            &object.to_string(),
        )
    }

    pub(crate) fn apply(&self, object: &Value) {
        self.try_apply(object)
            .unwrap_or_else(|text| panic!("{object}: {text}"));
    }

    /// The object; null if it is not there.
    pub(crate) fn get(&self, kind: &str, namespace: &str, name: &str) -> Value {
        let mut args = vec!["get", kind, name, "-o", "json", "--ignore-not-found"];
        if !namespace.is_empty() {
            args.extend(["-n", namespace]);
        }
        let output = self.output(&args, "");
        assert!(
            output.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
    }

    /// A token of a service account in `lateen-system`; for the API server itself, or another audience.
    pub(crate) fn token(&self, account: &str, audience: Option<&str>) -> String {
        let mut args = vec![
            "create",
            "token",
            account,
            "-n",
            "lateen-system",
            "--duration=1h",
        ];
        if let Some(audience) = audience {
            args.extend(["--audience", audience]);
        }
        self.run(&args).trim().to_owned()
    }

    /// Writes a kubeconfig with which a program is that account.
    pub(crate) fn kubeconfig_of(&self, account: &str, file: &Path) {
        let view = self.run(&[
            "config",
            "view",
            "--raw",
            "--minify",
            "--flatten",
            "-o",
            "json",
        ]);
        let mut config: Value = serde_json::from_str(&view).unwrap();
        let user = &config["contexts"][0]["context"]["user"];
        config["users"] = json!([{"name": user, "user": {"token": self.token(account, None)}}]);
        std::fs::write(file, config.to_string()).unwrap();
    }

    /// Whether a service account in `lateen-system` may do this in all namespaces.
    pub(crate) fn may(&self, account: &str, verb: &str, what: &str) -> bool {
        let who = format!("--as=system:serviceaccount:lateen-system:{account}");
        self.try_run(&["auth", "can-i", verb, what, "-A", &who], "")
            .is_ok()
    }

    /// Takes away what earlier runs have left.
    pub(crate) fn clean(&self) {
        for kind in [
            "mutatingwebhookconfiguration/lateen-sidecar-injector",
            "validatingwebhookconfiguration/lateen-validator",
        ] {
            self.run(&["delete", "--ignore-not-found", kind]);
        }
        for (kind, namespace) in [
            ("pods", "shop"),
            ("pods", "plain"),
            ("leases", "lateen-system"),
        ] {
            self.run(&[
                "delete",
                "--ignore-not-found",
                "--all",
                kind,
                "-n",
                namespace,
                "--grace-period=0",
                "--force",
            ]);
        }
        for kind in [
            "destinationrules.networking.istio.io",
            "handlers.config.istio.io",
        ] {
            // The first run finds no such kind.
            drop(self.try_run(&["delete", "--all", kind, "-n", "shop"], ""));
        }
        let class = "gatewayclasses.gateway.networking.k8s.io/lateen-test";
        drop(self.try_run(&["delete", "--ignore-not-found", class], ""));
        if !self.get("namespace", "", "shop").is_null() {
            self.run(&["label", "namespace", "shop", "istio-injection-"]);
        }
    }
}
