//! Bodies out of bytes.

use bytes::{Buf as _, Bytes, BytesMut};

use crate::{
    h1::{Framing, Limits, ParseError, lenient},
    head::{Headers, Known},
};

/// Pieces up to so many bytes are copied out of the read buffer, which then stays the connection's own
/// and is filled again in place; sharing it would cost an allocation too, and a new buffer for the next read.
const COPIED: usize = 2 * 1024;
/// Small chunks are put together up to so many bytes: a body of tiny ones costs no piece each.
const GATHERED: usize = 16 * 1024;

/// A part of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Bytes of the body, never none.
    Data(Bytes),
    /// The body is complete; its trailers if it has any and they are wanted.
    End(Option<Headers>),
}

/// Takes the body of one message out of a read buffer, however its bytes arrive.
#[derive(Clone, Debug)]
pub struct BodyDecoder {
    state: State,
    head_bytes: usize,
    headers: usize,
    enable_trailers: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// So many bytes of the body are left, never 0.
    Length(u64),
    UntilClose,
    /// In the size of a chunk; `any` once there was a digit.
    Size {
        size: u64,
        any: bool,
    },
    /// In the extensions of a chunk, which are passed over.
    Extension {
        size: u64,
    },
    /// After the CR that ends the line of a size.
    SizeEnd {
        size: u64,
    },
    /// So many bytes of the chunk are left, never 0.
    Chunk(u64),
    /// After the bytes of a chunk.
    ChunkEnd,
    /// After the CR behind the bytes of a chunk.
    ChunkLf,
    /// After the last chunk; so many bytes were searched for the end of the trailers.
    Trailers {
        seen: usize,
    },
    End,
    Failed(ParseError),
}

impl BodyDecoder {
    /// A decoder for one body.
    pub fn new(framing: Framing, limits: &Limits) -> BodyDecoder {
        BodyDecoder {
            state: match framing {
                Framing::None | Framing::Length(0) => State::End,
                Framing::Length(length) => State::Length(length),
                Framing::Chunked => State::Size {
                    size: 0,
                    any: false,
                },
                Framing::UntilClose => State::UntilClose,
            },
            head_bytes: limits.head_bytes,
            headers: limits.headers,
            enable_trailers: limits.enable_trailers,
        }
    }

    /// The next part of the body from the front of `input`; `None` when more bytes are needed. After the end
    /// it gives `End(None)` again and leaves `input`, which then begins with the next message.
    ///
    /// # Errors
    /// When the bytes are no chunked body; nothing that follows can be trusted.
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Piece>, ParseError> {
        match self.state {
            State::Length(_) | State::UntilClose => {
                let available = self.available(input);
                if available == 0 {
                    return Ok(None);
                }
                self.advance(available as u64);
                Ok(Some(Piece::Data(take(input, available))))
            }
            State::End => Ok(Some(Piece::End(None))),
            State::Failed(error) => Err(error),
            State::Size { .. }
            | State::Extension { .. }
            | State::SizeEnd { .. }
            | State::Chunk(_)
            | State::ChunkEnd
            | State::ChunkLf
            | State::Trailers { .. } => self.chunks(input),
        }
    }

    /// The peer closed its side: the end of a body until close.
    ///
    /// # Errors
    /// [`ParseError::Truncated`] when the body is not complete.
    pub fn close(&mut self) -> Result<(), ParseError> {
        match self.state {
            State::UntilClose | State::End => {
                self.state = State::End;
                Ok(())
            }
            State::Failed(error) => Err(error),
            State::Length(_)
            | State::Size { .. }
            | State::Extension { .. }
            | State::SizeEnd { .. }
            | State::Chunk(_)
            | State::ChunkEnd
            | State::ChunkLf
            | State::Trailers { .. } => Err(ParseError::Truncated),
        }
    }

