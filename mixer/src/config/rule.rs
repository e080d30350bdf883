//! Rules compiled: when they apply, and what is sent to whom then.

use std::sync::{Arc, OnceLock};

use lateen_adapter::{ValueType, Variety};
use lateen_engine::{AttributeTable, Expression, Language};
use serde::Deserialize;
use serde_json::Value as Json;

use super::{
    annotation::{Annotations, DRY_RUN},
    object::{Fault, Key, Source},
    output::{HeaderValue, Named, Scope},
    remote::RemoteTemplate,
    sampling::Sampling,
    sent::Sent,
};
use crate::{handler::LiveHandler, metrics::RuleStats};

/// What a check comes to when its match fails, or its handler does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailMode {
    /// As if the rule did not apply.
    Open,
    /// The request is denied.
    #[default]
    Closed,
}

/// A rule in force.
#[derive(Debug)]
pub struct Rule {
    /// `NAME.rule.NAMESPACE`.
    pub name: Arc<str>,
    /// Where it applies.
    pub namespace: Arc<str>,
    /// When it applies; `None`: always.
    pub condition: Option<Expression>,
    /// What to do when that cannot be told, or an instance has no value.
    pub match_fail_mode: FailMode,
    /// What to do when a handler fails.
    pub adapter_fail_mode: FailMode,
    /// Rules of a higher priority count first.
    pub priority: i32,
    /// Whether callers are told how their quota stands.
    pub tells_quota: bool,
    /// Whether it is only tried.
    pub is_dry_run: bool,
    /// Which reports it takes.
    pub sampling: Option<Sampling>,
    /// `FILE:LINE` of it; empty when it comes from no file.
    pub place: Arc<str>,
    /// Why it is refused: it only stands in the way of requests that it might have denied.
    pub refused: Option<String>,
    /// What is sent to whom.
    pub actions: Vec<Action>,
    /// Changes to the request's headers.
    pub request_headers: Vec<HeaderOperation>,
    /// Changes to the response's headers.
    pub response_headers: Vec<HeaderOperation>,
    /// What is counted of it, from the first time on.
    pub(crate) stats: OnceLock<Arc<RuleStats>>,
}

impl Rule {
    /// Whether it changes headers.
    pub fn has_header_operations(&self) -> bool {
        !self.request_headers.is_empty() || !self.response_headers.is_empty()
    }

    /// The quota instance that a request calls `name`, and who gets it.
    pub fn quota(&self, name: &str) -> Option<(&Arc<LiveHandler>, &Sent)> {
        self.actions.iter().find_map(|action| {
            let mut sent = action.instances(Variety::Quota);
            Some((&action.handler, sent.find(|i| i.is_called(name))?))
        })
    }

    /// Whether it may deny a request.
    pub fn checks(&self) -> bool {
        self.refused.is_some() || self.has(Variety::Check) || self.has(Variety::CheckWithOutput)
    }

    /// Whether any instance is of `variety`.
    pub fn has(&self, variety: Variety) -> bool {
        self.actions
            .iter()
            .any(|a| a.instances(variety).next().is_some())
    }
}

/// Instances for one handler.
#[derive(Debug)]
pub struct Action {
    /// What its output is called in the rule's header operations; empty: nothing.
    pub name: Arc<str>,
    /// Who gets them.
    pub handler: Arc<LiveHandler>,
    /// What it gets.
    pub instances: Vec<Sent>,
}

impl Action {
    /// Its instances of `variety`.
    pub fn instances(&self, variety: Variety) -> impl Iterator<Item = &Sent> {
        self.instances
            .iter()
            .filter(move |i| i.variety() == variety)
    }
}

/// A change to one header.
#[derive(Debug)]
pub struct HeaderOperation {
    /// The header.
    pub name: String,
    /// Its new values; none for a removal.
    pub values: Vec<HeaderValue>,
    /// What is done with them.
    pub operation: Operation,
}

/// What is done to a header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Operation {
    /// The values replace what is there.
    #[default]
    Replace,
    /// The header goes.
    Remove,
    /// The values come after what is there.
    Append,
}

