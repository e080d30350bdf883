//! Statistics as text, JSON and for Prometheus, in Envoy's forms.

use std::{collections::BTreeMap, fmt::Write};

use regex::Regex;
use serde_json::{Value, json};

use crate::stats::{BUCKETS, Instrument, Registry, Summary};

/// Percentiles that Envoy prints.
const QUANTILES: [f64; 10] = [0.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 100.0];

/// Which of them are wanted.
#[derive(Debug, Default)]
pub(super) struct Selection {
    /// Matches somewhere in the full name.
    pub(super) filter: Option<Regex>,
    /// Without those that never changed.
    pub(super) used_only: bool,
}

impl Selection {
    fn wants(&self, name: &str, instrument: &Instrument<'_>) -> bool {
        self.filter
            .as_ref()
            .is_none_or(|filter| filter.is_match(name))
            && (!self.used_only
                || match instrument {
                    Instrument::Counter(counter) => counter.value() > 0,
                    Instrument::Gauge(gauge) => gauge.value() > 0,
                    Instrument::Histogram(histogram) => histogram.summary().count > 0,
                })
    }
}

/// `name: value` a line; histograms after the rest.
pub(super) fn text(registry: &Registry, selection: &Selection) -> String {
    let (mut out, mut histograms) = (String::new(), String::new());
    registry.each(|scope, name, instrument| {
        let full = format!("{scope}{name}");
        if !selection.wants(&full, instrument) {
            return;
        }
        match instrument {
            Instrument::Counter(counter) => {
                line(&mut out, format_args!("{full}: {}", counter.value()))
            }
            Instrument::Gauge(gauge) => line(&mut out, format_args!("{full}: {}", gauge.value())),
            Instrument::Histogram(histogram) => {
                let quantiles = quantiles(&histogram.summary());
                line(&mut histograms, format_args!("{full}: {quantiles}"));
            }
        }
    });
    out + &histograms
}

fn quantiles(summary: &Summary) -> String {
    let parts: Vec<String> = QUANTILES
        .into_iter()
        .filter_map(|q| Some(format!("P{q}(nan,{})", summary.quantile(q)?)))
        .collect();
    match parts.is_empty() {
        true => "No recorded values".into(),
        false => parts.join(" "),
    }
}

/// Envoy's `format=json`.
pub(super) fn json(registry: &Registry, selection: &Selection) -> Value {
    let (mut stats, mut computed) = (Vec::new(), Vec::new());
    registry.each(|scope, name, instrument| {
        let full = format!("{scope}{name}");
        if !selection.wants(&full, instrument) {
            return;
        }
        match instrument {
            Instrument::Counter(counter) => {
                stats.push(json!({"name": full, "value": counter.value()}))
            }
            Instrument::Gauge(gauge) => stats.push(json!({"name": full, "value": gauge.value()})),
            Instrument::Histogram(histogram) => {
                let summary = histogram.summary();
                let values: Vec<Value> = QUANTILES
                    .into_iter()
                    .map(|q| json!({"interval": null, "cumulative": summary.quantile(q)}))
                    .collect();
                computed.push(json!({"name": full, "values": values}));
            }
        }
    });
    if !computed.is_empty() {
        stats.push(json!({
            "histograms": {"supported_quantiles": QUANTILES, "computed_quantiles": computed}
        }));
    }
    json!({ "stats": stats })
}

