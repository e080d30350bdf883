//! Key sets (RFC 7517) and signatures by them.

use aws_lc_rs::{hmac, signature as sig};
use serde_json::{Map, Value};

use super::{
    status::Status,
    token::{Token, decode},
};

/// Most keys of one set.
const MAX_KEYS: usize = 200;

/// The keys that signatures are verified by.
#[derive(Debug)]
pub(super) struct Keys(Vec<Key>);

#[derive(Debug)]
struct Key {
    kid: String,
    /// Empty: whatever fits the kind.
    alg: String,
    material: Material,
}

enum Material {
    Rsa { n: Vec<u8>, e: Vec<u8> },
    P256(Vec<u8>),
    P384(Vec<u8>),
    P521(Vec<u8>),
    Ed25519(Vec<u8>),
    Secret(Vec<u8>),
}

impl std::fmt::Debug for Material {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Material::Rsa { .. } => "RSA",
            Material::P256(_) => "P-256",
            Material::P384(_) => "P-384",
            Material::P521(_) => "P-521",
            Material::Ed25519(_) => "Ed25519",
            Material::Secret(_) => "***",
        })
    }
}

impl Keys {
    /// Reads a key set. Keys of kinds that are not known are left out, as the specification has it.
    ///
    /// # Errors
    /// It is no key set, or no key of it can be used.
    pub(super) fn parse(text: &[u8]) -> Result<Keys, String> {
        let set: Value = serde_json::from_slice(text).map_err(|e| format!("no JSON: {e}"))?;
        let keys = set
            .get("keys")
            .and_then(Value::as_array)
            .ok_or("it has no list \"keys\"")?;
        if keys.len() > MAX_KEYS {
            return Err(format!("it has more than {MAX_KEYS} keys"));
        }
        let keys: Vec<Key> = keys
            .iter()
            .filter_map(|key| Key::parse(key.as_object()?))
            .collect();
        if keys.is_empty() {
            return Err("it has no key that can be used".to_owned());
        }
        Ok(Keys(keys))
    }

    /// None: nothing is verified by them.
    pub(super) fn none() -> Keys {
        Keys(Vec::new())
    }

    /// Verifies the signature of a token.
    pub(super) fn verify(&self, token: &Token) -> Result<(), Status> {
        let mut tried = false;
        for key in &self.0 {
            let named = token.kid.is_empty() || key.kid.is_empty() || token.kid == key.kid;
            if named && (key.alg.is_empty() || key.alg == token.alg) {
                tried = true;
                if key.material.fits(&token.alg) && key.material.verifies(token) {
                    return Ok(());
                }
            }
        }
        Err(match tried {
            true => Status::VerificationFails,
            false => Status::NoKey,
        })
    }
}

impl Key {
    fn parse(key: &Map<String, Value>) -> Option<Key> {
        let text = |name: &str| key.get(name).and_then(Value::as_str);
        let bytes = |name: &str| text(name).and_then(decode);
        if text("use").is_some_and(|purpose| purpose != "sig") {
            return None;
        }
        let material = match (text("kty")?, text("crv")) {
            ("RSA", _) => Material::Rsa {
                n: bytes("n")?,
                e: bytes("e")?,
            },
            ("EC", Some(curve)) => {
                let length: usize = match curve {
                    "P-256" => 32,
                    "P-384" => 48,
                    "P-521" => 66,
                    _ => return None,
                };
                let mut point = vec![4];
                for name in ["x", "y"] {
                    let part = bytes(name)?;
                    point.resize(point.len() + length.checked_sub(part.len())?, 0);
                    point.extend_from_slice(&part);
                }
                match length {
                    32 => Material::P256(point),
                    48 => Material::P384(point),
                    _ => Material::P521(point),
                }
            }
            ("OKP", Some("Ed25519")) => Material::Ed25519(bytes("x")?),
            ("oct", _) => Material::Secret(bytes("k")?),
            _ => return None,
        };
        let alg = text("alg").unwrap_or_default().to_owned();
        if !alg.is_empty() && !material.fits(&alg) {
            return None;
        }
        Some(Key {
            kid: text("kid").unwrap_or_default().to_owned(),
            alg,
            material,
        })
    }
}

impl Material {
    fn fits(&self, alg: &str) -> bool {
        match self {
            Material::Rsa { .. } => alg.starts_with("RS") || alg.starts_with("PS"),
            Material::P256(_) => alg == "ES256",
            Material::P384(_) => alg == "ES384",
            Material::P521(_) => alg == "ES512",
            Material::Ed25519(_) => alg == "EdDSA",
            Material::Secret(_) => alg.starts_with("HS"),
        }
    }

