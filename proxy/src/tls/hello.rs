//! What a ClientHello asks for: server name, protocols and groups, read before rustls sees it.

use std::sync::Arc;

use rustls::pki_types::DnsName;

/// A ClientHello longer than this is not waited for. Envoy: `max_client_hello_size`.
pub const LONGEST: usize = 16 * 1024;

/// What the first bytes of a connection are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hello {
    /// The beginning of a ClientHello.
    Incomplete,
    /// Something else.
    NotTls,
    /// It begins as TLS, but is no ClientHello that could be read.
    Broken,
    /// A ClientHello.
    Complete(ClientHello),
}

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientHello {
    /// Server name, lower case.
    pub server_name: Option<Arc<str>>,
    /// ALPN, in the client's order.
    pub protocols: Vec<Vec<u8>>,
    /// Groups for the key exchange, in the client's order.
    pub groups: Vec<u16>,
    /// It speaks TLS 1.3.
    pub tls13: bool,
}

/// Reads the first bytes of a connection. RFC 8446 §4.1.2, §4.2.1, §4.2.7 and §5.1,
/// RFC 6066 §3, RFC 7301 §3.1.
pub fn read(bytes: &[u8]) -> Hello {
    const HANDSHAKE: u8 = 22;
    const CLIENT_HELLO: u8 = 1;
    /// RFC 8446 §5.1.
    const LONGEST_RECORD: usize = 1 << 14;
    let mut message: Vec<u8> = Vec::new();
    let mut rest = bytes;
    loop {
        match rest {
            [HANDSHAKE, 3, _, high, low, after @ ..] => {
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                if length == 0 || length > LONGEST_RECORD {
                    return Hello::Broken;
                }
                let part = after.get(..length).unwrap_or(after);
                // Mostly one record is the whole message; then it is read where it lies.
                let so_far = if message.is_empty() {
                    part
                } else {
                    message.extend_from_slice(part);
                    &message
                };
                match so_far {
                    [] => {}
                    [CLIENT_HELLO, a, b, c, body @ ..] => {
                        let wanted = u32::from_be_bytes([0, *a, *b, *c]) as usize;
                        if wanted > LONGEST {
                            return Hello::Broken;
                        }
                        if let Some(body) = body.get(..wanted) {
                            return client_hello(body).map_or(Hello::Broken, Hello::Complete);
                        }
                    }
                    [CLIENT_HELLO, ..] => {}
                    _ => return Hello::Broken,
                }
                if after.len() < length {
                    return Hello::Incomplete;
                }
                if message.is_empty() {
                    message.extend_from_slice(part);
                }
                rest = &after[length..];
            }
            [] | [HANDSHAKE] | [HANDSHAKE, 3] | [HANDSHAKE, 3, _] | [HANDSHAKE, 3, _, _] => {
                return Hello::Incomplete;
            }
            _ if message.is_empty() => return Hello::NotTls,
            _ => return Hello::Broken,
        }
    }
}

fn client_hello(body: &[u8]) -> Option<ClientHello> {
    const SERVER_NAME: u16 = 0;
    const SUPPORTED_GROUPS: u16 = 10;
    const ALPN: u16 = 16;
    const SUPPORTED_VERSIONS: u16 = 43;
    const TLS13: u16 = 0x0304;
    /// Version and random.
    const FIXED: usize = 2 + 32;
    let mut body = Reader(body);
    body.take(FIXED)?;
    body.vector8()?; // session ID
    body.vector16()?; // cipher suites
    body.vector8()?; // compression methods
    let mut hello = ClientHello::default();
    if body.0.is_empty() {
        return Some(hello); // before TLS 1.2 there need not be extensions
    }
    let mut extensions = Reader(body.vector16()?);
    if !body.0.is_empty() {
        return None;
    }
    while !extensions.0.is_empty() {
        let kind = extensions.number()?;
        let value = extensions.vector16()?;
        match kind {
            SERVER_NAME => hello.server_name = server_name(value)?,
            ALPN => {
                let mut list = Reader(Reader(value).vector16()?);
                while !list.0.is_empty() {
                    hello.protocols.push(list.vector8()?.to_vec());
                }
            }
            SUPPORTED_GROUPS => hello.groups = Reader(Reader(value).vector16()?).numbers()?,
            SUPPORTED_VERSIONS => {
                hello.tls13 = Reader(Reader(value).vector8()?).numbers()?.contains(&TLS13);
            }
            _ => {}
        }
    }
    Some(hello)
}

