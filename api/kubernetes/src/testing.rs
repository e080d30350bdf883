//! An API server in process: list and watch as Kubernetes has them, and the ways in which it goes away.
//!
//! Plain HTTP on loopback; objects and tokens are put in by the test. Beside reads there are reviews of tokens, creation,
//! replacement, server-side apply, merge patches (of statuses, too) and strategic ones of lists with names. Behaves as kube-apiserver does where it can be
//! seen: one resourceVersion for all, selectors on fields (an object that is no longer selected is `DELETED` to a
//! watch), pages, bookmarks, `410 Gone` inside a watch whose version is compacted, `404` for kinds it does not have.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout_at};

/// Between two bookmarks of a watch; a real server takes a minute.
const BOOKMARK: Duration = Duration::from_millis(200);

/// Kinds that are there from the first: group, version, kind, plural.
const BUILT_IN: [(&str, &str, &str, &str); 13] = [
    ("", "v1", "Namespace", "namespaces"),
    ("", "v1", "Node", "nodes"),
    ("", "v1", "Service", "services"),
    ("", "v1", "Pod", "pods"),
    ("", "v1", "ConfigMap", "configmaps"),
    ("", "v1", "Secret", "secrets"),
    ("", "v1", "Endpoints", "endpoints"),
    ("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices"),
    ("networking.k8s.io", "v1", "Ingress", "ingresses"),
    ("coordination.k8s.io", "v1", "Lease", "leases"),
    (
        "admissionregistration.k8s.io",
        "v1",
        "MutatingWebhookConfiguration",
        "mutatingwebhookconfigurations",
    ),
    (
        "admissionregistration.k8s.io",
        "v1",
        "ValidatingWebhookConfiguration",
        "validatingwebhookconfigurations",
    ),
    (
        "apiextensions.k8s.io",
        "v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
    ),
];

/// The server; gone with its last clone.
#[derive(Clone, Debug)]
pub struct ApiServer {
    state: Arc<Mutex<State>>,
    /// The newest resourceVersion.
    news: Arc<watch::Sender<u64>>,
    address: SocketAddr,
    running: Arc<Mutex<Option<Running>>>,
}

