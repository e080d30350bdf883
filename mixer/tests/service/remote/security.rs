//! How Mixer and an adapter process know each other: TLS, identities, tokens, and what becomes of them when files
//! change.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc::UnboundedReceiver,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{adapter, events, one_check, protos::say};
use crate::{
    collector::{self, Received},
    support::{Mesh, told},
};

const MIXER: &str = "spiffe://cluster.local/ns/istio-system/sa/mixer";

/// Whoever signs, and a folder with what it has signed.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: tempfile::TempDir,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, folder }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A certificate for a DNS name or a SPIFFE ID, and its key, as PEM.
    fn sign(&self, name: &str) -> (String, String) {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.subject_alt_names = vec![if name.contains("://") {
            SanType::URI(name.try_into().unwrap())
        } else {
            SanType::DnsName(name.try_into().unwrap())
        }];
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        (leaf.pem(), key.serialize_pem())
    }

    /// Writes Mixer's certificate and key.
    pub(crate) fn write_client(&self, name: &str) {
        let (chain, key) = self.sign(name);
        put(&self.path("cert.pem"), &chain);
        put(&self.path("key.pem"), &key);
    }

    /// A server's configuration; with `client`, only who is signed by it comes in.
    pub(crate) fn server(&self, name: &str, client: Option<&Self>) -> Arc<ServerConfig> {
        let (chain, key) = self.sign(name);
        let chain = vec![CertificateDer::from_pem_slice(chain.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let provider = lateen_identity::provider();
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = match client {
            None => builder.with_no_client_auth(),
            Some(client) => {
                let mut roots = RootCertStore::empty();
                roots.add(client.issuer.der().clone()).unwrap();
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().unwrap())
            }
        };
        let mut config = builder.with_single_cert(chain, key).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Arc::new(config)
    }
}

/// TLS on a connection, for whom it takes in.
pub(crate) fn accept(
    tls: Arc<ServerConfig>,
) -> impl Fn(TcpStream) -> BoxFuture<'static, Option<TlsStream<TcpStream>>> {
    let acceptor = TlsAcceptor::from(tls);
    move |stream| acceptor.accept(stream).map(Result::ok).boxed()
}

async fn listen(tls: Arc<ServerConfig>) -> (String, UnboundedReceiver<Received>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (address, collector::serve(listener, accept(tls), adapter))
}

