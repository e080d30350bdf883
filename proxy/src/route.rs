//! Routes: which virtual host and route a request takes, and what the route does with it. Compiled from
//! `RouteConfiguration` into immutable tables; a request keeps the table it was matched in.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use lateen_protocols::envoy::{
    envoy::config::{core::v3 as core, route::v3 as proto},
    google::protobuf as pb,
};
use proto::{
    redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier},
    route_match::PathSpecifier,
    virtual_host::TlsRequirementType,
};
use regex::bytes::Regex;

use crate::{
    config_error::ConfigError,
    filter::RouteFilterConfig,
    head::{Headers, Known, Name, RequestHead},
    layers::Fraction,
    proto::{Chance, invalid},
    shared::Shared,
    stats::Scope,
};

pub mod headers;
pub mod matcher;
pub mod policy;
#[cfg(test)]
mod tests;

use headers::HeaderOps;
use matcher::{CookieMatch, HeaderMatch, QueryMatch, RegexRewrite, whole_regex};
pub use policy::{
    ClusterSpec, ForwardPolicy, HashKey, HashPolicy, HostRewrite, Mirror, SubsetMatch, Target,
    Weighted, WeightedCluster, WeightedName,
};

/// Route tables by the name under which listeners ask for them. The main runtime sets them (RDS, static
/// configuration); listeners hold the slots and see a new table at the next request.
#[derive(Debug, Default)]
pub struct RouteSlots {
    slots: Mutex<HashMap<Arc<str>, std::sync::Weak<RouteSlot>>>,
}

/// The current table of one name; empty until it has come.
#[derive(Debug)]
pub struct RouteSlot {
    name: Arc<str>,
    table: ArcSwapOption<RouteTable>,
    /// Where the updates of this table are counted: `http.PREFIX.rds.NAME.` of its users.
    scopes: Mutex<Vec<Scope>>,
}

impl RouteSlots {
    /// The slot of a name, made when it is first asked for. It stays while somebody holds it.
    pub fn slot(&self, name: &str) -> Arc<RouteSlot> {
        let mut slots = self.lock();
        if let Some(slot) = slots.get(name).and_then(std::sync::Weak::upgrade) {
            return slot;
        }
        slots.retain(|_, slot| slot.strong_count() > 0);
        let slot = Arc::new(RouteSlot {
            name: name.into(),
            table: ArcSwapOption::empty(),
            scopes: Mutex::default(),
        });
        slots.insert(slot.name.clone(), Arc::downgrade(&slot));
        slot
    }