    /// The kind of key decides what is checked, never the token alone: a public key is no HMAC secret.
    fn verifies(&self, token: &Token) -> bool {
        let (signed, signature) = (token.signed.as_bytes(), token.signature.as_slice());
        let by = |algorithm: &'static dyn sig::VerificationAlgorithm, key: &[u8]| {
            sig::UnparsedPublicKey::new(algorithm, key)
                .verify(signed, signature)
                .is_ok()
        };
        match self {
            Material::P256(point) => by(&sig::ECDSA_P256_SHA256_FIXED, point),
            Material::P384(point) => by(&sig::ECDSA_P384_SHA384_FIXED, point),
            Material::P521(point) => by(&sig::ECDSA_P521_SHA512_FIXED, point),
            Material::Ed25519(key) => by(&sig::ED25519, key),
            Material::Rsa { n, e } => {
                let algorithm = match token.alg.as_str() {
                    "RS256" => &sig::RSA_PKCS1_2048_8192_SHA256,
                    "RS384" => &sig::RSA_PKCS1_2048_8192_SHA384,
                    "RS512" => &sig::RSA_PKCS1_2048_8192_SHA512,
                    "PS256" => &sig::RSA_PSS_2048_8192_SHA256,
                    "PS384" => &sig::RSA_PSS_2048_8192_SHA384,
                    "PS512" => &sig::RSA_PSS_2048_8192_SHA512,
                    _ => return false,
                };
                sig::RsaPublicKeyComponents { n, e }
                    .verify(algorithm, signed, signature)
                    .is_ok()
            }
            Material::Secret(secret) => {
                let algorithm = match token.alg.as_str() {
                    "HS256" => hmac::HMAC_SHA256,
                    "HS384" => hmac::HMAC_SHA384,
                    "HS512" => hmac::HMAC_SHA512,
                    _ => return false,
                };
                let key = hmac::Key::new(algorithm, secret);
                hmac::verify(&key, signed, signature).is_ok()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::jwt_authn::token::encode;

    /// RFC 7515 appendix A.1: HS256.
    const HS256: (&str, &str) = (
        r#"{"keys":[{"kty":"oct","k":"AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"}]}"#,
        "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk",
    );
    /// RFC 7515 appendix A.3: ES256.
    const ES256: (&str, &str) = (
        r#"{"keys":[{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}"#,
        "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
    );

    #[test]
    fn the_specifications_examples_verify_and_nothing_else_does() {
        for (set, text) in [HS256, ES256] {
            let keys = Keys::parse(set.as_bytes()).unwrap();
            let mut token = Token::parse(text).unwrap();
            assert_eq!(keys.verify(&token), Ok(()));
            token.signed.push('x');
            assert_eq!(keys.verify(&token), Err(Status::VerificationFails));
        }
        let es256 = Keys::parse(ES256.0.as_bytes()).unwrap();
        let hs256 = Token::parse(HS256.1).unwrap();
        assert_eq!(es256.verify(&hs256), Err(Status::VerificationFails));
    }

    #[test]
    fn a_public_key_is_no_secret() {
        // Signed by HMAC with the bytes of an RSA key, which everybody has.
        let n = vec![0xc1; 256];
        let set = format!(
            r#"{{"keys":[{{"kty":"RSA","n":"{}","e":"AQAB"}}]}}"#,
            encode(&n, false)
        );
        let keys = Keys::parse(set.as_bytes()).unwrap();
        let signed = format!(
            "{}.{}",
            encode(br#"{"alg":"HS256"}"#, false),
            encode(b"{}", false)
        );
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &n), signed.as_bytes());
        let token = Token::parse(&format!("{signed}.{}", encode(tag.as_ref(), false))).unwrap();
        assert_eq!(keys.verify(&token), Err(Status::VerificationFails));
    }

    #[test]
    fn a_set_without_a_key_that_can_be_used_is_refused() {
        for set in [
            "",
            "[]",
            r#"{"keys":[]}"#,
            r#"{"keys":[{"kty":"EC","crv":"secp256k1","x":"AA","y":"AA"}]}"#,
            r#"{"keys":[{"kty":"RSA","alg":"HS256","n":"AQAB","e":"AQAB"}]}"#,
            r#"{"keys":[{"kty":"RSA","use":"enc","n":"AQAB","e":"AQAB"}]}"#,
        ] {
            assert!(Keys::parse(set.as_bytes()).is_err(), "{set}");
        }
    }
}
