//! What the kernel's tables hold, and changing it: by the programs iptables-save, iptables-restore and ip.

use std::{
    io::{self, Write as _},
    process::{Command, Output, Stdio},
};

use clap::ValueEnum;

use super::{
    rules::{CHAINS, Family, TABLES, ip_commands, tables},
    settings::Settings,
};

/// Which iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// What `iptables` is.
    Default,
    /// `iptables-nft`.
    Nft,
    /// `iptables-legacy`.
    Legacy,
}

/// A program is missing or refuses.
#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    /// It cannot be run.
    #[error("cannot run {program}; install the packages iptables and iproute2")]
    Run {
        /// Which.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ran and failed.
    #[error(
        "{program} failed: {said}{}",
        if *.permission { "; it needs root, or the capabilities CAP_NET_ADMIN and CAP_NET_RAW in this network namespace" } else { "" }
    )]
    Refused {
        /// Which, with its arguments.
        program: String,
        /// What it said.
        said: String,
        /// Whether it lacks a permission.
        permission: bool,
    },
}

/// `::6` as `/proc/net/if_inet6` has it.
const PASSTHROUGH: &str = "00000000000000000000000000000006";

/// What a table holds of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Present {
    /// Rules of other chains that jump to chains of ours, as iptables-save prints them.
    jumps: Vec<String>,
    /// Our chains.
    chains: Vec<String>,
}

impl Present {
    /// Reads what iptables-save prints of one table.
    fn read(saved: &str) -> Present {
        let ours = |name: &str| CHAINS.contains(&name);
        let mut present = Present::default();
        for line in saved.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("-A") => {
                    let Some(chain) = words.next() else { continue };
                    let target = words.skip_while(|word| *word != "-j").nth(1);
                    if !ours(chain) && target.is_some_and(ours) {
                        present.jumps.push(line.trim().to_owned());
                    }
                }
                Some(declared) => {
                    if let Some(chain) = declared.strip_prefix(':').filter(|chain| ours(chain)) {
                        present.chains.push(chain.to_owned());
                    }
                }
                None => {}
            }
        }
        present
    }

    /// Lines that take out the jumps.
    pub(super) fn undo_jumps(&self) -> impl Iterator<Item = String> {
        let rests = self
            .jumps
            .iter()
            .filter_map(|rule| rule.strip_prefix("-A "));
        rests.map(|rest| format!("-D {rest}"))
    }

    /// Lines that take out chains, but not those that are `kept`.
    pub(super) fn undo_chains<'a>(&'a self, kept: &'a [&str]) -> impl Iterator<Item = String> {
        let gone = || {
            self.chains
                .iter()
                .filter(|chain| !kept.contains(&chain.as_str()))
        };
        // A chain that another of ours jumps to cannot be deleted, so all are emptied first.
        let emptied = gone().map(|chain| format!("-F {chain}"));
        emptied.chain(gone().map(|chain| format!("-X {chain}")))
    }

    fn is_empty(&self) -> bool {
        self.jumps.is_empty() && self.chains.is_empty()
    }
}

/// The programs.
#[derive(Debug)]
pub(super) struct System {
    backend: Backend,
}

impl System {
    pub(super) fn new(backend: Backend) -> System {
        System { backend }
    }

    /// Whether this network namespace has an IPv6 address beyond loopback and link-local ones.
    pub(super) fn has_ipv6(&self) -> bool {
        let addresses = std::fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
        has_routable(&addresses)
    }

    pub(super) fn apply(&self, settings: &Settings, family: Family) -> Result<(), SystemError> {
        let wanted = tables(settings, family);
        let marked = self.tproxy_mark(family)?;
        let mut text = String::new();
        for name in TABLES {
            match wanted.iter().find(|table| table.name() == *name) {
                Some(table) => text += &table.restore(&self.present(family, name)?),
                None => text += &self.undo(family, name)?,
            }
        }
        self.restore(family, &text)?;
        // `ip rule add` would add the same rule a second time.
        if let Some(mark) = marked {
            self.forget_routes(family, &mark)?;
        }
        for arguments in ip_commands(settings, family) {
            self.run("ip", &arguments, "")?;
        }
        Ok(())
    }

    pub(super) fn clean(&self, family: Family) -> Result<(), SystemError> {
        let marked = self.tproxy_mark(family)?;
        let mut text = String::new();
        for name in TABLES {
            text += &self.undo(family, name)?;
        }
        if !text.is_empty() {
            self.restore(family, &text)?;
            let addresses = std::fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
            if family == Family::V6 && addresses.contains(PASSTHROUGH) {
                let arguments = ["-6", "addr", "del", "::6/128", "dev", "lo"].map(str::to_owned);
                self.run("ip", &arguments, "")?;
            }
        }
        if let Some(mark) = marked {
            self.forget_routes(family, &mark)?;
        }
        Ok(())
    }

    /// The mark with which packets are handed to the proxy, if they are.
    fn tproxy_mark(&self, family: Family) -> Result<Option<String>, SystemError> {
        let saved = self.save(family, "mangle")?;
        let words: Vec<&str> = saved
            .lines()
            .find(|line| line.starts_with("-A ISTIO_TPROXY "))
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let mark = words.iter().position(|word| *word == "--tproxy-mark");
        let mark = mark.and_then(|at| words.get(at + 1));
        Ok(mark.and_then(|mark| Some(mark.split('/').next()?.to_owned())))
    }

