//! The cases, in h2spec's order: its groups `generic` and `hpack` here, `http2` beside. Blocks of headers are written
//! out, so that no encoder of ours stands between.

mod http2;

use super::{
    CANCEL, COMPRESSION_ERROR, CONTINUATION, Case, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS,
    PADDED, PREFACE, PRIORITIZED, PRIORITY, RST_STREAM, SETTINGS, Step, WHOLE, WINDOW_UPDATE,
    frame,
};
use Step::{Alive, Answered, Data, GoAway, Send, SettingsAck};

/// `GET http://a/`: entries 2, 6 and 4 of the static table, and the authority as a literal that is not indexed.
const GET: &[u8] = b"\x82\x86\x84\x01\x01a";
/// The same of a POST.
const POST: &[u8] = b"\x83\x86\x84\x01\x01a";
/// `x: y`
const FIELD: &[u8] = b"\x00\x01x\x01y";
/// No stream, the usual weight.
const NO_DEPENDENCY: [u8; 5] = [0, 0, 0, 0, 15];

/// A header that is not indexed, without Huffman coding.
fn field(name: &str, value: &str) -> Vec<u8> {
    let mut block = vec![0];
    for text in [name, value] {
        assert!(text.len() < 127);
        block.push(u8::try_from(text.len()).unwrap());
        block.extend_from_slice(text.as_bytes());
    }
    block
}

/// GET with more at the end of its block.
fn get_and(more: &[u8]) -> Vec<u8> {
    [GET, more].concat()
}

/// A whole GET on stream 1.
fn get() -> Vec<u8> {
    frame(HEADERS, WHOLE, 1, GET)
}

/// A whole request on stream 1 with this block.
fn whole(block: &[u8]) -> Vec<u8> {
    frame(HEADERS, WHOLE, 1, block)
}

/// A POST on stream 1 whose body is to come.
fn post() -> Vec<u8> {
    frame(HEADERS, END_HEADERS, 1, POST)
}

fn setting(number: u8, value: u32) -> Vec<u8> {
    let entry = [&[0, number][..], &value.to_be_bytes()].concat();
    frame(SETTINGS, 0, 0, &entry)
}

fn initial_window(value: u32) -> Vec<u8> {
    setting(4, value)
}

fn update(id: u32, more: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, id, &more.to_be_bytes())
}

fn reset(id: u32, code: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, id, &code.to_be_bytes())
}

fn case(number: &'static str, what: &'static str, steps: Vec<Step>) -> Case {
    Case {
        number,
        what,
        greeted: true,
        steps,
    }
}

/// Some frames in one write, and what must come of them.
fn sent<const N: usize>(
    number: &'static str,
    what: &'static str,
    frames: [Vec<u8>; N],
    then: Step,
) -> Case {
    case(number, what, vec![Send(frames.concat()), then])
}

/// Something after a stream has ended on both sides.
fn after_end(number: &'static str, what: &'static str, late: Vec<u8>, then: Step) -> Case {
    case(
        number,
        what,
        vec![Send(get()), Answered(1), Send(late), then],
    )
}

pub(super) fn all() -> Vec<Case> {
    [generic(), http2::all(), hpack()]
        .into_iter()
        .flatten()
        .collect()
}

