use envoy_types::pb::envoy::{
    config::core::v3::{
        AggregatedConfigSource, ConfigSource, config_source::ConfigSourceSpecifier,
    },
    extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, SdsSecretConfig, Secret, TlsParameters, secret::Type,
    },
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{testing::*, *};

const CLIENT: &str = "spiffe://cluster.local/ns/a/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/b/sa/server";

/// One handshake and one byte each way; both sides' view, or the errors.
async fn meet(
    server: &ServerContext,
    client: &ClientContext,
    sni: Option<&str>,
) -> (io::Result<TlsInfo>, io::Result<TlsInfo>) {
    let (near, far) = tokio::io::duplex(1 << 16);
    let serve = async {
        let (mut stream, info) = server.accept(near.into(), Vec::new()).await?;
        let byte = stream.read_u8().await?;
        stream.write_u8(byte).await?;
        stream.flush().await?;
        Ok(info)
    };
    let call = async {
        let (mut stream, info) = client.connect(far.into(), sni, None).await?;
        stream.write_u8(7).await?;
        stream.flush().await?;
        stream.read_u8().await?;
        Ok(info)
    };
    tokio::join!(serve, call)
}

fn server(context: &DownstreamTlsContext) -> ServerContext {
    ServerContext::compile(context, &SecretStore::new()).unwrap()
}

fn client(context: &UpstreamTlsContext) -> ClientContext {
    ClientContext::compile(context, &SecretStore::new()).unwrap()
}

#[tokio::test]
async fn an_unknown_protocol_is_no_reason_to_part() {
    let ca = Authority::new();
    let (ours, theirs) = (ca.issue(SERVER, &[]), ca.issue(CLIENT, &[]));
    let server = server(&downstream(
        common(Some(&ours), Some(&ca.pem()), &[], &["h2"]),
        true,
    ));
    for (offered, agreed) in [
        (&["spdy/9", "h2"][..], Some(&b"h2"[..])),
        (&["spdy/9"], None),
    ] {
        let client = client(&upstream(
            common(Some(&theirs), Some(&ca.pem()), &[SERVER], offered),
            "",
        ));
        let (at_server, at_client) = meet(&server, &client, None).await;
        assert_eq!(at_server.unwrap().alpn.as_deref(), agreed);
        assert_eq!(at_client.unwrap().alpn.as_deref(), agreed);
    }
    // The certificate is asked for all the same.
    let nobody = client(&upstream(
        common(None, Some(&ca.pem()), &[], &["spdy/9"]),
        "",
    ));
    assert!(meet(&server, &nobody, None).await.0.is_err());
}

#[tokio::test]
async fn both_sides_know_each_other_by_mutual_tls() {
    let ca = Authority::new();
    let (ours, theirs) = (ca.issue(SERVER, &[]), ca.issue(CLIENT, &["client.example"]));
    let server = server(&downstream(
        common(Some(&ours), Some(&ca.pem()), &[], &["istio", "h2"]),
        true,
    ));
    let client = client(&upstream(
        common(Some(&theirs), Some(&ca.pem()), &[SERVER], &["h2"]),
        "outbound_.9080_._.reviews.default.svc.cluster.local",
    ));
    let (at_server, at_client) = meet(&server, &client, None).await;
    let (at_server, at_client) = (at_server.unwrap(), at_client.unwrap());
    assert_eq!(at_server.peer_uri_san.as_deref(), Some(CLIENT));
    assert_eq!(at_server.peer_dns_sans, ["client.example".into()]);
    assert_eq!(at_server.local_uri_san.as_deref(), Some(SERVER));
    assert_eq!(at_server.alpn.as_deref(), Some(&b"h2"[..]));
    assert_eq!(
        (at_server.version, at_server.cipher.as_str()),
        ("TLSv1.3", "TLS_AES_128_GCM_SHA256")
    );
    assert!(at_server.is_mutual());
    assert_eq!(at_client.peer_uri_san.as_deref(), Some(SERVER));
    assert_eq!(at_client.local_uri_san.as_deref(), Some(CLIENT));
}

