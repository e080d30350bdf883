//! A25–A27: TLS at the ingress gateway, with certificates from Secrets, asked for by curl.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use e2e::{app, mesh::Mesh, workload::Workload};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::support::{empty, eventually};

/// What curl says of a refused client certificate: no handshake, or, as a client of TLS 1.3 believes to be done
/// before it is told, nothing sent or received.
const REFUSED: [i32; 3] = [-35, -55, -56];

/// An authority of one's own.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new(name: &str) -> anyhow::Result<Authority> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        // A leaf whose issuer has its own name would look as if it had signed itself.
        let names = &mut params.distinguished_name;
        names.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key)?.pem();
        Ok(Authority {
            issuer: Issuer::new(params, key),
            pem,
        })
    }

    /// Certificate and key for a name, PEM.
    fn issue(&self, name: &str) -> anyhow::Result<(String, String)> {
        let key = KeyPair::generate()?;
        let params = CertificateParams::new(vec![name.to_owned()])?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

/// A Secret where the gateway runs.
fn secret(name: &str, values: &[(&str, &str)]) -> String {
    secret_in("istio-system", name, values)
}

fn secret_in(namespace: &str, name: &str, values: &[(&str, &str)]) -> String {
    let values: serde_json::Map<_, _> = values
        .iter()
        .map(|(key, pem)| ((*key).to_owned(), serde_json::json!(pem)))
        .collect();
    let object = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace},
        "stringData": values,
    });
    format!("{object}\n")
}

/// A Gateway with these servers.
fn gateway(servers: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1alpha3
kind: Gateway
metadata: {{ name: gateway }}
spec:
  selector: {{ istio: ingressgateway }}
  servers:
{servers}"
    )
}

/// A server on port 443.
fn server(host: &str, tls: &str) -> String {
    format!(
        "  - port: {{ number: 443, name: https-{}, protocol: HTTPS }}
    hosts: [{host}]
    tls: {tls}
",
        host.replace('.', "-")
    )
}

/// curl at the gateway's TLS port.
#[derive(Clone)]
struct Curl {
    gateway: String,
    folder: PathBuf,
}

impl Curl {
    /// Writes a file for curl to read.
    fn file(&self, name: &str, text: &str) -> anyhow::Result<String> {
        let path = self.folder.join(name);
        std::fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    }

    /// The status, or curl's exit code as a negative number.
    async fn ask(&self, host: &str, path: &str, options: &[&str]) -> anyhow::Result<i32> {
        let output = tokio::process::Command::new("curl")
            .args(["--silent", "--max-time", "10", "--output", "/dev/null"])
            .args(["--write-out", "%{http_code}"])
            .args(["--resolve", &format!("{host}:8443:{}", self.gateway)])
            .args(options)
            .arg(format!("https://{host}:8443{path}"))
            .output()
            .await
            .context("these tests need curl")?;
        match output.status.code() {
            Some(0) => Ok(String::from_utf8(output.stdout)?.parse()?),
            code => Ok(-code.unwrap_or(1)),
        }
    }
}

/// A mesh with `httpbin` behind the gateway, for two host names.
async fn httpbin() -> anyhow::Result<(Mesh, Curl, app::App)> {
    let (mut mesh, _) = empty().await?;
    let instance = mesh.add(Workload::new("httpbin", &[("app", "httpbin")], 8000), false)?;
    let address = SocketAddr::from((instance.address.ip, instance.workload.app_port(8000)));
    let app = app::httpbin(address, "v1").await?;
    mesh.ready().await?;
    let routes = "apiVersion: v1
kind: Service
metadata: { name: httpbin }
spec:
  selector: { app: httpbin }
  ports: [{ name: http, port: 8000 }]
---
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: { name: httpbin }
spec:
  hosts: [httpbin.example.com, other.example.com]
  gateways: [gateway]
  http: [{ route: [{ destination: { host: httpbin, port: { number: 8000 } } }] }]
";
    mesh.apply("httpbin.yaml", routes).await?;
    let gateway = mesh.gateway_url();
    let gateway = gateway
        .trim_start_matches("http://")
        .trim_end_matches(":8080");
    let curl = Curl {
        gateway: gateway.to_owned(),
        folder: mesh.folder().to_owned(),
    };
    Ok((mesh, curl, app))
}

