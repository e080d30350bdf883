//! The streams of a connection: a slab, and a table from their numbers to their places.

use std::collections::VecDeque;

use bytes::Bytes;

use super::StreamId;
use crate::head::Headers;

/// Places kept when no stream is open.
const KEPT: usize = 4;

/// One stream that is not closed.
#[derive(Debug, Default)]
pub(super) struct Stream {
    /// Its number; 0 of a free place.
    pub(super) id: u32,
    /// When it was opened, milliseconds.
    pub(super) opened_ms: u32,
    /// Bytes that we may send. May be negative. RFC 9113 §6.9.2.
    pub(super) send_window: i64,
    /// Bytes that the peer may send.
    pub(super) receive_window: u32,
    /// Bytes that came and did not go on yet.
    pub(super) unconsumed: u32,
    /// Bytes that went on and that the peer was not told of.
    pub(super) credit: u32,
    /// The peer sent its (final) head.
    pub(super) head_received: bool,
    /// The peer sent its last.
    pub(super) remote_closed: bool,
    /// We sent our (final) head.
    pub(super) head_sent: bool,
    /// The last of ours was given to us.
    pub(super) ending: bool,
    /// The last of ours is in the output.
    pub(super) local_closed: bool,
    /// What comes has no body: the answer to HEAD.
    pub(super) bodiless: bool,
    /// An extended CONNECT.
    pub(super) upgrade: bool,
    /// Once all was sent, the peer is told to stop sending.
    pub(super) stop: bool,
    /// In the queue of those that have data to frame.
    pub(super) ready: bool,
    /// Was told that there is no room.
    pub(super) wanting: bool,
    /// Bytes of the body to come by `content-length`.
    pub(super) content_left: Option<u64>,
    /// Bytes in `waiting.data`.
    pub(super) queued: usize,
    /// What could not be framed yet.
    pub(super) waiting: Option<Box<Waiting>>,
    /// What an extended CONNECT asked for (client).
    pub(super) protocol: Option<Box<[u8]>>,
}

/// What of a stream waits for windows.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    pub(super) data: VecDeque<Bytes>,
    pub(super) trailers: Option<Headers>,
}

/// What counts of a stream that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Removed {
    pub(super) id: u32,
    /// Bytes that came and did not go on.
    pub(super) unconsumed: u32,
    /// Bytes that waited.
    pub(super) queued: usize,
}

#[derive(Debug, Default)]
pub(super) struct Streams {
    places: Vec<Stream>,
    free: Vec<u32>,
    /// Places plus one, by hash of their numbers, open addressing; a power of two.
    table: Vec<u32>,
    len: usize,
}

impl Streams {
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// A stream by number.
    #[inline]
    pub(super) fn find(&self, id: u32) -> Option<u32> {
        let mask = self.table.len().checked_sub(1)?;
        let mut at = hash(id, mask);
        loop {
            let slot = self.table[at].checked_sub(1)?;
            if self.places[slot as usize].id == id {
                return Some(slot);
            }
            at = (at + 1) & mask;
        }
    }

    /// The stream, unless it is closed.
    #[inline]
    pub(super) fn get(&mut self, stream: StreamId) -> Option<&mut Stream> {
        self.places
            .get_mut(stream.slot as usize)
            .filter(|found| found.id == stream.id)
    }

    /// The stream at a place; of a free one `id` is 0.
    #[inline]
    pub(super) fn at(&mut self, slot: u32) -> &mut Stream {
        &mut self.places[slot as usize]
    }

    /// The stream at a place, if one is there.
    #[inline]
    pub(super) fn open_at(&mut self, slot: u32) -> Option<&mut Stream> {
        self.places
            .get_mut(slot as usize)
            .filter(|found| found.id != 0)
    }

    /// All that are open.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut Stream)> {
        (0u32..)
            .zip(&mut self.places)
            .filter(|(_, stream)| stream.id != 0)
    }

    pub(super) fn insert(&mut self, stream: Stream) -> StreamId {
        let id = stream.id;
        if (self.len + 1) * 2 > self.table.len() {
            self.grow();
        }
        let slot = match self.free.pop() {
            Some(slot) => {
                self.places[slot as usize] = stream;
                slot
            }
            None => {
                self.places.push(stream);
                self.places.len() as u32 - 1
            }
        };
        self.len += 1;
        self.link(id, slot);
        StreamId { id, slot }
    }

    /// Frees the place of a stream.
    pub(super) fn remove(&mut self, slot: u32) -> Removed {
        let stream = &self.places[slot as usize];
        let removed = Removed {
            id: stream.id,
            unconsumed: stream.unconsumed,
            queued: stream.queued,
        };
        self.unlink(removed.id, slot);
        self.places[slot as usize] = Stream::default();
        self.len -= 1;
        if self.len == 0 && self.places.len() > KEPT {
            *self = Streams::default();
        } else {
            self.free.push(slot);
        }
        removed
    }

    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.places.capacity() * size_of::<Stream>()
            + (self.free.capacity() + self.table.capacity()) * 4
    }

    #[inline]
    fn link(&mut self, id: u32, slot: u32) {
        let mask = self.table.len() - 1;
        let mut at = hash(id, mask);
        while self.table[at] != 0 {
            at = (at + 1) & mask;
        }
        self.table[at] = slot + 1;
    }

    /// Takes a number, whose place is `slot`, out of the table.
    fn unlink(&mut self, id: u32, slot: u32) {
        let mask = self.table.len() - 1;
        let mut at = hash(id, mask);
        while self.table[at] != slot + 1 {
            at = (at + 1) & mask;
        }
        // Those behind it that belong at the hole or before move up.
        let mut hole = at;
        loop {
            at = (at + 1) & mask;
            let Some(next) = self.table[at].checked_sub(1) else {
                break;
            };
            let home = hash(self.places[next as usize].id, mask);
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(hole) & mask {
                self.table[hole] = next + 1;
                hole = at;
            }
        }
        self.table[hole] = 0;
    }

    fn grow(&mut self) {
        self.table = vec![0; (self.table.len() * 2).max(8)];
        for slot in 0..self.places.len() {
            let id = self.places[slot].id;
            if id != 0 {
                self.link(id, slot as u32);
            }
        }
    }
}

/// Spreads numbers, which count up by two, over a table of `mask + 1` places: side by side they would be one long
/// run, and taking one out would look at all of it.
#[inline]
fn hash(id: u32, mask: usize) -> usize {
    // By the golden ratio: the high bits of the product are far apart for numbers in a row.
    let spread = (id >> 1).wrapping_mul(0x9e37_79b9);
    (spread >> (mask as u32).leading_zeros()) as usize
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn finds_what_is_in_and_nothing_else(
            steps in prop::collection::vec((any::<bool>(), 0u32..60), 1..200),
        ) {
            let mut streams = Streams::default();
            let mut want: HashMap<u32, StreamId> = HashMap::new();
            for (add, number) in steps {
                let id = number * number * 2 + 1;
                if let Some(stream) = want.get(&id).copied() {
                    if !add {
                        prop_assert_eq!(streams.remove(stream.slot).id, id);
                        want.remove(&id);
                        prop_assert!(streams.get(stream).is_none());
                    }
                } else if add {
                    let stream = streams.insert(Stream { id, ..Stream::default() });
                    want.insert(id, stream);
                }
                prop_assert_eq!(streams.len(), want.len());
                for number in 0..60 {
                    let id = number * number * 2 + 1;
                    prop_assert_eq!(streams.find(id), want.get(&id).map(|s| s.slot));
                }
            }
        }
    }
}
