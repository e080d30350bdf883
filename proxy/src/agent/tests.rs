use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{Secret, secret::Type};
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use envoy_types::pb::envoy::service::secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient;
use hyper_util::rt::TokioIo;
use lateen_identity::{Svid, TrustBundle};
use prost::Message as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// A root that signs what the tests need.
struct Root {
    issuer: Issuer<'static, KeyPair>,
    bundle: Arc<TrustBundle>,
}

impl Root {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key).unwrap().pem();
        let bundle = TrustBundle::from_pem("cluster.local".parse().unwrap(), &pem).unwrap();
        Self {
            issuer: Issuer::new(params, key),
            bundle: Arc::new(bundle),
        }
    }

    fn svid(&self) -> Arc<Svid> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let id = "spiffe://cluster.local/ns/default/sa/reviews";
        params
            .subject_alt_names
            .push(SanType::URI(id.try_into().unwrap()));
        let chain = params.signed_by(&key, &self.issuer).unwrap().pem();
        Arc::new(Svid::from_pem(&chain, &key.serialize_pem(), Arc::clone(&self.bundle)).unwrap())
    }
}

async fn connect(path: &Path) -> SecretDiscoveryServiceClient<Channel> {
    let path = path.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://sds")
        .connect_with_connector(connector)
        .await
        .unwrap();
    SecretDiscoveryServiceClient::new(channel)
}

fn certificate_of(secret: &[u8]) -> Vec<u8> {
    use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
    let source = match Secret::decode(secret).unwrap().r#type.unwrap() {
        Type::TlsCertificate(certificate) => certificate.certificate_chain.unwrap(),
        Type::ValidationContext(context) => context.trusted_ca.unwrap(),
        other => panic!("{other:?}"),
    };
    match source.specifier.unwrap() {
        Specifier::InlineBytes(bytes) => bytes,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn secrets_are_pushed_at_each_rotation() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let (root, source) = (Root::new(), Source::empty());
    let serving = sds::serve(&path, &source).unwrap().unwrap();
    let mut client = connect(&path).await;
    let (requests, outgoing) = mpsc::channel(4);
    let ask = |names: &[&str], nonce: &str| DiscoveryRequest {
        resource_names: names.iter().map(|name| (*name).to_owned()).collect(),
        response_nonce: nonce.to_owned(),
        ..DiscoveryRequest::default()
    };
    requests
        .send(ask(&["default", "unknown"], ""))
        .await
        .unwrap();
    let mut answers = client
        .stream_secrets(ReceiverStream::new(outgoing))
        .await
        .unwrap()
        .into_inner();

    // Asked before there is anything, answered when there is.
    let first = root.svid();
    source.publish(Arc::clone(&first));
    let answer = answers.message().await.unwrap().unwrap();
    assert_eq!(answer.resources.len(), 1, "unknown names are left out");
    assert_eq!(
        certificate_of(&answer.resources[0].value),
        first.chain_pem().into_bytes()
    );

    // An acknowledgement is not answered; the next rotation is.
    requests
        .send(ask(&["default", "unknown"], &answer.nonce))
        .await
        .unwrap();
    let second = root.svid();
    source.publish(Arc::clone(&second));
    let answer = answers.message().await.unwrap().unwrap();
    assert_eq!(
        certificate_of(&answer.resources[0].value),
        second.chain_pem().into_bytes()
    );

    // Asking for more is answered at once, with all of it.
    requests
        .send(ask(&["default", "ROOTCA"], &answer.nonce))
        .await
        .unwrap();
    let answer = answers.message().await.unwrap().unwrap();
    assert_eq!(answer.resources.len(), 2);
    assert_eq!(
        certificate_of(&answer.resources[1].value),
        root.bundle.all_pem().into_bytes()
    );
    drop(serving);
    assert!(!path.exists());
}

