//! Policies: as written, and as they are asked.

use std::collections::{BTreeMap, HashMap};

use lateen_adapter::{
    instance::{Authorization, Values},
    value,
};
use serde::Deserialize;
use serde_json::Value as Json;

/// The kinds of `rbac.istio.io/v1alpha1`.
pub const KINDS: &[&str] = &[
    "ServiceRole",
    "ServiceRoleBinding",
    "RbacConfig",
    "ClusterRbacConfig",
];

/// Text of a policy: `exact`, `prefix*`, `*suffix` or `*`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(from = "String")]
enum Pattern {
    Any,
    Exact(String),
    Prefix(String),
    Suffix(String),
}

impl From<String> for Pattern {
    fn from(text: String) -> Self {
        if text == "*" {
            Self::Any
        } else if let Some(prefix) = text.strip_suffix('*') {
            Self::Prefix(prefix.to_owned())
        } else if let Some(suffix) = text.strip_prefix('*') {
            Self::Suffix(suffix.to_owned())
        } else {
            Self::Exact(text)
        }
    }
}

impl Pattern {
    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => text == exact,
            Self::Prefix(prefix) => text.starts_with(prefix),
            Self::Suffix(suffix) => text.ends_with(suffix),
        }
    }
}

fn any(patterns: &[Pattern], text: &str) -> bool {
    patterns.iter().any(|p| p.matches(text))
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Role {
    rules: Vec<AccessRule>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct AccessRule {
    services: Vec<Pattern>,
    /// Absent: all.
    #[serde(default)]
    methods: Vec<Pattern>,
    #[serde(default, alias = "not_methods")]
    not_methods: Vec<Pattern>,
    #[serde(default)]
    paths: Vec<Pattern>,
    #[serde(default, alias = "not_paths")]
    not_paths: Vec<Pattern>,
    #[serde(default)]
    constraints: Vec<Constraint>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Constraint {
    key: String,
    values: Vec<Pattern>,
}

impl AccessRule {
    fn permits(&self, request: &Authorization) -> bool {
        let action = &request.action;
        let allows = |only: &[Pattern], not: &[Pattern], text: &str| {
            (only.is_empty() || any(only, text)) && !any(not, text)
        };
        any(&self.services, &action.service)
            && allows(&self.methods, &self.not_methods, &action.method)
            && allows(&self.paths, &self.not_paths, &action.path)
            && self
                .constraints
                .iter()
                .all(|c| property(&action.properties, &c.key).is_some_and(|v| any(&c.values, &v)))
    }
}

fn property<'a>(properties: &'a Values, name: &str) -> Option<std::borrow::Cow<'a, str>> {
    let mut all = properties.iter();
    all.find(|(n, _)| **n == *name).map(|(_, v)| value::text(v))
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Binding {
    subjects: Vec<Subject>,
    #[serde(alias = "role_ref")]
    role_ref: RoleRef,
    #[serde(default)]
    mode: EnforcementMode,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Subject {
    user: Option<Pattern>,
    group: Option<Pattern>,
    #[serde(default)]
    properties: BTreeMap<String, Pattern>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RoleRef {
    kind: String,
    name: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum EnforcementMode {
    #[default]
    Enforced,
    Permissive,
}

impl Subject {
    /// All that it says must hold.
    fn is(&self, request: &Authorization) -> bool {
        let subject = &request.subject;
        let user = self.user.as_ref();
        let group = self.group.as_ref();
        // Who has no name is not "anybody": `*` asks for an authenticated user.
        user.is_none_or(|p| !subject.user.is_empty() && p.matches(&subject.user))
            && group.is_none_or(|p| {
                let mut groups = subject.groups.split(',').map(str::trim);
                groups.any(|g| !g.is_empty() && p.matches(g))
            })
            && self
                .properties
                .iter()
                .all(|(name, p)| property(&subject.properties, name).is_some_and(|v| p.matches(&v)))
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Config {
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    inclusion: Target,
    #[serde(default)]
    exclusion: Target,
    #[serde(default, alias = "enforcement_mode")]
    enforcement_mode: EnforcementMode,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Mode {
    #[default]
    Off,
    On,
    OnWithInclusion,
    OnWithExclusion,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Target {
    services: Vec<Pattern>,
    namespaces: Vec<Pattern>,
}

impl Target {
    fn has(&self, namespace: &str, service: &str) -> bool {
        any(&self.services, service) || any(&self.namespaces, namespace)
    }
}

/// One object.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Policy {
    Role(Role),
    Binding(Binding),
    Config(Config),
}

impl Policy {
    /// Reads the spec of `kind`; on a refusal says at which field, and why.
    pub(super) fn parse(kind: &str, name: &str, spec: &Json) -> Result<Self, (String, String)> {
        fn read<T: for<'de> Deserialize<'de>>(spec: &Json) -> Result<T, (String, String)> {
            T::deserialize(spec).map_err(|e| (String::new(), e.to_string()))
        }
        match kind {
            "ServiceRole" => {
                let role: Role = read(spec)?;
                for (i, rule) in role.rules.iter().enumerate() {
                    if rule.services.is_empty() {
                        let reason =
                            "the rule names no service; write \"*\" for all of the namespace";
                        return Err((format!("rules[{i}].services"), reason.to_owned()));
                    }
                }
                Ok(Self::Role(role))
            }
            "ServiceRoleBinding" => {
                let binding: Binding = read(spec)?;
                if binding.role_ref.kind != "ServiceRole" {
                    let reason = format!("{:?} is not ServiceRole", binding.role_ref.kind);
                    return Err(("roleRef.kind".to_owned(), reason));
                }
                for (i, subject) in binding.subjects.iter().enumerate() {
                    if subject.user.is_none()
                        && subject.group.is_none()
                        && subject.properties.is_empty()
                    {
                        let reason = "the subject says nothing, so it would be everybody; write user: \"*\" \
                                      for everybody who is authenticated";
                        return Err((format!("subjects[{i}]"), reason.to_owned()));
                    }
                }
                Ok(Self::Binding(binding))
            }
            "RbacConfig" | "ClusterRbacConfig" if name != "default" => Err((
                String::new(),
                format!("there is one {kind}, and it is called default"),
            )),
            "RbacConfig" | "ClusterRbacConfig" => Ok(Self::Config(read(spec)?)),
            other => Err((
                String::new(),
                format!("{other} is no kind of rbac.istio.io"),
            )),
        }
    }
}

/// All policies in force, as they are asked.
#[derive(Debug, Default)]
pub(super) struct Policies {
    /// `None`: enforced everywhere, for a rule says so by asking.
    config: Option<Config>,
    by_namespace: HashMap<String, Vec<Granted>>,
}

/// A role and who has it.
#[derive(Debug)]
struct Granted {
    /// `NAMESPACE/ROLE`.
    name: String,
    role: Role,
    bindings: Vec<Binding>,
}

/// By which role a request is permitted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Permitted<'a> {
    /// By a binding that is enforced.
    pub(super) enforced: Option<&'a str>,
    /// By a binding of either mode.
    pub(super) permissive: Option<&'a str>,
}

impl Policies {
    /// Of objects named by namespace and name. Says which bindings name no role. The first configuration counts:
    /// in the order of kinds that is `ClusterRbacConfig`, which took the place of `RbacConfig`.
    pub(super) fn new<'a, K: Clone>(
        objects: impl Iterator<Item = (K, [&'a str; 2], &'a Policy)> + Clone,
    ) -> (Self, Vec<(K, String)>) {
        let mut all = Self::default();
        for (_, [namespace, name], policy) in objects.clone() {
            if let Policy::Role(role) = policy {
                let roles = all.by_namespace.entry(namespace.to_owned()).or_default();
                roles.push(Granted {
                    name: format!("{namespace}/{name}"),
                    role: role.clone(),
                    bindings: Vec::new(),
                });
            }
        }
        let mut dangling = Vec::new();
        for (key, [namespace, _], policy) in objects {
            match policy {
                Policy::Binding(binding) => {
                    let name = format!("{namespace}/{}", binding.role_ref.name);
                    let roles = all.by_namespace.get_mut(namespace);
                    match roles.and_then(|r| r.iter_mut().find(|r| r.name == name)) {
                        Some(granted) => granted.bindings.push(binding.clone()),
                        None => dangling.push((key, format!("there is no ServiceRole {name}"))),
                    }
                }
                Policy::Config(config) if all.config.is_none() => all.config = Some(config.clone()),
                Policy::Config(_) | Policy::Role(_) => {}
            }
        }
        (all, dangling)
    }

    /// Whether anything is asked for at this service.
    pub(super) fn is_enforced(&self, namespace: &str, service: &str) -> bool {
        match &self.config {
            None => true,
            Some(config) => match config.mode {
                Mode::Off => false,
                Mode::On => true,
                Mode::OnWithInclusion => config.inclusion.has(namespace, service),
                Mode::OnWithExclusion => !config.exclusion.has(namespace, service),
            },
        }
    }

    /// Whether denials are only counted.
    pub(super) fn is_permissive(&self) -> bool {
        let mode = self.config.as_ref().map(|c| c.enforcement_mode);
        mode == Some(EnforcementMode::Permissive)
    }

    /// Who permits `request`.
    pub(super) fn permitted(&self, request: &Authorization) -> Permitted<'_> {
        let mut permitted = Permitted::default();
        let roles = self.by_namespace.get(request.action.namespace.as_str());
        for granted in roles.into_iter().flatten() {
            let bound = |mode: Option<EnforcementMode>| {
                let mut bindings = granted.bindings.iter();
                bindings.any(|b| {
                    mode.is_none_or(|m| b.mode == m) && b.subjects.iter().any(|s| s.is(request))
                })
            };
            if !granted.role.rules.iter().any(|r| r.permits(request)) {
                continue;
            }
            if permitted.permissive.is_none() && bound(None) {
                permitted.permissive = Some(&granted.name);
            }
            if bound(Some(EnforcementMode::Enforced)) {
                permitted.enforced = Some(&granted.name);
                break;
            }
        }
        permitted
    }
}
