//! Role-based access control: policies that allow or deny a request or connection by what it asks for and
//! by who asks. Envoy: `envoy.filters.http.rbac` and `envoy.filters.network.rbac`.
//!
//! Who asks is told by the verified certificate of the peer and by addresses, never by a header alone.
//! Policies are compiled into trees that are walked without allocating; only a denial makes text.

use lateen_protocols::envoy::envoy::{
    config::rbac::v3::{self as proto, rbac::Action},
    extensions::filters::{
        http::rbac::v3::{Rbac as HttpProto, RbacPerRoute},
        network::rbac::v3::{Rbac as NetworkProto, rbac::EnforcementType},
    },
};
use lateen_protocols::envoy::{google::protobuf as pb, xds::r#type::matcher::v3::Matcher};

use crate::{
    cel::Condition,
    config_error::ConfigError,
    filter::{FilterContext, RouteFilterConfig},
    format::Facts,
    head::RequestHead,
    info::{ConnectionInfo, ResponseFlags, StreamInfo},
    proto::invalid,
    reject::Reject,
    route::Selected,
    stats::{Counter, Registry, Scope},
};

/// Where metadata of the filters stands.
const HTTP: &str = "envoy.filters.http.rbac";
const NETWORK: &str = "envoy.filters.network.rbac";

mod metadata;
mod rule;
mod tree;
#[cfg(test)]
mod tests;

pub(crate) use metadata::MetadataMatch;
use rule::Rule;
use tree::Tree;

/// The HTTP filter of one connection manager.
#[derive(Debug)]
pub struct HttpRbac {
    rules: RbacRules,
    stats: Stats,
}

/// The network filter of one filter chain.
#[derive(Debug)]
pub struct NetworkRbac {
    rules: RbacRules,
    stats: Stats,
}

/// What is enforced and what is only counted.
#[derive(Debug, Default)]
pub struct RbacRules {
    enforced: Option<Engine>,
    shadow: Option<Engine>,
    /// Whether each policy is counted.
    each: bool,
}

#[derive(Debug)]
struct Stats {
    allowed: Counter,
    denied: Counter,
    shadow_allowed: Counter,
    shadow_denied: Counter,
    /// Of each policy by its name, of the rules and of the shadow rules.
    policies: [Scope; 2],
    /// Before the names of the shadow rules' metadata.
    shadow: Box<str>,
}

/// What decides.
#[derive(Debug)]
enum Engine {
    /// Policies in the order of their names, as Envoy has them, and what the first that matches means.
    Policies(Action, Vec<Policy>),
    Tree(Box<Tree>),
}

#[derive(Debug)]
struct Policy {
    name: Box<str>,
    permissions: Vec<Rule>,
    principals: Vec<Rule>,
    condition: Option<Condition>,
}

/// Whether a request or connection may go on, and the policy that says so.
#[derive(Debug, PartialEq, Eq)]
struct Verdict<'a> {
    allowed: bool,
    policy: Option<&'a str>,
}

/// What rules are held against.
#[derive(Clone, Copy, Debug)]
struct Subject<'a> {
    /// `None` for a connection.
    request: Option<&'a RequestHead>,
    connection: &'a ConnectionInfo,
    info: &'a StreamInfo,
    route: Option<&'a Selected>,
}

impl<'a> Subject<'a> {
    fn facts(&self) -> Facts<'a> {
        Facts {
            request: self.request,
            route: self.route,
            ..Facts::of_connection(self.info)
        }
    }
}

impl HttpRbac {
    /// Compiles the filter; counts in `http.PREFIX.rbac.`.
    ///
    /// # Errors
    /// When a rule is invalid or of a kind that is not supported.
    pub fn compile(config: &HttpProto, scope: &Scope) -> Result<HttpRbac, ConfigError> {
        Ok(HttpRbac {
            rules: RbacRules::compile(config)?,
            stats: Stats::new(
                &scope.scope("rbac."),
                &config.rules_stat_prefix,
                &config.shadow_rules_stat_prefix,
            ),
        })
    }

    /// Lets a request pass or refuses it.
    ///
    /// # Errors
    /// 403 when the rules deny it.
    pub(super) fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &RequestHead,
    ) -> Result<(), Reject> {
        let info = cx.info;
        let own = match cx.config(head) {
            Some(RouteFilterConfig::Rbac(rules)) => Some(rules.clone()),
            _ => None,
        };
        let rules = own.as_deref().unwrap_or(&self.rules);
        let facts = info.borrow();
        let subject = Subject {
            request: Some(head),
            connection: &facts.connection,
            info: &facts,
            route: cx.route(head),
        };
        let (details, shadow) = self.stats.decide(rules, &subject);
        drop(facts);
        if let Some(shadow) = shadow {
            info.borrow_mut().add_metadata(HTTP, shadow);
        }
        match details {
            None => Ok(()),
            Some(details) => Err(Reject::new(
                403,
                "RBAC: access denied",
                ResponseFlags::default(),
                details,
            )),
        }
    }
}

