//! What waits for the socket: small frames in one buffer, large payloads beside it.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf as _, Bytes};

/// Payloads from this size on are not copied.
const LARGE: usize = 2048;

/// First size of the buffer.
const FIRST: usize = 2048;

/// Bytes to be written, in order. Holds no memory when there are none.
#[derive(Debug, Default)]
pub(super) struct Output {
    small: Vec<u8>,
    /// How much of `small` was written.
    at: usize,
    /// Payloads and before which byte of `small` each goes.
    large: VecDeque<(usize, Bytes)>,
    /// Bytes that wait.
    pending: usize,
    frames: Counted,
    control: Counted,
    /// Bytes that have to be written before what was counted at the last look is gone.
    until_mark: usize,
}

/// A number of frames that wait. Their ends are not remembered: the count falls when all that waited at
/// some moment was written, so it is never too low and at most one round behind.
#[derive(Debug, Default)]
struct Counted {
    now: u32,
    at_mark: u32,
}

impl Output {
    /// Bytes that wait.
    pub(super) fn pending(&self) -> usize {
        self.pending
    }

    /// Frames that wait, at most.
    pub(super) fn frames(&self) -> u32 {
        self.frames.now
    }

    /// PING, SETTINGS and RST_STREAM frames that wait, at most.
    pub(super) fn control_frames(&self) -> u32 {
        self.control.now
    }

    /// Appends whole frames (`count` of them) or a part of one (0).
    pub(super) fn put(&mut self, bytes: &[u8], count: u32) {
        self.write(count, |small| small.extend_from_slice(bytes));
    }

    /// Appends a PING, SETTINGS or RST_STREAM frame.
    pub(super) fn put_control(&mut self, bytes: &[u8]) {
        self.control.now = self.control.now.saturating_add(1);
        self.put(bytes, 1);
    }

    /// Lets `write` append to the buffer.
    pub(super) fn write(&mut self, count: u32, write: impl FnOnce(&mut Vec<u8>)) {
        if self.small.capacity() == 0 {
            self.small = Vec::with_capacity(FIRST);
        }
        let before = self.small.len();
        write(&mut self.small);
        self.pending += self.small.len() - before;
        self.frames.now = self.frames.now.saturating_add(count);
    }

    /// Appends a payload, by reference when it is large.
    pub(super) fn put_payload(&mut self, payload: Bytes) {
        if payload.len() < LARGE {
            return self.put(&payload, 0);
        }
        self.pending += payload.len();
        self.large.push_back((self.small.len(), payload));
    }

    /// Points `slices` at what waits. Returns how many were filled.
    pub(super) fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut filled = 0;
        let mut at = self.at;
        let mut fill = |bytes: &'a [u8]| {
            if bytes.is_empty() {
                return true;
            }
            match slices.get_mut(filled) {
                Some(slice) => {
                    *slice = IoSlice::new(bytes);
                    filled += 1;
                    true
                }
                None => false,
            }
        };
        for (before, payload) in &self.large {
            if !fill(self.small.get(at..*before).unwrap_or_default()) || !fill(payload) {
                return filled;
            }
            at = *before;
        }
        fill(self.small.get(at..).unwrap_or_default());
        filled
    }

    /// `bytes` were written.
    pub(super) fn advance(&mut self, bytes: usize) {
        let mut left = bytes.min(self.pending);
        self.pending -= left;
        self.count_down(left);
        if self.pending == 0 {
            self.small = Vec::new();
            self.at = 0;
            if self.large.capacity() > 0 {
                self.large = VecDeque::new();
            }
            return;
        }
        while left > 0 {
            let end = match self.large.front() {
                Some((before, _)) => *before,
                None => self.small.len(),
            };
            let step = left.min(end - self.at);
            self.at += step;
            left -= step;
            if left == 0 {
                break;
            }
            let Some((_, payload)) = self.large.front_mut() else {
                break;
            };
            let step = left.min(payload.len());
            payload.advance(step);
            left -= step;
            if payload.is_empty() {
                self.large.pop_front();
            }
        }
        self.compact();
    }

    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.small.capacity() + self.large.capacity() * size_of::<(usize, Bytes)>()
    }

    /// Gives back the written front of the buffer once it is the larger part.
    fn compact(&mut self) {
        if self.at < FIRST || self.at * 2 < self.small.len() {
            return;
        }
        self.small.drain(..self.at);
        for (before, _) in &mut self.large {
            *before -= self.at;
        }
        self.at = 0;
    }

    fn count_down(&mut self, written: usize) {
        if self.pending == 0 {
            self.frames = Counted::default();
            self.control = Counted::default();
            self.until_mark = 0;
            return;
        }
        if written < self.until_mark {
            self.until_mark -= written;
            return;
        }
        for counted in [&mut self.frames, &mut self.control] {
            counted.now -= counted.at_mark;
            counted.at_mark = counted.now;
        }
        self.until_mark = self.pending;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(output: &Output) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); 64];
        let filled = output.slices(&mut slices);
        slices[..filled]
            .iter()
            .flat_map(|s| s.iter().copied())
            .collect()
    }

    proptest! {
        #[test]
        fn bytes_leave_in_order_however_they_are_written(
            pieces in prop::collection::vec(1usize..5000, 1..20),
            steps in prop::collection::vec(1usize..4000, 1..40),
        ) {
            let mut output = Output::default();
            let mut want = Vec::new();
            let mut got = Vec::new();
            let mut steps = steps.into_iter().cycle();
            for (number, len) in pieces.into_iter().enumerate() {
                let piece = vec![number as u8; len];
                want.extend_from_slice(&piece);
                output.put_payload(piece.into());
                prop_assert_eq!(output.pending(), want.len() - got.len());
                let now = written(&output);
                prop_assert_eq!(&now[..], &want[got.len()..]);
                let step = steps.next().unwrap().min(now.len());
                got.extend_from_slice(&now[..step]);
                output.advance(step);
            }
            let rest = written(&output);
            got.extend_from_slice(&rest);
            output.advance(rest.len());
            prop_assert_eq!(got, want);
            prop_assert_eq!(output.pending(), 0);
            prop_assert_eq!(output.small.capacity() + output.large.capacity(), 0);
        }
    }

    #[test]
    fn frames_are_counted_until_they_are_written() {
        let mut output = Output::default();
        for _ in 0..10 {
            output.put_control(&[0; 10]);
        }
        assert_eq!((output.frames(), output.control_frames()), (10, 10));
        output.advance(50); // marks the 50 bytes that wait, and with them all ten
        assert_eq!(output.control_frames(), 10);
        output.put_control(&[0; 10]);
        output.advance(50);
        assert_eq!(output.control_frames(), 1);
        output.advance(10);
        assert_eq!((output.frames(), output.control_frames()), (0, 0));
    }
}