    /// The slot of a name, if somebody holds it.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<RouteSlot>> {
        self.lock().get(name)?.upgrade()
    }

    /// Names that listeners refer to, sorted.
    pub fn wanted(&self) -> Vec<Arc<str>> {
        let slots = self.lock();
        let mut names: Vec<_> = slots
            .iter()
            .filter(|(_, slot)| slot.strong_count() > 0)
            .map(|(name, _)| name.clone())
            .collect();
        names.sort_unstable();
        names
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Arc<str>, std::sync::Weak<RouteSlot>>> {
        self.slots
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl RouteSlot {
    /// The name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Counts updates of this table in a scope, too.
    pub(crate) fn count_in(&self, scope: Scope) {
        let mut scopes = self.scopes();
        if scopes.iter().all(|known| known.prefix() != scope.prefix()) {
            scopes.push(scope);
        }
    }

    /// Counts an update for all users of the table.
    pub(crate) fn count(&self, accepted: bool) {
        for scope in self.scopes().iter() {
            scope.counter("update_attempt").inc();
            scope
                .counter(if accepted {
                    "update_success"
                } else {
                    "update_rejected"
                })
                .inc();
        }
    }

    fn scopes(&self) -> std::sync::MutexGuard<'_, Vec<Scope>> {
        self.scopes
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Puts a new table in place.
    pub fn set(&self, table: Arc<RouteTable>) {
        self.table.store(Some(table));
    }

    /// The current table.
    pub fn load(&self) -> Option<Arc<RouteTable>> {
        self.table.load_full()
    }
}

/// A compiled `RouteConfiguration`.
#[derive(Debug)]
pub struct RouteTable {
    /// Its name.
    pub name: Arc<str>,
    exact: HashMap<Box<[u8]>, usize>,
    suffixes: Wildcards,
    prefixes: Wildcards,
    any: Option<usize>,
    vhosts: Vec<VirtualHost>,
    request_headers: HeaderOps,
    response_headers: HeaderOps,
    internal_only: Vec<Name>,
    most_specific_wins: bool,
    ignore_port: bool,
}

/// Wildcard domains by the length of their fixed part, longest first.
type Wildcards = Vec<(usize, HashMap<Box<[u8]>, usize>)>;

/// A virtual host.
#[derive(Debug)]
pub struct VirtualHost {
    /// Its name.
    pub name: Arc<str>,
    /// Its routes in order.
    pub routes: Vec<Route>,
    require_tls: TlsRequirementType,
    request_headers: HeaderOps,
    response_headers: HeaderOps,
}

/// A route.
#[derive(Debug)]
pub struct Route {
    /// Its name; may be empty.
    pub name: Option<Arc<str>>,
    /// What it does.
    pub action: Action,
    /// Name of the operation for traces.
    pub decorator: Option<Arc<str>>,
    /// Whether the decorator goes upstream in `x-envoy-decorator-operation`.
    pub decorator_propagates: bool,
    /// `metadata.filter_metadata`, for access logs.
    pub metadata: HashMap<String, pb::Struct>,
    conditions: Conditions,
    request_headers: HeaderOps,
    response_headers: HeaderOps,
    filters: FilterConfigs,
    /// Of each weighted cluster, everything merged.
    weighted_filters: Vec<FilterConfigs>,
}

/// Filter configuration by the filter's name; few, so a list is fastest.
type FilterConfigs = Vec<(Arc<str>, RouteFilterConfig)>;

/// What a route does.
#[derive(Debug)]
pub enum Action {
    /// Forwards.
    Forward {
        /// Where and how.
        policy: Box<ForwardPolicy>,
        /// What becomes of the path.
        rewrite: PathRewrite,
    },
    /// Sends the client elsewhere.
    Redirect(Redirect),
    /// Answers.
    Direct {
        /// Status of the answer.
        status: u16,
        /// Its body.
        body: Bytes,
    },
}

/// What becomes of the path when it is forwarded.
#[derive(Debug)]
pub enum PathRewrite {
    /// Stays.
    Keep,
    /// The matched part is replaced.
    Prefix(Bytes),
    /// Every match is replaced.
    Regex(RegexRewrite),
}

/// A redirect.
#[derive(Debug)]
pub struct Redirect {
    status: u16,
    scheme: Option<Bytes>,
    host: Option<Bytes>,
    port: Option<u16>,
    path: RedirectPath,
    strip_query: bool,
}

#[derive(Debug)]
enum RedirectPath {
    Whole(Bytes),
    Rewrite(PathRewrite),
}

#[derive(Debug)]
struct Conditions {
    path: PathMatch,
    fold: bool,
    chance: Fraction,
    headers: Vec<HeaderMatch>,
    query: Vec<QueryMatch>,
    cookies: Vec<CookieMatch>,
    grpc: bool,
    tls_presented: Option<bool>,
    tls_validated: Option<bool>,
}

#[derive(Debug)]
enum PathMatch {
    Prefix(Bytes),
    Exact(Bytes),
    Regex(Regex),
    Separated(Bytes),
    Connect,
}

/// The outcome of matching: the route, and the cluster when it is weighted. Keeps its table alive.
#[derive(Clone, Debug)]
pub struct Selected {
    table: Arc<RouteTable>,
    vhost: usize,
    route: usize,
    weighted: Option<usize>,
}

/// Why no route was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmatched {
    /// No virtual host or no route matches.
    NotFound,
    /// The virtual host wants TLS and the request came without: the place to go to instead.
    NeedsTls,
}

impl RouteTable {
    /// Compiles a route configuration. `shared` serves filters that look up clusters or secrets.
    ///
    /// # Errors
    /// When anything in it is invalid, or not supported and would change what happens.
    pub fn compile(
        config: &proto::RouteConfiguration,
        shared: &Shared,
    ) -> Result<RouteTable, ConfigError> {
        compile(config, shared).map_err(|error| error.within(format_args!("route {}", config.name)))
    }

    /// Fails if a cluster that the table names is not there. Envoy: `validate_clusters`.
    ///
    /// # Errors
    /// The first cluster that is missing.
    pub fn require_clusters(&self, shared: &Shared) -> Result<(), ConfigError> {
        let warming = shared.clusters.warming();
        let unknown = |name: &Arc<str>| {
            shared.clusters.get(name).is_none() && !warming.iter().any(|c| *c.name == **name)
        };
        match self.clusters().find(unknown) {
            None => Ok(()),
            Some(name) => Err(invalid(
                format!("route {}", self.name),
                format!("unknown cluster '{name}'"),
            )),
        }
    }

    /// Virtual hosts in order.
    pub fn virtual_hosts(&self) -> &[VirtualHost] {
        &self.vhosts
    }

    /// Names of all clusters the table may forward to, as far as it names them.
    pub fn clusters(&self) -> impl Iterator<Item = Arc<str>> {
        self.vhosts
            .iter()
            .flat_map(|vhost| &vhost.routes)
            .filter_map(|route| match &route.action {
                Action::Forward { policy, .. } => Some(policy.clusters()),
                Action::Redirect(_) | Action::Direct { .. } => None,
            })
            .flatten()
    }

    /// Selects the route of a request.
    ///
    /// # Errors
    /// [`Unmatched`].
    pub fn select(
        self: &Arc<Self>,
        head: &RequestHead,
        tls: Option<&crate::info::TlsInfo>,
        internal: bool,
    ) -> Result<Selected, Unmatched> {
        let vhost = self
            .virtual_host(&head.authority)
            .ok_or(Unmatched::NotFound)?;
        let host = &self.vhosts[vhost];
        let needs_tls = match host.require_tls {
            TlsRequirementType::None => false,
            TlsRequirementType::ExternalOnly => !internal,
            TlsRequirementType::All => true,
        };
        if needs_tls && head.scheme.as_ref() != b"https" {
            return Err(Unmatched::NeedsTls);
        }
        let path = head.path_only();
        let route = host
            .routes
            .iter()
            .position(|route| route.conditions.hold(head, path, tls))
            .ok_or(Unmatched::NotFound)?;
        let weighted = match &host.routes[route].action {
            Action::Forward { policy, .. } => match &policy.cluster {
                ClusterSpec::Weighted(weighted) => Some(weighted.draw(&head.headers)),
                ClusterSpec::Name(_) | ClusterSpec::Header(_) => None,
            },
            Action::Redirect(_) | Action::Direct { .. } => None,
        };
        Ok(Selected {
            table: self.clone(),
            vhost,
            route,
            weighted,
        })
    }

    /// The virtual host of an authority: exact, then the longest `*suffix`, then the longest `prefix*`, then `*`.
    fn virtual_host(&self, authority: &[u8]) -> Option<usize> {
        if self.exact.is_empty() && self.suffixes.is_empty() && self.prefixes.is_empty() {
            return self.any;
        }
        let authority = if self.ignore_port {
            without_port(authority)
        } else {
            authority
        };
        let lower;
        let host = if authority.iter().any(u8::is_ascii_uppercase) {
            lower = authority.to_ascii_lowercase();
            lower.as_slice()
        } else {
            authority
        };
        if let Some(&found) = self.exact.get(host) {
            return Some(found);
        }
        // A wildcard stands for at least one character.
        let suffix = self.suffixes.iter().find_map(|(length, hosts)| {
            let start = host.len().checked_sub(*length).filter(|start| *start > 0)?;
            hosts.get(&host[start..]).copied()
        });
        let found = suffix.or_else(|| {
            self.prefixes.iter().find_map(|(length, hosts)| {
                hosts
                    .get(host.get(..*length).filter(|_| host.len() > *length)?)
                    .copied()
            })
        });
        found.or(self.any)
    }
}

/// An authority without its port.
pub fn without_port(authority: &[u8]) -> &[u8] {
    match authority.iter().rposition(|b| *b == b':') {
        // In `[::1]` the last colon is no port's.
        Some(colon) if authority[colon + 1..].iter().all(u8::is_ascii_digit) => {
            let host = &authority[..colon];
            if host.contains(&b':') && !host.ends_with(b"]") {
                authority
            } else {
                host
            }
        }
        _ => authority,
    }
}

impl Weighted {
    fn draw(&self, headers: &Headers) -> usize {
        let from_header = self
            .random_header
            .as_ref()
            .and_then(|name| headers.get(name))
            .and_then(|value| std::str::from_utf8(value).ok())
            .and_then(|text| text.parse::<u64>().ok());
        let random = from_header.unwrap_or_else(rand::random) % u64::from(self.total);
        let mut sum = 0;
        self.clusters
            .iter()
            .position(|cluster| {
                sum += u64::from(cluster.weight);
                random < sum
            })
            .unwrap_or(0)
    }
}

impl Selected {
    /// The route.
    pub fn route(&self) -> &Route {
        &self.virtual_host().routes[self.route]
    }

    /// Its virtual host.
    pub fn virtual_host(&self) -> &VirtualHost {
        &self.table.vhosts[self.vhost]
    }

    /// Configuration for the filter of this name, of the most specific level that has one.
    pub fn filter_config(&self, filter: &str) -> Option<&RouteFilterConfig> {
        let route = self.route();
        let configs = match self.weighted {
            Some(index) => route.weighted_filters.get(index).unwrap_or(&route.filters),
            None => &route.filters,
        };
        configs
            .iter()
            .find(|(name, _)| **name == *filter)
            .map(|(_, config)| config)
    }

    /// The chosen weighted cluster.
    pub fn weighted(&self) -> Option<&WeightedCluster> {
        match &self.route().action {
            Action::Forward { policy, .. } => match &policy.cluster {
                ClusterSpec::Weighted(weighted) => weighted.clusters.get(self.weighted?),
                ClusterSpec::Name(_) | ClusterSpec::Header(_) => None,
            },
            Action::Redirect(_) | Action::Direct { .. } => None,
        }
    }

    /// The cluster to forward to; `None` if a header should name it and does not.
    pub fn target(&self, head: &RequestHead) -> Option<Target> {
        let Action::Forward { policy, .. } = &self.route().action else {
            return None;
        };
        let by_header = |name: &Name| -> Option<Arc<str>> {
            let value = std::str::from_utf8(head.headers.get(name)?).ok()?;
            (!value.is_empty()).then(|| value.into())
        };
        let (cluster, subset) = match (&policy.cluster, self.weighted()) {
            (ClusterSpec::Name(name), _) => (name.clone(), policy.subset.clone()),
            (ClusterSpec::Header(name), _) => (by_header(name)?, policy.subset.clone()),
            (ClusterSpec::Weighted(_), Some(weighted)) => {
                let cluster = match &weighted.name {
                    WeightedName::Name(name) => name.clone(),
                    WeightedName::Header(name) => by_header(name)?,
                };
                (
                    cluster,
                    merged_subset(policy.subset.as_ref(), weighted.subset.as_ref()),
                )
            }
            (ClusterSpec::Weighted(_), None) => return None,
        };
        Some(Target { cluster, subset })
    }

    /// Header operations on the request, in the order they apply.
    pub fn request_ops(&self) -> impl Iterator<Item = &HeaderOps> {
        self.ordered([
            self.weighted().map(|weighted| &weighted.request_headers),
            Some(&self.route().request_headers),
            Some(&self.virtual_host().request_headers),
            Some(&self.table.request_headers),
        ])
    }

    /// Header operations on the response, in the order they apply.
    pub fn response_ops(&self) -> impl Iterator<Item = &HeaderOps> {
        self.ordered([
            self.weighted().map(|weighted| &weighted.response_headers),
            Some(&self.route().response_headers),
            Some(&self.virtual_host().response_headers),
            Some(&self.table.response_headers),
        ])
    }

    fn ordered<'a>(
        &self,
        mut levels: [Option<&'a HeaderOps>; 4],
    ) -> impl Iterator<Item = &'a HeaderOps> + use<'a> {
        if self.table.most_specific_wins {
            levels.reverse();
        }
        levels.into_iter().flatten().filter(|ops| !ops.is_empty())
    }

    /// Headers that only internal requests may carry.
    pub fn internal_only(&self) -> &[Name] {
        &self.table.internal_only
    }

    /// Applies the route's path and host rewrites (all but the automatic host rewrite, which is the
    /// router's) and leaves the old values in `x-envoy-original-path`, `x-envoy-original-host` and `x-forwarded-host`.
    pub fn rewrite(&self, head: &mut RequestHead, suppress_envoy_headers: bool) {
        let Action::Forward { policy, rewrite } = &self.route().action else {
            return;
        };
        let host = match (
            self.weighted().and_then(|w| w.host_rewrite.as_ref()),
            &policy.host_rewrite,
        ) {
            (Some(host), _) | (None, HostRewrite::Literal(host)) => Some(host.clone()),
            (None, HostRewrite::Header(name)) => head
                .headers
                .get(name)
                .filter(|v| !v.is_empty())
                .map(Bytes::copy_from_slice),
            (None, HostRewrite::PathRegex(rewrite)) => {
                Some(rewrite.apply(head.path_only()).into_owned().into())
            }
            (None, HostRewrite::Keep | HostRewrite::Auto) => None,
        };
        if let Some(path) = rewrite.apply(&self.route().conditions, head) {
            let old = std::mem::replace(&mut head.path, path);
            if !suppress_envoy_headers {
                head.headers.set(Known::XEnvoyOriginalPath, old);
            }
        }
        if let Some(host) = host
            && host != head.authority
        {
            let old = std::mem::replace(&mut head.authority, host);
            if !suppress_envoy_headers {
                head.headers
                    .set(Name::new("x-envoy-original-host"), old.clone());
            }
            if policy.append_x_forwarded_host {
                append_forwarded_host(&mut head.headers, &old);
            }
        }
    }
}

/// Adds an authority to `x-forwarded-host`, after those of earlier proxies.
pub fn append_forwarded_host(headers: &mut Headers, host: &Bytes) {
    let value = match headers.known(Known::XForwardedHost) {
        Some(earlier) => {
            let mut all = earlier.to_vec();
            all.push(b',');
            all.extend_from_slice(host);
            all.into()
        }
        None => host.clone(),
    };
    headers.set(Known::XForwardedHost, value);
}

fn merged_subset(
    route: Option<&SubsetMatch>,
    cluster: Option<&SubsetMatch>,
) -> Option<SubsetMatch> {
    match (route, cluster) {
        (None, one) | (one, None) => one.cloned(),
        (Some(route), Some(cluster)) => {
            let mut all = route.as_ref().clone();
            all.extend(
                cluster
                    .iter()
                    .map(|(key, value)| (key.clone(), value.clone())),
            );
            Some(Arc::new(all))
        }
    }
}

impl Conditions {
    fn hold(&self, head: &RequestHead, path: &[u8], tls: Option<&crate::info::TlsInfo>) -> bool {
        self.path.matches(head, path, self.fold)
            && (!self.grpc || head.is_grpc())
            && self.headers.iter().all(|header| header.matches(head))
            && self
                .query
                .iter()
                .all(|parameter| parameter.matches(head.query()))
            && self
                .cookies
                .iter()
                .all(|cookie| cookie.matches(&head.headers))
            && self
                .tls_presented
                .is_none_or(|want| tls.is_some_and(crate::info::TlsInfo::is_mutual) == want)
            && self
                .tls_validated
                .is_none_or(|want| tls.is_some_and(crate::info::TlsInfo::is_mutual) == want)
            && self.chance.hits()
    }
}

impl PathMatch {
    fn matches(&self, head: &RequestHead, path: &[u8], fold: bool) -> bool {
        let same = |want: &[u8], text: &[u8]| {
            if fold {
                want.eq_ignore_ascii_case(text)
            } else {
                want == text
            }
        };
        match self {
            PathMatch::Prefix(prefix) => path.get(..prefix.len()).is_some_and(|p| same(prefix, p)),
            PathMatch::Exact(want) => same(want, path),
            PathMatch::Regex(regex) => regex.is_match(path),
            PathMatch::Separated(prefix) => {
                path.get(..prefix.len()).is_some_and(|p| same(prefix, p))
                    && matches!(path.get(prefix.len()), None | Some(b'/'))
            }
            PathMatch::Connect => head.method.as_ref() == b"CONNECT",
        }
    }
}

impl PathRewrite {
    /// The new path with the query, or `None` if it stays.
    fn apply(&self, conditions: &Conditions, head: &RequestHead) -> Option<Bytes> {
        let path = head.path_only();
        let rest = &head.path[path.len()..];
        let mut new = match self {
            PathRewrite::Keep => return None,
            PathRewrite::Prefix(prefix) => {
                let matched = match &conditions.path {
                    PathMatch::Prefix(p) | PathMatch::Separated(p) => p.len(),
                    PathMatch::Exact(_) | PathMatch::Regex(_) => path.len(),
                    PathMatch::Connect => return None,
                };
                let mut new = prefix.to_vec();
                new.extend_from_slice(&path[matched.min(path.len())..]);
                new
            }
            PathRewrite::Regex(rewrite) => rewrite.apply(path).into_owned(),
        };
        new.extend_from_slice(rest);
        Some(new.into())
    }
}

impl Redirect {
    /// Status of the answer.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// `location` for a request. Envoy: `RouteEntryImplBase::newUri`.
    pub fn location(&self, route: &Route, head: &RequestHead) -> Bytes {
        let scheme = self.scheme.as_ref().unwrap_or(&head.scheme);
        let host = match &self.host {
            Some(host) => host.as_ref(),
            None => self.request_host(head, scheme),
        };
        let mut location = scheme.to_vec();
        location.extend_from_slice(b"://");
        location.extend_from_slice(host);
        if let Some(port) = self.port {
            location.extend_from_slice(format!(":{port}").as_bytes());
        }
        let query_of = |path: &Bytes| {
            path.iter()
                .position(|b| *b == b'?')
                .map(|at| path.slice(at..))
        };
        match &self.path {
            RedirectPath::Whole(path) => {
                location.extend_from_slice(path);
                if !self.strip_query
                    && !path.contains(&b'?')
                    && let Some(query) = query_of(&head.path)
                {
                    location.extend_from_slice(&query);
                }
            }
            RedirectPath::Rewrite(rewrite) => {
                let path = rewrite
                    .apply(&route.conditions, head)
                    .unwrap_or_else(|| head.path.clone());
                let end = match (self.strip_query, path.iter().position(|b| *b == b'?')) {
                    (true, Some(query)) => query,
                    _ => path.len(),
                };
                location.extend_from_slice(&path[..end]);
            }
        }
        location.into()
    }

    /// The request's host; its port goes when another is given, or when it was the old scheme's default.
    fn request_host<'a>(&self, head: &'a RequestHead, scheme: &[u8]) -> &'a [u8] {
        let host = without_port(&head.authority);
        let port = &head.authority[host.len()..];
        let old_default = scheme != head.scheme.as_ref()
            && matches!(
                (head.scheme.as_ref(), port),
                (b"https", b":443") | (b"http", b":80")
            );
        if self.port.is_some() || old_default {
            host
        } else {
            &head.authority
        }
    }
}