#[derive(Debug)]
struct Running(JoinHandle<()>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Of one kind: group and plural.
type Collection = (String, String);

#[derive(Debug, Default)]
struct State {
    kinds: Vec<Kind>,
    /// By collection, namespace and name.
    objects: BTreeMap<(Collection, String, String), Value>,
    log: Vec<Event>,
    version: u64,
    /// Events up to here are forgotten.
    compacted: u64,
    refusal: Option<(String, u16)>,
    /// Whose each is, and for whom.
    tokens: BTreeMap<String, (String, Vec<String>)>,
    requests: Vec<String>,
}

#[derive(Clone, Debug)]
struct Kind {
    group: String,
    version: String,
    kind: String,
    plural: String,
}

#[derive(Clone, Debug)]
struct Event {
    version: u64,
    collection: Collection,
    before: Option<Value>,
    after: Option<Value>,
}

impl ApiServer {
    /// Starts an empty server on a port of its own.
    pub async fn start() -> Self {
        Self::without(&[]).await
    }

    /// Starts a server that does not have some of the built-in kinds, by plural.
    pub async fn without(plurals: &[&str]) -> Self {
        let kinds = BUILT_IN
            .iter()
            .filter(|(.., plural)| !plurals.contains(plural))
            .map(|(group, version, kind, plural)| Kind {
                group: (*group).into(),
                version: (*version).into(),
                kind: (*kind).into(),
                plural: (*plural).into(),
            })
            .collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            state: Arc::new(Mutex::new(State {
                kinds,
                version: 1,
                ..State::default()
            })),
            news: Arc::new(watch::Sender::new(1)),
            address: listener.local_addr().unwrap(),
            running: Arc::default(),
        };
        server.run(listener);
        server
    }

    /// Writes a kubeconfig that names this server.
    pub fn kubeconfig(&self, folder: &Path) -> PathBuf {
        let file = folder.join("kubeconfig");
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        std::fs::write(&file, text.to_string()).unwrap();
        file
    }

    /// Creates or replaces an object. A CustomResourceDefinition is established at once.
    ///
    /// # Panics
    /// Its kind is not there, as a real server would say 404.
    pub fn apply(&self, object: Value) {
        put(&self.state, &self.news, object);
    }

    /// Deletes an object; a definition takes its objects with it.
    ///
    /// # Panics
    /// It is not there.
    pub fn delete(&self, group: &str, plural: &str, namespace: &str, name: &str) {
        let mut state = self.state();
        let key = ((group.into(), plural.into()), namespace.into(), name.into());
        let before = state.objects.remove(&key);
        let mut last = before.clone().unwrap_or_else(|| panic!("no {key:?}"));
        state.version += 1;
        last["metadata"]["resourceVersion"] = json!(state.version.to_string());
        if plural == "customresourcedefinitions" {
            let (plural, group) = name.split_once('.').unwrap();
            state
                .kinds
                .retain(|kind| (kind.group.as_str(), kind.plural.as_str()) != (group, plural));
            state
                .objects
                .retain(|((g, p), ..), _| (g.as_str(), p.as_str()) != (group, plural));
        }
        tell(state, &self.news, key.0, Some(last), None);
    }

    /// An object as it is now.
    pub fn object(&self, group: &str, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        let key = ((group.into(), plural.into()), namespace.into(), name.into());
        self.state().objects.get(&key).cloned()
    }

    /// Forgets all events so far: who watches from before must list again.
    pub fn compact(&self) {
        let mut state = self.state();
        state.compacted = state.version;
        state.log.clear();
    }

    /// Answers requests whose path ends like this with an error; `None`: no longer.
    pub fn refuse(&self, refusal: Option<(&str, u16)>) {
        self.state().refusal = refusal.map(|(path, status)| (path.to_owned(), status));
    }

    /// From now on `token` is a token of `user` for `audiences`.
    pub fn token(&self, token: &str, user: &str, audiences: &[&str]) {
        let audiences = audiences.iter().map(|one| (*one).to_owned()).collect();
        let mut state = self.state();
        state.tokens.insert(token.into(), (user.into(), audiences));
    }

    /// Ends all connections, without a word.
    pub fn stop(&self) {
        drop(self.running().take());
    }

    /// Listens again, on the same port.
    pub async fn restart(&self) {
        self.stop();
        let limit = Instant::now() + Duration::from_secs(10);
        // The old listener's task may not have been dropped yet.
        let listener = loop {
            match TcpListener::bind(self.address).await {
                Ok(listener) => break listener,
                Err(error) => assert!(Instant::now() < limit, "{error}"),
            }
            tokio::task::yield_now().await;
        };
        self.run(listener);
    }

    /// Requests so far, `PATH?QUERY` each.
    pub fn requests(&self) -> Vec<String> {
        self.state().requests.clone()
    }

    fn run(&self, listener: TcpListener) {
        let (state, news) = (self.state.clone(), self.news.clone());
        let task = tokio::spawn(async move {
            // Dropped with this task, and the connections with it.
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (state, news) = (state.clone(), news.clone());
                connections.spawn(async move {
                    let service = service_fn(move |request: Request<Incoming>| {
                        let (state, news) = (state.clone(), news.clone());
                        async move {
                            Ok::<_, Infallible>(match *request.method() {
                                Method::POST if request.uri().path().ends_with("/tokenreviews") => {
                                    reviewed(&state, request).await
                                }
                                Method::POST | Method::PUT | Method::PATCH => {
                                    written(&state, &news, request).await
                                }
                                _ => answer(&state, &news, &request),
                            })
                        }
                    });
                    let served = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                    if let Err(error) = served {
                        tracing::debug!(%error, "connection");
                    }
                });
            }
        });
        *self.running() = Some(Running(task));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Creates or replaces an object; gives what is kept.
fn put(state: &Mutex<State>, news: &watch::Sender<u64>, mut object: Value) -> Value {
    let text = |value: &Value, at: &str| {
        value
            .pointer(at)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let api_version = text(&object, "/apiVersion");
    let kind = text(&object, "/kind");
    let group = api_version
        .split_once('/')
        .map_or("", |(group, _)| group)
        .to_owned();
    if kind == "CustomResourceDefinition" {
        object["status"] = json!({"conditions": [{"type": "Established", "status": "True"}]});
        let spec = &object["spec"];
        for version in spec["versions"].as_array().unwrap() {
            let kind = Kind {
                group: text(spec, "/group"),
                version: text(version, "/name"),
                kind: text(spec, "/names/kind"),
                plural: text(spec, "/names/plural"),
            };
            lock(state).kinds.push(kind);
        }
    }
    let mut state = lock(state);
    let known = state
        .kinds
        .iter()
        .find(|known| known.group == group && known.kind == kind);
    let known = known.unwrap_or_else(|| panic!("no kind {kind} in {group:?}"));
    let collection = (known.group.clone(), known.plural.clone());
    let key = (
        collection,
        text(&object, "/metadata/namespace"),
        text(&object, "/metadata/name"),
    );
    state.version += 1;
    let version = state.version;
    object["metadata"]["resourceVersion"] = json!(version.to_string());
    object["metadata"]["managedFields"] = json!([{"manager": "test"}]);
    let before = state.objects.insert(key.clone(), object.clone());
    tell(state, news, key.0, before, Some(object.clone()));
    object
}

fn tell(
    mut state: MutexGuard<'_, State>,
    news: &watch::Sender<u64>,
    collection: Collection,
    before: Option<Value>,
    after: Option<Value>,
) {
    let version = state.version;
    state.log.push(Event {
        version,
        collection,
        before,
        after,
    });
    drop(state);
    news.send_replace(version);
}

/// A write: creation, replacement, or a patch. What is based on another resourceVersion than the object's is a conflict.
/// Server-side apply is that of an object that nobody else has a part of.
async fn written(
    state: &Mutex<State>,
    news: &watch::Sender<u64>,
    request: Request<Incoming>,
) -> Response<Body> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let kind = request.headers().get("content-type").cloned();
    let kind = kind.map_or(String::new(), |kind| kind.to_str().unwrap().to_owned());
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let mut body: Value = serde_json::from_slice(&body).unwrap();
    let object = {
        let mut state = lock(state);
        state.requests.push(format!("{method} {path}"));
        if let Some((refused, code)) = &state.refusal
            && path.ends_with(refused)
        {
            return status(*code, "refused by the test");
        }
        let Some(place) = place(&state, &path) else {
            return status(404, "NotFound");
        };
        let name = match &place.name {
            Some(name) => name.clone(),
            None => body["metadata"]["name"].as_str().unwrap().to_owned(),
        };
        let key = (place.collection, place.namespace, name);
        let there = state.objects.get(&key).cloned();
        let version = body.pointer("/metadata/resourceVersion").cloned();
        let is_apply = kind.starts_with("application/apply-patch");
        match &there {
            Some(_) if method == Method::POST => return status(409, "AlreadyExists"),
            None if method != Method::POST && !is_apply => return status(404, "NotFound"),
            Some(there)
                if version.is_some_and(|based| {
                    !based.is_null() && based != there["metadata"]["resourceVersion"]
                }) =>
            {
                return status(409, "Conflict");
            }
            _ => {}
        }
        if method == Method::PATCH && !is_apply {
            let mut object = there.unwrap();
            if place.is_status {
                body = json!({"status": body["status"]});
            }
            merge(
                &mut object,
                &body,
                kind.starts_with("application/strategic-merge"),
            );
            object
        } else {
            if !key.1.is_empty() {
                body["metadata"]["namespace"] = json!(key.1);
            }
            body
        }
    };
    let code = if method == Method::POST { 201 } else { 200 };
    json_answer(code, &put(state, news, object))
}

/// Where a path leads: a collection, an object of it or that one's status.
struct Place {
    collection: Collection,
    namespace: String,
    name: Option<String>,
    is_status: bool,
}

fn place(state: &State, path: &str) -> Option<Place> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let (group, version, rest) = match parts.as_slice() {
        ["api", version, rest @ ..] => ("", *version, rest),
        ["apis", group, version, rest @ ..] => (*group, *version, rest),
        _ => return None,
    };
    let (rest, is_status) = match rest {
        [rest @ .., "status"] => (rest, true),
        rest => (rest, false),
    };
    let (namespace, plural, name) = match rest {
        ["namespaces", namespace, plural] => (*namespace, *plural, None),
        ["namespaces", namespace, plural, name] => (*namespace, *plural, Some(*name)),
        [plural] => ("", *plural, None),
        [plural, name] => ("", *plural, Some(*name)),
        _ => return None,
    };
    let is_there = state
        .kinds
        .iter()
        .any(|kind| (&*kind.group, &*kind.version, &*kind.plural) == (group, version, plural));
    is_there.then(|| Place {
        collection: (group.to_owned(), plural.to_owned()),
        namespace: namespace.to_owned(),
        name: name.map(str::to_owned),
        is_status,
    })
}

