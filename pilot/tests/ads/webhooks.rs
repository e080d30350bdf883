//! Webhooks over TLS, and what the Pilot that leads writes to a cluster.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lateen_identity::rustls::pki_types::{CertificateDer, ServerName};
use lateen_identity::rustls::{ClientConfig, RootCertStore};
use lateen_kubernetes::testing::ApiServer;
use lateen_kubernetes::{ClusterArgs, KubernetesArgs};
use lateen_service::shutdown::Drain;
use pilot::controller::{ControllerArgs, Lease};
use pilot::server::{Config, Pilot};
use pilot::webhook::WebhookArgs;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;

use crate::world::{SOON, config, get};

/// A root, and a certificate of `localhost` that it has signed.
struct Authority {
    root: String,
    der: CertificateDer<'static>,
    chain: String,
    key: String,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap();
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let leaf = leaf.signed_by(&key, &issuer).unwrap();
        Self {
            root: root.pem(),
            der: root.der().clone(),
            chain: leaf.pem(),
            key: key.serialize_pem(),
        }
    }

    fn write(&self, folder: &Path) {
        for (name, text) in [
            ("cert", &self.chain),
            ("key", &self.key),
            ("roots", &self.root),
        ] {
            std::fs::write(folder.join(name), text).unwrap();
        }
    }

    /// POSTs; an error is the connection's.
    async fn post(
        &self,
        address: SocketAddr,
        path: &str,
        kind: &str,
        body: &str,
    ) -> std::io::Result<(u16, String)> {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        let client = ClientConfig::builder_with_provider(lateen_identity::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from("localhost").unwrap();
        let mut stream = TlsConnector::from(Arc::new(client))
            .connect(name, stream)
            .await?;
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: pilot\r\nconnection: close\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        // One that is refused for its size is not read to its end.
        stream.write_all(head.as_bytes()).await?;
        let sent = stream.write_all(body.as_bytes()).await;
        let mut answer = Vec::new();
        let read = timeout(SOON, stream.read_to_end(&mut answer))
            .await
            .unwrap();
        let answer = String::from_utf8_lossy(&answer);
        let Some((head, body)) = answer.split_once("\r\n\r\n") else {
            sent?;
            read?;
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        };
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Ok((status, body.to_owned()))
    }

    /// The `response` of a review.
    async fn review(&self, address: SocketAddr, path: &str, request: Value) -> Value {
        let body = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request});
        let (status, answer) = self
            .post(address, path, "application/json", &body.to_string())
            .await
            .unwrap();
        assert_eq!(status, 200, "{answer}");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["kind"], "AdmissionReview");
        answer["response"].clone()
    }
}

fn pod() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "cart", "namespace": "shop"},
        "spec": {"containers": [{"name": "app", "image": "app:1"}]},
    })
}

fn created(object: &Value) -> Value {
    let api_version = object["apiVersion"].as_str().unwrap();
    let (group, version) = api_version.split_once('/').unwrap_or(("", "v1"));
    json!({
        "uid": "1", "operation": "CREATE", "namespace": "shop", "object": object,
        "kind": {"group": group, "version": version, "kind": object["kind"]},
    })
}

fn webhooks(folder: &Path) -> WebhookArgs {
    WebhookArgs {
        webhooks: true,
        webhook_certificate: Some(folder.join("cert")),
        webhook_key: Some(folder.join("key")),
        webhook_roots: Some(folder.join("roots")),
        inject_values: Some(folder.join("values")),
        ..WebhookArgs::default()
    }
}

/// Waits until this holds.
async fn until<F: Future<Output = bool>>(what: impl Fn() -> F) {
    let met = async {
        while !what().await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, met).await.expect("in time");
}