fn compile(config: &proto::RouteConfiguration, shared: &Shared) -> Result<RouteTable, ConfigError> {
    let unsupported = [
        ("vhds", config.vhds.is_some()),
        (
            "cluster_specifier_plugins",
            !config.cluster_specifier_plugins.is_empty(),
        ),
        ("vhost_header", !config.vhost_header.is_empty()),
        (
            "request_mirror_policies",
            !config.request_mirror_policies.is_empty(),
        ),
        ("route_specifiers", !config.route_specifiers.is_empty()),
        (
            "ignore_path_parameters_in_path_matching",
            config.ignore_path_parameters_in_path_matching,
        ),
    ];
    if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
        return Err(invalid(*field, "not supported"));
    }
    let mut table = RouteTable {
        name: config.name.as_str().into(),
        exact: HashMap::new(),
        suffixes: Vec::new(),
        prefixes: Vec::new(),
        any: None,
        vhosts: Vec::with_capacity(config.virtual_hosts.len()),
        request_headers: HeaderOps::compile(
            &config.request_headers_to_add,
            &config.request_headers_to_remove,
        )?,
        response_headers: HeaderOps::compile(
            &config.response_headers_to_add,
            &config.response_headers_to_remove,
        )?,
        internal_only: config.internal_only_headers.iter().map(Name::new).collect(),
        most_specific_wins: config.most_specific_header_mutations_wins,
        ignore_port: config.ignore_port_in_host_matching,
    };
    let base = filter_configs(&[], &config.typed_per_filter_config, shared)?;
    for vhost in &config.virtual_hosts {
        let within = |error: ConfigError| error.within(format_args!("virtual host {}", vhost.name));
        let index = table.vhosts.len();
        table
            .vhosts
            .push(virtual_host(vhost, &base, config, shared).map_err(within)?);
        if vhost.domains.is_empty() {
            return Err(within(invalid("domains", "there are none")));
        }
        for domain in &vhost.domains {
            table.add_domain(domain, index).map_err(within)?;
        }
    }
    table
        .suffixes
        .sort_by_key(|(length, _)| std::cmp::Reverse(*length));
    table
        .prefixes
        .sort_by_key(|(length, _)| std::cmp::Reverse(*length));
    if config.validate_clusters.as_ref().is_some_and(|on| on.value) {
        table.require_clusters(shared)?;
    }
    Ok(table)
}

