//! Envoy's format strings (`%REQ(X-A?Y):10%`): parsed when configuration is loaded, written per request
//! straight into the buffer of whoever asks. Used by access logs, header operations and local replies.

mod command;
mod json;
mod time;
mod value;

use self::command::Command;
pub use self::{
    json::JsonFormat,
    time::iso_time,
    value::{grpc_status_of, headers_bytes, pem, request_bytes, response_bytes, url_encoded_pem},
};
use crate::{
    config_error::ConfigError,
    head::{Headers, Known, RequestHead, ResponseHead},
    info::StreamInfo,
    route::Selected,
};

/// What a format string may speak of: one stream, as far as it has come.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The stream.
    pub info: &'a StreamInfo,
    /// The request as it went upstream; `None` for TCP.
    pub request: Option<&'a RequestHead>,
    /// The response, once there is one.
    pub response: Option<&'a ResponseHead>,
    /// Response trailers.
    pub trailers: Option<&'a Headers>,
    /// The route.
    pub route: Option<&'a Selected>,
    /// Text of a local reply (`%LOCAL_REPLY_BODY%`) while it is made; empty in access logs, as in Envoy.
    pub local_reply: &'a str,
}

impl<'a> Facts<'a> {
    /// Facts of a stream of which only the connection is known (TCP).
    pub fn of_connection(info: &'a StreamInfo) -> Facts<'a> {
        Facts {
            info,
            request: None,
            response: None,
            trailers: None,
            route: None,
            local_reply: "",
        }
    }
}

/// A parsed text format.
#[derive(Debug)]
pub struct Format {
    parts: Vec<Part>,
    omit_empty: bool,
}

#[derive(Debug)]
enum Part {
    Text(String),
    Command(Command),
}

impl Format {
    /// Parses a format. Absent values print as `-`, or as nothing with `omit_empty`.
    ///
    /// # Errors
    /// When a command is not known or not well formed.
    pub fn text(format: &str, omit_empty: bool) -> Result<Format, ConfigError> {
        let mut parts = Vec::new();
        let mut text = String::new();
        let mut rest = format;
        while let Some(start) = rest.find('%') {
            text.push_str(&rest[..start]);
            rest = &rest[start + 1..];
            if let Some(after) = rest.strip_prefix('%') {
                text.push('%');
                rest = after;
                continue;
            }
            let (command, after) = Command::parse(rest)?;
            if !text.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut text)));
            }
            parts.push(Part::Command(command));
            rest = after;
        }
        text.push_str(rest);
        if !text.is_empty() {
            parts.push(Part::Text(text));
        }
        Ok(Format { parts, omit_empty })
    }

    /// The text, if no command is in it.
    pub fn literal(&self) -> Option<&str> {
        match self.parts.as_slice() {
            [] => Some(""),
            [Part::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// Writes the text for one stream.
    pub fn write(&self, facts: &Facts<'_>, out: &mut Vec<u8>) {
        for part in &self.parts {
            match part {
                Part::Text(text) => out.extend_from_slice(text.as_bytes()),
                Part::Command(command) => {
                    if !command.write(facts, out) && !self.omit_empty {
                        out.push(b'-');
                    }
                }
            }
        }
    }
}

/// The gRPC status that headers or trailers carry.
pub fn grpc_status(headers: &Headers) -> Option<i32> {
    std::str::from_utf8(headers.known(Known::GrpcStatus)?)
        .ok()?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
pub(crate) mod tests;
