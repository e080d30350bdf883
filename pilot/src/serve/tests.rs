use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind as ValueKind};

use super::*;

fn node(account: Option<&str>) -> Node {
    let fields = account.map(|account| {
        (
            "SERVICE_ACCOUNT".to_owned(),
            Value {
                kind: Some(ValueKind::StringValue(account.into())),
            },
        )
    });
    let raw = core::Node {
        id: "sidecar~10.0.0.1~a-1.default~default.svc.cluster.local".into(),
        metadata: Some(Struct {
            fields: fields.into_iter().collect(),
        }),
        ..core::Node::default()
    };
    Node::parse(Some(&raw)).unwrap()
}

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

#[test]
fn a_node_must_be_who_its_certificate_says() {
    let fits = |peer: &str, account| {
        let mut node = node(account);
        check_identity(&id(peer), &mut node).map(|()| node.service_account)
    };
    let own = "spiffe://cluster.local/ns/default/sa/a";
    assert_eq!(fits(own, Some("a")).unwrap().as_deref(), Some("a"));
    assert_eq!(
        fits(own, None).unwrap().as_deref(),
        Some("a"),
        "taken from the certificate"
    );
    assert_eq!(
        fits(own, Some("b")).unwrap_err().code(),
        tonic::Code::PermissionDenied
    );
    let other = "spiffe://cluster.local/ns/other/sa/a";
    assert_eq!(
        fits(other, Some("a")).unwrap_err().code(),
        tonic::Code::PermissionDenied
    );
    let no_workload = "spiffe://cluster.local/auth";
    assert_eq!(
        fits(no_workload, Some("a")).unwrap_err().code(),
        tonic::Code::PermissionDenied
    );
}
