//! Words as numbers: the global dictionary both ends know, and the words a message brings along.
//!
//! An index of 0 and above is a word of the global dictionary, an index below 0 is the message's word
//! at position `-index-1`.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, LazyLock};

pub use lateen_protocols::dictionary::{BASE_WORDS, GLOBAL_WORDS};

use crate::text::Text;

/// The hash of tables that are made of what operators wrote, or of nothing but constants: whoever sends requests can
/// look words up, but not add any, so it need not resist floods.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WordHasher(u64);

/// Such a table.
pub(crate) type WordMap<K, V> = HashMap<K, V, BuildHasherDefault<WordHasher>>;

impl Default for WordHasher {
    fn default() -> WordHasher {
        WordHasher(0xcbf2_9ce4_8422_2325) // FNV-1a offset basis
    }
}

impl Hasher for WordHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word.iter_mut()
                .zip(chunk)
                .for_each(|(to, from)| *to = *from);
            self.0 = (self.0 ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.0 ^= self.0 >> 29;
        }
    }
}

static BY_WORD: LazyLock<WordMap<&'static str, i32>> = LazyLock::new(|| {
    let mut table = WordMap::default();
    for (index, word) in (0..).zip(GLOBAL_WORDS) {
        table.entry(*word).or_insert(index);
    }
    table
});

/// The index of a word in the global dictionary.
pub fn global_index(word: &str) -> Option<i32> {
    BY_WORD.get(word).copied()
}

/// The word at an index of the global dictionary.
pub fn global_word(index: i32) -> Option<&'static str> {
    GLOBAL_WORDS.get(usize::try_from(index).ok()?).copied()
}

/// Gives words numbers while a message is written.
#[derive(Debug, Default)]
pub struct WordList {
    global_words: i32,
    words: Vec<String>,
    /// Of the words, once there are many.
    index: HashMap<String, i32>,
}

/// So many words are compared one by one before there is an index: it is quicker.
const FEW_WORDS: usize = 16;

impl WordList {
    /// For a reader that knows the first `global_words` words of the global dictionary.
    pub fn new(global_words: usize) -> WordList {
        let global_words = i32::try_from(global_words.min(GLOBAL_WORDS.len())).unwrap_or(0);
        WordList {
            global_words,
            ..WordList::default()
        }
    }

    /// The index of a word; adds it to the message when it is not global.
    pub fn index(&mut self, word: &str) -> i32 {
        if let Some(index) = global_index(word).filter(|index| *index < self.global_words) {
            return index;
        }
        // A message of 2^31 words does not fit in memory, so this never saturates.
        let number = |position: usize| i32::try_from(position + 1).map_or(i32::MIN, |n| -n);
        if self.words.len() <= FEW_WORDS {
            if let Some(position) = self.words.iter().position(|known| known == word) {
                return number(position);
            }
        } else if let Some(index) = self.index.get(word) {
            return *index;
        }
        let index = number(self.words.len());
        self.words.push(word.to_owned());
        if self.words.len() > FEW_WORDS {
            let first = self.index.len();
            let more = (first..).zip(self.words.get(first..).unwrap_or_default());
            self.index
                .extend(more.map(|(position, word)| (word.clone(), number(position))));
        }
        index
    }

    /// The message's words.
    pub fn into_words(self) -> Vec<String> {
        self.words
    }
}

/// The words of a message that is read, all in one buffer.
#[derive(Clone, Debug)]
pub(crate) struct MessageWords {
    buffer: Arc<str>,
    ends: Vec<usize>,
}

/// The words of a message as they are found.
#[derive(Debug, Default)]
pub(crate) struct MessageWordsBuilder {
    buffer: String,
    ends: Vec<usize>,
}

impl MessageWordsBuilder {
    pub(crate) fn push(&mut self, word: &str) {
        if self.ends.is_empty() {
            // What a request's words take.
            self.buffer.reserve(1024);
            self.ends.reserve(32);
        }
        self.buffer.push_str(word);
        self.ends.push(self.buffer.len());
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Bytes of all of them.
    pub(crate) fn bytes(&self) -> usize {
        self.buffer.len()
    }

    pub(crate) fn build(self) -> MessageWords {
        MessageWords {
            buffer: self.buffer.into(),
            ends: self.ends,
        }
    }
}

impl MessageWords {
    pub(crate) fn new(words: &[String]) -> MessageWords {
        let mut all = MessageWordsBuilder {
            buffer: String::with_capacity(words.iter().map(String::len).sum()),
            ends: Vec::with_capacity(words.len()),
        };
        for word in words {
            all.push(word);
        }
        all.build()
    }

    /// The word at an index; `None` when neither dictionary has it.
    pub(crate) fn get(&self, index: i32) -> Option<Text> {
        if index >= 0 {
            return global_word(index).map(Text::from_static);
        }
        let position = usize::try_from(-(i64::from(index) + 1)).ok()?;
        let end = *self.ends.get(position)?;
        let start = match position.checked_sub(1) {
            Some(before) => *self.ends.get(before)?,
            None => 0,
        };
        Text::part(&self.buffer, start, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_global_word_is_found() {
        for (index, word) in (0..).zip(GLOBAL_WORDS) {
            assert_eq!(global_index(word), Some(index), "{word}");
            assert_eq!(global_word(index), Some(*word));
        }
        assert_eq!(global_index("no such word"), None);
        assert_eq!(global_word(-1), None);
    }

    #[test]
    fn words_past_the_agreed_count_travel_with_the_message() {
        let mut list = WordList::new(1);
        assert_eq!(list.index("source.ip"), 0);
        assert_eq!(list.index("source.name"), -1);
        assert_eq!(list.index("ours"), -2);
        assert_eq!(list.index("source.name"), -1);
        assert_eq!(list.into_words(), ["source.name", "ours"]);
    }

    #[test]
    fn message_words_are_counted_from_minus_one() {
        let words = MessageWords::new(&["a".into(), String::new(), "bc".into()]);
        let all: Vec<_> = (-4..=0).map(|i| words.get(i)).collect();
        let text = |t: &str| Some(Text::from(t));
        assert_eq!(
            all,
            [None, text("bc"), text(""), text("a"), text("source.ip")]
        );
        assert_eq!(words.get(i32::MIN), None);
    }
}