#[tokio::test]
async fn a_peer_without_the_right_name_chain_or_certificate_is_refused() {
    let (ca, foreign) = (Authority::new(), Authority::new());
    let ours = ca.issue(SERVER, &[]);
    let server = server(&downstream(
        common(Some(&ours), Some(&ca.pem()), &[CLIENT], &[]),
        true,
    ));
    let meet_as = |issued: Option<Issued>| {
        let client = client(&upstream(
            common(issued.as_ref(), Some(&ca.pem()), &[], &[]),
            "",
        ));
        let server = &server;
        async move { meet(server, &client, None).await.0 }
    };
    assert!(meet_as(Some(ca.issue(CLIENT, &[]))).await.is_ok());
    let other = meet_as(Some(ca.issue("spiffe://cluster.local/ns/a/sa/other", &[])))
        .await
        .unwrap_err();
    assert!(format!("{other:?}").contains("Name("), "{other:?}");
    assert!(meet_as(Some(foreign.issue(CLIENT, &[]))).await.is_err());
    assert!(meet_as(None).await.is_err());
}

#[tokio::test]
async fn a_server_with_another_name_or_root_is_refused() {
    let (ca, foreign) = (Authority::new(), Authority::new());
    let ours = ca.issue(SERVER, &["*.example.com"]);
    let server = server(&downstream(common(Some(&ours), None, &[], &[]), false));
    let name = client(&upstream(common(None, Some(&ca.pem()), &[CLIENT], &[]), ""));
    assert!(meet(&server, &name, None).await.1.is_err());
    let root = client(&upstream(common(None, Some(&foreign.pem()), &[], &[]), ""));
    assert!(meet(&server, &root, None).await.1.is_err());
    let mut by_sni = upstream(common(None, Some(&ca.pem()), &[], &[]), "a.example.com");
    by_sni.auto_sni_san_validation = true;
    let by_sni = client(&by_sni);
    assert!(meet(&server, &by_sni, None).await.1.is_ok());
    assert!(
        meet(&server, &by_sni, Some("a.example.org"))
            .await
            .1
            .is_err()
    );
}

#[tokio::test]
async fn nobody_has_an_identity_that_was_not_verified() {
    let ca = Authority::new();
    let (ours, theirs) = (ca.issue(SERVER, &[]), ca.issue(CLIENT, &[]));
    let server = server(&downstream(common(Some(&ours), None, &[], &[]), false));
    let client = client(&upstream(common(Some(&theirs), None, &[], &[]), ""));
    let (at_server, at_client) = meet(&server, &client, None).await;
    assert!(!at_server.unwrap().is_mutual());
    let at_client = at_client.unwrap();
    assert_eq!(
        (at_client.peer_uri_san, at_client.peer_subject),
        (None, None)
    );
}

fn sds(name: &str) -> SdsSecretConfig {
    SdsSecretConfig {
        name: name.into(),
        sds_config: Some(ConfigSource {
            config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
            ..ConfigSource::default()
        }),
    }
}

fn secret(name: &str, kind: Type) -> Secret {
    Secret {
        name: name.into(),
        r#type: Some(kind),
    }
}

