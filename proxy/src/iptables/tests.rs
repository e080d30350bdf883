//! Each file of `testdata/iptables` is a command line and what it prints.

use std::path::PathBuf;

use clap::Parser;

use super::*;
use crate::config::{self, Options};

fn command(line: &str) -> Result<Command, String> {
    let words = line.split_whitespace().map(|word| word.trim_matches('\''));
    let options = Options::try_parse_from(words).map_err(|error| error.to_string())?;
    match options.command {
        Some(config::Command::Iptables(command)) => Ok(command),
        Some(config::Command::Sidecar(_) | config::Command::Wait(_)) | None => {
            Err("another command".to_owned())
        }
    }
}

#[test]
fn what_is_given_to_the_kernel_is_as_kept() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/iptables");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let kept = std::fs::read_to_string(&path).unwrap();
        let (line, want) = kept.split_once('\n').unwrap();
        let line = line.strip_prefix("# $ ").unwrap();
        let got = run(&command(line).unwrap()).unwrap();
        assert_eq!(got, want, "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 6, "{seen} cases");
}

#[test]
fn what_has_no_meaning_is_refused() {
    for (flags, want) in [
        ("-x '*'", "give a list"),
        ("-x 10.0.0.0/33", "neither an address nor a CIDR range"),
        ("-b 80,http", "\"http\" in \"80,http\""),
        (
            "-c eth0;reboot-everything",
            "no name of a network interface",
        ),
        ("--mode NONE", "invalid value 'NONE'"),
    ] {
        let error = command(&format!("proxy iptables apply -n {flags}")).unwrap_err();
        assert!(error.contains(want), "{flags}: {error}");
    }
    // The proxy's own flags have nothing to do with it.
    assert!(command("proxy -c x.yaml iptables clean").is_err());
}
