//! HTTP/2 client: opens streams, and checks that each answer has the status, the length and the end that
//! it should have. Header blocks are not decoded: the status comes first and as its static index.

use std::time::Instant;

use super::Tally;
use crate::frame::{self, Block};

/// A request under way.
#[derive(Debug)]
struct Flight {
    stream: u32,
    since: Instant,
    has_head: bool,
    as_expected: bool,
    bytes: usize,
}

#[derive(Debug)]
pub(super) struct Client {
    reader: frame::Reader,
    flights: Vec<Flight>,
    next: u32,
    sent_any: bool,
    greeted: bool,
    /// The peer's settings have come.
    pub(super) ready: bool,
    /// The peer will close: no stream may follow.
    pub(super) leaving: bool,
    /// Requests that the peer said it never began, to be sent again.
    pub(super) refused: usize,
    table: u32,
    unreported: u32,
}

impl Default for Client {
    fn default() -> Client {
        Client {
            reader: frame::Reader::default(),
            flights: Vec::new(),
            next: 1,
            sent_any: false,
            greeted: false,
            ready: false,
            leaving: false,
            refused: 0,
            table: 4096,
            unreported: 0,
        }
    }
}

impl Client {
    /// Puts the preface once.
    pub(super) fn greet(&mut self, out: &mut Vec<u8>) {
        if !self.greeted {
            self.greeted = true;
            out.extend_from_slice(frame::PREFACE);
            frame::put_settings(
                out,
                &[
                    (frame::SETTINGS_ENABLE_PUSH, 0),
                    (frame::SETTINGS_INITIAL_WINDOW_SIZE, frame::STREAM_WINDOW),
                ],
            );
        }
    }

    pub(super) fn send(&mut self, block: &Block, body: &[u8], due: Instant, out: &mut Vec<u8>) {
        let stream = self.next;
        self.next += 2;
        self.flights.push(Flight {
            stream,
            since: due,
            has_head: false,
            as_expected: false,
            bytes: 0,
        });
        let block = block.bytes(self.sent_any, self.table);
        self.sent_any = true;
        let end = |last: bool| if last { frame::END_STREAM } else { 0 };
        let flags = frame::END_HEADERS | end(body.is_empty());
        frame::put(out, frame::HEADERS, flags, stream, block);
        let mut pieces = body.chunks(frame::MAX_PAYLOAD).peekable();
        while let Some(piece) = pieces.next() {
            let flags = end(pieces.peek().is_none());
            frame::put(out, frame::DATA, flags, stream, piece);
        }
    }

    pub(super) fn under_way(&self) -> usize {
        self.flights.len()
    }

    pub(super) fn oldest(&self) -> Option<Instant> {
        self.flights.iter().map(|flight| flight.since).min()
    }

