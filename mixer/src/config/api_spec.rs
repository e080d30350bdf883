//! `HTTPAPISpec` and `HTTPAPISpecBinding`: how requests get `api.*` attributes. Proxies since 1.1 take no notice of
//! them; what is written is checked so that mistakes show.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value as Json;

use super::object::Fault;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Spec {
    attributes: Attributes,
    patterns: Vec<Pattern>,
    #[serde(alias = "api_keys")]
    api_keys: Vec<ApiKey>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Attributes {
    attributes: BTreeMap<String, BTreeMap<String, Json>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Pattern {
    attributes: Attributes,
    #[serde(alias = "http_method")]
    http_method: String,
    #[serde(alias = "uri_template")]
    uri_template: Option<String>,
    regex: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ApiKey {
    query: Option<String>,
    header: Option<String>,
    cookie: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Binding {
    services: Vec<lateen_config::policy::IstioService>,
    #[serde(alias = "api_specs")]
    api_specs: Vec<Reference>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Reference {
    name: String,
    #[allow(dead_code, reason = "any namespace will do")]
    namespace: String,
}

/// The kinds this module checks.
pub const KINDS: [&str; 2] = ["HTTPAPISpec", "HTTPAPISpecBinding"];

/// Checks an object of one of [`KINDS`].
///
/// # Errors
/// What is wrong with it.
pub fn check(kind: &str, spec: &Json) -> Result<(), Fault> {
    // A field that is written without a value is one that is not written.
    let spec = match spec {
        Json::Object(fields) => {
            let written = fields.iter().filter(|(_, value)| !value.is_null());
            Json::Object(written.map(|(k, v)| (k.clone(), v.clone())).collect())
        }
        Json::Null => Json::Object(serde_json::Map::new()),
        other => return Err(Fault::new("", format!("{other} is no map"))),
    };
    if kind == "HTTPAPISpecBinding" {
        let binding = Binding::deserialize(&spec).map_err(|error| Fault::new("", error))?;
        if binding.services.is_empty() {
            return Err(Fault::new("services", "there must be at least one service"));
        }
        if binding.api_specs.is_empty() {
            return Err(Fault::new(
                "apiSpecs",
                "there must be at least one HTTPAPISpec",
            ));
        }
        return match binding.api_specs.iter().position(|r| r.name.is_empty()) {
            Some(i) => Err(Fault::new(format!("apiSpecs[{i}].name"), "it has no name")),
            None => Ok(()),
        };
    }
    let spec = Spec::deserialize(&spec).map_err(|error| Fault::new("", error))?;
    check_attributes(&spec.attributes, "attributes")?;
    if spec.patterns.is_empty() {
        return Err(Fault::new("patterns", "there must be at least one pattern"));
    }
    for (i, pattern) in spec.patterns.iter().enumerate() {
        let at = |field: &str| format!("patterns[{i}].{field}");
        check_attributes(&pattern.attributes, &at("attributes"))?;
        if pattern.http_method.is_empty() {
            return Err(Fault::new(at("httpMethod"), "it is empty"));
        }
        match (pattern.uri_template.as_deref(), pattern.regex.as_deref()) {
            (Some(template), None) if !template.is_empty() => {}
            (None, Some(pattern)) if !pattern.is_empty() => {
                regex::Regex::new(pattern).map_err(|error| Fault::new(at("regex"), error))?;
            }
            _ => {
                return Err(Fault::new(
                    at("uriTemplate"),
                    "say either uriTemplate or regex",
                ));
            }
        }
    }
    for (i, key) in spec.api_keys.iter().enumerate() {
        let given: Vec<&String> = [&key.query, &key.header, &key.cookie]
            .into_iter()
            .flatten()
            .collect();
        if given.len() != 1 || given.iter().any(|name| name.is_empty()) {
            return Err(Fault::new(
                format!("apiKeys[{i}]"),
                "say one of query, header and cookie",
            ));
        }
    }
    Ok(())
}

fn check_attributes(attributes: &Attributes, at: &str) -> Result<(), Fault> {
    const VALUES: [&str; 8] = [
        "stringValue",
        "int64Value",
        "doubleValue",
        "boolValue",
        "bytesValue",
        "timestampValue",
        "durationValue",
        "stringMapValue",
    ];
    for (name, value) in &attributes.attributes {
        let is_known = |key: &String| {
            let same = |known: &&str| {
                known.eq_ignore_ascii_case(&key.chars().filter(|c| *c != '_').collect::<String>())
            };
            VALUES.iter().any(same)
        };
        if value.len() != 1 || !value.keys().all(is_known) {
            let reason = format!("it has one value, which is one of {}", VALUES.join(", "));
            return Err(Fault::new(format!("{at}.attributes.{name}"), reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_istio_refuses_is_refused() {
        let pattern = json!({"httpMethod": "GET", "uriTemplate": "/x"});
        let attributes = json!({"attributes": {"api.service": {"stringValue": "x"}}});
        for (kind, spec, field) in [
            (
                "HTTPAPISpec",
                json!({"patterns": [pattern], "attributes": attributes}),
                None,
            ),
            (
                "HTTPAPISpec",
                json!({"patterns": [{"httpMethod": "GET", "regex": "^/x$"}], "apiKeys": [{"query": "key"}]}),
                None,
            ),
            ("HTTPAPISpec", json!({}), Some("patterns")),
            ("HTTPAPISpec", json!({"pattern": []}), Some("")),
            (
                "HTTPAPISpec",
                json!({"patterns": [{"uriTemplate": "/x"}]}),
                Some("patterns[0].httpMethod"),
            ),
            (
                "HTTPAPISpec",
                json!({"patterns": [{"httpMethod": "GET"}]}),
                Some("patterns[0].uriTemplate"),
            ),
            (
                "HTTPAPISpec",
                json!({"patterns": [pattern], "apiKeys": [{}]}),
                Some("apiKeys[0]"),
            ),
            (
                "HTTPAPISpec",
                json!({"patterns": [pattern], "attributes": {"attributes": {"a": {"value": 1}}}}),
                Some("attributes.attributes.a"),
            ),
            (
                "HTTPAPISpecBinding",
                json!({"services": [{"name": "a"}], "apiSpecs": [{"name": "b"}]}),
                None,
            ),
            (
                "HTTPAPISpecBinding",
                json!({"services": null}),
                Some("services"),
            ),
            (
                "HTTPAPISpecBinding",
                json!({"services": [{"name": "a"}]}),
                Some("apiSpecs"),
            ),
        ] {
            let got = check(kind, &spec).err().map(|fault| fault.field);
            assert_eq!(got.as_deref(), field, "{spec}");
        }
    }
}
