use super::*;
use crate::envoy::envoy::config::bootstrap::v3::Bootstrap;

const BOOTSTRAP: &str = r#"
node: { id: "sidecar~10.0.0.1~a.b~b.svc.cluster.local", metadata: { PORT: 3, LIST: [ a, null, 1.5, { b: true } ], E: "" } }
static_resources:
  listeners:
  - name: l
    address: { socketAddress: { port_value: 80, address: 127.0.0.1 } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: x
          stream_idle_timeout: 0s
          delayed_close_timeout: 1.0250s
          use_remote_address: false
          xff_num_trusted_hops: 0
          codec_type: HTTP2
          http_filters:
          - name: mixer
            typed_config:
              '@type': type.googleapis.com/istio.mixer.v1.config.client.HttpClientConfig
              transport: { check_cluster: c }
          - name: envoy.filters.http.router
            typed_config: { '@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }
  clusters:
  - connect_timeout: 315s
    name: c
    type: 1
    lb_policy: MAGLEV
    maglev_lb_config: { table_size: "101" }
    common_lb_config: { healthy_panic_threshold: { value: 12.5 } }
    outlier_detection: { split_external_local_origin_errors: true, interval: 3s, consecutive_5xx: 0 }
    circuit_breakers: { thresholds: [ { priority: HIGH, max_requests: 7, retry_budget: { budget_percent: { value: 3 } } } ] }
"#;

fn value(yaml: &str) -> Value {
    serde_saphyr::from_str_with_options(yaml, yaml_options()).unwrap()
}

/// Both ways; the short one must have been taken.
fn both(value: &Value) -> (Bootstrap, Bootstrap) {
    let name = Bootstrap::full_name();
    let short = transcode::from_value(&name, value).expect("the short way");
    let text = transcode::from_text(&name, &value.to_string()).expect("the short way from text");
    assert_eq!(short, text);
    let long = encode_by_descriptor(&name, value).unwrap();
    (decode(&short).unwrap(), decode(&long).unwrap())
}

#[test]
fn bootstrap_with_any_survives_the_round_trip() {
    let first: Bootstrap = from_yaml(BOOTSTRAP).unwrap();
    let json = to_json(&first).unwrap();
    assert_eq!(json["node"]["metadata"]["PORT"], 3);
    let second: Bootstrap = from_json(&json).unwrap();
    assert_eq!(first, second);
}

#[test]
fn the_short_way_is_the_long_way() {
    let (short, long) = both(&value(BOOTSTRAP));
    assert_eq!(short, long);
    assert_eq!(
        short.static_resources.unwrap().clusters[0]
            .connect_timeout
            .unwrap()
            .seconds,
        315
    );
}

#[test]
fn without_maps_even_the_bytes_are_the_same() {
    let yaml = BOOTSTRAP.lines().skip(2).collect::<Vec<_>>().join("\n");
    let (value, name) = (value(&yaml), Bootstrap::full_name());
    let short = transcode::from_value(&name, &value).unwrap();
    assert_eq!(short, encode_by_descriptor(&name, &value).unwrap());
}

#[test]
fn what_the_short_way_cannot_it_leaves() {
    let name = Bootstrap::full_name();
    for yaml in [
        "node: { idd: x }",
        "node: { id: 3 }",
        "node: null",
        "node: { id: a, id: b }",
        "node: { user_agent_version: x, user_agent_build_version: {} }",
        "node: { listening_addresses: [ { pipe: { mode: -1 } } ] }",
        "node: { listening_addresses: [ { pipe: { mode: 4294967296 } } ] }",
        "node: { listening_addresses: [ { pipe: { mode: 1.5 } } ] }",
        "stats_flush_interval: -1s",
        "stats_flush_interval: 1.s",
        "stats_flush_interval: 5",
        "static_resources: { clusters: [ { type: STATICK } ] }",
        "static_resources: { clusters: { name: x } }",
        "static_resources: { clusters: [ null ] }",
        "stats_sinks: [ { typed_config: { '@type': type.googleapis.com/no.Such } } ]",
        "stats_sinks: [ { typed_config: { '@type': type.googleapis.com/google.protobuf.Duration, value: 1s } } ]",
        "stats_sinks: [ { typed_config: {} } ]",
        "[]",
        "3",
    ] {
        let parsed: Result<Value, _> = serde_saphyr::from_str_with_options(yaml, yaml_options());
        if let Ok(value) = parsed {
            assert_eq!(transcode::from_value(&name, &value), None, "{yaml}");
        }
    }
    for text in [
        r#"{"node": {"id": "a", "id": "b"}}"#,
        r#"{"node": {"metadata": {"a": 1, "a": 2}}}"#,
        r#"{"stats_sinks": [{"typed_config": {"name": "x", "@type": "type.googleapis.com/envoy.config.core.v3.Pipe"}}]}"#,
        r#"{"node": {}} x"#,
        r#"{"node": {}"#,
    ] {
        assert_eq!(transcode::from_text(&name, text), None, "{text}");
    }
}

#[test]
fn a_type_that_comes_late_is_read_too() {
    let text = r#"{"stats_sinks": [{"typed_config": {"path": "x", "@type": "type.googleapis.com/envoy.config.core.v3.Pipe"}}]}"#;
    let read: Bootstrap = from_yaml(text).unwrap();
    let config = to_json(&read).unwrap()["stats_sinks"][0]["typed_config"].clone();
    assert_eq!(config["path"], "x");
}

#[test]
fn an_unknown_field_is_named() {
    let error = from_yaml::<Bootstrap>("node: { idd: x }").unwrap_err();
    assert!(error.to_string().contains("idd"), "{error}");
}
