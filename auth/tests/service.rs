//! The whole service in process: real sockets, real TLS, real files.
#![cfg(test)]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use auth::{Clock, Config, Grant, JoinTokenArgs, Running, Tokens};
use lateen_identity::{
    ClientAuth, PeerMatch, SpiffeId, SpiffeServerVerifier, Svid, SvidCell, Trust, TrustBundle,
    client_config, peer_identity, pki_types::CertificateDer, pki_types::pem::PemObject as _,
};
use lateen_kubernetes::ClusterArgs;
use lateen_kubernetes::testing::ApiServer;
use lateen_protocols::istio::v1::auth::IstioCertificateRequest;
use lateen_protocols::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use lateen_service::identity::{IdentityArgs, Source};
use lateen_service::shutdown::Drain;
use lateen_service::tls;
use rcgen::{CertificateParams, KeyPair, SanType};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

const PATIENCE: Duration = Duration::from_secs(30);

/// One Auth on its own folder, with a clock that can be turned forward.
struct Fixture {
    state: TempDir,
    running: Running,
    drain: Drain,
    ahead_seconds: Arc<AtomicU64>,
}

impl Fixture {
    async fn start() -> Self {
        Self::with(Duration::from_secs(3600)).await
    }

    async fn with(ttl: Duration) -> Self {
        Self::configured(|config| config.workload_ttl = ttl).await
    }

    async fn configured(change: impl FnOnce(&mut Config)) -> Self {
        let state = tempfile::tempdir().unwrap();
        let ahead_seconds = Arc::new(AtomicU64::new(0));
        let mut config = config(state.path(), &ahead_seconds);
        change(&mut config);
        let (running, drain) = run(config).await;
        Self {
            state,
            running,
            drain,
            ahead_seconds,
        }
    }

    fn turn_clock(&self, forward: Duration) {
        self.ahead_seconds
            .fetch_add(forward.as_secs(), Ordering::Relaxed);
    }

    fn token(&self, identity: &str) -> String {
        let args = JoinTokenArgs {
            state: self.state.path().to_owned(),
            identity: identity.parse().unwrap(),
            ttl: Duration::from_secs(600),
        };
        auth::join_token(&args, SystemTime::now())
            .unwrap()
            .to_string()
    }

    fn root_file(&self) -> std::path::PathBuf {
        self.state.path().join("public/root-cert.pem")
    }

    fn roots(&self) -> Arc<TrustBundle> {
        let pem = std::fs::read_to_string(self.root_file()).unwrap();
        Arc::new(TrustBundle::from_described_pem(&pem).unwrap())
    }

    /// A channel with the certificate in `cell`, or anonymous.
    fn channel(&self, cell: Option<Arc<SvidCell>>) -> Channel {
        let auth: SpiffeId = "spiffe://cluster.local/ns/istio-system/sa/auth"
            .parse()
            .unwrap();
        let verifier = SpiffeServerVerifier::new(Trust::Fixed(self.roots()), PeerMatch::id(auth));
        let config = match cell {
            Some(cell) => client_config(Some(cell), verifier, &[tls::ALPN_H2]),
            None => client_config(None, verifier, &[tls::ALPN_H2]),
        };
        tls::channel(&self.running.address.to_string(), Arc::new(config)).unwrap()
    }

    async fn with_token(&self, token: &str, csr: &str) -> Result<Vec<String>, Status> {
        ask(self.channel(None), Some(&format!("Bearer {token}")), csr, 0).await
    }

    /// Flags as a workload would have them.
    fn workload(&self, token: &str, dir: &Path) -> IdentityArgs {
        let file = dir.join("token");
        std::fs::write(&file, format!("{token}\n")).unwrap();
        IdentityArgs {
            auth_address: Some(self.running.address.to_string()),
            auth_root: Some(self.root_file()),
            join_token_file: Some(file),
            svid_dir: Some(dir.join("svid")),
            auth_id: None,
        }
    }
}

