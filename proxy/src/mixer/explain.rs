//! Why Mixer let a request pass or refused it, for callers who ask by the header `x-lateen-explain` where the mesh
//! allows it.

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD as BASE64};
use bytes::Bytes;
use lateen_protocols::istio::mixer::v1::{
    HeaderOperation, attributes::attribute_value::Value, config::client::HttpClientConfig,
    header_operation::Operation,
};
use serde_json::Value as Json;

use super::client::Checked;
use crate::head::{Headers, Name};

/// What a caller sends to be told why; it goes no further than the proxy that asks Mixer for it.
const ASKED: &[u8] = b"x-lateen-explain";
/// Longest answer header, in bytes; more is cut off.
const MAX_BYTES: usize = 1024;
/// Mixer's word in the metadata of its answers.
const EXPLANATION: &[u8] = b"lateen-explanation-bin";
const VERDICT_ID: &[u8] = b"lateen-verdict-id";

/// Who may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asker {
    /// The proxy's own workload, on its way out.
    Own,
    /// Whoever shows a certificate of the mesh.
    Certified,
}

impl Asker {
    pub(super) fn of(config: &HttpClientConfig) -> Asker {
        let kind = config
            .mixer_attributes
            .as_ref()
            .and_then(|all| all.attributes.get("context.reporter.kind")?.value.as_ref());
        match kind {
            Some(Value::StringValue(kind)) if kind == "outbound" => Asker::Own,
            _ => Asker::Certified,
        }
    }
}

/// Whether a request asks why, and may; `is_certified`: its connection shows a verified certificate. The header is
/// gone in any case.
pub(super) fn is_asked(headers: &mut Headers, asker: Asker, is_certified: bool) -> bool {
    let asks = headers.remove(&Name::from_lower(Bytes::from_static(ASKED)));
    asks && (is_certified || asker == Asker::Own)
}

/// What Mixer says of a verdict.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Explained {
    verdict_id: String,
    rule: String,
    place: String,
    handler: String,
    reason: String,
}

impl Explained {
    /// Reads the metadata of an answer; what is not there is left empty.
    pub(super) fn read(metadata: &Headers) -> Explained {
        let get = |name: &'static [u8]| metadata.get(&Name::from_lower(Bytes::from_static(name)));
        let id = get(VERDICT_ID).map(String::from_utf8_lossy);
        let json: Json = get(EXPLANATION)
            .map(|value| value.strip_suffix(b"=").unwrap_or(value))
            .map(|value| value.strip_suffix(b"=").unwrap_or(value))
            .and_then(|value| serde_json::from_slice(&BASE64.decode(value).ok()?).ok())
            .unwrap_or_default();
        Explained {
            verdict_id: id.unwrap_or_default().into_owned(),
            ..Explained::of(&json)
        }
    }

    /// The rule that decided: the first that refuses, the quota that does, else the first that applied.
    fn of(json: &Json) -> Explained {
        let text = |of: &Json, name: &str| of[name].as_str().unwrap_or_default().to_owned();
        let list = |of: &Json, name: &str| of[name].as_array().cloned().unwrap_or_default();
        let rules = list(json, "rules");
        let asked = rules
            .iter()
            .filter(|rule| rule["dryRun"] != true)
            .flat_map(|rule| {
                list(rule, "asked")
                    .into_iter()
                    .map(move |asked| (rule, asked))
            });
        let refusing = asked.clone().find(|(_, asked)| asked["code"] != "OK");
        let quotas = list(json, "quotas");
        let exhausted = quotas.iter().find(|quota| quota["granted"] == 0);
        if let (None, Some(quota)) = (&refusing, exhausted.or(quotas.first())) {
            let reason = match text(quota, "message") {
                told if told.is_empty() => format!(
                    "{} of {} {} granted",
                    quota["granted"],
                    quota["asked"],
                    text(quota, "quota")
                ),
                told => told,
            };
            return Explained {
                rule: text(quota, "rule"),
                place: text(quota, "place"),
                handler: text(quota, "handler"),
                reason,
                ..Explained::default()
            };
        }
        let Some((rule, asked)) = refusing.or_else(|| asked.clone().next()) else {
            let applied = rules.first().unwrap_or(&Json::Null);
            return Explained {
                rule: text(applied, "rule"),
                place: text(applied, "place"),
                reason: match rules.is_empty() {
                    true => "no rule applies".to_owned(),
                    false => text(json, "code"),
                },
                ..Explained::default()
            };
        };
        let (code, message) = (text(&asked, "code"), text(&asked, "message"));
        Explained {
            rule: text(rule, "rule"),
            place: text(rule, "place"),
            handler: text(&asked, "handler"),
            reason: [code, message].join(":").trim_end_matches(':').to_owned(),
            ..Explained::default()
        }
    }

