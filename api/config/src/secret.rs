//! Kubernetes Secrets with TLS material, read for gateways' `credentialName`.

use std::{collections::BTreeMap, fmt};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value};

/// Keys that are read, Kubernetes' and Istio's names; the rest of a Secret is not kept.
const KEYS: [&str; 7] = [
    "tls.crt", "tls.key", "ca.crt", "ca.crl", "cert", "key", "cacert",
];

/// Largest value, in bytes: what Kubernetes takes for a whole Secret.
const VALUE_LIMIT_BYTES: usize = 1 << 20;

/// The TLS material of a Secret, PEM. Never shown.
#[derive(Clone, Default, PartialEq)]
pub struct Secret {
    values: BTreeMap<&'static str, String>,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.values.keys()).finish()
    }
}

impl Secret {
    /// Reads `data` (base64) and `stringData`, of which the latter wins. `None`: none of the keys is there.
    ///
    /// # Errors
    /// The field and what is wrong with it; never the value.
    pub(crate) fn read(document: &Map<String, Value>) -> Result<Option<Secret>, (String, String)> {
        let mut secret = Secret::default();
        for (field, encoded) in [("data", true), ("stringData", false)] {
            for key in KEYS {
                let Some(value) = document.get(field).and_then(|data| data.get(key)) else {
                    continue;
                };
                let at = format!("{field}.{key}");
                match pem(value, encoded) {
                    Ok(text) => {
                        secret.values.insert(key, text);
                    }
                    Err(reason) => return Err((at, reason.to_owned())),
                }
            }
        }
        let (certificate, key) = (secret.certificate_chain(), secret.private_key());
        if certificate.is_some() != key.is_some() {
            let (there, missing) = match certificate {
                Some(_) => ("tls.crt", "tls.key"),
                None => ("tls.key", "tls.crt"),
            };
            return Err(("data".into(), format!("{there} without {missing}")));
        }
        Ok((!secret.values.is_empty()).then_some(secret))
    }

    fn any(&self, keys: [&'static str; 2]) -> Option<&str> {
        keys.iter()
            .find_map(|key| self.values.get(key).map(String::as_str))
    }

    /// Certificates, the leaf first.
    #[must_use]
    pub fn certificate_chain(&self) -> Option<&str> {
        self.any(["tls.crt", "cert"])
    }

    /// The leaf's key.
    #[must_use]
    pub fn private_key(&self) -> Option<&str> {
        self.any(["tls.key", "key"])
    }

    /// Certificates of authorities by which peers are verified.
    #[must_use]
    pub fn authorities(&self) -> Option<&str> {
        self.any(["ca.crt", "cacert"])
    }

    /// Revoked certificates.
    #[must_use]
    pub fn revoked(&self) -> Option<&str> {
        self.values.get("ca.crl").map(String::as_str)
    }
}

/// A value that has at least one PEM section.
fn pem(value: &Value, encoded: bool) -> Result<String, &'static str> {
    let text = value.as_str().ok_or("must be a string")?;
    if text.len() > VALUE_LIMIT_BYTES * 4 / 3 {
        return Err("longer than 1 MiB");
    }
    let text = if encoded {
        // Editors wrap lines.
        let packed: String = text.split_ascii_whitespace().collect();
        let bytes = STANDARD.decode(packed).map_err(|_| "not base64")?;
        String::from_utf8(bytes).map_err(|_| "not PEM")?
    } else {
        text.to_owned()
    };
    if text.contains("-----BEGIN ") {
        Ok(text)
    } else {
        Err("not PEM")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(document: Value) -> Result<Option<Secret>, (String, String)> {
        Secret::read(document.as_object().unwrap())
    }

    const PEM: &str = "-----BEGIN X-----\nAA==\n-----END X-----\n";

    #[test]
    fn both_vocabularies_are_read_and_nothing_is_shown() {
        let encoded = STANDARD.encode(PEM);
        for keys in [["tls.crt", "tls.key", "ca.crt"], ["cert", "key", "cacert"]] {
            let data = json!({"data": {keys[0]: encoded, keys[1]: encoded, keys[2]: encoded}});
            let secret = read(data).unwrap().unwrap();
            assert_eq!(secret.certificate_chain(), Some(PEM));
            assert_eq!(secret.private_key(), Some(PEM));
            assert_eq!(secret.authorities(), Some(PEM));
            assert!(!format!("{secret:?}").contains("BEGIN"));
        }
        let plain = json!({"stringData": {"ca.crt": PEM}});
        assert_eq!(read(plain).unwrap().unwrap().authorities(), Some(PEM));
        assert_eq!(read(json!({"data": {"password": "cHc="}})), Ok(None));
    }

    #[test]
    fn what_is_wrong_is_named_without_its_value() {
        let encoded = STANDARD.encode(PEM);
        for (document, field, reason) in [
            (
                json!({"data": {"tls.crt": "%"}}),
                "data.tls.crt",
                "not base64",
            ),
            (
                json!({"data": {"tls.crt": "AAAA"}}),
                "data.tls.crt",
                "not PEM",
            ),
            (
                json!({"stringData": {"key": "hunter2"}}),
                "stringData.key",
                "not PEM",
            ),
            (json!({"data": {"key": 7}}), "data.key", "must be a string"),
            (
                json!({"data": {"tls.crt": encoded}}),
                "data",
                "tls.crt without tls.key",
            ),
        ] {
            assert_eq!(read(document).unwrap_err(), (field.into(), reason.into()));
        }
    }
}