impl RouteTable {
    fn add_domain(&mut self, domain: &str, vhost: usize) -> Result<(), ConfigError> {
        let lower = domain.to_ascii_lowercase();
        let twice = || {
            invalid(
                "domains",
                format!(
                    "Only unique values for domains are permitted. Duplicate entry of domain {domain}"
                ),
            )
        };
        let (list, fixed) = if lower == "*" {
            return match self.any.replace(vhost) {
                None => Ok(()),
                Some(_) => Err(invalid(
                    "domains",
                    "Only a single wildcard domain is permitted",
                )),
            };
        } else if let Some(suffix) = lower.strip_prefix('*') {
            (&mut self.suffixes, suffix)
        } else if let Some(prefix) = lower.strip_suffix('*') {
            (&mut self.prefixes, prefix)
        } else {
            return match self.exact.insert(lower.as_bytes().into(), vhost) {
                None => Ok(()),
                Some(_) => Err(twice()),
            };
        };
        let at = match list.iter().position(|(length, _)| *length == fixed.len()) {
            Some(at) => at,
            None => {
                list.push((fixed.len(), HashMap::new()));
                list.len() - 1
            }
        };
        match list[at].1.insert(fixed.as_bytes().into(), vhost) {
            None => Ok(()),
            Some(_) => Err(twice()),
        }
    }
}