/// JSON merge patch; `by_name`: elements of lists that have names are merged into those of the same, as Kubernetes'
/// strategic merge does with webhooks.
fn merge(into: &mut Value, patch: &Value, by_name: bool) {
    let Value::Object(patch) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (name, value) in patch {
        match value {
            Value::Null => {
                into.as_object_mut().unwrap().remove(name);
            }
            Value::Array(items) if by_name && into[name].is_array() => {
                for item in items {
                    let all = into[name].as_array_mut().unwrap();
                    match all.iter_mut().find(|one| one["name"] == item["name"]) {
                        Some(one) => merge(one, item, by_name),
                        None => all.push(item.clone()),
                    }
                }
            }
            value => merge(&mut into[name], value, by_name),
        }
    }
}

/// A TokenReview, with its answer.
async fn reviewed(state: &Mutex<State>, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let mut state = lock(state);
    state.requests.push(path.clone());
    if path != "/apis/authentication.k8s.io/v1/tokenreviews" {
        return status(404, "NotFound");
    }
    if let Some((refused, code)) = &state.refusal
        && path.ends_with(refused)
    {
        return status(*code, "refused by the test");
    }
    let mut review: Value = serde_json::from_slice(&body).unwrap();
    let wanted = review["spec"]["audiences"].clone();
    let wanted: Vec<&str> = wanted
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let token = review["spec"]["token"].as_str().unwrap_or_default();
    review["status"] = match state.tokens.get(token) {
        None => json!({"user": {}, "error": "[invalid bearer token]"}),
        Some((user, audiences)) => {
            let both: Vec<&String> = audiences
                .iter()
                .filter(|one| wanted.contains(&one.as_str()))
                .collect();
            let mut groups = vec!["system:authenticated"];
            if user.starts_with("system:serviceaccount:") {
                groups.push("system:serviceaccounts");
            }
            match both.is_empty() {
                true => {
                    json!({"user": {}, "error": "token audiences are invalid for the target audiences"})
                }
                false => json!({
                    "authenticated": true, "audiences": both, "user": {"username": user, "groups": groups},
                }),
            }
        }
    };
    json_answer(201, &review)
}

