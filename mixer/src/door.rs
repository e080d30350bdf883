//! `istio.mixer.v1.Mixer` on bytes: attributes go straight from the message into bags, without the generated types
//! in between. A batch of reports would otherwise cost more to read than to record.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf as _, Bytes};
use lateen_protocols::istio::mixer::v1::{CheckResponse, ReportResponse};
use prost::Message;
use tonic::{
    Request, Response, Status,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    server::{Grpc, NamedService, UnaryService},
};

use crate::serve::{MAX_MESSAGE_BYTES, Service};

/// Names of the calls.
const CHECK: &str = "/istio.mixer.v1.Mixer/Check";
const REPORT: &str = "/istio.mixer.v1.Mixer/Report";

/// The API, for a tonic server.
#[derive(Clone, Debug)]
pub struct Door(pub(crate) Service);

impl NamedService for Door {
    const NAME: &'static str = "istio.mixer.v1.Mixer";
}

type Answer<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl tower_service::Service<http::Request<Body>> for Door {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let service = self.0.clone();
        match request.uri().path() {
            CHECK => Box::pin(async move {
                let answer = grpc::<CheckResponse>().unary(Check(service), request).await;
                Ok(answer)
            }),
            REPORT => Box::pin(async move {
                let answer = grpc::<ReportResponse>()
                    .unary(Report(service), request)
                    .await;
                Ok(answer)
            }),
            path => {
                let status = Status::unimplemented(format!("there is no {path}"));
                Box::pin(async move { Ok(status.into_http()) })
            }
        }
    }
}

fn grpc<T: Message + Send + 'static>() -> Grpc<Raw<T>> {
    Grpc::new(Raw(std::marker::PhantomData))
        .apply_max_message_size_config(Some(MAX_MESSAGE_BYTES), None)
}

struct Check(Service);

impl UnaryService<Bytes> for Check {
    type Response = CheckResponse;
    type Future = Answer<Result<Response<CheckResponse>, Status>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let service = self.0.clone();
        Box::pin(async move { service.check(request).await })
    }
}

struct Report(Service);

impl UnaryService<Bytes> for Report {
    type Response = ReportResponse;
    type Future = Answer<Result<Response<ReportResponse>, Status>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let service = self.0.clone();
        Box::pin(async move { service.report(request).await })
    }
}

/// Takes messages as they are, and writes answers of type `T`.
struct Raw<T>(std::marker::PhantomData<T>);

impl<T: Message + Send + 'static> Codec for Raw<T> {
    type Encode = T;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Raw(std::marker::PhantomData)
    }

    fn decoder(&mut self) -> Self {
        Raw(std::marker::PhantomData)
    }
}

impl<T: Message + Send + 'static> Encoder for Raw<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(out)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

impl<T: Send + 'static> Decoder for Raw<T> {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(message.copy_to_bytes(message.remaining())))
    }
}
