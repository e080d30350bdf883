//! Patches of route configurations, their virtual hosts and routes.

use std::collections::{BTreeMap, HashSet};

use envoy_types::pb::envoy::config::route::v3::{
    Route, RouteConfiguration, VirtualHost, route::Action,
};
use lateen_config::envoy_filter::{
    ApplyTo, PatchContext, PatchOperation, RouteActionKind, RouteConfigurationMatch, RouteMatch,
};

use crate::model::Role;

use super::{Patch, Patches, renames};

impl<'a> Patches<'a> {
    pub(super) fn routes(&self, routes: &mut BTreeMap<String, RouteConfiguration>) {
        for (name, config) in routes {
            let context = match self.role {
                Role::Router => PatchContext::Gateway,
                _ if name.starts_with("inbound|") => PatchContext::SidecarInbound,
                Role::Sidecar | Role::Reader => PatchContext::SidecarOutbound,
            };
            self.route_configuration(config, context);
        }
    }

    pub(super) fn has_route_patches(&self, context: PatchContext) -> bool {
        [
            ApplyTo::RouteConfiguration,
            ApplyTo::VirtualHost,
            ApplyTo::HttpRoute,
        ]
        .into_iter()
        .any(|kind| self.to(kind, context).next().is_some())
    }

    /// Whatever is to be done in one route configuration.
    pub(super) fn route_configuration(
        &self,
        config: &mut RouteConfiguration,
        context: PatchContext,
    ) {
        let name = config.name.clone();
        let fits = |patch: &&Patch<'a>| {
            configuration_fits(patch.config.matches.route_configuration.as_ref(), &name)
        };
        for patch in self.to(ApplyTo::RouteConfiguration, context).filter(fits) {
            if patch.operation() == PatchOperation::Merge {
                self.merge(patch, config, |old, new| {
                    (old.name != new.name)
                        .then(|| renames("route configuration", &old.name))
                        .or_else(|| repeated_domain(&new.virtual_hosts))
                });
            }
        }
        let hosts: Vec<&Patch<'a>> = self
            .to(ApplyTo::VirtualHost, context)
            .filter(fits)
            .collect();
        let routes: Vec<&Patch<'a>> = self.to(ApplyTo::HttpRoute, context).filter(fits).collect();
        if hosts.is_empty() && routes.is_empty() {
            return;
        }
        let mut index = 0;
        while index < config.virtual_hosts.len() {
            if self.virtual_host(config, index, &hosts, &routes) {
                index += 1;
            } else {
                config.virtual_hosts.remove(index);
            }
        }
        for patch in hosts {
            if patch.operation() != PatchOperation::Add {
                continue;
            }
            if let Some(host) = self.value::<VirtualHost>(patch) {
                self.put(patch, config, None, host);
            }
        }
    }

    /// Puts a virtual host in the place of another one, or last.
    fn put(
        &self,
        patch: &Patch<'_>,
        config: &mut RouteConfiguration,
        index: Option<usize>,
        host: VirtualHost,
    ) {
        patch.used.set(true);
        let others = config.virtual_hosts.iter().enumerate();
        let others = others.filter(|(at, _)| Some(*at) != index);
        let same_name = others.clone().any(|(_, other)| other.name == host.name);
        let why = match same_name {
            true => Some(format!("there is a virtual host {:?} already", host.name)),
            false => repeated_domain(others.map(|(_, other)| other).chain([&host])),
        };
        if let Some(why) = why {
            return self.note(patch, why);
        }
        match index.and_then(|index| config.virtual_hosts.get_mut(index)) {
            Some(there) => *there = host,
            None => config.virtual_hosts.push(host),
        }
    }

    /// Whether a virtual host stays.
    fn virtual_host(
        &self,
        config: &mut RouteConfiguration,
        index: usize,
        hosts: &[&Patch<'a>],
        routes: &[&Patch<'a>],
    ) -> bool {
        for patch in hosts {
            let Some(host) = config.virtual_hosts.get(index) else {
                return false;
            };
            if !host_fits(patch, host) {
                continue;
            }
            match patch.operation() {
                PatchOperation::Remove => {
                    patch.used.set(true);
                    return false;
                }
                PatchOperation::Merge => {
                    let mut new = host.clone();
                    self.merge(patch, &mut new, |_, _| None);
                    if new != *host {
                        self.put(patch, config, Some(index), new);
                    }
                }
                PatchOperation::Replace => {
                    if let Some(new) = self.value(patch) {
                        self.put(patch, config, Some(index), new);
                    }
                }
                _ => {}
            }
        }
        let Some(host) = config.virtual_hosts.get_mut(index) else {
            return false;
        };
        let here: Vec<&Patch<'a>> = routes
            .iter()
            .copied()
            .filter(|patch| host_fits(patch, host))
            .collect();
        host.routes.retain_mut(|route| {
            for patch in &here {
                if !route_matched(patch).is_none_or(|wanted| route_fits(wanted, route)) {
                    continue;
                }
                match patch.operation() {
                    PatchOperation::Remove => {
                        patch.used.set(true);
                        return false;
                    }
                    PatchOperation::Merge => self.merge(patch, route, |_, _| None),
                    _ => {}
                }
            }
            true
        });
        let find = |patch: &Patch<'a>, all: &[Route]| {
            let wanted = route_matched(patch)?;
            Some(all.iter().position(|route| route_fits(wanted, route)))
        };
        self.insert(&here, &mut host.routes, find, |route| route);
        true
    }
}

