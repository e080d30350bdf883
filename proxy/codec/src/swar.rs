//! Eight bytes at a time in one register: a loop over bytes costs four times as much, and vectors need `unsafe`.

/// One in each byte.
pub(crate) const ONES: u64 = 0x0101_0101_0101_0101;
/// The highest bit of each byte.
pub(crate) const HIGH: u64 = 0x80 * ONES;
/// The other bits. A sum of two bytes without the highest bit does not carry into the next byte.
pub(crate) const LOW: u64 = !HIGH;

/// The highest bit of each byte that is less than `least` (at most 0x80), and of no other.
#[inline]
pub(crate) fn below(word: u64, least: u8) -> u64 {
    !((word & LOW) + (0x80 - u64::from(least)) * ONES) & !word & HIGH
}

/// The highest bit of each byte that is less than `least` (at most 0x80) or DEL, and of no other.
#[inline]
pub(crate) fn below_or_del(word: u64, least: u8) -> u64 {
    let low = word & LOW;
    (!(low + (0x80 - u64::from(least)) * ONES) | (low + ONES)) & !word & HIGH
}

/// The highest bit of each byte that is not `byte` (less than 0x80), and of no other.
#[inline]
pub(crate) fn differs(word: u64, byte: u8) -> u64 {
    let low = word & LOW;
    (((low ^ (u64::from(byte) * ONES)) + LOW) | word) & HIGH
}

/// Where the first byte is that is one of two (less than 0x80).
#[inline]
pub(crate) fn find_either(text: &[u8], one: u8, other: u8) -> Option<usize> {
    let mut rest = text;
    while let Some((word, behind)) = rest.split_first_chunk::<8>() {
        let word = u64::from_le_bytes(*word);
        let found = !(differs(word, one) & differs(word, other)) & HIGH;
        if found != 0 {
            return Some(text.len() - rest.len() + found.trailing_zeros() as usize / 8);
        }
        rest = behind;
    }
    let found = rest.iter().position(|b| *b == one || *b == other)?;
    Some(text.len() - rest.len() + found)
}

/// Whether `bad` finds something in any eight bytes. It finds nothing in letters.
#[inline]
pub(crate) fn any(text: &[u8], bad: impl Fn(u64) -> u64) -> bool {
    let Some(last) = text.last_chunk::<8>() else {
        let short = text.iter().fold(u64::from(b'a') * ONES, |word, byte| {
            (word << 8) | u64::from(*byte)
        });
        return bad(short) != 0;
    };
    // The last eight may be looked at twice.
    let (words, _) = text.as_chunks::<8>();
    words
        .iter()
        .fold(bad(u64::from_le_bytes(*last)), |found, word| {
            found | bad(u64::from_le_bytes(*word))
        })
        != 0
}

/// Whether there is a CR, LF or NUL, which would end a line or be no part of one.
#[inline]
pub(crate) fn breaks_line(text: &[u8]) -> bool {
    // Tabs, which values may have, are told from them by a second look.
    any(text, |word| below(word, b'\r' + 1))
        && text.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0))
}

/// Whether both are the same: words that overlap, and no call for what is short.
#[inline]
pub(crate) fn same(one: &[u8], other: &[u8]) -> bool {
    if one.len() != other.len() {
        return false;
    }
    if let (Some(one_end), Some(other_end)) = (one.last_chunk::<8>(), other.last_chunk::<8>()) {
        if one_end != other_end {
            return false;
        }
        if one.len() > 64 {
            return one == other;
        }
        let (one, _) = one.as_chunks::<8>();
        let (other, _) = other.as_chunks::<8>();
        return one.iter().zip(other).all(|(one, other)| one == other);
    }
    if let (Some(one_begin), Some(one_end), Some(other_begin), Some(other_end)) = (
        one.first_chunk::<4>(),
        one.last_chunk::<4>(),
        other.first_chunk::<4>(),
        other.last_chunk::<4>(),
    ) {
        return one_begin == other_begin && one_end == other_end;
    }
    one.iter().zip(other).all(|(one, other)| one == other)
}

/// Makes ASCII lower case.
#[inline]
pub(crate) fn make_lower(text: &mut [u8]) {
    each(text, |word| {
        let low = word & LOW;
        let from_a = low + (0x80 - u64::from(b'A')) * ONES;
        let above_z = low + (0x7f - u64::from(b'Z')) * ONES;
        word | ((from_a & !above_z & !word & HIGH) >> 2)
    });
}

/// Sets bit 5 of each byte: lower case of letters, digits and `-`.
#[inline]
pub(crate) fn set_bit_5(text: &mut [u8]) {
    each(text, |word| word | (0x20 * ONES));
}

