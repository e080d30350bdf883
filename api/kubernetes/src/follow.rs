//! One collection: list it, then watch it from there, for ever.
//!
//! Not `kube::runtime::watcher`: that one does not tell when a watch stands again after an error, and asks for ever
//! from a resource version that the server does not have (an etcd restored from a backup).

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::core::Request;
use rand::Rng as _;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use crate::health::Health;
use crate::reduce::{self, Reduced, reduce};
use crate::resource::Resource;

/// Objects asked for at once,
const PAGE: u32 = 500;
/// and of definitions, each of which is hundreds of kilobytes.
const DEFINITION_PAGE: u32 = 20;
/// More objects of one kind are refused.
const OBJECT_LIMIT: usize = 250_000;
/// The server must begin to answer within this time.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// The server ends a watch after this time, in seconds, and it is begun anew from where it was.
const WATCH_SECONDS: u32 = 290;
/// A watch that is silent for so long, without the bookmark that comes each minute, is begun anew: the other end may
/// be gone. Costs one request.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);
/// A watch that ends sooner and said nothing counts as failed.
const SHORT: Duration = Duration::from_secs(1);
/// Waits between attempts double from the first to the last, each less up to half of it by chance.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LAST_WAIT: Duration = Duration::from_secs(10);
/// So many refusals to watch from a version mean that the version is the matter.
const REFUSAL_LIMIT: u32 = 3;

/// What became of a collection.
#[derive(Debug)]
pub(crate) enum News {
    /// These are all.
    Listed(Vec<Reduced>),
    /// One is new or other.
    Applied(Reduced),
    /// `NAMESPACE/NAME` is gone.
    Deleted(String),
}

/// News of one follower.
#[derive(Debug)]
pub(crate) struct Update {
    pub(crate) follower: u64,
    pub(crate) news: News,
}

