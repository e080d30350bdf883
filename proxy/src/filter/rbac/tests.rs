use std::{rc::Rc, sync::Arc};

use lateen_protocols::json;
use tokio::time::Instant;

use super::*;
use crate::{head::Headers, head::Name, head::Protocol, info::TlsInfo};

fn head(path: &str, headers: &[(&str, &str)]) -> RequestHead {
    let mut list = Headers::default();
    for (name, value) in headers {
        list.append(Name::new(name), value);
    }
    RequestHead {
        method: "GET".into(),
        scheme: "http".into(),
        authority: "a.test".into(),
        path: path.to_owned().into(),
        protocol: Protocol::Http11,
        headers: list,
    }
}

fn stream(tls: Option<TlsInfo>) -> StreamInfo {
    let connection = ConnectionInfo {
        id: 1,
        remote: ([10, 0, 0, 2], 4000).into(),
        direct_remote: ([10, 0, 0, 3], 4001).into(),
        local: ([10, 0, 0, 1], 80).into(),
        local_restored: false,
        tls: tls.map(Box::new),
        requested_server_name: Some("sni.test".into()),
        filter_chain: None,
        original_src: None,
        started: Instant::now(),
    };
    let mut info = StreamInfo::new(Rc::new(connection), Some(Protocol::Http11));
    info.downstream_remote = ([10, 0, 0, 4], 0).into();
    info
}

fn mutual(uris: &[&str], dns: &[&str], subject: &str) -> Option<TlsInfo> {
    let mut uris = uris.iter().map(|uri| Arc::from(*uri));
    Some(TlsInfo {
        peer_uri_san: uris.next(),
        peer_more_uri_sans: uris.collect(),
        peer_dns_sans: dns.iter().map(|name| Arc::from(*name)).collect(),
        peer_subject: Some(subject.into()),
        peer_certificate_der: Some("der".into()),
        ..TlsInfo::default()
    })
}

fn compile(yaml: &str) -> Result<Engine, String> {
    let rules: proto::Rbac = json::from_yaml(yaml).map_err(|error| error.to_string())?;
    Engine::compile(&rules, true).map_err(|error| error.to_string())
}

fn subject<'a>(request: Option<&'a RequestHead>, info: &'a StreamInfo) -> Subject<'a> {
    Subject {
        request,
        connection: &info.connection,
        info,
        route: None,
    }
}

/// Whether one permission (with any principal) holds for a request.
fn permits(rule: &str, request: &RequestHead) -> bool {
    let yaml = format!("policies: {{p: {{permissions: [{rule}], principals: [{{any: true}}]}}}}");
    let info = stream(None);
    let engine = compile(&yaml).unwrap();
    engine.decide(&subject(Some(request), &info)).allowed
}

/// Whether one principal (with any permission) holds for a peer.
fn is(id: &str, tls: Option<TlsInfo>) -> bool {
    let yaml = format!("policies: {{p: {{permissions: [{{any: true}}], principals: [{id}]}}}}");
    let (info, request) = (stream(tls), head("/", &[("x-user", "john")]));
    let engine = compile(&yaml).unwrap();
    engine.decide(&subject(Some(&request), &info)).allowed
}

#[tokio::test]
async fn permissions_are_about_what_is_asked_for() {
    let request = head("/api/v1?secret", &[("x-a", "1"), ("x-a", "2")]);
    for (rule, holds) in [
        ("{any: true}", true),
        (
            "{header: {name: ':path', string_match: {prefix: /api/}}}",
            true,
        ),
        (
            "{header: {name: ':path', string_match: {exact: /api/v1}}}",
            false,
        ),
        ("{url_path: {path: {exact: /api/v1}}}", true),
        ("{url_path: {path: {contains: secret}}}", false),
        ("{header: {name: x-a, string_match: {exact: '1,2'}}}", true),
        ("{header: {name: x-b, present_match: false}}", true),
        (
            "{destination_ip: {address_prefix: 10.0.0.0, prefix_len: 24}}",
            true,
        ),
        (
            "{destination_ip: {address_prefix: 10.0.0.2, prefix_len: 32}}",
            false,
        ),
        (
            "{uri_template: {name: t, typed_config: {'@type': type.googleapis.com/envoy.extensions.path.match.\
             uri_template.v3.UriTemplateMatchConfig, path_template: '/api/*'}}}",
            true,
        ),
        ("{destination_port: 80}", true),
        ("{destination_port: 81}", false),
        ("{destination_port_range: {start: 80, end: 81}}", true),
        ("{destination_port_range: {start: 81, end: 90}}", false),
        ("{requested_server_name: {exact: sni.test}}", true),
        ("{not_rule: {any: true}}", false),
        (
            "{and_rules: {rules: [{any: true}, {destination_port: 81}]}}",
            false,
        ),
        (
            "{or_rules: {rules: [{destination_port: 81}, {any: true}]}}",
            true,
        ),
        (
            "{metadata: {filter: f, path: [{key: k}], value: {present_match: true}}}",
            false,
        ),
        (
            "{metadata: {filter: f, path: [{key: k}], value: {present_match: true}, invert: true}}",
            true,
        ),
    ] {
        assert_eq!(permits(rule, &request), holds, "{rule}");
    }
}

