//! A43, A45: lists of who may ask, and who a caller is.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use e2e::{app, mesh::Options, workload::Workload};
use http_body_util::Full;

use super::support::{ask, bookinfo, eventually, page};

/// Ratings may be asked by those versions of reviews that `params` of a listchecker allow.
fn by_version(params: &str) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: listchecker
metadata: {{ name: versions }}
spec: {{ {params} }}
---
apiVersion: config.istio.io/v1alpha2
kind: listentry
metadata: {{ name: version }}
spec: {{ value: 'source.labels["version"] | ""' }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: versions }}
spec:
  match: destination.labels["app"] == "ratings"
  actions: [ {{ handler: versions.listchecker, instances: [ version.listentry ] }} ]
"#
    )
}

/// Denies at details whoever is productpage by its certificate.
const NOT_PRODUCTPAGE: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: denier
metadata: { name: denyproductpage }
spec: { status: { code: 7, message: Not allowed } }
---
apiVersion: config.istio.io/v1alpha2
kind: checknothing
metadata: { name: denyproductpage }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: denyproductpage }
spec:
  match: destination.labels["app"] == "details" && source.user == "cluster.local/ns/default/sa/bookinfo-productpage"
  actions: [ { handler: denyproductpage.denier, instances: [ denyproductpage.checknothing ] } ]
"#;

#[tokio::test]
async fn a43_a45_lists_of_versions_and_callers_known_by_their_certificates() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    // Called like productpage, and somebody else by its certificate.
    let mut pretender = Workload::new(
        "pretender",
        &[("app", "productpage"), ("version", "v1")],
        80,
    );
    "elsewhere".clone_into(&mut pretender.namespace);
    "sleep".clone_into(&mut pretender.service_account);
    mesh.add(pretender, false)?;
    mesh.ready().await?;

    // A43: who of v1, v2 and v3 gets an answer.
    let asked = async |mesh: &e2e::mesh::Mesh| {
        let mut statuses = [0; 3];
        for (status, version) in statuses.iter_mut().zip(["v1", "v2", "v3"]) {
            let from = mesh.instance(&format!("reviews-{version}-0"))?;
            let answer = ask(&client, from, "ratings:9080", "/ratings/0", &[]).await?;
            *status = answer.status;
            if answer.status == 403 {
                let text = answer.text();
                anyhow::ensure!(text.starts_with("PERMISSION_DENIED:versions."), "{text}");
            }
        }
        anyhow::Ok(statuses)
    };
    // Listed by hand: a proxy may use what it was told before for one second more.
    for (params, want) in [
        ("overrides: [ v1, v2 ], blacklist: false", [200, 200, 403]),
        ("overrides: [ v1, v2 ], blacklist: true", [403, 403, 200]),
    ] {
        mesh.apply("versions.yaml", &by_version(params)).await?;
        eventually(Duration::from_millis(1500), async || {
            let statuses = asked(&mesh).await?;
            anyhow::ensure!(statuses == want, "{statuses:?} with {params}");
            Ok(())
        })
        .await?;
    }

    // From a URL: the edited list counts once it has been fetched and verdicts by the old one have ended.
    let list = Arc::new(Mutex::new("v1\nv2\n"));
    let served = Arc::clone(&list);
    let address = SocketAddr::from((mesh.block().outside(0), 8080));
    let server = app::serve(address, move |_, _| {
        let text = *served.lock().unwrap_or_else(|e| e.into_inner());
        async move { http::Response::new(Full::new(Bytes::from(text))) }
    })
    .await?;
    let params = format!(
        "providerUrl: \"http://{address}/versions\", refreshInterval: 1s, cachingInterval: 1s"
    );
    mesh.apply("versions.yaml", &by_version(&params)).await?;
    for (text, want) in [("v1\nv2\n", [200, 200, 403]), ("v3\nv2\n", [403, 200, 200])] {
        *list.lock().unwrap_or_else(|e| e.into_inner()) = text;
        eventually(Duration::from_secs(4), async || {
            let statuses = asked(&mesh).await?;
            anyhow::ensure!(statuses == want, "{statuses:?} with {text:?}");
            Ok(())
        })
        .await?;
    }
    assert!(server.count() >= 2, "fetched {} times", server.count());
    mesh.delete("versions.yaml").await?;

    // A45
    mesh.apply("denier.yaml", NOT_PRODUCTPAGE).await?;
    eventually(Duration::from_millis(1500), async || {
        let answer = page(&client, &mesh, None).await?;
        anyhow::ensure!(answer.status == 200, "status {}", answer.status);
        let text = answer.text();
        anyhow::ensure!(text.contains("Error fetching product details!"), "{text}");
        anyhow::ensure!(text.contains("Book Reviews"), "{text}");
        Ok(())
    })
    .await?;
    for (name, want) in [
        ("pretender-0", 200),
        ("reviews-v1-0", 200),
        ("productpage-v1-0", 403),
    ] {
        let from = mesh.instance(name)?;
        let answer = ask(&client, from, "details.default:9080", "/details/0", &[]).await?;
        assert_eq!(answer.status, want, "{name}: {}", answer.text());
    }
    Ok(())
}