/// The Prometheus text format, names and labels as Envoy's tag rules make them.
pub(super) fn prometheus(registry: &Registry, selection: &Selection) -> String {
    let mut families: BTreeMap<String, (&'static str, String)> = BTreeMap::new();
    registry.each(|scope, name, instrument| {
        if !selection.wants(&format!("{scope}{name}"), instrument) {
            return;
        }
        let (metric, labels) = tagged(scope, name);
        let kind = match instrument {
            Instrument::Counter(_) => "counter",
            Instrument::Gauge(_) => "gauge",
            Instrument::Histogram(_) => "histogram",
        };
        let (_, out) = families
            .entry(metric.clone())
            .or_insert_with(|| (kind, String::new()));
        match instrument {
            Instrument::Counter(counter) => {
                line(
                    out,
                    format_args!("{metric}{{{labels}}} {}", counter.value()),
                );
            }
            Instrument::Gauge(gauge) => {
                line(out, format_args!("{metric}{{{labels}}} {}", gauge.value()));
            }
            Instrument::Histogram(histogram) => {
                buckets(out, &metric, &labels, &histogram.summary());
            }
        }
    });
    let mut text = String::new();
    for (metric, (kind, lines)) in families {
        line(&mut text, format_args!("# TYPE {metric} {kind}"));
        text.push_str(&lines);
    }
    text
}

/// Adds a line.
pub(super) fn line(out: &mut String, what: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    if writeln!(out, "{what}").is_err() {
        out.push('\n');
    }
}

fn buckets(out: &mut String, metric: &str, labels: &str, summary: &Summary) {
    let comma = if labels.is_empty() { "" } else { "," };
    for (bound, count) in BUCKETS.iter().zip(summary.buckets) {
        line(
            out,
            format_args!("{metric}_bucket{{{labels}{comma}le=\"{bound}\"}} {count}"),
        );
    }
    let count = summary.count;
    line(
        out,
        format_args!("{metric}_bucket{{{labels}{comma}le=\"+Inf\"}} {count}"),
    );
    line(
        out,
        format_args!("{metric}_sum{{{labels}}} {}", summary.sum),
    );
    line(out, format_args!("{metric}_count{{{labels}}} {count}"));
}

/// Scopes whose second part is a name, and the label that carries it.
const NAMED: [(&str, &str); 5] = [
    ("cluster", "envoy_cluster_name"),
    ("http", "envoy_http_conn_manager_prefix"),
    ("listener", "envoy_listener_address"),
    ("tcp", "envoy_tcp_prefix"),
    ("vhost", "envoy_virtual_host"),
];

fn tagged(scope: &str, name: &str) -> (String, String) {
    let mut labels = Vec::new();
    let named = NAMED.iter().find_map(|(kind, label)| {
        let of = scope
            .strip_prefix(kind)?
            .strip_prefix('.')?
            .strip_suffix('.')?;
        Some((*kind, *label, of))
    });
    let mut metric = match named {
        Some((kind, label, of)) => {
            labels.push((label, of.to_owned()));
            format!("{kind}_{name}")
        }
        None => format!("{scope}{name}"),
    };
    if let Some((rest, code)) = metric
        .rsplit_once('_')
        .filter(|(rest, _)| rest.ends_with("rq"))
    {
        let code = code.to_owned();
        match code.as_bytes() {
            [a, b, c] if [a, b, c].iter().all(|d| d.is_ascii_digit()) => {
                metric = rest.to_owned();
                labels.push(("envoy_response_code", code));
            }
            [class @ b'1'..=b'5', b'x', b'x'] => {
                labels.push(("envoy_response_code_class", char::from(*class).to_string()));
                metric = format!("{rest}_xx");
            }
            _ => {}
        }
    }
    let metric: String = metric
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    let labels: Vec<String> = labels
        .into_iter()
        .map(|(label, value)| format!("{label}=\"{}\"", escape(&value)))
        .collect();
    (format!("envoy_{metric}"), labels.join(","))
}

fn escape(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled() -> std::sync::Arc<Registry> {
        let registry = Registry::new();
        let cluster = registry.scope("cluster.outbound|9080||a.b.svc.");
        cluster.counter("upstream_rq_2xx").add(3);
        cluster.counter("upstream_rq_200").add(3);
        cluster
            .scope("outlier_detection.")
            .gauge("ejections_active")
            .set(1);
        registry
            .scope("http.in.")
            .histogram("downstream_rq_time")
            .record(7);
        registry.scope("server.").gauge("live").set(0);
        registry
    }

    #[test]
    fn text_and_filters() {
        let registry = filled();
        let all = text(&registry, &Selection::default());
        assert!(all.starts_with(
            "cluster.outbound|9080||a.b.svc.outlier_detection.ejections_active: 1\n\
             cluster.outbound|9080||a.b.svc.upstream_rq_200: 3\n"
        ));
        assert!(all.ends_with("P100(nan,7)\n"));
        let some = Selection {
            filter: Regex::new("^server|_2xx$").ok(),
            used_only: true,
        };
        assert_eq!(
            text(&registry, &some),
            "cluster.outbound|9080||a.b.svc.upstream_rq_2xx: 3\n"
        );
        assert_eq!(
            json(&registry, &some),
            json!({"stats": [{"name": "cluster.outbound|9080||a.b.svc.upstream_rq_2xx", "value": 3}]})
        );
    }

    #[test]
    fn prometheus_has_envoys_names_and_labels() {
        let text = prometheus(&filled(), &Selection::default());
        let cluster = "envoy_cluster_name=\"outbound|9080||a.b.svc\"";
        for line in [
            "# TYPE envoy_cluster_upstream_rq_xx counter".to_owned(),
            format!("envoy_cluster_upstream_rq_xx{{{cluster},envoy_response_code_class=\"2\"}} 3"),
            format!("envoy_cluster_upstream_rq{{{cluster},envoy_response_code=\"200\"}} 3"),
            format!("envoy_cluster_outlier_detection_ejections_active{{{cluster}}} 1"),
            "envoy_http_downstream_rq_time_bucket{envoy_http_conn_manager_prefix=\"in\",le=\"10\"} 1".to_owned(),
            "envoy_http_downstream_rq_time_sum{envoy_http_conn_manager_prefix=\"in\"} 7".to_owned(),
            "envoy_server_live{} 0".to_owned(),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
