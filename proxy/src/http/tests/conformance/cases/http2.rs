//! h2spec's group `http2`: sections of RFC 7540, in its order. RFC 9113 has moved some of them; the rules are the same.

use super::{
    super::{
        ACK, CANCEL, COMPRESSION_ERROR, CONTINUATION, Case, DATA, END_HEADERS, END_STREAM,
        FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, GOAWAY, HEADERS, PADDED, PING, PREFACE, PRIORITIZED,
        PRIORITY, PROTOCOL_ERROR, PUSH_PROMISE, REFUSED_STREAM, RST_STREAM, SETTINGS,
        STREAM_CLOSED, STREAMS, Step, WHOLE, WINDOW_UPDATE, frame,
    },
    FIELD, GET, NO_DEPENDENCY, POST, after_end, case, field, get, get_and, initial_window, post,
    reset, sent, setting, update, whole,
};
use Step::{Alive, Answered, Closed, Data, GoAway, Reset, Send, SettingsAck};

/// The largest frame of a peer that was not told otherwise.
const LARGEST: usize = 16_384;

pub(super) fn all() -> Vec<Case> {
    [frames(), streams(), definitions(), windows(), messages()]
        .into_iter()
        .flatten()
        .collect()
}

/// Sections 3 and 4: the preface, frames, blocks of headers.
fn frames() -> Vec<Case> {
    let part = || frame(HEADERS, END_STREAM, 1, GET);
    vec![
        Case {
            greeted: false,
            ..sent(
                "http2/3.5/1",
                "the preface",
                [PREFACE.to_vec(), frame(SETTINGS, 0, 0, &[])],
                SettingsAck,
            )
        },
        Case {
            greeted: false,
            ..sent(
                "http2/3.5/2",
                "another preface",
                [b"NO PREFACE AT ALL\r\n\r\n".to_vec()],
                Closed,
            )
        },
        sent(
            "http2/4.1/1",
            "an unknown type",
            [frame(0xff, 0, 0, b"12345678")],
            Alive,
        ),
        case(
            "http2/4.1/2",
            "undefined flags",
            vec![Send(frame(SETTINGS, 0xfe, 0, &[])), SettingsAck, Alive],
        ),
        case(
            "http2/4.1/3",
            "the reserved bit",
            vec![Send(frame(SETTINGS, 0, 1 << 31, &[])), SettingsAck, Alive],
        ),
        sent(
            "http2/4.2/1",
            "DATA as large as may be",
            [post(), frame(DATA, END_STREAM, 1, &[0; LARGEST])],
            Answered(1),
        ),
        sent(
            "http2/4.2/2",
            "DATA that is too large",
            [post(), frame(DATA, END_STREAM, 1, &[0; LARGEST + 1])],
            GoAway(FRAME_SIZE_ERROR),
        ),
        sent(
            "http2/4.2/3",
            "HEADERS that are too large",
            [whole(&get_and(&FIELD.repeat(LARGEST / FIELD.len())))],
            GoAway(FRAME_SIZE_ERROR),
        ),
        sent(
            "http2/4.3/1",
            "a block cut short",
            [whole(b"\x40")],
            GoAway(COMPRESSION_ERROR),
        ),
        sent(
            "http2/4.3/2",
            "PRIORITY within a block",
            [part(), frame(PRIORITY, 0, 1, &NO_DEPENDENCY)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/4.3/3",
            "HEADERS of another stream within a block",
            [part(), frame(HEADERS, WHOLE, 3, GET)],
            GoAway(PROTOCOL_ERROR),
        ),
    ]
}

/// Section 5: streams.
fn streams() -> Vec<Case> {
    let data = || frame(DATA, END_STREAM, 1, b"test");
    let more = || frame(CONTINUATION, END_HEADERS, 1, FIELD);
    let itself = [0, 0, 0, 1, 15];
    let mut many: Vec<u8> = (0..STREAMS)
        .flat_map(|number| frame(HEADERS, END_HEADERS, 2 * number + 1, POST))
        .collect();
    many.extend(frame(HEADERS, END_HEADERS, 2 * STREAMS + 1, POST));
    vec![
        sent(
            "http2/5.1/1",
            "idle: DATA",
            [data()],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/5.1/2",
            "idle: RST_STREAM",
            [reset(1, CANCEL)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/5.1/3",
            "idle: WINDOW_UPDATE",
            [update(1, 100)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/5.1/4",
            "idle: CONTINUATION",
            [more()],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/5.1/5",
            "half-closed: DATA",
            [get(), data()],
            Reset(1, STREAM_CLOSED),
        ),
        sent(
            "http2/5.1/6",
            "half-closed: HEADERS",
            [get(), get()],
            Reset(1, STREAM_CLOSED),
        ),
        sent(
            "http2/5.1/7",
            "half-closed: CONTINUATION",
            [get(), more()],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/5.1/8",
            "DATA after RST_STREAM",
            [post(), reset(1, CANCEL), data()],
            GoAway(STREAM_CLOSED),
        ),
        sent(
            "http2/5.1/9",
            "HEADERS after RST_STREAM",
            [post(), reset(1, CANCEL), get()],
            GoAway(STREAM_CLOSED),
        ),
        sent(
            "http2/5.1/10",
            "CONTINUATION after RST_STREAM",
            [post(), reset(1, CANCEL), more()],
            GoAway(PROTOCOL_ERROR),
        ),
        after_end(
            "http2/5.1/11",
            "closed: DATA",
            data(),
            GoAway(STREAM_CLOSED),
        ),
        after_end(
            "http2/5.1/12",
            "closed: HEADERS",
            get(),
            GoAway(STREAM_CLOSED),
        ),
        after_end(
            "http2/5.1/13",
            "closed: CONTINUATION",
            more(),
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/5.1.1/1",
            "an even stream",
            [frame(HEADERS, WHOLE, 2, GET)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/5.1.1/2",
            "a stream below the last one",
            [frame(HEADERS, WHOLE, 5, GET), frame(HEADERS, WHOLE, 3, GET)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/5.1.2/1",
            "more streams than may be",
            [many],
            Reset(2 * STREAMS + 1, REFUSED_STREAM),
        ),
        sent(
            "http2/5.3.1/1",
            "HEADERS that depend on themselves",
            [frame(
                HEADERS,
                WHOLE | PRIORITIZED,
                1,
                &[&itself, GET].concat(),
            )],
            Reset(1, PROTOCOL_ERROR),
        ),
        sent(
            "http2/5.3.1/2",
            "PRIORITY that depends on itself",
            [frame(PRIORITY, 0, 1, &itself)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/5.4.1/1",
            "the end after an error",
            [frame(PING, 0, 3, &[0; 8])],
            Closed,
        ),
        sent(
            "http2/5.4.1/2",
            "GOAWAY for an error",
            [frame(PING, 0, 3, &[0; 8])],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/5.5/1",
            "an extension",
            [frame(0x16, 0, 0, b"12345678")],
            Alive,
        ),
        sent(
            "http2/5.5/2",
            "an extension within a block",
            [
                frame(HEADERS, END_STREAM, 1, GET),
                frame(0x16, 0, 0, b"12345678"),
            ],
            GoAway(PROTOCOL_ERROR),
        ),
    ]
}

/// Section 6 up to 6.8: what each type of frame asks for.
fn definitions() -> Vec<Case> {
    let part = || frame(HEADERS, END_STREAM, 1, GET);
    vec![
        sent(
            "http2/6.1/1",
            "DATA on stream 0",
            [frame(DATA, 1, 0, b"x")],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.1/2",
            "DATA on a stream that is not open",
            [get(), frame(DATA, END_STREAM, 1, b"test")],
            Reset(1, STREAM_CLOSED),
        ),
        sent(
            "http2/6.1/3",
            "DATA with more padding than it holds",
            [post(), frame(DATA, END_STREAM | PADDED, 1, b"\x06test\0")],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.2/1",
            "HEADERS that do not end, and PRIORITY",
            [part(), frame(PRIORITY, 0, 1, &NO_DEPENDENCY)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.2/2",
            "HEADERS that do not end, and HEADERS of another stream",
            [part(), frame(HEADERS, WHOLE, 3, GET)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.2/3",
            "HEADERS on stream 0",
            [frame(HEADERS, WHOLE, 0, GET)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.2/4",
            "HEADERS with more padding than they hold",
            [frame(HEADERS, WHOLE | PADDED, 1, &[b"\x20", GET].concat())],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.3/1",
            "PRIORITY on stream 0",
            [frame(PRIORITY, 0, 0, &NO_DEPENDENCY)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.3/2",
            "PRIORITY of another size",
            [post(), frame(PRIORITY, 0, 1, &[0; 4])],
            Reset(1, FRAME_SIZE_ERROR),
        ),
        sent(
            "http2/6.4/1",
            "RST_STREAM on stream 0",
            [reset(0, CANCEL)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.4/2",
            "RST_STREAM, idle",
            [reset(1, CANCEL)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.4/3",
            "RST_STREAM of another size",
            [post(), frame(RST_STREAM, 0, 1, &[0; 3])],
            GoAway(FRAME_SIZE_ERROR),
        ),
        sent(
            "http2/6.5/1",
            "an answer to SETTINGS that says something",
            [frame(SETTINGS, ACK, 0, &[0; 6])],
            GoAway(FRAME_SIZE_ERROR),
        ),
        sent(
            "http2/6.5/2",
            "SETTINGS of a stream",
            [frame(SETTINGS, 0, 1, &[0, 3, 0, 0, 0, 100])],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.5/3",
            "SETTINGS of another size",
            [frame(SETTINGS, 0, 0, &[0, 3, 0])],
            GoAway(FRAME_SIZE_ERROR),
        ),
        sent(
            "http2/6.5.2/1",
            "ENABLE_PUSH 2",
            [setting(2, 2)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.5.2/2",
            "INITIAL_WINDOW_SIZE 2³¹",
            [initial_window(1 << 31)],
            GoAway(FLOW_CONTROL_ERROR),
        ),
        sent(
            "http2/6.5.2/3",
            "MAX_FRAME_SIZE 16383",
            [setting(5, 16_383)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.5.2/4",
            "MAX_FRAME_SIZE 2²⁴",
            [setting(5, 1 << 24)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.5.2/5",
            "an unknown setting",
            [setting(0xff, 1)],
            Alive,
        ),
        sent(
            "http2/6.5.3/1",
            "the last value of several counts",
            [
                frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 100, 0, 4, 0, 0, 0, 1]),
                get(),
            ],
            Data(1),
        ),
        sent(
            "http2/6.5.3/2",
            "SETTINGS are answered",
            [frame(SETTINGS, 0, 0, &[])],
            SettingsAck,
        ),
        sent("http2/6.7/1", "PING is answered", [], Alive),
        sent(
            "http2/6.7/2",
            "an answer is not",
            [frame(PING, ACK, 0, b"an echo?")],
            Alive,
        ),
        sent(
            "http2/6.7/3",
            "PING of a stream",
            [frame(PING, 0, 1, &[0; 8])],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.7/4",
            "PING of another size",
            [frame(PING, 0, 0, &[0; 6])],
            GoAway(FRAME_SIZE_ERROR),
        ),
        sent(
            "http2/6.8/1",
            "GOAWAY of a stream",
            [frame(GOAWAY, 0, 1, &[0; 8])],
            GoAway(PROTOCOL_ERROR),
        ),
    ]
}

/// Sections 6.9, 6.10 and 7: flow control, CONTINUATION, error codes.
fn windows() -> Vec<Case> {
    const MOST: u32 = (1 << 31) - 1;
    let part = |flags| frame(HEADERS, flags, 1, GET);
    let more = |flags, id| frame(CONTINUATION, flags, id, FIELD);
    vec![
        sent(
            "http2/6.9/1",
            "no increment",
            [update(0, 0)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.9/2",
            "no increment of a stream",
            [post(), update(1, 0)],
            Reset(1, PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.9/3",
            "WINDOW_UPDATE of another size",
            [frame(WINDOW_UPDATE, 0, 0, &[0, 0, 1])],
            GoAway(FRAME_SIZE_ERROR),
        ),
        sent(
            "http2/6.9.1/1",
            "a window of 1",
            [initial_window(1), get()],
            Data(1),
        ),
        sent(
            "http2/6.9.1/2",
            "a window of the connection that is too large",
            [update(0, MOST), update(0, MOST)],
            GoAway(FLOW_CONTROL_ERROR),
        ),
        sent(
            "http2/6.9.1/3",
            "a window of a stream that is too large",
            [post(), update(1, MOST), update(1, MOST)],
            Reset(1, FLOW_CONTROL_ERROR),
        ),
        case(
            "http2/6.9.2/1",
            "windows of open streams follow",
            vec![
                Send([initial_window(0), get()].concat()),
                SettingsAck,
                Send(initial_window(1)),
                SettingsAck,
                Data(1),
            ],
        ),
        case(
            "http2/6.9.2/2",
            "a window may be negative",
            vec![
                Send([initial_window(3), get()].concat()),
                SettingsAck,
                Data(3),
                Send(initial_window(2)),
                SettingsAck,
                Send(update(1, 2)),
                Data(1),
            ],
        ),
        sent(
            "http2/6.9.2/3",
            "an initial window that is too large",
            [initial_window(1 << 31)],
            GoAway(FLOW_CONTROL_ERROR),
        ),
        sent(
            "http2/6.10/1",
            "several CONTINUATION frames",
            [part(END_STREAM), more(0, 1), more(END_HEADERS, 1)],
            Answered(1),
        ),
        sent(
            "http2/6.10/2",
            "CONTINUATION, then another frame",
            [part(0), more(0, 1), frame(DATA, END_STREAM, 1, b"test")],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.10/3",
            "CONTINUATION on stream 0",
            [part(END_STREAM), more(END_HEADERS, 0)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.10/4",
            "CONTINUATION of HEADERS that have ended",
            [part(WHOLE), more(END_HEADERS, 1)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.10/5",
            "CONTINUATION of one that has ended",
            [part(END_STREAM), more(END_HEADERS, 1), more(END_HEADERS, 1)],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/6.10/6",
            "CONTINUATION of DATA",
            [
                part(0),
                frame(DATA, END_STREAM, 1, b"test"),
                more(END_HEADERS, 1),
            ],
            GoAway(PROTOCOL_ERROR),
        ),
        sent(
            "http2/7/1",
            "GOAWAY with an unknown code",
            [frame(GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 255])],
            Alive,
        ),
        sent(
            "http2/7/2",
            "RST_STREAM with an unknown code",
            [post(), reset(1, 255)],
            Alive,
        ),
    ]
}

/// Section 8: messages.
fn messages() -> Vec<Case> {
    // As Envoy, unless it is told otherwise: a malformed message ends the connection, without a word.
    let malformed = |number, what, block: Vec<u8>| sent(number, what, [whole(&block)], Closed);
    let with = |name, value| get_and(&field(name, value));
    let long = || {
        frame(
            HEADERS,
            END_HEADERS,
            1,
            &[POST, &field("content-length", "1")].concat(),
        )
    };
    vec![
        sent(
            "http2/8.1/1",
            "a second HEADERS that does not end",
            [post(), frame(HEADERS, END_HEADERS, 1, FIELD)],
            Closed,
        ),
        malformed("http2/8.1.2/1", "an upper-case name", with("X-TEST", "ok")),
        malformed(
            "http2/8.1.2.1/1",
            "an unknown pseudo header",
            with(":test", "ok"),
        ),
        malformed(
            "http2/8.1.2.1/2",
            "a response's pseudo header",
            with(":status", "200"),
        ),
        sent(
            "http2/8.1.2.1/3",
            "a pseudo header in trailers",
            [post(), whole(&field(":method", "200"))],
            Closed,
        ),
        malformed(
            "http2/8.1.2.1/4",
            "a pseudo header after another one",
            [&GET[..2], FIELD, &GET[2..]].concat(),
        ),
        malformed(
            "http2/8.1.2.2/1",
            "a header of the connection",
            with("connection", "close"),
        ),
        malformed(
            "http2/8.1.2.2/2",
            "te other than trailers",
            with("te", "trailers, deflate"),
        ),
        malformed(
            "http2/8.1.2.3/1",
            "an empty path",
            [b"\x82\x86", &field(":path", "")[..], &GET[3..]].concat(),
        ),
        malformed("http2/8.1.2.3/2", "no method", GET[1..].to_vec()),
        malformed(
            "http2/8.1.2.3/3",
            "no scheme",
            [b"\x82", &GET[2..]].concat(),
        ),
        malformed(
            "http2/8.1.2.3/4",
            "no path",
            [b"\x82\x86", &GET[3..]].concat(),
        ),
        malformed("http2/8.1.2.3/5", "two methods", [b"\x82", GET].concat()),
        malformed("http2/8.1.2.3/6", "two schemes", [b"\x86", GET].concat()),
        malformed("http2/8.1.2.3/7", "two paths", [b"\x84", GET].concat()),
        sent(
            "http2/8.1.2.6/1",
            "a body of another length than was said",
            [long(), frame(DATA, END_STREAM, 1, b"test")],
            Reset(1, PROTOCOL_ERROR),
        ),
        sent(
            "http2/8.1.2.6/2",
            "a body in pieces of another length than was said",
            [
                long(),
                frame(DATA, 0, 1, b"test"),
                frame(DATA, END_STREAM, 1, b"test"),
            ],
            Reset(1, PROTOCOL_ERROR),
        ),
        sent(
            "http2/8.2/1",
            "PUSH_PROMISE",
            [frame(
                PUSH_PROMISE,
                END_HEADERS,
                1,
                &[&[0, 0, 0, 3][..], GET].concat(),
            )],
            GoAway(PROTOCOL_ERROR),
        ),
    ]
}
