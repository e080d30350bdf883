//! `lateen adapter new`: a crate that builds, passes its cases and can be served, to start from.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};

const LIB: &str = include_str!("../../scaffold/lib.rs");
const MAIN: &str = include_str!("../../scaffold/main.rs");
const MANIFEST: &str = include_str!("../../scaffold/Cargo.toml.in");
const README: &str = include_str!("../../scaffold/README.md.in");
/// The kinds of work, and cases for each.
const KINDS: [(&str, &str); 3] = [
    ("check", include_str!("../../scaffold/check.yaml")),
    ("report", include_str!("../../scaffold/report.yaml")),
    ("quota", include_str!("../../scaffold/quota.yaml")),
];

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What it is called, and the folder it is made in: lower case letters, digits and hyphens.
    #[arg(value_name = "NAME")]
    name: String,
    /// It answers checks (template listentry). The default.
    #[arg(long)]
    check: bool,
    /// It takes reports (template logentry).
    #[arg(long)]
    report: bool,
    /// It grants quota (template quota).
    #[arg(long)]
    quota: bool,
    /// The SDK: mixer/sdk of Lateen's sources. By default looked for above this folder and above this program.
    #[arg(long, value_name = "DIR", env = "LATEEN_SDK")]
    sdk: Option<PathBuf>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let name = options.name.as_str();
    let is_name = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.len() <= 64
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    ensure!(
        is_name,
        "{name:?} is no name for a crate: lower case letters, digits and hyphens, a letter first"
    );
    let sdk = sdk(options.sdk.as_deref())?;
    let locked = locked(&sdk, name)?;
    let folder = Path::new(name);
    ensure!(
        !folder.exists(),
        "{name} is there already; take another name or remove it"
    );
    let mut kinds = vec![];
    for (kind, is_wanted) in [
        ("check", options.check),
        ("report", options.report),
        ("quota", options.quota),
    ] {
        if is_wanted {
            kinds.push(kind);
        }
    }
    if kinds.is_empty() {
        kinds.push("check");
    }
    write(folder, name, &sdk, &kinds, &locked)?;
    println!("{name} is made. Next: lateen adapter test {name}");
    Ok(())
}

/// The Cargo.lock of the crate: the versions that Lateen is built of, which are there already, without a network.
fn locked(sdk: &Path, name: &str) -> anyhow::Result<String> {
    let file = sdk.join("../../Cargo.lock");
    let text =
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    ensure!(
        !text.contains(&format!("name = \"{name}\"\n")),
        "{name} is a crate that Lateen is built of; take another name"
    );
    Ok(format!(
        "{text}\n[[package]]\nname = \"{name}\"\nversion = \"0.1.0\"\n\
         dependencies = [\n \"lateen-adapter\",\n \"serde\",\n]\n"
    ))
}

fn write(
    folder: &Path,
    name: &str,
    sdk: &Path,
    kinds: &[&str],
    locked: &str,
) -> anyhow::Result<()> {
    let path = toml_text(&sdk.display().to_string());
    let filled = |text: &str| {
        text.replace("__NAME__", name)
            .replace("__CRATE__", &name.replace('-', "_"))
            .replace("\"__SDK__\"", &path)
    };
    let put = |at: &str, text: &str| {
        let file = folder.join(at);
        fs::create_dir_all(file.parent().unwrap_or(folder))
            .and_then(|()| fs::write(&file, text))
            .with_context(|| format!("cannot write {}", file.display()))
    };
    put("Cargo.toml", &filled(MANIFEST))?;
    put("README.md", &filled(README))?;
    put(".gitignore", "/target\n")?;
    put("src/lib.rs", &filled(&only(LIB, kinds)))?;
    put("src/main.rs", &filled(MAIN))?;
    for (kind, cases) in KINDS.iter().filter(|(kind, _)| kinds.contains(kind)) {
        put(&format!("cases/{kind}.yaml"), cases)?;
    }
    put("Cargo.lock", locked)?;
    Ok(())
}

/// `text` with the blocks of `kinds` and without those of others.
fn only(text: &str, kinds: &[&str]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut keeps = true;
    for line in text.lines() {
        match line.trim_start().strip_prefix("//{") {
            Some(kind) => keeps = kinds.contains(&kind),
            None if line.trim_start() == "//}" => keeps = true,
            None if keeps => {
                out.push_str(line);
                out.push('\n');
            }
            None => {}
        }
    }
    out
}

fn sdk(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let is_sdk = |folder: &Path| folder.join("src/adapter.rs").is_file();
    if let Some(folder) = given {
        ensure!(
            is_sdk(folder),
            "{} is not mixer/sdk of Lateen's sources",
            folder.display()
        );
        return Ok(folder.canonicalize()?);
    }
    let starts = [std::env::current_dir(), std::env::current_exe()];
    for start in starts.into_iter().flatten() {
        let found = start.ancestors().map(|a| a.join("mixer/sdk"));
        if let Some(folder) = found.into_iter().find(|folder| is_sdk(folder)) {
            return Ok(folder.canonicalize()?);
        }
    }
    bail!("the SDK is not found; say where mixer/sdk of Lateen's sources is: --sdk DIR")
}

/// A text in TOML.
fn toml_text(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
#[path = "../../scaffold/lib.rs"]
#[allow(unreachable_pub, reason = "it is a crate of its own when it is made")]
mod made;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use lateen_adapter::kit::Kit;

    use super::*;

    #[tokio::test]
    async fn what_is_made_passes_its_cases() {
        for (kind, cases) in KINDS {
            let differences = Kit::new(Arc::new(super::made::Scaffold)).run(cases).await;
            assert_eq!(differences.unwrap(), Vec::<String>::new(), "{kind}");
        }
    }

    #[test]
    fn a_crate_has_what_was_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let made = folder.path().join("gate-keeper");
        write(
            &made,
            "gate-keeper",
            Path::new("/sdk"),
            &["check", "quota"],
            "",
        )
        .unwrap();
        let read = |at: &str| fs::read_to_string(made.join(at)).unwrap();
        let lib = read("src/lib.rs");
        assert!(lib.contains("name: \"gate-keeper\""));
        assert!(lib.contains("CheckHandler for Work") && lib.contains("QuotaHandler for Work"));
        assert!(!lib.contains("ReportHandler") && !lib.contains("LOGENTRY"));
        assert!(!lib.contains("__") && !lib.contains("//{") && !lib.contains("//}"));
        assert!(read("Cargo.toml").contains("path = \"/sdk\""));
        assert!(read("src/main.rs").contains("gate_keeper::Scaffold"));
        assert!(made.join("cases/check.yaml").is_file());
        assert!(!made.join("cases/report.yaml").exists());
    }
}