fn config(state: &Path, ahead_seconds: &Arc<AtomicU64>) -> Config {
    let ahead = Arc::clone(ahead_seconds);
    Config {
        state: state.to_owned(),
        ca_dir: None,
        trust_domain: "cluster.local".parse().unwrap(),
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        admin_address: SocketAddr::from(([127, 0, 0, 1], 0)),
        workload_ttl: Duration::from_secs(3600),
        max_workload_ttl: Duration::from_secs(86_400),
        dns_names: vec!["auth.istio-system.svc".into()],
        dns_names_of: vec![Grant {
            namespace: "mesh".into(),
            account: "pilot".into(),
            names: vec!["pilot.mesh.svc".into()],
        }],
        cluster: ClusterArgs::default(),
        publish_roots: false,
        token_audiences: vec!["istio-ca".into()],
        clock: Clock::of(move || {
            SystemTime::now() + Duration::from_secs(ahead.load(Ordering::Relaxed))
        }),
    }
}

async fn run(config: Config) -> (Running, Drain) {
    lateen_service::init_crypto();
    let drain = Drain::new();
    (auth::start(config, &drain).await.unwrap(), drain)
}

async fn ask(
    channel: Channel,
    authorization: Option<&str>,
    csr: &str,
    seconds: i64,
) -> Result<Vec<String>, Status> {
    let mut request = Request::new(IstioCertificateRequest {
        csr: csr.to_owned(),
        validity_duration: seconds,
        ..Default::default()
    });
    if let Some(value) = authorization {
        request
            .metadata_mut()
            .insert("authorization", value.parse().unwrap());
    }
    let mut client = IstioCertificateServiceClient::new(channel);
    Ok(client
        .create_certificate(request)
        .await?
        .into_inner()
        .cert_chain)
}

fn csr(key: &KeyPair) -> String {
    CertificateParams::default()
        .serialize_request(key)
        .unwrap()
        .pem()
        .unwrap()
}

fn svid(answer: &[String], key: &KeyPair) -> Svid {
    let (roots, chain) = answer.split_last().unwrap();
    let roots = TrustBundle::from_described_pem(roots).unwrap();
    Svid::from_pem(&chain.concat(), &key.serialize_pem(), Arc::new(roots)).unwrap()
}

const REVIEWS: &str = "spiffe://cluster.local/ns/default/sa/reviews";

#[tokio::test]
async fn a_token_becomes_a_certificate_and_that_another() {
    let auth = Fixture::start().await;
    let key = KeyPair::generate().unwrap();
    let first = auth
        .with_token(&auth.token(REVIEWS), &csr(&key))
        .await
        .unwrap();
    assert_eq!(first.len(), 2);
    assert_eq!(first[1], std::fs::read_to_string(auth.root_file()).unwrap());
    let first = svid(&first, &key);
    assert_eq!(first.spiffe_id().to_string(), REVIEWS);
    let life = first.remaining(SystemTime::now());
    assert!(
        life <= Duration::from_secs(3600) && life > Duration::from_secs(3500),
        "{life:?}"
    );

    let key = KeyPair::generate().unwrap();
    let channel = auth.channel(Some(SvidCell::holding(Arc::new(first))));
    let second = svid(&ask(channel, None, &csr(&key), 60).await.unwrap(), &key);
    assert_eq!(second.spiffe_id().to_string(), REVIEWS);
    assert!(second.remaining(SystemTime::now()) <= Duration::from_secs(60));
}

