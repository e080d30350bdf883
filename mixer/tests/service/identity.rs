//! The port with mutual TLS: members of the mesh only.

use std::{sync::Arc, time::Duration};

use lateen_identity::{PeerMatch, Svid, TrustBundle};
use lateen_protocols::{
    envoy::envoy::service::auth::v3::{self as envoy, authorization_client::AuthorizationClient},
    istio::mixer::v1::{CheckRequest, mixer_client::MixerClient},
};
use lateen_service::{identity::Source, shutdown::Drain, tls};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType,
};

use crate::support::args;

/// A certificate authority of one test.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    bundle: Arc<TrustBundle>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.subject_alt_names = vec![SanType::URI("spiffe://cluster.local".try_into().unwrap())];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let domain = "cluster.local".parse().unwrap();
        let bundle = Arc::new(TrustBundle::from_pem(domain, &issuer.pem()).unwrap());
        Self { issuer, bundle }
    }

    fn identity(&self, account: &str) -> Source {
        let id = format!("spiffe://cluster.local/ns/istio-system/sa/{account}");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap())];
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        let svid = Svid::from_pem(&leaf.pem(), &key.serialize_pem(), self.bundle.clone());
        Source::fixed(svid.unwrap())
    }
}

#[tokio::test]
async fn only_members_of_the_mesh_are_served() {
    lateen_service::init_crypto();
    let ours = Authority::new();
    let theirs = Authority::new();
    let folder = tempfile::tempdir().unwrap();
    let mut args = args();
    args.config_dir = Some(folder.path().to_owned());
    let identity = Some(ours.identity("mixer"));
    let mut running = mixer::server::start_as(&args, identity, Drain::new(), |i| i)
        .await
        .unwrap();
    running.updates.wait_for(|count| *count > 0).await.unwrap();
    let address = running.tls_address.unwrap().to_string();
    let mixer = PeerMatch::id(
        "spiffe://cluster.local/ns/istio-system/sa/mixer"
            .parse()
            .unwrap(),
    );

    let member = ours.identity("sleep").client_config(mixer.clone());
    let channel = tls::channel(&address, member).unwrap();
    let answer = MixerClient::new(channel)
        .check(CheckRequest::default())
        .await
        .unwrap();
    assert_eq!(
        answer
            .into_inner()
            .precondition
            .unwrap()
            .status
            .unwrap()
            .code,
        0
    );

    // What a caller says of itself has to be of its own namespace, by Envoy's protocols.
    for (uid, denied) in [
        ("kubernetes://sleep-1.istio-system", None),
        ("kubernetes://details-1.default", Some(403)),
    ] {
        let member = ours.identity("sleep").client_config(mixer.clone());
        let channel = tls::channel(&address, member).unwrap();
        let mut request = tonic::Request::new(envoy::CheckRequest {
            attributes: Some(envoy::AttributeContext::default()),
        });
        request
            .metadata_mut()
            .insert("mixer-attribute-destination.uid", uid.parse().unwrap());
        let answer = AuthorizationClient::new(channel)
            .check(request)
            .await
            .unwrap();
        let status = match answer.into_inner().http_response.unwrap() {
            envoy::check_response::HttpResponse::DeniedResponse(answer) => {
                Some(answer.status.unwrap().code)
            }
            _ => None,
        };
        assert_eq!(status, denied, "{uid}");
    }

    // They trust us for the test's sake, but their certificate is nothing to us.
    let stranger = theirs.identity("sleep");
    let verifier = lateen_identity::SpiffeServerVerifier::new(
        lateen_identity::Trust::Fixed(ours.bundle.clone()),
        PeerMatch::AnyTrusted,
    );
    let config = lateen_identity::client_config(Some(stranger.cell()), verifier, &[tls::ALPN_H2]);
    let channel = tls::channel(&address, Arc::new(config)).unwrap();
    assert!(
        MixerClient::new(channel)
            .check(CheckRequest::default())
            .await
            .is_err()
    );
    let channel = tls::channel_plain(&address).unwrap();
    assert!(
        MixerClient::new(channel)
            .check(CheckRequest::default())
            .await
            .is_err()
    );
    running.stop(Duration::from_secs(5)).await;
}
