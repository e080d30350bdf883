//! TLS of listeners: certificates by Secret, clients' certificates, and Istio's options for the rest.

use std::collections::BTreeSet;

use lateen_config::gateway_api::{FrontendValidation, Gateway, Listener, ObjectReference};
use lateen_config::{Labels, Object};
use serde_json::{Value, json};

use super::Fault;
use super::world::{World, target};

/// Option of a listener: `MUTUAL`, `OPTIONAL_MUTUAL`, `ISTIO_SIMPLE`, `ISTIO_MUTUAL`.
const TERMINATE_MODE: &str = "gateway.istio.io/tls-terminate-mode";
/// Option of a listener: cipher suites, comma separated.
const CIPHER_SUITES: &str = "gateway.istio.io/tls-cipher-suites";
/// Option of a listener, of which `auto-passthrough` makes it one between networks.
const LISTENER_MODE: &str = "gateway.istio.io/listener-protocol";

/// Scheme of Secrets that Gateways of this API name.
pub(super) const SECRET_SCHEME: &str = "kubernetes-gateway://";
/// Scheme of ConfigMaps with authorities.
pub(super) const CONFIG_MAP_SCHEME: &str = "configmap://";
/// The proxy's own certificate.
const BUILTIN: &str = "builtin://";
/// Ends the name of what holds authorities.
const AUTHORITIES: &str = "-cacert";
/// More certificates than one, of different key types, and no more than that.
const CERTIFICATE_LIMIT: usize = 2;

/// TLS of a listener as far as it goes, what it may use, and what is wrong with it.
#[derive(Default)]
pub(super) struct Tls {
    pub(super) settings: Option<Value>,
    pub(super) credentials: BTreeSet<String>,
    pub(super) fault: Option<Fault>,
}

/// The object that a listener is written in.
pub(super) struct Holder<'a> {
    pub(super) object: &'a Object,
    pub(super) kind: &'static str,
    /// The Gateway that it is a listener of.
    pub(super) gateway: &'a Gateway,
}

pub(super) fn of(world: &World<'_>, holder: &Holder<'_>, listener: &Listener) -> Tls {
    let Some(tls) = &listener.tls else {
        let fault = (listener.protocol == "HTTPS").then(|| {
            Fault::new(
                "InvalidCertificateRef",
                "protocol HTTPS needs tls.certificateRefs",
            )
        });
        return Tls {
            fault,
            ..Tls::default()
        };
    };
    let mut built = Tls::default();
    let mut settings = json!({});
    let known: Vec<&str> = tls
        .options
        .get(CIPHER_SUITES)
        .into_iter()
        .flat_map(|list| list.split(','))
        .map(str::trim)
        .filter(|name| lateen_config::review::is_cipher_suite(name))
        .collect();
    if !known.is_empty() {
        settings["cipherSuites"] = json!(known);
    }
    if tls.mode.as_deref() == Some("Passthrough") {
        if is_between_networks(&holder.object.labels, listener) {
            settings["mode"] = json!("AUTO_PASSTHROUGH");
        }
    } else {
        terminate(world, holder, listener, &mut settings, &mut built);
    }
    built.settings = Some(settings);
    built
}

fn terminate(
    world: &World<'_>,
    holder: &Holder<'_>,
    listener: &Listener,
    settings: &mut Value,
    built: &mut Tls,
) {
    let Some(tls) = &listener.tls else { return };
    let option = tls.options.get(TERMINATE_MODE).map_or("", String::as_str);
    let mut mode = "SIMPLE";
    match option {
        "MUTUAL" => mode = "MUTUAL",
        "OPTIONAL_MUTUAL" => mode = "OPTIONAL_MUTUAL",
        "ISTIO_SIMPLE" => {
            settings["mode"] = json!("SIMPLE");
            settings["credentialName"] = json!(BUILTIN);
            return;
        }
        "ISTIO_MUTUAL" => {
            settings["mode"] = json!("ISTIO_MUTUAL");
            return;
        }
        _ => {}
    }
    if let Some(validation) = clients(holder.gateway, listener) {
        if option != "OPTIONAL_MUTUAL" {
            mode = match validation.mode.as_deref() {
                Some("AllowInsecureFallback") => "OPTIONAL_MUTUAL",
                _ => "MUTUAL",
            };
        }
        match authorities(world, holder, validation) {
            Ok(name) => {
                settings["caCertCredentialName"] = json!(format!("{name}{AUTHORITIES}"));
                built.credentials.insert(name);
            }
            Err(fault) => built.fault = Some(fault),
        }
    }
    settings["mode"] = json!(mode);
    if tls.certificate_refs.len() > CERTIFICATE_LIMIT {
        built.fault = Some(Fault::new(
            "InvalidCertificateRef",
            "TLS mode can only support up to 2 server certificates",
        ));
        return;
    }
    let mut good = Vec::new();
    let mut wrong = None;
    for reference in &tls.certificate_refs {
        match certificate(world, holder, reference) {
            Ok(name) => good.push(name),
            Err(fault) => wrong = Fault::join(wrong, Some(fault)),
        }
    }
    match good.as_slice() {
        // One that is good is served, whatever the other is.
        [] => {
            let missing = || Fault::new("InvalidCertificateRef", "no certificateRefs");
            let fault = wrong.unwrap_or_else(missing);
            built.fault = Fault::join(built.fault.take(), Some(fault));
        }
        [only] => settings["credentialName"] = json!(only),
        several => settings["credentialNames"] = json!(several),
    }
    built.credentials.extend(good);
}

