//! Decompresses what clients and upstreams send. Envoy: `envoy.filters.http.decompressor`, with gzip.

use std::{
    io::{self, Write},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use flate2::write::GzDecoder;
use lateen_protocols::envoy::envoy::extensions::{
    compression::gzip::decompressor::v3::Gzip,
    filters::http::decompressor::v3::{
        Decompressor as FilterProto, decompressor::CommonDirectionConfig,
    },
};

use crate::{
    body::{Body, BodyError, Frame, Source},
    config_error::ConfigError,
    filter::compressor::has_token,
    head::{Headers, Known, Name, RequestHead, ResponseHead},
    layers::{Flag, RuntimeLayers},
    proto::{invalid, unpack},
    route::matcher::joined,
    stats::{Counter, Scope},
};

/// Output of the library at a time, in bytes. Envoy: `DefaultChunkSize` of gzip's decompressor.
const DEFAULT_CHUNK: u32 = 4096;
/// Bytes that one byte may become. Envoy: `DefaultMaxInflateRatio`.
const DEFAULT_RATIO: u32 = 100;

/// The filter of one connection manager.
#[derive(Debug)]
pub struct Decompressor {
    advertises: bool,
    request: Direction,
    response: Direction,
    limits: Limits,
    /// Names of the trailers that tell how many bytes there were, before and after.
    tell: [Name; 2],
    /// `zlib_data_error`: bodies that are not what they claim to be, or become too large.
    failed: Counter,
}

/// Requests, or responses.
#[derive(Debug)]
struct Direction {
    enabled: Flag,
    ignores_no_transform: bool,
    decompressed: Counter,
    not_decompressed: Counter,
    compressed_bytes: Counter,
    uncompressed_bytes: Counter,
}

/// How much may come of a piece of a body.
#[derive(Clone, Copy, Debug)]
struct Limits {
    chunk: usize,
    ratio: usize,
}

impl Decompressor {
    /// Compiles the filter; counts in `http.PREFIX.decompressor.LIBRARY.gzip.`.
    ///
    /// # Errors
    /// When something is invalid, or the library is not gzip's.
    pub fn compile(
        config: &FilterProto,
        scope: &Scope,
        layers: &RuntimeLayers,
    ) -> Result<Decompressor, ConfigError> {
        let library = config
            .decompressor_library
            .as_ref()
            .ok_or_else(|| invalid("decompressor_library", "absent"))?;
        let any = library
            .typed_config
            .as_ref()
            .ok_or_else(|| invalid("decompressor_library.typed_config", "absent"))?;
        let Some(gzip) = unpack::<Gzip>(any)? else {
            return Err(invalid(any.type_url.clone(), "only gzip is supported"));
        };
        let scope = scope.scope(&format!("decompressor.{}.gzip.", library.name));
        let request = config.request_direction_config.as_ref();
        let response = config.response_direction_config.as_ref();
        // All of zlib's that Envoy shows; of ours only one can happen.
        for name in [
            "errno",
            "stream_error",
            "mem_error",
            "buf_error",
            "version_error",
        ] {
            scope.counter(&format!("decompressor_library.zlib_{name}"));
        }
        let tell = |which: &str| {
            let name = format!("x-envoy-decompressor-{}-{which}-bytes", library.name);
            Name::new(name.to_ascii_lowercase())
        };
        Ok(Decompressor {
            advertises: request
                .and_then(|request| request.advertise_accept_encoding)
                .is_none_or(|advertise| advertise.value),
            request: Direction::new(
                request.and_then(|request| request.common_config.as_ref()),
                &scope.scope("request."),
                layers,
            ),
            response: Direction::new(
                response.and_then(|response| response.common_config.as_ref()),
                &scope.scope("response."),
                layers,
            ),
            limits: Limits::compile(&gzip)?,
            tell: [tell("compressed"), tell("uncompressed")],
            failed: scope.counter("decompressor_library.zlib_data_error"),
        })
    }

    pub(super) fn on_request(&self, head: &mut RequestHead, body: &mut Body) {
        if self.advertises {
            advertise(&mut head.headers);
        }
        self.pass(&self.request, &mut head.headers, body);
    }

    pub(super) fn on_response(&self, head: &mut ResponseHead, body: &mut Body) {
        self.pass(&self.response, &mut head.headers, body);
    }

    fn pass(&self, direction: &Direction, headers: &mut Headers, body: &mut Body) {
        if body.is_end_stream() {
            return;
        }
        let may = direction.enabled.is_on()
            && (direction.ignores_no_transform
                || !has_token(headers, "cache-control", b"no-transform"));
        if !may || !take_coding(headers) {
            direction.not_decompressed.inc();
            return;
        }
        direction.decompressed.inc();
        headers.remove_known(Known::ContentLength);
        *body = Body::stream(Decompressed {
            body: std::mem::take(body),
            decoder: Decoder::new(self.limits),
            ended: false,
            trailers: None,
            before: 0,
            after: 0,
            tell: self.tell.clone(),
            compressed: direction.compressed_bytes.clone(),
            uncompressed: direction.uncompressed_bytes.clone(),
            failed: self.failed.clone(),
        });
    }
}

impl Direction {
    fn new(
        config: Option<&CommonDirectionConfig>,
        scope: &Scope,
        layers: &RuntimeLayers,
    ) -> Direction {
        Direction {
            enabled: layers.flag(config.and_then(|config| config.enabled.as_ref()), true),
            ignores_no_transform: config.is_some_and(|config| config.ignore_no_transform_header),
            decompressed: scope.counter("decompressed"),
            not_decompressed: scope.counter("not_decompressed"),
            compressed_bytes: scope.counter("total_compressed_bytes"),
            uncompressed_bytes: scope.counter("total_uncompressed_bytes"),
        }
    }
}

impl Limits {
    /// Any window is read, whatever `window_bits` allow.
    fn compile(gzip: &Gzip) -> Result<Limits, ConfigError> {
        let within = |field: &str, value: Option<u32>, default: u32, least: u32, most: u32| {
            let value = value.unwrap_or(default);
            if !(least..=most).contains(&value) {
                return Err(invalid(field, format!("is not between {least} and {most}")));
            }
            Ok(value as usize)
        };
        within("window_bits", gzip.window_bits.map(|v| v.value), 15, 9, 15)?;
        Ok(Limits {
            chunk: within(
                "chunk_size",
                gzip.chunk_size.map(|v| v.value),
                DEFAULT_CHUNK,
                4096,
                65_536,
            )?,
            ratio: within(
                "max_inflate_ratio",
                gzip.max_inflate_ratio.map(|v| v.value),
                DEFAULT_RATIO,
                1,
                1032,
            )?,
        })
    }

    /// The most that `length` bytes may become. Envoy looks at the ratio when a chunk is full.
    fn of(self, length: usize) -> usize {
        (length.saturating_mul(self.ratio) / self.chunk + 1).saturating_mul(self.chunk)
    }
}

/// Adds `gzip` to what the upstream may send.
fn advertise(headers: &mut Headers) {
    let name = Name::new("accept-encoding");
    let mut value = Vec::new();
    let present = joined(headers, &name).unwrap_or_default();
    for coding in present.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
        let kind = coding
            .split(|byte| *byte == b';')
            .next()
            .unwrap_or_default();
        // Envoy goes by the letter here.
        if !coding.is_empty() && kind.trim_ascii() != b"gzip" {
            value.extend_from_slice(coding);
            value.push(b',');
        }
    }
    value.extend_from_slice(b"gzip");
    headers.set(name, value);
}

