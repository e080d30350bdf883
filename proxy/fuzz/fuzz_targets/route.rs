//! A request's path and host against every kind of path match and rewrite, and path normalization.
#![no_main]

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use lateen_protocols::{envoy::envoy::config::route::v3::RouteConfiguration, json};
use libfuzzer_sys::fuzz_target;
use proxy::{
    cluster::ClusterManager,
    drain::Drain,
    head::{Headers, Known, Protocol, RequestHead},
    http::mutate::normalize_path,
    route::{
        Action, RouteSlots, RouteTable,
        matcher::{cookie, query_parameter},
    },
    secret::SecretStore,
    shared::Shared,
    stats::Registry,
};

const ROUTES: &str = r#"
virtual_hosts:
- name: exact
  domains: ["a.test", "a.test:80"]
  routes:
  - { match: { path: "/exact", query_parameters: [{ name: q, string_match: { prefix: "x" } }] }, direct_response: { status: 200 } }
  - { match: { prefix: "/moved/" }, redirect: { prefix_rewrite: "/", strip_query: true } }
  - { match: { path_separated_prefix: "/sep" }, route: { cluster: c, prefix_rewrite: "/" } }
  - match: { safe_regex: { regex: "/r/[^/]+/(.*)" } }
    route: { cluster: c, regex_rewrite: { pattern: { regex: "^/r/([^/]+)" }, substitution: "/\\1" } }
- name: suffix
  domains: ["*.a.test"]
  routes: [{ match: { prefix: "/", case_sensitive: false }, redirect: { https_redirect: true, port_redirect: 1 } }]
- name: prefix
  domains: ["a.*"]
  routes: [{ match: { prefix: "/p" }, route: { cluster: c, prefix_rewrite: "/longer/than/before" } }]
- name: any
  domains: ["*"]
  routes: [{ match: { prefix: "/", headers: [{ name: cookie, present_match: true }] }, route: { cluster: c } }]
"#;

fn table() -> &'static Arc<RouteTable> {
    static TABLE: OnceLock<(tokio::runtime::Runtime, Arc<RouteTable>)> = OnceLock::new();
    let (_, table) = TABLE.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime");
        let shared = Shared {
            stats: Registry::new(),
            clusters: ClusterManager::new(),
            routes: RouteSlots::default(),
            secrets: SecretStore::new(),
            drain: Drain::new(std::time::Duration::from_secs(1)),
            node: Default::default(),
            layers: Default::default(),
            runtime: runtime.handle().clone(),
        };
        let config: RouteConfiguration = json::from_yaml(ROUTES).expect("routes in YAML");
        let table = RouteTable::compile(&config, &shared).expect("valid routes");
        (runtime, Arc::new(table))
    });
    table
}

/// Of a stray `%`, unescaping what follows may make an escape (`%%341`), in Envoy as here.
fn is_well_escaped(path: &[u8]) -> bool {
    path.split(|byte| *byte == b'%')
        .skip(1)
        .all(|after| after.len() >= 2 && after[..2].iter().all(u8::is_ascii_hexdigit))
}

fuzz_target!(|data: &[u8]| {
    // Host, path, cookie; each up to a line end.
    let mut lines = data.splitn(3, |byte| *byte == b'\n');
    let mut next = || Bytes::copy_from_slice(lines.next().unwrap_or_default());
    let (authority, path, cookies) = (next(), next(), next());
    if let Some(normal) = normalize_path(&path)
        && is_well_escaped(&path)
    {
        // What is normal stays: otherwise a second hop would see another path than the first one allowed.
        assert_eq!(normalize_path(&normal), Some(normal));
    }
    let mut headers = Headers::default();
    headers.append(Known::Cookie, cookies);
    let mut head = RequestHead {
        method: "GET".into(),
        scheme: "http".into(),
        authority,
        path,
        protocol: Protocol::Http11,
        headers,
    };
    cookie(&head.headers, "a");
    query_parameter(head.query().unwrap_or_default(), b"q");
    if let Ok(selected) = table().select(&head, None, false) {
        if let Action::Redirect(redirect) = &selected.route().action {
            redirect.location(selected.route(), &head);
        }
        selected.target(&head);
        selected.rewrite(&mut head, false);
    }
});