/// The name of a listener's certificate.
fn certificate(
    world: &World<'_>,
    holder: &Holder<'_>,
    reference: &ObjectReference,
) -> Result<String, Fault> {
    let own = &*holder.object.key.namespace;
    let wrong = |text: String| {
        Fault::new(
            "InvalidCertificateRef",
            format!("invalid certificate reference {text}"),
        )
    };
    if target(&reference.group, &reference.kind, ("", "Secret")) != ("", "Secret") {
        return Err(wrong(format!(
            "{}, only secret is allowed",
            shown(reference)
        )));
    }
    let namespace = reference.namespace.as_deref().unwrap_or(own);
    let Some(secret) = world.secret(namespace, &reference.name) else {
        return Err(wrong(format!(
            "{}, secret {namespace}/{} not found",
            shown(reference),
            reference.name
        )));
    };
    if secret.certificate_chain().is_none() || secret.private_key().is_none() {
        return Err(wrong(format!(
            "{}, found secret, but didn't have expected keys (tls.crt and tls.key)",
            shown(reference)
        )));
    }
    if namespace != own
        && !world.granted(
            (holder.kind, own),
            ("", "Secret"),
            (namespace, &reference.name),
        )
    {
        return Err(Fault::new(
            "RefNotPermitted",
            format!(
                "certificateRef {}/{namespace} not accessible to a Gateway in namespace {own:?} (missing a ReferenceGrant?)",
                reference.name
            ),
        ));
    }
    Ok(format!("{SECRET_SCHEME}{namespace}/{}", reference.name))
}

/// What clients' certificates must be, for the listener's port.
fn clients<'a>(gateway: &'a Gateway, listener: &'a Listener) -> Option<&'a FrontendValidation> {
    let old = listener
        .tls
        .as_ref()
        .and_then(|tls| tls.frontend_validation.as_ref());
    let frontend = gateway.tls.as_ref().and_then(|tls| tls.frontend.as_ref());
    let Some(frontend) = frontend else {
        return old;
    };
    frontend
        .per_port
        .iter()
        .find(|port| port.port == listener.port)
        .map_or(&frontend.default, |port| &port.tls)
        .validation
        .as_ref()
        .or(old)
}

/// The name of what clients' certificates are verified by.
fn authorities(
    world: &World<'_>,
    holder: &Holder<'_>,
    validation: &FrontendValidation,
) -> Result<String, Fault> {
    let own = &*holder.object.key.namespace;
    let wrong = |reason, text: String| {
        Fault::new(reason, format!("invalid CA certificate reference {text}"))
    };
    let [reference] = validation.ca_certificate_refs.as_slice() else {
        return Err(Fault::new(
            "InvalidCACertificateRef",
            "exactly 1 caCertificateRefs is supported for clients' certificates",
        ));
    };
    let namespace = reference.namespace.as_deref().unwrap_or(own);
    let place = format!("{namespace}/{}", reference.name);
    let kind = target(&reference.group, &reference.kind, ("", "ConfigMap"));
    let (scheme, found) = match kind {
        ("", "ConfigMap") => {
            let map = world.config_map(namespace, &reference.name);
            (
                CONFIG_MAP_SCHEME,
                map.map(|map| map.data.get("ca.crt").is_some_and(|text| !text.is_empty())),
            )
        }
        ("", "Secret") => {
            let secret = world.secret(namespace, &reference.name);
            (
                SECRET_SCHEME,
                secret.map(|secret| secret.authorities().is_some()),
            )
        }
        _ => {
            return Err(wrong(
                "InvalidCACertificateKind",
                format!(
                    "{}, only secret and configmap are allowed",
                    shown(reference)
                ),
            ));
        }
    };
    match found {
        None => Err(wrong(
            "InvalidCACertificateRef",
            format!(
                "{}, {} {place} not found",
                shown(reference),
                kind.1.to_ascii_lowercase()
            ),
        )),
        Some(false) => Err(wrong(
            "InvalidCACertificateRef",
            format!("{}, no ca.crt in {place}", shown(reference)),
        )),
        Some(true)
            if namespace != own
                && !world.granted((holder.kind, own), kind, (namespace, &reference.name)) =>
        {
            Err(Fault::new(
                "RefNotPermitted",
                format!(
                    "caCertificateRef {}/{namespace} not accessible to a Gateway in namespace {own:?} (missing a ReferenceGrant?)",
                    reference.name
                ),
            ))
        }
        Some(true) => Ok(format!("{scheme}{place}")),
    }
}

/// Whether connections pass by SNI to clusters of the same name: declared by option, or by the labels of a gateway
/// between networks.
fn is_between_networks(labels: &Labels, listener: &Listener) -> bool {
    let option = listener
        .tls
        .as_ref()
        .and_then(|tls| tls.options.get(LISTENER_MODE));
    if option.is_some_and(|mode| mode == "auto-passthrough") {
        return true;
    }
    labels.contains_key("topology.istio.io/network")
        && labels
            .get("networking.istio.io/gatewayPort")
            .map_or("15443", String::as_str)
            == listener.port.to_string()
}

fn shown(reference: &ObjectReference) -> String {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    format!(
        "{}/{}/{}.{}",
        text(&reference.group),
        text(&reference.kind),
        reference.name,
        text(&reference.namespace)
    )
}