#[tokio::test]
async fn a25_a26_certificates_by_name_and_new_ones_without_a_lost_request() -> anyhow::Result<()> {
    let (mut mesh, curl, _app) = httpbin().await?;
    let (host, other) = ("httpbin.example.com", "other.example.com");
    let (old, new, third) = (
        Authority::new("old")?,
        Authority::new("new")?,
        Authority::new("third")?,
    );
    let servers = [
        server(host, "{ mode: SIMPLE, credentialName: httpbin-credential }"),
        server(other, "{ mode: SIMPLE, credentialName: other-credential }"),
    ];
    let (certificate, key) = third.issue(other)?;
    let values = [("tls.crt", certificate.as_str()), ("tls.key", &key)];
    mesh.apply("other.yaml", &secret("other-credential", &values))
        .await?;
    let (certificate, key) = old.issue(host)?;
    let values = [("tls.crt", certificate.as_str()), ("tls.key", &key)];
    mesh.apply("secret.yaml", &secret("httpbin-credential", &values))
        .await?;
    mesh.apply("gateway.yaml", &gateway(&servers.concat()))
        .await?;
    let old_ca = curl.file("old.pem", &old.pem)?;
    let new_ca = curl.file("new.pem", &new.pem)?;
    let third_ca = curl.file("third.pem", &third.pem)?;
    let either = curl.file("either.pem", &format!("{}{}", old.pem, new.pem))?;
    eventually(Duration::from_secs(10), async || {
        let status = curl
            .ask(host, "/status/418", &["--cacert", &old_ca])
            .await?;
        anyhow::ensure!(status == 418, "{status}");
        Ok(())
    })
    .await?;
    // Each name has its own certificate.
    for (name, authority, expected) in [
        (other, &third_ca, 418),
        (other, &old_ca, -60),
        (host, &third_ca, -60),
    ] {
        let status = curl
            .ask(name, "/status/418", &["--cacert", authority])
            .await?;
        assert_eq!(status, expected, "{name} with {authority}");
    }

    let stop = Arc::new(AtomicBool::new(false));
    let load = {
        let (curl, stop, either) = (curl.clone(), stop.clone(), either.clone());
        tokio::spawn(async move {
            let mut answers = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                answers.push(curl.ask(host, "/status/418", &["--cacert", &either]).await);
            }
            answers
        })
    };
    let (certificate, key) = new.issue(host)?;
    let values = [("tls.crt", certificate.as_str()), ("tls.key", &key)];
    mesh.apply("secret.yaml", &secret("httpbin-credential", &values))
        .await?;
    eventually(Duration::from_secs(5), async || {
        let status = curl
            .ask(host, "/status/418", &["--cacert", &new_ca])
            .await?;
        anyhow::ensure!(status == 418, "{status}");
        Ok(())
    })
    .await?;
    assert_eq!(
        curl.ask(host, "/status/418", &["--cacert", &old_ca])
            .await?,
        -60
    );
    stop.store(true, Ordering::Relaxed);
    let answers: Vec<i32> = load.await?.into_iter().collect::<anyhow::Result<_>>()?;
    assert!(answers.iter().all(|answer| *answer == 418), "{answers:?}");

    // What is no key, or not the certificate's, changes nothing.
    let (_, foreign) = new.issue(host)?;
    for (key, reason) in [
        ("not a key", "stringData.tls.key: not PEM"),
        (foreign.as_str(), "kubernetes://httpbin-credential"),
    ] {
        let values = [("tls.crt", certificate.as_str()), ("tls.key", key)];
        let refused = mesh
            .apply("secret.yaml", &secret("httpbin-credential", &values))
            .await;
        let refused = format!("{:#}", refused.err().context("it was taken")?);
        assert!(refused.contains(reason), "{refused}");
        assert!(!refused.contains("BEGIN") && !refused.contains("not a key"));
        let status = curl
            .ask(host, "/status/418", &["--cacert", &new_ca])
            .await?;
        assert_eq!(status, 418, "{reason}");
    }
    // No page of Pilot shows a key.
    let client = e2e::http::Client::new();
    for page in ["configz", "config_dump", "syncz?resources", "registryz"] {
        let url = format!("{}/debug/{page}", mesh.pilot_url());
        let text = client.get(&url).await?.text();
        assert!(!text.contains("PRIVATE KEY"), "{page} shows a key");
    }
    Ok(())
}

/// `openssl s_server`, ended when dropped.
struct Backend(Child);

