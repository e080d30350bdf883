//! Telemetry: tracing, metrics, access logs.

use super::{At, Check};

/// An expression longer than this, or nested deeper, is refused unread.
const EXPRESSION_LIMIT_BYTES: usize = 4096;
const NESTING_LIMIT: usize = 32;

/// Envoy: attributes an access log filter may name.
const ROOTS: &[&str] = &[
    "request",
    "response",
    "source",
    "destination",
    "connection",
    "upstream",
    "metadata",
    "filter_state",
    "upstream_filter_state",
    "xds",
    "node",
    "plugin_name",
    "plugin_root_id",
    "plugin_vm_id",
    "cluster_name",
    "cluster_metadata",
    "listener_direction",
    "listener_metadata",
    "route_name",
    "route_metadata",
    "upstream_host_metadata",
];

pub(super) fn check(check: &mut Check<'_>, spec: &At<'_>) {
    check.targets(spec);
    let tracing = spec.get("tracing");
    if tracing.count() > 1 {
        check.warn(&tracing, "only the first is used");
    }
    for entry in tracing.items() {
        if entry.get("providers").count() > 1 {
            check.warn(&entry.get("providers"), "only the first is used");
        }
        for (name, tag) in entry.get("customTags").entries() {
            if name.is_empty() {
                check.error(&tag, "a tag's name may not be empty");
            }
        }
    }
    for entry in spec.get("metrics").items() {
        for tags in entry
            .get("overrides")
            .items()
            .map(|change| change.get("tagOverrides"))
        {
            for (name, tag) in tags.entries() {
                if name.is_empty() {
                    check.warn(&tag, "a tag's name may not be empty");
                }
                let has_value = !tag.str("value").is_empty();
                if tag.str("operation") == "REMOVE" && has_value {
                    check.error(
                        &tag.get("value"),
                        "a tag that is removed has no value; use UPSERT",
                    );
                } else if tag.str("operation") != "REMOVE" && !has_value {
                    check.error(&tag.get("value"), "required for UPSERT");
                }
            }
        }
    }
    for entry in spec.get("accessLogging").items() {
        let expression = entry.get("filter").get("expression");
        if !expression.text().is_empty() {
            cel(check, &expression);
        }
    }
}

/// Whether an expression is short and flat enough to be read.
pub(crate) fn is_bounded(text: &str) -> bool {
    let mut depth: usize = 0;
    let deepest = text
        .bytes()
        .map(|byte| {
            match byte {
                b'(' | b'[' | b'{' | b'!' | b'-' | b'?' => depth += 1,
                b')' | b']' | b'}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            depth
        })
        .max()
        .unwrap_or_default();
    text.len() <= EXPRESSION_LIMIT_BYTES && deepest <= NESTING_LIMIT
}

/// Whether an access log filter is CEL over attributes that Envoy has.
fn cel(check: &mut Check<'_>, at: &At<'_>) {
    let text = at.text();
    if !is_bounded(text) {
        check.error(
            at,
            format!(
                "an expression may have {EXPRESSION_LIMIT_BYTES} bytes and {NESTING_LIMIT} levels"
            ),
        );
        return;
    }
    match cel::Program::compile(text) {
        Err(error) => {
            let error = error.to_string();
            let reason = error
                .lines()
                .map(str::trim)
                .find(|line| !line.is_empty())
                .unwrap_or_default();
            check.error(at, format!("not a CEL expression: {reason}"));
        }
        Ok(program) => {
            for name in program.references().variables() {
                if !ROOTS.contains(&name) {
                    check.error(at, format!("{name:?} is not an attribute of Envoy's; such are request, response, connection"));
                }
            }
        }
    }
}
