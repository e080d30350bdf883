//! Patches of listeners: their filter chains, filters, and the routes within connection managers.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3::{
    TrafficDirection, TypedExtensionConfig, address::Address, socket_address::PortSpecifier,
};
use envoy_types::pb::envoy::config::listener::v3::{
    Filter, FilterChain, Listener, ListenerFilter, filter::ConfigType,
    listener_filter::ConfigType as ListenerConfig,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, http_connection_manager::RouteSpecifier,
    http_filter::ConfigType as HttpConfig,
};
use lateen_config::envoy_filter::{
    ApplyTo, FilterChainMatch, FilterMatch, PatchContext, PatchOperation,
};
use prost::{Message, Name};

use crate::model::{Agent, Role};

use super::super::wire::any;
use super::{Patch, Patches, is_named, renames};

const ROUTER: &str = "envoy.filters.http.router";

type Extensions = BTreeMap<String, TypedExtensionConfig>;

impl<'a> Patches<'a> {
    pub(super) fn listeners(
        &self,
        listeners: &mut BTreeMap<String, Listener>,
        extensions: &Extensions,
    ) {
        listeners.retain(|_, listener| self.listener(listener, extensions));
        for patch in self.added(ApplyTo::Listener) {
            if let Some(listener) = self.value::<Listener>(patch) {
                self.add(patch, listeners, listener.name.clone(), listener);
            }
        }
    }

    /// Whether a listener stays.
    fn listener(&self, listener: &mut Listener, extensions: &Extensions) -> bool {
        let context = match (self.role, listener.traffic_direction()) {
            (Role::Router, _) => PatchContext::Gateway,
            (_, TrafficDirection::Inbound) => PatchContext::SidecarInbound,
            (_, TrafficDirection::Outbound | TrafficDirection::Unspecified) => {
                PatchContext::SidecarOutbound
            }
        };
        for patch in self.to(ApplyTo::Listener, context) {
            if !listener_fits(patch, listener) {
                continue;
            }
            match patch.operation() {
                PatchOperation::Remove => {
                    patch.used.set(true);
                    return false;
                }
                PatchOperation::Merge => self.merge(patch, listener, |old, new| {
                    (old.name != new.name).then(|| renames("listener", &old.name))
                }),
                _ => {}
            }
        }
        self.listener_filters(listener, context);
        self.chains(listener, context, extensions);
        true
    }