/// A collection in one namespace or all, and which of it.
#[derive(Clone, Debug)]
struct Selection {
    collection: Collection,
    namespace: Option<String>,
    fields: String,
}

impl Selection {
    fn has(&self, object: &Value) -> bool {
        let namespace = object
            .pointer("/metadata/namespace")
            .and_then(Value::as_str);
        let selected = |term: &str| {
            let (path, wanted, equal) = match term.split_once("!=") {
                Some((path, wanted)) => (path, wanted, false),
                None => {
                    let (path, wanted) = term.split_once('=').unwrap();
                    (path, wanted, true)
                }
            };
            let at = format!("/{}", path.replace('.', "/"));
            let value = object.pointer(&at).and_then(Value::as_str);
            (value.unwrap_or_default() == wanted) == equal
        };
        self.namespace
            .as_deref()
            .is_none_or(|wanted| namespace == Some(wanted))
            && self
                .fields
                .split(',')
                .filter(|term| !term.is_empty())
                .all(selected)
    }
}

fn answer(
    state: &Arc<Mutex<State>>,
    news: &watch::Sender<u64>,
    request: &Request<Incoming>,
) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let query: BTreeMap<String, String> = request
        .uri()
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name.to_owned(), decoded(value)))
        .collect();
    let get = |name: &str| query.get(name).map_or("", String::as_str);
    let mut locked = state.lock().unwrap_or_else(PoisonError::into_inner);
    locked.requests.push(request.uri().to_string());
    if request.method() != Method::GET {
        return status(405, "MethodNotAllowed");
    }
    if let Some((refused, code)) = &locked.refusal
        && path.ends_with(refused)
    {
        return status(*code, "refused by the test");
    }
    if let Some(place) = place(&locked, &path)
        && let Some(name) = place.name
    {
        let key = (place.collection, place.namespace, name);
        return match locked.objects.get(&key) {
            Some(object) => json_answer(200, object),
            None => status(404, "NotFound"),
        };
    }
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let (group, version, rest) = match parts.as_slice() {
        ["api", version, rest @ ..] => ("", *version, rest),
        ["apis", group, version, rest @ ..] => (*group, *version, rest),
        _ => return status(404, "NotFound"),
    };
    let kinds: Vec<&Kind> = locked
        .kinds
        .iter()
        .filter(|kind| kind.group == group && kind.version == version)
        .collect();
    let (namespace, plural) = match rest {
        [] if kinds.is_empty() => return status(404, "NotFound"),
        [] => {
            let resources: Vec<Value> = kinds
                .iter()
                .map(|kind| {
                    json!({
                        "name": kind.plural, "kind": kind.kind, "singularName": "", "namespaced": true,
                        "verbs": ["get", "list", "watch"],
                    })
                })
                .collect();
            let list = json!({
                "kind": "APIResourceList", "apiVersion": "v1", "resources": resources,
                "groupVersion": format!("{group}/{version}").trim_start_matches('/'),
            });
            return json_answer(200, &list);
        }
        [plural] => (None, *plural),
        ["namespaces", namespace, plural] => (Some((*namespace).to_owned()), *plural),
        _ => return status(404, "NotFound"),
    };
    if !kinds.iter().any(|kind| kind.plural == plural) {
        return status(404, "NotFound");
    }
    let selection = Selection {
        collection: (group.to_owned(), plural.to_owned()),
        namespace,
        fields: get("fieldSelector").to_owned(),
    };
    if matches!(get("watch"), "1" | "true") {
        let from: u64 = get("resourceVersion").parse().unwrap();
        let seconds: u64 = get("timeoutSeconds").parse().unwrap();
        drop(locked);
        let deadline = Instant::now() + Duration::from_secs(seconds);
        return watching(state.clone(), news.subscribe(), selection, from, deadline);
    }
    list(&locked, &selection, get("limit"), get("continue"))
}

