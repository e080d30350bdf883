use std::rc::Rc;

use tokio::time::Instant;

use super::*;
use crate::{
    head::{Headers, Protocol},
    info::ConnectionInfo,
    testing::table,
};

/// The descriptors that these limits make of a request, each as `key=value,…`.
fn asked(limits: &str, path: &str, stage: u32) -> Vec<String> {
    let table = table(&format!(
        "virtual_hosts: [{{name: vv, domains: ['*'], routes: [{{match: {{prefix: /}}, metadata: {{filter_metadata: \
         {{ns: {{k: {{j: routed}}}}}}}}, route: {{cluster: there, rate_limits: [{limits}]}}}}]}}]"
    ));
    let mut headers = Headers::default();
    headers.append(Name::new("x-user"), "john");
    let head = RequestHead {
        method: "GET".into(),
        scheme: "http".into(),
        authority: "a".into(),
        path: path.to_owned().into(),
        protocol: Protocol::Http11,
        headers,
    };
    let address = ([192, 168, 7, 9], 1).into();
    let connection = ConnectionInfo {
        id: 1,
        remote: address,
        direct_remote: address,
        local: address,
        local_restored: false,
        tls: None,
        requested_server_name: None,
        filter_chain: None,
        original_src: None,
        started: Instant::now(),
    };
    let mut info = StreamInfo::new(Rc::new(connection), Some(Protocol::Http11));
    let text = |text: &str| pb::Value {
        kind: Some(Kind::StringValue(text.to_owned())),
    };
    let fields = [("d".to_owned(), text("left"))].into_iter().collect();
    info.add_metadata("dyn", pb::Struct { fields });
    let selected = table.select(&head, None, false).unwrap();
    let subject = Subject {
        head: &head,
        info: &info,
        selected: &selected,
        cluster: "there",
        us: "here",
    };
    let mut found = Descriptors::default();
    let of_route = &selected.route().rate_limits;
    of_route.populate(Some(stage), &subject, &mut found);
    let pair = |entry: &Entry| format!("{}={}", entry.key, entry.value);
    let one = |descriptor: &RateLimitDescriptor| {
        let pairs: Vec<_> = descriptor.entries.iter().map(pair).collect();
        pairs.join(",")
    };
    found.all.iter().map(one).collect()
}

#[tokio::test]
async fn each_action_says_what_it_knows() {
    for (actions, want) in [
        (
            "{source_cluster: {}}, {destination_cluster: {}}",
            Some("source_cluster=here,destination_cluster=there"),
        ),
        (
            "{request_headers: {header_name: x-user, descriptor_key: u}}",
            Some("u=john"),
        ),
        (
            "{request_headers: {header_name: ':path', descriptor_key: p}}",
            Some("p=/x?q=1"),
        ),
        (
            "{request_headers: {header_name: x-none, descriptor_key: u}}",
            None,
        ),
        (
            "{request_headers: {header_name: x-none, descriptor_key: u, skip_if_absent: true}}, {generic_key: \
             {descriptor_value: g}}",
            Some("generic_key=g"),
        ),
        (
            "{request_headers: {header_name: x-none, descriptor_key: u, skip_if_absent: true}}",
            None,
        ),
        (
            "{query_parameters: {query_parameter_name: q, descriptor_key: k}}",
            Some("k=1"),
        ),
        ("{remote_address: {}}", Some("remote_address=192.168.7.9")),
        (
            "{masked_remote_address: {v4_prefix_mask_len: 16}}",
            Some("masked_remote_address=192.168.0.0/16"),
        ),
        (
            "{masked_remote_address: {v4_prefix_mask_len: 0}}",
            Some("masked_remote_address=0.0.0.0/0"),
        ),
        (
            "{remote_address_match: {descriptor_value: in, address_matcher: {ranges: [{address_prefix: 192.168.0.0, \
             prefix_len: 16}]}}}",
            Some("remote_address_match=in"),
        ),
        (
            "{header_value_match: {descriptor_value: j, headers: [{name: x-user, string_match: {exact: john}}]}}",
            Some("header_match=j"),
        ),
        (
            "{header_value_match: {descriptor_value: j, expect_match: false, headers: [{name: x-user, string_match: \
             {exact: john}}]}}",
            None,
        ),
        (
            "{query_parameter_value_match: {descriptor_value: v, descriptor_key: k, query_parameters: [{name: q, \
             string_match: {exact: '1'}}]}}",
            Some("k=v"),
        ),
        (
            "{metadata: {descriptor_key: m, source: ROUTE_ENTRY, metadata_key: {key: ns, path: [{key: k}, {key: j}]}}}",
            Some("m=routed"),
        ),
        (
            "{metadata: {descriptor_key: m, metadata_key: {key: dyn, path: [{key: d}]}}}",
            Some("m=left"),
        ),
        (
            "{metadata: {descriptor_key: m, default_value: dd, metadata_key: {key: none, path: [{key: d}]}}}",
            Some("m=dd"),
        ),
    ] {
        let found = asked(&format!("{{actions: [{actions}]}}"), "/x?q=1", 0);
        assert_eq!(found, want.into_iter().collect::<Vec<_>>(), "{actions}");
    }
}

#[tokio::test]
async fn a_filter_asks_about_its_stage_only() {
    let limits = "{stage: 1, actions: [{generic_key: {descriptor_value: one}}]}, {actions: [{generic_key: \
                  {descriptor_value: zero}}]}";
    assert_eq!(asked(limits, "/", 0), ["generic_key=zero"]);
    assert_eq!(asked(limits, "/", 1), ["generic_key=one"]);
}
