//! From the wire to headers. RFC 7541 §3, §5, §6.

use super::{
    Name, huffman,
    table::{Dynamic, LARGEST, Row, STATIC},
};

/// One decoded header.
#[derive(Clone, Copy, Debug)]
pub struct Field<'a> {
    /// What the name is.
    pub name: Name,
    /// The name's text.
    pub text: &'a [u8],
    /// The value.
    pub value: &'a [u8],
    /// What the check given to [`Decoder::decode`] said.
    pub valid: bool,
}

impl Field<'_> {
    /// What the header counts in a header list (RFC 9113 §6.5.2 without the overhead, as Envoy counts).
    #[inline]
    pub fn bytes(&self) -> usize {
        self.text.len() + self.value.len()
    }
}

/// What takes decoded headers, one after the other: a message in the making, or a closure.
pub trait Fields {
    /// Takes one.
    fn add(&mut self, field: Field<'_>);
}

impl<F: FnMut(Field<'_>)> Fields for F {
    fn add(&mut self, field: Field<'_>) {
        self(field);
    }
}

/// The block of headers is malformed: a COMPRESSION_ERROR of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// An integer that does not fit.
    #[error("an integer is too large")]
    Integer,
    /// No such entry in the tables.
    #[error("no header has this index")]
    Index,
    /// Bad Huffman code.
    #[error("a string is not Huffman-coded")]
    Huffman,
    /// A string is longer than any head may be.
    #[error("a string is too long")]
    TooLong,
    /// A change of the table's size that is too large, in the wrong place or missing.
    #[error("a change of the table size is wrong")]
    TableSize,
    /// The block ends within a header.
    #[error("the block ends within a header")]
    Truncated,
}

/// Longest coded string that is taken, bytes; nghttp2 has the same.
const LONGEST_STRING: usize = 64 << 10;

/// The receiving side of a connection's header compression.
#[derive(Debug)]
pub struct Decoder {
    table: Dynamic,
    /// What the peer may use now.
    allowed: usize,
    /// What our settings offer.
    offered: usize,
    /// Whether the peer must say a smaller size before anything else.
    must_shrink: bool,
    /// Whether a change of size may still come in this block, as long as no header did.
    resizable: bool,
}

impl Decoder {
    /// A decoder whose table is at most `max` bytes (65535 at most).
    pub fn new(max: usize) -> Decoder {
        let allowed = max.min(LARGEST);
        Decoder {
            // Until the peer has seen our settings it uses the default.
            table: Dynamic::new(4096),
            allowed: allowed.max(4096),
            offered: allowed,
            must_shrink: false,
            resizable: true,
        }
    }

    /// The largest table that our settings offer, bytes.
    pub fn table_size(&self) -> u32 {
        self.offered as u32
    }

    /// The peer has acknowledged our settings.
    pub fn settings_acknowledged(&mut self) {
        self.allowed = self.offered;
        self.must_shrink = self.table.max() > self.allowed;
    }

    #[cfg(test)]
    pub(crate) fn memory(&self) -> usize {
        self.table.memory()
    }

    /// A new block begins.
    pub fn begin(&mut self) {
        self.resizable = true;
    }

    /// Decodes a block or a fragment of one and gives `fields` its headers. `check` judges a name and value
    /// once; entries of the table remember the verdict. Returns how many bytes were used: fewer than given only
    /// when a fragment ends within a header; the rest belongs before the next fragment.
    ///
    /// # Errors
    /// When the connection's compression state is lost.
    pub fn decode(
        &mut self,
        block: &[u8],
        check: fn(Name, &[u8], &[u8]) -> bool,
        fields: &mut impl Fields,
    ) -> Result<usize, DecodeError> {
        let mut plain = Vec::new(); // Huffman-coded strings, decoded
        let mut used = 0;
        while let Some(&first) = block.get(used) {
            let rest = &block[used..];
            if first & 0x80 != 0 {
                let (index, len) = if first < 0xff {
                    (usize::from(first & 0x7f), 1)
                } else if let Some(integer) = integer(rest, 7)? {
                    integer
                } else {
                    break;
                };
                self.began()?;
                let row = row(&self.table, index)?;
                fields.add(Field {
                    name: row.name,
                    text: row.text,
                    value: row.value,
                    valid: row.valid,
                });
                used += len;
            } else if first & 0xe0 == 0x20 {
                let Some((size, len)) = integer(rest, 5)? else {
                    break;
                };
                // RFC 7541 §4.2: only before the first header of a block.
                if !self.resizable || size > self.allowed {
                    return Err(DecodeError::TableSize);
                }
                self.table.set_max(size);
                self.must_shrink = false;
                used += len;
            } else {
                let indexed = first & 0x40 != 0;
                let Some(len) = self.literal(rest, indexed, &mut plain, check, fields)? else {
                    break;
                };
                used += len;
            }
        }
        Ok(used)
    }

