//! The hot paths of HTTP/1.1 for a profiler:
//! `valgrind --tool=callgrind target/release/examples/hot N PART`, PART one of request, response, write-request,
//! write-response; the difference between two N is what one head costs.
//! Without a part it runs all, each `N` times (1000 unless told).

use std::hint::black_box;

use bytes::BytesMut;
use lateen_codec::h1::{
    Limits, Parsed, Reply, Scan, parse_request, parse_response, write_request, write_response,
};

/// As a load generator and as a browser behind a gateway send it.
const REQUEST: &[u8] = b"GET /productpage?u=normal HTTP/1.1\r\n\
    Host: productpage.default.svc.cluster.local:9080\r\n\
    User-Agent: curl/8.5.0\r\n\
    Accept: */*\r\n\
    X-Forwarded-For: 10.0.0.7\r\n\
    X-Forwarded-Proto: http\r\n\
    X-Request-Id: 6f1b2c3d-0000-4000-8000-123456789abc\r\n\
    Cookie: session=0123456789abcdef\r\n\
    X-Team: blue\r\n\r\n";

const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\n\
    Content-Type: text/plain; charset=utf-8\r\n\
    Content-Length: 5\r\n\
    Date: Tue, 24 Nov 2026 20:00:00 GMT\r\n\
    Server: upstream\r\n\
    X-Envoy-Upstream-Service-Time: 3\r\n\r\n";

fn main() {
    let mut arguments = std::env::args().skip(1);
    let rounds = arguments
        .next()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(1000);
    let part = arguments.next();
    let runs = |name: &str| part.as_deref().is_none_or(|part| part == name);
    if runs("request") {
        (0..rounds).for_each(|_| request());
    }
    if runs("response") {
        (0..rounds).for_each(|_| response());
    }
    let mut out = BytesMut::with_capacity(4096);
    if runs("write-request")
        && let Ok(Parsed::Complete {
            head: (head, meta), ..
        }) = parse_request(REQUEST, &Limits::default(), &mut Scan::default())
    {
        for _ in 0..rounds {
            out.clear();
            let written = write_request(&mut out, black_box(&head), meta.framing);
            black_box(written.is_ok());
        }
    }
    if runs("write-response")
        && let Ok(Parsed::Complete {
            head: (head, meta), ..
        }) = parse_response(RESPONSE, &Limits::default(), b"GET", &mut Scan::default())
    {
        for _ in 0..rounds {
            out.clear();
            let written =
                write_response(&mut out, black_box(&head), meta.framing, Reply::default());
            black_box(written.is_ok());
        }
    }
}

fn request() {
    let parsed = parse_request(black_box(REQUEST), &Limits::default(), &mut Scan::default());
    black_box(parsed.is_ok());
}

fn response() {
    let parsed = parse_response(
        black_box(RESPONSE),
        &Limits::default(),
        b"GET",
        &mut Scan::default(),
    );
    black_box(parsed.is_ok());
}
