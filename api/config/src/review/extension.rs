//! WasmPlugin and TrafficExtension: code that proxies run.

use super::{At, Check};

/// Lua code longer than this is refused.
const LUA_LIMIT_BYTES: usize = 64 << 10;

pub(super) fn wasm_plugin(check: &mut Check<'_>, spec: &At<'_>) {
    check.targets(spec);
    module(check, spec);
}

pub(super) fn traffic_extension(check: &mut Check<'_>, spec: &At<'_>) {
    check.targets(spec);
    let lua = spec.get("lua");
    if spec.has("wasm") {
        module(check, &spec.get("wasm"));
    } else if !lua.is_set() {
        check.error(spec, "one of wasm and lua is required");
    }
    let code = lua.get("inlineCode");
    if lua.is_set() && code.text().is_empty() {
        check.error(&code, "missing; it is required");
    }
    if code.text().len() > LUA_LIMIT_BYTES {
        check.error(
            &code,
            format!(
                "{} bytes; Lua code may have {LUA_LIMIT_BYTES}",
                code.text().len()
            ),
        );
    }
}

/// Where a module comes from and what it is given.
fn module(check: &mut Check<'_>, at: &At<'_>) {
    let url = at.get("url");
    if url.text().is_empty() {
        check.error(&url, "missing; it is required");
    } else {
        match url.text().split_once("://") {
            Some((scheme, _)) if !matches!(scheme, "file" | "http" | "https" | "oci") => {
                check.error(
                    &url,
                    format!(
                        "{scheme}:// is not a scheme for modules; use oci, https, http or file"
                    ),
                );
            }
            Some((_, "")) => check.error(&url, "names no module"),
            _ => {}
        }
        if url
            .text()
            .contains(|c: char| c.is_whitespace() || c.is_control() || c == '\\')
        {
            check.error(&url, format!("{:?} is not a URL", url.text()));
        }
    }
    let sha = at.get("sha256");
    let is_hash = sha.text().len() == 64
        && sha
            .text()
            .bytes()
            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if !sha.text().is_empty() && !is_hash {
        check.error(&sha, "must be 64 hexadecimal digits in lower case");
    }
    let mut names: Vec<&str> = Vec::new();
    for env in at.get("vmConfig").get("env").items() {
        let name = env.str("name");
        if name.is_empty() && !env.has("name") {
            check.error(&env.get("name"), "missing; it is required");
        }
        if names.contains(&name) {
            check.error(&env.get("name"), format!("{name:?} is there twice"));
        }
        names.push(name);
        if env.str("valueFrom") == "HOST" && !env.str("value").is_empty() {
            check.error(
                &env.get("value"),
                "HOST takes the value from the proxy's environment; remove value, or use INLINE",
            );
        }
    }
}
