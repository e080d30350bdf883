use std::fmt::Write as _;

use envoy_types::pb::envoy::config::core::v3 as core;
use lateen_config::{ConfigSet, parse_file};
use proptest::prelude::*;
use tokio::time::Instant;

use super::*;
use crate::push::build;
use crate::serve::catalogs;

const PODS: usize = 5;
const SERVICES: [&str; 4] = ["web", "api", "headless", "listed"];

/// A small mesh, by what may change.
#[derive(Clone, Debug)]
struct Mesh {
    /// Bits: which pods answer for each service.
    ready: [u8; 4],
    /// Bits: which pods are of the second version.
    second: u8,
    timeout: u8,
    scoped: bool,
    plain: bool,
    rule: bool,
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            ready: [0b11, 0b111, 0b1, 0b10],
            second: 0b100,
            timeout: 1,
            scoped: false,
            plain: false,
            rule: true,
        }
    }
}

impl Mesh {
    fn change(&mut self, what: u8, value: u8) {
        match what {
            // Endpoints most of all.
            0..=7 => self.ready[usize::from(what % 4)] = value % 32,
            8 => self.second = value % 32,
            9 => self.timeout = value,
            10 => self.scoped = value.is_multiple_of(2),
            11 => self.plain = value.is_multiple_of(2),
            _ => self.rule = value.is_multiple_of(2),
        }
    }

