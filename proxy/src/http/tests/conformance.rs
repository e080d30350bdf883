//! RFC 9113 and RFC 7541 conformance: every case of h2spec as raw frames, against a listener of the proxy with an
//! upstream behind it. Numbers are h2spec's (`group/section/case`), so that coverage can be compared with its list;
//! [`SECTIONS`] says how many cases each section has, and the test fails when one is missing.
//!
//! h2spec lets a server answer a stream error by ending the connection; here the one right answer is asked for: what
//! RFC 9113 says and, where it leaves a choice, what Envoy does. The codec's own tests go further than this list.

mod cases;

use std::{collections::BTreeMap, net::SocketAddr};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use super::FORWARD;
use crate::testing::{LIMIT, Proxy, http};

/// h2spec's sections and how many cases each has.
const SECTIONS: [(&str, usize); 49] = [
    ("generic/1", 1),
    ("generic/2", 5),
    ("generic/3.1", 3),
    ("generic/3.2", 3),
    ("generic/3.3", 5),
    ("generic/3.4", 1),
    ("generic/3.5", 1),
    ("generic/3.7", 1),
    ("generic/3.8", 1),
    ("generic/3.9", 2),
    ("generic/3.10", 2),
    ("generic/4", 4),
    ("generic/5", 15),
    ("http2/3.5", 2),
    ("http2/4.1", 3),
    ("http2/4.2", 3),
    ("http2/4.3", 3),
    ("http2/5.1", 13),
    ("http2/5.1.1", 2),
    ("http2/5.1.2", 1),
    ("http2/5.3.1", 2),
    ("http2/5.4.1", 2),
    ("http2/5.5", 2),
    ("http2/6.1", 3),
    ("http2/6.2", 4),
    ("http2/6.3", 2),
    ("http2/6.4", 3),
    ("http2/6.5", 3),
    ("http2/6.5.2", 5),
    ("http2/6.5.3", 2),
    ("http2/6.7", 4),
    ("http2/6.8", 1),
    ("http2/6.9", 3),
    ("http2/6.9.1", 3),
    ("http2/6.9.2", 3),
    ("http2/6.10", 6),
    ("http2/7", 2),
    ("http2/8.1", 1),
    ("http2/8.1.2", 1),
    ("http2/8.1.2.1", 4),
    ("http2/8.1.2.2", 2),
    ("http2/8.1.2.3", 7),
    ("http2/8.1.2.6", 2),
    ("http2/8.2", 1),
    ("hpack/2.3.3", 2),
    ("hpack/4.2", 1),
    ("hpack/5.2", 3),
    ("hpack/6.1", 1),
    ("hpack/6.3", 1),
];

const STREAMS: u32 = 100;
const BODY: &str = "hello";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITIZED: u8 = 32;
/// A whole request in one frame.
const WHOLE: u8 = END_STREAM | END_HEADERS;

const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const STREAM_CLOSED: u32 = 5;
const FRAME_SIZE_ERROR: u32 = 6;
const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;
const COMPRESSION_ERROR: u32 = 9;

/// What the client does or waits for next.
#[derive(Clone, Debug)]
enum Step {
    Send(Vec<u8>),
    /// A whole response of status 200 and our body, or of none for HEAD.
    Answered(u32),
    /// DATA of so many bytes on stream 1, not more, and nothing else before them but heads.
    Data(usize),
    /// An answer to our SETTINGS.
    SettingsAck,
    /// The connection lives: it answers a PING.
    Alive,
    /// RST_STREAM; the connection lives on.
    Reset(u32, u32),
    /// GOAWAY with this code, and then the end.
    GoAway(u32),
    /// The end.
    Closed,
}

struct Case {
    number: &'static str,
    what: &'static str,
    /// Whether the client has sent its preface and SETTINGS before.
    greeted: bool,
    steps: Vec<Step>,
}

#[derive(Debug)]
struct Frame {
    kind: u8,
    flags: u8,
    id: u32,
    payload: Vec<u8>,
}

impl Frame {
    fn code(&self, at: usize) -> Option<u32> {
        let bytes = self.payload.get(at..)?.first_chunk()?;
        Some(u32::from_be_bytes(*bytes))
    }
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn frame(kind: u8, flags: u8, id: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(payload);
    out
}

/// The client's end of one case.
struct Client {
    stream: TcpStream,
    seen: Vec<Frame>,
}

impl Client {
    /// The next frame, or none at the end.
    async fn next(&mut self) -> Result<Option<Frame>, String> {
        let mut head = [0; 9];
        let read = async {
            self.stream.read_exact(&mut head).await?;
            let len = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; len as usize];
            self.stream.read_exact(&mut payload).await?;
            Ok::<_, std::io::Error>(payload)
        };
        match timeout(LIMIT / 4, read).await {
            Ok(Ok(payload)) => Ok(Some(Frame {
                kind: head[3],
                flags: head[4],
                id: u32::from_be_bytes([head[5], head[6], head[7], head[8]]),
                payload,
            })),
            Ok(Err(_)) => Ok(None),
            Err(_) => Err("nothing more comes".to_owned()),
        }
    }

    /// Reads until `wanted` finds what it looks for; errors and the end are none of that unless it says so.
    async fn find(
        &mut self,
        mut wanted: impl FnMut(&Frame) -> Result<bool, String>,
    ) -> Result<(), String> {
        loop {
            let Some(frame) = self.next().await? else {
                return Err("closed".to_owned());
            };
            let found = wanted(&frame)?;
            let fault = [GOAWAY, RST_STREAM].contains(&frame.kind);
            self.seen.push(frame);
            if found {
                return Ok(());
            }
            if fault {
                return Err("an error nobody asked for".to_owned());
            }
        }
    }

