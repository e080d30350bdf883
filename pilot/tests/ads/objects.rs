//! Configuration objects as Mixer reads them, and what every stream has in common.

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};
use envoy_types::pb::google::rpc::Status as RpcStatus;
use lateen_identity::{PeerMatch, Svid, TrustBundle};
use lateen_protocols::istio::mcp::v1alpha1::Resource;
use lateen_service::identity;
use lateen_service::shutdown::Drain;
use lateen_service::tls;
use pilot::server::{Config, Pilot};
use prost::Message;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::world::{Client, RULE, SOON, WORKLOAD, World, config, get, rule, set};

fn reader() -> Option<Node> {
    Some(Node {
        id: "mixer~127.0.0.1~mixer-1.istio-system~istio-system.svc.cluster.local".into(),
        ..Node::default()
    })
}

fn first(url: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        node: reader(),
        type_url: url.into(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn nack(response: &DeltaDiscoveryResponse, reason: &str) -> DeltaDiscoveryRequest {
    let error = RpcStatus {
        code: 3,
        message: reason.into(),
        ..RpcStatus::default()
    };
    DeltaDiscoveryRequest {
        error_detail: Some(error),
        ..ack(response)
    }
}

fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response
        .resources
        .iter()
        .map(|resource| resource.name.as_str())
        .collect()
}

#[tokio::test]
async fn objects_are_streamed_by_delta_and_live_when_acknowledged() {
    let world = World::new(&(rule("a", "\"true\"") + &rule("b", "\"true\""))).await;
    assert_eq!(world.live(), 1, "nobody is connected");
    let mut client = world.delta().await;
    client.ask(first(RULE)).await;
    let answer = client.answer().await;
    assert_eq!(names(&answer), ["ns/a", "ns/b"]);
    let body = answer.resources[0].resource.clone().unwrap();
    assert_eq!(
        body.type_url,
        "type.googleapis.com/istio.mcp.v1alpha1.Resource"
    );
    let resource = Resource::decode(body.value.as_slice()).unwrap();
    assert_eq!(resource.metadata.unwrap().name, "ns/a");
    let spec = prost_types::Struct::decode(resource.body.unwrap().value.as_slice()).unwrap();
    assert!(spec.fields.contains_key("actions"));

    assert_eq!(world.live(), 0, "sent, not acknowledged");
    client.ask(ack(&answer)).await;
    world.live_at(1).await;

    world
        .apply(&(rule("b", "\"false\"") + &rule("c", "\"true\"")))
        .await;
    let answer = client.answer().await;
    assert_eq!(
        (names(&answer), &*answer.removed_resources),
        (vec!["ns/b", "ns/c"], &["ns/a".to_owned()][..])
    );
    assert_eq!(world.live(), 1);
    client.ask(ack(&answer)).await;
    world.live_at(2).await;

    // What the client does not ask for is live on it at once.
    world
        .apply(&(rule("b", "\"false\"") + &rule("c", "\"true\"") + GATEWAY))
        .await;
    world.live_at(3).await;
}

const GATEWAY: &str = "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: { name: g, namespace: ns }\nspec: { servers: [{ port: { number: 80, name: http, protocol: HTTP }, hosts: ['*'] }] }\n---\n";

#[tokio::test]
async fn objects_are_streamed_whole_to_state_of_the_world_clients() {
    let world = World::new(&rule("a", "\"true\"")).await;
    let mut client = world.sotw().await;
    let ask = |nonce: &str| DiscoveryRequest {
        node: reader(),
        type_url: RULE.into(),
        response_nonce: nonce.into(),
        ..DiscoveryRequest::default()
    };
    client.ask(ask("")).await;
    let one = client.answer().await;
    assert_eq!((one.resources.len(), one.type_url.as_str()), (1, RULE));
    // A stale nonce is ignored; the right one counts.
    client.ask(ask("stale")).await;
    client.ask(ask(&one.nonce)).await;
    world.live_at(1).await;

    world
        .apply(&(rule("a", "\"true\"") + &rule("b", "\"true\"")))
        .await;
    let two = client.answer().await;
    assert_eq!(two.resources.len(), 2);
    assert_ne!(one.version_info, two.version_info);
    client.ask(ask(&two.nonce)).await;
    world.live_at(2).await;
    let (_, metrics) = world.get("/metrics").await;
    assert!(
        metrics.contains("pilot_xds_expired_nonce_total{type=\"generic\"} 1"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_refusal_is_shown_and_not_repeated() {
    let world = World::new(&rule("a", "\"true\"")).await;
    let mut client = world.delta().await;
    client.ask(first(RULE)).await;
    let answer = client.answer().await;
    client.ask(ack(&answer)).await;
    world.live_at(1).await;

    world.apply(&rule("a", "\"bad\"")).await;
    let answer = client.answer().await;
    client.ask(nack(&answer, "will not do")).await;
    // The next answer is the one to the next question, not the refused one again.
    client.ask(first(WORKLOAD)).await;
    assert_eq!(client.answer().await.type_url, WORKLOAD);
    assert_eq!(world.live(), 1);
    let (status, body) = world.get("/debug/generation").await;
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (status, &body["generation"], &body["live"]),
        (200, &2.into(), &1.into())
    );
    let refusal = body["refusals"][0].as_str().unwrap();
    assert!(
        refusal.contains("ns/a") && refusal.contains("will not do"),
        "{refusal}"
    );
    let (_, syncz) = world.get("/debug/syncz").await;
    let syncz: Value = serde_json::from_str(&syncz).unwrap();
    assert_eq!(syncz[0]["types"][RULE]["status"], "NACKED");
    assert_eq!(syncz[0]["types"][RULE]["error"], "will not do");
}

#[tokio::test]
async fn a_restart_sends_nothing_that_is_held_already() {
    let yaml = rule("a", "\"true\"") + &rule("b", "\"true\"");
    let before = World::new(&yaml).await;
    let mut client = before.delta().await;
    client.ask(first(RULE)).await;
    let answer = client.answer().await;
    let held: HashMap<String, String> = answer
        .resources
        .iter()
        .map(|resource| (resource.name.clone(), resource.version.clone()))
        .collect();
    assert!(before.drain.finish(SOON).await, "streams end when draining");
    assert_eq!(client.end().await.code(), Code::Unavailable);

    let after = World::new(&yaml).await;
    let mut client = after.delta().await;
    client
        .ask(DeltaDiscoveryRequest {
            initial_resource_versions: held,
            ..first(RULE)
        })
        .await;
    let answer = client.answer().await;
    assert!(
        answer.resources.is_empty() && answer.removed_resources.is_empty(),
        "{answer:?}"
    );
    client.ask(ack(&answer)).await;
    after.live_at(1).await;
}

#[tokio::test]
async fn streams_that_make_no_sense_are_refused() {
    let world = World::new("").await;
    let refused = async |ask: DeltaDiscoveryRequest| {
        let mut client = world.delta().await;
        client.ask(ask).await;
        client.end().await
    };
    let no_node = refused(DeltaDiscoveryRequest {
        node: None,
        ..first(RULE)
    })
    .await;
    assert_eq!(no_node.code(), Code::InvalidArgument);
    let no_id = refused(DeltaDiscoveryRequest {
        node: Some(Node::default()),
        ..first(RULE)
    })
    .await;
    assert_eq!(no_id.code(), Code::InvalidArgument);
    let no_proxy = refused(first("type.googleapis.com/envoy.config.cluster.v3.Cluster")).await;
    assert_eq!(no_proxy.code(), Code::InvalidArgument);
    let no_type = refused(first("what is this")).await;
    assert_eq!(no_type.code(), Code::InvalidArgument);
    assert_eq!(world.pilot.discovery.ledger().connections().len(), 0);
}

#[tokio::test]
async fn clients_that_leave_are_no_longer_waited_for() {
    let world = World::new(&rule("a", "\"true\"")).await;
    let mut client = world.delta().await;
    client.ask(first(RULE)).await;
    client.answer().await;
    assert_eq!(world.live(), 0);
    drop(client);
    world.live_at(1).await;
}

const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: reviews-1\n  namespace: default\n  labels: { app: reviews }\nspec:\n  serviceAccountName: reviews\n  containers: [{ name: app, ports: [{ containerPort: 9080 }] }]\nstatus: { podIP: 127.0.0.9, phase: Running }\n---\n";

#[tokio::test]
async fn workloads_are_streamed_as_mixer_sees_them() {
    let world = World::new(POD).await;
    let mut client = world.delta().await;
    client.ask(first(WORKLOAD)).await;
    let answer = client.answer().await;
    assert_eq!(names(&answer), ["default/reviews-1"]);
    let body = answer.resources[0].resource.clone().unwrap();
    let resource = Resource::decode(body.value.as_slice()).unwrap();
    let spec = prost_types::Struct::decode(resource.body.unwrap().value.as_slice()).unwrap();
    let text = |key: &str| match spec.fields[key].kind.clone() {
        Some(prost_types::value::Kind::StringValue(text)) => text,
        other => panic!("{key}: {other:?}"),
    };
    assert_eq!(text("uid"), "kubernetes://reviews-1.default");
    assert_eq!(text("ip"), "127.0.0.9");
    assert_eq!(text("serviceAccount"), "reviews");
}

#[tokio::test]
async fn a_broken_file_is_named_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("rule.yaml"), rule("a", "\"true\"")).unwrap();
    let drain = Drain::new();
    let config = Config {
        config_dir: Some(dir.path().into()),
        ..config()
    };
    let pilot = Pilot::start(&config, &drain).await.unwrap();
    let mut served = pilot.discovery.subscribe();
    timeout(SOON, served.wait_for(Option::is_some))
        .await
        .unwrap()
        .unwrap();
    let http = pilot.http;

    let (status, _) = get(http, "/healthz/ready").await;
    assert_eq!(status, 200);
    std::fs::write(dir.path().join("rule.yaml"), "kind: [").unwrap();
    let broken = served.wait_for(|served| {
        served
            .as_ref()
            .is_some_and(|served| !served.problems.is_empty())
    });
    timeout(SOON, broken).await.unwrap().unwrap();
    let generation = pilot.discovery.served().unwrap().snapshot.generation;
    let (_, body) = get(http, &format!("/debug/generation?wait={generation}")).await;
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["live"], generation);
    assert!(
        body["problems"][0]
            .as_str()
            .unwrap()
            .starts_with("rule.yaml:1:"),
        "{body}"
    );
    let (_, objects) = get(http, "/debug/configz").await;
    let objects: Value = serde_json::from_str(&objects).unwrap();
    assert_eq!(objects[0]["name"], "a", "the last good version stays");
    assert!(drain.finish(SOON).await);
}

