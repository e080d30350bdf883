//! Just enough HTTP/2 for an instrument: frames, and header blocks encoded once, without Huffman codes.

/// What a client sends first. RFC 9113 §3.4.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes of a frame's head.
pub(crate) const HEAD: usize = 9;
/// Largest payload that every peer takes.
pub(crate) const MAX_PAYLOAD: usize = 16_384;

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;

/// Flag of DATA and HEADERS.
pub(crate) const END_STREAM: u8 = 1;
/// Flag of HEADERS.
pub(crate) const END_HEADERS: u8 = 4;
/// Flag of SETTINGS and PING.
pub(crate) const ACK: u8 = 1;

pub(crate) const SETTINGS_HEADER_TABLE_SIZE: u16 = 1;
pub(crate) const SETTINGS_ENABLE_PUSH: u16 = 2;
pub(crate) const SETTINGS_MAX_CONCURRENT_STREAMS: u16 = 3;
pub(crate) const SETTINGS_INITIAL_WINDOW_SIZE: u16 = 4;
/// Streams' receive window of both ends: no body of a scenario fills it.
pub(crate) const STREAM_WINDOW: u32 = 16 << 20;
/// Unreported DATA bytes after which the connection's window is refilled.
pub(crate) const REFILL: u32 = 1 << 20;

/// Appends a frame.
pub(crate) fn put(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    debug_assert!(payload.len() <= MAX_PAYLOAD, "every peer takes the frame");
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// Appends a WINDOW_UPDATE.
pub(crate) fn put_window(out: &mut Vec<u8>, stream: u32, bytes: u32) {
    put(out, WINDOW_UPDATE, 0, stream, &bytes.to_be_bytes());
}

/// Appends SETTINGS and opens the connection's window wide.
pub(crate) fn put_settings(out: &mut Vec<u8>, settings: &[(u16, u32)]) {
    let payload: Vec<u8> = settings
        .iter()
        .flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat())
        .collect();
    put(out, SETTINGS, 0, 0, &payload);
    put_window(out, 0, (1 << 30) - 65_535);
}

/// The head of a frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    pub(crate) length: usize,
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
}

impl Head {
    fn of(bytes: &[u8; HEAD]) -> Head {
        let [a, b, c, kind, flags, s, t, u, v] = *bytes;
        Head {
            length: u32::from_be_bytes([0, a, b, c]) as usize,
            kind,
            flags,
            stream: u32::from_be_bytes([s, t, u, v]) & 0x7fff_ffff,
        }
    }

    pub(crate) fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// Takes frames out of a byte stream. DATA payloads are counted, never collected.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    head: Vec<u8>,
    current: Option<Head>,
    payload: Vec<u8>,
    skipped: usize,
}

impl Reader {
    /// Gives every frame that `bytes` completes to `on`; DATA with an empty payload slice.
    pub(crate) fn feed(&mut self, mut bytes: &[u8], mut on: impl FnMut(Head, &[u8])) {
        loop {
            let Some(head) = self.current else {
                // Whole frames in one read are the common case: no copy.
                if self.head.is_empty()
                    && let Some((start, rest)) = bytes.split_first_chunk::<HEAD>()
                {
                    let head = Head::of(start);
                    if let Some((payload, rest)) = rest.split_at_checked(head.length) {
                        on(head, if head.kind == DATA { &[] } else { payload });
                        bytes = rest;
                        continue;
                    }
                }
                let (taken, rest) = bytes.split_at((HEAD - self.head.len()).min(bytes.len()));
                self.head.extend_from_slice(taken);
                bytes = rest;
                let Some(head) = self.head.first_chunk::<HEAD>().map(Head::of) else {
                    return;
                };
                self.head.clear();
                self.current = Some(head);
                continue;
            };
            let got = self.skipped + self.payload.len();
            let (taken, rest) = bytes.split_at((head.length - got).min(bytes.len()));
            bytes = rest;
            if head.kind == DATA {
                self.skipped += taken.len();
            } else {
                self.payload.extend_from_slice(taken);
            }
            if got + taken.len() < head.length {
                return;
            }
            on(head, &self.payload);
            self.current = None;
            self.payload.clear();
            self.skipped = 0;
        }
    }
}

/// The settings in a SETTINGS payload.
pub(crate) fn settings(payload: &[u8]) -> impl Iterator<Item = (u16, u32)> + '_ {
    payload.as_chunks::<6>().0.iter().map(|[a, b, c, d, e, f]| {
        (
            u16::from_be_bytes([*a, *b]),
            u32::from_be_bytes([*c, *d, *e, *f]),
        )
    })
}