/// The first host name of the list, if it is one; `None` if the list is malformed.
fn server_name(value: &[u8]) -> Option<Option<Arc<str>>> {
    const HOST_NAME: u8 = 0;
    let mut list = Reader(Reader(value).vector16()?);
    let mut found = None;
    while !list.0.is_empty() {
        let kind = *list.take(1)?.first()?;
        let name = list.vector16()?;
        if kind == HOST_NAME && found.is_none() {
            found = std::str::from_utf8(name)
                .ok()
                .and_then(|name| DnsName::try_from(name).ok())
                .map(|name| name.as_ref().to_ascii_lowercase().into());
        }
    }
    Some(found)
}

/// TLS' presentation language.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn numbers(&mut self) -> Option<Vec<u16>> {
        let mut numbers = Vec::with_capacity(self.0.len() / 2);
        while !self.0.is_empty() {
            numbers.push(self.number()?);
        }
        Some(numbers)
    }

    fn vector8(&mut self) -> Option<&'a [u8]> {
        let n = *self.take(1)?.first()?;
        self.take(n.into())
    }

    fn vector16(&mut self) -> Option<&'a [u8]> {
        let n = self.number()?;
        self.take(n.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustls::client::UnbufferedClientConnection;

    use super::*;

    /// What rustls sends for a name and protocols.
    fn sent(name: &str, alpn: &[&str]) -> Vec<u8> {
        let mut config =
            rustls::ClientConfig::builder_with_provider(crate::tls::provider().clone())
                .with_protocol_versions(rustls::ALL_VERSIONS)
                .unwrap()
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
        let name = name.to_owned().try_into().unwrap();
        let mut client = UnbufferedClientConnection::new(Arc::new(config), name).unwrap();
        let mut out = vec![0; 4096];
        match client.process_tls_records(&mut []).state.unwrap() {
            rustls::unbuffered::ConnectionState::EncodeTlsData(mut data) => {
                let n = data.encode(&mut out).unwrap();
                out.truncate(n);
            }
            other => panic!("{other:?}"),
        }
        out
    }

    /// The same message in records of `size` bytes.
    fn split(record: &[u8], size: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for part in record[5..].chunks(size) {
            out.extend_from_slice(&record[..3]);
            out.extend_from_slice(&u16::try_from(part.len()).unwrap().to_be_bytes());
            out.extend_from_slice(part);
        }
        out
    }

    #[test]
    fn name_and_protocols_are_read_however_the_bytes_come() {
        let whole = sent("A.example", &["h2", "http/1.1"]);
        let groups: Vec<u16> = crate::tls::provider()
            .kx_groups
            .iter()
            .map(|group| group.name().into())
            .collect();
        let want = Hello::Complete(ClientHello {
            server_name: Some("a.example".into()),
            protocols: vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            groups: groups.clone(),
            tls13: true,
        });
        for record in [whole.clone(), split(&whole, 7), split(&whole, 100)] {
            assert_eq!(read(&record), want);
            for end in 0..record.len() {
                assert_eq!(read(&record[..end]), Hello::Incomplete, "{end}");
            }
        }
        let nameless = sent("127.0.0.1", &[]);
        let want = Hello::Complete(ClientHello {
            groups,
            tls13: true,
            ..ClientHello::default()
        });
        assert_eq!(read(&nameless), want);
    }

    #[test]
    fn what_is_not_tls_is_told_at_once() {
        assert_eq!(read(b"GET / HTTP/1.1\r\n"), Hello::NotTls);
        assert_eq!(read(b"\x16\x02"), Hello::NotTls);
        // A handshake message, but not the first of a client.
        assert_eq!(read(b"\x16\x03\x01\x00\x04\x02"), Hello::Broken);
        assert_eq!(read(b"\x16\x03\x01\x00\x00"), Hello::Broken);
        assert_eq!(read(b"\x16\x03\x01\xff\xff"), Hello::Broken);
        // It claims 1 MiB.
        assert_eq!(read(b"\x16\x03\x01\x01\x00\x01\x10\x00\x00"), Hello::Broken);
    }

    proptest! {
        #[test]
        fn a_damaged_hello_makes_nothing_panic(at in 0..300_usize, byte: u8, cut in 0..400_usize) {
            let mut record = sent("a.example", &["h2"]);
            if let Some(place) = record.get_mut(at) {
                *place = byte;
            }
            record.truncate(cut.max(1));
            read(&record);
        }
    }
}