    fn here(&self, kind: ApplyTo, context: PatchContext, listener: &Listener) -> Vec<&Patch<'a>> {
        self.to(kind, context)
            .filter(|patch| listener_fits(patch, listener))
            .collect()
    }

    fn listener_filters(&self, listener: &mut Listener, context: PatchContext) {
        let patches = self.here(ApplyTo::ListenerFilter, context, listener);
        fn wanted<'p>(patch: &'p Patch<'_>) -> Option<&'p str> {
            let listener = patch.config.matches.listener.as_ref()?;
            Some(listener.listener_filter.as_str()).filter(|name| !name.is_empty())
        }
        let find = |patch: &Patch<'a>, all: &[ListenerFilter]| {
            let wanted = wanted(patch)?;
            Some(all.iter().position(|filter| is_named(&filter.name, wanted)))
        };
        self.insert(&patches, &mut listener.listener_filters, find, |filter| {
            filter
        });
        listener.listener_filters.retain_mut(|filter| {
            patches.iter().all(|patch| {
                wanted(patch).is_none_or(|wanted| !is_named(&filter.name, wanted))
                    || self.change(patch, filter)
            })
        });
    }

    /// REMOVE and MERGE; whether the message stays. What is configured by another type of message is not meant.
    fn change<M: Configured>(&self, patch: &Patch<'_>, message: &mut M) -> bool {
        match patch.operation() {
            PatchOperation::Remove => {
                patch.used.set(true);
                return false;
            }
            PatchOperation::Merge => {
                let value = M::decode(patch.config.patch.encoded.as_slice());
                let wanted = value.as_ref().ok().and_then(M::configured_by);
                if wanted.is_none() || wanted == message.configured_by() {
                    self.merge(patch, message, |_, _| None);
                }
            }
            _ => {}
        }
        true
    }

    fn chains(&self, listener: &mut Listener, context: PatchContext, extensions: &Extensions) {
        let chains = self.here(ApplyTo::FilterChain, context, listener);
        let network = self.here(ApplyTo::NetworkFilter, context, listener);
        let http = self.here(ApplyTo::HttpFilter, context, listener);
        let routed = self.has_route_patches(context);
        if chains.is_empty() && network.is_empty() && http.is_empty() && !routed {
            return;
        }
        let is_virtual = is_virtual(listener);
        let mut one = |chain: &mut FilterChain| {
            let chains = for_chain(&chains, chain, is_virtual);
            let network = for_chain(&network, chain, is_virtual);
            let http = for_chain(&http, chain, is_virtual);
            if !chains.iter().all(|patch| self.change(patch, chain)) {
                return false;
            }
            self.network_filters(chain, &network);
            if !http.is_empty() || routed {
                for filter in &mut chain.filters {
                    self.connection_manager(filter, &http, context, extensions);
                }
            }
            true
        };
        listener.filter_chains.retain_mut(&mut one);
        if let Some(mut default) = listener.default_filter_chain.take() {
            listener.default_filter_chain = one(&mut default).then_some(default);
        }
        for patch in chains {
            if patch.operation() == PatchOperation::Add
                && let Some(chain) = self.value(patch)
            {
                patch.used.set(true);
                listener.filter_chains.push(chain);
            }
        }
    }

    fn network_filters(&self, chain: &mut FilterChain, patches: &[&Patch<'a>]) {
        fn wanted<'p>(patch: &'p Patch<'_>) -> Option<&'p str> {
            filter_matched(patch).map(|filter| filter.name.as_str())
        }
        let find = |patch: &Patch<'a>, all: &[Filter]| {
            let wanted = wanted(patch)?;
            Some(all.iter().position(|filter| is_named(&filter.name, wanted)))
        };
        self.insert(patches, &mut chain.filters, find, |filter| filter);
        chain.filters.retain_mut(|filter| {
            patches.iter().all(|patch| {
                wanted(patch).is_some_and(|wanted| !is_named(&filter.name, wanted))
                    || self.change(patch, filter)
            })
        });
    }

    /// HTTP filters and routes of a filter that is a connection manager.
    fn connection_manager(
        &self,
        filter: &mut Filter,
        patches: &[&Patch<'a>],
        context: PatchContext,
        extensions: &Extensions,
    ) {
        let Some(ConfigType::TypedConfig(config)) = &mut filter.config_type else {
            return;
        };
        if config.type_url.rsplit('/').next() != Some(&HttpConnectionManager::full_name()) {
            return;
        }
        let patches: Vec<&Patch<'a>> = patches
            .iter()
            .copied()
            .filter(|patch| {
                filter_matched(patch).is_none_or(|wanted| is_named(&filter.name, &wanted.name))
            })
            .collect();
        let Ok(before) = HttpConnectionManager::decode(config.value.as_slice()) else {
            return;
        };
        let mut manager = before.clone();
        self.http_filters(&mut manager.http_filters, &patches, extensions);
        if let Some(RouteSpecifier::RouteConfig(routes)) = &mut manager.route_specifier {
            self.route_configuration(routes, context);
        }
        if manager != before {
            *config = any(&manager);
        }
    }

    fn http_filters(
        &self,
        filters: &mut Vec<HttpFilter>,
        patches: &[&Patch<'a>],
        extensions: &Extensions,
    ) {
        fn wanted<'p>(patch: &'p Patch<'_>) -> Option<&'p str> {
            let filter = filter_matched(patch)?;
            filter.sub_filter.as_ref().map(|sub| sub.name.as_str())
        }
        // The router is always last: what is added comes before it, or Envoy would refuse the listener.
        let router = filters
            .pop_if(|last| last.name == ROUTER)
            .into_iter()
            .collect::<Vec<_>>();
        let find = |patch: &Patch<'a>, all: &[HttpFilter]| {
            let wanted = wanted(patch)?;
            let found = all.iter().position(|filter| is_named(&filter.name, wanted));
            let at_router = || {
                let before = patch.operation() == PatchOperation::InsertBefore;
                (before && router.iter().any(|router| is_named(&router.name, wanted)))
                    .then_some(all.len())
            };
            Some(found.or_else(at_router))
        };
        self.insert(patches, filters, find, |filter| {
            self.inlined(filter, extensions)
        });
        filters.extend(router);
        filters.retain_mut(|filter| {
            patches.iter().all(|patch| {
                wanted(patch).is_some_and(|wanted| !is_named(&filter.name, wanted))
                    || self.change(patch, filter)
            })
        });
    }

    /// Our proxy does not ask for extensions by ECDS: it is told with the filter.
    fn inlined(&self, mut filter: HttpFilter, extensions: &Extensions) -> HttpFilter {
        if self.agent == Agent::Lateen
            && matches!(filter.config_type, Some(HttpConfig::ConfigDiscovery(_)))
            && let Some(config) = extensions
                .get(&filter.name)
                .and_then(|extension| extension.typed_config.clone())
        {
            filter.config_type = Some(HttpConfig::TypedConfig(config));
        }
        filter
    }
}

