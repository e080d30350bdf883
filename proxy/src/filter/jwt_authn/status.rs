//! How an authentication ended. Envoy: `jwt_verify_lib`'s `Status`; the texts are what clients and logs see.

/// The outcome of one requirement, or of all together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Missing,
    NotYetValid,
    Expired,
    BadFormat,
    HeaderBase64,
    HeaderJson,
    HeaderAlg,
    AlgNotSupported,
    HeaderKid,
    PayloadBase64,
    PayloadJson,
    IssNotString,
    SubNotString,
    IatNotInteger,
    IatOutOfRange,
    NbfNotInteger,
    NbfOutOfRange,
    ExpNotInteger,
    ExpOutOfRange,
    JtiNotString,
    AudNotString,
    SignatureBase64,
    UnknownIssuer,
    AudienceNotAllowed,
    SubjectNotAllowed,
    NoExpiration,
    LivesTooLong,
    VerificationFails,
    NoKey,
    FetchFails,
}

impl Status {
    /// What the client is told.
    pub(super) fn text(self) -> &'static str {
        match self {
            Status::Missing => "Jwt is missing",
            Status::NotYetValid => "Jwt not yet valid",
            Status::Expired => "Jwt is expired",
            Status::BadFormat => {
                "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"
            }
            Status::HeaderBase64 => "Jwt header is an invalid Base64url encoded",
            Status::HeaderJson => "Jwt header is an invalid JSON",
            Status::HeaderAlg => "Jwt header [alg] field is required and must be a string",
            Status::AlgNotSupported => "Jwt header [alg] is not supported",
            Status::HeaderKid => "Jwt header [kid] field is not a string",
            Status::PayloadBase64 => "Jwt payload is an invalid Base64url encoded",
            Status::PayloadJson => "Jwt payload is an invalid JSON",
            Status::IssNotString => "Jwt payload [iss] field is not a string",
            Status::SubNotString => "Jwt payload [sub] field is not a string",
            Status::IatNotInteger => "Jwt payload [iat] field is not an integer",
            Status::IatOutOfRange => "Jwt payload [iat] field is not a positive 64 bit integer",
            Status::NbfNotInteger => "Jwt payload [nbf] field is not an integer",
            Status::NbfOutOfRange => "Jwt payload [nbf] field is not a positive 64 bit integer",
            Status::ExpNotInteger => "Jwt payload [exp] field is not an integer",
            Status::ExpOutOfRange => "Jwt payload [exp] field is not a positive 64 bit integer",
            Status::JtiNotString => "Jwt payload [jti] field is not a string",
            Status::AudNotString => "Jwt payload [aud] field is not a string or string list",
            Status::SignatureBase64 => "Jwt signature is an invalid Base64url encoded",
            Status::UnknownIssuer => "Jwt issuer is not configured",
            Status::AudienceNotAllowed => "Audiences in Jwt are not allowed",
            Status::SubjectNotAllowed => "Subject in Jwt is not allowed",
            Status::NoExpiration => "Jwt has no expiration",
            Status::LivesTooLong => "Jwt lifetime is longer than allowed",
            Status::VerificationFails => "Jwt verification fails",
            Status::NoKey => "Jwks doesn't have key to match kid or alg from Jwt",
            Status::FetchFails => "Jwks remote fetch is failed",
        }
    }

    /// The status of the answer.
    pub(super) fn http(self) -> u16 {
        match self {
            Status::AudienceNotAllowed => 403,
            _ => 401,
        }
    }
}