#[tokio::test]
async fn delta_sends_what_is_new() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let (root, source) = (Root::new(), Source::empty());
    let first = root.svid();
    source.publish(Arc::clone(&first));
    let _serving = sds::serve(&path, &source).unwrap().unwrap();
    let mut client = connect(&path).await;
    let (requests, outgoing) = mpsc::channel(4);
    let subscribe = |names: &[&str]| DeltaDiscoveryRequest {
        resource_names_subscribe: names.iter().map(|name| (*name).to_owned()).collect(),
        ..DeltaDiscoveryRequest::default()
    };
    requests
        .send(subscribe(&["ROOTCA", "default", "unknown"]))
        .await
        .unwrap();
    let mut answers = client
        .delta_secrets(ReceiverStream::new(outgoing))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap();
    let names: Vec<_> = answer
        .resources
        .iter()
        .map(|resource| resource.name.as_str())
        .collect();
    assert_eq!(
        (names.as_slice(), answer.removed_resources),
        (&["ROOTCA", "default"][..], vec!["unknown".into()])
    );

    // The roots did not change, so only the certificate comes again.
    source.publish(root.svid());
    let answer = answers.message().await.unwrap().unwrap();
    let names: Vec<_> = answer
        .resources
        .iter()
        .map(|resource| resource.name.as_str())
        .collect();
    assert_eq!(
        (names.as_slice(), answer.removed_resources.len()),
        (&["default"][..], 0)
    );

    requests.send(subscribe(&["ROOTCA"])).await.unwrap();
    let answer = answers.message().await.unwrap().unwrap();
    assert_eq!(
        answer.resources[0].name, "ROOTCA",
        "a repeated subscription is told again"
    );
}

#[tokio::test]
async fn other_resources_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let source = Source::empty();
    let _serving = sds::serve(&path, &source).unwrap().unwrap();
    let mut client = connect(&path).await;
    let request = DiscoveryRequest {
        type_url: "x".into(),
        ..DiscoveryRequest::default()
    };
    let mut answers = client
        .stream_secrets(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        answers.message().await.unwrap_err().code(),
        tonic::Code::InvalidArgument
    );
    let request = DiscoveryRequest {
        resource_names: vec!["default".into()],
        ..DiscoveryRequest::default()
    };
    let refused = client.fetch_secrets(request).await.unwrap_err();
    assert_eq!(
        refused.code(),
        tonic::Code::Unavailable,
        "there is no certificate yet"
    );
}

/// A program that stands for Envoy: says what it was given, obeys SIGTERM.
fn stand_in(dir: &Path, script: &str) -> EnvoyArgs {
    let envoy = dir.join("envoy");
    fs::write(
        &envoy,
        format!("#!/bin/sh\ncd {}\n{script}\n", dir.display()),
    )
    .unwrap();
    fs::set_permissions(&envoy, fs::Permissions::from_mode(0o755)).unwrap();
    let bootstrap = dir.join("bootstrap.yaml");
    let socket = dir.join("run/socket");
    fs::write(
        &bootstrap,
        format!(
            "static_resources: {{clusters: [{{name: sds-grpc, load_assignment: {{endpoints: [{{lb_endpoints: \
             [{{endpoint: {{address: {{pipe: {{path: {}}}}}}}}}]}}]}}}}]}}",
            socket.display()
        ),
    )
    .unwrap();
    EnvoyArgs {
        envoy,
        bootstrap,
        concurrency: Some(2),
        base_id: None,
        extra: vec!["--log-level".into(), "warning".into()],
        drain_time: Duration::from_secs(1),
    }
}

#[tokio::test]
async fn the_exit_status_is_envoys() {
    let dir = tempfile::tempdir().unwrap();
    let args = stand_in(
        dir.path(),
        "echo \"$@\" > args; test -S run/socket || exit 9; exit 7",
    );
    let bootstrap = args.bootstrap.clone();
    let identity = Some(Source::empty());
    let status = run_envoy(args, identity, &Drain::new()).await.unwrap();
    assert_eq!(exit_code(status), 7);
    let given = fs::read_to_string(dir.path().join("args")).unwrap();
    let want = format!(
        "-c {} --concurrency 2 --disable-hot-restart --drain-strategy immediate --drain-time-s 1 \
         --log-level warning\n",
        bootstrap.display()
    );
    assert_eq!(given, want);
    assert!(!dir.path().join("run/socket").exists());
}

#[tokio::test]
async fn stopping_is_forwarded() {
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready");
    fs::create_dir(dir.path().join("run")).unwrap();
    // The fifo tells us that the trap is set; `wait` is interrupted by it at once.
    std::process::Command::new("mkfifo")
        .arg(&ready)
        .status()
        .unwrap();
    let script = "trap 'kill $!; exit 3' TERM; sleep 60 >/dev/null 2>&1 & echo > ready; wait";
    let args = EnvoyArgs {
        base_id: Some(5),
        ..stand_in(dir.path(), script)
    };
    let drain = Drain::new();
    let running = tokio::spawn({
        let drain = drain.clone();
        async move { run_envoy(args, None, &drain).await }
    });
    tokio::time::timeout(PATIENCE, tokio::fs::read(&ready))
        .await
        .unwrap()
        .unwrap();
    drain.begin();
    let status = tokio::time::timeout(PATIENCE, running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(exit_code(status), 3);
}

#[tokio::test]
async fn a_missing_program_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let args = EnvoyArgs {
        envoy: "/nonexistent/envoy".into(),
        ..stand_in(dir.path(), "")
    };
    let error = run_envoy(args, Some(Source::empty()), &Drain::new())
        .await
        .unwrap_err();
    assert!(matches!(error, AgentError::Start(..)), "{error}");
    assert!(!dir.path().join("run/socket").exists());
}