fn virtual_host(
    vhost: &proto::VirtualHost,
    base: &FilterConfigs,
    config: &proto::RouteConfiguration,
    shared: &Shared,
) -> Result<VirtualHost, ConfigError> {
    if vhost.matcher.is_some() || !vhost.route_specifiers.is_empty() {
        return Err(invalid("matcher", "not supported"));
    }
    if !vhost.rate_limits.is_empty() {
        return Err(invalid("rate_limits", "not supported"));
    }
    if vhost.retry_policy_typed_config.is_some() {
        return Err(invalid("retry_policy_typed_config", "not supported"));
    }
    let mut filters = filter_configs(base, &vhost.typed_per_filter_config, shared)?;
    if let Some(cors) = vhost.cors.as_ref() {
        RouteFilterConfig::add_legacy_cors(&mut filters, cors)?;
    }
    let mut routes = Vec::with_capacity(vhost.routes.len());
    for (index, one) in vhost.routes.iter().enumerate() {
        let compiled = route(one, vhost, &filters, config, shared).map_err(|error| {
            if one.name.is_empty() {
                error.within(format_args!("routes[{index}]"))
            } else {
                error.within(format_args!("route {}", one.name))
            }
        })?;
        routes.push(compiled);
    }
    Ok(VirtualHost {
        name: vhost.name.as_str().into(),
        routes,
        require_tls: vhost.require_tls(),
        request_headers: HeaderOps::compile(
            &vhost.request_headers_to_add,
            &vhost.request_headers_to_remove,
        )?,
        response_headers: HeaderOps::compile(
            &vhost.response_headers_to_add,
            &vhost.response_headers_to_remove,
        )?,
    })
}