/// A number in a payload's first four bytes.
pub(crate) fn number(payload: &[u8]) -> u32 {
    payload
        .first_chunk()
        .map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

/// A header block in the forms a connection needs.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    /// The first on a connection: enters every field into the dynamic table.
    first: Vec<u8>,
    /// Every later one: indexes only.
    later: Vec<u8>,
    /// For a peer whose table is too small: literals.
    literal: Vec<u8>,
}

impl Block {
    /// Encodes fields; the first may be one with an index of its own (`:status: 200`, `:method: GET`).
    pub(crate) fn new(fields: &[(&str, &str)]) -> Block {
        let mut block = Block {
            first: Vec::new(),
            later: Vec::new(),
            // "Dynamic table size update" to 0, which such a peer is owed. RFC 7541 §6.3.
            literal: vec![0x20],
        };
        let known = |name: &str, value: &str| match (name, value) {
            (":method", "GET") => Some(0x82),
            (":method", "POST") => Some(0x83),
            (":scheme", "http") => Some(0x86),
            (":scheme", "https") => Some(0x87),
            (":status", "200") => Some(0x88),
            _ => None,
        };
        let entered = fields.iter().filter(|(n, v)| known(n, v).is_none()).count();
        let mut number = 0;
        for (name, value) in fields {
            if let Some(index) = known(name, value) {
                block.first.push(index);
                block.later.push(index);
                block.literal.push(index);
                continue;
            }
            for (out, kind) in [(&mut block.first, 0x40), (&mut block.literal, 0x00)] {
                out.push(kind);
                for text in [name, value] {
                    out.push(text.len().min(126) as u8);
                    out.extend_from_slice(&text.as_bytes()[..text.len().min(126)]);
                }
            }
            number += 1;
            block.later.push(0x80 | (62 + entered - number) as u8);
        }
        block
    }

    /// What to send, given whether it was sent before on this connection and how large the peer's table is.
    pub(crate) fn bytes(&self, again: bool, table: u32) -> &[u8] {
        match (table >= 1024, again) {
            (true, false) => &self.first,
            (true, true) => &self.later,
            (false, _) => &self.literal,
        }
    }
}

/// A block of literals that leaves the dynamic table alone.
pub(crate) fn literals(fields: &[(&str, &str)]) -> Vec<u8> {
    Block::new(fields).literal.split_off(1)
}

/// Whether a block begins with `:status: 200`, which every encoder sends as its static index.
pub(crate) fn is_ok(block: &[u8]) -> bool {
    // Dynamic table size updates may come before it.
    let mut bytes = block.iter().copied();
    loop {
        match bytes.next() {
            Some(update) if update & 0xe0 == 0x20 => {
                if update & 0x1f == 0x1f {
                    while bytes.next().is_some_and(|byte| byte & 0x80 != 0) {}
                }
            }
            first => return first == Some(0x88),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_the_same_however_they_are_cut() {
        let mut bytes = Vec::new();
        put(&mut bytes, HEADERS, END_HEADERS, 1, &[0x88]);
        put(&mut bytes, DATA, END_STREAM, 1, &[b'x'; 300]);
        put_settings(&mut bytes, &[(SETTINGS_INITIAL_WINDOW_SIZE, 77)]);
        let whole = |cut: usize| {
            let mut reader = Reader::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(cut) {
                reader.feed(piece, |h, p| {
                    seen.push((h.kind, h.flags, h.stream, h.length, p.to_vec()));
                });
            }
            seen
        };
        let want = whole(bytes.len());
        assert_eq!(want.len(), 4);
        assert_eq!(want[1], (DATA, END_STREAM, 1, 300, Vec::new()));
        assert_eq!(settings(&want[2].4).collect::<Vec<_>>(), [(4, 77)]);
        for cut in 1..40 {
            assert_eq!(whole(cut), want, "cut into {cut}");
        }
    }

    #[test]
    fn later_blocks_point_at_what_the_first_entered() {
        let block = Block::new(&[(":status", "200"), ("a", "b"), ("c", "d")]);
        assert_eq!(
            block.bytes(false, 4096),
            b"\x88\x40\x01a\x01b\x40\x01c\x01d"
        );
        assert_eq!(block.bytes(true, 4096), [0x88, 0x80 | 63, 0x80 | 62]);
        assert_eq!(
            block.bytes(true, 0),
            b"\x20\x88\x00\x01a\x01b\x00\x01c\x01d"
        );
    }

    #[test]
    fn a_status_is_found_behind_size_updates() {
        assert!(is_ok(&[0x88]));
        assert!(is_ok(&[0x3f, 0xe1, 0x1f, 0x88, 0x84]));
        assert!(!is_ok(&[0x8d]));
        assert!(!is_ok(&[]));
    }
}
