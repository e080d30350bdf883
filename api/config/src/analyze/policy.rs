//! AuthorizationPolicies, Telemetry providers, EnvoyFilters.

use super::{Mesh, Resource, namespace_matches, selects, strings};

/// IST0127: the policy is about no pods; IST0101: it names a namespace that is not there.
pub(super) fn authorization(mesh: &mut Mesh<'_>) {
    for policy in mesh.of("security.istio.io", "AuthorizationPolicy") {
        let spec = policy.spec();
        let wanted = strings(spec.get("selector").get("matchLabels").value);
        let everywhere = policy.namespace() == mesh.root();
        let targeted = spec.has("targetRef") || spec.get("targetRefs").count() > 0;
        let about = |pod: &Resource| everywhere || pod.namespace() == policy.namespace();
        let in_mesh = |pod: &Resource| {
            mesh.injects_pod(pod.namespace(), &pod.labels, &pod.annotations)
                || pod
                    .annotations
                    .get("ambient.istio.io/redirection")
                    .map(String::as_str)
                    == Some("enabled")
                || pod
                    .spec()
                    .get("containers")
                    .items()
                    .any(|container| container.str("name") == "istio-proxy")
        };
        let any = mesh
            .of("", "Pod")
            .any(|pod| about(pod) && selects(&wanted, &pod.labels) && in_mesh(pod));
        if !(any || targeted || everywhere && wanted.is_empty()) {
            mesh.report(
                "IST0127",
                policy,
                "spec.selector",
                "no pod of the mesh is selected",
            );
        }
        for (index, rule) in spec.get("rules").items().enumerate() {
            for source in rule.get("from").items().map(|from| from.get("source")) {
                for item in source
                    .get("namespaces")
                    .items()
                    .chain(source.get("notNamespaces").items())
                {
                    let known = item.text() == "*"
                        || mesh
                            .of("", "Namespace")
                            .any(|namespace| namespace_matches(item.text(), &namespace.name));
                    if !known {
                        let text = format!(
                            "rule {index} names namespace {}, and there is none",
                            item.text()
                        );
                        mesh.report("IST0101", policy, &item.path, text);
                    }
                }
            }
        }
    }
}

/// IST0157: access logs, metrics or traces without a provider, and no default one.
pub(super) fn providers(mesh: &mut Mesh<'_>) {
    for telemetry in mesh.of("telemetry.istio.io", "Telemetry") {
        for (field, default) in [
            ("accessLogging", "accessLogging"),
            ("metrics", "metrics"),
            ("tracing", "tracing"),
        ] {
            let has_default = mesh.config["defaultProviders"][default]
                .as_array()
                .is_some_and(|all| !all.is_empty());
            for entry in telemetry.spec().get(field).items() {
                let off = entry.flag("disabled") || entry.flag("disableSpanReporting");
                // Metrics go to Prometheus, traces to what the mesh configuration says, without being told.
                if field == "accessLogging"
                    && entry.get("providers").count() == 0
                    && !has_default
                    && !off
                {
                    mesh.report(
                        "IST0157",
                        telemetry,
                        &entry.path,
                        format!("{field} names no provider, and the mesh has no default one"),
                    );
                }
            }
        }
    }
}

/// IST0151 to IST0155: operations that have no effect, or one that changes with the order of filters.
pub(super) fn envoy_patches(mesh: &mut Mesh<'_>) {
    for filter in mesh.of("networking.istio.io", "EnvoyFilter") {
        let has_priority = filter.spec().get("priority").int() != 0;
        // Names that patches before have put in for one proxy version only.
        let mut for_version: Vec<String> = Vec::new();
        for at in filter.spec().get("configPatches").items() {
            let (apply_to, operation) = (at.str("applyTo"), at.get("patch").str("operation"));
            let path = at.get("patch").path;
            let filters = matches!(apply_to, "NETWORK_FILTER" | "HTTP_FILTER");
            let wrong = match operation {
                "REPLACE" if !filters && apply_to != "VIRTUAL_HOST" => Some((
                    "IST0152",
                    "REPLACE is for NETWORK_FILTER, HTTP_FILTER and VIRTUAL_HOST only; it has no effect",
                )),
                "ADD" if matches!(apply_to, "ROUTE_CONFIGURATION" | "HTTP_ROUTE") => Some((
                    "IST0153",
                    "ADD has no effect on ROUTE_CONFIGURATION and HTTP_ROUTE",
                )),
                "REMOVE" if matches!(apply_to, "ROUTE_CONFIGURATION" | "HTTP_ROUTE") => Some((
                    "IST0154",
                    "REMOVE has no effect on ROUTE_CONFIGURATION and HTTP_ROUTE",
                )),
                _ => None,
            };
            if let Some((code, text)) = wrong {
                mesh.report(code, filter, &path, text);
            }
            // Whether it applies depends on which filters other patches have put there before.
            let relative = match operation {
                "INSERT_BEFORE" | "INSERT_AFTER" | "REMOVE" => wrong.is_none(),
                "REPLACE" => apply_to == "HTTP_FILTER",
                _ => false,
            };
            let name = at.get("patch").get("value").str("name").to_owned();
            let seen = !name.is_empty() && for_version.contains(&name);
            if !at.get("match").get("proxy").str("proxyVersion").is_empty() {
                for_version.push(name);
            }
            if !relative || has_priority {
                continue;
            }
            let (code, text) = if seen {
                (
                    "IST0155",
                    "depends on another patch that is for one proxy version only; set priority",
                )
            } else {
                (
                    "IST0151",
                    "depends on what other EnvoyFilters do; set priority",
                )
            };
            mesh.report(code, filter, &path, format!("{operation} {text}"));
        }
    }
}
