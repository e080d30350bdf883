use bytes::Bytes;

use super::*;
use crate::{
    format::{Facts, tests::connection},
    head::{Headers, Known, Protocol},
    info::StreamInfo,
    testing::{table, try_table},
};

fn request(authority: &str, path: &str, headers: &[(&str, &str)]) -> RequestHead {
    let mut list = Headers::default();
    for (name, value) in headers {
        list.append(Name::new(name), *value);
    }
    RequestHead {
        method: "GET".into(),
        scheme: "http".into(),
        authority: authority.to_owned().into(),
        path: path.to_owned().into(),
        protocol: Protocol::Http11,
        headers: list,
    }
}

/// The body of the direct response that a request gets, or `-`.
fn answer(table: &Arc<RouteTable>, head: &RequestHead) -> String {
    match table.select(head, None, false) {
        Ok(selected) => match &selected.route().action {
            Action::Direct { body, .. } => String::from_utf8(body.to_vec()).unwrap(),
            Action::Redirect(redirect) => {
                let location = redirect.location(selected.route(), head);
                format!(
                    "{} {}",
                    redirect.status(),
                    String::from_utf8(location.to_vec()).unwrap()
                )
            }
            Action::Forward { .. } => selected.target(head).unwrap().cluster.to_string(),
        },
        Err(_) => "-".to_owned(),
    }
}

fn direct(rules: &str, body: &str) -> String {
    format!("{{match: {rules}, direct_response: {{status: 200, body: {{inline_string: {body}}}}}}}")
}

#[tokio::test]
async fn virtual_hosts() {
    let vhost = |name: &str, domains: &str| {
        format!(
            "{{name: {name}, domains: {domains}, routes: [{}]}}",
            direct("{prefix: /}", name)
        )
    };
    let hosts = [
        vhost("exact", "[www.example.com, 'with.port:8080']"),
        vhost("suffix", "['*.example.com']"),
        vhost("longer", "['*-bar.example.com']"),
        vhost("prefix", "['api.*']"),
        vhost("star", "['*']"),
    ];
    let table = table(&format!("virtual_hosts: [{}]", hosts.join(",")));
    for (authority, want) in [
        ("www.example.com", "exact"),
        ("WWW.EXAMPLE.com", "exact"),
        ("x.example.com", "suffix"),
        ("x.y.example.com", "suffix"),
        ("foo-bar.example.com", "longer"),
        ("example.com", "star"),
        (".example.com", "star"),
        ("api.test", "prefix"),
        ("api.example.com", "suffix"),
        ("www.example.com:9999", "star"),
        ("with.port:8080", "exact"),
        ("with.port", "star"),
    ] {
        assert_eq!(
            answer(&table, &request(authority, "/", &[])),
            want,
            "{authority}"
        );
    }
    let twice =
        try_table("virtual_hosts: [{name: a, domains: [x]}, {name: b, domains: [X]}]").unwrap_err();
    assert!(
        twice.contains("Only unique values for domains are permitted"),
        "{twice}"
    );
}

#[tokio::test]
async fn paths_headers_and_queries() {
    let routes = [
        direct("{path: /exact}", "exact"),
        direct("{prefix: /api/v2}", "v2"),
        direct("{prefix: /api}", "api"),
        direct("{path_separated_prefix: /sep}", "sep"),
        direct("{safe_regex: {regex: '/v[0-9]+/item/[a-z]{2,4}'}}", "regex"),
        direct("{prefix: /Fold, case_sensitive: false}", "fold"),
        direct(
            "{prefix: /h, headers: [{name: end-user, string_match: {exact: jason}}]}",
            "jason",
        ),
        direct(
            "{prefix: /h, headers: [{name: end-user, string_match: {exact: jason}, invert_match: true}]}",
            "others",
        ),
        direct(
            "{prefix: /q, query_parameters: [{name: v, string_match: {prefix: '2.'}}]}",
            "query",
        ),
        direct("{prefix: /g, grpc: {}}", "grpc"),
        direct(
            "{prefix: /never, runtime_fraction: {default_value: {numerator: 0}}}",
            "never",
        ),
    ];
    let table = table(&format!(
        "virtual_hosts: [{{name: a, domains: ['*'], routes: [{}]}}]",
        routes.join(",")
    ));
    let jason = [("end-user", "jason")];
    let grpc = [("content-type", "application/grpc+proto")];
    type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str);
    let cases: &[Case<'_>] = &[
        ("/exact", &[], "exact"),
        ("/exact?x=1", &[], "exact"),
        ("/exact/", &[], "-"),
        ("/api/v2/x", &[], "v2"),
        ("/apiary", &[], "api"),
        ("/API", &[], "-"),
        ("/sep", &[], "sep"),
        ("/sep/a", &[], "sep"),
        ("/separate", &[], "-"),
        ("/v12/item/abc?x=/y", &[], "regex"),
        ("/v12/item/abcde", &[], "-"),
        ("/xx/v12/item/abc", &[], "-"),
        ("/fOLD/x", &[], "fold"),
        ("/h", &jason, "jason"),
        ("/h", &[], "others"),
        ("/q?v=2.1", &[], "query"),
        ("/q?v=3", &[], "-"),
        ("/g", &grpc, "grpc"),
        ("/g", &[], "-"),
        ("/never", &[], "-"),
    ];
    for (path, headers, want) in cases {
        assert_eq!(
            answer(&table, &request("a", path, headers)),
            *want,
            "{path} {headers:?}"
        );
    }
}

