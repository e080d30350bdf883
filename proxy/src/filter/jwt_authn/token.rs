//! A JWT in compact form: parts, claims, time. Nothing in it may be believed before its signature was verified.

use base64::{
    Engine as _,
    engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD},
};
use serde_json::{Map, Value};

use super::status::Status;

/// A parsed token.
#[derive(Debug)]
pub(super) struct Token {
    /// As it came, without the signature: what was signed.
    pub(super) signed: String,
    /// The payload as it came.
    pub(super) payload_text: String,
    pub(super) header: Map<String, Value>,
    pub(super) payload: Map<String, Value>,
    pub(super) alg: String,
    pub(super) kid: String,
    pub(super) iss: String,
    pub(super) sub: String,
    pub(super) audiences: Vec<String>,
    /// Seconds since 1970; 0: not given.
    pub(super) iat: u64,
    pub(super) nbf: u64,
    pub(super) exp: u64,
    pub(super) signature: Vec<u8>,
}

/// What keys are for.
pub(super) const ALGORITHMS: [&str; 13] = [
    "EdDSA", "ES256", "ES384", "ES512", "HS256", "HS384", "HS512", "RS256", "RS384", "RS512",
    "PS256", "PS384", "PS512",
];

impl Token {
    /// Parses a token. Errors are Envoy's (`jwt_verify_lib`), in its order.
    pub(super) fn parse(text: &str) -> Result<Token, Status> {
        let mut parts = text.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Status::BadFormat);
        };
        let header_map = object(header, Status::HeaderBase64, Status::HeaderJson)?;
        let alg = match header_map.get("alg") {
            Some(Value::String(alg)) => alg.clone(),
            _ => return Err(Status::HeaderAlg),
        };
        if !ALGORITHMS.contains(&alg.as_str()) {
            return Err(Status::AlgNotSupported);
        }
        let kid = match header_map.get("kid") {
            None => String::new(),
            Some(Value::String(kid)) => kid.clone(),
            Some(_) => return Err(Status::HeaderKid),
        };
        let claims = object(payload, Status::PayloadBase64, Status::PayloadJson)?;
        let text_of = |name: &str, error| match claims.get(name) {
            None => Ok(String::new()),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(_) => Err(error),
        };
        let iss = text_of("iss", Status::IssNotString)?;
        let sub = text_of("sub", Status::SubNotString)?;
        let iat = time(&claims, "iat", Status::IatNotInteger, Status::IatOutOfRange)?;
        let nbf = time(&claims, "nbf", Status::NbfNotInteger, Status::NbfOutOfRange)?;
        let exp = time(&claims, "exp", Status::ExpNotInteger, Status::ExpOutOfRange)?;
        text_of("jti", Status::JtiNotString)?;
        let audiences = match claims.get("aud") {
            None => Vec::new(),
            Some(Value::String(one)) => vec![one.clone()],
            Some(Value::Array(all)) => all
                .iter()
                .map(|one| one.as_str().map(str::to_owned).ok_or(Status::AudNotString))
                .collect::<Result<_, _>>()?,
            Some(_) => return Err(Status::AudNotString),
        };
        Ok(Token {
            signed: format!("{header}.{payload}"),
            payload_text: payload.to_owned(),
            alg,
            kid,
            iss,
            sub,
            audiences,
            iat,
            nbf,
            exp,
            signature: decode(signature).ok_or(Status::SignatureBase64)?,
            header: header_map,
            payload: claims,
        })
    }

    /// Whether the token is valid at `now`, seconds since 1970, give or take `skew` seconds.
    pub(super) fn check_time(&self, now: u64, skew: u64) -> Result<(), Status> {
        if now.saturating_add(skew) < self.nbf {
            return Err(Status::NotYetValid);
        }
        if self.exp != 0 && now > self.exp.saturating_add(skew) {
            return Err(Status::Expired);
        }
        Ok(())
    }
}

/// Base64url, as the specification has it without padding.
pub(super) fn decode(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

/// Base64url, with padding if that is wanted.
pub(super) fn encode(bytes: &[u8], pad: bool) -> String {
    match pad {
        true => URL_SAFE.encode(bytes),
        false => URL_SAFE_NO_PAD.encode(bytes),
    }
}

fn object(text: &str, base64: Status, json: Status) -> Result<Map<String, Value>, Status> {
    let bytes = decode(text).ok_or(base64)?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(object),
        _ => Err(json),
    }
}

fn time(
    claims: &Map<String, Value>,
    name: &str,
    kind: Status,
    range: Status,
) -> Result<u64, Status> {
    let Some(value) = claims.get(name) else {
        return Ok(0);
    };
    let Some(number) = value.as_number() else {
        return Err(kind);
    };
    if let Some(seconds) = number.as_u64() {
        return i64::try_from(seconds).map_or(Err(range), |_| Ok(seconds));
    }
    match number.as_f64() {
        // Below 2^63, so that it fits.
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "checked to be in range"
        )]
        Some(seconds) if (0.0..9.2e18).contains(&seconds) => Ok(seconds as u64),
        Some(_) => Err(range),
        None => Err(kind),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(super) fn unsigned(header: &str, payload: &str) -> String {
        format!(
            "{}.{}.{}",
            encode(header.as_bytes(), false),
            encode(payload.as_bytes(), false),
            encode(b"signature", false)
        )
    }

    fn error(header: &str, payload: &str) -> Status {
        Token::parse(&unsigned(header, payload)).unwrap_err()
    }

    #[test]
    fn what_is_wrong_with_a_token_is_told() {
        assert_eq!(Token::parse("a.b").unwrap_err(), Status::BadFormat);
        assert_eq!(Token::parse("a.b.c.d").unwrap_err(), Status::BadFormat);
        assert_eq!(Token::parse("a.b.c").unwrap_err(), Status::HeaderBase64);
        assert_eq!(error("[]", "{}"), Status::HeaderJson);
        assert_eq!(error("{}", "{}"), Status::HeaderAlg);
        assert_eq!(error(r#"{"alg":"none"}"#, "{}"), Status::AlgNotSupported);
        assert_eq!(error(r#"{"alg":"RS256","kid":1}"#, "{}"), Status::HeaderKid);
        let payload = |payload: &str| error(r#"{"alg":"RS256"}"#, payload);
        assert_eq!(payload("1"), Status::PayloadJson);
        assert_eq!(payload(r#"{"iss":1}"#), Status::IssNotString);
        assert_eq!(payload(r#"{"exp":"1"}"#), Status::ExpNotInteger);
        assert_eq!(payload(r#"{"exp":-1}"#), Status::ExpOutOfRange);
        assert_eq!(payload(r#"{"aud":["a",1]}"#), Status::AudNotString);
    }

    #[test]
    fn time_is_forgiving_by_the_skew() {
        let text = unsigned(r#"{"alg":"RS256"}"#, r#"{"nbf":100,"exp":200}"#);
        let token = Token::parse(&text).unwrap();
        for (now, want) in [
            (89, Err(Status::NotYetValid)),
            (90, Ok(())),
            (210, Ok(())),
            (211, Err(Status::Expired)),
        ] {
            assert_eq!(token.check_time(now, 10), want, "{now}");
        }
    }

    proptest! {
        #[test]
        fn no_token_breaks_the_parser(text in "[a-zA-Z0-9_.=-]{0,200}", bytes: Vec<u8>) {
            let _parsed = Token::parse(&text);
            let inner = encode(&bytes, false);
            let _parsed = Token::parse(&format!("{inner}.{inner}.{inner}"));
        }
    }
}