/// A rule's spec as written.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawRule {
    #[serde(rename = "match")]
    condition: Json,
    actions: Vec<RawAction>,
    #[serde(alias = "request_header_operations")]
    request_header_operations: Vec<RawHeaderOperation>,
    #[serde(alias = "response_header_operations")]
    response_header_operations: Vec<RawHeaderOperation>,
    sampling: Json,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawAction {
    handler: String,
    instances: Vec<String>,
    name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawHeaderOperation {
    name: String,
    values: Vec<String>,
    operation: Operation,
}

/// The handler of an action, and its instances.
pub type Resolved = (Key, Vec<(Key, Sent)>);

/// The output of an action, if it has one and a name for it.
fn output(
    raw: &RawAction,
    i: usize,
    resolved: &Resolved,
    faults: &mut Vec<Fault>,
) -> Option<Named> {
    if raw.name.is_empty() {
        return None;
    }
    let mut with_output = resolved
        .1
        .iter()
        .filter(|(_, instance)| instance.variety() == Variety::CheckWithOutput);
    let (_, instance) = with_output.next()?;
    let mut fault = |reason: String| faults.push(Fault::new(format!("actions[{i}].name"), reason));
    if with_output.next().is_some() {
        fault("several instances of the action have an output; give each an action".to_owned());
    }
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if !raw.name.chars().all(is_word) || raw.name.starts_with(|c: char| c.is_ascii_digit()) {
        fault(format!("{:?} is no identifier", raw.name));
        return None;
    }
    Some((Arc::from(raw.name.as_str()), instance.outputs()))
}

/// A rule without its handlers: those are built when it is known which instances each gets.
#[derive(Debug)]
pub struct Draft {
    /// As written.
    pub source: Source,
    condition: Option<Expression>,
    annotations: Annotations,
    sampling: Option<Sampling>,
    refused: Option<String>,
    /// The handler of each action and its instances.
    pub actions: Vec<Resolved>,
    /// What the output of each is called.
    names: Vec<Arc<str>>,
    request_headers: Vec<HeaderOperation>,
    response_headers: Vec<HeaderOperation>,
}

/// Finds what a rule names.
pub trait Directory {
    /// The handler that `name` means to a rule of `namespace`, and which templates it takes.
    ///
    /// # Errors
    /// Why there is none.
    fn handler(&self, name: &str, namespace: &str) -> Result<(Key, Takes), String>;

    /// The instance that `name` means to a rule of `namespace`, in the form that a handler which takes `takes`
    /// wants it.
    ///
    /// # Errors
    /// Why there is none.
    fn instance(&self, name: &str, namespace: &str, takes: &Takes) -> Result<(Key, Sent), String>;
}

/// What a handler takes.
#[derive(Debug)]
pub enum Takes {
    /// Instances of these templates, in the form for adapters that are part of this program.
    Compiled(Vec<&'static str>),
    /// Instances of these templates, in the form for processes.
    Remote(Vec<Arc<RemoteTemplate>>),
}

impl Takes {
    fn has(&self, instance: &Sent) -> bool {
        match (self, instance) {
            (Self::Compiled(names), Sent::Compiled(i)) => names.contains(&i.template.name),
            (Self::Remote(templates), Sent::Remote(i)) => {
                templates.iter().any(|t| t.name == i.template.name)
            }
            (Self::Compiled(_), Sent::Remote(_)) | (Self::Remote(_), Sent::Compiled(_)) => false,
        }
    }

    fn names(&self) -> String {
        match self {
            Self::Compiled(names) => names.join(", "),
            Self::Remote(templates) => {
                let names: Vec<&str> = templates.iter().map(|t| &*t.name).collect();
                names.join(", ")
            }
        }
    }
}

impl Draft {
    /// Compiles a rule; answers with everything that is wrong with it.
    ///
    /// # Errors
    /// An expression that does not compile, a match that is no BOOL, a name that means nothing.
    pub fn compile(
        source: &Source,
        table: &AttributeTable,
        directory: &impl Directory,
    ) -> Result<Self, Vec<Fault>> {
        let raw: RawRule = match &*source.spec {
            Json::Null => RawRule::default(),
            spec => RawRule::deserialize(spec).map_err(|e| vec![Fault::new("", e)])?,
        };
        let mut faults = Vec::new();
        let annotations = Annotations::read(source, &mut faults);
        let language = source.language().unwrap_or_else(|fault| {
            faults.push(fault);
            Language::default()
        });
        let sampling = Sampling::read(&raw.sampling, &source.key.full_name(), language, table)
            .unwrap_or_else(|fault| {
                faults.push(fault);
                None
            });
        let expressions = Expressions { language, table };
        let condition = expressions.condition(&raw.condition, &mut faults);
        let mut actions = Vec::new();
        let mut names = Vec::new();
        let mut outputs: Vec<Named> = Vec::new();
        for (i, action) in raw.actions.iter().enumerate() {
            let namespace = &source.key.namespace;
            if let Some(resolved) = resolve(action, i, namespace, directory, &mut faults) {
                outputs.extend(output(action, i, &resolved, &mut faults));
                actions.push(resolved);
                names.push(Arc::from(action.name.as_str()));
            }
        }
        let scope = Scope::new(table, &outputs).unwrap_or_else(|reason| {
            faults.push(Fault::new("actions", reason));
            Scope::plain(table)
        });
        let request_headers = expressions.header_operations(
            &scope,
            &raw.request_header_operations,
            "requestHeaderOperations",
            &mut faults,
        );
        let response_headers = expressions.header_operations(
            &scope,
            &raw.response_header_operations,
            "responseHeaderOperations",
            &mut faults,
        );
        let is_empty =
            raw.actions.is_empty() && request_headers.is_empty() && response_headers.is_empty();
        if is_empty && faults.is_empty() {
            faults.push(Fault::new(
                "actions",
                "the rule does nothing; give it an action",
            ));
        }
        let sent = || actions.iter().flat_map(|(_, sent)| sent);
        let variety = |(_, instance): &(Key, Sent)| instance.variety();
        if sampling.is_some() && sent().any(|i| variety(i) != Variety::Report) {
            faults.push(Fault::new(
                "sampling",
                "only reports can be sampled; give checks and quota a rule of their own",
            ));
        }
        if annotations.is_dry_run && sent().any(|i| variety(i) == Variety::AttributeGenerator) {
            faults.push(Fault::new(
                "",
                format!("{DRY_RUN}: what a rule that is only tried generates is of use to nobody"),
            ));
        }
        if faults.is_empty() {
            Ok(Self {
                source: source.clone(),
                condition,
                annotations,
                sampling,
                refused: None,
                actions,
                names,
                request_headers,
                response_headers,
            })
        } else {
            Err(faults)
        }
    }

    /// What stands in for a rule that is refused and has no good version, if it says itself that it fails closed:
    /// it denies what its match holds for, or all requests of its namespace when that is what is wrong.
    pub fn guard(source: &Source, table: &AttributeTable, faults: &[Fault]) -> Option<Self> {
        let mut wrong = Vec::new();
        let annotations = Annotations::read(source, &mut wrong);
        if !annotations.says_closed || annotations.is_dry_run {
            return None;
        }
        let language = source.language().unwrap_or_default();
        let expressions = Expressions { language, table };
        let condition = expressions.condition(&source.spec["match"], &mut wrong);
        let reasons: Vec<&str> = faults.iter().map(|fault| &*fault.reason).collect();
        Some(Self {
            source: source.clone(),
            condition,
            annotations,
            sampling: None,
            refused: Some(reasons.join("; ")),
            actions: Vec::new(),
            names: Vec::new(),
            request_headers: Vec::new(),
            response_headers: Vec::new(),
        })
    }

    /// Whether it is a [`Draft::guard`].
    pub fn is_guard(&self) -> bool {
        self.refused.is_some()
    }

    /// The rule, with its handlers.
    pub fn finish(self, handler: impl Fn(&Key) -> Option<Arc<LiveHandler>>) -> Option<Rule> {
        let mut actions = Vec::with_capacity(self.actions.len());
        for ((key, instances), name) in self.actions.into_iter().zip(self.names) {
            let instances = instances
                .into_iter()
                .map(|(_, instance)| instance)
                .collect();
            actions.push(Action {
                name,
                handler: handler(&key)?,
                instances,
            });
        }
        Some(Rule {
            name: self.source.key.full_name(),
            namespace: Arc::clone(&self.source.key.namespace),
            condition: self.condition,
            place: Arc::from(self.source.place("")),
            match_fail_mode: self.annotations.match_fail_mode,
            adapter_fail_mode: self.annotations.adapter_fail_mode,
            priority: self.annotations.priority,
            tells_quota: self.annotations.tells_quota,
            is_dry_run: self.annotations.is_dry_run,
            sampling: self.sampling,
            refused: self.refused,
            actions,
            request_headers: self.request_headers,
            response_headers: self.response_headers,
            stats: OnceLock::new(),
        })
    }
}

/// Compiles a rule's own expressions.
struct Expressions<'a> {
    language: Language,
    table: &'a AttributeTable,
}

impl Expressions<'_> {
    fn condition(&self, json: &Json, faults: &mut Vec<Fault>) -> Option<Expression> {
        if json.is_null() || json.as_str().is_some_and(|text| text.trim().is_empty()) {
            return None;
        }
        match Expression::compile_param(self.language, json, self.table) {
            Err(error) => {
                faults.push(Fault::new("match", error));
                None
            }
            Ok(expression) if expression.value_type() != ValueType::Bool => {
                let ty = expression.value_type();
                faults.push(Fault::new("match", format!("the match is {ty}, not BOOL")));
                None
            }
            Ok(expression) => {
                faults.extend(
                    expression
                        .faults()
                        .iter()
                        .map(|fault| Fault::new("match", fault)),
                );
                Some(expression)
            }
        }
    }

    fn header_operations(
        &self,
        scope: &Scope<'_>,
        raw: &[RawHeaderOperation],
        field: &str,
        faults: &mut Vec<Fault>,
    ) -> Vec<HeaderOperation> {
        let mut operations = Vec::with_capacity(raw.len());
        for (i, one) in raw.iter().enumerate() {
            if one.name.is_empty() {
                faults.push(Fault::new(
                    format!("{field}[{i}].name"),
                    "the header has no name",
                ));
            }
            let mut values = Vec::with_capacity(one.values.len());
            for (j, text) in one.values.iter().enumerate() {
                let at = format!("{field}[{i}].values[{j}]");
                match scope.compile(self.language, text) {
                    Err(error) => faults.push(Fault::new(at, error)),
                    Ok(expression) if !expression.value_type().is_text() => {
                        let ty = expression.value_type();
                        faults.push(Fault::new(
                            at,
                            format!("a header's value is {ty}, not STRING"),
                        ));
                    }
                    Ok(expression) => values.push(expression),
                }
            }
            operations.push(HeaderOperation {
                name: one.name.clone(),
                values,
                operation: one.operation,
            });
        }
        operations
    }
}