fn generic() -> Vec<Case> {
    let priority = |id, payload: [u8; 5]| frame(PRIORITY, 0, id, &payload);
    let hello = || [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    let closed_window = || initial_window(0);
    // RFC 7541 appendix C: `cache-control` is entry 24, `custom-key` and both values in Huffman code.
    const NO_CACHE: &[u8] = b"\x08no-cache";
    const NO_CACHE_CODED: &[u8] = b"\x86\xa8\xeb\x10\x64\x9c\xbf";
    const CUSTOM: &[u8] = b"\x0acustom-key\x0ccustom-value";
    const CUSTOM_CODED: &[u8] =
        b"\x88\x25\xa8\x49\xe9\x5b\xa9\x7d\x7f\x89\x25\xa8\x49\xe9\x5b\xb8\xe8\xb4\xbf";
    let literal = |number, what, lead: &[u8], rest: &[u8]| {
        sent(
            number,
            what,
            [whole(&[GET, lead, rest].concat())],
            Answered(1),
        )
    };
    vec![
        Case {
            greeted: false,
            ..sent(
                "generic/1/1",
                "the client's preface",
                [hello()],
                SettingsAck,
            )
        },
        sent(
            "generic/2/1",
            "PRIORITY on an idle stream",
            [priority(1, NO_DEPENDENCY)],
            Alive,
        ),
        sent(
            "generic/2/2",
            "WINDOW_UPDATE on a half-closed stream",
            [closed_window(), get(), update(1, 1)],
            Data(1),
        ),
        sent(
            "generic/2/3",
            "PRIORITY on a half-closed stream",
            [
                closed_window(),
                get(),
                priority(1, NO_DEPENDENCY),
                update(1, 1),
            ],
            Data(1),
        ),
        sent(
            "generic/2/4",
            "RST_STREAM on a half-closed stream",
            [get(), reset(1, CANCEL)],
            Alive,
        ),
        after_end(
            "generic/2/5",
            "PRIORITY on a closed stream",
            priority(1, NO_DEPENDENCY),
            Alive,
        ),
        sent(
            "generic/3.1/1",
            "DATA",
            [post(), frame(DATA, END_STREAM, 1, b"test")],
            Answered(1),
        ),
        sent(
            "generic/3.1/2",
            "several DATA frames",
            [
                post(),
                frame(DATA, 0, 1, b"test"),
                frame(DATA, END_STREAM, 1, b"test"),
            ],
            Answered(1),
        ),
        sent(
            "generic/3.1/3",
            "DATA with padding",
            [
                post(),
                frame(DATA, END_STREAM | PADDED, 1, b"\x06test\0\0\0\0\0\0"),
            ],
            Answered(1),
        ),
        sent("generic/3.2/1", "HEADERS", [get()], Answered(1)),
        sent(
            "generic/3.2/2",
            "HEADERS with padding",
            [frame(
                HEADERS,
                WHOLE | PADDED,
                1,
                &[b"\x03", GET, b"\0\0\0"].concat(),
            )],
            Answered(1),
        ),
        sent(
            "generic/3.2/3",
            "HEADERS with a priority",
            [frame(
                HEADERS,
                WHOLE | PRIORITIZED,
                1,
                &[&NO_DEPENDENCY, GET].concat(),
            )],
            Answered(1),
        ),
        sent(
            "generic/3.3/1",
            "priority 1",
            [priority(1, [0; 5]), get()],
            Answered(1),
        ),
        sent(
            "generic/3.3/2",
            "priority 256",
            [priority(1, [0, 0, 0, 0, 255]), get()],
            Answered(1),
        ),
        sent(
            "generic/3.3/3",
            "a priority that depends on a stream",
            [priority(3, [0, 0, 0, 1, 0]), get()],
            Answered(1),
        ),
        sent(
            "generic/3.3/4",
            "an exclusive priority",
            [priority(1, [128, 0, 0, 0, 0]), get()],
            Answered(1),
        ),
        sent(
            "generic/3.3/5",
            "a priority of a higher stream that is idle",
            [priority(3, NO_DEPENDENCY), get()],
            Answered(1),
        ),
        sent(
            "generic/3.4/1",
            "RST_STREAM",
            [post(), reset(1, CANCEL)],
            Alive,
        ),
        sent("generic/3.5/1", "SETTINGS", [setting(3, 100)], SettingsAck),
        sent("generic/3.7/1", "PING", [], Alive),
        // It says that the client takes no streams of ours, and no more than that.
        case(
            "generic/3.8/1",
            "GOAWAY",
            vec![
                Send(frame(GOAWAY, 0, 0, &[0; 8])),
                Alive,
                Send(get()),
                Answered(1),
            ],
        ),
        sent(
            "generic/3.9/1",
            "WINDOW_UPDATE of the connection",
            [update(0, 1)],
            Alive,
        ),
        sent(
            "generic/3.9/2",
            "WINDOW_UPDATE of a stream",
            [post(), update(1, 1)],
            Alive,
        ),
        sent(
            "generic/3.10/1",
            "CONTINUATION",
            [
                frame(HEADERS, END_STREAM, 1, GET),
                frame(CONTINUATION, END_HEADERS, 1, FIELD),
            ],
            Answered(1),
        ),
        sent(
            "generic/3.10/2",
            "several CONTINUATION frames",
            [
                frame(HEADERS, END_STREAM, 1, GET),
                frame(CONTINUATION, 0, 1, FIELD),
                frame(CONTINUATION, END_HEADERS, 1, FIELD),
            ],
            Answered(1),
        ),
        sent("generic/4/1", "GET", [get()], Answered(1)),
        sent(
            "generic/4/2",
            "HEAD",
            [whole(&[&field(":method", "HEAD"), &GET[1..]].concat())],
            Answered(1),
        ),
        sent(
            "generic/4/3",
            "POST",
            [post(), frame(DATA, END_STREAM, 1, b"test")],
            Answered(1),
        ),
        sent(
            "generic/4/4",
            "POST with trailers",
            [post(), frame(DATA, 0, 1, b"test"), whole(FIELD)],
            Answered(1),
        ),
        // Entry 58 is `user-agent` without a value.
        sent(
            "generic/5/1",
            "an indexed field",
            [whole(&get_and(b"\xba"))],
            Answered(1),
        ),
        literal("generic/5/2", "indexing, a known name", b"\x58", NO_CACHE),
        literal(
            "generic/5/3",
            "indexing, a known name, coded",
            b"\x58",
            NO_CACHE_CODED,
        ),
        literal("generic/5/4", "indexing, a new name", b"\x40", CUSTOM),
        literal(
            "generic/5/5",
            "indexing, a new name, coded",
            b"\x40",
            CUSTOM_CODED,
        ),
        literal(
            "generic/5/6",
            "no indexing, a known name",
            b"\x0f\x09",
            NO_CACHE,
        ),
        literal(
            "generic/5/7",
            "no indexing, a known name, coded",
            b"\x0f\x09",
            NO_CACHE_CODED,
        ),
        literal("generic/5/8", "no indexing, a new name", b"\x00", CUSTOM),
        literal(
            "generic/5/9",
            "no indexing, a new name, coded",
            b"\x00",
            CUSTOM_CODED,
        ),
        literal(
            "generic/5/10",
            "never indexed, a known name",
            b"\x1f\x09",
            NO_CACHE,
        ),
        literal(
            "generic/5/11",
            "never indexed, a known name, coded",
            b"\x1f\x09",
            NO_CACHE_CODED,
        ),
        literal("generic/5/12", "never indexed, a new name", b"\x10", CUSTOM),
        literal(
            "generic/5/13",
            "never indexed, a new name, coded",
            b"\x10",
            CUSTOM_CODED,
        ),
        sent(
            "generic/5/14",
            "a new table size",
            [whole(&[b"\x20", GET].concat())],
            Answered(1),
        ),
        sent(
            "generic/5/15",
            "several new table sizes",
            // 0 and 4096
            [whole(&[b"\x20\x3f\xe1\x1f", GET].concat())],
            Answered(1),
        ),
    ]
}

fn hpack() -> Vec<Case> {
    let broken = |number, what, more: &[u8]| {
        sent(
            number,
            what,
            [whole(&get_and(more))],
            GoAway(COMPRESSION_ERROR),
        )
    };
    vec![
        // 70, where the table ends at 61
        broken("hpack/2.3.3/1", "an index that is not there", b"\xc6"),
        broken(
            "hpack/2.3.3/2",
            "a name that is not there",
            b"\x7f\x07\x01y",
        ),
        broken("hpack/4.2/1", "a table size at the end", b"\x20"),
        // `x: ` and an `a` (00011) whose padding is another byte, zeros, or the end of string.
        broken(
            "hpack/5.2/1",
            "padding of more than 7 bits",
            b"\x00\x01x\x82\x1f\xff",
        ),
        broken("hpack/5.2/2", "padding of zeros", b"\x00\x01x\x81\x18"),
        broken(
            "hpack/5.2/3",
            "the end of string",
            b"\x00\x01x\x84\xff\xff\xff\xff",
        ),
        broken("hpack/6.1/1", "index 0", b"\x80"),
        sent(
            "hpack/6.3/1",
            "a table size above the limit",
            // 8192
            [whole(&[b"\x3f\xe1\x3f", GET].concat())],
            GoAway(COMPRESSION_ERROR),
        ),
    ]
}
