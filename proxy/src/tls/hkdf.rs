//! HKDF with SHA-256 (RFC 5869), the key schedule's only tool: a TLS 1.3 handshake expands some thirty
//! secrets of one or two blocks each. A general HMAC allocates, copies and asks which hash it is for every
//! one of them, and keys itself anew, which costs four times what the hashing does.

use rustls::crypto::{
    hmac::Tag,
    tls13::{Hkdf, HkdfExpander, OkmBlock, OutputLengthError},
};
use sha2::{compress256, digest::generic_array::GenericArray};
use zeroize::Zeroize;

/// Bytes of a hash.
const HASH: usize = 32;
/// Bytes of a block.
const BLOCK: usize = 64;
/// FIPS 180-4 §5.3.3.
const INITIAL: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// HKDF with SHA-256.
#[derive(Debug)]
pub(super) struct HkdfSha256;

impl Hkdf for HkdfSha256 {
    fn extract_from_zero_ikm(&self, salt: Option<&[u8]>) -> Box<dyn HkdfExpander> {
        self.extract_from_secret(salt, &[0; HASH])
    }

    fn extract_from_secret(&self, salt: Option<&[u8]>, secret: &[u8]) -> Box<dyn HkdfExpander> {
        let mut prk = Key::new(salt.unwrap_or(&[0; HASH])).sign([secret]);
        let expander = Box::new(Key::new(&prk));
        prk.zeroize();
        expander
    }

    fn expander_for_okm(&self, okm: &OkmBlock) -> Box<dyn HkdfExpander> {
        Box::new(Key::new(okm.as_ref()))
    }

    fn hmac_sign(&self, key: &OkmBlock, message: &[u8]) -> Tag {
        Tag::new(&Key::new(key.as_ref()).sign([message]))
    }
}

/// A key of HMAC-SHA-256 (RFC 2104): what its two hashes have become after the blocks that the key makes.
struct Key {
    inner: [u32; 8],
    outer: [u32; 8],
}

impl Key {
    fn new(key: &[u8]) -> Key {
        let mut block = [0; BLOCK];
        if key.len() > BLOCK {
            let mut hash = Hash::new(INITIAL, 0);
            hash.update(key);
            block[..HASH].copy_from_slice(&hash.finish());
        } else {
            block[..key.len()].copy_from_slice(key);
        }
        let keyed = |pad: u8| {
            let mut state = INITIAL;
            let mut padded = block.map(|byte| byte ^ pad);
            compress(&mut state, &padded);
            padded.zeroize();
            state
        };
        let key = Key {
            inner: keyed(0x36),
            outer: keyed(0x5c),
        };
        block.zeroize();
        key
    }

    fn sign<'a>(&self, message: impl IntoIterator<Item = &'a [u8]>) -> [u8; HASH] {
        let mut inner = Hash::new(self.inner, BLOCK);
        for part in message {
            inner.update(part);
        }
        let mut outer = Hash::new(self.outer, BLOCK);
        outer.update(&inner.finish());
        outer.finish()
    }

    /// Fills `output`, at most 255 hashes long.
    fn expand(&self, info: &[&[u8]], output: &mut [u8]) {
        let mut last = [0; HASH];
        for (number, part) in (1..=u8::MAX).zip(output.chunks_mut(HASH)) {
            let before = if number == 1 { &[][..] } else { &last };
            let message = [before].into_iter().chain(info.iter().copied());
            last = self.sign(message.chain([&[number][..]]));
            part.copy_from_slice(&last[..part.len()]);
        }
        last.zeroize();
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.inner.zeroize();
        self.outer.zeroize();
    }
}

impl HkdfExpander for Key {
    fn expand_slice(&self, info: &[&[u8]], output: &mut [u8]) -> Result<(), OutputLengthError> {
        if output.len() > usize::from(u8::MAX) * HASH {
            return Err(OutputLengthError);
        }
        self.expand(info, output);
        Ok(())
    }

    fn expand_block(&self, info: &[&[u8]]) -> OkmBlock {
        let mut output = [0; HASH];
        self.expand(info, &mut output);
        let block = OkmBlock::new(&output);
        output.zeroize();
        block
    }