#[tokio::test]
async fn the_debug_pages_and_metrics_are_there() {
    let world = World::new(&(rule("a", "\"true\"") + POD)).await;
    for page in [
        "/debug",
        "/debug/syncz?resources",
        "/debug/config_status",
        "/debug/registryz",
        "/debug/configz",
        "/debug/push_status",
        "/healthz/ready",
    ] {
        assert_eq!(world.get(page).await.0, 200, "{page}");
    }
    assert_eq!(world.get("/debug/config_dump").await.0, 400);
    assert_eq!(world.get("/debug/config_dump?proxyID=x").await.0, 404);
    assert_eq!(world.get("/debug/generation?wait=x").await.0, 400);
    let (_, status) = world.get("/debug/config_status?kind=rule").await;
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!(
        (&status[0]["generation"], &status[0]["live"]),
        (&1.into(), &true.into())
    );
    let (_, metrics) = world.get("/metrics").await;
    for name in [
        "pilot_services",
        "pilot_virt_services",
        "pilot_proxy_convergence_time",
        "pilot_xds_cds_reject",
    ] {
        assert!(metrics.contains(name), "{name}");
    }
}

/// A certificate authority of this test alone.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    bundle: Arc<TrustBundle>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let domain = "spiffe://cluster.local".try_into().unwrap();
        params.subject_alt_names = vec![SanType::URI(domain)];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let bundle =
            TrustBundle::from_pem("cluster.local".parse().unwrap(), &issuer.pem()).unwrap();
        Self {
            issuer,
            bundle: Arc::new(bundle),
        }
    }

    fn identity(&self, id: &str) -> identity::Source {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        let svid = Svid::from_pem(&leaf.pem(), &key.serialize_pem(), self.bundle.clone()).unwrap();
        identity::Source::fixed(svid)
    }
}

