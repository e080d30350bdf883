use std::net::SocketAddr;

use crate::testing::{Proxy, exchange};

const KIND: &str = "type.googleapis.com/envoy.extensions.filters.http";

/// Listens with this script before the router; everything but `/up` is answered directly.
fn listen(proxy: &Proxy, script: &str) -> Result<SocketAddr, String> {
    let script = serde_json::to_string(script).unwrap();
    let seen = "[%REQ(:PATH)%][%REQ(X-A)%]";
    let yaml = format!(
        "filter_chains: [{{filters: [{{name: hcm, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.\
         filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: t, route_config: \
         {{validate_clusters: false, virtual_hosts: [{{name: v, domains: ['*'], routes: [\
         {{match: {{prefix: /up}}, route: {{cluster: self, prefix_rewrite: /direct}}}}, \
         {{match: {{prefix: /off}}, direct_response: {{status: 200}}, typed_per_filter_config: \
         {{lua: {{\"@type\": {KIND}.lua.v3.LuaPerRoute, disabled: true}}}}}}, \
         {{match: {{prefix: /}}, direct_response: {{status: 200, body: {{inline_string: body}}}}, \
         response_headers_to_add: [{{header: {{key: x-seen, value: '{seen}'}}}}]}}]}}]}}, http_filters: [\
         {{name: lua, typed_config: {{\"@type\": {KIND}.lua.v3.Lua, default_source_code: \
         {{inline_string: {script}}}}}}}, \
         {{name: router, typed_config: {{\"@type\": {KIND}.router.v3.Router}}}}]}}}}]}}]"
    );
    let listener = proxy.compile("l", &yaml)?;
    proxy
        .workers
        .add_listener(listener)
        .map_err(|error| error.to_string())?;
    let address = proxy.workers.addresses("l")[0];
    proxy.cluster("self", address, "");
    Ok(address)
}

async fn ask(address: SocketAddr, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    exchange(address, request.as_bytes()).await
}

async fn post(address: SocketAddr, path: &str, body: &str) -> String {
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    exchange(address, request.as_bytes()).await
}

#[tokio::test]
async fn a_script_changes_heads_and_answers() {
    let proxy = Proxy::start();
    let script = r#"
        function envoy_on_request(h)
          h:headers():add("x-a", 10 / 2)
          if h:headers():get(":path") == "/stop" then
            h:respond({[":status"] = "418", ["x-by"] = {"lua", "me"}}, "teapot")
            error("never here")
          end
        end
        function envoy_on_response(h)
          h:headers():add("x-status", h:headers():get(":status"))
        end"#;
    let address = listen(&proxy, script).unwrap();
    let answer = ask(address, "/x").await;
    assert!(
        answer.contains("x-seen: [/x][5]") && answer.contains("x-status: 200"),
        "{answer}"
    );
    let answer = ask(address, "/stop").await;
    assert!(
        answer.starts_with("HTTP/1.1 418")
            && answer.contains("x-by: lua\r\nx-by: me\r\n")
            && answer.contains("x-status: 418")
            && answer.ends_with("teapot"),
        "{answer}"
    );
    let answer = ask(address, "/off").await;
    assert!(!answer.contains("x-status"), "{answer}");
    assert_eq!(proxy.counter("http.t.lua.errors"), 0);
    assert_eq!(proxy.counter("http.t.lua.executions"), 4);
}

#[tokio::test]
async fn a_script_waits_for_bodies_and_calls() {
    let proxy = Proxy::start();
    let script = r#"
        function envoy_on_request(h)
          local path = h:headers():get(":path")
          if path == "/body" then
            local body = h:body()
            local text = body:getBytes(0, body:length())
            h:headers():replace(":path", "/got-" .. text)
          elseif path == "/call" then
            local headers, body = h:httpCall("self", {[":method"] = "GET", [":path"] = "/direct",
              [":authority"] = "b"}, nil, 1000)
            h:headers():add("x-a", headers[":status"] .. body)
          elseif path == "/stale" then
            local headers = h:headers()
            h:body()
            headers:add("x-a", "late")
          end
        end
        function envoy_on_response(h)
          if h:headers():get("x-seen") == "[/direct][]" then
            local body = h:body()
            body:setBytes("longer than " .. body:getBytes(0, body:length()))
          end
        end"#;
    let address = listen(&proxy, script).unwrap();
    let answer = post(address, "/body", "hello").await;
    assert!(answer.contains("x-seen: [/got-hello][]"), "{answer}");
    let answer = ask(address, "/call").await;
    assert!(
        answer.contains("x-seen: [/call][200longer than body]"),
        "{answer}"
    );
    let answer = ask(address, "/up").await;
    // Once where it was answered, once where it was passed on.
    assert!(answer.ends_with("longer than longer than body"), "{answer}");
    assert_eq!(proxy.counter("http.t.lua.errors"), 0);
    let answer = post(address, "/stale", "x").await;
    assert!(answer.contains("x-seen: [/stale][]"), "{answer}");
    assert_eq!(proxy.counter("http.t.lua.errors"), 1);
}

#[tokio::test]
async fn a_script_cannot_take_more_than_its_share() {
    let proxy = Proxy::start();
    let script = r#"
        function envoy_on_request(h)
          local path = h:headers():get(":path")
          if path == "/loop" then
            while true do end
          elseif path == "/memory" then
            local text = "xxxxxxxx"
            while true do text = text .. text end
          elseif path == "/host" then
            h:headers():add("x-a", tostring(io) .. tostring(os.execute) .. tostring(require))
          elseif path == "/crlf" then
            h:headers():add("x-a", "a\r\nx-b: c")
          elseif path == "/bytecode" then
            h:headers():add("x-a", tostring(load("\27Lua")))
          end
        end"#;
    let address = listen(&proxy, script).unwrap();
    for path in ["/loop", "/memory", "/crlf"] {
        let answer = ask(address, path).await;
        assert!(answer.contains(&format!("x-seen: [{path}][]")), "{answer}");
    }
    assert_eq!(proxy.counter("http.t.lua.errors"), 3);
    // The state serves on.
    let answer = ask(address, "/host").await;
    assert!(answer.contains("x-seen: [/host][nilnilnil]"), "{answer}");
    let answer = ask(address, "/bytecode").await;
    assert!(answer.contains("x-seen: [/bytecode][nil]"), "{answer}");
}

#[tokio::test]
async fn a_script_that_does_not_load_is_refused() {
    let proxy = Proxy::start();
    for (script, want) in [
        ("function envoy_on_request(h", "script:1"),
        ("error('no')", "no"),
        ("envoy_on_request = 1", "envoy_on_request is no function"),
        ("while true do end", "too long"),
    ] {
        let error = listen(&proxy, script).unwrap_err();
        assert!(
            error.contains("default_source_code") && error.contains(want),
            "{error}"
        );
    }
}

#[tokio::test]
async fn the_documented_script_does_what_it_says() {
    let page = include_str!("../../../../docs/reference/proxy.md");
    let (_, rest) = page.split_once("```lua\n").unwrap();
    let (script, _) = rest.split_once("```").unwrap();
    let proxy = Proxy::start();
    let address = listen(&proxy, script).unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: a\r\nx-forbidden: 1\r\nconnection: close\r\n\r\n";
    let answer = exchange(address, request).await;
    assert!(
        answer.starts_with("HTTP/1.1 403") && answer.ends_with("not this way"),
        "{answer}"
    );
    let answer = ask(address, "/").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(proxy.counter("http.t.lua.errors"), 0);
}