/// Why one attempt ended.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error("{}", explain(.0))]
    Request(#[from] kube::Error),
    #[error("no answer within {} s", ANSWER_LIMIT.as_secs())]
    Late,
    #[error("more than {OBJECT_LIMIT} objects of one kind")]
    TooMany,
    #[error("the list has no resourceVersion to watch from")]
    NoVersion,
    #[error("an event that is none: {0}")]
    Event(&'static str),
    #[error("the watch ended at once")]
    Short,
}

/// The status' own words; of other errors what is at their root.
pub(crate) fn explain(error: &kube::Error) -> String {
    let status = match error {
        kube::Error::Api(status) => status,
        other => {
            let mut root: &dyn std::error::Error = other;
            while let Some(source) = root.source() {
                root = source;
            }
            return root.to_string();
        }
    };
    let hint = match status.code {
        401 => "; are the credentials still good?",
        403 => "; does the program's ClusterRole have it?",
        _ => "",
    };
    format!("{} ({}){hint}", status.message, status.code)
}

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    metadata: ListMetadata,
    #[serde(default)]
    items: Option<Vec<Value>>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ListMetadata {
    resource_version: String,
    r#continue: String,
}

/// Follows a collection until `out` is closed.
pub(crate) async fn follow(
    client: kube::Client,
    resource: Arc<Resource>,
    number: u64,
    health: Arc<Health>,
    out: mpsc::Sender<Update>,
) {
    let mut follower = Follower {
        client,
        resource,
        number,
        health,
        out,
        version: None,
    };
    let mut wait = FIRST_WAIT;
    let mut refusals = 0;
    while !follower.out.is_closed() {
        let began = Instant::now();
        let error = match follower.version.clone() {
            None => match follower.list().await {
                Ok(()) => continue,
                Err(error) => error,
            },
            Some(version) => {
                let mut told = false;
                let ended = follower.watch(&version, &mut told).await;
                let stood = told || (ended.is_ok() && began.elapsed() >= SHORT);
                if stood {
                    (wait, refusals) = (FIRST_WAIT, 0);
                }
                match ended {
                    Ok(()) if stood => continue,
                    Ok(()) => FollowError::Short,
                    Err(error) => error,
                }
            }
        };
        if let FollowError::Request(kube::Error::Api(status)) = &error {
            refusals += 1;
            if status.code == 410 || refusals >= REFUSAL_LIMIT {
                refusals = 0;
                follower.version = None;
            }
            // That is how the server says: list again. Nothing is wrong, unless it says so at once again.
            if status.code == 410 && wait == FIRST_WAIT {
                wait *= 2;
                continue;
            }
        }
        if matches!(error, FollowError::Event(_)) {
            follower.version = None;
        }
        let Follower {
            number,
            resource,
            health,
            ..
        } = &follower;
        health.failed(*number, resource, &error);
        let pause = wait.mul_f64(rand::rng().random_range(0.5..=1.0));
        sleep(pause).await;
        wait = (wait * 2).min(LAST_WAIT);
    }
}

struct Follower {
    client: kube::Client,
    resource: Arc<Resource>,
    number: u64,
    health: Arc<Health>,
    out: mpsc::Sender<Update>,
    /// What has been seen of the collection; `None`: nothing that counts.
    version: Option<String>,
}

impl Follower {
    /// Lists all pages; only a whole list counts.
    async fn list(&mut self) -> Result<(), FollowError> {
        let request = Request::new(self.resource.path());
        let mut all = Vec::new();
        let mut token = String::new();
        let version = loop {
            let params = ListParams {
                field_selector: self.resource.fields.clone(),
                limit: Some(match self.resource.kind.as_str() {
                    "CustomResourceDefinition" => DEFINITION_PAGE,
                    _ => PAGE,
                }),
                continue_token: (!token.is_empty()).then_some(token),
                ..ListParams::default()
            };
            let page = request.list(&params).map_err(kube::Error::BuildRequest)?;
            let page: List = timeout(ANSWER_LIMIT, self.client.request(page))
                .await
                .map_err(|_| FollowError::Late)??;
            let items = page.items.unwrap_or_default();
            all.extend(
                items
                    .into_iter()
                    .filter_map(|item| reduce(&self.resource, item)),
            );
            if all.len() > OBJECT_LIMIT {
                return Err(FollowError::TooMany);
            }
            token = page.metadata.r#continue;
            if token.is_empty() {
                break page.metadata.resource_version;
            }
        };
        if version.is_empty() {
            return Err(FollowError::NoVersion);
        }
        self.health.listed(&self.resource);
        self.tell(News::Listed(all)).await;
        self.version = Some(version);
        Ok(())
    }

    /// Watches until the server ends it. `told`: there was news.
    async fn watch(&mut self, version: &str, told: &mut bool) -> Result<(), FollowError> {
        let params = WatchParams {
            field_selector: self.resource.fields.clone(),
            timeout: Some(WATCH_SECONDS),
            bookmarks: true,
            ..WatchParams::default()
        };
        let request = Request::new(self.resource.path())
            .watch(&params, version)
            .map_err(kube::Error::BuildRequest)?;
        let events = timeout(ANSWER_LIMIT, self.client.request_events::<Value>(request))
            .await
            .map_err(|_| FollowError::Late)??;
        self.health.well(self.number);
        let mut events = pin!(events);
        loop {
            let event = match timeout(SILENCE_LIMIT, events.next()).await {
                Err(_) | Ok(None) => return Ok(()),
                Ok(Some(event)) => event?,
            };
            *told = true;
            let (object, name) = match event {
                WatchEvent::Added(object) => (object, "add"),
                WatchEvent::Modified(object) => (object, "update"),
                WatchEvent::Deleted(object) => (object, "delete"),
                WatchEvent::Bookmark(mark) => {
                    self.version = Some(mark.metadata.resource_version);
                    continue;
                }
                WatchEvent::Error(status) => return Err(kube::Error::Api(status).into()),
            };
            let version = object
                .pointer("/metadata/resourceVersion")
                .and_then(Value::as_str)
                .ok_or(FollowError::Event("no resourceVersion"))?
                .to_owned();
            let unnamed = FollowError::Event("no name");
            let news = match name {
                "delete" => News::Deleted(reduce::name(&object).ok_or(unnamed)?),
                _ => News::Applied(reduce(&self.resource, object).ok_or(unnamed)?),
            };
            self.health.event(&self.resource, name);
            self.tell(news).await;
            self.version = Some(version);
        }
    }

    /// Waits while the writer is busy: the server notices, and we list again if it loses patience.
    async fn tell(&self, news: News) {
        let update = Update {
            follower: self.number,
            news,
        };
        if self.out.send(update).await.is_err() {
            tracing::debug!(path = %self.resource.path(), "nobody listens any more");
        }
    }
}
