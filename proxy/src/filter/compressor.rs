//! Compresses responses for clients that take it. Envoy: `envoy.filters.http.compressor`, with gzip.

use std::{
    collections::HashSet,
    io::Write as _,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use lateen_protocols::envoy::envoy::extensions::{
    compression::gzip::compressor::v3::{Gzip, gzip::CompressionLevel},
    filters::http::compressor::v3::{
        Compressor as FilterProto, CompressorPerRoute, compressor::CommonDirectionConfig,
        compressor_per_route::Override,
    },
};

use crate::{
    body::{Body, BodyError, Frame, Source},
    config_error::ConfigError,
    filter::{FilterContext, FilterState, RouteFilterConfig},
    head::{Headers, Known, Name, RequestHead, ResponseHead},
    proto::{invalid, unpack},
    route::matcher::{StringMatch, joined},
    stats::{Counter, Scope},
};

/// Envoy: `DefaultMinimumContentLength`.
const DEFAULT_LEAST: u32 = 30;
/// What is compressed when nothing is said of it. Envoy: `defaultContentEncoding`.
const DEFAULT_TYPES: [&str; 18] = [
    "text/html",
    "text/plain",
    "text/css",
    "application/javascript",
    "application/x-javascript",
    "text/javascript",
    "text/x-javascript",
    "text/ecmascript",
    "text/js",
    "text/jscript",
    "text/x-js",
    "application/ecmascript",
    "application/x-json",
    "application/xml",
    "application/json",
    "image/svg+xml",
    "text/xml",
    "application/xhtml+xml",
];

/// The filter of one connection manager.
#[derive(Debug)]
pub struct Compressor {
    level: Compression,
    enabled: bool,
    least: u64,
    types: HashSet<String>,
    type_patterns: Vec<StringMatch>,
    not_with_etag: bool,
    weakens_etag: bool,
    removes_accept: bool,
    not_for: Vec<u16>,
    stats: Stats,
}

#[derive(Debug)]
struct Stats {
    compressed: Counter,
    not_compressed: Counter,
    too_small: Counter,
    etag: Counter,
    total_uncompressed: Counter,
    total_compressed: Counter,
    no_accept: Counter,
    identity: Counter,
    used: Counter,
    wildcard: Counter,
    not_valid: Counter,
}

/// What a client's `accept-encoding` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    Absent,
    Gzip,
    Wildcard,
    Identity,
    Invalid,
}