async fn mesh(address: &str, authentication: &str) -> Mesh {
    let connection = format!("authentication: {{ {authentication} }}");
    let mesh = Mesh::start(&[("rules.yaml", &one_check(address, &connection, ""))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    mesh
}

/// Replaces a file at once, as those do who renew credentials.
pub(crate) fn put(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

pub(crate) fn show(path: &Path) -> std::path::Display<'_> {
    path.display()
}

/// Until a counter has reached `count`.
pub(crate) async fn counted(mesh: &Mesh, event: &str, count: u64) {
    let reached = async {
        while events(mesh, event).await < count {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), reached)
        .await
        .expect(event);
}

#[tokio::test]
async fn tls_takes_the_name_that_is_configured_and_a_token_from_a_file() {
    let authority = Authority::new();
    let (address, mut received) = listen(authority.server("gate.example", None)).await;
    let (ca, token) = (authority.path("ca.pem"), authority.path("token"));
    put(&token, "first\n");
    let tls = format!(
        "caCertificates: {}, tokenPath: {}, authHeader: BEARER",
        show(&ca),
        show(&token)
    );
    let mut good = mesh(
        &address,
        &format!("tls: {{ {tls}, serverName: gate.example }}"),
    )
    .await;
    assert_eq!(told(&good.check(&[]).await), "OK:");
    let call = received.recv().await.unwrap();
    assert_eq!(call.headers["authorization"], "Bearer first");
    put(&token, "second");
    counted(&good, "credentials_reloaded", 1).await;
    assert_eq!(told(&good.check(&[]).await), "OK:");
    let call = received.recv().await.unwrap();
    assert_eq!(call.headers["authorization"], "Bearer second");
    // A file without a token: the former one stays.
    put(&token, "");
    counted(&good, "credentials_refused", 1).await;
    assert_eq!(told(&good.check(&[]).await), "OK:");
    let call = received.recv().await.unwrap();
    assert_eq!(call.headers["authorization"], "Bearer second");

    // Another name, another authority.
    put(&token, "third");
    let other = format!("tls: {{ {tls}, serverName: other.example }}");
    let mut other = mesh(&address, &other).await;
    let verdict = told(&other.check(&[]).await);
    assert!(verdict.contains("not valid for name"), "{verdict}");
    let stranger = Authority::new();
    let ca = stranger.path("ca.pem");
    let tls = format!(
        "tls: {{ caCertificates: {}, serverName: gate.example, customHeader: x-key, tokenPath: {} }}",
        show(&ca),
        show(&token)
    );
    let mut stranger = mesh(&address, &tls).await;
    let verdict = told(&stranger.check(&[]).await);
    assert!(verdict.contains("invalid peer certificate"), "{verdict}");
    assert!(received.try_recv().is_err(), "nothing was sent to either");
}

#[tokio::test]
async fn files_that_cannot_be_used_are_refused_at_load() {
    for (authentication, reason) in [
        (
            "tls: { caCertificates: /nowhere/ca.pem }",
            "caCertificates /nowhere/ca.pem: No such file",
        ),
        (
            "tls: { tokenPath: /nowhere/token }",
            "tokenPath /nowhere/token: No such file",
        ),
        (
            "mutual: { privateKey: /nowhere/key, clientCertificate: /nowhere/cert }",
            "privateKey /nowhere/key: No such file",
        ),
        (
            "tls: { caCertificates: /dev/null }",
            "caCertificates has no certificate",
        ),
        (
            "tls: { oauth: { clientId: me, clientSecret: /dev/null, tokenUrl: \"http://tokens.example/\" } }",
            "only https keeps the client's secret secret",
        ),
    ] {
        let connection = format!("authentication: {{ {authentication} }}");
        let rules = one_check("127.0.0.1:1", &connection, "");
        let refused = Mesh::start(&[("rules.yaml", &rules)])
            .await
            .refused()
            .join("\n");
        assert!(refused.contains(reason), "{refused}");
        assert!(refused.contains("rules.yaml:"), "{refused}");
    }
}

#[tokio::test]
async fn mutual_tls_takes_mixers_own_identity_or_the_one_that_is_configured() {
    let authority = Authority::new();
    authority.write_client(MIXER);
    let paths = ["key.pem", "cert.pem", "ca.pem"].map(|name| authority.path(name));
    let mutual = format!(
        "privateKey: {}, clientCertificate: {}, caCertificates: {}",
        show(&paths[0]),
        show(&paths[1]),
        show(&paths[2])
    );
    // As in Istio: who has Mixer's own identity.
    let (same, _received) = listen(authority.server(MIXER, Some(&authority))).await;
    let mut good = mesh(&same, &format!("mutual: {{ {mutual} }}")).await;
    assert_eq!(told(&good.check(&[]).await), "OK:");
    let other = "spiffe://cluster.local/ns/default/sa/gate";
    let (address, _received) = listen(authority.server(other, Some(&authority))).await;
    let mut wrong = mesh(&address, &format!("mutual: {{ {mutual} }}")).await;
    let verdict = told(&wrong.check(&[]).await);
    assert!(verdict.contains("UnexpectedPeer"), "{verdict}");
    let named = format!("mutual: {{ {mutual}, serverName: \"{other}\" }}");
    let mut right = mesh(&address, &named).await;
    assert_eq!(told(&right.check(&[]).await), "OK:");
    // The certificate is replaced by one that the adapter does not take, and again by a good one.
    let stranger = Authority::new();
    stranger.write_client(MIXER);
    for name in ["key.pem", "cert.pem"] {
        let pem = std::fs::read_to_string(stranger.path(name)).unwrap();
        put(&authority.path(name), &pem);
    }
    counted(&right, "credentials_reloaded", 1).await;
    let verdict = told(&right.check(&[]).await);
    assert!(verdict.starts_with("UNAVAILABLE:"), "{verdict}");
    let before = events(&right, "credentials_reloaded").await;
    authority.write_client(MIXER);
    counted(&right, "credentials_reloaded", before + 1).await;
    assert_eq!(told(&right.check(&[]).await), "OK:");
}

#[tokio::test]
async fn tokens_by_client_credentials_are_fetched_and_renewed() {
    let authority = Authority::new();
    let count = Arc::new(AtomicUsize::new(0));
    let given = Arc::clone(&count);
    let (giver, mut asked) = collector::listen_and_say(move |call| {
        let form = std::str::from_utf8(&call.body).unwrap();
        if !form.contains("client_secret=pass+word") {
            return (
                401,
                json!({"error": "invalid_client"}).to_string().into_bytes(),
            );
        }
        let n = given.fetch_add(1, Ordering::SeqCst) + 1;
        let answer =
            json!({"access_token": format!("t{n}"), "token_type": "Bearer", "expires_in": 3600});
        (200, answer.to_string().into_bytes())
    })
    .await;
    std::fs::write(authority.path("secret"), "pass word\n").unwrap();
    // An adapter that takes the first token no more when it has seen it once.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let uses = AtomicUsize::new(0);
    let server = authority.server("localhost", None);
    let mut received = collector::serve(listener, accept(server), move |call| {
        let is_stale =
            call.headers["authorization"] == "Bearer t1" && uses.fetch_add(1, Ordering::SeqCst) > 0;
        if is_stale {
            (16, Vec::new())
        } else {
            say("gate.HandleGateResponse", &json!({}))
        }
    });
    let (ca, secret) = (authority.path("ca.pem"), authority.path("secret"));
    let oauth = format!(
        "clientId: me, clientSecret: {}, tokenUrl: \"http://{giver}/token\", scopes: [ a, b ], endpointParams: {{ audience: gate }}",
        show(&secret)
    );
    let tls = format!(
        "tls: {{ caCertificates: {}, serverName: localhost, oauth: {{ {oauth} }} }}",
        show(&ca)
    );
    let mut mesh = mesh(&address, &tls).await;
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
    assert_eq!(
        received.recv().await.unwrap().headers["authorization"],
        "Bearer t1"
    );
    // RFC 6749 §2.3.1: by Basic first, with both parts form-encoded.
    let first = asked.recv().await.unwrap();
    assert_eq!(first.headers["authorization"], "Basic bWU6cGFzcyt3b3Jk");
    assert_eq!(
        first.body,
        "grant_type=client_credentials&scope=a+b&audience=gate"
    );
    let second = asked.recv().await.unwrap();
    assert!(
        second
            .body
            .ends_with(b"&client_id=me&client_secret=pass+word")
    );
    let verdict = told(&mesh.check(&[]).await);
    assert!(verdict.contains("Unauthenticated"), "{verdict}");
    counted(&mesh, "tokens_fetched", 2).await;
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
    assert_eq!(count.load(Ordering::SeqCst), 2);
}