#[tokio::test]
async fn reviews_are_answered_over_tls() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    authority.write(folder.path());
    std::fs::write(folder.path().join("values"), "image: proxy:1\n").unwrap();
    let config = Config {
        config_dir: Some(folder.path().join("config")),
        webhook: webhooks(folder.path()),
        ..config()
    };
    std::fs::create_dir(folder.path().join("config")).unwrap();
    let drain = Drain::new();
    let pilot = Pilot::start(&config, &drain).await.unwrap();
    let address = pilot.webhook.unwrap();

    let image = async |authority: &Authority| {
        let said = authority.review(address, "/inject", created(&pod())).await;
        assert_eq!(
            (&said["uid"], &said["allowed"]),
            (&json!("1"), &json!(true))
        );
        assert_eq!(said["patchType"], "JSONPatch");
        let patch = STANDARD.decode(said["patch"].as_str().unwrap()).unwrap();
        let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
        let mut patched = pod();
        json_patch::patch(&mut patched, &patch).unwrap();
        patched["spec"]["containers"][1]["image"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(image(&authority).await, "proxy:1");
    let rule = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": "cart", "namespace": "shop"}, "spec": {"host": ""},
    });
    let said = authority.review(address, "/validate", created(&rule)).await;
    assert_eq!(said["allowed"], false);
    assert_eq!(said["status"]["code"], 422);

    // What is no review is told so.
    let json = "application/json";
    let large = "x".repeat(9 << 20);
    for (path, kind, body, want) in [
        ("/inject", json, "{}", 400),
        ("/inject", "text/plain", "{}", 415),
        ("/", json, "{}", 404),
        ("/validate", json, &large, 413),
    ] {
        let (status, text) = authority.post(address, path, kind, body).await.unwrap();
        assert_eq!(status, want, "{path}: {text}");
    }

    // Other files: the next handshake and the next review go by them.
    let next = Authority::new();
    next.write(folder.path());
    until(async || next.post(address, "/", json, "").await.is_ok()).await;
    assert!(authority.post(address, "/", json, "").await.is_err());
    std::fs::write(folder.path().join("values"), "image: proxy:2\n").unwrap();
    until(async || image(&next).await == "proxy:2").await;
    let (_, metrics) = get(pilot.http, "/metrics").await;
    assert!(metrics.contains("\ngalley_validation_failed_total{group=\"networking.istio.io\",kind=\"DestinationRule\"} 1\n"), "{metrics}");
    assert!(
        metrics.contains("\nsidecar_injection_failure_total 0\n"),
        "{metrics}"
    );
    // It is to stop: who has not heard of that yet is answered all the same.
    drain.begin();
    assert_eq!(image(&next).await, "proxy:2");
    assert!(drain.finish(Duration::from_secs(5)).await);
    assert!(next.post(address, "/", json, "").await.is_err());
}

#[tokio::test]
async fn no_certificate_is_said_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config {
        config_dir: Some(folder.path().to_owned()),
        webhook: WebhookArgs {
            webhooks: true,
            ..WebhookArgs::default()
        },
        ..config()
    };
    let error = Pilot::start(&config, &Drain::new()).await.unwrap_err();
    assert!(
        error.to_string().contains("--webhooks needs a certificate"),
        "{error}"
    );
    let config = Config {
        webhook: WebhookArgs::default(),
        controller: ControllerArgs {
            controllers: true,
            ..ControllerArgs::default()
        },
        ..config
    };
    let error = Pilot::start(&config, &Drain::new()).await.unwrap_err();
    assert!(
        error.to_string().contains("--controllers needs a cluster"),
        "{error}"
    );
}

/// A Pilot of a cluster, with webhooks and controllers.
struct Program {
    pilot: Pilot,
    drain: Drain,
}

impl Program {
    async fn start(server: &ApiServer, folder: &TempDir) -> Self {
        let config = Config {
            kubernetes: KubernetesArgs {
                cluster: ClusterArgs {
                    kubeconfig: Some(server.kubeconfig(folder.path())),
                    ..ClusterArgs::default()
                },
                kube_namespace: "istio-system".into(),
                ..KubernetesArgs::default()
            },
            webhook: WebhookArgs {
                inject_values: None,
                ..webhooks(folder.path())
            },
            controller: ControllerArgs {
                controllers: true,
                lease: Lease {
                    namespace: "mesh".into(),
                    name: "leader".into(),
                },
                injector_configuration: "injector".into(),
                validator_configuration: "validator".into(),
            },
            ..config()
        };
        let drain = Drain::new();
        let pilot = Pilot::start(&config, &drain).await.unwrap();
        Self { pilot, drain }
    }

    async fn metric(&self, line: &str) -> bool {
        let (_, metrics) = get(self.pilot.http, "/metrics").await;
        metrics.lines().any(|one| one == line)
    }
}

