//! Allows what is on a list (or, as a blacklist, what is not). The list is inline, or fetched over HTTP
//! and kept fresh.

use std::{collections::HashSet, net::IpAddr, sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, CheckHandler, CheckResult, Clock, Code, Counter, Env,
    Handler, HandlerError, Info, Status, Value, instance::CheckInstance, params, template, value,
};
use serde::Deserialize;
use tokio::sync::watch;

/// Longest list that is read.
const MAX_LIST_BYTES: usize = 16 << 20;
/// Longest wait for the provider.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
/// Memory of one compiled expression.
const MAX_REGEX_BYTES: usize = 1 << 20;

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct ListChecker;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    #[serde(alias = "provider_url")]
    provider_url: String,
    #[serde(alias = "refresh_interval", deserialize_with = "params::duration")]
    refresh_interval: Duration,
    #[serde(deserialize_with = "params::duration")]
    ttl: Duration,
    #[serde(alias = "caching_interval", deserialize_with = "params::duration")]
    caching_interval: Duration,
    #[serde(alias = "caching_use_count", deserialize_with = "params::integer")]
    caching_use_count: i32,
    overrides: Vec<String>,
    #[serde(alias = "entry_type")]
    entry_type: EntryType,
    blacklist: bool,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            provider_url: String::new(),
            refresh_interval: Duration::from_secs(60),
            ttl: Duration::from_secs(300),
            caching_interval: Duration::from_secs(300),
            caching_use_count: 10_000,
            overrides: Vec::new(),
            entry_type: EntryType::Strings,
            blacklist: false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum EntryType {
    Strings,
    CaseInsensitiveStrings,
    IpAddresses,
    Regex,
}

/// A list that can be asked.
#[derive(Debug)]
enum List {
    Strings(HashSet<String>),
    Folded(HashSet<String>),
    Networks(Vec<Network>),
    Patterns(Vec<regex::Regex>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    bits: u8,
}

impl Network {
    /// `10.57.0.0/16`, `2001:db8::/32`, or one address.
    fn parse(text: &str) -> Option<Self> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse::<u8>().ok()?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let width: u8 = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(width);
        if bits > width {
            return None;
        }
        // ::ffff:10.0.0.0/104 is 10.0.0.0/8.
        match (address, address.to_canonical()) {
            (IpAddr::V6(_), canonical @ IpAddr::V4(_)) if bits >= 96 => Some(Self {
                address: canonical,
                bits: bits - 96,
            }),
            _ => Some(Self { address, bits }),
        }
    }

    fn contains(&self, ip: IpAddr) -> bool {
        let shift = |width: u32| width - u32::from(self.bits);
        match (self.address, ip) {
            (IpAddr::V4(net), IpAddr::V4(ip)) => {
                (u32::from(net) ^ u32::from(ip))
                    .checked_shr(shift(32))
                    .unwrap_or(0)
                    == 0
            }
            (IpAddr::V6(net), IpAddr::V6(ip)) => {
                (u128::from(net) ^ u128::from(ip))
                    .checked_shr(shift(128))
                    .unwrap_or(0)
                    == 0
            }
            _ => false,
        }
    }
}

impl List {
    fn new<'a>(
        entry_type: EntryType,
        entries: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, String> {
        let entries = entries.into_iter();
        Ok(match entry_type {
            EntryType::Strings => Self::Strings(entries.map(str::to_owned).collect()),
            EntryType::CaseInsensitiveStrings => {
                Self::Folded(entries.map(str::to_lowercase).collect())
            }
            EntryType::IpAddresses => Self::Networks(
                entries
                    .map(|e| {
                        Network::parse(e).ok_or_else(|| format!("{e:?} is no address or CIDR"))
                    })
                    .collect::<Result<_, _>>()?,
            ),
            EntryType::Regex => Self::Patterns(
                entries
                    .map(|e| {
                        regex::RegexBuilder::new(e)
                            .size_limit(MAX_REGEX_BYTES)
                            .build()
                            .map_err(|error| format!("{e:?} is no regular expression: {error}"))
                    })
                    .collect::<Result<_, _>>()?,
            ),
        })
    }

    fn contains(&self, symbol: &Value) -> Result<bool, String> {
        Ok(match self {
            Self::Strings(set) => set.contains(&*value::text(symbol)),
            Self::Folded(set) => set.contains(&value::text(symbol).to_lowercase()),
            Self::Networks(networks) => {
                let ip = value::ip(symbol)
                    .ok_or_else(|| format!("{} is no IP address", value::text(symbol)))?;
                networks.iter().any(|n| n.contains(ip))
            }
            Self::Patterns(patterns) => {
                let text = value::text(symbol);
                patterns.iter().any(|p| p.is_match(&text))
            }
        })
    }
}