#[tokio::test]
async fn a_rotated_secret_is_used_by_the_next_handshake_and_no_connection_breaks() {
    let store = SecretStore::new();
    let (old, new) = (Authority::new(), Authority::new());
    let context = downstream(
        CommonTlsContext {
            tls_certificate_sds_secret_configs: vec![sds("cert")],
            validation_context_type: Some(ValidationContextType::ValidationContextSdsSecretConfig(
                sds("roots"),
            )),
            ..CommonTlsContext::default()
        },
        true,
    );
    let server = ServerContext::compile(&context, &store).unwrap();
    let wanted = store.wanted();
    let names: Vec<&str> = wanted.iter().map(|slot| &**slot.name()).collect();
    assert_eq!(names, ["cert", "roots"]);
    let slot = |name: &str| wanted.iter().find(|s| &**s.name() == name).unwrap();
    let client_of = |ca: &Authority| {
        client(&upstream(
            common(
                Some(&ca.issue(CLIENT, &[])),
                Some(&ca.pem()),
                &[SERVER],
                &[],
            ),
            "",
        ))
    };

    assert!(!server.ready());
    let early = meet(&server, &client_of(&old), None).await.0.unwrap_err();
    assert_eq!(early.to_string(), "TLS secret cert is not there yet");

    let give = |ca: &Authority| {
        let roots = secret(
            "roots",
            Type::ValidationContext(CertificateValidationContext {
                trusted_ca: inline(&ca.pem()),
                ..CertificateValidationContext::default()
            }),
        );
        slot("roots").set(&roots).unwrap();
        let own = ca.issue(SERVER, &[]);
        slot("cert")
            .set(&secret("cert", Type::TlsCertificate(certificate(&own))))
            .unwrap();
    };
    give(&old);
    assert!(server.ready());
    let (near, far) = tokio::io::duplex(1 << 16);
    let before = client_of(&old);
    let (accepted, connected) = tokio::join!(server.accept(near.into(), Vec::new()), async {
        let (mut connected, info) = before.connect(far.into(), None, None).await?;
        // The last flight leaves with data or when told to.
        connected.flush().await?;
        Ok::<_, io::Error>((connected, info))
    });
    let ((mut accepted, _), (mut connected, _)) = (accepted.unwrap(), connected.unwrap());

    give(&new);
    assert!(meet(&server, &client_of(&new), None).await.0.is_ok());
    assert!(meet(&server, &client_of(&old), None).await.0.is_err());
    connected.write_u8(9).await.unwrap();
    connected.flush().await.unwrap();
    assert_eq!(accepted.read_u8().await.unwrap(), 9);

    let broken = Type::TlsCertificate(certificate(&Issued {
        chain: new.issue(SERVER, &[]).chain,
        key: new.issue(SERVER, &[]).key,
    }));
    let error = slot("cert").set(&secret("cert", broken)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "secret cert: private_key: does not belong to the certificate"
    );
    assert!(meet(&server, &client_of(&new), None).await.0.is_ok());
}

#[test]
fn what_could_not_be_enforced_is_refused() {
    let ca = Authority::new();
    let store = SecretStore::new();
    let own = ca.issue(SERVER, &[]);
    let refused = |change: &dyn Fn(&mut CertificateValidationContext)| {
        let mut common = common(Some(&own), Some(&ca.pem()), &[], &[]);
        if let Some(ValidationContextType::ValidationContext(context)) =
            &mut common.validation_context_type
        {
            change(context);
        }
        ServerContext::compile(&downstream(common, false), &store)
            .unwrap_err()
            .to_string()
    };
    let prefix = "common_tls_context: validation_context: ";
    assert_eq!(
        refused(&|c| c.crl = inline("x")),
        format!("{prefix}crl: is not supported")
    );
    assert!(refused(&|c| c.trust_chain_verification = 1).contains("ACCEPT_UNTRUSTED"));
    assert!(refused(&|c| c.trusted_ca = inline("x")).contains("trusted_ca"));
    let nameless = |c: &mut CertificateValidationContext| {
        c.trusted_ca = None;
        c.match_typed_subject_alt_names = vec![uri_is(CLIENT)];
    };
    assert!(refused(&nameless).contains("must be set when peers are held to names"));
    let anybody = downstream(common(Some(&own), None, &[], &[]), true);
    assert!(ServerContext::compile(&anybody, &store).is_err());
    assert!(
        ServerContext::compile(&downstream(common(None, None, &[], &[]), false), &store).is_err()
    );
}

#[tokio::test]
async fn a_client_stops_at_1_2_unless_told_otherwise() {
    let ca = Authority::new();
    let ours = ca.issue(SERVER, &[]);
    let server = server(&downstream(common(Some(&ours), None, &[], &[]), false));
    let mut context = common(None, None, &[], &[]);
    for version in ["TLSv1.3", "TLSv1.2"] {
        let (at_server, _) = meet(&server, &client(&upstream(context.clone(), "")), None).await;
        assert_eq!(at_server.unwrap().version, version);
        context.tls_params = None;
    }
}