    /// Reads bytes; ends of answers go to `finished`.
    pub(super) fn feed(
        &mut self,
        bytes: &[u8],
        expected: usize,
        trailers: bool,
        tally: &mut Tally,
        finished: &mut Vec<Instant>,
        out: &mut Vec<u8>,
    ) {
        let Client {
            reader,
            flights,
            ready,
            leaving,
            refused,
            table,
            unreported,
            ..
        } = self;
        reader.feed(bytes, |head, payload| {
            let at = flights.iter().position(|f| f.stream == head.stream);
            match head.kind {
                frame::DATA | frame::HEADERS => {
                    let ends = head.has(frame::END_STREAM);
                    if head.kind == frame::DATA {
                        *unreported += head.length as u32;
                        tally.bytes(head.length);
                    }
                    let Some(at) = at else { return };
                    let flight = &mut flights[at];
                    if head.kind == frame::DATA {
                        flight.bytes += head.length;
                    } else if !flight.has_head {
                        flight.has_head = true;
                        // An answer of headers alone is never the expected one.
                        flight.as_expected = frame::is_ok(payload) && !ends;
                    }
                    if ends {
                        let flight = flights.swap_remove(at);
                        if flight.as_expected
                            && flight.bytes == expected
                            && trailers == (head.kind == frame::HEADERS)
                        {
                            tally.good();
                        } else {
                            tally.bad(1, || {
                                format!("unexpected answer: {flight:?}, ended by {head:?}")
                            });
                        }
                        finished.push(flight.since);
                    }
                }
                frame::RST_STREAM => {
                    let Some(at) = at else { return };
                    let flight = flights.swap_remove(at);
                    const REFUSED_STREAM: u32 = 7;
                    if frame::number(payload) == REFUSED_STREAM {
                        *refused += 1;
                    } else {
                        tally.bad(1, || format!("reset {}", frame::number(payload)));
                        finished.push(flight.since);
                    }
                }
                frame::SETTINGS if !head.has(frame::ACK) => {
                    for (id, value) in frame::settings(payload) {
                        if id == frame::SETTINGS_HEADER_TABLE_SIZE {
                            *table = value;
                        }
                    }
                    *ready = true;
                    frame::put(out, frame::SETTINGS, frame::ACK, 0, &[]);
                }
                frame::PING if !head.has(frame::ACK) => {
                    frame::put(out, frame::PING, frame::ACK, 0, payload);
                }
                frame::GOAWAY => {
                    *leaving = true;
                    let last = frame::number(payload) & 0x7fff_ffff;
                    let before = flights.len();
                    flights.retain(|flight| flight.stream <= last);
                    *refused += before - flights.len();
                    let code = payload.get(4..).map_or(0, frame::number);
                    tally.bad(usize::from(code != 0), || format!("GOAWAY {code}"));
                }
                _ => {}
            }
        });
        if self.unreported > frame::REFILL {
            frame::put_window(out, 0, self.unreported);
            self.unreported = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(put: impl Fn(&mut Vec<u8>), trailers: bool) -> (u64, u64, usize) {
        let (mut client, mut tally) = (Client::default(), Tally::default());
        let (mut out, mut finished, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
        let block = Block::new(&[(":method", "GET")]);
        client.send(&block, &[], Instant::now(), &mut out);
        put(&mut bytes);
        client.feed(&bytes, 3, trailers, &mut tally, &mut finished, &mut out);
        (tally.good, tally.bad, finished.len() + client.refused)
    }

    #[test]
    fn only_the_expected_answer_is_good() {
        use frame::{DATA, END_HEADERS, END_STREAM, HEADERS, RST_STREAM, put};
        let head = |out: &mut Vec<u8>, status| put(out, HEADERS, END_HEADERS, 1, &[status]);
        let plain = |out: &mut Vec<u8>| {
            head(out, 0x88);
            put(out, DATA, END_STREAM, 1, b"abc");
        };
        let call = |out: &mut Vec<u8>| {
            head(out, 0x88);
            put(out, DATA, 0, 1, b"abc");
            put(out, HEADERS, END_HEADERS | END_STREAM, 1, &[0]);
        };
        assert_eq!(answered(plain, false), (1, 0, 1));
        assert_eq!(answered(plain, true), (0, 1, 1));
        assert_eq!(answered(call, true), (1, 0, 1));
        assert_eq!(answered(call, false), (0, 1, 1));
        let wrong_status = |out: &mut Vec<u8>| {
            head(out, 0x8d);
            put(out, DATA, END_STREAM, 1, b"abc");
        };
        assert_eq!(answered(wrong_status, false), (0, 1, 1));
        let only_head = |out: &mut Vec<u8>| put(out, HEADERS, END_HEADERS | END_STREAM, 1, &[0x88]);
        assert_eq!(answered(only_head, true), (0, 1, 1));
        let reset =
            |code: u8| move |out: &mut Vec<u8>| put(out, RST_STREAM, 0, 1, &[0, 0, 0, code]);
        assert_eq!(answered(reset(2), false), (0, 1, 1));
        assert_eq!(answered(reset(7), false), (0, 0, 1));
    }
}
