use std::fs;

use envoy_types::pb::envoy::config::core::v3::{
    AggregatedConfigSource, ApiConfigSource, DataSource, GrpcService, data_source::Specifier,
    grpc_service::EnvoyGrpc,
};

use super::*;
use crate::tls::testing::{Authority, Issued};

fn config(name: &str, specifier: ConfigSourceSpecifier) -> SdsSecretConfig {
    SdsSecretConfig {
        name: name.into(),
        sds_config: Some(ConfigSource {
            config_source_specifier: Some(specifier),
            ..ConfigSource::default()
        }),
    }
}

fn grpc(cluster: &str) -> ConfigSourceSpecifier {
    ConfigSourceSpecifier::ApiConfigSource(ApiConfigSource {
        grpc_services: vec![GrpcService {
            target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
                cluster_name: cluster.into(),
                ..EnvoyGrpc::default()
            })),
            ..GrpcService::default()
        }],
        ..ApiConfigSource::default()
    })
}

#[test]
fn sources_are_told_apart_and_forgotten_with_their_last_user() {
    let store = SecretStore::new();
    let ads = store
        .subscribe(&config(
            "a",
            ConfigSourceSpecifier::Ads(AggregatedConfigSource {}),
        ))
        .unwrap();
    let sds = store.subscribe(&config("a", grpc("sds-grpc"))).unwrap();
    assert_eq!(
        (ads.source(), sds.source()),
        (&Source::Ads, &Source::Grpc("sds-grpc".into()))
    );
    assert_eq!(store.wanted().len(), 2);
    drop(sds);
    let left: Vec<_> = store
        .wanted()
        .iter()
        .map(|slot| slot.source().clone())
        .collect();
    assert_eq!(left, [Source::Ads]);
}

#[test]
fn our_own_identity_answers_for_its_names_whatever_the_source() {
    let store = SecretStore::new();
    let (certificate, roots) = store.use_own_identity();
    let asked = store
        .subscribe(&config(OWN_CERTIFICATE, grpc("sds-grpc")))
        .unwrap();
    assert!(Arc::ptr_eq(&asked, &certificate) && !asked.is_ready());
    let asked = store
        .subscribe(&config(OWN_ROOTS, grpc("sds-grpc")))
        .unwrap();
    assert!(Arc::ptr_eq(&asked, &roots));
    let other = store.subscribe(&config("other", grpc("sds-grpc"))).unwrap();
    assert_eq!(other.source(), &Source::Grpc("sds-grpc".into()));
}

#[test]
fn files_are_read_again_and_half_written_ones_are_not_used() {
    let ca = Authority::new();
    let dir = tempfile::tempdir().unwrap();
    let write = |issued: &Issued| {
        fs::write(dir.path().join("chain"), &issued.chain).unwrap();
        fs::write(dir.path().join("key"), &issued.key).unwrap();
    };
    write(&ca.issue("spiffe://td/ns/a/sa/one", &[]));
    let file = |name: &str| {
        Some(DataSource {
            specifier: Some(Specifier::Filename(
                dir.path().join(name).display().to_string(),
            )),
            watched_directory: None,
        })
    };
    let store = SecretStore::new();
    let slot = store
        .inline_certificate(&TlsCertificate {
            certificate_chain: file("chain"),
            private_key: file("key"),
            ..TlsCertificate::default()
        })
        .unwrap();
    let name = || slot.certificate().unwrap().facts.uri_sans[0].clone();
    assert_eq!((&*name(), slot.version()), ("spiffe://td/ns/a/sa/one", 1));
    store.reload_files();
    assert_eq!(slot.version(), 1);
    let two = ca.issue("spiffe://td/ns/a/sa/two", &[]);
    fs::write(dir.path().join("chain"), &two.chain).unwrap();
    store.reload_files();
    assert_eq!((&*name(), slot.version()), ("spiffe://td/ns/a/sa/one", 1));
    write(&two);
    store.reload_files();
    assert_eq!((&*name(), slot.version()), ("spiffe://td/ns/a/sa/two", 2));
}

#[test]
fn secrets_are_not_printed() {
    let ca = Authority::new();
    let issued = ca.issue("spiffe://td/ns/a/sa/one", &[]);
    let certificate =
        Certificate::from_pem(issued.chain.as_bytes(), issued.key.as_bytes()).unwrap();
    let printed = format!("{certificate:?}");
    assert!(printed.contains("***") && !printed.contains("PRIVATE"));
}