impl Compressor {
    /// Compiles the filter; counts in `http.PREFIX.compressor.LIBRARY.gzip.`.
    ///
    /// # Errors
    /// When something is invalid, or not supported and would change what happens.
    pub fn compile(config: &FilterProto, scope: &Scope) -> Result<Compressor, ConfigError> {
        let library = config
            .compressor_library
            .as_ref()
            .ok_or_else(|| invalid("compressor_library", "absent"))?;
        let any = library
            .typed_config
            .as_ref()
            .ok_or_else(|| invalid("compressor_library.typed_config", "absent"))?;
        let Some(gzip) = unpack::<Gzip>(any)? else {
            return Err(invalid(any.type_url.clone(), "only gzip is supported"));
        };
        let direction = config.response_direction_config.as_ref();
        let unsupported = [
            (
                "request_direction_config",
                config
                    .request_direction_config
                    .as_ref()
                    .and_then(|request| request.common_config.as_ref())
                    .is_some_and(is_enabled),
            ),
            (
                "response_direction_config.status_header_enabled",
                direction.is_some_and(|direction| direction.status_header_enabled),
            ),
            ("choose_first", config.choose_first),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, given)| *given) {
            return Err(invalid(*field, "not supported"));
        }
        let common = direction.and_then(|direction| direction.common_config.as_ref());
        let old = old_fields(config);
        let (types, patterns) = common.map_or_else(Default::default, content_types);
        let types = if types.is_empty() { old.types } else { types };
        let by_default = types.is_empty() && patterns.is_empty();
        let level = CompressionLevel::try_from(gzip.compression_level)
            .map_err(|_| invalid("compression_level", "unknown"))?;
        let prefix = format!("compressor.{}.gzip.", library.name);
        let within = match direction {
            Some(_) => format!("{prefix}response."),
            None => prefix.clone(),
        };
        Ok(Compressor {
            level: match level {
                CompressionLevel::DefaultCompression => Compression::default(),
                // The others are numbered by what they are.
                level => Compression::new(u32::try_from(i32::from(level)).unwrap_or(6)),
            },
            enabled: common.is_none_or(is_enabled) && old.enabled,
            least: common
                .and_then(|common| common.min_content_length)
                .map_or(old.least, |least| least.value)
                .into(),
            types: match by_default {
                true => DEFAULT_TYPES
                    .iter()
                    .map(|name| (*name).to_owned())
                    .collect(),
                false => types.into_iter().collect(),
            },
            type_patterns: patterns
                .iter()
                .map(|pattern| StringMatch::compile("content_type_matcher", pattern))
                .collect::<Result<_, _>>()?,
            not_with_etag: direction.map_or(old.not_with_etag, |d| d.disable_on_etag_header),
            weakens_etag: direction.is_some_and(|d| d.weaken_etag_on_compress),
            removes_accept: direction
                .map_or(old.removes_accept, |d| d.remove_accept_encoding_header),
            not_for: direction.map_or_else(Vec::new, |d| {
                let codes = d.uncompressible_response_codes.iter();
                codes.filter_map(|code| u16::try_from(*code).ok()).collect()
            }),
            stats: Stats::new(scope, &prefix, &within),
        })
    }

    /// Compiles a route's configuration.
    ///
    /// # Errors
    /// When it says more than that the filter is off.
    pub fn compile_route(config: &CompressorPerRoute) -> Result<RouteFilterConfig, ConfigError> {
        match config.r#override.as_ref() {
            Some(Override::Disabled(true)) => Ok(RouteFilterConfig::Disabled),
            Some(Override::Disabled(false)) => Err(invalid("disabled", "may only be true")),
            Some(Override::Overrides(_)) => Err(invalid("overrides", "not supported")),
            None => Err(invalid("override", "absent")),
        }
    }

    pub(super) fn on_request(&self, cx: &mut FilterContext<'_>, head: &mut RequestHead) {
        let name = Name::new("accept-encoding");
        if let Some(accepted) = joined(&head.headers, &name) {
            cx.state.compressor = Some(choose(&accepted));
        }
        if self.enabled && self.removes_accept {
            head.headers.remove(&name);
        }
    }

    pub(super) fn on_response(
        &self,
        state: &FilterState,
        head: &mut ResponseHead,
        body: &mut Body,
    ) {
        let large = self.enabled && self.is_large_enough(&head.headers);
        let kind = self.takes_type(&head.headers);
        let can = large
            && kind
            && !self.not_for.contains(&head.status)
            && head.headers.known(Known::Upgrade).is_none()
            && !has_token(&head.headers, "cache-control", b"no-transform")
            && self.takes_etag(&head.headers)
            && head.headers.get(&Name::new("content-encoding")).is_none();
        if large && !body.is_end_stream() && self.wanted(state, kind) && can {
            self.stats.compressed.inc();
            let etag = Name::new("etag");
            if let Some(value) = head.headers.get(&etag).map(<[u8]>::to_vec)
                && !value.starts_with(b"W/")
            {
                match self.weakens_etag {
                    true => head.headers.set(etag, [b"W/".as_slice(), &value].concat()),
                    false => {
                        head.headers.remove(&etag);
                    }
                }
            }
            head.headers.remove_known(Known::ContentLength);
            head.headers.set(Name::new("content-encoding"), "gzip");
            *body = Body::stream(Compressed {
                body: std::mem::take(body),
                encoder: Some(GzEncoder::new(Vec::new(), self.level)),
                trailers: None,
                before: self.stats.total_uncompressed.clone(),
                after: self.stats.total_compressed.clone(),
            });
        } else {
            self.stats.not_compressed.inc();
        }
        if can {
            vary(&mut head.headers);
        }
    }

    /// Whether the client takes it.
    fn wanted(&self, state: &FilterState, kind: bool) -> bool {
        let choice = match state.compressor {
            None => Choice::Absent,
            // Of what may not be compressed there is nothing to choose.
            Some(Choice::Gzip | Choice::Wildcard) if !kind => Choice::Invalid,
            Some(choice) => choice,
        };
        match choice {
            Choice::Absent => self.stats.no_accept.inc(),
            Choice::Gzip => self.stats.used.inc(),
            Choice::Wildcard => self.stats.wildcard.inc(),
            Choice::Identity => self.stats.identity.inc(),
            Choice::Invalid => self.stats.not_valid.inc(),
        }
        matches!(choice, Choice::Gzip | Choice::Wildcard)
    }

    fn is_large_enough(&self, headers: &Headers) -> bool {
        let length = headers.known(Known::ContentLength);
        let length = length.and_then(|text| std::str::from_utf8(text).ok()?.parse::<u64>().ok());
        if length.is_some_and(|length| length < self.least) {
            self.stats.too_small.inc();
            return false;
        }
        true
    }

    fn takes_type(&self, headers: &Headers) -> bool {
        let Some(kind) = headers.known(Known::ContentType) else {
            return true;
        };
        let kind = kind.split(|b| *b == b';').next().unwrap_or_default();
        let Ok(kind) = std::str::from_utf8(kind.trim_ascii()) else {
            return false;
        };
        self.types.contains(kind)
            || self
                .type_patterns
                .iter()
                .any(|pattern| pattern.matches(kind.as_bytes()))
    }

    fn takes_etag(&self, headers: &Headers) -> bool {
        if self.not_with_etag && headers.get(&Name::new("etag")).is_some() {
            self.stats.etag.inc();
            return false;
        }
        true
    }
}