/// Changes all words, of which some bytes may be changed twice.
#[inline]
fn each(text: &mut [u8], change: impl Fn(u64) -> u64) {
    let long = |bytes: &mut [u8; 8]| *bytes = change(u64::from_le_bytes(*bytes)).to_le_bytes();
    let short = |bytes: &mut [u8; 4]| {
        *bytes = (change(u32::from_le_bytes(*bytes).into()) as u32).to_le_bytes();
    };
    if let Some(end) = text.last_chunk_mut::<8>() {
        long(end);
        text.as_chunks_mut::<8>().0.iter_mut().for_each(long);
    } else if let Some(end) = text.last_chunk_mut::<4>() {
        short(end);
        text.as_chunks_mut::<4>().0.iter_mut().for_each(short);
    } else {
        for byte in text {
            *byte = change(u64::from(*byte)) as u8;
        }
    }
}

/// Whether all are of what hosts and ports mostly have: letters, digits, `-`, `.` and `:`.
#[inline]
pub(crate) fn is_plain_host(text: &[u8]) -> bool {
    !any(text, |word| {
        let low = word & LOW;
        let folded = low | (0x20 * ONES);
        let from_a = folded + (0x80 - u64::from(b'a')) * ONES;
        let above_z = folded + (0x7f - u64::from(b'z')) * ONES;
        let letter = from_a & !above_z;
        let from_dash = low + (0x80 - u64::from(b'-')) * ONES;
        let above_colon = low + (0x7f - u64::from(b':')) * ONES;
        let digit = from_dash & !above_colon & differs(word, b'/');
        (!(letter | digit) | word) & HIGH
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_judged_as_by_itself() {
        for byte in 0..=u8::MAX {
            for at in 0..8 {
                for filler in [b'a', 0, 0x7f, 0x80, 0xff, b' ', b'-'] {
                    let mut bytes = [filler; 8];
                    bytes[at] = byte;
                    let word = u64::from_le_bytes(bytes);
                    let is = |found: u64| found.to_le_bytes().map(|found| found == 0x80);
                    assert_eq!(
                        is(below_or_del(word, b' ')),
                        bytes.map(|b| b < b' ' || b == 0x7f)
                    );
                    assert_eq!(
                        is(below_or_del(word, b'!')),
                        bytes.map(|b| b <= b' ' || b == 0x7f)
                    );
                    assert_eq!(is(below(word, b'!')), bytes.map(|b| b <= b' '));
                    assert_eq!(is(differs(word, b'-')), bytes.map(|b| b != b'-'));
                }
            }
        }
    }

    #[test]
    fn any_looks_at_every_byte() {
        for len in 0..40 {
            let text = vec![b'x'; len];
            assert!(!any(&text, |word| below_or_del(word, b' ')));
            for at in 0..len {
                let mut text = text.clone();
                text[at] = 0;
                assert!(any(&text, |word| below_or_del(word, b' ')), "{text:?}");
            }
        }
    }

    #[test]
    fn either_is_found_where_it_first_is() {
        for len in 0..40 {
            let text = vec![b'x'; len];
            assert_eq!(find_either(&text, b'?', b'#'), None);
            for at in 0..len {
                for (first, then) in [(b'?', b'#'), (b'#', b'?'), (b'#', b'#'), (b'?', 0xff)] {
                    let mut text = text.clone();
                    text[at..].fill(then);
                    text[at] = first;
                    assert_eq!(find_either(&text, b'?', b'#'), Some(at));
                }
            }
        }
    }

    #[test]
    fn the_same_is_what_is_equal() {
        for len in 0..80 {
            let text: Vec<u8> = (0..len).collect();
            assert!(same(&text, &text.clone()));
            assert!(!same(&text, &[&text[..], b"x"].concat()));
            for at in 0..text.len() {
                let mut other = text.clone();
                other[at] ^= 0x80;
                assert!(!same(&text, &other));
            }
        }
    }

    #[test]
    fn a_plain_host_has_letters_digits_and_three_others() {
        for byte in 0..=u8::MAX {
            let plain = byte.is_ascii_alphanumeric() || b"-.:".contains(&byte);
            for text in [
                vec![byte],
                [b"a.b-c:12", &[byte][..]].concat(),
                vec![byte; 8],
            ] {
                assert_eq!(is_plain_host(&text), plain, "{text:?}");
            }
        }
        assert!(is_plain_host(b""));
    }

    #[test]
    fn lower_case_is_what_the_standard_library_says() {
        let all: Vec<u8> = (0..=u8::MAX).collect();
        for len in 0..40 {
            for at in 0..all.len() - len {
                let mut text = all[at..at + len].to_vec();
                make_lower(&mut text);
                assert_eq!(text, all[at..at + len].to_ascii_lowercase());
                let mut text = all[at..at + len].to_vec();
                set_bit_5(&mut text);
                assert!(
                    text.iter()
                        .zip(&all[at..])
                        .all(|(b, was)| *b == *was | 0x20)
                );
            }
        }
    }
}