impl Backend {
    fn start(
        folder: &Path,
        address: SocketAddr,
        certificate: &str,
        key: &str,
    ) -> anyhow::Result<Self> {
        let (certificate_file, key_file) = (folder.join("backend.pem"), folder.join("backend.key"));
        std::fs::write(&certificate_file, certificate)?;
        std::fs::write(&key_file, key)?;
        let child = Command::new("openssl")
            .args(["s_server", "-www", "-quiet", "-accept"])
            .arg(address.to_string())
            .arg("-cert")
            .arg(certificate_file)
            .arg("-key")
            .arg(key_file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("these tests need openssl")?;
        Ok(Backend(child))
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // It may have ended already.
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

#[tokio::test]
async fn a27_client_certificates_passed_through_tls_and_plain_tcp() -> anyhow::Result<()> {
    let (mut mesh, curl, _app) = httpbin().await?;
    let host = "httpbin.example.com";
    let (authority, clients) = (Authority::new("servers")?, Authority::new("clients")?);
    let ca = curl.file("ca.pem", &authority.pem)?;
    let (certificate, key) = authority.issue(host)?;
    let values = [
        ("tls.crt", certificate.as_str()),
        ("tls.key", &key),
        ("ca.crt", &clients.pem),
    ];
    mesh.apply("secret.yaml", &secret("httpbin-credential", &values))
        .await?;
    let mutual = server(host, "{ mode: MUTUAL, credentialName: httpbin-credential }");
    mesh.apply("gateway.yaml", &gateway(&mutual)).await?;
    let (certificate, key) = clients.issue("client")?;
    let own = [
        "--cacert",
        &ca,
        "--cert",
        &curl.file("client.pem", &certificate)?,
        "--key",
        &curl.file("client.key", &key)?,
    ];
    eventually(Duration::from_secs(10), async || {
        let status = curl.ask(host, "/status/418", &own).await?;
        anyhow::ensure!(status == 418, "{status}");
        Ok(())
    })
    .await?;
    let without = curl.ask(host, "/status/418", &["--cacert", &ca]).await?;
    assert!(REFUSED.contains(&without), "{without}");
    let (certificate, key) = authority.issue("client")?;
    let foreign = [
        "--cacert",
        &ca,
        "--cert",
        &curl.file("foreign.pem", &certificate)?,
        "--key",
        &curl.file("foreign.key", &key)?,
    ];
    let status = curl.ask(host, "/status/418", &foreign).await?;
    assert!(REFUSED.contains(&status), "{status}");

    // Passed through: the certificate is the backend's.
    let nginx = Authority::new("nginx")?;
    let instance = mesh.add(Workload::new("nginx", &[("app", "nginx")], 9443), false)?;
    let address = SocketAddr::from((instance.address.ip, instance.workload.app_port(9443)));
    let (certificate, key) = nginx.issue("nginx.example.com")?;
    let _backend = Backend::start(&curl.folder, address, &certificate, &key)?;
    let echo = mesh.add(Workload::new("echo", &[("app", "echo")], 9000), false)?;
    let address = SocketAddr::from((echo.address.ip, echo.workload.app_port(9000)));
    let _echo = app::tcp_echo(address, "one").await?;
    mesh.ready().await?;
    let routes = "apiVersion: v1
kind: Service
metadata: { name: nginx }
spec:
  selector: { app: nginx }
  ports: [{ name: tls, port: 9443 }]
---
apiVersion: v1
kind: Service
metadata: { name: echo }
spec:
  selector: { app: echo }
  ports: [{ name: tcp, port: 9000 }]
---
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: { name: nginx }
spec:
  hosts: [nginx.example.com]
  gateways: [gateway]
  tls:
  - match: [{ port: 443, sniHosts: [nginx.example.com] }]
    route: [{ destination: { host: nginx, port: { number: 9443 } } }]
---
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: { name: echo }
spec:
  hosts: ['*']
  gateways: [gateway]
  tcp:
  - match: [{ port: 31400 }]
    route: [{ destination: { host: echo, port: { number: 9000 } } }]
";
    mesh.apply("routes.yaml", routes).await?;
    let servers = gateway(
        "  - port: { number: 443, name: tls, protocol: TLS }
    hosts: [nginx.example.com]
    tls: { mode: PASSTHROUGH }
  - port: { number: 31400, name: tcp, protocol: TCP }
    hosts: ['*']
",
    );
    mesh.apply("gateway.yaml", &servers).await?;
    let nginx_ca = curl.file("nginx.pem", &nginx.pem)?;
    eventually(Duration::from_secs(10), async || {
        let status = curl
            .ask("nginx.example.com", "/", &["--cacert", &nginx_ca])
            .await?;
        anyhow::ensure!(status == 200, "{status}");
        Ok(())
    })
    .await?;
    let status = curl
        .ask("nginx.example.com", "/", &["--cacert", &ca])
        .await?;
    assert_eq!(status, -60, "not the backend's certificate");

    let mut stream = tokio::net::TcpStream::connect(format!("{}:31400", curl.gateway)).await?;
    stream.write_all(b"hello").await?;
    let mut answer = [0; 9];
    stream.read_exact(&mut answer).await?;
    assert_eq!(&answer, b"one hello");
    Ok(())
}

const SECURE_ROUTES: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: secure }
spec:
  gatewayClassName: istio
  listeners:
  - name: api
    port: 443
    protocol: HTTPS
    hostname: api.example.com
    tls: { certificateRefs: [{ name: api, namespace: certs }] }
  - name: through
    port: 443
    protocol: TLS
    hostname: nginx.example.com
    tls: { mode: Passthrough }
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: api }
spec:
  parentRefs: [{ name: secure, sectionName: api }]
  rules:
  - matches: [{ path: { value: /status } }]
    backendRefs: [{ name: httpbin, port: 8000 }]
  - matches: [{ path: { value: /nginx } }]
    filters: [{ type: URLRewrite, urlRewrite: { path: { type: ReplaceFullPath, replaceFullPath: / } } }]
    backendRefs: [{ name: nginx, port: 9443 }]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: { name: through }
spec:
  parentRefs: [{ name: secure, sectionName: through }]
  hostnames: [nginx.example.com]
  rules: [{ backendRefs: [{ name: through, port: 9443 }] }]
---
apiVersion: v1
kind: Service
metadata: { name: nginx }
spec:
  selector: { app: nginx }
  ports: [{ name: tls, port: 9443 }]
---
apiVersion: v1
kind: Service
metadata: { name: through }
spec:
  selector: { app: nginx }
  ports: [{ name: tls, port: 9443 }]
";

/// From Gateways of one namespace to the Secrets of another.
const GRANT: &str = "
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: { name: gateways, namespace: certs }
spec:
  from: [{ group: gateway.networking.k8s.io, kind: Gateway, namespace: default }]
  to: [{ group: '', kind: Secret }]
";

/// A backend is to be spoken to by TLS, and be of this authority.
fn backend_policy(authority: &Authority) -> String {
    let map = serde_json::json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "backends"},
        "data": {"ca.crt": authority.pem},
    });
    format!(
        "{map}
---
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {{ name: nginx }}
spec:
  targetRefs: [{{ group: '', kind: Service, name: nginx }}]
  validation:
    hostname: nginx.example.com
    caCertificateRefs: [{{ group: '', kind: ConfigMap, name: backends }}]
"
    )
}

