//! Clients stay in their own zone until what is there fails, and localities get the shares they are given.

use std::time::Duration;

use e2e::{
    app::{self, App},
    http::Client,
    mesh::Mesh,
    workload::Workload,
};

use super::support::{Sidecar, ask, assert_share, eventually, on_both};

on_both!(
    clients_leave_their_zone_only_when_it_fails,
    localities_get_the_shares_that_are_written,
);

const HTTPBIN: &str = "apiVersion: v1
kind: Service
metadata: { name: httpbin }
spec:
  selector: { app: httpbin }
  ports: [{ name: http, port: 8000 }]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: httpbin }
spec:
  hosts: [httpbin]
  http:
  - route: [{ destination: { host: httpbin } }]
    retries: { attempts: 0 }
";

fn rule(policy: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{ name: httpbin }}
spec:
  host: httpbin
  trafficPolicy: {policy}
"
    )
}

/// `near` in the client's zone, `far` in another one of its region, `abroad` in another region.
async fn three_places(sidecar: Sidecar) -> anyhow::Result<Option<(Mesh, Client, Vec<App>)>> {
    let Some(options) = sidecar.options() else {
        return Ok(None);
    };
    let mut mesh = Mesh::start(options).await?;
    let sleep = Workload::new("sleep", &[("app", "sleep"), ("istio-locality", "us.a")], 80);
    mesh.add(sleep, false)?;
    let mut apps = Vec::new();
    for (name, locality) in [("near", "us.a"), ("far", "us.b"), ("abroad", "eu.a")] {
        let labels = [("app", "httpbin"), ("istio-locality", locality)];
        let instance = mesh.add(Workload::new(name, &labels, 8000), false)?;
        let port = instance.workload.app_port(8000);
        apps.push(app::httpbin((instance.address.ip, port).into(), name).await?);
    }
    mesh.ready().await?;
    mesh.apply("httpbin.yaml", HTTPBIN).await?;
    Ok(Some((mesh, Client::new(), apps)))
}

async fn who(mesh: &Mesh, client: &Client) -> anyhow::Result<String> {
    let from = mesh.instance("sleep-0")?;
    let response = ask(client, from, "httpbin:8000", "/anything", &[]).await?;
    anyhow::ensure!(response.status == 200, "status {}", response.status);
    Ok(response.json()?["version"]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

async fn clients_leave_their_zone_only_when_it_fails(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some((mut mesh, client, _apps)) = three_places(sidecar).await? else {
        return Ok(());
    };
    let outlier = "{ outlierDetection: { consecutive5xxErrors: 1, interval: 1s, baseEjectionTime: 4s, \
                   maxEjectionPercent: 100 } }";
    mesh.apply("rule.yaml", &rule(outlier)).await?;
    for _ in 0..30 {
        assert_eq!(who(&mesh, &client).await?, "near");
    }
    let from = mesh.instance("sleep-0")?;
    for wanted in ["far", "abroad"] {
        let failed = ask(&client, from, "httpbin:8000", "/status/500", &[]).await?;
        assert_eq!(
            failed.status, 500,
            "the first is asked before it is ejected"
        );
        eventually(Duration::from_secs(2), async || {
            let got = who(&mesh, &client).await?;
            anyhow::ensure!(got == wanted, "{got}, not {wanted}");
            Ok(())
        })
        .await?;
    }
    // Who was ejected first is back first, and preferred.
    eventually(Duration::from_secs(10), async || {
        let got = who(&mesh, &client).await?;
        anyhow::ensure!(got == "near", "{got} still");
        Ok(())
    })
    .await?;
    let off = outlier.replace(
        "{ outlier",
        "{ loadBalancer: { localityLbSetting: { enabled: false } }, outlier",
    );
    mesh.apply("rule.yaml", &rule(&off)).await?;
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..100 {
        seen.insert(who(&mesh, &client).await?);
    }
    assert_eq!(seen.len(), 3, "{seen:?}");
    Ok(())
}

async fn localities_get_the_shares_that_are_written(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some((mut mesh, client, apps)) = three_places(sidecar).await? else {
        return Ok(());
    };
    let shares = "{ loadBalancer: { localityLbSetting: { distribute: [{ from: us/*, to: { us/a: 70, eu: 30 } }] } } }";
    mesh.apply("rule.yaml", &rule(shares)).await?;
    let before: Vec<u64> = apps.iter().map(App::count).collect();
    for _ in 0..400 {
        who(&mesh, &client).await?;
    }
    let counts: Vec<u64> = apps
        .iter()
        .zip(before)
        .map(|(app, before)| app.count() - before)
        .collect();
    assert_eq!(counts[1], 0, "{counts:?}");
    assert_share(usize::try_from(counts[0])?, 400, 0.7);
    assert_share(usize::try_from(counts[2])?, 400, 0.3);
    Ok(())
}
