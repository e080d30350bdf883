//! The layout of frames. RFC 9113 §4, §6.

/// Bytes of a frame's head.
pub(super) const HEAD: usize = 9;

/// The largest payload we take: what RFC 9113 §6.5.2 has as default, as Envoy.
pub(super) const MAX_FRAME_SIZE: usize = 16_384;

/// What a client says first. RFC 9113 §3.4.
pub(super) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The window of a stream and the connection before anybody said otherwise.
pub(super) const DEFAULT_WINDOW: u32 = 65_535;

pub(super) mod kind {
    pub(crate) const DATA: u8 = 0;
    pub(crate) const HEADERS: u8 = 1;
    pub(crate) const PRIORITY: u8 = 2;
    pub(crate) const RST_STREAM: u8 = 3;
    pub(crate) const SETTINGS: u8 = 4;
    pub(crate) const PUSH_PROMISE: u8 = 5;
    pub(crate) const PING: u8 = 6;
    pub(crate) const GOAWAY: u8 = 7;
    pub(crate) const WINDOW_UPDATE: u8 = 8;
    pub(crate) const CONTINUATION: u8 = 9;
}

pub(super) mod flag {
    pub(crate) const END_STREAM: u8 = 0x1;
    pub(crate) const ACK: u8 = 0x1;
    pub(crate) const END_HEADERS: u8 = 0x4;
    pub(crate) const PADDED: u8 = 0x8;
    pub(crate) const PRIORITY: u8 = 0x20;
}

pub(super) mod setting {
    pub(crate) const HEADER_TABLE_SIZE: u16 = 1;
    pub(crate) const ENABLE_PUSH: u16 = 2;
    pub(crate) const MAX_CONCURRENT_STREAMS: u16 = 3;
    pub(crate) const INITIAL_WINDOW_SIZE: u16 = 4;
    pub(crate) const MAX_FRAME_SIZE: u16 = 5;
    pub(crate) const ENABLE_CONNECT_PROTOCOL: u16 = 8;
}

/// A frame's head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    pub(super) len: usize,
    pub(super) kind: u8,
    pub(super) flags: u8,
    /// The stream, without the reserved bit.
    pub(super) id: u32,
}

impl Head {
    /// Reads one; `None` when it is not all there.
    pub(super) fn read(bytes: &[u8]) -> Option<Head> {
        let head = bytes.first_chunk::<HEAD>()?;
        let [l0, l1, l2, kind, flags, i0, i1, i2, i3] = *head;
        Some(Head {
            len: u32::from_be_bytes([0, l0, l1, l2]) as usize,
            kind,
            flags,
            id: u32::from_be_bytes([i0, i1, i2, i3]) & 0x7fff_ffff,
        })
    }

    /// The bytes of one.
    pub(super) fn bytes(self) -> [u8; HEAD] {
        let [_, l0, l1, l2] = (self.len as u32).to_be_bytes();
        let [i0, i1, i2, i3] = self.id.to_be_bytes();
        [l0, l1, l2, self.kind, self.flags, i0, i1, i2, i3]
    }

    /// Whether a flag is set.
    pub(super) fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}
