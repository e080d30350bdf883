//! The pages of docs/adapters: there is one for each adapter, and its examples load.

use std::{collections::BTreeSet, fs, path::Path, sync::Arc};

use lateen_adapter::Clock;
use mixer::adapter::{Inventory, prometheus::Exposition, rbac::PolicyView};

use crate::support::Mesh;

/// Pages that are about a kind of adapters.
const GUIDES: &[&str] = &["out-of-process", "writing"];

fn pages() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/adapters");
    let mut pages: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            (name, fs::read_to_string(path).unwrap())
        })
        .collect();
    pages.sort();
    pages
}

/// The blocks of a page that are YAML.
fn yaml(page: &str) -> Vec<&str> {
    page.split("```yaml\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap())
        .collect()
}

#[tokio::test]
async fn every_adapter_has_a_page() {
    let inventory = Inventory::built_in(
        Arc::new(Exposition::new(Clock::manual())),
        PolicyView::default(),
    );
    let adapters: BTreeSet<_> = inventory.names().map(str::to_owned).collect();
    let pages = pages().into_iter().map(|(name, _)| name);
    let pages: BTreeSet<_> = pages.filter(|name| !GUIDES.contains(&&**name)).collect();
    assert_eq!(pages, adapters);
}

#[tokio::test]
async fn the_examples_load() {
    let folder = tempfile::tempdir().unwrap();
    crate::wasm::write_list(&folder.path().join("list.wasm"));
    for (name, page) in pages() {
        let here = folder.path().to_str().unwrap();
        let page = page.replace("/var/log/mixer", here);
        let page = page.replace("/etc/mixer", here);
        let examples = yaml(&page);
        assert!(!examples.is_empty(), "{name} has no example");
        for example in examples {
            let mesh = Mesh::start(&[("example.yaml", example)]).await;
            assert_eq!(mesh.problems(), [], "{name}");
            let uses = mesh.running.snapshot.load().rules.iter().any(|rule| {
                let mut actions = rule.actions.iter();
                actions.any(|a| a.handler.signature.adapter() == name)
            });
            let is_guide = GUIDES.contains(&&*name);
            assert!(uses || is_guide, "no rule of {name}'s example uses it");
        }
    }
}
