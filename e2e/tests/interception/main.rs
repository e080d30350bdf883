//! Interception by iptables: the real programs in network namespaces of the test's own, on the kernel's own tables.
//!
//! ```text
//!   outside 10.77.0.1 ── veth ── 10.77.0.2 pod: application, proxy as user 1337, `proxy iptables apply`
//! ```
//!
//! It needs root, and the packages iptables and iproute2; where they are not, it says so and does nothing.
#![cfg(test)]
#![cfg(target_os = "linux")]

mod namespace;
mod peer;

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use e2e::process::program;
use serde_json::json;
use tempfile::TempDir;

use namespace::{Child, Namespace};
use peer::{exchange, get};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Nobody here has a certificate, so none is waited for.
const CONFIG: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: 'enableAutoMtls: false'}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: DISABLE}}
---
apiVersion: v1
kind: Service
metadata: {name: remote, namespace: default}
spec:
  clusterIP: 10.96.0.10
  selector: {app: remote}
  ports:
  - {name: http, port: 80, targetPort: 8081}
  - {name: tcp, port: 9000, targetPort: 9001}
---
apiVersion: v1
kind: Service
metadata: {name: app, namespace: default}
spec:
  clusterIP: 10.96.0.12
  selector: {app: app}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: remote-0, namespace: default, labels: {app: remote}}
spec: {containers: [{name: app, image: none}]}
status: {phase: Running, podIP: 10.77.0.1, podIPs: [{ip: 10.77.0.1}], conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: app-0, namespace: default, labels: {app: app}}
spec: {containers: [{name: app, image: none, ports: [{containerPort: 8080}]}]}
status:
  phase: Running
  podIP: 10.77.0.2
  podIPs: [{ip: 10.77.0.2}, {ip: 'fd77::2'}]
  conditions: [{type: Ready, status: 'True'}]
";

/// Why nothing can be tested here.
fn obstacle() -> Option<String> {
    for tool in ["iptables-restore", "ip6tables-restore", "ip"] {
        let asked = std::process::Command::new(tool).arg("-V").output();
        if asked.is_err() {
            return Some(format!(
                "there is no program {tool}; install iptables and iproute2"
            ));
        }
    }
    let namespace = match Namespace::new() {
        Ok(namespace) => namespace,
        Err(error) => {
            return Some(format!(
                "no network namespace can be made, is this root? {error}"
            ));
        }
    };
    namespace
        .try_sh("iptables -t nat -A OUTPUT -p tcp -j REDIRECT --to-ports 1")
        .err()
        .map(|error| format!("the kernel has no NAT here: {error}"))
}

/// A pod beside the rest of the world, Pilot in the latter.
struct World {
    // In the order in which they end.
    _pilot: Child,
    outside: Namespace,
    pod: Namespace,
    folder: TempDir,
}

impl World {
    fn new() -> World {
        let (outside, pod) = (Namespace::new().unwrap(), Namespace::new().unwrap());
        outside.sh("ip link set lo up");
        outside.sh(&format!(
            "ip link add v0 type veth peer name eth0 netns {}",
            pod.id()
        ));
        for (side, link, own) in [(&outside, "v0", 1), (&pod, "eth0", 2)] {
            side.sh("ip link set lo up");
            side.sh(&format!("ip addr add 10.77.0.{own}/24 dev {link}"));
            side.sh(&format!("ip addr add fd77::{own}/64 dev {link} nodad"));
            side.sh(&format!("ip link set {link} up"));
        }
        // Virtual addresses have to lead somewhere, or connecting to them fails before anything is redirected.
        pod.sh("ip route add default via 10.77.0.1");

        let folder = tempfile::tempdir().unwrap();
        // The proxy is another user.
        open_to_all(folder.path());
        let config = folder.path().join("config");
        std::fs::create_dir(&config).unwrap();
        std::fs::write(config.join("all.yaml"), CONFIG).unwrap();
        let pilot = outside.start(
            program("pilot").unwrap(),
            vec!["--config-dir".to_owned(), config.display().to_string()],
            (0, 0),
            &folder.path().join("pilot.log"),
        );
        let ready = outside.clone();
        until("Pilot is ready", || {
            ready.run(|| get(addr("10.77.0.1:15014"), "pilot", "/healthz/ready").is_ok())
        });
        for (name, address) in [
            ("remote", "[::]:8081"),
            ("unknown", "[::]:7000"),
            ("excluded", "[::]:7001"),
        ] {
            outside.run(move || peer::serve_http(name, addr(address)));
        }
        outside.run(|| peer::serve_lines("remote", addr("0.0.0.0:9001")));
        for (name, address) in [
            ("app", "[::]:8080"),
            ("undeclared", "[::]:8090"),
            ("probed", "[::]:8099"),
        ] {
            pod.run(move || peer::serve_http(name, addr(address)));
        }
        World {
            _pilot: pilot,
            outside,
            pod,
            folder,
        }
    }