#[tokio::test]
async fn redirects() {
    let routes = "\
        - {match: {path: /https}, redirect: {https_redirect: true}}
        - {match: {path: /host}, redirect: {host_redirect: new.test, response_code: FOUND}}
        - {match: {path: /port}, redirect: {port_redirect: 8443, https_redirect: true}}
        - {match: {path: /whole}, redirect: {path_redirect: /other, response_code: SEE_OTHER}}
        - {match: {path: /query}, redirect: {path_redirect: '/other?a=b'}}
        - {match: {prefix: /prefix/}, redirect: {prefix_rewrite: /new/, strip_query: true, response_code: TEMPORARY_REDIRECT}}
        - {match: {prefix: /regex}, redirect: {regex_rewrite: {pattern: {regex: '^/regex/(.*)$'}, substitution: '/r/\\1'}, response_code: PERMANENT_REDIRECT}}
    ";
    let table = table(&format!(
        "virtual_hosts:\n  - name: a\n    domains: ['*']\n    routes:\n        {routes}"
    ));
    for (authority, path, want) in [
        ("a.test:80", "/https?x=1", "301 https://a.test/https?x=1"),
        ("a.test:81", "/https", "301 https://a.test:81/https"),
        ("a.test:81", "/host", "302 http://new.test/host"),
        ("a.test:81", "/port", "301 https://a.test:8443/port"),
        ("a.test", "/whole?x=1", "303 http://a.test/other?x=1"),
        ("a.test", "/query?x=1", "301 http://a.test/other?a=b"),
        ("a.test", "/prefix/b?x=1", "307 http://a.test/new/b"),
        ("a.test", "/regex/b/c?x=1", "308 http://a.test/r/b/c?x=1"),
    ] {
        assert_eq!(
            answer(&table, &request(authority, path, &[])),
            want,
            "{path}"
        );
    }
}

#[tokio::test]
async fn rewrites() {
    let routes = r"
        - {match: {prefix: /strip/}, route: {cluster: c, prefix_rewrite: /}}
        - {match: {path: /exact}, route: {cluster: c, prefix_rewrite: /newexact}}
        - {match: {prefix: /re}, route: {cluster: c, regex_rewrite: {pattern: {regex: 'o'}, substitution: '0'}}}
        - {match: {prefix: /literal}, route: {cluster: c, host_rewrite_literal: new.test, append_x_forwarded_host: true}}
        - {match: {prefix: /header}, route: {cluster: c, host_rewrite_header: x-host}}
        - {match: {prefix: /hostre}, route: {cluster: c, host_rewrite_path_regex: {pattern: {regex: '^/hostre/([a-z]+).*$'}, substitution: '\1.svc'}}}
        - {match: {prefix: /}, route: {cluster: c}}
    ";
    let table = table(&format!(
        "virtual_hosts:\n  - name: a\n    domains: ['*']\n    routes:{routes}"
    ));
    for (path, want_path, want_host, want_original) in [
        ("/strip/a?c=d", "/a?c=d", "h.test", Some("/strip/a?c=d")),
        ("/exact?y=1", "/newexact?y=1", "h.test", Some("/exact?y=1")),
        ("/re/foo?o", "/re/f00?o", "h.test", Some("/re/foo?o")),
        ("/literal", "/literal", "new.test", None),
        ("/header", "/header", "from.header", None),
        ("/hostre/abc/d", "/hostre/abc/d", "abc.svc", None),
        ("/keep", "/keep", "h.test", None),
    ] {
        let mut head = request("h.test", path, &[("x-host", "from.header")]);
        table
            .select(&head, None, false)
            .unwrap()
            .rewrite(&mut head, false);
        let original = head
            .headers
            .known(Known::XEnvoyOriginalPath)
            .map(Bytes::copy_from_slice);
        assert_eq!(
            (head.path, head.authority, original),
            (
                want_path.into(),
                want_host.into(),
                want_original.map(Bytes::from)
            ),
            "{path}"
        );
        let forwarded = head.headers.known(Known::XForwardedHost);
        assert_eq!(forwarded.is_some(), path == "/literal", "{path}");
    }
}

