//! The static table and the dynamic one of RFC 7541 §2.3.

use std::collections::VecDeque;

use super::Name;
use crate::{head::Known, swar};

/// What RFC 7541 §4.1 counts for an entry beside its bytes.
pub(super) const OVERHEAD: usize = 32;

/// The largest dynamic table we keep, whatever was configured: offsets in it are small numbers.
pub(super) const LARGEST: usize = u16::MAX as usize;

/// One header of the static table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Static {
    pub(super) name: Name,
    pub(super) text: &'static str,
    pub(super) value: &'static str,
}

const fn entry(name: Name, text: &'static str, value: &'static str) -> Static {
    Static { name, text, value }
}

const fn other(text: &'static str) -> Static {
    entry(Name::Other, text, "")
}

const fn known(known: Known) -> Static {
    entry(Name::Known(known), known.as_str(), "")
}

/// RFC 7541 Appendix A; index 1 is the first.
pub(super) static STATIC: [Static; 61] = [
    entry(Name::Authority, ":authority", ""),
    entry(Name::Method, ":method", "GET"),
    entry(Name::Method, ":method", "POST"),
    entry(Name::Path, ":path", "/"),
    entry(Name::Path, ":path", "/index.html"),
    entry(Name::Scheme, ":scheme", "http"),
    entry(Name::Scheme, ":scheme", "https"),
    entry(Name::Status, ":status", "200"),
    entry(Name::Status, ":status", "204"),
    entry(Name::Status, ":status", "206"),
    entry(Name::Status, ":status", "304"),
    entry(Name::Status, ":status", "400"),
    entry(Name::Status, ":status", "404"),
    entry(Name::Status, ":status", "500"),
    other("accept-charset"),
    entry(
        Name::Known(Known::AcceptEncoding),
        "accept-encoding",
        "gzip, deflate",
    ),
    other("accept-language"),
    other("accept-ranges"),
    known(Known::Accept),
    other("access-control-allow-origin"),
    other("age"),
    other("allow"),
    known(Known::Authorization),
    other("cache-control"),
    other("content-disposition"),
    other("content-encoding"),
    other("content-language"),
    known(Known::ContentLength),
    other("content-location"),
    other("content-range"),
    known(Known::ContentType),
    known(Known::Cookie),
    known(Known::Date),
    other("etag"),
    known(Known::Expect),
    other("expires"),
    other("from"),
    known(Known::Host),
    other("if-match"),
    other("if-modified-since"),
    other("if-none-match"),
    other("if-range"),
    other("if-unmodified-since"),
    other("last-modified"),
    other("link"),
    known(Known::Location),
    other("max-forwards"),
    other("proxy-authenticate"),
    other("proxy-authorization"),
    other("range"),
    known(Known::Referer),
    other("refresh"),
    other("retry-after"),
    known(Known::Server),
    known(Known::SetCookie),
    other("strict-transport-security"),
    known(Known::TransferEncoding),
    known(Known::UserAgent),
    other("vary"),
    known(Known::Via),
    other("www-authenticate"),
];

/// A header of a table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row<'a> {
    pub(super) name: Name,
    pub(super) text: &'a [u8],
    pub(super) value: &'a [u8],
    /// What the decoder found out about it when it came.
    pub(super) valid: bool,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Where the text starts, counted from the first byte ever.
    at: u32,
    name_len: u16,
    value_len: u16,
    name: Name,
    /// `Name::number`; [`NO_NUMBER`] of a name that has none.
    number: u8,
    valid: bool,
}

const NO_NUMBER: u8 = u8::MAX;

impl Entry {
    fn size(&self) -> usize {
        usize::from(self.name_len) + usize::from(self.value_len) + OVERHEAD
    }
}

/// A dynamic table: one text, oldest entry first, and where its entries are. Holds no memory until an
/// entry comes.
#[derive(Debug)]
pub(super) struct Dynamic {
    text: Vec<u8>,
    /// The number of the first byte of `text`.
    base: u32,
    entries: VecDeque<Entry>,
    size: usize,
    max: usize,
}

