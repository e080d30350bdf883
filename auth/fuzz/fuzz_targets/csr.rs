//! Certificate requests, as PEM text and as the DER inside of it.
#![no_main]

use auth::Csr;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        // Whether it is refused does not matter here.
        drop(Csr::parse(text));
    }
    let pem = format!(
        "-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n",
        STANDARD.encode(data)
    );
    if let Ok(csr) = Csr::parse(&pem) {
        assert!(!csr.key_hash().is_empty());
    }
});