/// The entries of a fetched list: a line each. YAML's list marks, quotes, comments and a heading such as
/// `whitelist:` are taken off, so that Istio's two formats read alike.
fn entries(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .filter_map(|line| {
            if matches!(line, "whitelist:" | "blacklist:" | "---") {
                return None;
            }
            let entry = line.strip_prefix("- ").unwrap_or(line).trim();
            let unquoted = ['"', '\'']
                .into_iter()
                .find_map(|q| entry.strip_prefix(q)?.strip_suffix(q));
            Some(unquoted.unwrap_or(entry))
        })
}

struct Config {
    params: Params,
    provider: Option<http::Uri>,
    inline: List,
}

fn config(raw: &serde_json::Value) -> Result<Config, String> {
    let params = params::parse::<Params>(raw)?;
    let inline = List::new(
        params.entry_type,
        params.overrides.iter().map(String::as_str),
    )
    .map_err(|e| format!("overrides: {e}"))?;
    let provider = match params.provider_url.as_str() {
        "" => None,
        url => {
            let uri: http::Uri = url
                .parse()
                .map_err(|e| format!("providerUrl: {url:?}: {e}"))?;
            if uri.scheme_str() != Some("http") || uri.host().is_none() {
                return Err(format!(
                    "providerUrl: {url:?} is not of the form http://HOST/PATH"
                ));
            }
            if params.refresh_interval < Duration::from_secs(1)
                || params.ttl < params.refresh_interval
            {
                return Err("refreshInterval must be at least 1s and ttl not below it".to_owned());
            }
            Some(uri)
        }
    };
    Ok(Config {
        params,
        provider,
        inline,
    })
}