impl Dynamic {
    pub(super) fn new(max: usize) -> Dynamic {
        Dynamic {
            text: Vec::new(),
            base: 0,
            entries: VecDeque::new(),
            size: 0,
            max: max.min(LARGEST),
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn max(&self) -> usize {
        self.max
    }

    #[cfg(test)]
    pub(super) fn size(&self) -> usize {
        self.size
    }

    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.text.capacity() + self.entries.capacity() * size_of::<Entry>()
    }

    /// Changes the largest size; what no longer fits goes.
    pub(super) fn set_max(&mut self, max: usize) {
        self.max = max.min(LARGEST);
        self.evict(0);
        if self.max == 0 {
            *self = Dynamic::new(0);
        }
    }

    /// The entry that was added as the `index`th last, from 0.
    #[inline]
    pub(super) fn get(&self, index: usize) -> Option<Row<'_>> {
        let entry = self
            .entries
            .get(self.entries.len().checked_sub(index + 1)?)?;
        let at = entry.at.wrapping_sub(self.base) as usize;
        let name_len = usize::from(entry.name_len);
        let all = self
            .text
            .get(at..at + name_len + usize::from(entry.value_len))?;
        let (text, value) = all.split_at_checked(name_len)?;
        Some(Row {
            name: entry.name,
            text,
            value,
            valid: entry.valid,
        })
    }

    /// Whether the entry that was added as the `index`th last has the name of this number, and this value.
    #[inline]
    pub(super) fn holds(&self, index: usize, number: u8, value: &[u8]) -> bool {
        let Some(entry) = self
            .entries
            .len()
            .checked_sub(index + 1)
            .and_then(|index| self.entries.get(index))
        else {
            return false;
        };
        let at = entry.at.wrapping_sub(self.base) as usize + usize::from(entry.name_len);
        entry.number == number
            && usize::from(entry.value_len) == value.len()
            && self
                .text
                .get(at..at + value.len())
                .is_some_and(|text| swar::same(text, value))
    }

    /// Whether the entry that was added as the `index`th last has the name of this number.
    #[inline]
    pub(super) fn has_name(&self, index: usize, number: u8) -> bool {
        self.entries
            .len()
            .checked_sub(index + 1)
            .and_then(|index| self.entries.get(index))
            .is_some_and(|entry| entry.number == number)
    }

    /// Adds an entry, after those it pushes out. One that is larger than the table empties it. Whether it
    /// is in.
    pub(super) fn insert(&mut self, name: Name, text: &[u8], value: &[u8], valid: bool) -> bool {
        let size = text.len() + value.len() + OVERHEAD;
        self.evict(size);
        if size > self.max {
            return false;
        }
        // `size <= max <= LARGEST`, so the lengths fit.
        let (Ok(name_len), Ok(value_len)) = (u16::try_from(text.len()), u16::try_from(value.len()))
        else {
            return false;
        };
        let more = text.len() + value.len();
        self.make_room(more);
        let at = self.base.wrapping_add(self.text.len() as u32);
        self.text.extend_from_slice(text);
        self.text.extend_from_slice(value);
        self.entries.push_back(Entry {
            at,
            name_len,
            value_len,
            name,
            number: name.number().unwrap_or(NO_NUMBER),
            valid,
        });
        self.size += size;
        true
    }

    /// Lets the oldest entries go until `more` fits.
    fn evict(&mut self, more: usize) {
        while self.size + more > self.max {
            let Some(oldest) = self.entries.pop_front() else {
                return;
            };
            self.size -= oldest.size();
        }
    }

    /// Moves what lives to the front when the text would outgrow the table otherwise.
    fn make_room(&mut self, more: usize) {
        if self.text.len() + more <= self.text.capacity() {
            return;
        }
        let dead = match self.entries.front() {
            Some(oldest) => oldest.at.wrapping_sub(self.base) as usize,
            None => self.text.len(),
        };
        // Less than half dead: growing is cheaper in the long run, and still bounded by twice the table.
        if dead > 0 && dead * 2 >= self.text.len() {
            self.text.drain(..dead);
            self.base = self.base.wrapping_add(dead as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_static_name_is_what_its_text_spells() {
        for row in &STATIC {
            assert_eq!(Name::of(row.text.as_bytes()), row.name, "{}", row.text);
        }
    }

    #[test]
    fn old_entries_make_room_and_the_text_stays_bounded() {
        let mut table = Dynamic::new(200);
        for number in 0..10_000u32 {
            let value = number.to_string();
            assert!(table.insert(Name::Other, b"x-number", value.as_bytes(), true));
            assert!(table.size() <= 200);
            let newest = table.get(0).unwrap();
            assert_eq!(
                (newest.text, newest.value),
                (&b"x-number"[..], value.as_bytes())
            );
        }
        assert_eq!(table.len(), 4);
        assert_eq!(table.get(3).unwrap().value, b"9996");
        assert!(table.get(4).is_none());
        assert!(table.text.capacity() <= 512, "{}", table.text.capacity());
        assert!(!table.insert(Name::Other, &[b'x'; 200], b"", true));
        assert_eq!((table.len(), table.size()), (0, 0));
    }
}