fn resolve(
    action: &RawAction,
    i: usize,
    namespace: &str,
    directory: &impl Directory,
    faults: &mut Vec<Fault>,
) -> Option<Resolved> {
    let handler = directory
        .handler(&action.handler, namespace)
        .map_err(|reason| faults.push(Fault::new(format!("actions[{i}].handler"), reason)))
        .ok();
    if action.instances.is_empty() {
        faults.push(Fault::new(
            format!("actions[{i}].instances"),
            "the action sends nothing",
        ));
    }
    let mut instances: Vec<(Key, Sent)> = Vec::new();
    let anything = Takes::Compiled(Vec::new());
    let takes = handler.as_ref().map_or(&anything, |(_, takes)| takes);
    for (j, name) in action.instances.iter().enumerate() {
        let at = format!("actions[{i}].instances[{j}]");
        match directory.instance(name, namespace, takes) {
            Err(reason) => faults.push(Fault::new(at, reason)),
            Ok((key, _)) if instances.iter().any(|(k, _)| *k == key) => {
                faults.push(Fault::new(at, format!("{key} is there twice")));
            }
            Ok((key, instance)) => {
                if let Some((handler, takes)) = &handler
                    && !takes.has(&instance)
                {
                    faults.push(Fault::new(
                        at,
                        format!(
                            "{handler} does not take instances of {}; it takes {}",
                            instance.template(),
                            takes.names()
                        ),
                    ));
                }
                instances.push((key, instance));
            }
        }
    }
    Some((handler?.0, instances))
}
