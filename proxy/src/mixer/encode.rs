//! `CompressedAttributes` written straight from the attributes: no maps, no strings but those whose bytes
//! are not UTF-8.

use std::{
    borrow::Cow,
    collections::HashMap,
    time::{Duration, UNIX_EPOCH},
};

use lateen_engine::dictionary::global_index;

use super::attributes::{Attributes, Value};
use crate::proto::wire::{bytes, double, message, number, signed};

/// No word of the global dictionary is longer, so longer ones are not looked up.
const LONGEST_GLOBAL: usize = 64;
/// Up to so many words are found by looking at each.
const FEW: usize = 48;

/// Words of a message beyond the global dictionary, numbered in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Words<'a> {
    list: Vec<Cow<'a, str>>,
    /// Made when there are many: a client chooses how many there are.
    index: HashMap<Cow<'a, str>, i32>,
}

impl<'a> Words<'a> {
    fn index(&mut self, word: &'a [u8]) -> i32 {
        self.number(String::from_utf8_lossy(word))
    }

    /// The number of a word; adds it when it is not global.
    pub(super) fn number(&mut self, word: Cow<'a, str>) -> i32 {
        if word.len() <= LONGEST_GLOBAL
            && let Some(index) = global_index(&word)
        {
            return index;
        }
        // A message of 2^31 words does not fit in memory, so this never saturates.
        let nth = |position: usize| i32::try_from(position + 1).map_or(i32::MIN, |n| -n);
        if self.list.len() <= FEW {
            if let Some(position) = self.list.iter().position(|known| *known == word) {
                return nth(position);
            }
        } else {
            if self.index.is_empty() {
                let known = self.list.iter().cloned().enumerate();
                self.index = known.map(|(at, word)| (word, nth(at))).collect();
            }
            if let Some(number) = self.index.get(&word) {
                return *number;
            }
            self.index.insert(word.clone(), nth(self.list.len()));
        }
        self.list.push(word);
        nth(self.list.len() - 1)
    }

    /// Writes the words as a field of repeated strings.
    pub(super) fn write(&self, out: &mut Vec<u8>, field: u32) {
        for word in &self.list {
            message(out, field, |out| out.extend_from_slice(word.as_bytes()));
        }
    }
}

/// Writes the fields of `CompressedAttributes` but the words.
pub(super) fn attributes<'a>(all: &'a Attributes, words: &mut Words<'a>, out: &mut Vec<u8>) {
    for (key, value) in all.iter() {
        let name = key.number(words);
        match value {
            Value::Text(text) => {
                let text = words.index(text);
                entry(out, 2, name, |out| signed(out, 2, text));
            }
            Value::Int(n) => entry(out, 3, name, |out| number(out, 2, n.cast_unsigned())),
            Value::Double(n) => entry(out, 4, name, |out| double(out, 2, *n)),
            Value::Bool(b) => entry(out, 5, name, |out| number(out, 2, u64::from(*b))),
            Value::Time(time) => {
                let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
                entry(out, 6, name, |out| message(out, 2, |out| span(out, since)));
            }
            Value::Span(length) => {
                entry(out, 7, name, |out| {
                    message(out, 2, |out| span(out, *length))
                });
            }
            Value::Bytes(value) => entry(out, 8, name, |out| bytes(out, 2, value)),
            Value::Map(entries) => entry(out, 9, name, |out| {
                message(out, 2, |out| {
                    for (key, value) in entries.iter() {
                        let (key, value) = (words.index(key), words.index(value));
                        entry(out, 1, key, |out| signed(out, 2, value));
                    }
                });
            }),
        }
    }
}

/// An entry of a map whose keys are words.
fn entry(out: &mut Vec<u8>, field: u32, key: i32, value: impl FnOnce(&mut Vec<u8>)) {
    message(out, field, |out| {
        signed(out, 1, key);
        value(out);
    });
}

