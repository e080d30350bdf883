//! Which virtual host an authority belongs to.

use std::{cmp::Reverse, collections::HashMap};

use crate::{config_error::ConfigError, proto::invalid};

/// A name of DNS is not longer than 253 bytes; with a port and a dot.
const LONGEST: usize = 260;

/// Wildcard domains by the length of their fixed part, longest first.
type Wildcards = Vec<(usize, HashMap<Box<[u8]>, usize>)>;

/// The domains of a route table; what they stand for is the number of a virtual host.
#[derive(Debug, Default)]
pub(super) struct Domains {
    exact: HashMap<Box<[u8]>, usize>,
    suffixes: Wildcards,
    prefixes: Wildcards,
    any: Option<usize>,
    ignore_port: bool,
}

impl Domains {
    pub(super) fn new(ignore_port: bool) -> Domains {
        Domains {
            ignore_port,
            ..Domains::default()
        }
    }

    /// The virtual host of an authority: exact, then the longest `*suffix`, then the longest `prefix*`, then `*`.
    pub(super) fn find(&self, authority: &[u8]) -> Option<usize> {
        if self.exact.is_empty() && self.suffixes.is_empty() && self.prefixes.is_empty() {
            return self.any;
        }
        let authority = if self.ignore_port {
            without_port(authority)
        } else {
            authority
        };
        // Few are written with capitals, and hardly any is longer than this.
        let (mut short, long);
        let host = if !authority.iter().any(u8::is_ascii_uppercase) {
            authority
        } else if authority.len() <= LONGEST {
            short = [0; LONGEST];
            let short = &mut short[..authority.len()];
            short.copy_from_slice(authority);
            short.make_ascii_lowercase();
            &*short
        } else {
            long = authority.to_ascii_lowercase();
            long.as_slice()
        };
        if let Some(&found) = self.exact.get(host) {
            return Some(found);
        }
        // A wildcard stands for at least one character.
        let suffix = self.suffixes.iter().find_map(|(length, hosts)| {
            let start = host.len().checked_sub(*length).filter(|start| *start > 0)?;
            hosts.get(&host[start..]).copied()
        });
        let found = suffix.or_else(|| {
            self.prefixes.iter().find_map(|(length, hosts)| {
                hosts
                    .get(host.get(..*length).filter(|_| host.len() > *length)?)
                    .copied()
            })
        });
        found.or(self.any)
    }

    /// Adds a domain.
    ///
    /// # Errors
    /// It is there already.
    pub(super) fn add(&mut self, domain: &str, vhost: usize) -> Result<(), ConfigError> {
        let lower = domain.to_ascii_lowercase();
        let twice = || {
            invalid(
                "domains",
                format!(
                    "Only unique values for domains are permitted. Duplicate entry of domain {domain}"
                ),
            )
        };
        let (list, fixed) = if lower == "*" {
            return match self.any.replace(vhost) {
                None => Ok(()),
                Some(_) => Err(invalid(
                    "domains",
                    "Only a single wildcard domain is permitted",
                )),
            };
        } else if let Some(suffix) = lower.strip_prefix('*') {
            (&mut self.suffixes, suffix)
        } else if let Some(prefix) = lower.strip_suffix('*') {
            (&mut self.prefixes, prefix)
        } else {
            return match self.exact.insert(lower.as_bytes().into(), vhost) {
                None => Ok(()),
                Some(_) => Err(twice()),
            };
        };
        let at = match list.iter().position(|(length, _)| *length == fixed.len()) {
            Some(at) => at,
            None => {
                list.push((fixed.len(), HashMap::new()));
                list.len() - 1
            }
        };
        match list[at].1.insert(fixed.as_bytes().into(), vhost) {
            None => Ok(()),
            Some(_) => Err(twice()),
        }
    }

    /// To be called when all are added: the longest wildcard wins.
    pub(super) fn sort(&mut self) {
        self.suffixes.sort_by_key(|(length, _)| Reverse(*length));
        self.prefixes.sort_by_key(|(length, _)| Reverse(*length));
    }
}

/// An authority without its port.
pub fn without_port(authority: &[u8]) -> &[u8] {
    match authority.iter().rposition(|b| *b == b':') {
        // In `[::1]` the last colon is no port's.
        Some(colon) if authority[colon + 1..].iter().all(u8::is_ascii_digit) => {
            let host = &authority[..colon];
            if host.contains(&b':') && !host.ends_with(b"]") {
                authority
            } else {
                host
            }
        }
        _ => authority,
    }
}
