//! HTTP/1.1 and HTTP/2 without I/O: bytes in, heads and events out, and back.
//!
//! `head` is what the rest of the data plane sees of a message.

mod swar;
pub mod head;
pub mod h2;
pub mod h1;