fn route(
    route: &proto::Route,
    vhost: &proto::VirtualHost,
    base: &FilterConfigs,
    config: &proto::RouteConfiguration,
    shared: &Shared,
) -> Result<Route, ConfigError> {
    if !route.route_specifiers.is_empty() {
        return Err(invalid("route_specifiers", "not supported"));
    }
    let conditions = conditions(
        route
            .r#match
            .as_ref()
            .ok_or_else(|| invalid("match", "absent"))?,
        shared,
    )
    .map_err(|error| error.within("match"))?;
    let mut filters = filter_configs(base, &route.typed_per_filter_config, shared)?;
    let mut weighted_filters = Vec::new();
    let action = match route.action.as_ref() {
        Some(proto::route::Action::Route(action)) => {
            if let Some(cors) = action.cors.as_ref() {
                RouteFilterConfig::add_legacy_cors(&mut filters, cors)?;
            }
            if let Some(proto::route_action::ClusterSpecifier::WeightedClusters(weighted)) =
                action.cluster_specifier.as_ref()
            {
                for cluster in &weighted.clusters {
                    weighted_filters.push(filter_configs(
                        &filters,
                        &cluster.typed_per_filter_config,
                        shared,
                    )?);
                }
            }
            let rewrite = match (
                action.prefix_rewrite.as_str(),
                action.regex_rewrite.as_ref(),
            ) {
                ("", None) => PathRewrite::Keep,
                ("", Some(regex)) => {
                    PathRewrite::Regex(RegexRewrite::compile("regex_rewrite", regex)?)
                }
                (prefix, None) => PathRewrite::Prefix(prefix.to_owned().into()),
                (_, Some(_)) => {
                    return Err(invalid(
                        "regex_rewrite",
                        "given together with prefix_rewrite",
                    ));
                }
            };
            Action::Forward {
                policy: Box::new(ForwardPolicy::compile(
                    action,
                    route,
                    vhost,
                    &shared.layers,
                )?),
                rewrite,
            }
        }
        Some(proto::route::Action::Redirect(redirect)) => {
            Action::Redirect(compile_redirect(redirect)?)
        }
        Some(proto::route::Action::DirectResponse(direct)) => direct_response(direct, config)?,
        Some(proto::route::Action::NonForwardingAction(_)) => {
            return Err(invalid("non_forwarding_action", "not supported"));
        }
        Some(proto::route::Action::FilterAction(_)) => {
            return Err(invalid("filter_action", "not supported"));
        }
        None => return Err(invalid("action", "absent")),
    };
    Ok(Route {
        name: Some(route.name.as_str())
            .filter(|name| !name.is_empty())
            .map(Arc::from),
        action,
        decorator: route
            .decorator
            .as_ref()
            .map(|decorator| decorator.operation.as_str().into()),
        decorator_propagates: route
            .decorator
            .as_ref()
            .is_some_and(|decorator| decorator.propagate.as_ref().is_none_or(|p| p.value)),
        metadata: route
            .metadata
            .as_ref()
            .map(|metadata| metadata.filter_metadata.clone())
            .unwrap_or_default(),
        conditions,
        request_headers: HeaderOps::compile(
            &route.request_headers_to_add,
            &route.request_headers_to_remove,
        )?,
        response_headers: HeaderOps::compile(
            &route.response_headers_to_add,
            &route.response_headers_to_remove,
        )?,
        filters,
        weighted_filters,
    })
}