#[test]
fn versions_and_ciphers_are_limited() {
    let params = |min: TlsProtocol, max: TlsProtocol, suites: &[&str]| {
        let params = TlsParameters {
            tls_minimum_protocol_version: min as i32,
            tls_maximum_protocol_version: max as i32,
            cipher_suites: suites.iter().map(ToString::to_string).collect(),
            ..TlsParameters::default()
        };
        parameters(Some(&params), rustls::ALL_VERSIONS)
            .map(|(provider, versions)| (provider.cipher_suites.len(), versions.len()))
    };
    let all = aws_lc_rs::default_provider().cipher_suites.len();
    assert_eq!(
        params(TlsProtocol::TlsAuto, TlsProtocol::TlsAuto, &[]).unwrap(),
        (all, 2)
    );
    assert_eq!(
        params(TlsProtocol::TlSv13, TlsProtocol::TlsAuto, &[]).unwrap(),
        (all, 1)
    );
    assert_eq!(
        params(
            TlsProtocol::TlSv12,
            TlsProtocol::TlSv12,
            &["ECDHE-ECDSA-AES128-GCM-SHA256"]
        )
        .unwrap(),
        (4, 1)
    );
    assert!(params(TlsProtocol::TlSv12, TlsProtocol::TlSv12, &["AES128-SHA"]).is_err());
    assert!(params(TlsProtocol::TlSv10, TlsProtocol::TlSv11, &[]).is_err());
    let curves = |names: &[&str]| {
        let params = TlsParameters {
            ecdh_curves: names.iter().map(ToString::to_string).collect(),
            ..TlsParameters::default()
        };
        parameters(Some(&params), rustls::ALL_VERSIONS).map(|(provider, _)| {
            provider
                .kx_groups
                .iter()
                .map(|group| group.name())
                .collect::<Vec<_>>()
        })
    };
    assert_eq!(
        curves(&["P-384", "X25519"]).unwrap(),
        [NamedGroup::secp384r1, NamedGroup::X25519]
    );
    assert!(curves(&["X25519", "P-225"]).is_err());
}

/// Two ends of a connection over pipes of `size` bytes, with a TLS version.
async fn ends(size: usize, version: TlsProtocol) -> (TlsStream, TlsStream) {
    let ca = Authority::new();
    let (ours, theirs) = (ca.issue(SERVER, &[]), ca.issue(CLIENT, &[]));
    let mut context = common(Some(&ours), Some(&ca.pem()), &[], &[]);
    context.tls_params = Some(TlsParameters {
        tls_maximum_protocol_version: version as i32,
        ..TlsParameters::default()
    });
    let server = server(&downstream(context, true));
    let client = client(&upstream(
        common(Some(&theirs), Some(&ca.pem()), &[SERVER], &[]),
        "",
    ));
    let (near, far) = tokio::io::duplex(size);
    let accept = server.accept(near.into(), Vec::new());
    let connect = async {
        let (mut stream, _) = client.connect(far.into(), None, None).await.unwrap();
        stream.flush().await.unwrap();
        stream
    };
    let (accepted, connected) = tokio::join!(accept, connect);
    (accepted.unwrap().0, connected)
}