impl NetworkRbac {
    /// Compiles the filter; counts in `PREFIX.rbac.`.
    ///
    /// # Errors
    /// When a rule is invalid or of a kind that is not supported.
    pub fn compile(config: &NetworkProto, stats: &Registry) -> Result<NetworkRbac, ConfigError> {
        let unsupported = [
            (
                "enforcement_type",
                config.enforcement_type() == EnforcementType::Continuous,
            ),
            ("delay_deny", config.delay_deny.is_some()),
        ];
        refuse(&unsupported)?;
        if config.stat_prefix.is_empty() {
            return Err(invalid("stat_prefix", "absent"));
        }
        let prefix = joined(&config.stat_prefix);
        Ok(NetworkRbac {
            rules: RbacRules {
                enforced: Engine::of("", config.matcher.as_ref(), config.rules.as_ref(), false)?,
                shadow: Engine::of(
                    "shadow_",
                    config.shadow_matcher.as_ref(),
                    config.shadow_rules.as_ref(),
                    false,
                )?,
                each: false,
            },
            stats: Stats::new(
                &stats.scope(&format!("{prefix}rbac.")),
                "",
                &config.shadow_rules_stat_prefix,
            ),
        })
    }

    /// Whether a connection may go on; if not, why is in its facts and it has to be closed.
    pub fn admits(&self, info: &mut StreamInfo) -> bool {
        let subject = Subject {
            request: None,
            connection: &info.connection,
            info,
            route: None,
        };
        let (details, shadow) = self.stats.decide(&self.rules, &subject);
        if let Some(shadow) = shadow {
            info.add_metadata(NETWORK, shadow);
        }
        match details {
            None => true,
            Some(details) => {
                info.termination_details = Some(details.into());
                false
            }
        }
    }
}

/// The first of some fields that is given and should not be.
fn refuse(fields: &[(&str, bool)]) -> Result<(), ConfigError> {
    match fields.iter().find(|(_, given)| *given) {
        Some((field, _)) => Err(invalid(*field, "not supported")),
        None => Ok(()),
    }
}

/// A prefix of statistics, with the dot at its end. Envoy: `statPrefixJoin`.
fn joined(prefix: &str) -> String {
    match prefix {
        "" => String::new(),
        ended if ended.ends_with('.') => ended.to_owned(),
        open => format!("{open}."),
    }
}

impl Stats {
    fn new(scope: &Scope, rules: &str, shadow: &str) -> Stats {
        let named = shadow;
        let (rules, shadow) = (joined(rules), joined(shadow));
        Stats {
            allowed: scope.counter(&format!("{rules}allowed")),
            denied: scope.counter(&format!("{rules}denied")),
            shadow_allowed: scope.counter(&format!("{shadow}shadow_allowed")),
            shadow_denied: scope.counter(&format!("{shadow}shadow_denied")),
            policies: [&rules, &shadow].map(|prefix| scope.scope(&format!("{prefix}policy."))),
            shadow: named.into(),
        }
    }

    /// Counts what the rules say; the details of a denial, and what the shadow rules say as metadata.
    fn decide(
        &self,
        rules: &RbacRules,
        subject: &Subject<'_>,
    ) -> (Option<String>, Option<pb::Struct>) {
        let mut metadata = None;
        if let Some(shadow) = &rules.shadow {
            let verdict = shadow.decide(subject);
            match verdict.allowed {
                true => self.shadow_allowed.inc(),
                false => self.shadow_denied.inc(),
            }
            metadata = Some(verdict.metadata(&self.shadow));
            if rules.each {
                count(
                    &self.policies[1],
                    &verdict,
                    ["shadow_allowed", "shadow_denied"],
                );
            }
        }
        let Some(enforced) = &rules.enforced else {
            return (None, metadata);
        };
        let verdict = enforced.decide(subject);
        if rules.each {
            count(&self.policies[0], &verdict, ["allowed", "denied"]);
        }
        if verdict.allowed {
            self.allowed.inc();
            return (None, metadata);
        }
        self.denied.inc();
        (Some(details(verdict.policy)), metadata)
    }
}

impl Verdict<'_> {
    /// Envoy: dynamic metadata `shadow_effective_policy_id` and `shadow_engine_result`.
    fn metadata(&self, prefix: &str) -> pb::Struct {
        let text = |text: &str| pb::Value {
            kind: Some(pb::value::Kind::StringValue(text.to_owned())),
        };
        let mut fields = pb::Struct::default();
        let mut add = |name: &str, value: &str| {
            fields.fields.insert(format!("{prefix}{name}"), text(value));
        };
        if let Some(policy) = self.policy {
            add("shadow_effective_policy_id", policy);
        }
        let result = if self.allowed { "allowed" } else { "denied" };
        add("shadow_engine_result", result);
        fields
    }
}