#[tokio::test]
async fn a_token_works_once() {
    let auth = Fixture::start().await;
    let (token, key) = (auth.token(REVIEWS), KeyPair::generate().unwrap());
    auth.with_token(&token, &csr(&key)).await.unwrap();
    let refused = auth.with_token(&token, &csr(&key)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert_eq!(refused.message(), "the caller could not be authenticated");
}

#[tokio::test]
async fn nobody_and_strangers_are_refused_alike() {
    let auth = Fixture::start().await;
    let csr = csr(&KeyPair::generate().unwrap());
    for authorization in [
        None,
        Some("Bearer x"),
        Some("Basic x"),
        Some("Bearer "),
        Some("bearer y"),
    ] {
        let refused = ask(auth.channel(None), authorization, &csr, 0)
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{authorization:?}");
        assert_eq!(refused.message(), "the caller could not be authenticated");
    }
    let foreign = auth.token("spiffe://other.org/ns/default/sa/reviews");
    assert_eq!(
        auth.with_token(&foreign, &csr).await.unwrap_err().code(),
        Code::Unauthenticated
    );
    let own = auth.token("spiffe://cluster.local/ns/istio-system/sa/auth");
    assert_eq!(
        auth.with_token(&own, &csr).await.unwrap_err().code(),
        Code::Unauthenticated
    );
}

#[tokio::test]
async fn a_bad_request_does_not_use_the_token_up() {
    let auth = Fixture::start().await;
    let (token, key) = (auth.token(REVIEWS), KeyPair::generate().unwrap());
    let good = csr(&key);
    let oversize = format!("{good}{}", "\n".repeat(16 * 1024));
    for bad in [
        "",
        "garbage",
        &good.replace("CERTIFICATE REQUEST", "CERTIFICATE"),
        &oversize,
    ] {
        assert_eq!(
            auth.with_token(&token, bad).await.unwrap_err().code(),
            Code::InvalidArgument
        );
    }
    // Beyond what the server reads at all.
    let huge = "a".repeat(1 << 20);
    assert!(auth.with_token(&token, &huge).await.is_err());
    let bearer = format!("Bearer {token}");
    for seconds in [1, 86_401, i64::MAX] {
        let refused = ask(auth.channel(None), Some(&bearer), &good, seconds)
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
    }
    auth.with_token(&token, &good).await.unwrap();
}

#[tokio::test]
async fn what_the_csr_claims_is_ignored() {
    let auth = Fixture::start().await;
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(["evil.example".to_owned()]).unwrap();
    let admin = "spiffe://cluster.local/ns/istio-system/sa/pilot";
    params
        .subject_alt_names
        .push(SanType::URI(admin.try_into().unwrap()));
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    let answer = auth.with_token(&auth.token(REVIEWS), &csr).await.unwrap();
    let leaf = CertificateDer::from_pem_slice(answer[0].as_bytes()).unwrap();
    assert_eq!(
        peer_identity(std::slice::from_ref(&leaf))
            .unwrap()
            .to_string(),
        REVIEWS
    );
    assert!(!leaf.windows(12).any(|window| window == b"evil.example"));
}

/// An API server that calls a webhook looks for a DNS name.
#[tokio::test]
async fn accounts_have_the_dns_names_that_the_operator_gives_them() {
    let auth = Fixture::start().await;
    let names = |answer: &[String]| {
        let leaf = CertificateDer::from_pem_slice(answer[0].as_bytes()).unwrap();
        ["pilot.mesh.svc", "evil.example"]
            .map(|name| leaf.windows(name.len()).any(|at| at == name.as_bytes()))
    };
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(["evil.example".to_owned()]).unwrap();
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    let pilot = "spiffe://cluster.local/ns/mesh/sa/pilot";
    let first = auth.with_token(&auth.token(pilot), &csr).await.unwrap();
    assert_eq!(names(&first), [true, false]);
    let channel = auth.channel(Some(SvidCell::holding(Arc::new(svid(&first, &key)))));
    let renewed = ask(channel, None, &csr, 0).await.unwrap();
    assert_eq!(names(&renewed), [true, false]);
    let other = auth.with_token(&auth.token(REVIEWS), &csr).await.unwrap();
    assert_eq!(names(&other), [false, false]);
}

#[tokio::test]
async fn expired_credentials_are_refused() {
    let auth = Fixture::start().await;
    let (token, key) = (auth.token(REVIEWS), KeyPair::generate().unwrap());
    let answer = auth
        .with_token(&auth.token(REVIEWS), &csr(&key))
        .await
        .unwrap();
    let connected = auth.channel(Some(SvidCell::holding(Arc::new(svid(&answer, &key)))));
    ask(connected.clone(), None, &csr(&key), 0).await.unwrap();
    auth.turn_clock(Duration::from_secs(3601));
    // The connection was made while the certificate lived; that does not count any more.
    let refused = ask(connected, None, &csr(&key), 0).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert_eq!(
        auth.with_token(&token, &csr(&key))
            .await
            .unwrap_err()
            .code(),
        Code::Unauthenticated
    );
    let later = SystemTime::now() + Duration::from_secs(3601);
    assert_eq!(
        Tokens::open(auth.state.path())
            .unwrap()
            .sweep(later)
            .unwrap(),
        2
    );
}

#[tokio::test]
async fn certificates_of_another_ca_are_refused() {
    let (auth, other) = (Fixture::start().await, Fixture::start().await);
    let key = KeyPair::generate().unwrap();
    let answer = other
        .with_token(&other.token(REVIEWS), &csr(&key))
        .await
        .unwrap();
    let foreign = SvidCell::holding(Arc::new(svid(&answer, &key)));
    // Same trust domain, same name, other root.
    assert!(
        ask(auth.channel(Some(foreign)), None, &csr(&key), 0)
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_restart_keeps_root_and_tokens() {
    let mut auth = Fixture::start().await;
    let key = KeyPair::generate().unwrap();
    let held = svid(
        &auth
            .with_token(&auth.token(REVIEWS), &csr(&key))
            .await
            .unwrap(),
        &key,
    );
    let token = auth.token(REVIEWS);
    let roots = auth.roots();
    assert!(auth.drain.finish(PATIENCE).await);
    (auth.running, auth.drain) = run(config(auth.state.path(), &auth.ahead_seconds)).await;
    assert_eq!(auth.roots(), roots);
    let channel = auth.channel(Some(SvidCell::holding(Arc::new(held))));
    ask(channel, None, &csr(&key), 0).await.unwrap();
    auth.with_token(&token, &csr(&key)).await.unwrap();
}

#[tokio::test]
async fn half_open_connections_block_nobody() {
    let auth = Fixture::start().await;
    let mut silent = Vec::new();
    for _ in 0..100 {
        let mut stream = TcpStream::connect(auth.running.address).await.unwrap();
        stream.write_all(&[0x16, 0x03, 0x01]).await.unwrap(); // the start of a ClientHello
        silent.push(stream);
    }
    let key = KeyPair::generate().unwrap();
    let token = auth.token(REVIEWS);
    let answer = tokio::time::timeout(PATIENCE, auth.with_token(&token, &csr(&key)))
        .await
        .unwrap();
    answer.unwrap();
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let auth = Fixture::start().await;
    let key = KeyPair::generate().unwrap();
    auth.with_token(&auth.token(REVIEWS), &csr(&key))
        .await
        .unwrap();
    auth.with_token("x", &csr(&key)).await.unwrap_err();
    auth.with_token(&auth.token(REVIEWS), "x")
        .await
        .unwrap_err();
    let metrics = get(auth.running.admin_address, "/metrics").await;
    for line in [
        "citadel_server_csr_count_total 3",
        "citadel_server_success_cert_issuance_count_total 1",
        "citadel_server_authentication_failure_count_total 1",
        "citadel_server_csr_parsing_err_count_total 1",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    assert!(
        get(auth.running.admin_address, "/healthz/ready")
            .await
            .starts_with("HTTP/1.1 200")
    );
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// The identity client that every program has: joins, renews by itself, survives its own restart.
#[tokio::test]
async fn a_workload_joins_renews_and_restarts() {
    let auth = Fixture::with(Duration::from_secs(5)).await;
    let dir = tempfile::tempdir().unwrap();
    let args = auth.workload(&auth.token(REVIEWS), dir.path());
    let drain = Drain::new();
    let source = Source::start(&args, &drain).unwrap().unwrap();
    let first = tokio::time::timeout(PATIENCE, source.ready())
        .await
        .unwrap();
    let mut newest = source.subscribe();
    newest.mark_unchanged();
    tokio::time::timeout(PATIENCE, newest.changed())
        .await
        .unwrap()
        .unwrap();
    let second = newest.borrow().clone().unwrap();
    assert_eq!(second.spiffe_id(), first.spiffe_id());
    assert_ne!(second.serial(), first.serial());
    assert_ne!(*second.key_pem(), *first.key_pem(), "a new key each time");
    assert!(drain.finish(PATIENCE).await);

    // The token is gone; what is stored is enough.
    std::fs::remove_file(args.join_token_file.as_ref().unwrap()).unwrap();
    let args = IdentityArgs {
        join_token_file: None,
        ..args
    };
    let drain = Drain::new();
    let restarted = Source::start(&args, &drain).unwrap().unwrap();
    assert_eq!(restarted.current().unwrap().serial(), second.serial());
    let mut newest = restarted.subscribe();
    newest.mark_unchanged();
    tokio::time::timeout(PATIENCE, newest.changed())
        .await
        .unwrap()
        .unwrap();
    assert!(drain.finish(PATIENCE).await);
}

/// A workload that starts before Auth waits for it.
#[tokio::test]
async fn a_workload_waits_for_auth() {
    let mut auth = Fixture::start().await;
    let token = auth.token(REVIEWS);
    let address = auth.running.address;
    assert!(auth.drain.finish(PATIENCE).await);
    let dir = tempfile::tempdir().unwrap();
    let drain = Drain::new();
    let args = IdentityArgs {
        auth_address: Some(address.to_string()),
        ..auth.workload(&token, dir.path())
    };
    let source = Source::start(&args, &drain).unwrap().unwrap();
    assert!(source.current().is_none());
    (auth.running, auth.drain) = run(Config {
        address,
        ..config(auth.state.path(), &auth.ahead_seconds)
    })
    .await;
    let svid = tokio::time::timeout(PATIENCE, source.ready())
        .await
        .unwrap();
    assert_eq!(svid.spiffe_id().to_string(), REVIEWS);
}

/// An Auth that asks `server` about tokens.
async fn in_cluster(server: &ApiServer) -> (Fixture, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = Some(server.kubeconfig(folder.path()));
    let auth = Fixture::configured(|config| config.cluster.kubeconfig = kubeconfig).await;
    (auth, folder)
}

#[tokio::test]
async fn a_pod_is_known_by_its_token_as_often_as_it_asks() {
    let server = ApiServer::start().await;
    let (auth, _folder) = in_cluster(&server).await;
    let account = "system:serviceaccount:default:reviews";
    server.token("of-reviews", account, &["istio-ca", "other"]);
    for _ in 0..2 {
        let key = KeyPair::generate().unwrap();
        let answer = auth.with_token("of-reviews", &csr(&key)).await.unwrap();
        assert_eq!(svid(&answer, &key).spiffe_id().to_string(), REVIEWS);
    }
    // Join tokens go on to be good, and are not shown to anybody.
    let asked = server.requests().len();
    let (token, key) = (auth.token(REVIEWS), KeyPair::generate().unwrap());
    auth.with_token(&token, &csr(&key)).await.unwrap();
    assert_eq!(server.requests().len(), asked);

    // The same by a workload's own flags.
    let dir = tempfile::tempdir().unwrap();
    let source = Source::start(&auth.workload("of-reviews", dir.path()), &auth.drain);
    let source = source.unwrap().unwrap();
    let svid = tokio::time::timeout(PATIENCE, source.ready())
        .await
        .unwrap();
    assert_eq!(svid.spiffe_id().to_string(), REVIEWS);
}

#[tokio::test]
async fn tokens_of_others_are_nobodys() {
    let server = ApiServer::start().await;
    let (auth, _folder) = in_cluster(&server).await;
    server.token(
        "elsewhere",
        "system:serviceaccount:default:reviews",
        &["https://kubernetes.default.svc"],
    );
    server.token("admin", "kubernetes-admin", &["istio-ca"]);
    server.token("short", "system:serviceaccount:default", &["istio-ca"]);
    server.token("long", "system:serviceaccount:a:b:c", &["istio-ca"]);
    server.token("path", "system:serviceaccount:a:b/../c", &["istio-ca"]);
    let own = "system:serviceaccount:istio-system:auth";
    server.token("own", own, &["istio-ca"]);
    let csr = csr(&KeyPair::generate().unwrap());
    for token in [
        "unknown",
        "elsewhere",
        "admin",
        "short",
        "long",
        "path",
        "own",
    ] {
        let refused = auth.with_token(token, &csr).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{token}");
        assert_eq!(refused.message(), "the caller could not be authenticated");
    }
}

#[tokio::test]
async fn while_tokens_cannot_be_reviewed_nobody_gets_in_and_may_try_again() {
    let server = ApiServer::start().await;
    let (auth, _folder) = in_cluster(&server).await;
    let account = "system:serviceaccount:default:reviews";
    server.token("of-reviews", account, &["istio-ca"]);
    let csr = csr(&KeyPair::generate().unwrap());
    for code in [403, 500] {
        server.refuse(Some(("tokenreviews", code)));
        let refused = auth.with_token("of-reviews", &csr).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{code}");
    }
    server.refuse(None);
    server.stop();
    let refused = auth.with_token("of-reviews", &csr).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    server.restart().await;
    auth.with_token("of-reviews", &csr).await.unwrap();
}

#[tokio::test]
async fn every_namespace_has_the_roots() {
    let server = ApiServer::start().await;
    let namespace = |name: &str| {
        server.apply(serde_json::json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name},
        }));
    };
    namespace("default");
    namespace("kube-system");
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = Some(server.kubeconfig(folder.path()));
    let auth = Fixture::configured(|config| {
        config.cluster.kubeconfig = kubeconfig;
        config.publish_roots = true;
    })
    .await;
    let pem = std::fs::read_to_string(auth.root_file()).unwrap();
    let written = async |name: &str| {
        let has = || {
            let map = server.object("", "configmaps", name, "istio-ca-root-cert");
            map.is_some_and(|map| map["data"]["root-cert.pem"] == *pem)
        };
        let until = async {
            while !has() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, until).await.expect(name);
    };
    written("default").await;
    // New namespaces and changed maps are put right.
    server.apply(serde_json::json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "istio-ca-root-cert", "namespace": "default"}, "data": {"root-cert.pem": "mine"},
    }));
    namespace("shop");
    written("shop").await;
    written("default").await;
    let system = server.object("", "configmaps", "kube-system", "istio-ca-root-cert");
    assert_eq!(system, None);
}