    /// Whether nothing is left to decode. True at once for no body, and right after the last byte of a
    /// body with a length. A chunked body that ends without trailers may tell so with its last data.
    pub fn is_end(&self) -> bool {
        self.state == State::End
    }

    /// Bytes left of a body with a length; 0 at the end of any.
    pub fn remaining(&self) -> Option<u64> {
        match self.state {
            State::End => Some(0),
            State::Length(left) => Some(left),
            _ => None,
        }
    }

    /// Bytes that can be moved past the decoder now (splice) and told with [`advance`](Self::advance):
    /// the rest of the body or of the chunk, `u64::MAX` until close.
    pub fn spliceable(&self) -> u64 {
        match self.state {
            State::Length(left) | State::Chunk(left) => left,
            State::UntilClose => u64::MAX,
            _ => 0,
        }
    }

    /// Counts `n` bytes of body that were moved past the decoder, at most [`spliceable`](Self::spliceable).
    pub fn advance(&mut self, n: u64) {
        debug_assert!(n <= self.spliceable(), "more bytes than the body has");
        self.state = match self.state {
            State::Length(left) if left > n => State::Length(left - n),
            State::Length(_) => State::End,
            State::Chunk(left) if left > n => State::Chunk(left - n),
            State::Chunk(_) => State::ChunkEnd,
            other => other,
        };
    }

    /// Bytes of `input` that are of the body, as far as is known now.
    fn available(&self, input: &BytesMut) -> usize {
        let left = usize::try_from(self.spliceable()).unwrap_or(usize::MAX);
        left.min(input.len())
    }

    fn chunks(&mut self, input: &mut BytesMut) -> Result<Option<Piece>, ParseError> {
        let mut small = Vec::new();
        loop {
            if let State::Chunk(_) = self.state {
                let available = self.available(input);
                if available == 0 {
                    return Ok(gathered(small));
                }
                if available > COPIED || small.len() + available > GATHERED {
                    if !small.is_empty() {
                        return Ok(gathered(small));
                    }
                    self.advance(available as u64);
                    return Ok(Some(Piece::Data(take(input, available))));
                }
                small.extend_from_slice(input.get(..available).unwrap_or_default());
                input.advance(available);
                self.advance(available as u64);
                continue;
            }
            let step = if let State::Trailers { seen } = self.state {
                match (small.is_empty(), input.first()) {
                    // Data goes before trailers; an end without any goes with the data.
                    (false, Some(b'\r' | b'\n')) => self.trailers(input, seen).map(|_| false),
                    (false, _) => return Ok(gathered(small)),
                    (true, _) => match self.trailers(input, seen) {
                        Ok(piece) => return Ok(piece),
                        Err(error) => Err(error),
                    },
                }
            } else {
                self.lines(input)
            };
            match step {
                Ok(true) => {}
                Ok(false) => return Ok(gathered(small)),
                Err(error) => {
                    self.state = State::Failed(error);
                    // What came before the error is the same however the bytes arrive.
                    return match gathered(small) {
                        Some(piece) => Ok(Some(piece)),
                        None => Err(error),
                    };
                }
            }
        }
    }

    /// Reads what is between the bytes of chunks; whether there is something to go on with.
    fn lines(&mut self, input: &mut BytesMut) -> Result<bool, ParseError> {
        let mut used = 0;
        for byte in &**input {
            used += 1;
            self.state = match (self.state, *byte) {
                (State::Size { size, .. }, digit) if digit.is_ascii_hexdigit() => {
                    if size >> 60 != 0 {
                        return Err(ParseError::Codec);
                    }
                    let digit = match digit {
                        b'0'..=b'9' => digit - b'0',
                        _ => (digit | 0x20) - b'a' + 10,
                    };
                    State::Size {
                        size: size << 4 | u64::from(digit),
                        any: true,
                    }
                }
                (State::Size { size, any: true }, b'\r') => State::SizeEnd { size },
                (State::Size { size, any: true }, b';' | b' ' | b'\t') => State::Extension { size },
                (State::Extension { size }, b'\r') => State::SizeEnd { size },
                // A reader that ends lines with LF alone would find a chunk here that others do not.
                (State::Extension { .. }, b'\n') => return Err(ParseError::Codec),
                (extension @ State::Extension { .. }, _) => extension,
                (State::SizeEnd { size: 0 }, b'\n') => State::Trailers { seen: 0 },
                (State::SizeEnd { size }, b'\n') => State::Chunk(size),
                (State::ChunkEnd, b'\r') => State::ChunkLf,
                (State::ChunkEnd | State::ChunkLf, b'\n') => State::Size {
                    size: 0,
                    any: false,
                },
                _ => return Err(ParseError::Codec),
            };
            if matches!(self.state, State::Chunk(_) | State::Trailers { .. }) {
                input.advance(used);
                return Ok(true);
            }
        }
        input.advance(used);
        Ok(false)
    }