/// Envoy 1.40 as `make` installs it; `None`, loudly, where it is not.
fn envoy() -> Option<PathBuf> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/envoy");
    let program = std::env::var_os("ENVOY_BIN").map_or(installed, PathBuf::from);
    if !program.exists() {
        eprintln!(
            "SKIPPED: no Envoy at {}; `make test` installs it",
            program.display()
        );
        return None;
    }
    Some(program)
}

/// Envoy serves mutual TLS with what we give it, takes rotations without a restart, drains and ends.
#[tokio::test]
async fn envoy_itself_takes_our_secrets() {
    let Some(envoy) = envoy() else { return };
    lateen_service::init_crypto();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let bootstrap = dir.path().join("bootstrap.yaml");
    let sds = "{api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: \
               {cluster_name: sds-grpc}}]}, resource_api_version: V3}";
    // A listener on a Unix socket needs no free port to be guessed.
    let text = format!(
        "
node: {{id: test, cluster: test}}
admin: {{address: {{pipe: {{path: {admin}}}}}}}
static_resources:
  clusters:
  - name: sds-grpc
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        '@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment:
      cluster_name: sds-grpc
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{pipe: {{path: {socket}}}}}}}}}]}}]
  listeners:
  - name: tls
    address: {{pipe: {{path: {listener}}}}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            tls_certificate_sds_secret_configs: [{{name: default, sds_config: {sds}}}]
            validation_context_sds_secret_config: {{name: ROOTCA, sds_config: {sds}}}
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: http
          route_config:
            virtual_hosts:
            - name: all
              domains: ['*']
              routes: [{{match: {{prefix: /}}, direct_response: {{status: 200, body: {{inline_string: hello}}}}}}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
",
        admin = path("admin"),
        socket = path("run/socket"),
        listener = path("listener"),
    );
    fs::write(&bootstrap, text).unwrap();
    let args = EnvoyArgs {
        envoy,
        bootstrap,
        concurrency: Some(1),
        base_id: None,
        extra: vec!["--log-level".into(), "warning".into()],
        drain_time: Duration::from_secs(1),
    };
    let (root, source, drain) = (Root::new(), Source::empty(), Drain::new());
    let running = tokio::spawn({
        let (source, drain) = (source.clone(), drain.clone());
        async move { run_envoy(args, Some(source), &drain).await }
    });
    let first = root.svid();
    source.publish(Arc::clone(&first));
    let client = Source::empty();
    client.publish(root.svid());
    let listener = dir.path().join("listener");
    assert!(served(&listener, &client, &first).await);
    let second = root.svid();
    source.publish(Arc::clone(&second));
    assert!(served(&listener, &client, &second).await);
    drain.begin();
    let status = tokio::time::timeout(PATIENCE, running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(exit_code(status), 0);
}

/// Whether Envoy answers over mutual TLS, once it presents `want`. There is no event to wait for in a foreign
/// process, so this asks again until it does.
async fn served(listener: &Path, client: &Source, want: &Svid) -> bool {
    use lateen_identity::{
        PeerMatch, SpiffeServerVerifier, Trust, client_config, pki_types::ServerName,
    };
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let verifier = SpiffeServerVerifier::new(Trust::Live(client.cell()), PeerMatch::AnyTrusted);
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client_config(
        Some(client.cell()),
        verifier,
        &[],
    )));
    let attempt = async || -> io::Result<Option<bool>> {
        let stream = UnixStream::connect(listener).await?;
        let mut stream = connector
            .connect(ServerName::try_from("unused").unwrap(), stream)
            .await?;
        if stream.get_ref().1.peer_certificates() != Some(want.chain()) {
            return Ok(None);
        }
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .await?;
        let mut got = Vec::new();
        stream.read_to_end(&mut got).await?;
        Ok(Some(got.ends_with(b"hello")))
    };
    let asked = async {
        loop {
            match attempt().await {
                Ok(Some(got)) => return got,
                Ok(None) => {}
                Err(error) => eprintln!("not yet: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asked)
        .await
        .expect("Envoy presents the certificate")
}