impl Adapter for ListChecker {
    fn info(&self) -> Info {
        Info {
            name: "listchecker",
            description: "allows or denies by a list",
            templates: const { &[&template::LISTENTRY] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        let mut problems: Vec<String> = config(candidate.params).err().into_iter().collect();
        for instance in candidate.instances {
            if instance.field("value").is_none() {
                problems.push(format!("{} has no value to look up", instance.name));
            }
        }
        problems
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let Config {
            params,
            provider,
            inline,
        } = config(candidate.params).map_err(BuildError)?;
        let (sender, fetched) = watch::channel(Fetched::Pending);
        if let Some(provider) = provider {
            let refresh = Refresh {
                handler: candidate.name.to_owned(),
                provider,
                entry_type: params.entry_type,
                interval: params.refresh_interval,
                clock: env.clock().clone(),
                client: Client::builder(TokioExecutor::new()).build_http(),
                fetched: env.counter("list_fetched"),
                failures: env.counter("list_failures"),
            };
            env.spawn(refresh.run(sender))
                .map_err(|e| BuildError(e.to_string()))?;
        } else {
            sender.send_replace(Fetched::NotConfigured);
        }
        let clock = env.clock().clone();
        Ok(Handler::new().with_check(Arc::new(Checker {
            params,
            inline,
            fetched,
            clock,
        })))
    }
}

/// What the provider said last.
#[derive(Clone, Debug)]
enum Fetched {
    NotConfigured,
    Pending,
    Failed,
    List { list: Arc<List>, at: Duration },
}

struct Refresh {
    handler: String,
    provider: http::Uri,
    entry_type: EntryType,
    interval: Duration,
    clock: Clock,
    client: Client<HttpConnector, Empty<bytes::Bytes>>,
    fetched: Counter,
    failures: Counter,
}

impl Refresh {
    /// Fetches the list again and again; a failed fetch leaves the last list in place.
    async fn run(self, sender: watch::Sender<Fetched>) {
        loop {
            let outcome = tokio::time::timeout(FETCH_TIMEOUT, self.fetch()).await;
            match outcome.unwrap_or_else(|_| Err("it does not answer".into())) {
                Ok(list) => {
                    self.fetched.inc();
                    let at = self.clock.now();
                    sender.send_replace(Fetched::List {
                        list: Arc::new(list),
                        at,
                    });
                }
                Err(problem) => {
                    self.failures.inc();
                    tracing::warn!(
                        handler = %self.handler, provider = %self.provider, problem,
                        "a list cannot be refreshed; the last one stays until its ttl ends"
                    );
                    sender.send_if_modified(|state| {
                        let first = matches!(state, Fetched::Pending);
                        if first {
                            *state = Fetched::Failed;
                        }
                        first
                    });
                }
            }
            tokio::time::sleep(self.interval).await;
        }
    }

    async fn fetch(&self) -> Result<List, String> {
        let response = self
            .client
            .get(self.provider.clone())
            .await
            .map_err(|e| e.to_string())?;
        if !response.status().is_success() {
            return Err(format!("it answers {}", response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_LIST_BYTES);
        let bytes = body.collect().await.map_err(|e| e.to_string())?.to_bytes();
        let text = std::str::from_utf8(&bytes).map_err(|e| e.to_string())?;
        List::new(self.entry_type, entries(text))
    }
}

struct Checker {
    params: Params,
    inline: List,
    fetched: watch::Receiver<Fetched>,
    clock: Clock,
}

impl CheckHandler for Checker {
    fn check<'a>(
        &'a self,
        instance: CheckInstance,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<CheckResult, HandlerError>> {
        async move {
            let symbol = match instance {
                CheckInstance::ListEntry(entry) => entry.value,
                _ => None,
            };
            let symbol = symbol.ok_or_else(|| HandlerError::invalid("there is no value"))?;
            let status = match self.is_listed(&symbol).await? {
                Err(problem) => Status::new(Code::InvalidArgument, problem),
                Ok(true) if self.params.blacklist => Status::new(
                    Code::PermissionDenied,
                    format!("{} is blacklisted", value::text(&symbol)),
                ),
                Ok(false) if !self.params.blacklist => Status::new(
                    Code::PermissionDenied,
                    format!("{} is not whitelisted", value::text(&symbol)),
                ),
                Ok(_) => Status::ok(),
            };
            Ok(CheckResult {
                status,
                valid_duration: Some(self.params.caching_interval),
                valid_use_count: Some(self.params.caching_use_count),
            })
        }
        .boxed()
    }
}

impl Checker {
    /// The inner error is about the symbol, the outer about the list.
    async fn is_listed(&self, symbol: &Value) -> Result<Result<bool, String>, HandlerError> {
        match self.inline.contains(symbol) {
            Ok(false) => {}
            found => return Ok(found),
        }
        // The first fetch has begun when the handler was built; the caller's deadline bounds the wait.
        let mut fetched = self.fetched.clone();
        let state = match fetched.wait_for(|s| !matches!(s, Fetched::Pending)).await {
            Ok(state) => state.clone(),
            Err(_) => Fetched::Failed, // the task is gone: the handler is being closed
        };
        match state {
            Fetched::NotConfigured => Ok(Ok(false)),
            Fetched::List { list, at } if self.clock.now().saturating_sub(at) < self.params.ttl => {
                Ok(list.contains(symbol))
            }
            Fetched::List { .. } | Fetched::Pending | Fetched::Failed => {
                Err(HandlerError::unavailable(format!(
                    "there is no fresh list from {}",
                    self.params.provider_url
                )))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_contain_what_they_should() {
        for (network, ip, want) in [
            ("10.57.0.0/16", "10.57.200.1", true),
            ("10.57.0.0/16", "10.58.0.1", false),
            ("10.57.3.4", "10.57.3.4", true),
            ("10.57.3.4", "10.57.3.5", false),
            ("0.0.0.0/0", "203.0.113.9", true),
            ("2001:db8::/32", "2001:db8:1::1", true),
            ("2001:db8::/32", "2001:db9::1", false),
            ("2001:db8::1", "2001:db8::2", false),
            ("::/0", "2001:db8::2", true),
            ("::/0", "10.0.0.1", false),
            ("::ffff:10.0.0.0/104", "10.1.2.3", true),
        ] {
            let found = Network::parse(network)
                .unwrap()
                .contains(ip.parse().unwrap());
            assert_eq!(found, want, "{ip} in {network}");
        }
        for bad in ["", "10.0.0.0/33", "::/129", "10.0.0/8", "x", "10.0.0.0/"] {
            assert_eq!(Network::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn both_formats_of_lists_read_alike() {
        let want = ["10.0.0.0/8", "v1"];
        assert!(entries("10.0.0.0/8\n\n  v1 \n").eq(want));
        assert!(entries("# mine\nwhitelist:\n  - \"10.0.0.0/8\"\n  - 'v1'\n").eq(want));
    }
}
