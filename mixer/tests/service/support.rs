//! A Mixer on a folder of its own, and a client.

use std::{
    fs,
    sync::{Arc, Mutex},
    time::Duration,
};

use lateen_adapter::Value;
use lateen_engine::{StringMap, wire};
use lateen_protocols::istio::mixer::v1::{
    CheckRequest, CheckResponse, CompressedAttributes, ReportRequest, check_request::QuotaParams,
    check_response::PreconditionResult, mixer_client::MixerClient,
    report_request::RepeatedAttributesSemantics,
};
use mixer::{
    Args, Running,
    adapter::{
        Inventory,
        stdio::{Lines, Stdio},
    },
    config::Problem,
};
use tempfile::TempDir;
use tonic::{Request, Response, transport::Channel};

/// A line log that tests can read.
#[derive(Default)]
pub(crate) struct Captured(pub(crate) Mutex<Vec<String>>);

impl Lines for Captured {
    fn write(&self, line: String) -> bool {
        self.0.lock().unwrap().push(line);
        true
    }
}

/// Mixer on a folder.
pub(crate) struct Mesh {
    pub(crate) folder: TempDir,
    pub(crate) running: Running,
    pub(crate) client: MixerClient<Channel>,
    pub(crate) stdout: Arc<Captured>,
}

impl Mesh {
    pub(crate) async fn start(files: &[(&str, &str)]) -> Self {
        Self::start_with(files, |i| i).await
    }

    pub(crate) async fn start_with(
        files: &[(&str, &str)],
        adapt: impl FnOnce(Inventory) -> Inventory,
    ) -> Self {
        Self::start_as(files, |_| (), adapt).await
    }

    pub(crate) async fn start_as(
        files: &[(&str, &str)],
        change: impl FnOnce(&mut Args),
        adapt: impl FnOnce(Inventory) -> Inventory,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let mut args = args();
        args.config_dir = Some(folder.path().to_owned());
        change(&mut args);
        let stdout = Arc::new(Captured::default());
        let stdio = Stdio::default().with_stdout(stdout.clone());
        let mut running = mixer::start(&args, |i| adapt(i.with(Arc::new(stdio))))
            .await
            .unwrap();
        running.updates.wait_for(|count| *count > 0).await.unwrap();
        let client = client(&running).await;
        Self {
            folder,
            running,
            client,
            stdout,
        }
    }

    /// Writes a file (or with `None` removes it) and waits until Mixer has taken it.
    pub(crate) async fn apply(&mut self, name: &str, text: Option<&str>) {
        let before = *self.running.updates.borrow_and_update();
        let path = self.folder.path().join(name);
        match text {
            Some(text) => {
                let temporary = self.folder.path().join(".new");
                fs::write(&temporary, text).unwrap();
                fs::rename(temporary, path).unwrap();
            }
            None => fs::remove_file(path).unwrap(),
        }
        let taken = self.running.updates.wait_for(|count| *count > before);
        tokio::time::timeout(Duration::from_secs(20), taken)
            .await
            .expect("taken")
            .unwrap();
    }

    pub(crate) fn problems(&self) -> Vec<Problem> {
        self.running.snapshot.load().problems.clone()
    }

    /// What is refused, as text.
    pub(crate) fn refused(&self) -> Vec<String> {
        self.problems()
            .iter()
            .filter(|p| p.is_refused)
            .map(ToString::to_string)
            .collect()
    }

    pub(crate) fn generation(&self) -> u64 {
        self.running.snapshot.load().generation
    }

    pub(crate) async fn check(&mut self, attributes: &[(&str, Value)]) -> PreconditionResult {
        self.check_with(attributes, &[], "")
            .await
            .precondition
            .unwrap()
    }

    pub(crate) async fn check_with(
        &mut self,
        attributes: &[(&str, Value)],
        quotas: &[(&str, i64, bool)],
        id: &str,
    ) -> CheckResponse {
        self.call(attributes, quotas, id, &[]).await.into_inner()
    }

    pub(crate) async fn call(
        &mut self,
        attributes: &[(&str, Value)],
        quotas: &[(&str, i64, bool)],
        id: &str,
        metadata: &[(&'static str, &'static str)],
    ) -> Response<CheckResponse> {
        let mut request = Request::new(request(attributes, quotas, id));
        for (name, value) in metadata {
            request.metadata_mut().insert(*name, value.parse().unwrap());
        }
        self.client.check(request).await.unwrap()
    }

    pub(crate) async fn report(&mut self, sets: &[&[(&str, Value)]]) {
        let request = ReportRequest {
            attributes: sets.iter().map(|set| compress(set)).collect(),
            global_word_count: 222,
            repeated_attributes_semantics: RepeatedAttributesSemantics::IndependentEncoding.into(),
            ..ReportRequest::default()
        };
        self.client.report(request).await.unwrap();
    }

    /// What Prometheus would read.
    pub(crate) async fn metrics(&self) -> String {
        get(self.running.metrics_address, "/metrics").await
    }
}

/// A check as a proxy sends it.
pub(crate) fn request(
    attributes: &[(&str, Value)],
    quotas: &[(&str, i64, bool)],
    id: &str,
) -> CheckRequest {
    let quotas = quotas.iter().map(|(name, amount, best_effort)| {
        let params = QuotaParams {
            amount: *amount,
            best_effort: *best_effort,
        };
        ((*name).to_owned(), params)
    });
    CheckRequest {
        attributes: Some(compress(attributes)),
        global_word_count: 222,
        deduplication_id: id.to_owned(),
        quotas: quotas.collect(),
    }
}

pub(crate) fn args() -> Args {
    Args {
        bind: [127, 0, 0, 1].into(),
        port: 0,
        tls_port: 0,
        admin_port: 0,
        metrics_port: 0,
        config_dir: None,
        config_ads: None,
        config_namespace: "istio-system".into(),
        role: Default::default(),
        max_checks: 4096,
        max_reports: 1024,
        shed_delay_ms: 100,
        identity: Default::default(),
        telemetry: Default::default(),
    }
}

pub(crate) async fn client(running: &Running) -> MixerClient<Channel> {
    let url = format!("http://{}", running.address);
    MixerClient::new(Channel::from_shared(url).unwrap().connect().await.unwrap())
}

pub(crate) fn compress(attributes: &[(&str, Value)]) -> CompressedAttributes {
    wire::encode(attributes.iter().map(|(n, v)| (*n, v)), 222)
}

pub(crate) fn map(entries: &[(&str, &str)]) -> Value {
    Value::StringMap(entries.iter().copied().collect::<StringMap>())
}

pub(crate) fn text(text: &str) -> Value {
    Value::from(text)
}

pub(crate) async fn get(address: std::net::SocketAddr, path: &str) -> String {
    use http_body_util::{BodyExt as _, Empty};
    use hyper_util::{client::legacy::Client, rt::TokioExecutor};
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<bytes::Bytes>>();
    let response = client
        .get(format!("http://{address}{path}").parse().unwrap())
        .await
        .unwrap();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(body.to_vec()).unwrap()
}

/// The verdict as a proxy shows it.
pub(crate) fn told(result: &PreconditionResult) -> String {
    let status = result.status.clone().unwrap();
    let code = lateen_adapter::Code::from_number(status.code.into()).unwrap();
    format!("{code}:{}", status.message)
}

pub(crate) fn seconds(duration: Option<&prost_types::Duration>) -> f64 {
    let duration = duration.expect("every answer states a duration");
    duration.seconds as f64 + f64::from(duration.nanos) / 1e9
}
