//! Mixer beside stock Envoy: the filters and logs it has say what our own proxy's filter says.

use super::*;

const CHECKS: &str = "    disablePolicyChecks: false\n    policyCheckFailOpen: true\n";

const QUOTA: &str = "
apiVersion: config.istio.io/v1alpha2
kind: QuotaSpec
metadata: { name: q, namespace: istio-system }
spec:
  rules:
  - quotas: [{ quota: requestcount, charge: 2 }]
  - match: [{ clause: { request.path: { prefix: /a } } }]
    quotas: [{ quota: other, charge: 1 }]
---
apiVersion: config.istio.io/v1alpha2
kind: QuotaSpecBinding
metadata: { name: q, namespace: istio-system }
spec: { quotaSpecs: [{ name: q, namespace: istio-system }], services: [{ name: reviews, namespace: default }] }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: john, namespace: istio-system }
spec: { match: 'request.headers[\"X-User\"] == \"john\" && (response.headers[\"x-b\"] | \"\") == \"\"' }
";

fn names_of(filters: &Value) -> Vec<&str> {
    let filters = filters.as_array().unwrap();
    filters
        .iter()
        .map(|filter| filter["name"].as_str().unwrap())
        .collect()
}

/// The log of that name.
fn log<'a>(config: &'a Value, name: &str) -> &'a Value {
    let logs = config["access_log"].as_array().unwrap();
    let found = logs.iter().find(|log| log["name"] == name);
    &found.unwrap_or_else(|| panic!("no {name} in {logs:#?}"))["typed_config"]
}

/// Literal custom tags.
fn tags(log: &Value) -> Vec<(&str, &str)> {
    let tags = log["common_config"]["custom_tags"].as_array().unwrap();
    tags.iter()
        .filter_map(|tag| Some((tag["tag"].as_str()?, tag["literal"]["value"].as_str()?)))
        .collect()
}

#[test]
fn inbound_requests_are_checked_and_reported() {
    let resources = translate(&world_with(CHECKS, QUOTA), &sidecar("envoy"));
    let listener = j(&resources.listeners["127.30.0.11_9080"]);
    let manager = filter(&listener, 0, 0);
    assert_eq!(
        names_of(&manager["http_filters"]),
        [
            "envoy.filters.http.header_to_metadata",
            "envoy.filters.http.ext_authz",
            "envoy.filters.http.cors",
            "envoy.filters.http.fault",
            "envoy.filters.http.router",
        ]
    );
    let keep = &manager["http_filters"][0]["typed_config"]["request_rules"][0];
    assert_eq!(keep["header"], "x-istio-attributes");
    assert_eq!(keep["remove"], true);
    let check = &manager["http_filters"][1]["typed_config"];
    assert_eq!(
        *check,
        json!({
            "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
            "grpc_service": {
                "envoy_grpc": {
                    "cluster_name": "outbound|15004||mixer.istio-system.svc.cluster.local",
                    "authority": "mixer.istio-system.svc.cluster.local",
                },
                "timeout": "5s",
                "initial_metadata": [
                    { "key": "mixer-attribute-context.reporter.kind", "value": "inbound" },
                    { "key": "mixer-attribute-context.reporter.uid", "value": "kubernetes://reviews-v1-x.default" },
                    { "key": "mixer-attribute-destination.ip", "value": "127.30.0.11" },
                    { "key": "mixer-attribute-destination.namespace", "value": "default" },
                    { "key": "mixer-attribute-destination.port", "value": "9080" },
                    { "key": "mixer-attribute-destination.uid", "value": "kubernetes://reviews-v1-x.default" },
                ],
            },
            "transport_api_version": "V3",
            "failure_mode_allow": true,
            "status_on_error": { "code": "ServiceUnavailable" },
            "clear_route_cache": true,
            "metadata_context_namespaces": ["lateen.mixer"],
            "include_tls_session": true,
        })
    );
    let route = &j(&resources.routes["inbound|9080||"])["virtual_hosts"][0]["routes"][0];
    let settings = &route["typed_per_filter_config"]["envoy.filters.http.ext_authz"];
    let extensions = &settings["check_settings"]["context_extensions"];
    for (name, value) in [
        (
            "destination.service.host",
            "reviews.default.svc.cluster.local",
        ),
        ("destination.service.name", "reviews"),
        ("destination.service.namespace", "default"),
        (
            "destination.service.uid",
            "istio://default/services/reviews",
        ),
        (
            "mixer-quotas",
            r#"[{"charge":2,"quota":"requestcount"},{"charge":1,"match":[{"request.path":{"prefix":"/a"}}],"quota":"other"}]"#,
        ),
    ] {
        assert_eq!(extensions[name], value, "{name}");
    }

    let report = log(manager, "envoy.access_loggers.http_grpc");
    let common = &report["common_config"];
    assert_eq!(
        common["grpc_service"]["envoy_grpc"]["cluster_name"],
        "outbound|9091||mixer.istio-system.svc.cluster.local"
    );
    assert_eq!(
        report["additional_request_headers_to_log"],
        json!(["content-type", "x-user"])
    );
    assert_eq!(
        report["additional_response_headers_to_log"],
        json!(["grpc-message", "grpc-status", "x-b"])
    );
    let tags = tags(report);
    for tag in [
        ("context.reporter.kind", "inbound"),
        ("destination.uid", "kubernetes://reviews-v1-x.default"),
        ("destination.service.name", "reviews"),
    ] {
        assert!(tags.contains(&tag), "{tag:?} is not in {tags:?}");
    }
    log(manager, "envoy.access_loggers.file");
}