    /// Reads the trailers once they are complete; they stay in `input` until then.
    fn trailers(&mut self, input: &mut BytesMut, seen: usize) -> Result<Option<Piece>, ParseError> {
        let used = match &**input {
            [b'\r', b'\n', ..] => 2,
            [b'\n', ..] => 1,
            text => {
                // Whether an empty line has begun before `seen` shows in the two bytes before.
                let Some(end) = lenient::end(text, seen.saturating_sub(2)) else {
                    if text.len() > self.head_bytes {
                        return Err(ParseError::HeadersTooLarge);
                    }
                    self.state = State::Trailers { seen: text.len() };
                    return Ok(None);
                };
                if end > self.head_bytes {
                    return Err(ParseError::HeadersTooLarge);
                }
                let trailers = self.read_trailers(text.get(..end).unwrap_or_default())?;
                input.advance(end);
                self.state = State::End;
                return Ok(Some(Piece::End(trailers)));
            }
        };
        input.advance(used);
        self.state = State::End;
        Ok(Some(Piece::End(None)))
    }

    fn read_trailers(&self, lines: &[u8]) -> Result<Option<Headers>, ParseError> {
        let mut text = Vec::with_capacity(lines.len());
        lenient::fields(lines, &mut text).ok_or(ParseError::Codec)?;
        let mut fields = vec![httparse::EMPTY_HEADER; self.headers];
        let fields = match httparse::parse_headers(&text, &mut fields) {
            Ok(httparse::Status::Complete((_, fields))) => fields,
            Err(httparse::Error::TooManyHeaders) => return Err(ParseError::TooManyHeaders),
            Err(httparse::Error::HeaderValue) => return Err(ParseError::InvalidCharacters),
            Ok(httparse::Status::Partial) | Err(_) => return Err(ParseError::Codec),
        };
        if !self.enable_trailers {
            return Ok(None);
        }
        let mut trailers = Headers::with_room(text.len(), fields.len());
        for field in fields {
            trailers.append_wire(field.name.as_bytes(), field.value, is_trailer);
        }
        Ok((!trailers.is_empty()).then_some(trailers))
    }
}

/// Whether a name may be among trailers: nothing that decides on framing or the hop. RFC 9110 §6.5.1.
fn is_trailer(known: Option<Known>) -> bool {
    !matches!(
        known,
        Some(
            Known::Connection
                | Known::ContentLength
                | Known::Host
                | Known::KeepAlive
                | Known::ProxyConnection
                | Known::Te
                | Known::Trailer
                | Known::TransferEncoding
                | Known::Upgrade
        )
    )
}

fn take(input: &mut BytesMut, n: usize) -> Bytes {
    if n <= COPIED {
        let piece = Bytes::copy_from_slice(input.get(..n).unwrap_or_default());
        input.advance(n);
        piece
    } else {
        input.split_to(n).freeze()
    }
}

fn gathered(small: Vec<u8>) -> Option<Piece> {
    (!small.is_empty()).then(|| Piece::Data(Bytes::from(small)))
}
