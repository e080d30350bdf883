//! AdmissionReview of admission.k8s.io/v1: the question and the answer.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

/// The version we speak, which API servers have since 1.16.
const API_VERSION: &str = "admission.k8s.io/v1";
/// Warnings of one answer: API servers cut off after 4096 characters.
const WARNINGS: usize = 16;
/// Longest warning, in bytes: API servers cut at 256 characters.
const WARNING: usize = 250;
/// Longest message, in bytes.
const MESSAGE: usize = 4096;

/// What is to happen in the cluster.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Review {
    /// Names the question.
    pub uid: String,
    /// Of the object.
    pub kind: GroupVersionKind,
    /// Its namespace; empty if it has none.
    #[serde(default)]
    pub namespace: String,
    /// `CREATE`, `UPDATE`, `DELETE` or `CONNECT`.
    pub operation: String,
    /// The object as it shall be.
    #[serde(default)]
    pub object: Value,
}

/// What an object is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
pub struct GroupVersionKind {
    /// API group; empty for the core.
    pub group: String,
    /// Version.
    pub version: String,
    /// Kind.
    pub kind: String,
}

/// The verdict.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// Why it may not happen; `None` if it may.
    pub refusal: Option<String>,
    /// Said to who asked, whatever the verdict.
    pub warnings: Vec<String>,
    /// JSON Patch (RFC 6902) of the object.
    pub patch: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    api_version: String,
    kind: String,
    request: Option<Review>,
}

impl Review {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// It is no AdmissionReview of our version; says why.
    pub fn parse(body: &[u8]) -> Result<Self, String> {
        let envelope: Envelope = serde_json::from_slice(body)
            .map_err(|error| format!("this is no AdmissionReview: {error}"))?;
        if (envelope.api_version.as_str(), envelope.kind.as_str())
            != (API_VERSION, "AdmissionReview")
        {
            return Err(format!(
                "{} of {} is not understood, AdmissionReview of {API_VERSION} is; name it in admissionReviewVersions",
                envelope.kind, envelope.api_version
            ));
        }
        envelope
            .request
            .ok_or_else(|| "this AdmissionReview has no request".to_owned())
    }
}

impl Answer {
    /// It may happen.
    #[must_use]
    pub fn allowed() -> Self {
        Self::default()
    }

    /// It may not.
    #[must_use]
    pub fn refused(reason: String) -> Self {
        Self {
            refusal: Some(reason),
            ..Self::default()
        }
    }

    /// The AdmissionReview that answers.
    #[must_use]
    pub fn to_json(&self, review: &Review) -> String {
        let mut response = json!({"uid": review.uid, "allowed": self.refusal.is_none()});
        if let Some(reason) = &self.refusal {
            // 422, as an API server's own refusals of what is invalid.
            response["status"] = json!({
                "code": 422, "reason": "Invalid", "status": "Failure", "message": cut(reason, MESSAGE),
            });
        }
        if !self.warnings.is_empty() {
            let mut warnings: Vec<String> = self
                .warnings
                .iter()
                .take(WARNINGS)
                .map(|text| cut(text, WARNING))
                .collect();
            if let more @ 1.. = self.warnings.len().saturating_sub(WARNINGS) {
                warnings.push(format!("and {more} more; `lateen validate` lists all"));
            }
            response["warnings"] = json!(warnings);
        }
        if let Some(patch) = &self.patch {
            response["patchType"] = json!("JSONPatch");
            response["patch"] = json!(STANDARD.encode(patch.to_string()));
        }
        json!({"apiVersion": API_VERSION, "kind": "AdmissionReview", "response": response})
            .to_string()
    }
}

fn cut(text: &str, limit: usize) -> String {
    if text.len() <= limit {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(limit - '…'.len_utf8());
    format!("{}…", text.get(..end).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_reviews_are_read() {
        let good = json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {
                "uid": "u", "operation": "CREATE", "kind": {"group": "", "version": "v1", "kind": "Pod"},
                "dryRun": true, "object": {"a": 1},
            },
        });
        let review = Review::parse(good.to_string().as_bytes()).unwrap();
        assert_eq!((&*review.uid, &*review.namespace), ("u", ""));
        for (part, value) in [
            ("apiVersion", json!("admission.k8s.io/v1beta1")),
            ("kind", json!("Pod")),
            ("request", Value::Null),
            ("request", json!({"uid": "u"})),
        ] {
            let mut bad = good.clone();
            bad[part] = value;
            assert!(Review::parse(bad.to_string().as_bytes()).is_err(), "{bad}");
        }
        assert!(Review::parse(b"{").is_err());
    }

    #[test]
    fn an_answer_is_bounded() {
        let review = Review {
            uid: "u".into(),
            kind: GroupVersionKind {
                group: String::new(),
                version: "v1".into(),
                kind: "Pod".into(),
            },
            namespace: String::new(),
            operation: "CREATE".into(),
            object: Value::Null,
        };
        let answer = Answer {
            warnings: vec!["ä".repeat(1000); 20],
            ..Answer::refused("x".repeat(10_000))
        };
        let said: Value = serde_json::from_str(&answer.to_json(&review)).unwrap();
        let said = &said["response"];
        assert_eq!(
            (&said["uid"], &said["allowed"]),
            (&json!("u"), &json!(false))
        );
        assert_eq!(said["status"]["message"].as_str().unwrap().len(), MESSAGE);
        let warnings = said["warnings"].as_array().unwrap();
        assert_eq!(warnings.len(), WARNINGS + 1);
        assert!(
            warnings
                .iter()
                .all(|text| text.as_str().unwrap().len() <= WARNING)
        );
        assert_eq!(
            warnings[WARNINGS],
            "and 4 more; `lateen validate` lists all"
        );
    }
}
