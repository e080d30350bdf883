//! What waits to be written to an HTTP/1 connection: heads, small pieces side by side, large ones as they are.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes, BytesMut};

use crate::net::{Transport, stock};

/// Data up to this size is copied beside the text around it, which costs less than a slice of its own.
const SMALL: usize = 2 * 1024;
/// Slices given to the kernel at once.
const SLICES: usize = 32;

/// Bytes in order, those of `text` between the large pieces.
#[derive(Debug, Default)]
pub(super) struct Output {
    /// Without memory while nothing waits.
    text: BytesMut,
    /// Large pieces, each with the number of bytes of `text` that come before it (after the piece before).
    pieces: VecDeque<(usize, Bytes)>,
    /// Bytes of `text` that precede some piece.
    claimed: usize,
    /// Bytes of all pieces.
    waiting: usize,
}

impl Output {
    /// Where to write text.
    pub(super) fn text(&mut self) -> &mut BytesMut {
        if self.text.capacity() == 0 {
            self.text = stock::get();
        }
        &mut self.text
    }

    /// Adds a piece of a body.
    pub(super) fn data(&mut self, data: Bytes) {
        if data.len() <= SMALL {
            self.text().extend_from_slice(&data);
            return;
        }
        let before = self.text.len() - self.claimed;
        self.claimed = self.text.len();
        self.waiting += data.len();
        self.pieces.push_back((before, data));
    }

    /// All that waits, if it is not much and all of it text.
    pub(super) fn take_short(&mut self, most: usize) -> Option<BytesMut> {
        let short = self.pieces.is_empty() && !self.text.is_empty() && self.text.len() <= most;
        short.then(|| std::mem::take(&mut self.text))
    }

    /// Has `text` leave before all that is to come. Nothing may wait.
    pub(super) fn begin_with(&mut self, text: BytesMut) {
        debug_assert!(self.is_empty(), "what waits would leave after it");
        self.text = text;
    }

    /// Number of bytes that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting + self.text.len()
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty() && self.pieces.is_empty()
    }

    /// Gives the memory back that is not in use.
    pub(super) fn give_back(&mut self) {
        if self.is_empty() {
            self.pieces = VecDeque::new();
            if self.text.capacity() > 0 {
                stock::put(std::mem::take(&mut self.text));
            }
        }
    }

    /// Writes once; gives the number of bytes. What nothing waits for must not be written.
    pub(super) fn poll_write(
        &mut self,
        io: &mut Transport,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let written = if self.pieces.is_empty() {
            ready!(io.poll_write(cx, &[IoSlice::new(&self.text)]))?
        } else {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut filled = 0;
            let mut text = &self.text[..];
            for (before, data) in self.pieces.iter().take(SLICES / 2 - 1) {
                let (own, rest) = text.split_at(*before);
                text = rest;
                for part in [own, &data[..]] {
                    if let Some(slice) = slices.get_mut(filled).filter(|_| !part.is_empty()) {
                        *slice = IoSlice::new(part);
                        filled += 1;
                    }
                }
            }
            if self.pieces.len() < SLICES / 2
                && !text.is_empty()
                && let Some(slice) = slices.get_mut(filled)
            {
                *slice = IoSlice::new(text);
                filled += 1;
            }
            ready!(io.poll_write(cx, slices.get(..filled).unwrap_or_default()))?
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.advance(written);
        Poll::Ready(Ok(written))
    }

    fn advance(&mut self, mut written: usize) {
        while written > 0 {
            let Some((before, data)) = self.pieces.front_mut() else {
                self.text.advance(written);
                return;
            };
            let own = (*before).min(written);
            self.text.advance(own);
            self.claimed -= own;
            *before -= own;
            written -= own;
            let part = data.len().min(written);
            data.advance(part);
            self.waiting -= part;
            written -= part;
            if data.is_empty() {
                self.pieces.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn pieces_leave_in_the_order_they_came_however_little_is_taken() {
        for room in [1, 7, 4096, 1 << 20] {
            let (mut peer, ours) = tokio::io::duplex(room);
            let mut io = Transport::from(ours);
            let mut output = Output::default();
            let mut want = Vec::new();
            for round in 0..40 {
                let text = format!("head {round}\r\n");
                output.text().extend_from_slice(text.as_bytes());
                want.extend_from_slice(text.as_bytes());
                let data = vec![round; usize::from(round) * 150];
                want.extend_from_slice(&data);
                output.data(data.into());
            }
            output.text().extend_from_slice(b"end");
            want.extend_from_slice(b"end");
            assert_eq!(output.waiting(), want.len());
            let reader = tokio::spawn(async move {
                let mut got = Vec::new();
                peer.read_to_end(&mut got).await.unwrap();
                got
            });
            while !output.is_empty() {
                poll_fn(|cx| output.poll_write(&mut io, cx)).await.unwrap();
            }
            assert_eq!(output.waiting(), 0);
            drop(io);
            assert!(reader.await.unwrap() == want, "{room}");
        }
    }
}