/// Two workloads over mutual TLS: rotation swaps what new handshakes use and leaves connections alone.
#[tokio::test]
async fn rotation_leaves_connections_alone() {
    let auth = Fixture::start().await;
    let (server_key, client_key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let ratings = "spiffe://cluster.local/ns/default/sa/ratings";
    let server = auth
        .with_token(&auth.token(ratings), &csr(&server_key))
        .await
        .unwrap();
    let client = auth
        .with_token(&auth.token(REVIEWS), &csr(&client_key))
        .await
        .unwrap();
    let (server, client) = (
        Source::fixed(svid(&server, &server_key)),
        Source::fixed(svid(&client, &client_key)),
    );

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accepted = tls::serve(listener, server.server_config(ClientAuth::Required));
    let mut accepted = std::pin::pin!(accepted);
    let config = client.client_config(PeerMatch::id(ratings.parse().unwrap()));
    let connect = async |config| {
        let stream = TcpStream::connect(address).await.unwrap();
        let name = lateen_identity::pki_types::ServerName::try_from("unused").unwrap();
        tokio_rustls::TlsConnector::from(config)
            .connect(name, stream)
            .await
    };
    let (mut near, far) = tokio::join!(
        connect(Arc::clone(&config)),
        tokio_stream::StreamExt::next(&mut accepted)
    );
    let (near, mut far) = (near.as_mut().unwrap(), far.unwrap().unwrap());
    let peer = tonic::transport::server::Connected::connect_info(&far);
    assert_eq!(peer.spiffe_id().unwrap().to_string(), REVIEWS);

    let before = near.get_ref().1.peer_certificates().unwrap().to_vec();
    let key = KeyPair::generate().unwrap();
    let channel = auth.channel(Some(server.cell()));
    server.publish(Arc::new(svid(
        &ask(channel, None, &csr(&key), 0).await.unwrap(),
        &key,
    )));
    near.write_all(b"hello").await.unwrap();
    near.flush().await.unwrap();
    let mut got = [0; 5];
    far.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"hello");
    let (again, far) = tokio::join!(
        connect(Arc::clone(&config)),
        tokio_stream::StreamExt::next(&mut accepted)
    );
    assert_ne!(
        again.unwrap().get_ref().1.peer_certificates().unwrap(),
        before
    );
    drop(far);

    // The right domain, the wrong workload.
    let wrong = client.client_config(PeerMatch::id(REVIEWS.parse().unwrap()));
    assert!(connect(wrong).await.is_err());
}