    fn hash_len(&self) -> usize {
        HASH
    }
}

/// A hash on its way.
struct Hash {
    state: [u32; 8],
    block: [u8; BLOCK],
    /// Bytes that went in, those still in `block` included.
    length: usize,
}

impl Hash {
    /// Goes on from a state that has seen `length` bytes, which are whole blocks.
    fn new(state: [u32; 8], length: usize) -> Hash {
        Hash {
            state,
            block: [0; BLOCK],
            length,
        }
    }

    fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let at = self.length % BLOCK;
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK - at));
            self.block[at..at + now.len()].copy_from_slice(now);
            self.length += now.len();
            if self.length.is_multiple_of(BLOCK) {
                compress(&mut self.state, &self.block);
            }
            bytes = later;
        }
    }

    /// FIPS 180-4 §5.1.1: a one, zeros, and the length in bits at the end of a block.
    fn finish(mut self) -> [u8; HASH] {
        const LENGTH: usize = size_of::<u64>();
        let bits = self.length as u64 * 8;
        let at = self.length % BLOCK;
        self.block[at] = 0x80;
        self.block[at + 1..].fill(0);
        if at >= BLOCK - LENGTH {
            compress(&mut self.state, &self.block);
            self.block.fill(0);
        }
        self.block[BLOCK - LENGTH..].copy_from_slice(&bits.to_be_bytes());
        compress(&mut self.state, &self.block);
        self.block.zeroize();
        let mut hash = [0; HASH];
        for (bytes, word) in hash.chunks_exact_mut(4).zip(self.state) {
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        hash
    }
}

fn compress(state: &mut [u32; 8], block: &[u8; BLOCK]) {
    compress256(state, std::slice::from_ref(GenericArray::from_slice(block)));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;

    use super::*;

    fn theirs() -> &'static dyn Hkdf {
        TLS13_AES_128_GCM_SHA256.tls13().unwrap().hkdf_provider
    }

    /// RFC 5869 §A.1, and §A.3 without salt.
    #[test]
    fn as_the_rfc_has_it() {
        let mut output = [0; 42];
        let salt: Vec<u8> = (0..=0x0c).collect();
        let info: Vec<u8> = (0xf0..=0xf9).collect();
        HkdfSha256
            .extract_from_secret(Some(&salt), &[0x0b; 22])
            .expand_slice(&[&info[..3], &info[3..]], &mut output)
            .unwrap();
        assert_eq!(
            super::super::peer::hex(&output),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
        );
        HkdfSha256
            .extract_from_secret(None, &[0x0b; 22])
            .expand_slice(&[], &mut output)
            .unwrap();
        assert_eq!(
            super::super::peer::hex(&output),
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
        );
        let mut long = vec![0; 255 * HASH + 1];
        let expander = HkdfSha256.extract_from_zero_ikm(None);
        expander.expand_slice(&[], &mut long).unwrap_err();
        expander.expand_slice(&[], &mut long[1..]).unwrap();
    }

    proptest! {
        #[test]
        fn as_aws_lc_has_it(
            salt in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..200)),
            secret in proptest::collection::vec(any::<u8>(), 1..200),
            info in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..80), 0..5),
            length in 1..200_usize,
        ) {
            let info: Vec<&[u8]> = info.iter().map(Vec::as_slice).collect();
            let both = [&HkdfSha256 as &dyn Hkdf, theirs()].map(|hkdf| {
                let expander = hkdf.extract_from_secret(salt.as_deref(), &secret);
                let mut output = vec![0; length];
                expander.expand_slice(&info, &mut output).unwrap();
                let block = expander.expand_block(&info);
                let again = hkdf.expander_for_okm(&block).expand_block(&info);
                let zero = hkdf.extract_from_zero_ikm(salt.as_deref()).expand_block(&[]);
                let tag = hkdf.hmac_sign(&block, &secret);
                (output, again.as_ref().to_vec(), zero.as_ref().to_vec(), tag.as_ref().to_vec())
            });
            prop_assert_eq!(&both[0], &both[1]);
        }
    }
}