#[tokio::test]
async fn a_peer_is_who_its_certificate_says() {
    let mesh = || {
        mutual(
            &["spiffe://td/ns/a/sa/b", "spiffe://other/x"],
            &["b.test"],
            "CN=b",
        )
    };
    let named = |name: &str| format!("{{authenticated: {{principal_name: {name}}}}}");
    for (name, holds) in [
        ("{exact: spiffe://td/ns/a/sa/b}", true),
        ("{prefix: spiffe://td/}", true),
        ("{suffix: /sa/b}", true),
        ("{contains: /ns/a/}", true),
        ("{safe_regex: {regex: 'spiffe://td/.*'}}", true),
        ("{safe_regex: {regex: 'spiffe://td/'}}", false),
        ("{exact: SPIFFE://TD/ns/a/sa/b, ignore_case: true}", true),
        ("{exact: spiffe://other/x}", true),
        ("{exact: b.test}", true),
        ("{exact: CN=b}", true),
        ("{exact: john}", false),
    ] {
        assert_eq!(is(&named(name), mesh()), holds, "{name}");
        assert!(!is(&named(name), None), "{name} without TLS");
    }
    let by_subject = mutual(&[], &[], "CN=b");
    assert!(is(&named("{exact: CN=b}"), by_subject));
    assert!(is("{authenticated: {}}", mesh()));
    assert!(!is("{authenticated: {}}", None));
    // TLS without a client certificate has no name.
    assert!(!is(&named("{prefix: spiffe://}"), Some(TlsInfo::default())));
}

#[tokio::test]
async fn addresses_are_those_of_connection_socket_and_client() {
    for (id, holds) in [
        (
            "{source_ip: {address_prefix: 10.0.0.2, prefix_len: 32}}",
            true,
        ),
        (
            "{direct_remote_ip: {address_prefix: 10.0.0.3, prefix_len: 32}}",
            true,
        ),
        (
            "{remote_ip: {address_prefix: 10.0.0.4, prefix_len: 32}}",
            true,
        ),
        (
            "{remote_ip: {address_prefix: 10.0.0.2, prefix_len: 32}}",
            false,
        ),
        (
            "{header: {name: x-user, string_match: {exact: john}}}",
            true,
        ),
        (
            "{not_id: {header: {name: x-user, present_match: true}}}",
            false,
        ),
        (
            "{or_ids: {ids: [{not_id: {any: true}}, {url_path: {path: {exact: /}}}]}}",
            true,
        ),
        (
            "{and_ids: {ids: [{any: true}, {not_id: {any: true}}]}}",
            false,
        ),
    ] {
        assert_eq!(is(id, None), holds, "{id}");
    }
}

#[tokio::test]
async fn the_first_policy_by_name_decides() {
    let rules = |action: &str| {
        format!(
            "action: {action}\npolicies:\n  z: {{permissions: [{{any: true}}], principals: [{{any: true}}]}}\n  \
             b: {{permissions: [{{url_path: {{path: {{exact: /b}}}}}}], principals: [{{any: true}}]}}"
        )
    };
    let info = stream(None);
    let request = head("/b", &[]);
    for (action, allowed) in [("ALLOW", true), ("DENY", false), ("LOG", true)] {
        let engine = compile(&rules(action)).unwrap();
        let want = Verdict {
            allowed,
            policy: Some("b"),
        };
        assert_eq!(engine.decide(&subject(Some(&request), &info)), want);
    }
    for (yaml, allowed) in [("action: ALLOW", false), ("action: DENY", true)] {
        let verdict = compile(yaml).unwrap();
        let verdict = verdict.decide(&subject(Some(&request), &info));
        assert_eq!((verdict.allowed, verdict.policy), (allowed, None));
    }
    assert_eq!(
        details(Some("a b\tc")),
        "rbac_access_denied_matched_policy[a_b_c]"
    );
    assert_eq!(details(None), "rbac_access_denied_matched_policy[none]");
}

#[test]
fn what_cannot_be_judged_is_refused() {
    for (permission, principal) in [
        ("{uri_template: {name: u}}", "{any: true}"),
        ("{matcher: {name: m}}", "{any: true}"),
        ("{any: false}", "{any: true}"),
        ("{destination_port: 70000}", "{any: true}"),
        (
            "{any: true}",
            "{filter_state: {key: k, string_match: {exact: a}}}",
        ),
        ("{any: true}", "{and_ids: {ids: []}}"),
        (
            "{any: true}",
            "{authenticated: {principal_name: {safe_regex: {regex: '('}}}}",
        ),
    ] {
        let yaml =
            format!("policies: {{p: {{permissions: [{permission}], principals: [{principal}]}}}}");
        assert!(compile(&yaml).is_err(), "{permission} {principal}");
    }
    assert!(compile("policies: {p: {permissions: [{any: true}]}}").is_err());
    let condition = "policies: {p: {permissions: [{any: true}], principals: [{any: true}], \
                     condition: {comprehension_expr: {iter_var: x}}}}";
    let error = compile(condition).unwrap_err();
    assert!(error.contains("condition"), "{error}");
}

