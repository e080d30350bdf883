//! Immutable text that is cheap to clone: a word of the global dictionary, or a part of a shared buffer.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

/// Immutable text. All words of one request share one buffer, so a clone is a reference count and a
/// decoded request costs one allocation for all its strings. A `Text` that outlives its request by
/// far should be [compacted](Text::compact), else it keeps the whole buffer alive.
#[derive(Clone)]
pub struct Text(Repr);

#[derive(Clone)]
enum Repr {
    Static(&'static str),
    Part {
        buffer: Arc<str>,
        start: u32,
        end: u32,
    },
}

impl Text {
    /// The empty text.
    pub const EMPTY: Text = Text(Repr::Static(""));

    /// Text that lives as long as the program, such as a word of the global dictionary.
    pub const fn from_static(text: &'static str) -> Text {
        Text(Repr::Static(text))
    }

    /// The text itself.
    pub fn as_str(&self) -> &str {
        match &self.0 {
            Repr::Static(text) => text,
            // `part` is the only maker, and it has checked the range.
            Repr::Part { buffer, start, end } => buffer
                .get(*start as usize..*end as usize)
                .unwrap_or_default(),
        }
    }

    /// Bytes `start..end` of a shared buffer; `None` when that is no text.
    pub(crate) fn part(buffer: &Arc<str>, start: usize, end: usize) -> Option<Text> {
        buffer.get(start..end)?;
        Some(Text(Repr::Part {
            buffer: Arc::clone(buffer),
            start: u32::try_from(start).ok()?,
            end: u32::try_from(end).ok()?,
        }))
    }

    /// The same text in a buffer of its own: for what is kept longer than a request.
    #[must_use]
    pub fn compact(&self) -> Text {
        match &self.0 {
            Repr::Static(text) => Text::from_static(text),
            Repr::Part { .. } => Text::from(self.as_str()),
        }
    }

    /// A shared `str`; copies unless the text is a whole buffer already.
    pub fn to_arc(&self) -> Arc<str> {
        match &self.0 {
            Repr::Part {
                buffer,
                start: 0,
                end,
            } if *end as usize == buffer.len() => Arc::clone(buffer),
            _ => Arc::from(self.as_str()),
        }
    }
}

impl From<Arc<str>> for Text {
    /// Texts end at 4 GiB: nothing longer passes any limit of this crate.
    fn from(buffer: Arc<str>) -> Text {
        match u32::try_from(buffer.len()) {
            Ok(end) => Text(Repr::Part {
                buffer,
                start: 0,
                end,
            }),
            Err(_) => Text::EMPTY,
        }
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Text {
        if text.is_empty() {
            Text::EMPTY
        } else {
            Text::from(Arc::<str>::from(text))
        }
    }
}

impl From<String> for Text {
    fn from(text: String) -> Text {
        Text::from(text.as_str())
    }
}

impl Default for Text {
    fn default() -> Text {
        Text::EMPTY
    }
}

impl Deref for Text {
    type Target = str;
    fn deref(&self) -> &str {
        self.as_str()
    }
}

impl AsRef<str> for Text {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

impl Borrow<str> for Text {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl PartialEq for Text {
    fn eq(&self, other: &Text) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for Text {}

impl PartialEq<str> for Text {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == other
    }
}

impl PartialEq<&str> for Text {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}

impl PartialOrd for Text {
    fn partial_cmp(&self, other: &Text) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Text {
    fn cmp(&self, other: &Text) -> Ordering {
        self.as_str().cmp(other.as_str())
    }
}

impl Hash for Text {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