#[tokio::test]
async fn the_one_that_leads_writes() {
    let server = ApiServer::start().await;
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    authority.write(folder.path());
    for definition in lateen_config::definitions() {
        server.apply(definition);
    }
    server.apply(json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "gatewayclasses.gateway.networking.k8s.io"},
        "spec": {
            "group": "gateway.networking.k8s.io", "versions": [{"name": "v1", "served": true}],
            "names": {"kind": "GatewayClass", "plural": "gatewayclasses"},
        },
    }));
    server.apply(json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass",
        "metadata": {"name": "istio", "generation": 2},
        "spec": {"controllerName": "istio.io/gateway-controller"},
    }));
    server.apply(json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass",
        "metadata": {"name": "other"}, "spec": {"controllerName": "example.com/other"},
    }));
    let rule = |host: &str, generation: i64| {
        server.apply(json!({
            "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
            "metadata": {"name": "cart", "namespace": "shop", "generation": generation},
            "spec": {"host": host},
            "status": {"conditions": [{"type": "Theirs", "status": "True"}]},
        }));
    };
    rule("cart", 1);
    server.apply(json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": "injector"}, "webhooks": [{"name": "a", "clientConfig": {"url": "https://x"}}],
    }));
    server.apply(json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "shop", "labels": {"istio-injection": "enabled"}},
    }));
    server.apply(pod());
    let programs = [
        Program::start(&server, &folder).await,
        Program::start(&server, &folder).await,
    ];

    let status = |group: &str, plural: &str, namespace: &str, name: &str| {
        let object = server.object(group, plural, namespace, name).unwrap();
        object["status"].clone()
    };
    let cart = || status("networking.istio.io", "destinationrules", "shop", "cart");
    let accepted = |status: &Value| {
        let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
        conditions.into_iter().find(|one| one["type"] == "Accepted")
    };
    until(async || accepted(&cart()).is_some_and(|one| one["status"] == "True")).await;
    assert_eq!(cart()["observedGeneration"], 1);
    assert_eq!(cart()["conditions"][0]["type"], "Theirs");
    let class = || status("gateway.networking.k8s.io", "gatewayclasses", "", "istio");
    until(async || accepted(&class()).is_some()).await;
    assert_eq!(accepted(&class()).unwrap()["observedGeneration"], 2);
    assert_eq!(
        status("gateway.networking.k8s.io", "gatewayclasses", "", "other"),
        Value::Null
    );

    // What is refused is said there, and that what was before holds.
    rule("", 2);
    until(async || accepted(&cart()).is_some_and(|one| one["status"] == "False")).await;
    let said = accepted(&cart()).unwrap();
    assert_eq!(
        (&said["reason"], &said["observedGeneration"]),
        (&json!("Invalid"), &json!(2))
    );
    let message = said["message"].as_str().unwrap();
    assert!(
        message.ends_with("Its last good version stays in force"),
        "{message}"
    );

    let bundle = || {
        let group = "admissionregistration.k8s.io";
        let object = server.object(group, "mutatingwebhookconfigurations", "", "injector");
        object.unwrap()["webhooks"][0]["clientConfig"]["caBundle"].clone()
    };
    let wanted = |authority: &Authority| json!(STANDARD.encode(&authority.root));
    until(async || bundle() == wanted(&authority)).await;
    let next = Authority::new();
    next.write(folder.path());
    until(async || bundle() == wanted(&next)).await;

    // Three statuses so far, each once, and by one of the two.
    let writes = || {
        server
            .requests()
            .iter()
            .filter(|one| one.ends_with("/status"))
            .count()
    };
    assert_eq!(writes(), 3, "{:#?}", server.requests());
    let leads = async |program: &Program| program.metric("pilot_leader 1").await;
    assert!(leads(&programs[0]).await != leads(&programs[1]).await);

    for program in &programs {
        until(async || program.metric("pilot_pods_without_sidecar 1").await).await;
        let (_, page) = get(program.pilot.http, "/debug/injection").await;
        let page: Value = serde_json::from_str(&page).unwrap();
        assert_eq!(
            page,
            json!({"withoutSidecar": [{"namespace": "shop", "pod": "cart"}]})
        );
    }

    // It stops, and the other goes on.
    let [a, b] = programs;
    let (first, second) = if leads(&a).await { (a, b) } else { (b, a) };
    assert!(first.drain.finish(Duration::from_secs(5)).await);
    rule("cart", 3);
    until(async || cart()["observedGeneration"] == 3).await;
    assert!(accepted(&cart()).is_some_and(|one| one["status"] == "True"));
    assert!(leads(&second).await);
    assert!(second.drain.finish(Duration::from_secs(5)).await);
}
