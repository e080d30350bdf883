//! Istio's own Bookinfo files, unmodified, are taken without a complaint (`LATEEN_CORPUS`).

use std::path::PathBuf;

use e2e::mesh::{Mesh, Options};

fn corpus() -> Option<PathBuf> {
    let folder = std::env::var_os("LATEEN_CORPUS").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("SKIPPED: LATEEN_CORPUS names no folder");
    }
    folder
}

#[tokio::test]
async fn istios_bookinfo_rules_are_live_on_every_proxy() -> anyhow::Result<()> {
    let Some(corpus) = corpus() else {
        return Ok(());
    };
    let folder = corpus.join("pilot/samples/1.4.10/samples/bookinfo/networking");
    let mut mesh = Mesh::start(Options::default()).await?;
    mesh.add_bookinfo()?;
    mesh.ready().await?;
    let read = |name: &str| std::fs::read_to_string(folder.join(name));
    mesh.apply(
        "destination-rule-all.yaml",
        &read("destination-rule-all.yaml")?,
    )
    .await?;
    mesh.delete("gateway.yaml").await?;
    mesh.apply("bookinfo-gateway.yaml", &read("bookinfo-gateway.yaml")?)
        .await?;
    for name in [
        "virtual-service-all-v1.yaml",
        "virtual-service-reviews-test-v2.yaml",
        "virtual-service-reviews-50-v3.yaml",
        "virtual-service-reviews-80-20.yaml",
        "virtual-service-reviews-jason-v2-v3.yaml",
        "virtual-service-ratings-test-delay.yaml",
        "virtual-service-ratings-test-abort.yaml",
        "virtual-service-reviews-v3.yaml",
    ] {
        // One file after the other in the same place, as `kubectl apply` would replace objects.
        mesh.apply("virtual-services.yaml", &read(name)?).await?;
        let url = format!("{}/productpage", mesh.gateway_url());
        let response = e2e::http::Client::new().get(&url).await?;
        assert_eq!(response.status, 200, "with {name}: {}", response.text());
    }
    Ok(())
}