/// A judge who shares no code with us.
#[tokio::test]
async fn openssl_accepts_the_chain() {
    if Command::new("openssl")
        .arg("version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        eprintln!("SKIPPED: no openssl program");
        return;
    }
    let auth = Fixture::start().await;
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| {
        let output = Command::new("openssl")
            .args(args)
            .current_dir(dir.path())
            .output()
            .unwrap();
        let text =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text.into_owned())
    };
    let root = auth.root_file();
    let root = root.to_str().unwrap();
    for key in ["ec:p256", "rsa:2048"] {
        let made = match key {
            "ec:p256" => run(&[
                "req",
                "-new",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-keyout",
                "key.pem",
                "-out",
                "csr.pem",
                "-subj",
                "/CN=x",
            ]),
            rsa => run(&[
                "req", "-new", "-newkey", rsa, "-nodes", "-keyout", "key.pem", "-out", "csr.pem",
                "-subj", "/",
            ]),
        };
        assert!(made.0, "{}", made.1);
        let csr = std::fs::read_to_string(dir.path().join("csr.pem")).unwrap();
        let answer = auth.with_token(&auth.token(REVIEWS), &csr).await.unwrap();
        std::fs::write(dir.path().join("leaf.pem"), &answer[0]).unwrap();
        for purpose in ["sslserver", "sslclient"] {
            let verified = run(&[
                "verify",
                "-x509_strict",
                "-purpose",
                purpose,
                "-CAfile",
                root,
                "leaf.pem",
            ]);
            assert!(verified.0, "{key} {purpose}: {}", verified.1);
        }
        let (_, text) = run(&["x509", "-in", "leaf.pem", "-noout", "-text"]);
        assert!(
            text.contains("X509v3 Subject Alternative Name: critical"),
            "{text}"
        );
        assert!(text.contains(&format!("URI:{REVIEWS}")), "{text}");
    }
    for (weak, why) in [("rsa:1024", "weak"), ("rsa:5120", "dear")] {
        let made = run(&[
            "req", "-new", "-newkey", weak, "-nodes", "-keyout", "key.pem", "-out", "csr.pem",
            "-subj", "/",
        ]);
        assert!(made.0, "{}", made.1);
        let csr = std::fs::read_to_string(dir.path().join("csr.pem")).unwrap();
        let refused = auth
            .with_token(&auth.token(REVIEWS), &csr)
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{why}");
    }
}

