//! Reads HTTP/1.1 responses that say their length.

use std::time::Instant;

use super::Tally;
use crate::upstream::{find_end, header};

/// One request at a time.
#[derive(Debug, Default)]
pub(super) struct Client {
    pub(super) since: Option<Instant>,
    /// The peer will close: no request may follow.
    pub(super) closing: bool,
    head: Vec<u8>,
    /// Body bytes to come; `None` while a head is read.
    left: Option<usize>,
    as_expected: bool,
}

impl Client {
    /// Reads bytes; ends of answers go to `finished`.
    pub(super) fn feed(
        &mut self,
        mut bytes: &[u8],
        expected: usize,
        tally: &mut Tally,
        finished: &mut Vec<Instant>,
    ) {
        while !bytes.is_empty() {
            let Some(left) = &mut self.left else {
                let end = if self.head.is_empty() {
                    find_end(bytes, 0)
                } else {
                    None
                };
                if let Some(end) = end {
                    // The whole head in one read: no copy.
                    let (head, rest) = bytes.split_at(end);
                    self.judge(head, expected, tally);
                    bytes = rest;
                } else {
                    let held = self.head.len();
                    self.head.extend_from_slice(bytes);
                    let Some(end) = find_end(&self.head, held) else {
                        return;
                    };
                    bytes = &bytes[end - held..];
                    let head = std::mem::take(&mut self.head);
                    self.judge(&head[..end], expected, tally);
                }
                if self.left == Some(0) {
                    self.finish(tally, finished);
                }
                continue;
            };
            let taken = (*left).min(bytes.len());
            *left -= taken;
            tally.bytes(taken);
            bytes = &bytes[taken..];
            if *left == 0 {
                self.finish(tally, finished);
            }
        }
    }

    fn judge(&mut self, head: &[u8], expected: usize, tally: &mut Tally) {
        let length = header(head, "content-length").and_then(|value| value.parse().ok());
        self.as_expected = head.starts_with(b"HTTP/1.1 200 ") && length == Some(expected);
        if !self.as_expected {
            tally.bad(1, || String::from_utf8_lossy(head).into_owned());
        }
        self.closing |= header(head, "connection").is_some_and(|v| v.eq_ignore_ascii_case("close"));
        self.left = Some(length.unwrap_or(0));
    }

    fn finish(&mut self, tally: &mut Tally, finished: &mut Vec<Instant>) {
        self.left = None;
        if self.as_expected {
            tally.good();
        }
        finished.extend(self.since.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_expected_answer_is_good() {
        let ok = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc".as_slice();
        let close = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 3\r\n\r\nabc";
        let short = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nab";
        let error = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 3\r\n\r\nabc";
        for (text, good, bad, closing) in [
            (ok, 1, 0, false),
            (close, 1, 0, true),
            (short, 0, 1, false),
            (error, 0, 1, false),
        ] {
            for cut in [1, 2, 7, text.len()] {
                let (mut client, mut tally) = (Client::default(), Tally::default());
                client.since = Some(Instant::now());
                let mut finished = Vec::new();
                for piece in text.chunks(cut) {
                    client.feed(piece, 3, &mut tally, &mut finished);
                }
                assert_eq!((tally.good, tally.bad), (good, bad));
                assert_eq!((finished.len(), client.closing), (1, closing));
            }
        }
    }
}