#[tokio::test]
async fn bulk_passes_both_ways_and_each_half_closes_on_its_own() {
    let data: Vec<u8> = (0..700_001_u32).map(|n| n.to_le_bytes()[1]).collect();
    for (size, version) in [
        (999, TlsProtocol::TlSv13),
        (1 << 20, TlsProtocol::TlSv13),
        (50_000, TlsProtocol::TlSv12),
    ] {
        let (server, client) = ends(size, version).await;
        let (mut server_reads, mut server_writes) = tokio::io::split(server);
        let (mut client_reads, mut client_writes) = tokio::io::split(client);
        let asking = async {
            client_writes.write_all(&data).await.unwrap();
            client_writes.shutdown().await.unwrap();
        };
        let answering = async {
            let mut asked = Vec::new();
            server_reads.read_to_end(&mut asked).await.unwrap();
            assert!(asked == data);
            // The other half is still open.
            server_writes.write_all(b"got it: ").await.unwrap();
            server_writes.write_all(&asked).await.unwrap();
            server_writes.shutdown().await.unwrap();
        };
        let hearing = async {
            let mut heard = Vec::new();
            client_reads.read_to_end(&mut heard).await.unwrap();
            heard
        };
        let ((), (), heard) = tokio::join!(asking, answering, hearing);
        assert_eq!(heard.len(), data.len() + 8);
        assert!(heard[..8] == b"got it: "[..] && heard[8..] == data);
    }
}

#[tokio::test]
async fn slices_of_one_write_are_one_record_and_an_idle_stream_holds_nothing() {
    let (mut server, mut client) = ends(1 << 16, TlsProtocol::TlSv13).await;
    let parts = [io::IoSlice::new(b"head "), io::IoSlice::new(b"and body")];
    assert_eq!(client.write_vectored(&parts).await.unwrap(), 13);
    let mut got = [0; 64];
    assert_eq!(server.read(&mut got).await.unwrap(), 13);
    assert_eq!(&got[..13], b"head and body");
    assert!(server.holds_nothing() && client.holds_nothing());
}

#[tokio::test]
async fn a_peer_that_just_goes_is_told_from_one_that_says_so() {
    let (mut server, client) = ends(1 << 16, TlsProtocol::TlSv13).await;
    drop(client);
    let error = server.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert!(error.to_string().contains("close_notify"));
}

#[tokio::test]
async fn half_a_record_is_no_obstacle_to_a_write() {
    let ca = Authority::new();
    let ours = ca.issue(SERVER, &["a.example"]);
    let server = server(&downstream(common(Some(&ours), None, &[], &[]), false));
    let mut roots = rustls::RootCertStore::empty();
    let pem = ca.pem();
    roots
        .add(rustls::pki_types::pem::PemObject::from_pem_slice(pem.as_bytes()).unwrap())
        .unwrap();
    let config = ClientConfig::builder_with_provider(provider().clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("a.example").unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let (near, mut far) = tokio::io::duplex(1 << 16);
    let talking = async {
        while client.is_handshaking() {
            let mut flight = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut flight).unwrap();
            }
            far.write_all(&flight).await.unwrap();
            if client.is_handshaking() {
                receive(&mut far, &mut client).await;
            }
        }
        let mut flight = Vec::new();
        // New keys for us, and then a record in two halves.
        client.refresh_traffic_keys().unwrap();
        std::io::Write::write_all(&mut client.writer(), b"question").unwrap();
        while client.wants_write() {
            client.write_tls(&mut flight).unwrap();
        }
        let (early, late) = flight.split_at(flight.len() - 5);
        far.write_all(early).await.unwrap();
        while plain(&mut client) != b"unasked" {
            receive(&mut far, &mut client).await;
        }
        far.write_all(late).await.unwrap();
        receive(&mut far, &mut client).await;
        assert_eq!(plain(&mut client), b"answer");
    };
    let serving = async {
        let (mut stream, info) = server.accept(near.into(), Vec::new()).await.unwrap();
        assert_eq!(info.server_name.as_deref(), Some("a.example"));
        let mut question = [0; 8];
        {
            let mut reading = std::pin::pin!(stream.read_exact(&mut question));
            for _ in 0..20 {
                assert!(futures::poll!(reading.as_mut()).is_pending());
                tokio::task::yield_now().await;
            }
        }
        stream.write_all(b"unasked").await.unwrap();
        stream.flush().await.unwrap();
        stream.read_exact(&mut question).await.unwrap();
        assert_eq!(&question, b"question");
        stream.write_all(b"answer").await.unwrap();
        stream.flush().await.unwrap();
        stream
    };
    tokio::join!(talking, serving);
}

