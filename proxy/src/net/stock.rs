//! The worker's stock of read buffers: a connection borrows one while it has something to read.

use std::cell::RefCell;

use bytes::{Buf as _, BytesMut};

/// Spare capacity of a buffer from the stock, in bytes.
pub const SIZE: usize = 16 * 1024;
/// A buffer that has grown beyond this is not kept.
const LARGEST: usize = 4 * SIZE;
/// Buffers kept by one worker: as many as are commonly out at once, 1 MiB in all.
const KEPT: usize = 64;

thread_local! {
    static STOCK: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer with at least [`SIZE`] bytes of spare capacity.
pub fn get() -> BytesMut {
    STOCK
        .with_borrow_mut(Vec::pop)
        .unwrap_or_else(|| BytesMut::with_capacity(SIZE))
}

/// Where reads into a long buffer begin. Copies to a place a few bytes further in its page than the one they
/// come from are twenty times slower on some processors, and pages are where long buffers begin; a TLS
/// record's text lies 5 bytes into its own.
const LEAD: usize = 1024;

/// Makes `buffer`, which is empty, one with `n` bytes of spare capacity or more, of the memory that it has if
/// nobody else holds a part of it.
pub fn lengthen(buffer: &mut BytesMut, n: usize) {
    if !buffer.try_reclaim(LEAD + n) {
        *buffer = BytesMut::with_capacity(LEAD + n);
    }
    buffer.resize(LEAD, 0);
    buffer.advance(LEAD);
}

/// Gives a buffer back. What is still in it is gone; a buffer of which somebody holds a part is left to them.
pub fn put(mut buffer: BytesMut) {
    buffer.clear();
    if buffer.capacity() > LARGEST || !buffer.try_reclaim(SIZE) {
        return;
    }
    STOCK.with_borrow_mut(|stock| {
        if stock.len() < KEPT {
            stock.push(buffer);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_is_shared_is_not_handed_out_again() {
        let mut buffer = get();
        buffer.extend_from_slice(b"head and body");
        let head = buffer.split_to(4).freeze();
        put(buffer);
        assert!(STOCK.with_borrow(Vec::is_empty));
        assert_eq!(&head[..], b"head");
        let mut buffer = get();
        let whole = buffer.as_ptr();
        buffer.extend_from_slice(b"head and body");
        drop(buffer.split_to(4));
        put(buffer);
        let again = get();
        assert_eq!(again.as_ptr(), whole);
        assert!(again.is_empty() && again.capacity() >= SIZE);
    }
}