fn route_matched<'p>(patch: &'p Patch<'_>) -> Option<&'p RouteMatch> {
    let config = patch.config.matches.route_configuration.as_ref()?;
    config.vhost.as_ref()?.route.as_ref()
}

fn route_fits(wanted: &RouteMatch, route: &Route) -> bool {
    (wanted.name.is_empty() || wanted.name == route.name)
        && match wanted.action {
            RouteActionKind::Any => true,
            RouteActionKind::Route => matches!(route.action, Some(Action::Route(_))),
            RouteActionKind::Redirect => matches!(route.action, Some(Action::Redirect(_))),
            RouteActionKind::DirectResponse => {
                matches!(route.action, Some(Action::DirectResponse(_)))
            }
        }
}

fn host_fits(patch: &Patch<'_>, host: &VirtualHost) -> bool {
    let wanted = patch.config.matches.route_configuration.as_ref();
    wanted
        .and_then(|config| config.vhost.as_ref())
        .is_none_or(|wanted| {
            (wanted.name.is_empty() || wanted.name == host.name)
                && (wanted.domain_name.is_empty() || host.domains.contains(&wanted.domain_name))
        })
}

/// Whether a route configuration is meant, by what its name says: `80`, `HOST:80`, `http.80`, `inbound|80||`,
/// `https.443.PORTNAME.GATEWAY.NAMESPACE`.
fn configuration_fits(wanted: Option<&RouteConfigurationMatch>, name: &str) -> bool {
    let Some(wanted) = wanted else {
        return true;
    };
    let parts: Vec<&str> = match name.strip_prefix("inbound|") {
        Some(rest) => vec!["", rest.split('|').next().unwrap_or_default()],
        None if name.starts_with("http.") || name.starts_with("https.") => {
            name.split('.').collect()
        }
        None => vec!["", name.rsplit(':').next().unwrap_or_default()],
    };
    let part = |index: usize| parts.get(index).copied().unwrap_or_default();
    let gateway = format!("{}/{}", part(4), part(3));
    (wanted.name.is_empty() || wanted.name == name)
        && (wanted.port_number == 0 || part(1) == wanted.port_number.to_string())
        && (wanted.port_name.is_empty() || part(2) == wanted.port_name)
        && (wanted.gateway.is_empty() || gateway == wanted.gateway)
}

/// Envoy refuses a route configuration in which a domain is twice.
fn repeated_domain<'h>(hosts: impl IntoIterator<Item = &'h VirtualHost>) -> Option<String> {
    let mut seen = HashSet::new();
    hosts
        .into_iter()
        .flat_map(|host| &host.domains)
        .find(|domain| !seen.insert(domain.to_ascii_lowercase()))
        .map(|domain| format!("two virtual hosts would be for domain {domain:?}"))
}
