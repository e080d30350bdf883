//! The outcome of a check in the words of `google.rpc`.

use std::fmt;

/// `google.rpc.Code`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "google.rpc.Code documents them")]
#[repr(i32)]
pub enum Code {
    Ok = 0,
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

const CODES: &[(Code, &str)] = &[
    (Code::Ok, "OK"),
    (Code::Cancelled, "CANCELLED"),
    (Code::Unknown, "UNKNOWN"),
    (Code::InvalidArgument, "INVALID_ARGUMENT"),
    (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
    (Code::NotFound, "NOT_FOUND"),
    (Code::AlreadyExists, "ALREADY_EXISTS"),
    (Code::PermissionDenied, "PERMISSION_DENIED"),
    (Code::ResourceExhausted, "RESOURCE_EXHAUSTED"),
    (Code::FailedPrecondition, "FAILED_PRECONDITION"),
    (Code::Aborted, "ABORTED"),
    (Code::OutOfRange, "OUT_OF_RANGE"),
    (Code::Unimplemented, "UNIMPLEMENTED"),
    (Code::Internal, "INTERNAL"),
    (Code::Unavailable, "UNAVAILABLE"),
    (Code::DataLoss, "DATA_LOSS"),
    (Code::Unauthenticated, "UNAUTHENTICATED"),
];

impl Code {
    /// The code with this number.
    pub fn from_number(number: i64) -> Option<Self> {
        CODES
            .iter()
            .map(|(code, _)| *code)
            .find(|code| i64::from(*code as i32) == number)
    }

    /// The code with this name, `PERMISSION_DENIED`.
    pub fn from_name(name: &str) -> Option<Self> {
        CODES
            .iter()
            .find(|(_, n)| *n == name)
            .map(|(code, _)| *code)
    }

    /// Its name, `PERMISSION_DENIED`.
    pub fn name(self) -> &'static str {
        CODES
            .iter()
            .find(|(code, _)| *code == self)
            .map_or("UNKNOWN", |(_, name)| name)
    }

    /// The HTTP status that a proxy answers with, as Istio's client maps it.
    pub fn http_status(self) -> u16 {
        match self {
            Self::Ok => 200,
            Self::Cancelled => 499,
            Self::InvalidArgument | Self::FailedPrecondition | Self::OutOfRange => 400,
            Self::DeadlineExceeded => 504,
            Self::NotFound => 404,
            Self::AlreadyExists | Self::Aborted => 409,
            Self::PermissionDenied => 403,
            Self::Unauthenticated => 401,
            Self::ResourceExhausted => 429,
            Self::Unimplemented => 501,
            Self::Unavailable => 503,
            Self::Unknown | Self::Internal | Self::DataLoss => 500,
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// [`Code::Ok`]: go on.
    pub code: Code,
    /// For the caller; empty when there is nothing to say.
    pub message: String,
    /// What the proxy answers instead of the code's usual HTTP status.
    pub direct_response: Option<DirectResponse>,
}

impl Status {
    /// Go on.
    pub fn ok() -> Self {
        Self {
            code: Code::Ok,
            message: String::new(),
            direct_response: None,
        }
    }

    /// Stop, because.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            direct_response: None,
        }
    }

    /// Whether the request may go on.
    pub fn is_ok(&self) -> bool {
        self.code == Code::Ok
    }
}

/// An HTTP response that the proxy gives in the service's stead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectResponse {
    /// HTTP status code.
    pub code: u32,
    /// Body.
    pub body: String,
    /// Headers to set.
    pub headers: Vec<(String, String)>,
}