/// `Timestamp` or `Duration`.
fn span(out: &mut Vec<u8>, length: Duration) {
    number(out, 1, length.as_secs());
    number(out, 2, u64::from(length.subsec_nanos()));
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use bytes::Bytes;
    use lateen_engine::dictionary::GLOBAL_WORDS;
    use lateen_protocols::istio::mixer::v1::CompressedAttributes;
    use prost::Message as _;

    use super::{
        super::attributes::{KEYS, Key},
        *,
    };

    fn written(all: &Attributes) -> CompressedAttributes {
        let (mut words, mut out) = (Words::default(), Vec::new());
        attributes(all, &mut words, &mut out);
        words.write(&mut out, 1);
        CompressedAttributes::decode(out.as_slice()).unwrap()
    }

    /// The texts of a map, words resolved, sorted.
    fn map(message: &CompressedAttributes, key: Key) -> Vec<(String, String)> {
        let word = |index: i32| match usize::try_from(index) {
            Ok(global) => GLOBAL_WORDS[global].to_owned(),
            Err(_) => message.words[usize::try_from(-i64::from(index) - 1).unwrap()].clone(),
        };
        let name = key.number(&mut Words::default());
        let entries = &message.string_maps[&name].entries;
        let mut all: Vec<_> = entries.iter().map(|(k, v)| (word(*k), word(*v))).collect();
        all.sort();
        all
    }

    #[test]
    fn every_kind_of_value_is_read_back() {
        let mut all = Attributes::default();
        all.set(KEYS.request_path, "/a");
        all.set(KEYS.request_host, "/a");
        all.set(KEYS.response_code, -1_i64);
        all.set(KEYS.connection_mtls, true);
        all.set(KEYS.check_cache_hit, false);
        all.set(KEYS.source_ip, IpAddr::from([127, 0, 0, 1]));
        all.set(KEYS.request_time, UNIX_EPOCH + Duration::new(5, 6));
        all.set(KEYS.response_duration, Duration::new(7, 8));
        all.set(KEYS.response_size, Value::Double(1.5));
        all.set(Key::of("not.in.the.dictionary").unwrap(), "x");
        let message = written(&all);
        let at = |key: Key| key.number(&mut Words::default());
        assert_eq!(
            message.strings[&at(KEYS.request_path)],
            message.strings[&at(KEYS.request_host)]
        );
        assert_eq!(message.words, ["/a", "not.in.the.dictionary", "x"]);
        assert_eq!(message.strings[&-2], -3);
        assert_eq!(message.int64s, [(at(KEYS.response_code), -1)].into());
        let bools = [
            (at(KEYS.connection_mtls), true),
            (at(KEYS.check_cache_hit), false),
        ];
        assert_eq!(message.bools, bools.into());
        assert_eq!(message.bytes[&at(KEYS.source_ip)], [127, 0, 0, 1]);
        let time = &message.timestamps[&at(KEYS.request_time)];
        assert_eq!((time.seconds, time.nanos), (5, 6));
        let length = &message.durations[&at(KEYS.response_duration)];
        assert_eq!((length.seconds, length.nanos), (7, 8));
        assert_eq!(message.doubles[&at(KEYS.response_size)], 1.5);
    }

    #[test]
    fn every_global_word_is_looked_up() {
        let longest = GLOBAL_WORDS.iter().map(|word| word.len()).max();
        assert!(longest <= Some(LONGEST_GLOBAL));
    }

    #[test]
    fn maps_of_any_size_are_read_back() {
        for size in [0, 1, FEW / 2, FEW, 5 * FEW] {
            let text = |n: usize| (format!("name-{n}"), format!("value-{}", n % 7));
            let mut want: Vec<_> = (0..size).map(text).collect();
            let entries: Vec<_> = want
                .iter()
                .map(|(k, v)| (Bytes::from(k.clone()), Bytes::from(v.clone())))
                .collect();
            let mut all = Attributes::default();
            all.set(KEYS.request_headers, Value::Map(entries.into()));
            want.sort();
            let message = written(&all);
            assert_eq!(map(&message, KEYS.request_headers), want);
            assert_eq!(message.words.len(), size + size.min(7));
        }
    }
}
