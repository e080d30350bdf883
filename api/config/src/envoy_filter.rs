//! `networking.istio.io` EnvoyFilter: patches of what proxies are sent, in Envoy's own messages.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::review::envoy_filter::encode;
use crate::security::PolicyTarget;
use crate::value::WorkloadSelector;

/// Longest encoded value of a patch, in bytes: it may go into every listener of every proxy.
const VALUE_LIMIT: usize = 256 * 1024;

macro_rules! kinds {
    ($( $(#[$meta:meta])* $name:ident { $( $(#[$field_meta:meta])* $field:ident : $type:ty, )* } )*) => {$(
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
        pub struct $name { $( $(#[$field_meta])* pub $field: $type, )* }
    )*};
}

kinds! {
    /// Patches for some proxies.
    EnvoyFilter {
        /// Workloads it is for; none: the namespace, or in the root namespace the mesh.
        workload_selector: Option<WorkloadSelector>,
        /// Gateways it is for, instead.
        target_refs: Vec<PolicyTarget>,
        /// In order.
        config_patches: Vec<ConfigPatch>,
        /// Lower comes first.
        priority: i32,
        /// Of Istio 1.4; without effect.
        workload_labels: BTreeMap<String, String>,
        /// Of Istio 1.4; without effect.
        filters: Vec<Value>,
    }

    /// One patch.
    ConfigPatch {
        /// What is patched.
        apply_to: ApplyTo,
        /// Which of them.
        #[serde(rename = "match")] matches: PatchMatch,
        /// What becomes of them.
        patch: Patch,
    }

    /// Which objects a patch is for; what is not set does not matter.
    PatchMatch {
        /// Where the object is.
        context: PatchContext,
        /// The proxy.
        proxy: Option<ProxyMatch>,
        /// The listener, and what is within it.
        listener: Option<ListenerMatch>,
        /// The route configuration, and what is within it.
        route_configuration: Option<RouteConfigurationMatch>,
        /// The cluster.
        cluster: Option<ClusterMatch>,
        /// Waypoints, of which there are none here.
        waypoint: Option<Value>,
    }

    /// A proxy.
    ProxyMatch {
        /// Regular expression of its `ISTIO_VERSION`.
        proxy_version: String,
        /// Of its node's metadata.
        metadata: BTreeMap<String, String>,
    }

    /// A listener.
    ListenerMatch {
        /// Its port.
        port_number: u32,
        /// Without effect, as in Istio.
        port_name: String,
        /// Its name.
        name: String,
        /// A listener filter that it has.
        listener_filter: String,
        /// One of its filter chains.
        filter_chain: Option<FilterChainMatch>,
    }

    /// A filter chain.
    FilterChainMatch {
        /// Its name.
        name: String,
        /// One of the server names it is for.
        sni: String,
        /// The transport protocol it is for.
        transport_protocol: String,
        /// Protocols it is for, with commas between them.
        application_protocols: String,
        /// One of its filters.
        filter: Option<FilterMatch>,
        /// The destination port it is for.
        destination_port: u32,
    }

    /// A network filter.
    FilterMatch {
        /// Its name.
        name: String,
        /// An HTTP filter of the connection manager.
        sub_filter: Option<SubFilterMatch>,
    }

    /// An HTTP filter.
    SubFilterMatch {
        /// Its name.
        name: String,
    }

    /// A route configuration.
    RouteConfigurationMatch {
        /// The port it is for.
        port_number: u32,
        /// At gateways: name of the port.
        port_name: String,
        /// At gateways: `NAMESPACE/NAME` of the Gateway.
        gateway: String,
        /// Its name.
        name: String,
        /// One of its virtual hosts.
        vhost: Option<VirtualHostMatch>,
    }

    /// A virtual host.
    VirtualHostMatch {
        /// Its name.
        name: String,
        /// One of its domains.
        domain_name: String,
        /// One of its routes.
        route: Option<RouteMatch>,
    }

    /// A route.
    RouteMatch {
        /// Its name.
        name: String,
        /// What it does.
        action: RouteActionKind,
    }

    /// A cluster.
    ClusterMatch {
        /// Port of the service.
        port_number: u32,
        /// Host of the service.
        service: String,
        /// Its subset.
        subset: String,
        /// Its name; the others then do not matter.
        name: String,
    }

    /// What is done.
    Patch {
        /// How.
        operation: PatchOperation,
        /// With what, as written.
        value: Value,
        /// Kind of filter; without effect.
        filter_class: String,
        /// `value` as the message that is patched, encoded; filled in by [`EnvoyFilter::encode`].
        #[serde(skip)] encoded: Vec<u8>,
        /// Why `value` is no such message.
        #[serde(skip)] fault: Option<String>,
    }
}

/// What a patch is applied to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[allow(missing_docs, reason = "Istio's names")]
pub enum ApplyTo {
    #[default]
    Invalid,
    Listener,
    FilterChain,
    NetworkFilter,
    HttpFilter,
    RouteConfiguration,
    VirtualHost,
    HttpRoute,
    Cluster,
    ExtensionConfig,
    Bootstrap,
    ListenerFilter,
}

/// Where a patched object is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PatchContext {
    /// Anywhere.
    #[default]
    Any,
    /// At sidecars, towards their workload.
    SidecarInbound,
    /// At sidecars, from their workload.
    SidecarOutbound,
    /// At gateways.
    Gateway,
    /// At waypoints, of which there are none here.
    Waypoint,
}

/// How a patch changes what it matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PatchOperation {
    /// Nobody said.
    #[default]
    Invalid,
    /// The value is merged into it.
    Merge,
    /// The value comes last.
    Add,
    /// It goes.
    Remove,
    /// The value comes before it.
    InsertBefore,
    /// The value comes after it.
    InsertAfter,
    /// The value comes first.
    InsertFirst,
    /// The value comes instead.
    Replace,
}

/// What a route does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[allow(missing_docs, reason = "Istio's names")]
pub enum RouteActionKind {
    #[default]
    Any,
    Route,
    Redirect,
    DirectResponse,
}

impl ApplyTo {
    /// The message a patch's value is: its full name. `None` if nothing is patched.
    #[must_use]
    pub fn message(self) -> Option<&'static str> {
        Some(match self {
            Self::Listener => "envoy.config.listener.v3.Listener",
            Self::FilterChain => "envoy.config.listener.v3.FilterChain",
            Self::NetworkFilter => "envoy.config.listener.v3.Filter",
            Self::ListenerFilter => "envoy.config.listener.v3.ListenerFilter",
            Self::HttpFilter => {
                "envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter"
            }
            Self::RouteConfiguration => "envoy.config.route.v3.RouteConfiguration",
            Self::VirtualHost => "envoy.config.route.v3.VirtualHost",
            Self::HttpRoute => "envoy.config.route.v3.Route",
            Self::Cluster => "envoy.config.cluster.v3.Cluster",
            Self::ExtensionConfig => "envoy.config.core.v3.TypedExtensionConfig",
            Self::Bootstrap => "envoy.config.bootstrap.v3.Bootstrap",
            Self::Invalid => return None,
        })
    }
}

impl EnvoyFilter {
    /// Reads the values of all patches, once and for all: proxies are many. What cannot be read stays as a fault
    /// of its patch.
    pub(crate) fn encode(&mut self) {
        for patch in &mut self.config_patches {
            let Some(message) = patch.apply_to.message() else {
                continue;
            };
            if patch.patch.operation == PatchOperation::Remove {
                continue;
            }
            match encode(message, &patch.patch.value) {
                Ok(encoded) if encoded.len() > VALUE_LIMIT => {
                    patch.patch.fault = Some(format!("is longer than {VALUE_LIMIT} bytes"));
                }
                Ok(encoded) => patch.patch.encoded = encoded,
                Err(fault) => patch.patch.fault = Some(fault),
            }
        }
    }
}
