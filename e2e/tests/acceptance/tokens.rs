//! Tokens of end users on both data planes: RequestAuthentication says which are good, AuthorizationPolicy which are
//! demanded.

use std::{net::SocketAddr, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use e2e::{
    app,
    http::{Client, Response},
    mesh::Mesh,
    workload::Workload,
};
use http_body_util::Full;
use rcgen::{KeyPair, PKCS_ED25519, SigningKey as _};
use serde_json::{Value, json};

use super::support::{Sidecar, add_sleep, ask, eventually, on_both};

on_both!(a_token_is_verified_and_who_it_is_of_counts);

/// Far from now, on either side.
const PAST: u64 = 1_000_000_000;
const FUTURE: u64 = 4_000_000_000;

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: { name: httpbin }
spec: { selector: { app: httpbin }, ports: [{ name: http, port: 8000 }] }
";

/// Joe alone, and whoever is in the group of readers.
const POLICY: &str = r#"apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: users, namespace: default }
spec:
  selector: { matchLabels: { app: httpbin } }
  rules:
  - from: [{ source: { requestPrincipals: ["inline.test/joe"] } }]
  - when: [{ key: "request.auth.claims[groups]", values: [readers] }]
"#;

fn rules(keys: &str, uri: &str) -> String {
    format!(
        r#"apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{ name: users, namespace: default }}
spec:
  selector: {{ matchLabels: {{ app: httpbin }} }}
  jwtRules:
  - issuer: inline.test
    audiences: [shop]
    jwks: '{keys}'
    outputClaimToHeaders: [{{ header: x-user, claim: sub }}]
  - issuer: fetched.test
    jwksUri: {uri}
    fromHeaders: [{{ name: x-token, prefix: "T " }}]
    forwardOriginalToken: true
"#
    )
}

fn jwks(key: &KeyPair) -> String {
    let x = URL_SAFE_NO_PAD.encode(key.public_key_raw());
    json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "x": x}]}).to_string()
}

fn token(key: &KeyPair, claims: &Value) -> anyhow::Result<String> {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!(
        "{}.{}",
        part(&json!({"alg": "EdDSA", "typ": "JWT"})),
        part(claims)
    );
    let signature = URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes())?);
    Ok(format!("{signed}.{signature}"))
}

async fn a_token_is_verified_and_who_it_is_of_counts(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.options() else {
        return Ok(());
    };
    let (mut mesh, client) = (Mesh::start(options).await?, Client::new());
    let instance = mesh.add(Workload::new("httpbin", &[("app", "httpbin")], 8000), false)?;
    let address = SocketAddr::from((instance.address.ip, instance.workload.app_port(8000)));
    let _app = app::httpbin(address, "v1").await?;
    add_sleep(&mut mesh)?;
    let (own, published, foreign) = (
        KeyPair::generate_for(&PKCS_ED25519)?,
        KeyPair::generate_for(&PKCS_ED25519)?,
        KeyPair::generate_for(&PKCS_ED25519)?,
    );
    let set = Bytes::from(jwks(&published));
    let outside = SocketAddr::from((mesh.block().outside(0), 0));
    let issuer = app::serve(outside, move |_, _| {
        let answer = http::Response::new(Full::new(set.clone()));
        async move { answer }
    })
    .await?;
    mesh.apply("httpbin.yaml", SERVICE).await?;
    mesh.apply(
        "issuer.yaml",
        &format!(
            "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{ name: issuer, namespace: default }}
spec:
  hosts: [keys.fetched.test]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{{ number: 80, name: http, protocol: HTTP }}]
  endpoints: [{{ address: {}, ports: {{ http: {} }} }}]
",
            issuer.address.ip(),
            issuer.address.port()
        ),
    )
    .await?;
    mesh.ready().await?;

    let claims = |issuer: &str, user: &str, until: u64| json!({"iss": issuer, "sub": user, "aud": "shop", "exp": until});
    let bearer = |key: &KeyPair, claims: &Value| -> anyhow::Result<String> {
        Ok(format!("Bearer {}", token(key, claims)?))
    };
    let joe = bearer(&own, &claims("inline.test", "joe", FUTURE))?;
    let jim = bearer(&own, &claims("inline.test", "jim", FUTURE))?;
    let mut reader = claims("fetched.test", "ann", FUTURE);
    reader["groups"] = json!(["writers", "readers"]);
    let reader = format!("T {}", token(&published, &reader)?);
    let bad = [
        bearer(&own, &claims("inline.test", "joe", PAST))?,
        bearer(&own, &claims("somebody.test", "joe", FUTURE))?,
        bearer(&foreign, &claims("inline.test", "joe", FUTURE))?,
        "Bearer a.b.c".to_owned(),
    ];
    let elsewhere = bearer(
        &own,
        &json!({"iss": "inline.test", "sub": "joe", "aud": "bank", "exp": FUTURE}),
    )?;

    let send = async |mesh: &Mesh, headers: &[(&str, &str)]| -> anyhow::Result<Response> {
        let from = mesh.instance("sleep-0")?;
        ask(&client, from, "httpbin:8000", "/headers", headers).await
    };
    let expect = async |mesh: &Mesh, rows: &[(&[(&str, &str)], u16)]| {
        eventually(Duration::from_secs(10), async || {
            for (headers, status) in rows {
                let response = send(mesh, headers).await?;
                anyhow::ensure!(
                    response.status == *status,
                    "{headers:?}: {}, not {status}: {}",
                    response.status,
                    response.text()
                );
            }
            Ok(())
        })
        .await
    };
    let refused: Vec<[(&str, &str); 1]> = bad
        .iter()
        .map(|token| [("authorization", token.as_str())])
        .collect();
    let refused: Vec<(&[(&str, &str)], u16)> = refused.iter().map(|one| (&one[..], 401)).collect();

    mesh.apply(
        "tokens.yaml",
        &rules(&jwks(&own), "http://keys.fetched.test/keys"),
    )
    .await?;
    expect(&mesh, &refused).await?;
    expect(
        &mesh,
        &[
            (&[], 200),
            (&[("authorization", &joe)], 200),
            (&[("authorization", &elsewhere)], 403),
            (&[("x-token", &reader)], 200),
        ],
    )
    .await?;
    // The claim comes from a verified token only, and a token goes on only where that is said.
    let seen = send(&mesh, &[("authorization", &joe), ("x-user", "root")]).await?;
    let seen = seen.json()?["headers"].clone();
    assert_eq!(seen["x-user"], "joe");
    assert_eq!(seen["authorization"], Value::Null);
    let seen = send(&mesh, &[("x-user", "root")]).await?.json()?["headers"].clone();
    assert_eq!(seen["x-user"], Value::Null);
    let seen = send(&mesh, &[("x-token", &reader)]).await?.json()?["headers"].clone();
    assert_eq!(seen["x-token"], reader.as_str());

    mesh.apply("policy.yaml", POLICY).await?;
    expect(
        &mesh,
        &[
            (&[], 403),
            (&[("authorization", &joe)], 200),
            (&[("authorization", &jim)], 403),
            (&[("x-token", &reader)], 200),
        ],
    )
    .await?;
    expect(&mesh, &refused).await?;

    // Keys that cannot be had verify nothing; the other issuer's are as good as before.
    mesh.apply(
        "tokens.yaml",
        &rules(&jwks(&own), "http://nobody.test/keys"),
    )
    .await?;
    expect(
        &mesh,
        &[
            (&[("x-token", &reader)], 401),
            (&[("authorization", &joe)], 200),
            (&[], 403),
        ],
    )
    .await
}
