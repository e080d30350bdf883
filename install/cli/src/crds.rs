//! `lateen crds`: definitions of the kinds that the mesh reads, for `kubectl apply -f -`.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;

/// What comes first in the file.
const HEAD: &str = "\
# Definitions of the kinds that Lateen reads, under Istio's names. Written by `lateen crds`: do not edit.
";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {}

pub(crate) fn run(_: &Options) -> anyhow::Result<ExitCode> {
    std::io::stdout().lock().write_all(render()?.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// All definitions as one YAML text.
fn render() -> anyhow::Result<String> {
    let mut text = HEAD.to_owned();
    for definition in lateen_config::definitions() {
        let yaml = serde_saphyr::to_string(&definition).context("cannot be written as YAML")?;
        text += "---\n";
        text += yaml.trim_end();
        text.push('\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_is_what_the_command_prints() {
        let text = render().unwrap();
        assert!(
            text == include_str!("../../manifests/crds.yaml"),
            "out of date: lateen crds > install/manifests/crds.yaml"
        );
        let all: Vec<serde_json::Value> = serde_saphyr::from_multiple(&text).unwrap();
        assert_eq!(all, lateen_config::definitions());
    }
}