fn conditions(rules: &proto::RouteMatch, shared: &Shared) -> Result<Conditions, ConfigError> {
    if !rules.dynamic_metadata.is_empty() || !rules.filter_state.is_empty() {
        return Err(invalid("dynamic_metadata", "not supported"));
    }
    let path = match rules.path_specifier.as_ref() {
        Some(PathSpecifier::Prefix(prefix)) => PathMatch::Prefix(prefix.clone().into()),
        Some(PathSpecifier::Path(path)) => PathMatch::Exact(path.clone().into()),
        Some(PathSpecifier::SafeRegex(regex)) => {
            PathMatch::Regex(whole_regex("safe_regex", regex)?)
        }
        Some(PathSpecifier::PathSeparatedPrefix(prefix)) => {
            PathMatch::Separated(prefix.clone().into())
        }
        Some(PathSpecifier::ConnectMatcher(_)) => PathMatch::Connect,
        Some(PathSpecifier::PathMatchPolicy(_)) => {
            return Err(invalid("path_match_policy", "not supported"));
        }
        None => return Err(invalid("path_specifier", "absent")),
    };
    let tls = rules.tls_context.as_ref();
    Ok(Conditions {
        path,
        fold: rules
            .case_sensitive
            .as_ref()
            .is_some_and(|sensitive| !sensitive.value),
        chance: shared.layers.fraction(rules.runtime_fraction.as_ref(), Chance::ALWAYS),
        headers: rules
            .headers
            .iter()
            .map(HeaderMatch::compile)
            .collect::<Result<_, _>>()?,
        query: rules
            .query_parameters
            .iter()
            .map(QueryMatch::compile)
            .collect::<Result<_, _>>()?,
        cookies: rules
            .cookies
            .iter()
            .map(CookieMatch::compile)
            .collect::<Result<_, _>>()?,
        grpc: rules.grpc.is_some(),
        tls_presented: tls.and_then(|tls| tls.presented.as_ref()).map(|v| v.value),
        tls_validated: tls.and_then(|tls| tls.validated.as_ref()).map(|v| v.value),
    })
}