#[tokio::test]
async fn weights_are_kept() {
    let table = table(
        "virtual_hosts: [{name: a, domains: ['*'], routes: [{match: {prefix: /}, route: {weighted_clusters: \
         {header_name: x-random, clusters: [{name: a, weight: 50}, {name: b, weight: 50}, {name: c, weight: 0}]}}}]}]",
    );
    for (random, want) in [
        ("10", "a"),
        ("49", "a"),
        ("50", "b"),
        ("99", "b"),
        ("100", "a"),
    ] {
        assert_eq!(
            answer(&table, &request("x", "/", &[("x-random", random)])),
            want,
            "{random}"
        );
    }
    let mut drawn = HashMap::new();
    for _ in 0..2000 {
        *drawn
            .entry(answer(&table, &request("x", "/", &[])))
            .or_insert(0) += 1;
    }
    assert!(!drawn.contains_key("c"));
    // Six standard deviations of a fair coin.
    assert!((866..=1134).contains(&drawn["a"]), "{drawn:?}");
}

#[tokio::test]
async fn header_operations_go_from_the_route_outwards() {
    let table = table(
        "request_headers_to_add: [{header: {key: x-level, value: table}}]
request_headers_to_remove: [x-gone]
virtual_hosts:
- name: a
  domains: ['*']
  request_headers_to_add: [{header: {key: x-set, value: vhost}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}]
  routes:
  - match: {prefix: /}
    route: {cluster: c}
    request_headers_to_add:
    - {header: {key: x-level, value: route}}
    - {header: {key: x-peer, value: '%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%-%REQ(x-set)%'}}
    - {header: {key: x-absent, value: fresh}, append_action: ADD_IF_ABSENT}
    - {header: {key: x-set, value: fresh}, append_action: ADD_IF_ABSENT}
    - {header: {key: x-empty, value: '%REQ(x-nothing)%'}}
    - {header: {key: x-none, value: fresh}, append_action: OVERWRITE_IF_EXISTS}
",
    );
    let mut head = request("a", "/", &[("x-set", "client"), ("x-gone", "1")]);
    let selected = table.select(&head, None, false).unwrap();
    let info = StreamInfo::new(connection(), Some(Protocol::Http11));
    for ops in selected.request_ops() {
        let values = ops.values(&Facts {
            request: Some(&head),
            ..Facts::of_connection(&info)
        });
        ops.apply(&mut head.headers, values);
    }
    let got: Vec<_> = head
        .headers
        .iter()
        .map(|(n, v)| format!("{n:?}: {}", String::from_utf8_lossy(v)))
        .collect();
    assert_eq!(
        got,
        [
            "x-set: vhost",
            "x-level: route",
            "x-peer: 10.0.0.1-client",
            "x-absent: fresh",
            "x-level: table"
        ]
    );
}

#[tokio::test]
async fn what_would_change_who_passes_is_refused() {
    for (note, yaml) in [
        (
            "unknown filter",
            "typed_per_filter_config: {x: {'@type': type.googleapis.com/envoy.extensions.filters.http.bandwidth_limit.v3.BandwidthLimit}}",
        ),
        (
            "pseudo header",
            "request_headers_to_add: [{header: {key: ':path', value: /}}]",
        ),
        ("host", "request_headers_to_remove: [host]"),
        (
            "bad format",
            "request_headers_to_add: [{header: {key: x, value: '%NOPE%'}}]",
        ),
        ("cluster_not_named", "route: {cluster: ''}"),
    ] {
        let action = if yaml.starts_with("route") {
            ""
        } else {
            ", direct_response: {status: 200}"
        };
        let yaml = format!(
            "virtual_hosts: [{{name: a, domains: ['*'], routes: [{{match: {{prefix: /}}{action}, {yaml}}}]}}]"
        );
        let error = try_table(&yaml).unwrap_err();
        assert!(error.contains("virtual host a"), "{note}: {error}");
    }
}

#[test]
fn ports_are_told_from_hosts() {
    for (authority, want) in [
        ("a.test:80", "a.test"),
        ("a.test", "a.test"),
        ("[::1]:80", "[::1]"),
        ("[::1]", "[::1]"),
        ("::1", "::1"),
        ("a.test:", "a.test"),
        ("", ""),
    ] {
        assert_eq!(
            without_port(authority.as_bytes()),
            want.as_bytes(),
            "{authority}"
        );
    }
}
