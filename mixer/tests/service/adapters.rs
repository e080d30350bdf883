//! The built-in adapters on YAML cases, and listchecker against a provider.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use http_body_util::Full;
use hyper::{Response, body::Bytes, service::service_fn};
use hyper_util::rt::TokioIo;
use lateen_adapter::{Adapter, Clock, kit::Kit, workload::Workload};
use mixer::{
    adapter::{
        denier::Denier,
        keyval::KeyVal,
        kubernetesenv::KubernetesEnv,
        listchecker::ListChecker,
        memquota::MemQuota,
        opa::Opa,
        prometheus::{Exposition, Prometheus},
        redisquota::RedisQuota,
        stdio::Stdio,
    },
    workloads::WorkloadView,
};
use tokio::{net::TcpListener, sync::watch};

use crate::support::{Mesh, map, told};

async fn run(kit: Kit, cases: &str) {
    assert_eq!(kit.run(cases).await.unwrap(), [""; 0]);
}

#[tokio::test]
async fn cases() {
    let exposition = Arc::new(Exposition::new(Clock::manual()));
    let adapters: Vec<(Arc<dyn Adapter>, &str)> = vec![
        (
            Arc::new(Denier),
            include_str!("../../testdata/adapter/denier.yaml"),
        ),
        (
            Arc::new(ListChecker),
            include_str!("../../testdata/adapter/listchecker.yaml"),
        ),
        (
            Arc::new(MemQuota),
            include_str!("../../testdata/adapter/memquota.yaml"),
        ),
        (
            Arc::new(KeyVal),
            include_str!("../../testdata/adapter/keyval.yaml"),
        ),
        (
            Arc::new(Opa),
            include_str!("../../testdata/adapter/opa.yaml"),
        ),
        (
            Arc::new(RedisQuota),
            include_str!("../../testdata/adapter/redisquota.yaml"),
        ),
        (
            Arc::new(Prometheus::new(exposition)),
            include_str!("../../testdata/adapter/prometheus.yaml"),
        ),
        (
            Arc::new(Stdio::default()),
            include_str!("../../testdata/adapter/stdio.yaml"),
        ),
    ];
    for (adapter, cases) in adapters {
        run(Kit::new(adapter), cases).await;
    }
    let view = WorkloadView::default();
    view.replace([Workload {
        uid: "kubernetes://a-1.ns".into(),
        ip: Some([10, 0, 0, 1].into()),
        name: "a-1".into(),
        namespace: "ns".into(),
        labels: [("app".to_owned(), "a".to_owned())].into(),
        service_account: "sa".into(),
        workload_name: "a".into(),
        workload_namespace: "ns".into(),
        owner: "kubernetes://apis/apps/v1/namespaces/ns/deployments/a".into(),
        containers: vec![lateen_adapter::workload::Container {
            name: "main".into(),
            ports: vec![9080],
        }],
        ..Workload::default()
    }]);
    let kit = Kit::new(Arc::new(KubernetesEnv)).with_workloads(Arc::new(view));
    run(
        kit,
        include_str!("../../testdata/adapter/kubernetesenv.yaml"),
    )
    .await;
}

#[tokio::test]
async fn a_list_is_fetched_and_refreshed() {
    let (list, served) = watch::channel("v1\nv2\n");
    let (fetched, mut fetches) = watch::channel(0);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (served, fetched) = (served.clone(), fetched.clone());
            let service = service_fn(move |_| {
                let body = *served.borrow();
                fetched.send_modify(|count| *count += 1);
                async move { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(body)))) }
            });
            let io = TokioIo::new(stream);
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
        }
    });
    let rules = format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: listchecker
metadata: {{ name: remote, namespace: istio-system }}
spec: {{ providerUrl: "http://{address}/list", refreshInterval: 1s, ttl: 60s, overrides: [ always ] }}
---
apiVersion: config.istio.io/v1alpha2
kind: listentry
metadata: {{ name: version, namespace: istio-system }}
spec: {{ value: 'source.labels["version"] | ""' }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: versions, namespace: istio-system }}
spec: {{ actions: [ {{ handler: remote.listchecker, instances: [ version.listentry ] }} ] }}
"#
    );
    let mut mesh = Mesh::start(&[("rules.yaml", &rules)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let version = |v: &str| [("source.labels", map(&[("version", v)]))];
    // The first check waits for the first fetch.
    assert_eq!(told(&mesh.check(&version("v2")).await), "OK:");
    assert_eq!(told(&mesh.check(&version("always")).await), "OK:");
    let denied = "PERMISSION_DENIED:remote.listchecker.istio-system:v3 is not whitelisted";
    assert_eq!(told(&mesh.check(&version("v3")).await), denied);
    list.send_replace("v3\n");
    let seen = *fetches.borrow();
    // The fetch after the next begins only when the next one's list is in place.
    fetches.wait_for(|count| *count >= seen + 2).await.unwrap();
    assert_eq!(told(&mesh.check(&version("v3")).await), "OK:");
}

#[tokio::test]
async fn a_list_outlives_its_provider_until_its_ttl_ends() {
    let fetches = std::sync::atomic::AtomicU32::new(0);
    let (address, mut asked) = crate::collector::listen(move |_| {
        match fetches.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            0 => 200, // an empty list
            _ => 500,
        }
    })
    .await;
    let rules = format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: listchecker
metadata: {{ name: remote, namespace: istio-system }}
spec: {{ providerUrl: "http://{address}/list", refreshInterval: 1s, ttl: 3s, blacklist: true }}
---
apiVersion: config.istio.io/v1alpha2
kind: listentry
metadata: {{ name: version, namespace: istio-system }}
spec: {{ value: '"v1"' }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: versions, namespace: istio-system }}
spec: {{ actions: [ {{ handler: remote.listchecker, instances: [ version.listentry ] }} ] }}
"#
    );
    let mut mesh = Mesh::start(&[("rules.yaml", &rules)]).await;
    let begun = Instant::now();
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
    for _ in 0..2 {
        asked.recv().await.unwrap();
    }
    // The second fetch has failed; the first one's list is still used.
    let answer = told(&mesh.check(&[]).await);
    if begun.elapsed() < Duration::from_secs(2) {
        assert_eq!(answer, "OK:");
    }
    loop {
        let answer = told(&mesh.check(&[]).await);
        if answer.starts_with("UNAVAILABLE:") {
            assert!(
                begun.elapsed() >= Duration::from_secs(2),
                "{:?}",
                begun.elapsed()
            );
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{answer}");
    }
}

#[tokio::test]
async fn no_list_is_no_allowance() {
    let rules = r#"
apiVersion: config.istio.io/v1alpha2
kind: listchecker
metadata: { name: remote, namespace: istio-system }
spec: { providerUrl: "http://127.0.0.1:1/list", blacklist: true }
---
apiVersion: config.istio.io/v1alpha2
kind: listentry
metadata: { name: version, namespace: istio-system }
spec: { value: '"v1"' }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: versions, namespace: istio-system }
spec: { actions: [ { handler: remote.listchecker, instances: [ version.listentry ] } ] }
"#;
    let mut mesh = Mesh::start(&[("rules.yaml", rules)]).await;
    let answer = told(&mesh.check(&[]).await);
    assert!(
        answer.starts_with("UNAVAILABLE:remote.listchecker.istio-system:there is no fresh list"),
        "{answer}"
    );
}