    /// Starts the proxy and waits until it serves.
    fn proxy(&self, path: PathBuf, mode: &str, owner: (u32, u32)) -> Child {
        let bootstrap = self.folder.path().join("bootstrap.json");
        let log = self.folder.path().join("proxy.log");
        std::fs::write(&bootstrap, bootstrap_of(mode).to_string()).unwrap();
        let proxy = self.pod.start(
            path,
            [
                "-c",
                &bootstrap.display().to_string(),
                "--concurrency",
                "1",
                "--disable-hot-restart",
            ]
            .map(str::to_owned)
            .to_vec(),
            owner,
            &log,
        );
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.pod_gets("127.0.0.1:15000", "admin", "/ready");
            if answer.is_some_and(|answer| answer.contains("200 OK")) {
                break;
            }
            let said = || std::fs::read_to_string(&log).unwrap_or_default();
            assert!(Instant::now() < deadline, "not ready: {}", said());
            std::thread::sleep(Duration::from_millis(50));
        }
        proxy
    }

    fn iptables(&self, arguments: &str) {
        let proxy = program("proxy").unwrap();
        self.pod
            .sh(&format!("{} iptables {arguments}", proxy.display()));
    }

    /// What is in the tables of the pod, without counters and dates.
    fn tables(&self) -> String {
        let everything =
            "iptables-save; ip6tables-save; ip rule; ip -6 rule; ip -6 addr show dev lo";
        let all = self.pod.sh(everything);
        all.lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split('[').next().unwrap_or_default())
            .fold(String::new(), |text, line| text + line + "\n")
    }

    /// What the application gets when it asks.
    fn pod_gets(&self, address: &str, host: &'static str, path: &'static str) -> Option<String> {
        let address = addr(address);
        self.pod.run(move || get(address, host, path).ok())
    }

    /// What a caller from outside gets.
    fn outside_gets(&self, address: &str) -> Option<String> {
        let address = addr(address);
        self.outside.run(move || get(address, "app", "/").ok())
    }

    fn counter(&self, name: &str) -> u64 {
        let page = self
            .pod_gets("127.0.0.1:15000", "admin", "/stats")
            .expect("statistics");
        let line = page.lines().find_map(|line| line.strip_prefix(name));
        let value = line.and_then(|rest| rest.strip_prefix(": ")).unwrap_or("0");
        value.parse().unwrap()
    }
}

fn open_to_all(folder: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn bootstrap_of(mode: &str) -> serde_json::Value {
    let socket =
        |ip: &str, port: u16| json!({"socket_address": {"address": ip, "port_value": port}});
    json!({
        "node": {
            "id": "sidecar~10.77.0.2~app-0.default~default.svc.cluster.local",
            "cluster": "app.default",
            "metadata": {
                "NAMESPACE": "default", "LABELS": {"app": "app"}, "INTERCEPTION_MODE": mode,
                "INSTANCE_IPS": "10.77.0.2,fd77::2", "CLUSTER_ID": "Kubernetes",
            },
        },
        "admin": {"address": socket("127.0.0.1", 15000)},
        "dynamic_resources": {
            "lds_config": {"ads": {}}, "cds_config": {"ads": {}},
            "ads_config": {
                "api_type": "DELTA_GRPC", "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}],
            },
        },
        "static_resources": {"clusters": [{
            "name": "xds-grpc", "type": "STATIC", "connect_timeout": "1s",
            "load_assignment": {"cluster_name": "xds-grpc", "endpoints": [{"lb_endpoints": [
                {"endpoint": {"address": socket("10.77.0.1", 15010)}},
            ]}]},
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": {"http2_protocol_options": {}},
                },
            },
        }]},
    })
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Who answered, from where the application saw the call come, and whether a proxy had its hands on it.
fn seen(answer: Option<String>) -> (String, Option<IpAddr>, bool) {
    let answer = answer.unwrap_or_default();
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let mut words = body.split_whitespace();
    let name = words.next().unwrap_or_default().to_owned();
    let peer = words.next().and_then(|word| word.strip_prefix("peer="));
    let proxied = body.to_ascii_lowercase().contains("x-request-id:");
    (name, peer.and_then(|ip| ip.parse().ok()), proxied)
}