/// `VERSION KEY`: where the next page begins, and what the list is as of.
fn list(state: &State, selection: &Selection, limit: &str, token: &str) -> Response<Body> {
    let (version, after) = match token.split_once(' ') {
        Some((version, after)) => (version.parse().unwrap(), after),
        None => (state.version, ""),
    };
    if version < state.compacted {
        return status(410, "the provided continue parameter is too old");
    }
    let limit: usize = limit.parse().unwrap_or(usize::MAX);
    let mut items = Vec::new();
    let mut next = String::new();
    let mut more = false;
    for ((collection, namespace, name), object) in &state.objects {
        let key = format!("{namespace}/{name}");
        if *collection != selection.collection || !selection.has(object) || *key <= *after {
            continue;
        }
        if items.len() == limit {
            more = true;
            break;
        }
        // A real server leaves these out of the items of a list.
        let mut object = object.clone();
        let map = object.as_object_mut().unwrap();
        map.remove("kind");
        map.remove("apiVersion");
        next = key;
        items.push(object);
    }
    let token = more.then(|| format!("{version} {next}"));
    let metadata =
        json!({"resourceVersion": version.to_string(), "continue": token.unwrap_or_default()});
    json_answer(
        200,
        &json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items}),
    )
}

fn watching(
    state: Arc<Mutex<State>>,
    news: watch::Receiver<u64>,
    selection: Selection,
    from: u64,
    deadline: Instant,
) -> Response<Body> {
    let lines = stream::unfold(Some((news, from)), move |at| {
        let (state, selection) = (state.clone(), selection.clone());
        async move {
            let (mut news, from) = at?;
            news.borrow_and_update();
            match told(&state, &selection, from) {
                Err(gone) => return Some((gone, None)),
                Ok(lines) if !lines.0.is_empty() => return Some((lines.0, Some((news, lines.1)))),
                Ok(_) => {}
            }
            if Instant::now() >= deadline {
                return None;
            }
            let until = deadline.min(Instant::now() + BOOKMARK);
            match timeout_at(until, news.changed()).await {
                Ok(Err(_)) => None,
                Ok(Ok(())) => Some((String::new(), Some((news, from)))),
                Err(_) => {
                    let version = *news.borrow();
                    let mark = json!({"metadata": {"resourceVersion": version.to_string()}, "kind": "x", "apiVersion": "v1"});
                    let line = format!("{}\n", json!({"type": "BOOKMARK", "object": mark}));
                    Some((line, Some((news, from.max(version)))))
                }
            }
        }
    });
    let frames = lines
        .filter(|lines| futures::future::ready(!lines.is_empty()))
        .map(|lines| Ok(Frame::data(Bytes::from(lines))));
    Response::builder()
        .header("content-type", "application/json")
        .body(StreamBody::new(frames).boxed_unsync())
        .unwrap()
}