#[tokio::test]
async fn a_connection_is_refused_with_the_policy_in_its_details() {
    let stats = Registry::new();
    let config: NetworkProto = json::from_yaml(
        "stat_prefix: tcp\nrules: {action: DENY, policies: {block: {permissions: [{any: true}], \
         principals: [{direct_remote_ip: {address_prefix: 10.0.0.3, prefix_len: 32}}]}}}\n\
         shadow_rules: {policies: {}}\nshadow_rules_stat_prefix: s",
    )
    .unwrap();
    let filter = NetworkRbac::compile(&config, &stats).unwrap();
    let mut info = stream(None);
    assert!(!filter.admits(&mut info));
    assert_eq!(
        info.termination_details.as_deref(),
        Some("rbac_access_denied_matched_policy[block]")
    );
    assert!(info.flags.is_empty());
    let value = |name: &str| stats.value(name).unwrap_or(0);
    assert_eq!(value("tcp.rbac.denied"), 1);
    assert_eq!(value("tcp.rbac.allowed"), 0);
    assert_eq!(value("tcp.rbac.s.shadow_denied"), 1);
}

#[tokio::test]
async fn a_condition_is_asked_when_a_policy_matches() {
    let path = "{select_expr: {operand: {ident_expr: {name: request}}, field: path}}";
    let yaml = format!(
        "action: DENY\npolicies: {{p: {{permissions: [{{any: true}}], principals: [{{any: true}}], condition: \
         {{call_expr: {{function: '_==_', args: [{path}, {{const_expr: {{string_value: /a}}}}]}}}}}}}}"
    );
    let engine = compile(&yaml).unwrap();
    let info = stream(None);
    for (path, allowed) in [("/a", false), ("/b", true)] {
        let head = head(path, &[]);
        let verdict = engine.decide(&subject(Some(&head), &info));
        assert_eq!(verdict.allowed, allowed, "{path}");
    }
}

#[tokio::test]
async fn a_tree_gives_the_first_action_it_comes_to() {
    const HEADER: &str = "typed_config: {'@type': type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput, \
                          header_name: x-who}";
    let action = |name: &str, action: &str| {
        format!(
            "action: {{name: a, typed_config: {{'@type': type.googleapis.com/envoy.config.rbac.v3.Action, name: {name}, \
             action: {action}}}}}"
        )
    };
    let compile = |yaml: &str| {
        let matcher: Matcher = json::from_yaml(yaml).unwrap();
        Tree::compile(&matcher, true)
    };
    let by_name = format!(
        "matcher_tree: {{input: {{name: h, {HEADER}}}, prefix_match_map: {{map: {{admin: {{{}}}, admin-ro: {{{}}}}}}}}}\n\
         on_no_match: {{{}}}",
        action("all", "ALLOW"),
        action("read-only", "DENY"),
        action("rest", "LOG"),
    );
    let one = |value: &str, then: &str| {
        format!(
            "{{predicate: {{single_predicate: {{input: {{name: h, {HEADER}}}, value_match: {{exact: {value}}}}}}}, on_match: {{{then}}}}}"
        )
    };
    let list = format!(
        "matcher_list: {{matchers: [{}, {}]}}",
        one(
            "bob",
            &format!("keep_matching: true, {}", action("noted", "DENY"))
        ),
        one("bob", &action("bob", "ALLOW")),
    );
    let info = stream(None);
    let decide = |tree: &Tree, who: Option<&str>| {
        let who: Vec<_> = who.map(|who| ("x-who", who)).into_iter().collect();
        let head = head("/", &who);
        let verdict = tree.decide(&subject(Some(&head), &info));
        (verdict.allowed, verdict.policy.map(str::to_owned))
    };
    let named = |allowed: bool, name: &str| (allowed, Some(name.to_owned()));
    let tree = compile(&by_name).unwrap();
    assert_eq!(decide(&tree, Some("admin-x")), named(true, "all"));
    assert_eq!(decide(&tree, Some("admin-ro-x")), named(false, "read-only"));
    assert_eq!(decide(&tree, Some("x")), named(true, "rest"));
    assert_eq!(decide(&tree, None), named(true, "rest"));
    let tree = compile(&list).unwrap();
    assert_eq!(decide(&tree, Some("bob")), named(true, "bob"));
    assert_eq!(decide(&tree, Some("eve")), (false, None));
    // What the tree cannot look at.
    let odd = by_name.replace(
        "HttpRequestHeaderMatchInput",
        "HttpResponseHeaderMatchInput",
    );
    assert!(compile(&odd).is_err());
}
