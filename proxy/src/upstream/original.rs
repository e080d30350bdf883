//! Where an ORIGINAL_DST cluster's connections go: to what the client had meant, or what a header names.

use std::net::SocketAddr;

use super::Pick;
use crate::head::Name;

/// The host of a request or connection; `None` if nothing tells. `invalid` is called for a header that is no
/// address: then, as in Envoy, the connection's own destination is used, as without the header.
pub(super) fn address(
    pick: &Pick<'_>,
    header: Option<&Name>,
    port: Option<u16>,
    invalid: impl FnOnce(),
) -> Option<SocketAddr> {
    let named = header.and_then(|name| pick.headers?.get(name));
    let parsed = named.map(|text| std::str::from_utf8(text).ok()?.trim().parse().ok());
    if parsed == Some(None) {
        invalid();
    }
    let mut address: SocketAddr = parsed.flatten().or(pick.original)?;
    if let Some(port) = port {
        address.set_port(port);
    }
    Some(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::Headers;

    #[test]
    fn the_header_wins_if_it_is_an_address() {
        let name = Name::new("x-envoy-original-dst-host");
        let meant: SocketAddr = "10.0.0.1:80".parse().unwrap();
        for (header, original, port, want, invalid) in [
            (None, Some(meant), None, Some("10.0.0.1:80"), 0),
            (None, Some(meant), Some(8080), Some("10.0.0.1:8080"), 0),
            (None, None, None, None, 0),
            (
                Some("10.9.9.9:81"),
                Some(meant),
                None,
                Some("10.9.9.9:81"),
                0,
            ),
            (Some("[fd00::9]:81"), None, Some(1), Some("[fd00::9]:1"), 0),
            (
                Some("example.com:81"),
                Some(meant),
                None,
                Some("10.0.0.1:80"),
                1,
            ),
            (Some("10.9.9.9"), None, None, None, 1),
        ] {
            let mut headers = Headers::default();
            if let Some(text) = header {
                headers.append(name.clone(), text);
            }
            let pick = Pick {
                original,
                headers: Some(&headers),
                ..Pick::default()
            };
            let mut refused = 0;
            let got = address(&pick, Some(&name), port, || refused += 1);
            let want = want.map(|text| text.parse().unwrap());
            assert_eq!((got, refused), (want, invalid), "{header:?} {original:?}");
            // A cluster that does not ask for the header does not see it.
            assert_eq!(
                address(&pick, None, None, || unreachable!()),
                original,
                "{header:?}"
            );
        }
    }
}