async fn receive(from: &mut tokio::io::DuplexStream, client: &mut rustls::ClientConnection) {
    let mut bytes = [0; 4096];
    let n = from.read(&mut bytes).await.unwrap();
    let mut bytes = &bytes[..n];
    while !bytes.is_empty() {
        client.read_tls(&mut bytes).unwrap();
        client.process_new_packets().unwrap();
    }
}

fn plain(client: &mut rustls::ClientConnection) -> Vec<u8> {
    let mut plain = Vec::new();
    // Ends with "would block".
    drop(std::io::Read::read_to_end(&mut client.reader(), &mut plain));
    plain
}

#[tokio::test]
async fn what_is_no_tls_gets_an_alert_unless_it_is_http() {
    let ca = Authority::new();
    let ours = ca.issue(SERVER, &[]);
    let server = server(&downstream(common(Some(&ours), None, &[], &[]), false));
    for (said, first) in [
        (&b"\x00\x01\x02\x03\x04\x05"[..], Some(21)),
        (b"GET / HTTP/1.1\r\n\r\n", None),
    ] {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        far.write_all(said).await.unwrap();
        let error = server.accept(near.into(), Vec::new()).await.unwrap_err();
        assert!(error.get_ref().unwrap().is::<rustls::Error>(), "{error}");
        let mut alert = Vec::new();
        far.read_to_end(&mut alert).await.unwrap();
        assert_eq!(alert.first().copied(), first, "{alert:?}");
    }
}

/// A client of rustls with these groups, the first of which it sends a key for.
fn with_groups(
    groups: Vec<&'static dyn SupportedKxGroup>,
    roots: &str,
) -> (Arc<ClientConfig>, ServerName<'static>) {
    let der = <rustls::pki_types::CertificateDer<'_> as rustls::pki_types::pem::PemObject>::from_pem_slice(
        roots.as_bytes(),
    );
    let mut store = rustls::RootCertStore::empty();
    store.add(der.unwrap()).unwrap();
    let provider = CryptoProvider {
        kx_groups: groups,
        ..aws_lc_rs::default_provider()
    };
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(store)
        .with_no_client_auth();
    (Arc::new(config), "a.example".try_into().unwrap())
}

#[tokio::test]
async fn our_first_group_is_taken_and_who_guessed_another_is_asked_again() {
    use rustls::HandshakeKind::{Full, FullWithHelloRetryRequest as Retried};
    use rustls::crypto::aws_lc_rs::kx_group::{SECP256R1, SECP384R1, X25519, X25519MLKEM768};

    let ca = Authority::new();
    let ours = ca.issue("", &["a.example"]);
    // As Envoy 1.40: our first that the client knows, whether or not it has sent a key for it.
    let cases: [(&[&str], Vec<_>, _, _); 6] = [
        (
            &[],
            vec![X25519MLKEM768, X25519],
            NamedGroup::X25519MLKEM768,
            Full,
        ),
        (&[], vec![X25519, SECP256R1], NamedGroup::X25519, Full),
        (&[], vec![SECP256R1, SECP384R1], NamedGroup::secp256r1, Full),
        (
            &[],
            vec![X25519, X25519MLKEM768],
            NamedGroup::X25519MLKEM768,
            Retried,
        ),
        (&[], vec![SECP256R1, X25519], NamedGroup::X25519, Retried),
        (
            &["P-384", "X25519"],
            vec![X25519, SECP384R1],
            NamedGroup::secp384r1,
            Retried,
        ),
    ];
    for (curves, groups, agreed, kind) in cases {
        let mut context = common(Some(&ours), None, &[], &[]);
        context.tls_params = Some(TlsParameters {
            ecdh_curves: curves.iter().map(ToString::to_string).collect(),
            ..TlsParameters::default()
        });
        let server = server(&downstream(context, false));
        let (config, name) = with_groups(groups, &ca.pem());
        let (near, far) = tokio::io::duplex(1 << 16);
        let connector = tokio_rustls::TlsConnector::from(config);
        let (accepted, connected) = tokio::join!(
            server.accept(near.into(), Vec::new()),
            connector.connect(name, far)
        );
        let (mut stream, mut peer) = (accepted.unwrap().0, connected.unwrap());
        let common = stream.common();
        assert_eq!(
            common.negotiated_key_exchange_group().unwrap().name(),
            agreed
        );
        assert_eq!(common.handshake_kind(), Some(kind));
        stream.write_all(b"hello").await.unwrap();
        stream.flush().await.unwrap();
        let mut got = [0; 5];
        peer.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"hello");
    }
    // P-384 must be asked for.
    let server = server(&downstream(common(Some(&ours), None, &[], &[]), false));
    let (config, name) = with_groups(vec![SECP384R1], &ca.pem());
    let (near, far) = tokio::io::duplex(1 << 16);
    let connector = tokio_rustls::TlsConnector::from(config);
    let (accepted, connected) = tokio::join!(
        server.accept(near.into(), Vec::new()),
        connector.connect(name, far)
    );
    accepted.unwrap_err();
    connected.unwrap_err();
}