fn saw(name: &str, peer: &str, proxied: bool) -> (String, Option<IpAddr>, bool) {
    (name.to_owned(), peer.parse().ok(), proxied)
}

/// The same for our proxy and for stock Envoy at `path`.
fn intercepts(path: PathBuf, mode: &str, owner: (u32, u32)) {
    if let Some(obstacle) = obstacle() {
        eprintln!("SKIPPED: interception is not tested here: {obstacle}");
        return;
    }
    let world = World::new();
    let before = world.tables();
    world.iptables(&format!(
        "apply --mode {mode} --exclude-inbound-ports 15090,15021,15020,8099 --exclude-outbound-ports 7001"
    ));
    let applied = world.tables();
    world.iptables(&format!(
        "apply --mode {mode} --exclude-inbound-ports 15090,15021,15020,8099 --exclude-outbound-ports 7001"
    ));
    assert_eq!(world.tables(), applied, "applied twice");
    // Nothing gets past a proxy that does not run.
    assert_eq!(world.pod_gets("10.77.0.1:7000", "unknown", "/"), None);
    assert_eq!(world.outside_gets("10.77.0.2:8080"), None);
    let _proxy = world.proxy(path, mode, owner);

    // Outbound: services by their virtual addresses, HTTP and TCP, and what no service has.
    let remote = world.pod_gets("10.96.0.10:80", "remote", "/");
    assert_eq!(seen(remote), saw("remote", "10.77.0.2", true));
    let line = world
        .pod
        .run(|| exchange(addr("10.96.0.10:9000"), "hello\n").ok());
    assert_eq!(line.as_deref(), Some("remote: hello\n"));
    for (address, want) in [("10.77.0.1:7000", 1), ("[fd77::1]:7000", 2)] {
        let (name, _, proxied) = seen(world.pod_gets(address, "unknown", "/"));
        assert_eq!((name.as_str(), proxied), ("unknown", false), "{address}");
        let passed = world.counter("cluster.PassthroughCluster.upstream_cx_total");
        assert_eq!(passed, want, "{address}");
    }
    let excluded = world.pod_gets("10.77.0.1:7001", "excluded", "/");
    assert_eq!(seen(excluded), saw("excluded", "10.77.0.2", false));
    assert_eq!(
        world.counter("cluster.PassthroughCluster.upstream_cx_total"),
        2
    );

    // Inbound: a declared port, one that is not, one that is excluded.
    let app = world.outside_gets("10.77.0.2:8080");
    assert_eq!(seen(app), saw("app", "127.0.0.6", true));
    let undeclared = world.outside_gets("10.77.0.2:8090");
    assert_eq!(seen(undeclared), saw("undeclared", "127.0.0.6", true));
    let probed = world.outside_gets("10.77.0.2:8099");
    assert_eq!(seen(probed), saw("probed", "10.77.0.1", false));
    let app = world.outside_gets("[fd77::2]:8080");
    assert_eq!(seen(app), saw("app", "::6", true));
    // Nobody talks to the catch-all itself.
    assert_eq!(world.outside_gets("10.77.0.2:15006"), None);

    // The application calls itself: by its service, through both ends of the proxy; by its address, through none.
    let itself = world.pod_gets("10.96.0.12:80", "app", "/");
    let requests = world.counter("cluster.inbound|8080||.upstream_rq_total");
    assert_eq!(seen(itself), saw("app", "127.0.0.6", true));
    assert_eq!(requests, 3, "two calls from outside and this one");
    let itself = world.pod_gets("10.77.0.2:8080", "app", "/");
    assert_eq!(seen(itself), saw("app", "10.77.0.2", false));

    world.iptables("clean");
    assert!(!world.tables().contains("ISTIO"), "{}", world.tables());
    // Empty tables that were not there before are the kernel's.
    let rest = |text: &str| -> Vec<String> {
        let lines = text
            .lines()
            .filter(|line| !line.starts_with([':', '*', 'C']));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(rest(&world.tables()), rest(&before));
    let app = world.outside_gets("10.77.0.2:8080");
    assert_eq!(seen(app), saw("app", "10.77.0.1", false));
}

#[test]
fn redirect_takes_what_it_should_and_nothing_else() {
    intercepts(program("proxy").unwrap(), "REDIRECT", (1337, 1337));
}

#[test]
fn stock_envoy_takes_the_same_from_the_same_pilot() {
    let Some(envoy) = std::env::var_os("ENVOY_BIN") else {
        eprintln!("SKIPPED: ENVOY_BIN is not set; `make test` installs Envoy and sets it");
        return;
    };
    intercepts(PathBuf::from(envoy), "REDIRECT", (1337, 1337));
}

#[test]
fn tproxy_takes_the_same() {
    // A transparent socket needs a capability, which comes with the user.
    intercepts(program("proxy").unwrap(), "TPROXY", (0, 1337));
}

#[test]
fn a_sidecar_without_a_bootstrap_answers_the_kubelet() {
    if let Some(obstacle) = obstacle() {
        eprintln!("SKIPPED: interception is not tested here: {obstacle}");
        return;
    }
    let world = World::new();
    world.iptables("apply");
    let probers = json!({
        "/app-health/app/readyz": {"httpGet": {"path": "ready", "port": 8080}},
        "/app-health/app/livez": {"tcpSocket": {"port": 8090}},
        "/app-health/app/startupz": {"tcpSocket": {"port": 1}},
    });
    let config = json!({"discoveryAddress": "10.77.0.1:15010", "concurrency": 1});
    let arguments = [
        "sidecar",
        "--pod-name",
        "app-0",
        "--pod-namespace",
        "default",
        "--instance-ip",
        "10.77.0.2",
        "--proxy-config",
        &config.to_string(),
        "--app-probers",
        &probers.to_string(),
    ];
    let _proxy = world.pod.start(
        program("proxy").unwrap(),
        arguments.map(str::to_owned).to_vec(),
        (1337, 1337),
        &world.folder.path().join("proxy.log"),
    );
    let waited = format!("{} wait --timeout 20", program("proxy").unwrap().display());
    world.pod.sh(&waited);
    // The kubelet is outside of the pod.
    let status = |address: &str, path: &'static str| {
        let address = addr(address);
        let answer = world
            .outside
            .run(move || get(address, "kubelet", path).ok());
        answer.and_then(|answer| answer.get(9..12)?.parse::<u16>().ok())
    };
    for (address, path, want) in [
        ("10.77.0.2:15021", "/healthz/ready", 200),
        ("10.77.0.2:15020", "/app-health/app/readyz", 200),
        ("10.77.0.2:15020", "/app-health/app/livez", 200),
        ("10.77.0.2:15020", "/app-health/app/startupz", 500),
        ("10.77.0.2:15020", "/app-health/other/readyz", 404),
        ("10.77.0.2:15090", "/stats/prometheus", 200),
    ] {
        assert_eq!(status(address, path), Some(want), "{address}{path}");
    }
    // And it is a proxy like any other.
    let app = world.outside_gets("10.77.0.2:8080");
    assert_eq!(seen(app), saw("app", "127.0.0.6", true));
}

#[test]
fn a_proxy_that_may_not_be_transparent_says_what_it_lacks() {
    if let Some(obstacle) = obstacle() {
        eprintln!("SKIPPED: interception is not tested here: {obstacle}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    open_to_all(folder.path());
    let pod = Namespace::new().unwrap();
    pod.sh("ip link set lo up");
    let bootstrap = json!({"static_resources": {"listeners": [{
        "name": "in", "transparent": true,
        "address": {"socket_address": {"address": "0.0.0.0", "port_value": 15006}},
        "filter_chains": [{"filters": [{"name": "echo", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo",
        }}]}],
    }]}});
    let arguments = vec!["--config-yaml".to_owned(), bootstrap.to_string()];
    let log: PathBuf = folder.path().join("proxy.log");
    let _proxy = pod.start(program("proxy").unwrap(), arguments, (1337, 1337), &log);
    until("it says so", || {
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        said.contains("needs the capability CAP_NET_ADMIN or CAP_NET_RAW")
    });
}
