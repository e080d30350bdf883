//! Which protocols listeners may have, and which routes each takes.

use lateen_config::gateway_api::{GROUP, Listener};

use super::Fault;
use super::world::Class;

/// Port of the tunnels of ambient meshes.
pub(super) const TUNNEL_PORT: u32 = 15008;

/// Why a protocol is not served.
pub(super) fn protocol(class: Class, listener: &Listener) -> Option<Fault> {
    let name = listener.protocol.as_str();
    let message = match name {
        "HTTP" | "HTTPS" | "TLS" | "TCP" => return None,
        "HBONE" if matches!(class, Class::Waypoint | Class::EastWest) => return None,
        "HBONE" => format!("protocol {name:?} is only supported for waypoint proxies"),
        _ => {
            let upper = name.to_ascii_uppercase();
            if matches!(upper.as_str(), "HTTP" | "HTTPS" | "TLS" | "TCP" | "HBONE") {
                format!(
                    "protocol {name:?} is unsupported. hint: {upper:?} (uppercase) may be supported"
                )
            } else {
                format!("protocol {name:?} is unsupported")
            }
        }
    };
    Some(Fault::new("UnsupportedProtocol", message))
}

/// What gateways of ambient meshes must look like.
pub(super) fn expected(class: Class, listener: &Listener) -> Option<Fault> {
    let tunnel = listener.port == TUNNEL_PORT && listener.protocol == "HBONE";
    let mode = listener.tls.as_ref().map(|tls| tls.mode.as_deref());
    let message = match class {
        Class::Waypoint if !tunnel => {
            r#"Expected a single listener on port 15008 with protocol "HBONE""#
        }
        Class::EastWest
            if !(tunnel && mode == Some(Some("Terminate"))
                || listener.protocol == "TLS" && mode == Some(Some("Passthrough"))) =>
        {
            r#"East-west gateway listeners must be either port 15008 with protocol "HBONE" and TLS.Mode == Terminate, or TLS with TLS.Mode == Passthrough"#
        }
        _ => return None,
    };
    Some(Fault::new("UnsupportedProtocol", message))
}

/// Kinds of routes that a listener takes, and whether that is all it asks for.
pub(super) fn kinds(listener: &Listener) -> (Vec<&'static str>, bool) {
    let passes = listener
        .tls
        .as_ref()
        .is_some_and(|tls| tls.mode.as_deref() == Some("Passthrough"));
    let known: &[&'static str] = match listener.protocol.as_str() {
        "HTTP" | "HTTPS" => &["HTTPRoute", "GRPCRoute"],
        "TCP" => &["TCPRoute"],
        "TLS" if passes => &["TLSRoute"],
        "TLS" => &["TLSRoute", "TCPRoute"],
        _ => &[],
    };
    let wanted = listener
        .allowed_routes
        .as_ref()
        .map_or(&[][..], |allowed| allowed.kinds.as_slice());
    if wanted.is_empty() {
        return (known.to_vec(), true);
    }
    let both: Vec<&'static str> = known
        .iter()
        .filter(|known| {
            wanted
                .iter()
                .any(|kind| kind.kind == **known && kind.group.as_deref().unwrap_or(GROUP) == GROUP)
        })
        .copied()
        .collect();
    let all = both.len() == wanted.len();
    (both, all)
}
