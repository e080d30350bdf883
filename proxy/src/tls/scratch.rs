//! The worker's buffers for ciphertext.

use std::cell::RefCell;

/// Room for what was kept of a record or handshake message, and a large read after it; also holds the
/// plain text that is gathered for one write.
const SIZE: usize = 128 * 1024;
/// Room for eight full records: what one write makes.
const OUT: usize = 8 * (16 * 1024 + 512) + 4096;
/// Buffers kept for writes; more are out at once only while sockets take nothing.
const KEPT: usize = 4;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    static OUTS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// The buffer for reading, to be given back at once. All of it is initialised.
pub(super) fn take() -> Vec<u8> {
    let mut buffer = SCRATCH.take();
    if buffer.is_empty() {
        buffer = vec![0; SIZE];
    }
    buffer
}

/// Gives it back.
pub(super) fn give(buffer: Vec<u8>) {
    SCRATCH.set(buffer);
}

/// Bytes to be written. Empty, it holds no memory; otherwise a buffer of the worker's or, when little is
/// held for long, one of its own.
#[derive(Default)]
pub(super) struct Out {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Out {
    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub(super) fn filled(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// At least `n` bytes to write to; [`Out::fill`] says how many were.
    pub(super) fn room(&mut self, n: usize) -> &mut [u8] {
        if self.buffer.len() - self.end < n {
            let mut larger = OUTS
                .with_borrow_mut(Vec::pop)
                .unwrap_or_else(|| vec![0; OUT]);
            let held = self.end - self.start;
            if larger.len() < held + n {
                larger.resize(held + n, 0);
            }
            larger[..held].copy_from_slice(self.filled());
            give_out(std::mem::replace(&mut self.buffer, larger));
            (self.start, self.end) = (0, held);
        }
        &mut self.buffer[self.end..]
    }

    pub(super) fn fill(&mut self, n: usize) {
        self.end += n;
    }

    /// `n` bytes have been written.
    pub(super) fn advance(&mut self, n: usize) {
        self.start += n;
        if self.is_empty() {
            give_out(std::mem::take(&mut self.buffer));
            (self.start, self.end) = (0, 0);
        }
    }

    /// Keeps no more memory than it holds bytes.
    pub(super) fn shrink(&mut self) {
        let own = self.filled().to_vec();
        give_out(std::mem::replace(&mut self.buffer, own));
        (self.start, self.end) = (0, self.buffer.len());
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        give_out(std::mem::take(&mut self.buffer));
    }
}

fn give_out(buffer: Vec<u8>) {
    if buffer.len() != OUT {
        return;
    }
    // While the thread ends there is no stock any more.
    let _gone = OUTS.try_with(|outs| {
        let mut outs = outs.borrow_mut();
        if outs.len() < KEPT {
            outs.push(buffer);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_survives_growth_and_shrinking() {
        let mut out = Out::default();
        out.room(5)[..5].copy_from_slice(b"hello");
        out.fill(5);
        out.advance(1);
        out.shrink();
        assert_eq!((out.filled(), out.buffer.len()), (&b"ello"[..], 4));
        out.room(3)[..3].copy_from_slice(b"!!!");
        out.fill(3);
        assert_eq!(out.filled(), b"ello!!!");
        assert!(out.room(2 * OUT).len() >= 2 * OUT);
        assert_eq!(out.filled(), b"ello!!!");
        out.advance(7);
        assert!(out.is_empty() && out.buffer.is_empty());
    }
}
