//! Kubernetes Ingress: `networking.k8s.io/v1`, and the older form of `v1beta1` and `extensions/v1beta1`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::kubernetes::IntOrString;

macro_rules! kinds {
    ($( $(#[$meta:meta])* $name:ident { $( $(#[$field_meta:meta])* $field:ident : $type:ty, )* } )*) => {$(
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
        pub struct $name { $( $(#[$field_meta])* pub $field: $type, )* }
    )*};
}

kinds! {
    /// Hosts and paths that lead to Services.
    Ingress {
        /// Its IngressClass.
        ingress_class_name: Option<String>,
        /// Where everything else goes; not served, as in Istio.
        #[serde(alias = "backend")] default_backend: Option<Backend>,
        /// Certificates.
        tls: Vec<Tls>,
        /// Hosts and paths.
        rules: Vec<Rule>,
    }

    /// A certificate.
    Tls {
        /// Hosts; empty: all.
        hosts: Vec<String>,
        /// Secret with certificate and key.
        secret_name: String,
    }

    /// A host.
    Rule {
        /// Host name or wildcard; empty: all.
        host: String,
        /// Its paths.
        http: Option<Paths>,
    }

    /// Paths.
    Paths {
        /// Paths.
        paths: Vec<Path>,
    }

    /// A path.
    Path {
        /// The path.
        path: String,
        /// `Exact`, `Prefix`, `ImplementationSpecific`.
        path_type: Option<String>,
        /// Where to.
        backend: Backend,
    }

    /// Where to: both forms.
    Backend {
        /// A Service.
        service: Option<BackendService>,
        /// Something else; not supported.
        resource: Option<Value>,
        /// Old: name of the Service.
        service_name: Option<String>,
        /// Old: its port.
        service_port: Option<IntOrString>,
    }

    /// A Service.
    BackendService {
        /// Name.
        name: String,
        /// Port.
        port: BackendPort,
    }

    /// A port by name or number.
    BackendPort {
        /// Name.
        name: String,
        /// Number.
        number: u16,
    }

    /// Who answers for Ingresses of a class.
    IngressClass {
        /// The controller.
        controller: String,
        /// Its parameters; not read.
        parameters: Option<Value>,
    }
}

impl Backend {
    /// Name of the Service, if that is what it is.
    #[must_use]
    pub fn service_name(&self) -> Option<&str> {
        match &self.service {
            Some(service) => Some(&service.name),
            None => self.service_name.as_deref(),
        }
    }

    /// Number of the port, or its name.
    #[must_use]
    pub fn port(&self) -> Option<IntOrString> {
        match &self.service {
            Some(service) if service.port.number > 0 => Some(IntOrString::Int(service.port.number)),
            Some(service) if service.port.name.is_empty() => None,
            Some(service) => Some(IntOrString::String(service.port.name.clone())),
            None => self.service_port.clone(),
        }
    }
}
