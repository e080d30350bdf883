//! Hands instances on to an adapter process, in the messages of Istio's out-of-process protocol: for the
//! templates `checknothing`, `reportnothing`, `metric` and `quota`, without descriptors in the configuration.
//!
//! Each call is one call of the process, with what is left of the caller's deadline. What goes wrong is the
//! rule's fail mode.

mod message;

use std::{sync::Arc, time::Duration};

use base64::Engine as _;
use futures::{FutureExt as _, future::BoxFuture};
use http::uri::PathAndQuery;
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, CheckHandler, CheckResult, Env, Handler, HandlerError,
    Info, QuotaArgs, QuotaHandler, QuotaResult, ReportHandler,
    instance::{CheckInstance, QuotaInstance, ReportInstance},
    params, template,
};
use lateen_protocols::istio::mixer::adapter::model::v1beta1 as model;
use prost::Message;
use serde::Deserialize;
use tokio::time::Instant;
use tonic::{
    Request,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use self::message::{
    CheckNothingRequest, MetricRequest, Name, QuotaRequest, ReportNothingRequest, dimensions,
};
use crate::remote::wire::{span, status};

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(1);
/// A connection that says nothing for so long is asked whether it lives, and given up when it does not.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct Bypass;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    #[serde(alias = "backend_address")]
    backend_address: String,
    params: Option<RawAny>,
    #[serde(alias = "session_based", deserialize_with = "params::boolean")]
    session_based: bool,
}

/// A message whose type is not known here.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAny {
    #[serde(rename = "@type", alias = "typeUrl", alias = "type_url")]
    type_url: String,
    #[serde(default)]
    value: String,
}

fn config(raw: &serde_json::Value) -> Result<(String, Option<prost_types::Any>), String> {
    let params = params::parse::<Params>(raw)?;
    let address = params.backend_address.rsplit_once(':');
    if address.is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err()) {
        return Err(format!(
            "backendAddress: {:?} is not HOST:PORT",
            params.backend_address
        ));
    }
    if params.session_based {
        return Err(
            "sessionBased: sessions are not supported; parameters go with each call".to_owned(),
        );
    }
    let any = match params.params {
        None => None,
        Some(raw) => Some(prost_types::Any {
            type_url: raw.type_url,
            value: base64::prelude::BASE64_STANDARD
                .decode(&raw.value)
                .map_err(|e| format!("params.value: it is not base64: {e}"))?,
        }),
    };
    Ok((params.backend_address, any))
}

impl Adapter for Bypass {
    fn info(&self) -> Info {
        Info {
            name: "bypass",
            description: "hands instances on to an adapter process",
            templates: const {
                &[
                    &template::CHECKNOTHING,
                    &template::REPORTNOTHING,
                    &template::METRIC,
                    &template::QUOTA,
                ]
            },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        config(candidate.params).err().into_iter().collect()
    }

    fn build(&self, candidate: &Candidate<'_>, _env: Env) -> Result<Handler, BuildError> {
        let (address, params) = config(candidate.params).map_err(BuildError)?;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|e| BuildError(format!("backendAddress: {e}")))?;
        // Opens nothing yet: a process that is down must not keep rules from being loaded.
        let channel = endpoint
            .connect_timeout(CONNECT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .connect_lazy();
        let process = Arc::new(Process {
            address,
            channel,
            params,
        });
        Ok(Handler::new()
            .with_check(process.clone())
            .with_report(process.clone())
            .with_quota(process))
    }
}

/// The process that is called.
struct Process {
    address: String,
    channel: Channel,
    params: Option<prost_types::Any>,
}

impl Process {
    async fn call<Q, A>(
        &self,
        path: &'static str,
        request: Q,
        deadline: Instant,
    ) -> Result<A, HandlerError>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let failed = |what: String| {
            HandlerError::unavailable(format!("the adapter at {}: {what}", self.address))
        };
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|e| failed(e.to_string()))?;
        let mut request = Request::new(request);
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        let path = PathAndQuery::from_static(path);
        let answer = grpc
            .unary(request, path, ProstCodec::<Q, A>::default())
            .await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| failed(format!("{}: {}", status.code(), status.message())))
    }
}

impl CheckHandler for Process {
    fn check<'a>(
        &'a self,
        instance: CheckInstance,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<CheckResult, HandlerError>> {
        async move {
            let request = CheckNothingRequest {
                instance: Some(Name {
                    name: instance.name().to_string(),
                }),
                adapter_config: self.params.clone(),
                dedup_id: String::new(),
            };
            let path = "/checknothing.HandleCheckNothingService/HandleCheckNothing";
            let answer: model::CheckResult = self.call(path, request, call.deadline).await?;
            Ok(CheckResult {
                status: status(answer.status)?,
                valid_duration: span(answer.valid_duration),
                valid_use_count: Some(answer.valid_use_count).filter(|n| *n != 0),
            })
        }
        .boxed()
    }
}

impl ReportHandler for Process {
    fn report<'a>(
        &'a self,
        batch: Vec<ReportInstance>,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        async move {
            let mut nothing = ReportNothingRequest {
                adapter_config: self.params.clone(),
                ..ReportNothingRequest::default()
            };
            let mut metrics = MetricRequest {
                adapter_config: self.params.clone(),
                ..MetricRequest::default()
            };
            for instance in batch {
                match instance {
                    ReportInstance::ReportNothing(i) => nothing.instances.push(Name {
                        name: i.name.to_string(),
                    }),
                    ReportInstance::Metric(metric) => metrics.instances.push(metric.into()),
                    ReportInstance::LogEntry(_)
                    | ReportInstance::TraceSpan(_)
                    | ReportInstance::Custom(_) => {}
                }
            }
            // One batch for each template, at the same time.
            let reported = async {
                let path = "/reportnothing.HandleReportNothingService/HandleReportNothing";
                match nothing.instances.as_slice() {
                    [] => Ok(model::ReportResult {}),
                    _ => self.call(path, nothing, call.deadline).await,
                }
            };
            let measured = async {
                let path = "/metric.HandleMetricService/HandleMetric";
                match metrics.instances.as_slice() {
                    [] => Ok(model::ReportResult {}),
                    _ => self.call(path, metrics, call.deadline).await,
                }
            };
            let (reported, measured): (Result<_, _>, Result<_, _>) =
                futures::join!(reported, measured);
            reported.and(measured).map(|_| ())
        }
        .boxed()
    }
}

impl QuotaHandler for Process {
    fn quota<'a>(
        &'a self,
        instance: QuotaInstance,
        args: &'a QuotaArgs,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<QuotaResult, HandlerError>> {
        async move {
            let name = instance.name.to_string();
            let wanted = model::quota_request::QuotaParams {
                amount: args.amount,
                best_effort: args.best_effort,
            };
            let request = QuotaRequest {
                instance: Some(message::Quota {
                    name: name.clone(),
                    dimensions: dimensions(instance.dimensions),
                }),
                adapter_config: self.params.clone(),
                dedup_id: args.dedup_id.to_string(),
                quota_request: Some(model::QuotaRequest {
                    quotas: [(name.clone(), wanted)].into(),
                }),
            };
            let path = "/quota.HandleQuotaService/HandleQuota";
            let mut answer: model::QuotaResult = self.call(path, request, call.deadline).await?;
            let granted = answer.quotas.remove(&name).ok_or_else(|| {
                HandlerError::unavailable(format!("the adapter says nothing about {name}"))
            })?;
            Ok(QuotaResult {
                status: status(granted.status)?,
                valid_duration: span(granted.valid_duration),
                granted: granted.granted_amount,
                window: None,
            })
        }
        .boxed()
    }
}
