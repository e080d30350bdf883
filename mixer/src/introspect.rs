//! Mixer's page: what is in force, who is asked, how that goes, and the last verdicts. HTML for people at
//! `/debug/mixer`, the same as JSON with `?format=json`.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc};

use arc_swap::ArcSwap;
use lateen_service::admin::{Query, Readiness, Reply};
use serde::Serialize;

use crate::{
    config::Snapshot,
    metrics::{Method, Metrics},
    overload::Overload,
    serve::Role,
    verdicts::{Recent, Verdicts},
};

/// Rows of a table of the page; the JSON has more.
const MAX_ROWS: usize = 500;
/// Rules and handlers told in JSON.
const MAX_TOLD: usize = 20_000;

/// What the page is made of.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) snapshot: Arc<ArcSwap<Snapshot>>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) overload: Overload,
    pub(crate) verdicts: Arc<Verdicts>,
    pub(crate) readiness: Readiness,
    pub(crate) role: Role,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct State {
    role: String,
    waiting_for: Vec<String>,
    generation: String,
    checks_under_way: usize,
    reports_under_way: usize,
    delay_micros: u64,
    rules: Vec<RuleState>,
    handlers: Vec<HandlerState>,
    problems: Vec<String>,
    verdicts: Vec<Recent>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RuleState {
    name: String,
    #[serde(rename = "match")]
    condition: String,
    handlers: Vec<String>,
    place: String,
    refused: Option<String>,
    dry_run: bool,
    matched: u64,
    denied: u64,
    errors: u64,
    mean_micros: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct HandlerState {
    name: String,
    adapter: String,
    under_way: i64,
    calls: u64,
    failures: u64,
    mean_micros: u64,
    queues: BTreeMap<&'static str, i64>,
    events: BTreeMap<&'static str, u64>,
}

fn mean(total: std::time::Duration, count: u64) -> u64 {
    u64::try_from(total.as_micros())
        .unwrap_or(u64::MAX)
        .checked_div(count)
        .unwrap_or_default()
}

impl Page {
    fn state(&self) -> State {
        use std::sync::atomic::Ordering::Relaxed;
        let snapshot = self.snapshot.load_full();
        let configured = &self.metrics.configured;
        let mut handlers = BTreeMap::new();
        let mut rules = Vec::new();
        for rule in snapshot.rules.iter().take(MAX_TOLD) {
            let stats = configured.known_rule(&rule.name).unwrap_or_default();
            for action in &rule.actions {
                let handler = &action.handler;
                handlers
                    .entry(Arc::clone(&handler.name))
                    .or_insert_with(|| Arc::clone(handler));
            }
            rules.push(RuleState {
                name: rule.name.to_string(),
                condition: rule.condition.as_ref().map_or("", |c| c.text()).to_owned(),
                handlers: rule
                    .actions
                    .iter()
                    .map(|action| action.handler.name.to_string())
                    .collect(),
                place: rule.place.to_string(),
                refused: rule.refused.clone(),
                dry_run: rule.is_dry_run,
                matched: stats.matched.load(Relaxed),
                denied: stats.denied.load(Relaxed),
                errors: stats.match_errors.load(Relaxed) + stats.instance_errors.load(Relaxed),
                mean_micros: mean(stats.took.total(), stats.took.count()),
            });
        }
        let handlers = handlers.values().map(|handler| {
            let stats = handler.stats();
            let (calls, took, failures) = stats.totals();
            let (events, queues) = self.metrics.events.told(&handler.name);
            HandlerState {
                name: handler.name.to_string(),
                adapter: handler.signature.adapter().to_owned(),
                under_way: stats.under_way(),
                calls,
                failures,
                mean_micros: mean(took, calls),
                queues,
                events,
            }
        });
        State {
            role: format!("{:?}", self.role).to_lowercase(),
            waiting_for: self.readiness.closed(),
            generation: snapshot.generation.to_string(),
            checks_under_way: self.overload.under_way(Method::Check),
            reports_under_way: self.overload.under_way(Method::Report),
            delay_micros: u64::try_from(self.overload.delay().as_micros()).unwrap_or(u64::MAX),
            handlers: handlers.collect(),
            rules,
            problems: snapshot.problems.iter().map(ToString::to_string).collect(),
            verdicts: self.verdicts.recent(),
        }
    }

    /// Answers a request for the page.
    pub(crate) fn reply(&self, query: &Query) -> Reply {
        let state = self.state();
        if query.get("format").is_some_and(|format| format == "json") {
            return match serde_json::to_vec(&state) {
                Ok(json) => Reply::json(json),
                Err(error) => {
                    Reply::status(http::StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
                }
            };
        }
        Reply {
            content_type: "text/html; charset=utf-8",
            ..Reply::text(html(&state))
        }
    }
}

/// Names and messages come from requests and files: nothing of them may be markup.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

fn table(out: &mut String, title: &str, heads: &[&str], rows: Vec<Vec<String>>) {
    let all = rows.len();
    // Writing to a String does not fail.
    let _infallible = write!(out, "<h2>{} ({all})</h2>\n<table>\n<tr>", escaped(title));
    for head in heads {
        let _infallible = write!(out, "<th>{}</th>", escaped(head));
    }
    out.push_str("</tr>\n");
    for row in rows.into_iter().take(MAX_ROWS) {
        out.push_str("<tr>");
        for cell in row {
            let _infallible = write!(out, "<td>{}</td>", escaped(&cell));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table>\n");
    if all > MAX_ROWS {
        let _infallible = writeln!(
            out,
            "<p>The first {MAX_ROWS} are shown; all: <a href=\"?format=json\">JSON</a>.</p>"
        );
    }
}

const STYLE: &str = "body{font:14px/1.4 system-ui,sans-serif;margin:2em}table{border-collapse:collapse}\
    td,th{border:1px solid #ccc;padding:2px 8px;text-align:left;vertical-align:top}\
    td{font-family:ui-monospace,monospace;font-size:12px}";

fn pairs<V: std::fmt::Display>(all: &BTreeMap<&'static str, V>) -> String {
    let all: Vec<String> = all.iter().map(|(name, v)| format!("{name} {v}")).collect();
    all.join(", ")
}

fn html(state: &State) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Mixer</title>\
         <style>{STYLE}</style></head><body>\n<h1>Mixer</h1>\n\
         <p>Generation {}, role {}, {}. {} checks and {} reports under way, {} µs late. \
         <a href=\"?format=json\">JSON</a>, <a href=\"/metrics\">metrics</a>, \
         <a href=\"/debug/config\">configuration</a>.</p>\n",
        escaped(&state.generation),
        escaped(&state.role),
        match state.waiting_for.as_slice() {
            [] => "ready".to_owned(),
            waiting => format!("waiting for {}", escaped(&waiting.join(", "))),
        },
        state.checks_under_way,
        state.reports_under_way,
        state.delay_micros,
    );
    let problems = state.problems.iter().map(|p| vec![p.clone()]).collect();
    table(&mut out, "Problems", &["what is wrong"], problems);
    let verdicts = state.verdicts.iter().map(|v| {
        vec![
            v.at.clone(),
            v.code.to_owned(),
            v.source.clone(),
            v.destination.clone(),
            v.message.clone(),
            v.micros.to_string(),
            v.id.clone(),
        ]
    });
    table(
        &mut out,
        "Recent verdicts: refusals, and one in 64 of the others",
        &["at", "code", "source", "destination", "message", "µs", "id"],
        verdicts.collect(),
    );
    let rules = state.rules.iter().map(|rule| {
        let mut note = String::new();
        if rule.dry_run {
            note.push_str("only tried ");
        }
        if let Some(why) = &rule.refused {
            let _infallible = write!(note, "refused: {why}");
        }
        vec![
            rule.name.clone(),
            rule.condition.clone(),
            rule.handlers.join(", "),
            rule.matched.to_string(),
            rule.denied.to_string(),
            rule.errors.to_string(),
            rule.mean_micros.to_string(),
            rule.place.clone(),
            note,
        ]
    });
    table(
        &mut out,
        "Rules",
        &[
            "rule", "match", "handlers", "matched", "denied", "errors", "mean µs", "place", "note",
        ],
        rules.collect(),
    );
    let handlers = state.handlers.iter().map(|handler| {
        vec![
            handler.name.clone(),
            handler.adapter.clone(),
            handler.calls.to_string(),
            handler.failures.to_string(),
            handler.under_way.to_string(),
            handler.mean_micros.to_string(),
            pairs(&handler.queues),
            pairs(&handler.events),
        ]
    });
    table(
        &mut out,
        "Handlers",
        &[
            "handler",
            "adapter",
            "calls",
            "failed",
            "under way",
            "mean µs",
            "waiting",
            "events",
        ],
        handlers.collect(),
    );
    out.push_str("</body></html>\n");
    out
}