#[tokio::test]
async fn over_mtls_a_client_is_who_its_certificate_says() {
    lateen_service::init_crypto();
    let authority = Authority::new();
    let pilot_id = "spiffe://cluster.local/ns/istio-system/sa/pilot";
    let (_source, receiver) = watch::channel(set(1, &rule("a", "\"true\"")));
    let drain = Drain::new();
    let pilot = Pilot::with_source(
        &config(),
        receiver,
        Some(authority.identity(pilot_id)),
        &drain,
    )
    .await
    .unwrap();
    let mut served = pilot.discovery.subscribe();
    timeout(SOON, served.wait_for(Option::is_some))
        .await
        .unwrap()
        .unwrap();
    let address = pilot.tls.unwrap().to_string();
    let connect = async |id: &str| {
        let expected = PeerMatch::id(pilot_id.parse().unwrap());
        let channel =
            tls::channel(&address, authority.identity(id).client_config(expected)).unwrap();
        let (sender, receiver) = mpsc::channel(16);
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let answers = client
            .delta_aggregated_resources(ReceiverStream::new(receiver))
            .await
            .unwrap()
            .into_inner();
        let client = Client { sender, answers };
        client.ask(first(RULE)).await;
        client
    };

    let mut own = connect("spiffe://cluster.local/ns/istio-system/sa/mixer").await;
    assert_eq!(names(&own.answer().await), ["ns/a"]);
    let (_, syncz) = get(pilot.http, "/debug/syncz").await;
    assert!(
        syncz.contains("spiffe://cluster.local/ns/istio-system/sa/mixer"),
        "{syncz}"
    );
    let mut other = connect("spiffe://cluster.local/ns/default/sa/mixer").await;
    assert_eq!(other.end().await.code(), Code::PermissionDenied);

    // Without a certificate there is no connection at all.
    let mut plain = AggregatedDiscoveryServiceClient::connect(format!("http://{address}")).await;
    let refused = match &mut plain {
        Err(_) => true,
        Ok(client) => client
            .delta_aggregated_resources(tokio_stream::iter([first(RULE)]))
            .await
            .is_err(),
    };
    assert!(refused);
}