#[test]
fn outbound_requests_are_reported_and_say_who_sends_them() {
    let resources = translate(&world_with(CHECKS, ""), &sidecar("envoy"));
    let listener = j(&resources.listeners["127.30.1.11_15002"]);
    let manager = filter(&listener, 0, 0);
    assert_eq!(
        names_of(&manager["http_filters"])[0],
        "envoy.filters.http.cors",
        "clients do not ask unless the mesh says so"
    );
    let report = log(manager, "envoy.access_loggers.http_grpc");
    let all = tags(report);
    assert!(
        all.contains(&("source.uid", "kubernetes://reviews-v1-x.default")),
        "{all:?}"
    );
    let of_host = report["common_config"]["custom_tags"]
        .as_array()
        .unwrap()
        .last()
        .unwrap();
    assert_eq!(
        *of_host,
        json!({
            "tag": "destination.uid",
            "metadata": { "kind": { "host": {} }, "metadata_key": { "key": "istio", "path": [{ "key": "uid" }] } },
        })
    );
    let host = vhost(
        &resources,
        "http_proxy",
        "ratings.default.svc.cluster.local:9080",
    );
    let header = &host["routes"][0]["request_headers_to_add"][0];
    assert_eq!(header["header"]["key"], "x-istio-attributes");
    assert_eq!(header["append_action"], "OVERWRITE_IF_EXISTS_OR_ADD");

    // The same each time, or every proxy would get its routes again.
    let again = translate(&world_with(CHECKS, ""), &sidecar("envoy"));
    let again = vhost(
        &again,
        "http_proxy",
        "ratings.default.svc.cluster.local:9080",
    );
    assert!(again == host);
}

#[test]
fn gateways_check_what_comes_in() {
    let resources = translate(&world_with(CHECKS, GATEWAYS), &router("envoy"));
    let listener = resources.listeners.values().map(j).find(|listener| {
        let config = filter(listener, 0, 0);
        config["http_filters"].is_array()
    });
    let listener = listener.unwrap();
    let manager = filter(&listener, 0, 0);
    assert_eq!(
        names_of(&manager["http_filters"])[0],
        "envoy.filters.http.ext_authz"
    );
    let metadata = &manager["http_filters"][0]["typed_config"]["grpc_service"]["initial_metadata"];
    assert!(
        metadata
            .to_string()
            .contains("kubernetes://istio-ingressgateway-x.istio-system"),
        "{metadata}"
    );
}

#[test]
fn connections_are_reported_when_they_open_and_close() {
    let resources = translate(&world_with(CHECKS, ""), &sidecar("envoy"));
    let listener = j(&resources.listeners["127.30.1.11_27017"]);
    let proxy = filter(&listener, 0, 0);
    assert_eq!(
        proxy["access_log_options"],
        json!({ "flush_access_log_on_connected": true, "access_log_flush_interval": "10s" })
    );
    let report = log(proxy, "envoy.access_loggers.tcp_grpc");
    assert!(tags(report).contains(&("destination.service.name", "mongodb")));
    // The file gets no more lines than before.
    assert_eq!(
        proxy["access_log"][0]["filter"]["log_type_filter"],
        json!({ "types": ["TcpUpstreamConnected", "TcpPeriodic"], "exclude": true })
    );
}

#[test]
fn a_mesh_without_checks_has_none_and_one_without_mixer_nothing() {
    let off = "    disablePolicyChecks: true\n";
    let resources = translate(&world_with(off, QUOTA), &sidecar("envoy"));
    let text = resources
        .listeners
        .values()
        .map(|l| j(l).to_string())
        .collect::<String>();
    assert!(
        !text.contains("ext_authz") && text.contains("http_grpc"),
        "{text}"
    );
    let text = resources
        .routes
        .values()
        .map(|l| j(l).to_string())
        .collect::<String>();
    assert!(
        !text.contains("ext_authz") && !text.contains("mixer-quotas"),
        "{text}"
    );
}

#[test]
fn the_fail_policy_of_the_destination_decides() {
    let rule = "
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: strict, namespace: istio-system, annotations: { policy.istio.io/fail-mode: closed } }
spec: { match: 'destination.service.name == \"reviews\"' }
";
    for (more, is_open) in [("", true), (rule, false)] {
        let resources = translate(&world_with(CHECKS, more), &sidecar("envoy"));
        let listener = j(&resources.listeners["127.30.0.11_9080"]);
        let check = &filter(&listener, 0, 0)["http_filters"][1]["typed_config"];
        assert_eq!(check["failure_mode_allow"] == true, is_open, "{check}");
    }
}

#[test]
fn stock_envoy_accepts_it() {
    let checks = format!("{CHECKS}    enableClientSidePolicyCheck: true\n");
    let gateways = GATEWAYS.replace(
        "mode: SIMPLE, serverCertificate: /c, privateKey: /k",
        "mode: SIMPLE, credentialName: front-credential",
    );
    let more = format!("{QUOTA}---\n{gateways}");
    let snapshot = world_with(&checks, &more);
    stock_envoy::accepts("mixer-sidecar", &translate(&snapshot, &sidecar("envoy")));
    stock_envoy::accepts("mixer-gateway", &translate(&snapshot, &router("envoy")));
}