    /// A header begins: no change of size may follow, and none may be missing.
    fn began(&mut self) -> Result<(), DecodeError> {
        if self.must_shrink {
            return Err(DecodeError::TableSize);
        }
        self.resizable = false;
        Ok(())
    }

    /// A literal header; `None` when it is not all there. What takes it is called, so that it can be a part of the
    /// loop over indexed headers, which most are.
    fn literal(
        &mut self,
        rest: &[u8],
        indexed: bool,
        plain: &mut Vec<u8>,
        check: fn(Name, &[u8], &[u8]) -> bool,
        fields: &mut dyn Fields,
    ) -> Result<Option<usize>, DecodeError> {
        let prefix = if indexed { 6 } else { 4 };
        let Some((index, mut used)) = integer(rest, prefix)? else {
            return Ok(None);
        };
        let mut name_coded = None;
        if index == 0 {
            let Some((text, len)) = string(&rest[used..])? else {
                return Ok(None);
            };
            name_coded = Some(text);
            used += len;
        }
        let Some((value_coded, len)) = string(&rest[used..])? else {
            return Ok(None);
        };
        used += len;
        self.began()?;

        plain.clear();
        if let Some(coded) = name_coded
            && coded.huffman
        {
            huffman::decode(coded.bytes, plain).map_err(|_| DecodeError::Huffman)?;
        }
        let middle = plain.len();
        if value_coded.huffman {
            huffman::decode(value_coded.bytes, plain).map_err(|_| DecodeError::Huffman)?;
        }
        let (plain_name, plain_value) = plain.split_at(middle);
        let value = if value_coded.huffman {
            plain_value
        } else {
            value_coded.bytes
        };
        let (name, text) = match name_coded {
            Some(coded) => {
                let text = if coded.huffman {
                    plain_name
                } else {
                    coded.bytes
                };
                (Name::of(text), text)
            }
            None => {
                let row = row(&self.table, index)?;
                (row.name, row.text)
            }
        };
        let valid = check(name, text, value);
        fields.add(Field {
            name,
            text,
            value,
            valid,
        });
        if indexed {
            if name_coded.is_some() || index <= STATIC.len() {
                let text = match (name_coded, STATIC.get(index.wrapping_sub(1))) {
                    (None, Some(row)) => row.text.as_bytes(),
                    (Some(coded), _) if !coded.huffman => coded.bytes,
                    _ => plain_name,
                };
                self.table.insert(name, text, value, valid);
            } else {
                // The name may be in an entry that makes room for this one.
                let text = text.to_vec();
                self.table.insert(name, &text, value, valid);
            }
        }
        Ok(Some(used))
    }
}

#[inline]
fn row(table: &Dynamic, index: usize) -> Result<Row<'_>, DecodeError> {
    let place = index.checked_sub(1).ok_or(DecodeError::Index)?;
    match STATIC.get(place) {
        Some(row) => Ok(Row {
            name: row.name,
            text: row.text.as_bytes(),
            value: row.value.as_bytes(),
            valid: true,
        }),
        None => table.get(place - STATIC.len()).ok_or(DecodeError::Index),
    }
}

/// An integer with a prefix of `bits` (§5.1) and how long it was; `None` when it is cut. Up to 2^28: nothing
/// that we accept is larger.
fn integer(bytes: &[u8], bits: u32) -> Result<Option<(usize, usize)>, DecodeError> {
    let Some((first, rest)) = bytes.split_first() else {
        return Ok(None);
    };
    let mask = (1usize << bits) - 1;
    let mut value = usize::from(*first) & mask;
    if value < mask {
        return Ok(Some((value, 1)));
    }
    let mut at = 0;
    loop {
        if at == 4 {
            return Err(DecodeError::Integer);
        }
        let Some(byte) = rest.get(at) else {
            return Ok(None);
        };
        value += usize::from(byte & 0x7f) << (7 * at);
        at += 1;
        if byte & 0x80 == 0 {
            return Ok(Some((value, at + 1)));
        }
    }
}

#[derive(Clone, Copy)]
struct Coded<'a> {
    huffman: bool,
    bytes: &'a [u8],
}

/// A string (§5.2) and how long it was with its length; `None` when it is cut.
fn string(bytes: &[u8]) -> Result<Option<(Coded<'_>, usize)>, DecodeError> {
    let Some((len, prefix)) = integer(bytes, 7)? else {
        return Ok(None);
    };
    if len > LONGEST_STRING {
        return Err(DecodeError::TooLong);
    }
    let Some(text) = bytes.get(prefix..prefix + len) else {
        return Ok(None);
    };
    let coded = Coded {
        huffman: bytes[0] & 0x80 != 0,
        bytes: text,
    };
    Ok(Some((coded, prefix + len)))
}