fn compile_redirect(redirect: &proto::RedirectAction) -> Result<Redirect, ConfigError> {
    let text = |text: &str| (!text.is_empty()).then(|| Bytes::from(text.to_owned()));
    let path = match redirect.path_rewrite_specifier.as_ref() {
        None => RedirectPath::Rewrite(PathRewrite::Keep),
        Some(PathRewriteSpecifier::PathRedirect(path)) => match text(path) {
            Some(path) => RedirectPath::Whole(path),
            None => RedirectPath::Rewrite(PathRewrite::Keep),
        },
        Some(PathRewriteSpecifier::PrefixRewrite(prefix)) => {
            RedirectPath::Rewrite(PathRewrite::Prefix(prefix.clone().into()))
        }
        Some(PathRewriteSpecifier::RegexRewrite(regex)) => RedirectPath::Rewrite(
            PathRewrite::Regex(RegexRewrite::compile("regex_rewrite", regex)?),
        ),
        Some(PathRewriteSpecifier::PathRewrite(_)) => {
            return Err(invalid("path_rewrite", "not supported"));
        }
    };
    let port = match redirect.port_redirect {
        0 => None,
        port => Some(u16::try_from(port).map_err(|_| invalid("port_redirect", "not a port"))?),
    };
    Ok(Redirect {
        status: match redirect.response_code() {
            RedirectResponseCode::MovedPermanently => 301,
            RedirectResponseCode::Found => 302,
            RedirectResponseCode::SeeOther => 303,
            RedirectResponseCode::TemporaryRedirect => 307,
            RedirectResponseCode::PermanentRedirect => 308,
        },
        scheme: match redirect.scheme_rewrite_specifier.as_ref() {
            Some(SchemeRewriteSpecifier::HttpsRedirect(true)) => Some(Bytes::from_static(b"https")),
            Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) => text(scheme),
            Some(SchemeRewriteSpecifier::HttpsRedirect(false)) | None => None,
        },
        host: text(&redirect.host_redirect),
        port,
        path,
        strip_query: redirect.strip_query,
    })
}

fn direct_response(
    direct: &proto::DirectResponseAction,
    config: &proto::RouteConfiguration,
) -> Result<Action, ConfigError> {
    const DEFAULT_LIMIT: u32 = 4096; // Envoy: max_direct_response_body_size_bytes
    if direct.body_format.is_some() {
        return Err(invalid("body_format", "not supported"));
    }
    let status = u16::try_from(direct.status)
        .ok()
        .filter(|status| (200..600).contains(status))
        .ok_or_else(|| invalid("status", "not between 200 and 599"))?;
    let body = direct
        .body
        .as_ref()
        .map(data_source)
        .transpose()?
        .unwrap_or_default();
    let limit = config
        .max_direct_response_body_size_bytes
        .as_ref()
        .map_or(DEFAULT_LIMIT, |limit| limit.value);
    if body.len() > limit as usize {
        return Err(invalid("body", format!("longer than {limit} bytes")));
    }
    Ok(Action::Direct { status, body })
}

/// Reads a `DataSource`: inline text or a file.
///
/// # Errors
/// When the file cannot be read, or the source is of another kind.
pub fn data_source(source: &core::DataSource) -> Result<Bytes, ConfigError> {
    use core::data_source::Specifier;
    match source.specifier.as_ref() {
        Some(Specifier::InlineString(text)) => Ok(text.clone().into()),
        Some(Specifier::InlineBytes(bytes)) => Ok(bytes.clone().into()),
        Some(Specifier::Filename(file)) => std::fs::read(file)
            .map(Bytes::from)
            .map_err(|error| invalid(file.clone(), error.to_string())),
        Some(Specifier::EnvironmentVariable(_)) => {
            Err(invalid("environment_variable", "not supported"))
        }
        None => Err(invalid("data source", "empty")),
    }
}

fn filter_configs(
    base: &[(Arc<str>, RouteFilterConfig)],
    own: &HashMap<String, pb::Any>,
    shared: &Shared,
) -> Result<FilterConfigs, ConfigError> {
    let mut merged = base.to_vec();
    for (name, any) in own {
        let Some(config) = RouteFilterConfig::compile(any, shared)
            .map_err(|error| error.within(format_args!("filter {name}")))?
        else {
            continue;
        };
        match merged.iter_mut().find(|(n, _)| **n == **name) {
            Some((_, present)) => *present = config,
            None => merged.push((name.as_str().into(), config)),
        }
    }
    Ok(merged)
}