/// A CA of one's own, made by openssl: an RSA root and an intermediate that signs.
#[tokio::test]
async fn a_plugged_in_intermediate_signs() {
    if Command::new("openssl")
        .arg("version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        eprintln!("SKIPPED: no openssl program");
        return;
    }
    let state = tempfile::tempdir().unwrap();
    let ca = state.path().join("ca");
    std::fs::create_dir(&ca).unwrap();
    let script = "set -e
        openssl req -x509 -newkey rsa:2048 -nodes -keyout root-key.pem -out root-cert.pem -days 30 -subj '/O=Corp/CN=Root' \
            -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign
        openssl req -new -newkey rsa:2048 -nodes -keyout ca-key.pem -out ca.csr -subj '/O=Corp/CN=Mesh'
        printf 'basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n' > ext
        openssl x509 -req -in ca.csr -CA root-cert.pem -CAkey root-key.pem -CAcreateserial -days 20 -extfile ext -out ca-cert.pem
        cat ca-cert.pem root-cert.pem > cert-chain.pem
        chmod 600 ca-key.pem";
    let made = Command::new("sh")
        .arg("-c")
        .arg(script)
        .current_dir(&ca)
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    let ahead_seconds = Arc::default();
    let (running, drain) = run(config(state.path(), &ahead_seconds)).await;
    let auth = Fixture {
        state,
        running,
        drain,
        ahead_seconds,
    };

    // These roots do not say their trust domain; a workload takes the mesh's default.
    let dir = tempfile::tempdir().unwrap();
    let source = Source::start(
        &auth.workload(&auth.token(REVIEWS), dir.path()),
        &auth.drain,
    );
    let source = source.unwrap().unwrap();
    let svid = tokio::time::timeout(PATIENCE, source.ready())
        .await
        .unwrap();
    assert_eq!(svid.chain().len(), 2, "leaf and intermediate");
    std::fs::write(dir.path().join("leaf.pem"), svid.chain_pem()).unwrap();
    let verified = Command::new("openssl")
        .args(["verify", "-CAfile"])
        .arg(auth.root_file())
        .args(["-untrusted", "leaf.pem", "leaf.pem"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(
        verified.status.success(),
        "{}",
        String::from_utf8_lossy(&verified.stderr)
    );
}
