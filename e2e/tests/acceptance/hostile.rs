//! Bytes that no friend sends, to every public port: a clear error or a closed connection, and afterwards
//! everything serves as before with no more memory than before.

use std::{net::SocketAddr, time::Duration};

use e2e::mesh::{Mesh, Options};
use rand::{RngCore as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::support::{bookinfo, page};

/// Resident memory of a process in KiB.
fn resident_kib(id: u32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap_or_default();
    Ok(line
        .split_whitespace()
        .nth(1)
        .unwrap_or("0")
        .parse()
        .unwrap_or(0))
}

/// Sends bytes and reads until the peer closes or half a second passes; what it said.
async fn poke(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let Ok(mut stream) = TcpStream::connect(address).await else {
        return Vec::new();
    };
    stream.write_all(bytes).await.ok();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(Ok(read @ 1..)) =
        tokio::time::timeout(Duration::from_millis(500), stream.read(&mut buffer)).await
    {
        answer.extend_from_slice(&buffer[..read]);
        if answer.len() > 64 * 1024 {
            break;
        }
    }
    answer
}

/// Every port that the mesh opens to others.
fn ports(mesh: &Mesh) -> anyhow::Result<Vec<(&'static str, SocketAddr)>> {
    let block = mesh.block();
    let details = mesh.instance("details-v1-0")?.address;
    let mut all = Vec::new();
    for (name, ip, ports) in [
        ("auth", block.auth(), &[8060, 15014][..]),
        ("pilot", block.pilot(), &[15010, 15012, 15014]),
        ("mixer", block.mixer(), &[9091, 15004, 15014, 42422]),
        ("gateway", block.gateway(), &[8080, 15000]),
        ("inbound", details.ip, &[9080, 15000]),
        ("outbound", details.outbound, &[15002]),
    ] {
        all.extend(
            ports
                .iter()
                .map(|port| (name, SocketAddr::from((ip, *port)))),
        );
    }
    Ok(all)
}

#[tokio::test]
async fn hostile_bytes_on_every_port_change_nothing() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    let ports = ports(&mesh)?;
    let mut rng = StdRng::seed_from_u64(7);
    let mut random = vec![0; 16 * 1024];
    rng.fill_bytes(&mut random);

    let long_header = format!(
        "GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n",
        "a".repeat(200_000)
    );
    let many_headers = format!(
        "GET / HTTP/1.1\r\nhost: a\r\n{}\r\n",
        (0..5000)
            .map(|n| format!("h{n}: x\r\n"))
            .collect::<String>()
    );
    let smuggle = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n";
    let bad_chunk = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzzz\r\n";
    let preface_and_noise = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(),
        &random[..4096],
    ]
    .concat();
    // A ClientHello that announces more than it sends.
    let half_hello = [
        0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc, 0x03, 0x03,
    ];
    let pokes: [(&str, &[u8]); 8] = [
        ("random bytes", &random),
        ("a header of 200 KB", long_header.as_bytes()),
        ("5000 headers", many_headers.as_bytes()),
        ("two body lengths", smuggle.as_bytes()),
        ("a bad chunk", bad_chunk.as_bytes()),
        ("HTTP/2 noise", &preface_and_noise),
        ("half a ClientHello", &half_hello),
        ("nothing", b""),
    ];
    let round = async || {
        for (_, address) in &ports {
            for (_, bytes) in &pokes {
                poke(*address, bytes).await;
            }
        }
    };
    round().await;
    mesh.check()?;
    let before: Vec<_> = mesh
        .processes()
        .into_iter()
        .map(|(name, id)| anyhow::Ok((name.to_owned(), id, resident_kib(id)?)))
        .collect::<Result<_, _>>()?;

    // An oversized header is answered as such where HTTP is spoken.
    for (name, address) in &ports {
        if matches!((*name, address.port()), ("gateway", 8080) | ("outbound", _)) {
            let answer = poke(*address, long_header.as_bytes()).await;
            let text = String::from_utf8_lossy(&answer);
            assert!(text.starts_with("HTTP/1.1 431"), "{name}: {text:.100}");
            let answer = poke(*address, &random).await;
            let text = String::from_utf8_lossy(&answer);
            assert!(
                answer.is_empty() || text.starts_with("HTTP/1.1 400"),
                "{name}: {text:.100}"
            );
        }
    }
    // Connections that say nothing do not keep others out.
    let mut silent = Vec::new();
    for (_, address) in &ports {
        for _ in 0..20 {
            silent.push(TcpStream::connect(address).await?);
        }
    }
    for _ in 0..3 {
        round().await;
    }
    assert_eq!(page(&client, &mesh, None).await?.status, 200);
    drop(silent);
    mesh.check()?;
    for (name, id, kib) in before {
        let now = resident_kib(id)?;
        assert!(now < kib + 24 * 1024, "{name} grew from {kib} to {now} KiB");
    }
    assert_eq!(page(&client, &mesh, None).await?.status, 200);
    Ok(())
}

#[tokio::test]
async fn wrong_protobuf_is_an_error_of_the_caller() -> anyhow::Result<()> {
    use lateen_protocols::istio::{
        mixer::v1::{CheckRequest, CompressedAttributes, mixer_client::MixerClient},
        v1::auth::{
            IstioCertificateRequest,
            istio_certificate_service_client::IstioCertificateServiceClient,
        },
    };

    let mesh = Mesh::start(Options::default()).await?;
    let block = mesh.block();
    let mut mixer = MixerClient::connect(format!("http://{}:9091", block.mixer())).await?;
    // Indexes that no dictionary has.
    let attributes = CompressedAttributes {
        strings: [(-77, -99), (i32::MIN, i32::MAX)].into(),
        ..CompressedAttributes::default()
    };
    let request = CheckRequest {
        attributes: Some(attributes),
        global_word_count: u32::MAX,
        ..CheckRequest::default()
    };
    let refused = mixer.check(request).await;
    assert!(
        refused.is_err(),
        "a request that makes no sense was answered: {refused:?}"
    );

    // Auth does not speak plain text at all.
    let plain =
        IstioCertificateServiceClient::connect(format!("http://{}:8060", block.auth())).await;
    if let Ok(mut auth) = plain {
        assert!(
            auth.create_certificate(IstioCertificateRequest::default())
                .await
                .is_err()
        );
    }
    Ok(())
}