#[tokio::test]
async fn a_client_of_tls_1_2_gets_a_group_that_it_can_use() {
    let ca = Authority::new();
    let ours = ca.issue(SERVER, &[]);
    let server = server(&downstream(common(Some(&ours), None, &[], &[]), false));
    let mut context = common(None, Some(&ca.pem()), &[SERVER], &[]);
    context.tls_params = Some(TlsParameters {
        tls_maximum_protocol_version: TlsProtocol::TlSv12 as i32,
        ecdh_curves: vec!["X25519MLKEM768".to_owned(), "P-256".to_owned()],
        ..TlsParameters::default()
    });
    let client = client(&upstream(context, ""));
    let (served, called) = meet(&server, &client, None).await;
    assert_eq!(served.unwrap().version, "TLSv1.2");
    called.unwrap();
}

#[tokio::test]
async fn who_stalls_in_a_handshake_keeps_nobody_from_his() {
    const STALLED: usize = 100;
    let ca = Authority::new();
    let (ours, theirs) = (ca.issue(SERVER, &[]), ca.issue(CLIENT, &[]));
    let server = server(&downstream(
        common(Some(&ours), Some(&ca.pem()), &[], &[]),
        true,
    ));
    let client = client(&upstream(
        common(Some(&theirs), Some(&ca.pem()), &[SERVER], &[]),
        "",
    ));
    let (config, name) = with_groups(vec![aws_lc_rs::kx_group::X25519], &ca.pem());
    let mut hello = Vec::new();
    rustls::ClientConnection::new(config, name)
        .unwrap()
        .write_tls(&mut hello)
        .unwrap();
    // They have asked, and take nothing of the answer.
    let pipes: Vec<_> = (0..STALLED).map(|_| tokio::io::duplex(16)).collect();
    let (nears, _fars): (Vec<_>, Vec<_>) = pipes.into_iter().unzip();
    let stalled = futures::future::join_all(
        nears
            .into_iter()
            .map(|near| server.accept(near.into(), hello.clone())),
    );
    let meeting = tokio::time::timeout(
        std::time::Duration::from_secs(20),
        meet(&server, &client, None),
    );
    tokio::select! {
        biased;
        _ = stalled => panic!("nobody has answered them"),
        met = meeting => {
            let (served, called) = met.unwrap();
            assert_eq!(served.unwrap().peer_uri_san.as_deref(), Some(CLIENT));
            called.unwrap();
        }
    }
}

#[test]
fn every_suite_has_a_name_and_our_key_schedule_where_it_is_sha_256() {
    let suites = &provider().cipher_suites;
    assert_eq!(suites.len(), aws_lc_rs::DEFAULT_CIPHER_SUITES.len());
    for suite in suites {
        assert!(!cipher_name(*suite).is_empty(), "{suite:?}");
    }
    // Ours are known by their lack of QUIC.
    let ours = |suite: &&SupportedCipherSuite| suite.tls13().is_some_and(|s| s.quic.is_none());
    assert_eq!(suites.iter().filter(ours).count(), 2);
}