#[tokio::test]
async fn gateway_api_certificates_by_grant_and_tls_to_backends() -> anyhow::Result<()> {
    let (mut mesh, curl, _app) = httpbin().await?;
    let instance = mesh.add(Workload::new("nginx", &[("app", "nginx")], 9443), false)?;
    let address = SocketAddr::from((instance.address.ip, instance.workload.app_port(9443)));
    let (front, back) = (Authority::new("front")?, Authority::new("back")?);
    let (certificate, key) = back.issue("nginx.example.com")?;
    let _backend = Backend::start(&curl.folder, address, &certificate, &key)?;
    mesh.ready().await?;
    let host = "api.example.com";
    let (certificate, key) = front.issue(host)?;
    let values = [("tls.crt", certificate.as_str()), ("tls.key", &key)];
    mesh.apply("secret.yaml", &secret_in("certs", "api", &values))
        .await?;
    mesh.apply("grant.yaml", GRANT).await?;
    mesh.apply("secure.yaml", SECURE_ROUTES).await?;
    mesh.apply("policy.yaml", &backend_policy(&back)).await?;
    let front_ca = curl.file("front.pem", &front.pem)?;
    let back_ca = curl.file("back.pem", &back.pem)?;
    let expect = async |name: &str, path: &str, ca: &str, expected: i32| {
        eventually(Duration::from_secs(10), async || {
            let status = curl.ask(name, path, &["--cacert", ca]).await?;
            anyhow::ensure!(status == expected, "{name}{path}: {status}");
            Ok(())
        })
        .await
    };
    expect(host, "/status/418", &front_ca, 418).await?;
    expect(host, "/other", &front_ca, 404).await?;
    // Passed through as it came; or taken up at the gateway and sealed anew.
    expect("nginx.example.com", "/", &back_ca, 200).await?;
    expect(host, "/nginx", &front_ca, 200).await?;

    // A backend of another authority is not spoken to.
    mesh.apply("policy.yaml", &backend_policy(&front)).await?;
    expect(host, "/nginx", &front_ca, 503).await?;

    // What is not granted any more is not served, and takes nothing else along.
    mesh.delete("grant.yaml").await?;
    eventually(Duration::from_secs(10), async || {
        let status = curl
            .ask(host, "/status/418", &["--cacert", &front_ca])
            .await?;
        anyhow::ensure!(REFUSED.contains(&status), "{status}");
        Ok(())
    })
    .await?;
    expect("nginx.example.com", "/", &back_ca, 200).await
}