impl Stats {
    fn new(scope: &Scope, prefix: &str, within: &str) -> Stats {
        let counter = |prefix: &str, name: &str| scope.counter(&format!("{prefix}{name}"));
        Stats {
            compressed: counter(within, "compressed"),
            not_compressed: counter(within, "not_compressed"),
            too_small: counter(within, "content_length_too_small"),
            total_uncompressed: counter(within, "total_uncompressed_bytes"),
            total_compressed: counter(within, "total_compressed_bytes"),
            etag: counter(prefix, "not_compressed_etag"),
            no_accept: counter(prefix, "no_accept_header"),
            identity: counter(prefix, "header_identity"),
            used: counter(prefix, "header_compressor_used"),
            wildcard: counter(prefix, "header_wildcard"),
            not_valid: counter(prefix, "header_not_valid"),
        }
    }
}

/// The fields that stood at the top before there were directions.
struct Old {
    enabled: bool,
    least: u32,
    types: Vec<String>,
    not_with_etag: bool,
    removes_accept: bool,
}

#[allow(deprecated, reason = "configurations still have them")]
fn old_fields(config: &FilterProto) -> Old {
    Old {
        enabled: config
            .runtime_enabled
            .as_ref()
            .is_none_or(|flag| flag.default_value.is_none_or(|default| default.value)),
        least: config
            .content_length
            .map_or(DEFAULT_LEAST, |least| least.value),
        types: config.content_type.clone(),
        not_with_etag: config.disable_on_etag_header,
        removes_accept: config.remove_accept_encoding_header,
    }
}

#[allow(deprecated, reason = "configurations still have them")]
fn content_types(
    common: &CommonDirectionConfig,
) -> (
    Vec<String>,
    Vec<lateen_protocols::envoy::envoy::r#type::matcher::v3::StringMatcher>,
) {
    (
        common.content_type.clone(),
        common.content_type_matcher.clone(),
    )
}

fn is_enabled(common: &CommonDirectionConfig) -> bool {
    common
        .enabled
        .as_ref()
        .is_none_or(|flag| flag.default_value.is_none_or(|default| default.value))
}

/// The encoding with the highest quality, the first of equals. Envoy: `chooseEncoding`.
fn choose(accepted: &[u8]) -> Choice {
    let mut best = (Choice::Invalid, 0.0);
    let mut refused = false;
    for part in accepted.split(|b| *b == b',') {
        let mut fields = part.split(|b| *b == b';').map(<[u8]>::trim_ascii);
        let choice = match fields.next().unwrap_or_default() {
            b"gzip" => Choice::Gzip,
            b"*" => Choice::Wildcard,
            b"identity" => Choice::Identity,
            _ => continue,
        };
        let quality = fields.find_map(|field| field.strip_prefix(b"q="));
        let quality = match quality {
            None => 1.0,
            Some(text) => {
                let number = std::str::from_utf8(text).ok().and_then(|t| t.parse().ok());
                match number {
                    Some(number) => number,
                    None => continue,
                }
            }
        };
        refused |= choice == Choice::Gzip && quality == 0.0;
        if quality > best.1 {
            best = (choice, quality);
        }
    }
    match best.0 {
        // "Anything else" is not what was refused by name.
        Choice::Wildcard if refused => Choice::Invalid,
        choice => choice,
    }
}

pub(super) fn has_token(headers: &Headers, name: &str, token: &[u8]) -> bool {
    joined(headers, &Name::new(name)).is_some_and(|value| {
        let mut parts = value.split(|b| *b == b',');
        parts.any(|part| part.trim_ascii().eq_ignore_ascii_case(token))
    })
}

