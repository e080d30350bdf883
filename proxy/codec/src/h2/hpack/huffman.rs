//! The Huffman code of RFC 7541 Appendix B. The code is canonical, so the lengths say it all.

/// Bits of each symbol's code; the last one is the end of the string, which never occurs in one.
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28,
    28, 28, 28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5,
    5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6,
    6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22,
    23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22,
    21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20,
    22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19,
    21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22,
    22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
];

const LONGEST: usize = 30;
/// Codes up to this long are looked up at once: all printable ASCII but a dozen characters.
const FAST: u32 = 10;

struct Code {
    /// Each symbol's bits, right-aligned.
    bits: [u32; 256],
    /// By the next `FAST` bits: symbol, and length in the upper byte; 0 when the code is longer.
    fast: [u16; 1 << FAST],
    /// Symbols in the order of their codes.
    sorted: [u8; 256],
    /// Of each length: the first code that is too large for it, left-aligned to 32 bits.
    end: [u64; LONGEST + 1],
    /// Of each length: what to add to a code to get its place in `sorted`.
    shift: [i32; LONGEST + 1],
}

static CODE: Code = build();

const fn build() -> Code {
    let mut code = Code {
        bits: [0; 256],
        fast: [0; 1 << FAST],
        sorted: [0; 256],
        end: [0; LONGEST + 1],
        shift: [0; LONGEST + 1],
    };
    let mut next = 0u32;
    let mut place = 0usize;
    let mut length = 1;
    while length <= LONGEST {
        next <<= 1;
        code.shift[length] = place as i32 - next as i32;
        let mut symbol = 0;
        while symbol < 256 {
            if LENGTHS[symbol] as usize == length {
                code.bits[symbol] = next;
                code.sorted[place] = symbol as u8;
                if length as u32 <= FAST {
                    let spare = FAST - length as u32;
                    let first = (next as usize) << spare;
                    let mut at = first;
                    while at < first + (1 << spare) {
                        code.fast[at] = symbol as u16 | ((length as u16) << 8);
                        at += 1;
                    }
                }
                next += 1;
                place += 1;
            }
            symbol += 1;
        }
        code.end[length] = (next as u64) << (32 - length);
        length += 1;
    }
    code
}

/// Not a Huffman-coded string: the end symbol in it, or a wrong or too long padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// The most bytes that `coded` bytes can stand for.
pub(super) fn most(coded: usize) -> usize {
    coded * 8 / 5
}

/// Appends what `coded` stands for.
pub(super) fn decode(coded: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
    out.reserve(most(coded.len()));
    let mut rest = coded.iter();
    let mut window = 0u64; // the next bits, left-aligned
    let mut have = 0u32;
    loop {
        // Whole bytes until more than 56 bits are there.
        while have <= 56 {
            let Some(byte) = rest.next() else { break };
            window |= u64::from(*byte) << (56 - have);
            have += 8;
        }
        // Five codes of at most ten bits fit before the next refill.
        let mut round = 0;
        while round < 5 {
            let entry = CODE.fast[(window >> (64 - FAST)) as usize];
            let length = u32::from(entry >> 8);
            if length == 0 || length > have {
                break;
            }
            out.push(entry as u8);
            window <<= length;
            have -= length;
            round += 1;
        }
        if round > 0 {
            continue; // with as many bits as there are
        }
        if have < 8 && rest.len() == 0 {
            // RFC 7541 §5.2: padding is less than a byte of the end symbol's first bits.
            let ones = !(u64::MAX >> have);
            return if window == ones {
                Ok(())
            } else {
                Err(Malformed)
            };
        }
        if CODE.fast[(window >> (64 - FAST)) as usize] != 0 {
            return Err(Malformed); // a code that is cut
        }
        let top = window >> 32;
        let mut length = FAST as usize + 1;
        while length <= LONGEST && top >= CODE.end[length] {
            length += 1;
        }
        if length > LONGEST || length as u32 > have {
            return Err(Malformed);
        }
        let bits = (window >> (64 - length)) as i32;
        let place = bits + CODE.shift[length];
        match usize::try_from(place).ok().and_then(|p| CODE.sorted.get(p)) {
            Some(symbol) => out.push(*symbol),
            None => return Err(Malformed),
        }
        window <<= length;
        have -= length as u32;
    }
}

/// How many bytes `plain` takes when coded.
pub(super) fn coded_len(plain: &[u8]) -> usize {
    let bits: usize = plain
        .iter()
        .map(|byte| usize::from(LENGTHS[usize::from(*byte)]))
        .sum();
    bits.div_ceil(8)
}

/// Appends `plain`, coded.
pub(super) fn encode(plain: &[u8], out: &mut Vec<u8>) {
    let mut window = 0u64;
    let mut have = 0u32;
    for byte in plain {
        let length = u32::from(LENGTHS[usize::from(*byte)]);
        window = (window << length) | u64::from(CODE.bits[usize::from(*byte)]);
        have += length;
        while have >= 8 {
            have -= 8;
            out.push((window >> have) as u8);
        }
    }
    if have > 0 {
        let pad = 8 - have;
        out.push(((window << pad) as u8) | ((1u16 << pad) - 1) as u8);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decoded(coded: &[u8]) -> Result<Vec<u8>, Malformed> {
        let mut out = Vec::new();
        decode(coded, &mut out).map(|()| out)
    }

    #[test]
    fn the_code_is_complete() {
        // Kraft's sum: with the end symbol every string of bits is some code's beginning.
        let sum: u64 = LENGTHS.iter().map(|l| 1u64 << (32 - l)).sum();
        assert_eq!(sum, 1 << 32);
    }

    #[test]
    fn padding_is_the_beginning_of_the_end_symbol() {
        assert_eq!(decoded(&[0b0001_1111]), Ok(b"a".to_vec()));
        for wrong in [
            &[0b0001_1110][..],        // not ones
            &[0b0001_1111, 0xff],      // a whole byte
            &[0xff],                   // the same, alone
            &[0xff, 0xff, 0xff, 0xff], // the end symbol
            &[0xff, 0xff, 0xff, 0xfc], // and cut
            &[0xfe],                   // half a code
        ] {
            assert_eq!(decoded(wrong), Err(Malformed), "{wrong:x?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes(plain: Vec<u8>) {
            let mut coded = Vec::new();
            encode(&plain, &mut coded);
            prop_assert_eq!(coded.len(), coded_len(&plain));
            prop_assert!(plain.len() <= most(coded.len()));
            prop_assert_eq!(decoded(&coded), Ok(plain));
        }

        #[test]
        fn what_decodes_is_encoded_in_one_way_only(coded: Vec<u8>) {
            if let Ok(plain) = decoded(&coded) {
                let mut again = Vec::new();
                encode(&plain, &mut again);
                prop_assert_eq!(again, coded);
            }
        }
    }
}
