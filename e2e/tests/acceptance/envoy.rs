//! An Envoy that no Pilot configures asks Mixer: the example of docs/reference/envoy.md.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use e2e::{
    app,
    http::Client,
    mesh::{Mesh, Options},
    process::{Process, Spec},
};

use super::support::{Sidecar, eventually, metrics};

const PAGE: &str = "docs/reference/envoy.md";

/// The YAML examples of the page: the bootstrap and the rules.
fn examples() -> anyhow::Result<(String, String)> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(PAGE);
    let page = std::fs::read_to_string(page)?;
    let mut blocks = page
        .split("```yaml\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next());
    match (blocks.next(), blocks.next(), blocks.next()) {
        (Some(bootstrap), Some(rules), None) => Ok((bootstrap.to_owned(), rules.to_owned())),
        _ => anyhow::bail!("{PAGE} has not two examples"),
    }
}

/// Puts `by` in the place of the one `what`.
fn replace(text: &str, what: &str, by: &str) -> anyhow::Result<String> {
    let count = text.matches(what).count();
    anyhow::ensure!(count == 1, "{what} is {count} times in the example");
    Ok(text.replace(what, by))
}

fn at(address: SocketAddr) -> String {
    format!("address: {}, port_value: {}", address.ip(), address.port())
}

fn free() -> std::io::Result<SocketAddr> {
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

#[tokio::test]
async fn an_envoy_of_ones_own_is_answered_by_the_rules() -> anyhow::Result<()> {
    let Some(Options {
        envoy: Some(envoy), ..
    }) = Sidecar::Envoy.options()
    else {
        return Ok(());
    };
    let (bootstrap, rules) = examples()?;
    let mut mesh = Mesh::start(Options::default()).await?;
    let client = Client::new();
    mesh.ready().await?;
    mesh.apply("rules.yaml", &rules).await?;
    let shop = app::httpbin(free()?, "v1").await?;
    let listen = free()?;
    let mixer = SocketAddr::from((mesh.block().mixer(), 9091));
    let mut text = replace(
        &bootstrap,
        "address: 127.0.0.1, port_value: 10000",
        &at(listen),
    )?;
    text = replace(&text, "address: 127.0.0.1, port_value: 9091", &at(mixer))?;
    text = replace(
        &text,
        "address: 127.0.0.1, port_value: 8000",
        &at(shop.address),
    )?;
    let _envoy = run(envoy, &text, mesh.folder())?;

    let url = format!("http://{listen}/headers");
    let get = async |user: &str| client.get_with(&url, &[("x-user", user)]).await;
    let refused = eventually(Duration::from_secs(10), async || get("john").await).await?;
    assert_eq!(refused.status, 403);
    assert_eq!(
        refused.text(),
        "PERMISSION_DENIED:deny.handler.istio-system:Not allowed"
    );
    for user in ["mary", "jim"] {
        let mut told = Vec::new();
        for _ in 0..4 {
            let response = get(user).await?;
            let left = response
                .header("ratelimit-remaining")
                .unwrap_or("-")
                .to_owned();
            if response.status == 429 {
                assert_eq!(
                    response.text(),
                    "RESOURCE_EXHAUSTED:Quota is exhausted for: calls"
                );
            }
            told.push((response.status, left));
        }
        let want = [(200, "2"), (200, "1"), (200, "0"), (429, "0")];
        assert_eq!(
            told,
            want.map(|(status, left)| (status, left.to_owned())),
            "{user}"
        );
    }

    // Every request is reported, refused ones too.
    eventually(Duration::from_secs(10), async || {
        let all = metrics(&client, &mesh).await?;
        let mut counts: Vec<_> = all
            .iter()
            .filter(|s| {
                s.name == "istio_requests_total" && s.label("destination_service_name") == "shop"
            })
            .map(|s| (s.label("response_code"), s.label("response_flags"), s.value))
            .collect();
        counts.sort_by_key(|(code, ..)| *code);
        anyhow::ensure!(
            counts == [("200", "-", 6.0), ("403", "UAEX", 1.0), ("429", "RL", 2.0)],
            "{counts:?}"
        );
        Ok(())
    })
    .await
}

fn run(envoy: PathBuf, bootstrap: &str, folder: &Path) -> anyhow::Result<Process> {
    let file = folder.join("own-envoy.yaml");
    let node = "node: { id: own, cluster: own }\n";
    std::fs::write(&file, format!("{node}{bootstrap}"))?;
    let spec = Spec {
        name: "own-envoy".to_owned(),
        path: envoy,
        args: ["--disable-hot-restart", "--concurrency", "1", "-c"]
            .map(str::to_owned)
            .into_iter()
            .chain([file.to_string_lossy().into_owned()])
            .collect(),
        env: Vec::new(),
        own_group: false,
    };
    Process::start(spec, &folder.join("logs"))
}