    /// Takes out the rules that lead to the routing tables of TPROXY, and these.
    fn forget_routes(&self, family: Family, mark: &str) -> Result<(), SystemError> {
        let version = match family {
            Family::V4 => "-4",
            Family::V6 => "-6",
        };
        let arguments = |text: &str| -> Vec<String> {
            let words = text.split_whitespace().map(str::to_owned);
            std::iter::once(version.to_owned()).chain(words).collect()
        };
        let rules = self.run("ip", &arguments("rule show"), "")?;
        for line in rules.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let after = |name: &str| {
                let at = words.iter().position(|word| *word == name)?;
                words.get(at + 1).copied()
            };
            let (Some(fwmark), Some(table)) = (after("fwmark"), after("lookup")) else {
                continue;
            };
            if fwmark != mark {
                continue;
            }
            let rule = arguments(&format!("rule del fwmark {mark} lookup {table}"));
            self.run("ip", &rule, "")?;
            let route = arguments(&format!("route del local default dev lo table {table}"));
            match self.run("ip", &route, "") {
                // Two rules may have led to one table.
                Err(SystemError::Refused { said, .. }) if said.contains("No such process") => {}
                other => drop(other?),
            }
        }
        Ok(())
    }

    /// What takes everything of ours out of a table; nothing if there is nothing.
    fn undo(&self, family: Family, table: &str) -> Result<String, SystemError> {
        let present = self.present(family, table)?;
        if present.is_empty() {
            return Ok(String::new());
        }
        let lines: Vec<String> = std::iter::once(format!("*{table}"))
            .chain(present.undo_jumps())
            .chain(present.undo_chains(&[]))
            .chain(std::iter::once("COMMIT\n".to_owned()))
            .collect();
        Ok(lines.join("\n"))
    }

    fn present(&self, family: Family, table: &str) -> Result<Present, SystemError> {
        Ok(Present::read(&self.save(family, table)?))
    }

    fn save(&self, family: Family, table: &str) -> Result<String, SystemError> {
        let program = family.program(self.backend, "-save");
        self.run(&program, &["-t".to_owned(), table.to_owned()], "")
    }

    fn restore(&self, family: Family, text: &str) -> Result<(), SystemError> {
        let program = family.program(self.backend, "-restore");
        // Another program may be changing the tables at this moment.
        let arguments = ["--noflush", "--wait", "10"].map(str::to_owned);
        self.run(&program, &arguments, text).map(drop)
    }

    fn run(&self, program: &str, arguments: &[String], input: &str) -> Result<String, SystemError> {
        let failed = |source| SystemError::Run {
            program: program.to_owned(),
            source,
        };
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read what it needs says so itself.
            drop(stdin.write_all(input.as_bytes()));
        }
        let Output {
            status,
            stdout,
            stderr,
        } = child.wait_with_output().map_err(failed)?;
        if status.success() {
            return Ok(String::from_utf8_lossy(&stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&stderr).trim().to_owned();
        let lower = said.to_lowercase();
        Err(SystemError::Refused {
            program: format!("{program} {}", arguments.join(" ")),
            permission: lower.contains("permission denied") || lower.contains("not permitted"),
            said,
        })
    }
}

/// `/proc/net/if_inet6`: address, index, prefix length, scope, flags, name.
fn has_routable(addresses: &str) -> bool {
    addresses.lines().any(|line| {
        let mut words = line.split_whitespace();
        let (address, scope) = (words.next(), words.nth(2));
        // 10 is the host's own, 20 the link's.
        address.is_some() && scope.is_some_and(|scope| scope != "10" && scope != "20")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_ours_is_taken_out() {
        let saved = "# Generated\n*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:ISTIO_OUTPUT - [0:0]\n\
                     :ISTIO_REDIRECT - [0:0]\n:ISTIO_OTHER - [0:0]\n-A OUTPUT -p tcp -j ISTIO_OUTPUT\n\
                     -A OUTPUT -j ISTIO_OTHER\n-A OUTPUT -j MASQ\n-A ISTIO_OUTPUT -j ISTIO_REDIRECT\nCOMMIT\n";
        let present = Present::read(saved);
        assert_eq!(present.jumps, ["-A OUTPUT -p tcp -j ISTIO_OUTPUT"]);
        assert_eq!(present.chains, ["ISTIO_OUTPUT", "ISTIO_REDIRECT"]);
        let undone: Vec<String> = present
            .undo_jumps()
            .chain(present.undo_chains(&["ISTIO_OUTPUT"]))
            .collect();
        assert_eq!(
            undone,
            [
                "-D OUTPUT -p tcp -j ISTIO_OUTPUT",
                "-F ISTIO_REDIRECT",
                "-X ISTIO_REDIRECT"
            ]
        );
    }

    #[test]
    fn ipv6_counts_when_it_leads_somewhere() {
        let lo = "00000000000000000000000000000001 01 80 10 80       lo\n";
        let link = "fe80000000000000aabbccfffeddeeff 02 40 20 80     eth0\n";
        let global = "20010db8000000000000000000000001 02 40 00 80     eth0\n";
        assert!(!has_routable(""));
        assert!(!has_routable(&format!("{lo}{link}")));
        assert!(has_routable(&format!("{lo}{link}{global}")));
    }
}
