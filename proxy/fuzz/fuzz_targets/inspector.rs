//! The first bytes of a connection: PROXY protocol, ClientHello, HTTP version. However they come in pieces,
//! the verdict is the same.
#![no_main]

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use proxy::inspector::{Inspectors, ProxyProtocol};
use tokio::io::{AsyncRead, ReadBuf};

/// Gives its bytes in pieces of a size.
struct Pieces<'a>(&'a [u8], usize);

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let n = self.1.min(self.0.len()).min(buf.remaining());
        buf.put_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        Poll::Ready(Ok(()))
    }
}

fuzz_target!(|input: (u8, u8, &[u8])| {
    let (kind, size, bytes) = input;
    let inspectors = Inspectors {
        proxy_protocol: (kind & 1 != 0).then_some(ProxyProtocol {
            optional: kind & 2 != 0,
            refuses_v1: kind & 16 != 0,
            refuses_v2: kind & 32 != 0,
        }),
        tls: kind & 4 != 0,
        http: kind & 8 != 0,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let look = |size: usize| {
        let mut read = BytesMut::new();
        runtime
            .block_on(inspectors.inspect(&mut Pieces(bytes, size), &mut read, None))
            .map_err(|error| error.to_string())
    };
    assert_eq!(look(usize::MAX), look(usize::from(size) + 1));
});