/// Tells caches that the answer depends on what the client accepts.
fn vary(headers: &mut Headers) {
    let name = Name::new("vary");
    if has_token(headers, "vary", b"accept-encoding") {
        return;
    }
    let value = match joined(headers, &name) {
        Some(present) if !present.is_empty() => {
            [&present[..], b", Accept-Encoding".as_slice()].concat()
        }
        _ => b"Accept-Encoding".to_vec(),
    };
    headers.set(name, value);
}

/// A body on its way through the encoder; each piece leaves as soon as it came.
struct Compressed {
    body: Body,
    encoder: Option<GzEncoder<Vec<u8>>>,
    trailers: Option<Headers>,
    before: Counter,
    after: Counter,
}

impl Compressed {
    fn encode(&mut self, data: &[u8]) -> Bytes {
        let Some(encoder) = &mut self.encoder else {
            return Bytes::new();
        };
        self.before.add(data.len() as u64);
        // Writing to memory cannot fail.
        let _written = encoder.write_all(data).and_then(|()| encoder.flush());
        let out = Bytes::from(std::mem::take(encoder.get_mut()));
        self.after.add(out.len() as u64);
        out
    }

    fn finish(&mut self) -> Bytes {
        let out = self.encoder.take().map(GzEncoder::finish);
        let out = Bytes::from(out.and_then(Result::ok).unwrap_or_default());
        self.after.add(out.len() as u64);
        out
    }
}

impl Source for Compressed {
    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        if self.encoder.is_none() {
            return Poll::Ready(self.trailers.take().map(|all| Ok(Frame::Trailers(all))));
        }
        loop {
            match ready!(self.body.poll_frame(cx)) {
                Some(Ok(Frame::Data(data))) => {
                    let out = self.encode(&data);
                    if !out.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::Data(out))));
                    }
                }
                Some(Err(error)) => {
                    self.encoder = None;
                    return Poll::Ready(Some(Err(error)));
                }
                end => {
                    if let Some(Ok(Frame::Trailers(trailers))) = end {
                        self.trailers = Some(trailers);
                    }
                    return Poll::Ready(Some(Ok(Frame::Data(self.finish()))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.encoder.is_none() && self.trailers.is_none()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use flate2::read::GzDecoder;

    use super::*;

    #[test]
    fn the_client_has_its_choice() {
        for (accepted, want) in [
            ("gzip", Choice::Gzip),
            ("deflate, gzip;q=0.5", Choice::Gzip),
            ("gzip;q=0", Choice::Invalid),
            ("br", Choice::Invalid),
            ("gzip;q=0, *", Choice::Invalid),
            ("br, *;q=0.5", Choice::Wildcard),
            ("identity, gzip;q=0.5", Choice::Identity),
            ("gzip, identity", Choice::Gzip),
            ("gzip;q=x", Choice::Invalid),
        ] {
            assert_eq!(choose(accepted.as_bytes()), want, "{accepted}");
        }
    }

    #[tokio::test]
    async fn a_body_comes_out_as_it_went_in_with_its_trailers() {
        let scope = crate::stats::Registry::new().scope("t.");
        let mut trailers = Headers::default();
        trailers.append(Name::new("x-t"), "1");
        let mut pieces = vec![
            Frame::Trailers(trailers),
            Frame::Data(Bytes::from_static(b"world")),
            Frame::Data(Bytes::from(vec![b'x'; 10_000])),
        ];
        let mut body = Body::stream(Compressed {
            body: crate::filter::gather::testing::pieces(move || pieces.pop()),
            encoder: Some(GzEncoder::new(Vec::new(), Compression::default())),
            trailers: None,
            before: scope.counter("before"),
            after: scope.counter("after"),
        });
        let mut data = Vec::new();
        let mut ended = None;
        while let Some(frame) = body.frame().await {
            match frame.unwrap() {
                Frame::Data(piece) => data.extend_from_slice(&piece),
                Frame::Trailers(trailers) => ended = Some(trailers),
            }
        }
        assert!(ended.is_some() && data.len() < 200, "{}", data.len());
        let mut plain = Vec::new();
        GzDecoder::new(&data[..]).read_to_end(&mut plain).unwrap();
        assert_eq!(plain, [vec![b'x'; 10_000], b"world".to_vec()].concat());
        assert_eq!(scope.counter("before").value(), 10_005);
        assert_eq!(scope.counter("after").value(), data.len() as u64);
    }
}
