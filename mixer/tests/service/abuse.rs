//! Bad input to the port: a clear error, and the next caller is served.

use bytes::Bytes;
use lateen_adapter::codec::Raw;
use lateen_protocols::istio::mixer::v1::{
    CheckRequest, CheckResponse, CompressedAttributes, ReportRequest, check_request::QuotaParams,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Code, Request, Status, client::Grpc, transport::Channel};

use crate::support::{Mesh, told};

async fn raw(mesh: &Mesh, method: &'static str, body: Vec<u8>) -> Result<Bytes, Status> {
    let url = format!("http://{}", mesh.running.address);
    let channel = Channel::from_shared(url).unwrap().connect().await.unwrap();
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static(method);
    let response = grpc.unary(Request::new(Bytes::from(body)), path, Raw).await;
    response.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn bytes_that_are_no_message_are_refused() {
    let mut mesh = Mesh::start(&[]).await;
    let mut seed = 1u64;
    for method in [
        "/istio.mixer.v1.Mixer/Check",
        "/istio.mixer.v1.Mixer/Report",
    ] {
        for length in [1, 7, 64, 1000] {
            let bytes: Vec<u8> = (0..length)
                .map(|_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (seed >> 56) as u8 | 0x87 // field 16 and above, wire type 7: never valid
                })
                .collect();
            assert!(raw(&mesh, method, bytes).await.is_err());
        }
    }
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
}

#[tokio::test]
async fn messages_that_are_too_large_are_refused() {
    let mut mesh = Mesh::start(&[]).await;
    let request = CheckRequest {
        attributes: Some(CompressedAttributes {
            words: vec!["x".repeat(2 << 20)],
            ..CompressedAttributes::default()
        }),
        ..CheckRequest::default()
    };
    let error = mesh.client.check(request).await.unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange, "{error}");
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused() {
    let mut mesh = Mesh::start(&[]).await;
    let quotas = |n: i32, amount: i64| {
        let params = QuotaParams {
            amount,
            best_effort: false,
        };
        (0..n).map(|i| (i.to_string(), params)).collect()
    };
    for request in [
        CheckRequest {
            global_word_count: 10_000,
            ..CheckRequest::default()
        },
        CheckRequest {
            quotas: quotas(1000, 1),
            ..CheckRequest::default()
        },
        CheckRequest {
            quotas: quotas(1, -5),
            ..CheckRequest::default()
        },
        CheckRequest {
            attributes: Some(CompressedAttributes {
                words: vec![String::new(); 100_000],
                ..CompressedAttributes::default()
            }),
            ..CheckRequest::default()
        },
    ] {
        let error = mesh.client.check(request).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    }
    let many = ReportRequest {
        attributes: vec![CompressedAttributes::default(); 100_000],
        ..ReportRequest::default()
    };
    assert_eq!(
        mesh.client.report(many).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    let response: CheckResponse = mesh.check_with(&[], &[], "").await;
    assert_eq!(told(&response.precondition.unwrap()), "OK:");
}

#[tokio::test]
async fn a_connection_that_speaks_no_http2_is_closed() {
    let mut mesh = Mesh::start(&[]).await;
    let mut stream = tokio::net::TcpStream::connect(mesh.running.address)
        .await
        .unwrap();
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.ok();
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
}