/// Takes `gzip` from the front of `content-encoding`, if it stands there.
fn take_coding(headers: &mut Headers) -> bool {
    let name = Name::new("content-encoding");
    let Some(value) = joined(headers, &name) else {
        return false;
    };
    let (first, rest) = match value.iter().position(|byte| *byte == b',') {
        Some(comma) => (&value[..comma], Some(value[comma + 1..].trim_ascii())),
        None => (&value[..], None),
    };
    if !first.trim_ascii().eq_ignore_ascii_case(b"gzip") {
        return false;
    }
    match rest.map(<[u8]>::to_vec) {
        Some(rest) => headers.set(name, rest),
        None => {
            headers.remove(&name);
        }
    }
    true
}

/// The decoder of one body. What comes after its stream, or after a failure, is dropped, as in Envoy.
struct Decoder {
    decoder: GzDecoder<Bounded>,
    limits: Limits,
    broken: bool,
}

/// Takes so many bytes and no more.
struct Bounded {
    data: Vec<u8>,
    most: usize,
}

impl Write for Bounded {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let taken = data.len().min(self.most - self.data.len());
        self.data.extend_from_slice(&data[..taken]);
        // Reaching the limit is too much already.
        if self.data.len() == self.most && taken < data.len() || taken == 0 && !data.is_empty() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Decoder {
    fn new(limits: Limits) -> Decoder {
        Decoder {
            decoder: GzDecoder::new(Bounded {
                data: Vec::new(),
                most: 0,
            }),
            limits,
            broken: false,
        }
    }

    /// What a piece becomes, and whether it is in order.
    fn decode(&mut self, mut piece: &[u8]) -> (Vec<u8>, bool) {
        if self.broken {
            return (Vec::new(), piece.is_empty());
        }
        self.decoder.get_mut().most = self.limits.of(piece.len());
        let result = loop {
            match self.decoder.write(piece) {
                // The stream has ended.
                Ok(0) => break self.decoder.flush(),
                Ok(taken) => piece = &piece[taken..],
                Err(error) => break Err(error),
            }
        };
        let out = self.decoder.get_mut();
        let whole = result.is_ok() && out.data.len() < out.most;
        self.broken = !whole;
        (std::mem::take(&mut out.data), whole)
    }
}

/// A body on its way through the decoder; each piece leaves as soon as it came. In the end trailers tell how
/// many bytes there were.
struct Decompressed {
    body: Body,
    decoder: Decoder,
    ended: bool,
    trailers: Option<Headers>,
    before: u64,
    after: u64,
    tell: [Name; 2],
    compressed: Counter,
    uncompressed: Counter,
    failed: Counter,
}

impl Decompressed {
    fn decode(&mut self, piece: &[u8]) -> Bytes {
        let (out, whole) = self.decoder.decode(piece);
        if !whole {
            self.failed.inc();
        }
        let (before, after) = (piece.len() as u64, out.len() as u64);
        self.compressed.add(before);
        self.uncompressed.add(after);
        self.before += before;
        self.after += after;
        out.into()
    }
}

impl Source for Decompressed {
    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        loop {
            if self.ended {
                return Poll::Ready(self.trailers.take().map(|all| Ok(Frame::Trailers(all))));
            }
            match ready!(self.body.poll_frame(cx)) {
                Some(Ok(Frame::Data(data))) => {
                    let out = self.decode(&data);
                    if !out.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::Data(out))));
                    }
                }
                Some(Err(error)) => {
                    self.ended = true;
                    return Poll::Ready(Some(Err(error)));
                }
                end => {
                    let mut trailers = match end {
                        Some(Ok(Frame::Trailers(trailers))) => trailers,
                        _ => Headers::default(),
                    };
                    let [before, after] = self.tell.clone();
                    trailers.set(before, self.before.to_string());
                    trailers.set(after, self.after.to_string());
                    self.trailers = Some(trailers);
                    self.ended = true;
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended && self.trailers.is_none()
    }
}