/// Lines for what has happened since, and the version thereafter; an error line if that is not known any more.
fn told(state: &Mutex<State>, selection: &Selection, from: u64) -> Result<(String, u64), String> {
    let state = state.lock().unwrap_or_else(PoisonError::into_inner);
    if from < state.compacted {
        let gone = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 410,
            "reason": "Expired", "message": format!("too old resource version: {from} ({})", state.compacted),
        });
        return Err(format!("{}\n", json!({"type": "ERROR", "object": gone})));
    }
    let mut lines = String::new();
    for event in &state.log {
        if event.version <= from || event.collection != selection.collection {
            continue;
        }
        let was = event.before.as_ref().filter(|one| selection.has(one));
        let is = event.after.as_ref().filter(|one| selection.has(one));
        let (name, object) = match (was, is) {
            (None, None) => continue,
            (None, Some(object)) => ("ADDED", object.clone()),
            (Some(_), Some(object)) => ("MODIFIED", object.clone()),
            (Some(object), None) => {
                let mut last = object.clone();
                last["metadata"]["resourceVersion"] = json!(event.version.to_string());
                ("DELETED", last)
            }
        };
        lines += &format!("{}\n", json!({"type": name, "object": object}));
    }
    Ok((lines, state.version))
}

fn status(code: u16, message: &str) -> Response<Body> {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
        "reason": message, "code": code,
    });
    json_answer(code, &status)
}

fn json_answer(code: u16, body: &Value) -> Response<Body> {
    Response::builder()
        .status(StatusCode::from_u16(code).unwrap())
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body.to_string())).boxed_unsync())
        .unwrap()
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits = [rest.next().unwrap(), rest.next().unwrap()];
                u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).unwrap()
}