    fn config(&self, generation: u64) -> ConfigSet {
        let mut mesh = String::new();
        let mut slices = String::new();
        for (index, service) in SERVICES.iter().enumerate() {
            let more = match *service {
                "headless" => "clusterIP: None, selector: { app: headless }".to_owned(),
                "listed" => "clusterIP: 10.100.0.9".to_owned(),
                _ => format!(
                    "clusterIP: 10.100.0.{}, selector: {{ app: {service} }}",
                    index + 1
                ),
            };
            write!(
                mesh,
                "---\napiVersion: v1\nkind: Service\nmetadata: {{ name: {service}, namespace: default }}\n\
                 spec: {{ {more}, ports: [{{ name: http, port: 80, targetPort: 8080 }}, {{ name: tcp, port: 90 }}] }}\n"
            )
            .unwrap();
            let ready = (0..PODS).filter(|pod| self.ready[index] >> pod & 1 == 1);
            let addresses: Vec<_> = ready
                .map(|pod| format!("{{ addresses: [10.0.0.{pod}] }}"))
                .collect();
            write!(
                slices,
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                 metadata: {{ name: {service}-a, namespace: default, labels: {{ kubernetes.io/service-name: {service} }} }}\n\
                 addressType: IPv4\nendpoints: [{}]\nports: [{{ name: http, port: 8080 }}, {{ name: tcp, port: 90 }}]\n",
                addresses.join(", ")
            )
            .unwrap();
        }
        for pod in 0..PODS {
            let version = 1 + (self.second >> pod & 1);
            write!(
                mesh,
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: p{pod}, namespace: default, labels: {{ app: web, version: v{version}, security.istio.io/tlsMode: istio }} }}\n\
                 spec: {{ serviceAccountName: a }}\n\
                 status: {{ podIP: 10.0.0.{pod}, phase: Running, conditions: [{{ type: Ready, status: \"True\" }}] }}\n"
            )
            .unwrap();
        }
        write!(
            mesh,
            "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: web, namespace: default }}\n\
             spec: {{ hosts: [web.default.svc.cluster.local], http: [{{ timeout: {}s, route: [{{ destination: {{ host: web.default.svc.cluster.local }} }}] }}] }}\n",
            self.timeout
        )
        .unwrap();
        if self.rule {
            mesh += "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: { name: api, namespace: default }\n\
                     spec: { host: api.default.svc.cluster.local, subsets: [{ name: v1, labels: { version: v1 } }, { name: v2, labels: { version: v2 } }] }\n";
        }
        if self.scoped {
            mesh += "---\napiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: { name: default, namespace: default }\n\
                     spec: { egress: [{ hosts: [\"./web.default.svc.cluster.local\"] }] }\n";
        }
        if self.plain {
            mesh += "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: { name: default, namespace: default }\n\
                     spec: { mtls: { mode: DISABLE } }\n";
        }
        let mut objects = Vec::new();
        for (file, text) in [("mesh.yaml", mesh), ("slices.yaml", slices)] {
            let (parsed, problems) = parse_file(file, &text);
            assert!(!problems.iter().any(|p| p.is_error()), "{problems:?}");
            objects.extend(parsed.into_iter().map(Arc::new));
        }
        ConfigSet {
            objects,
            problems: Vec::new(),
            generation,
        }
    }
}

fn nodes() -> Vec<Node> {
    [
        "sidecar~10.0.0.0~p0.default~default.svc.cluster.local",
        "sidecar~10.0.0.1~p1.default~default.svc.cluster.local",
        "sidecar~10.0.1.9~x.other~other.svc.cluster.local",
        "router~10.0.2.9~gateway.default~default.svc.cluster.local",
    ]
    .iter()
    .map(|id| {
        let raw = core::Node {
            id: (*id).to_owned(),
            ..core::Node::default()
        };
        Node::parse(Some(&raw)).unwrap()
    })
    .collect()
}

/// What a proxy gets of what nobody had before.
fn whole(served: &Served, node: &Node, encoder: &Encoder) -> Target {
    let (xds, conflicts) = catalogs(&served.snapshot, node, encoder);
    let mut all = served.generic.clone();
    all.extend(xds);
    Target {
        generation: served.snapshot.generation,
        catalogs: all,
        conflicts,
        endpoints_only: None,
    }
}

fn assert_same(refreshed: &Target, whole: &Target) {
    assert_eq!(refreshed.generation, whole.generation);
    assert_eq!(refreshed.conflicts, whole.conflicts);
    let kinds = |target: &Target| target.catalogs.keys().cloned().collect::<Vec<_>>();
    assert_eq!(kinds(refreshed), kinds(whole));
    for (kind, catalog) in &whole.catalogs {
        let versions = |catalog: &Catalog| {
            catalog
                .iter()
                .map(|(name, one)| (name.clone(), one.version.clone()))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            versions(&refreshed.catalogs[kind]),
            versions(catalog),
            "{kind:?}"
        );
    }
}

fn serve(mesh: &Mesh, before: Option<&Served>, encoder: &Encoder) -> Served {
    let generation = before.map_or(1, |before| before.snapshot.generation + 1);
    build(
        &mesh.config(generation),
        before,
        false,
        encoder,
        Instant::now(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever changes, and however many changes a proxy misses: what is made from what it had is what is computed
    /// from nothing, and nothing outside the named assignments differs.
    #[test]
    fn refreshed_is_what_computing_anew_gives(
        changes in proptest::collection::vec((0_u8..13, any::<u8>(), 0_u8..16), 1..12)
    ) {
        let encoder = Encoder::default();
        let mut mesh = Mesh::default();
        let mut served = serve(&mesh, None, &encoder);
        let nodes = nodes();
        let mut had: Vec<(u64, Target)> = nodes
            .iter()
            .map(|node| (served.revision, whole(&served, node, &encoder)))
            .collect();
        for (what, value, misses) in changes {
            mesh.change(what, value);
            served = serve(&mesh, Some(&served), &encoder);
            for (index, node) in nodes.iter().enumerate() {
                if misses >> index & 1 == 1 {
                    continue;
                }
                let (revision, before) = &had[index];
                let anew = whole(&served, node, &encoder);
                if let Some(target) = refresh(&served, node, *revision, before, &encoder) {
                    assert_same(&target, &anew);
                    let named = target.endpoints_only.as_ref().unwrap();
                    for (name, one) in &*target.catalogs[&Kind::Endpoint] {
                        let same = before.catalogs[&Kind::Endpoint]
                            .get(name)
                            .is_some_and(|old| old.version == one.version);
                        prop_assert!(same || named.contains(name));
                    }
                }
                had[index] = (served.revision, anew);
            }
        }
    }
}

#[test]
fn nothing_touches_nothing_and_pods_of_a_headless_service_touch_listeners() {
    let encoder = Encoder::default();
    let mesh = Mesh::default();
    let first = serve(&mesh, None, &encoder);
    let nodes = nodes();
    let had = whole(&first, &nodes[0], &encoder);
    let same = serve(&mesh, Some(&first), &encoder);
    let target = refresh(&same, &nodes[0], first.revision, &had, &encoder).unwrap();
    assert!(target.endpoints_only.unwrap().is_empty());

    let mut headless = mesh;
    headless.ready[2] = 0b10;
    let headless = serve(&headless, Some(&first), &encoder);
    assert!(refresh(&headless, &nodes[0], first.revision, &had, &encoder).is_none());
}

#[test]
fn proxies_that_had_the_same_share_what_is_made() {
    let encoder = Encoder::default();
    // Endpoints that no pod is known for: who they are does not change with how many they are.
    let config = |count: usize, generation| {
        let addresses: Vec<_> = (0..count)
            .map(|one| format!("{{ addresses: [10.9.0.{one}] }}"))
            .collect();
        let text = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{ name: web-a, namespace: default, labels: {{ kubernetes.io/service-name: web }} }}\n\
             addressType: IPv4\nendpoints: [{}]\nports: [{{ name: http, port: 8080 }}]\n",
            addresses.join(", ")
        );
        let service = "apiVersion: v1\nkind: Service\nmetadata: { name: web, namespace: default }\n\
             spec: { clusterIP: 10.100.0.1, selector: { app: web }, ports: [{ name: http, port: 80 }] }\n\
             ---\napiVersion: v1\nkind: Service\nmetadata: { name: api, namespace: default }\n\
             spec: { clusterIP: 10.100.0.2, selector: { app: api }, ports: [{ name: http, port: 80 }] }\n";
        let mut objects = parse_file("a.yaml", service).0;
        objects.extend(parse_file("b.yaml", &text).0);
        ConfigSet {
            objects: objects.into_iter().map(Arc::new).collect(),
            problems: Vec::new(),
            generation,
        }
    };
    let nodes = nodes();
    let first = build(&config(3, 1), None, false, &encoder, Instant::now());
    let second = build(&config(2, 2), Some(&first), false, &encoder, Instant::now());
    let third = build(
        &config(4, 3),
        Some(&second),
        false,
        &encoder,
        Instant::now(),
    );
    let mut made = Vec::new();
    for node in &nodes[..2] {
        let had = whole(&first, node, &encoder);
        // The second revision is missed.
        let target = refresh(&third, node, first.revision, &had, &encoder).unwrap();
        assert_same(&target, &whole(&third, node, &encoder));
        let named = target.endpoints_only.as_ref().unwrap();
        let web: Arc<str> = "outbound|80||web.default.svc.cluster.local".into();
        assert_eq!(**named, [web]);
        made.push(target.catalogs[&Kind::Endpoint].clone());
    }
    assert!(Arc::ptr_eq(&made[0], &made[1]));
}
