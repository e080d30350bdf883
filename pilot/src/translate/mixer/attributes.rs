//! What is said of a destination, and how attributes are collected.

use std::collections::HashMap;
use std::net::IpAddr;

use lateen_protocols::istio::mixer::v1::Attributes;
use lateen_protocols::istio::mixer::v1::attributes::{AttributeValue, attribute_value::Value};

use crate::model::{Registry, Service};

/// Where a request goes, in Mixer's terms.
#[derive(Clone, Copy, Debug)]
pub(in crate::translate) enum Destination<'a> {
    /// A service.
    Service(&'a Service),
    /// A special cluster, or a host nobody declared.
    Named(&'a str),
}

impl Destination<'_> {
    pub(super) fn attributes(self) -> Attributes {
        let mut all = Builder::default();
        match self {
            Self::Service(service) => {
                let name = match service.registry {
                    Registry::Kubernetes => service.name.as_str(),
                    Registry::External => &*service.hostname,
                };
                all.text("destination.service.host", &service.hostname);
                all.text("destination.service.name", name);
                all.text("destination.service.namespace", &service.namespace);
                all.text(
                    "destination.service.uid",
                    &format!("istio://{}/services/{name}", service.namespace),
                );
            }
            Self::Named(name) => all.text("destination.service.name", name),
        }
        all.finish()
    }
}

/// Both; of the same name the later.
pub(super) fn merged(mut all: Attributes, more: Attributes) -> Attributes {
    all.attributes.extend(more.attributes);
    all
}

/// Attributes as they are collected.
#[derive(Default)]
pub(super) struct Builder(HashMap<String, AttributeValue>);

impl Builder {
    pub(super) fn set(&mut self, name: &str, value: Value) {
        self.0
            .insert(name.to_owned(), AttributeValue { value: Some(value) });
    }

    pub(super) fn text(&mut self, name: &str, value: &str) {
        self.set(name, Value::StringValue(value.to_owned()));
    }

    pub(super) fn finish(self) -> Attributes {
        Attributes { attributes: self.0 }
    }
}

pub(super) fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}