    /// Mixer could not be asked, or need not be.
    pub(super) fn because(reason: impl Into<String>) -> Explained {
        Explained {
            reason: reason.into(),
            ..Explained::default()
        }
    }

    pub(super) fn of_check(checked: &Checked) -> Explained {
        checked.explained.clone().unwrap_or_default()
    }

    /// Headers of the response.
    pub(super) fn operations(self) -> impl Iterator<Item = HeaderOperation> {
        [
            ("x-lateen-verdict-id", self.verdict_id),
            ("x-lateen-rule", self.rule),
            ("x-lateen-rule-place", self.place),
            ("x-lateen-handler", self.handler),
            ("x-lateen-reason", self.reason),
        ]
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| HeaderOperation {
            name: name.to_owned(),
            value: clean(&value),
            operation: Operation::Replace.into(),
        })
    }
}

/// As a header's value may be: one line of ASCII.
fn clean(value: &str) -> String {
    value
        .chars()
        .map(|c| {
            if c == ' ' || c.is_ascii_graphic() {
                c
            } else {
                '?'
            }
        })
        .take(MAX_BYTES)
        .collect()
}

#[cfg(test)]
mod tests {
    use lateen_protocols::istio::mixer::v1::attributes::AttributeValue;
    use serde_json::json;

    use super::*;

    #[test]
    fn strangers_are_told_nothing() {
        let config = |kind: &str| {
            let mut config = HttpClientConfig::default();
            let value = Some(Value::StringValue(kind.to_owned()));
            let attributes = &mut config.mixer_attributes.get_or_insert_default().attributes;
            attributes.insert("context.reporter.kind".to_owned(), AttributeValue { value });
            config
        };
        for (kind, is_certified, want) in [
            ("outbound", false, true),
            ("inbound", false, false),
            ("inbound", true, true),
            ("", false, false),
        ] {
            let asker = Asker::of(&config(kind));
            let mut headers = Headers::default();
            headers.append(Name::from_lower(Bytes::from_static(ASKED)), "1");
            let asked = is_asked(&mut headers, asker, is_certified);
            assert_eq!(asked, want, "{kind} {is_certified}");
            assert!(!is_asked(&mut headers, Asker::Own, true), "it is gone");
        }
        assert_eq!(Asker::of(&HttpClientConfig::default()), Asker::Certified);
    }

    #[test]
    fn the_rule_that_decided_is_named() {
        let rule = |name: &str, code: &str, dry: bool| json!({"rule": name, "place": "a.yaml:7", "dryRun": dry, "asked": [{"handler": "h", "code": code, "message": "no\r\nway"}]});
        let quota = json!([{"quota": "q", "rule": "r", "place": "p", "handler": "m", "asked": 1, "granted": 0, "message": ""}]);
        for (told, rule, reason) in [
            (json!({}), "", "no rule applies"),
            (
                json!({"rules": [rule("a", "OK", false), rule("b", "PERMISSION_DENIED", false)]}),
                "b",
                "PERMISSION_DENIED:no\r\nway",
            ),
            (
                json!({"rules": [rule("a", "OK", false), rule("b", "PERMISSION_DENIED", true)]}),
                "a",
                "OK:no\r\nway",
            ),
            (
                json!({"rules": [], "quotas": quota}),
                "r",
                "0 of 1 q granted",
            ),
        ] {
            let explained = Explained::of(&told);
            assert_eq!(
                (explained.rule.as_str(), explained.reason.as_str()),
                (rule, reason)
            );
        }
        // Nobody writes a second header with what an adapter says.
        assert_eq!(clean("no\r\nx-a: b\u{e9}"), "no??x-a: b?");
    }
}