/// Counts what a policy decided.
fn count(scope: &Scope, verdict: &Verdict<'_>, [allowed, denied]: [&str; 2]) {
    if let Some(policy) = verdict.policy {
        let outcome = if verdict.allowed { allowed } else { denied };
        scope.counter(&format!("{policy}.{outcome}")).inc();
    }
}

/// Envoy: `responseDetail`; white space would end a field of the access log.
fn details(policy: Option<&str>) -> String {
    let name = policy.unwrap_or("none").replace(char::is_whitespace, "_");
    format!("rbac_access_denied_matched_policy[{name}]")
}

impl RbacRules {
    fn compile(config: &HttpProto) -> Result<RbacRules, ConfigError> {
        Ok(RbacRules {
            enforced: Engine::of("", config.matcher.as_ref(), config.rules.as_ref(), true)?,
            shadow: Engine::of(
                "shadow_",
                config.shadow_matcher.as_ref(),
                config.shadow_rules.as_ref(),
                true,
            )?,
            each: config.track_per_rule_stats,
        })
    }

    /// Compiles a route's configuration; one without rules turns the filter off.
    ///
    /// # Errors
    /// When a rule is invalid or of a kind that is not supported.
    pub fn compile_route(config: &RbacPerRoute) -> Result<RbacRules, ConfigError> {
        match &config.rbac {
            Some(rbac) => RbacRules::compile(rbac).map_err(|error| error.within("rbac")),
            None => Ok(RbacRules::default()),
        }
    }
}

impl Engine {
    /// A match tree, or else policies. `prefix` stands before the names of the fields; `http` says whether there will
    /// be requests to look at.
    fn of(
        prefix: &str,
        matcher: Option<&Matcher>,
        rules: Option<&proto::Rbac>,
        http: bool,
    ) -> Result<Option<Engine>, ConfigError> {
        if let Some(matcher) = matcher {
            let tree = Tree::compile(matcher, http);
            let within = |error: ConfigError| error.within(format_args!("{prefix}matcher"));
            return tree
                .map(|tree| Some(Engine::Tree(Box::new(tree))))
                .map_err(within);
        }
        rules
            .map(|rules| Engine::compile(rules, http))
            .transpose()
            .map_err(|error| error.within(format_args!("{prefix}rules")))
    }

    /// `http` says whether there will be requests to look at.
    fn compile(rules: &proto::Rbac, http: bool) -> Result<Engine, ConfigError> {
        if rules
            .audit_logging_options
            .as_ref()
            .is_some_and(|audit| audit.logger_configs.iter().any(|l| !l.is_optional))
        {
            return Err(invalid("audit_logging_options", "not supported"));
        }
        let action = Action::try_from(rules.action)
            .map_err(|_| invalid("action", format!("{} is no action", rules.action)))?;
        let mut policies = Vec::with_capacity(rules.policies.len());
        for (name, policy) in &rules.policies {
            let compiled = Policy::compile(name, policy, http);
            policies.push(compiled.map_err(|error| error.within(format_args!("policy {name}")))?);
        }
        policies.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Engine::Policies(action, policies))
    }

    /// The first policy that matches decides; with none, what is not allowed is denied.
    fn decide(&self, subject: &Subject<'_>) -> Verdict<'_> {
        let (action, policies) = match self {
            Engine::Policies(action, policies) => (action, policies),
            Engine::Tree(tree) => return tree.decide(subject),
        };
        let policy = policies
            .iter()
            .find(|policy| policy.matches(subject))
            .map(|policy| &*policy.name);
        let allowed = match action {
            Action::Allow => policy.is_some(),
            Action::Deny => policy.is_none(),
            Action::Log => true,
        };
        Verdict { allowed, policy }
    }
}

impl Policy {
    fn compile(name: &str, policy: &proto::Policy, http: bool) -> Result<Policy, ConfigError> {
        let checked = policy.checked_condition.as_ref();
        let condition = policy
            .condition
            .as_ref()
            .or_else(|| checked.and_then(|checked| checked.expr.as_ref()))
            .map(Condition::of_tree)
            .transpose()
            .map_err(|error| error.within("condition"))?;
        if policy.permissions.is_empty() {
            return Err(invalid("permissions", "there are none"));
        }
        if policy.principals.is_empty() {
            return Err(invalid("principals", "there are none"));
        }
        Ok(Policy {
            name: name.into(),
            permissions: policy
                .permissions
                .iter()
                .map(|permission| Rule::of_permission(permission, http))
                .collect::<Result<_, _>>()
                .map_err(|error| error.within("permissions"))?,
            principals: policy
                .principals
                .iter()
                .map(|principal| Rule::of_principal(principal, http))
                .collect::<Result<_, _>>()
                .map_err(|error| error.within("principals"))?,
            condition,
        })
    }

    fn matches(&self, subject: &Subject<'_>) -> bool {
        self.permissions.iter().any(|rule| rule.holds(subject))
            && self.principals.iter().any(|rule| rule.holds(subject))
            && self
                .condition
                .as_ref()
                .is_none_or(|condition| condition.holds(&subject.facts()))
    }
}