    async fn step(&mut self, step: &Step) -> Result<(), String> {
        match *step {
            // It may have closed already; what it said before is what counts.
            Step::Send(ref bytes) => drop(self.stream.write_all(bytes).await),
            Step::Answered(id) => {
                let (mut status, mut body) = (false, Vec::new());
                self.find(|frame| {
                    if frame.id != id {
                        return Ok(false);
                    }
                    match frame.kind {
                        // `:status: 200` is entry 8 of the static table.
                        HEADERS => status = frame.payload.first() == Some(&0x88),
                        DATA => body.extend_from_slice(&frame.payload),
                        _ => return Ok(false),
                    }
                    Ok(frame.flags & END_STREAM != 0)
                })
                .await?;
                if !status || (body != BODY.as_bytes() && !body.is_empty()) {
                    return Err(format!("not the answer: {body:?}"));
                }
            }
            Step::Data(len) => {
                self.find(|frame| match frame.kind {
                    DATA if frame.payload.len() == len => Ok(true),
                    DATA => Err(format!("{} bytes", frame.payload.len())),
                    _ => Ok(false),
                })
                .await?;
            }
            Step::SettingsAck => {
                self.find(|frame| Ok(frame.kind == SETTINGS && frame.flags & ACK != 0))
                    .await?;
            }
            Step::Alive => self.ping().await?,
            Step::Reset(id, code) => {
                self.find(|frame| {
                    Ok(frame.kind == RST_STREAM && frame.id == id && frame.code(0) == Some(code))
                })
                .await?;
                self.ping().await?;
            }
            Step::GoAway(code) => {
                // A malformed message costs its stream first.
                loop {
                    let Some(frame) = self.next().await? else {
                        return Err("closed without a word".to_owned());
                    };
                    let done = frame.kind == GOAWAY;
                    let right = frame.code(4) == Some(code);
                    self.seen.push(frame);
                    if done && !right {
                        return Err("another code".to_owned());
                    }
                    if done {
                        break;
                    }
                }
                self.closed().await?;
            }
            Step::Closed => self.closed().await?,
        }
        Ok(())
    }

    async fn ping(&mut self) -> Result<(), String> {
        self.stream
            .write_all(&frame(PING, 0, 0, b"are you?"))
            .await
            .map_err(|error| error.to_string())?;
        self.find(|frame| match frame.kind {
            PING if frame.flags & ACK != 0 && frame.payload == b"are you?" => Ok(true),
            PING => Err("an answer to no question".to_owned()),
            _ => Ok(false),
        })
        .await
    }

    async fn closed(&mut self) -> Result<(), String> {
        while let Some(frame) = self.next().await? {
            let answer = [HEADERS, DATA].contains(&frame.kind);
            self.seen.push(frame);
            if answer {
                return Err("an answer".to_owned());
            }
        }
        Ok(())
    }
}

async fn run(case: &Case, address: SocketAddr) -> Result<(), String> {
    let mut client = Client {
        stream: TcpStream::connect(address).await.unwrap(),
        seen: Vec::new(),
    };
    if case.greeted {
        let hello = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
        client.step(&Step::Send(hello)).await?;
        client.step(&Step::SettingsAck).await?;
    }
    for (at, step) in case.steps.iter().enumerate() {
        client.step(step).await.map_err(|error| {
            format!(
                "{} ({}), step {at}: {error}; {:?}",
                case.number, case.what, client.seen
            )
        })?;
    }
    Ok(())
}

/// Answers each request once it is whole.
async fn upstream(listener: TcpListener) {
    use http_body_util::BodyExt as _;
    while let Ok((stream, _)) = listener.accept().await {
        let service = hyper::service::service_fn(
            |request: http::Request<hyper::body::Incoming>| async move {
                request.into_body().collect().await?;
                Ok::<_, hyper::Error>(http::Response::new(BODY.to_owned()))
            },
        );
        tokio::spawn(
            hyper::server::conn::http1::Builder::new()
                .serve_connection(hyper_util::rt::TokioIo::new(stream), service),
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_of_h2spec_gets_the_right_answer() {
    let proxy = Proxy::start();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster("up", listener.local_addr().unwrap(), "");
    tokio::spawn(upstream(listener));
    let mut wrong = Vec::new();
    for codec in ["AUTO", "HTTP2"] {
        let options = format!(
            "codec_type: {codec}, http2_protocol_options: {{max_concurrent_streams: {STREAMS}}}"
        );
        let address = proxy.listen(codec, &http(FORWARD, &options));
        for case in cases::all() {
            if let Err(error) = run(&case, address).await {
                wrong.push(format!("{codec}: {error}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    proxy.wait_for("http.t.downstream_cx_active", 0).await;
    proxy.wait_for("http.t.downstream_rq_active", 0).await;
}

#[test]
fn no_case_of_h2spec_is_missing() {
    let mut found: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for case in cases::all() {
        let (section, number) = case.number.rsplit_once('/').unwrap();
        found.entry(section).or_default().push(number);
    }
    for (section, count) in SECTIONS {
        let want: Vec<String> = (1..=count).map(|number| number.to_string()).collect();
        assert_eq!(found.remove(section).unwrap_or_default(), want, "{section}");
    }
    assert!(found.is_empty(), "{found:?}");
}
