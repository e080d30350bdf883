//! Finding a cluster's hosts by DNS, again and again, on the main runtime.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Weak},
};

use lateen_protocols::envoy::envoy::config::cluster::v3::cluster::DnsLookupFamily;

use super::{
    Cluster,
    config::Dns,
    host::{Assignment, SpecTarget},
};

/// Resolves until the cluster is gone. `first_only` is for logical DNS: one host at a time.
pub(super) async fn resolve(
    cluster: Weak<Cluster>,
    dns: Dns,
    first_only: bool,
    assignment: Assignment,
) {
    let mut names: Vec<(Arc<str>, u16)> = assignment
        .specs
        .iter()
        .filter_map(|spec| match &spec.target {
            SpecTarget::Name(name, port) => Some((name.clone(), *port)),
            SpecTarget::Address(_) => None,
        })
        .collect();
    names.sort();
    names.dedup();
    let mut known: HashMap<(Arc<str>, u16), Vec<SocketAddr>> = HashMap::new();
    loop {
        for name in &names {
            let looked_up = tokio::net::lookup_host((&*name.0, name.1)).await;
            let Some(cluster) = cluster.upgrade() else {
                return;
            };
            cluster.stats.update_attempt.inc();
            match looked_up {
                Ok(addresses) => {
                    let mut addresses = choose(addresses.collect(), dns.family);
                    if first_only {
                        addresses.truncate(1);
                    }
                    cluster.stats.update_success.inc();
                    if addresses.is_empty() {
                        cluster.stats.update_empty.inc();
                    }
                    known.insert(name.clone(), addresses);
                }
                // The last good answer stays.
                Err(error) => {
                    cluster.stats.update_failure.inc();
                    tracing::debug!(cluster = &*cluster.name, name = &*name.0, %error, "name does not resolve");
                }
            }
        }
        match cluster.upgrade() {
            None => return,
            Some(cluster) => cluster.set_hosts(&assignment, |target| match target {
                SpecTarget::Name(name, port) => known
                    .get(&(name.clone(), *port))
                    .cloned()
                    .unwrap_or_default(),
                SpecTarget::Address(_) => Vec::new(),
            }),
        }
        if names.is_empty() {
            return;
        }
        tokio::time::sleep(dns.refresh).await;
    }
}

/// The addresses to use, in a stable order without duplicates.
pub(super) fn choose(mut addresses: Vec<SocketAddr>, family: DnsLookupFamily) -> Vec<SocketAddr> {
    let mut seen = std::collections::HashSet::new();
    addresses.retain(|address| seen.insert(*address));
    let (v4, v6): (Vec<_>, Vec<_>) = addresses.iter().partition(|address| address.is_ipv4());
    match family {
        DnsLookupFamily::V4Only => v4,
        DnsLookupFamily::V6Only => v6,
        DnsLookupFamily::V4Preferred if v4.is_empty() => v6,
        DnsLookupFamily::V4Preferred => v4,
        DnsLookupFamily::Auto if v6.is_empty() => v4,
        DnsLookupFamily::Auto => v6,
        DnsLookupFamily::All => addresses,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_chosen_as_configured() {
        let all: Vec<SocketAddr> = ["127.0.0.1:1", "[::1]:1", "127.0.0.1:1"]
            .map(|a| a.parse().unwrap())
            .into();
        let (v4, v6) = (vec![all[0]], vec![all[1]]);
        assert_eq!(choose(all.clone(), DnsLookupFamily::V4Only), v4);
        assert_eq!(choose(all.clone(), DnsLookupFamily::Auto), v6);
        assert_eq!(choose(v4.clone(), DnsLookupFamily::Auto), v4);
        assert_eq!(choose(all, DnsLookupFamily::All).len(), 2);
    }
}