#[cfg(test)]
mod tests {
    use flate2::{Compression, write::GzEncoder};

    use super::*;

    const LIMITS: Limits = Limits {
        chunk: 4096,
        ratio: 100,
    };

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    /// Everything that pieces of `size` become, and the number of failures.
    fn decode(data: &[u8], size: usize) -> (Vec<u8>, usize) {
        let mut decoder = Decoder::new(LIMITS);
        let mut all = Vec::new();
        let mut failed = 0;
        for piece in data.chunks(size) {
            let (out, whole) = decoder.decode(piece);
            all.extend(out);
            failed += usize::from(!whole);
        }
        (all, failed)
    }

    #[test]
    fn a_body_comes_out_however_it_is_cut() {
        // Not so regular that a piece becomes more than it may.
        let mut seed = 1_u32;
        let plain: Vec<u8> = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            b'a' + (seed >> 29) as u8
        })
        .take(20_000)
        .collect();
        let packed = gzip(&plain);
        for size in [1, 7, 100, packed.len()] {
            let (all, failed) = decode(&packed, size);
            assert!(all == plain && failed == 0, "pieces of {size}");
        }
    }

    #[test]
    fn what_is_not_gzip_or_ends_early_or_goes_on_gives_what_there_is() {
        let packed = gzip(b"hello");
        assert_eq!(decode(b"not gzip at all", 100), (Vec::new(), 1));
        assert_eq!(decode(b"not gzip at all", 11), (Vec::new(), 2));
        assert_eq!(
            decode(&packed[..packed.len() - 8], 100),
            (b"hello".to_vec(), 0)
        );
        let twice = [&packed[..], b"garbage"].concat();
        assert_eq!(decode(&twice, 100), (b"hello".to_vec(), 0));
        assert_eq!(decode(&twice, 3), (b"hello".to_vec(), 0));
    }

    #[test]
    fn a_bomb_goes_off_in_a_bounded_space() {
        let packed = gzip(&vec![b'x'; 2_000_000]);
        let (all, failed) = decode(&packed, packed.len());
        assert_eq!((all.len(), failed), (LIMITS.of(packed.len()), 1));
        assert!(all.len() <= packed.len() * 100 + 4096);
        let (all, failed) = decode(&packed, 500);
        assert!(failed > 1 && all.len() <= 500 * 100 + 4096, "{}", all.len());
        // Small ones may be small multiples.
        assert_eq!(decode(&gzip(&[b'x'; 3000]), 1000), (vec![b'x'; 3000], 0));
    }

    #[test]
    fn upstreams_are_told_that_gzip_is_welcome() {
        for (present, want) in [
            (None, "gzip"),
            (Some("br, deflate;q=0.5"), "br,deflate;q=0.5,gzip"),
            (Some("gzip, br"), "br,gzip"),
        ] {
            let mut headers = Headers::default();
            if let Some(present) = present {
                headers.append(Name::new("accept-encoding"), present);
            }
            advertise(&mut headers);
            let now = headers.get(&Name::new("accept-encoding"));
            assert_eq!(now, Some(want.as_bytes()), "{present:?}");
        }
    }

    #[test]
    fn only_the_outermost_coding_is_taken() {
        for (value, takes, left) in [
            ("gzip", true, None),
            ("GZIP", true, None),
            ("gzip, br", true, Some("br")),
            ("br, gzip", false, Some("br, gzip")),
            ("x-gzip", false, Some("x-gzip")),
        ] {
            let mut headers = Headers::default();
            headers.append(Name::new("content-encoding"), value);
            assert_eq!(take_coding(&mut headers), takes, "{value}");
            let now = headers.get(&Name::new("content-encoding"));
            assert_eq!(now, left.map(str::as_bytes), "{value}");
        }
        assert!(!take_coding(&mut Headers::default()));
    }
}