/// The patches that a filter chain is meant by.
fn for_chain<'p, 'a>(
    all: &[&'p Patch<'a>],
    chain: &FilterChain,
    is_virtual: bool,
) -> Vec<&'p Patch<'a>> {
    all.iter()
        .copied()
        .filter(|patch| chain_fits(patch, chain, is_virtual))
        .collect()
}

/// What may say by a message of its own how it is configured.
trait Configured: Message + Name + Default {
    /// The type of that message.
    fn configured_by(&self) -> Option<&str>;
}

impl Configured for Filter {
    fn configured_by(&self) -> Option<&str> {
        match self.config_type.as_ref()? {
            ConfigType::TypedConfig(config) => Some(&config.type_url),
            ConfigType::ConfigDiscovery(_) => None,
        }
    }
}

impl Configured for ListenerFilter {
    fn configured_by(&self) -> Option<&str> {
        match self.config_type.as_ref()? {
            ListenerConfig::TypedConfig(config) => Some(&config.type_url),
            ListenerConfig::ConfigDiscovery(_) => None,
        }
    }
}

impl Configured for HttpFilter {
    fn configured_by(&self) -> Option<&str> {
        match self.config_type.as_ref()? {
            HttpConfig::TypedConfig(config) => Some(&config.type_url),
            HttpConfig::ConfigDiscovery(_) => None,
        }
    }
}

impl Configured for FilterChain {
    fn configured_by(&self) -> Option<&str> {
        None
    }
}

fn is_virtual(listener: &Listener) -> bool {
    matches!(listener.name.as_str(), "virtualInbound" | "virtualOutbound")
}

fn listener_fits(patch: &Patch<'_>, listener: &Listener) -> bool {
    let Some(wanted) = &patch.config.matches.listener else {
        return true;
    };
    if !wanted.name.is_empty() && wanted.name != listener.name {
        return false;
    }
    // Of a listener filter to be patched the name is where to, not a condition.
    let kind = patch.config.apply_to;
    if kind != ApplyTo::ListenerFilter
        && !wanted.listener_filter.is_empty()
        && !listener
            .listener_filters
            .iter()
            .any(|filter| is_named(&filter.name, &wanted.listener_filter))
    {
        return false;
    }
    // The chains of these are each for a port of their own.
    if kind != ApplyTo::Listener && is_virtual(listener) {
        return true;
    }
    wanted.port_number == 0 || port(listener) == Some(wanted.port_number)
}

fn port(listener: &Listener) -> Option<u32> {
    match listener.address.as_ref()?.address.as_ref()? {
        Address::SocketAddress(socket) => match socket.port_specifier.as_ref()? {
            PortSpecifier::PortValue(port) => Some(*port),
            PortSpecifier::NamedPort(_) => None,
        },
        Address::Pipe(_) | Address::EnvoyInternalAddress(_) => None,
    }
}

fn chain_matched<'p>(patch: &'p Patch<'_>) -> Option<&'p FilterChainMatch> {
    let listener = patch.config.matches.listener.as_ref()?;
    listener.filter_chain.as_ref()
}

fn filter_matched<'p>(patch: &'p Patch<'_>) -> Option<&'p FilterMatch> {
    chain_matched(patch)?.filter.as_ref()
}

fn chain_fits(patch: &Patch<'_>, chain: &FilterChain, is_virtual: bool) -> bool {
    let none = Default::default();
    let matches = chain.filter_chain_match.as_ref().unwrap_or(&none);
    let port = matches.destination_port.as_ref().map(|port| port.value);
    let listener = patch.config.matches.listener.as_ref();
    let wanted_port = listener.map_or(0, |listener| listener.port_number);
    if is_virtual && wanted_port != 0 && port != Some(wanted_port) {
        return false;
    }
    let Some(wanted) = chain_matched(patch) else {
        return true;
    };
    (wanted.name.is_empty() || wanted.name == chain.name)
        && (wanted.sni.is_empty() || matches.server_names.contains(&wanted.sni))
        && (wanted.transport_protocol.is_empty()
            || wanted.transport_protocol == matches.transport_protocol)
        && (wanted.application_protocols.is_empty()
            || wanted.application_protocols.split(',').all(|protocol| {
                matches
                    .application_protocols
                    .iter()
                    .any(|there| there == protocol.trim())
            }))
        && (wanted.destination_port == 0 || port == Some(wanted.destination_port))
}
