//! The table that is printed and kept in docs/benchmarks.md.

use std::time::Duration;

use crate::{measure::Round, scenario::Scenario};

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

/// A bar, so that the eye has something too.
fn bar(ratio: f64) -> String {
    let blocks = (ratio * 20.0).round().clamp(0.0, 60.0);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped"
    )]
    let blocks = blocks as usize;
    "█".repeat(blocks)
}

pub(crate) fn markdown(results: &[(Scenario, Vec<Round>)], window: &Duration) -> String {
    let mut out = String::from(
        "# Benchmarks\n\nMade by `make bench`, which installs Envoy 1.40 privately and runs both from the same bootstrap file.\n\
         The proxies have one processor, load and upstream the other; 64 connections, closed loop, 128-byte answers. CPU time is\n\
         the proxies' own. Only the ratios mean anything: they are medians of the ratios of rounds in which ours and Envoy ran one\n\
         after the other. Lower is better, Envoy is 1.\n\n",
    );
    out.push_str("| scenario | CPU per request, ours / Envoy | memory, ours / Envoy | ours | Envoy | failed |\n|---|---|---|---|---|---|");
    out.push('\n');
    let mut bars = String::new();
    for (scenario, rounds) in results {
        let of = |f: fn(&Round) -> f64| median(rounds.iter().map(f).collect());
        let cpu = of(|r| r.ours.cpu_us / r.envoy.cpu_us);
        let memory = of(|r| r.ours.memory_mib / r.envoy.memory_mib);
        let bad: u64 = rounds.iter().map(|r| r.ours.bad + r.envoy.bad).sum();
        out.push_str(&format!("| {} | **{cpu:.2}** | **{memory:.2}** | {:.1} µs, {:.0} MiB, {:.0}/s | {:.1} µs, {:.0} MiB, {:.0}/s | {bad} |",
            scenario.name(),
            of(|r| r.ours.cpu_us),
            of(|r| r.ours.memory_mib),
            of(|r| r.ours.rate),
            of(|r| r.envoy.cpu_us),
            of(|r| r.envoy.memory_mib),
            of(|r| r.envoy.rate)));
        out.push('\n');
        bars.push_str(&format!(
            "{:<28} CPU    {} {cpu:.2}",
            scenario.name(),
            bar(cpu)
        ));
        bars.push('\n');
        bars.push_str(&format!("{:<28} memory {} {memory:.2}", "", bar(memory)));
        bars.push('\n');
    }
    out.push_str(&format!(
        "\n```text\n{bars}{:<28} Envoy  {} 1\n```\n",
        "",
        bar(1.0)
    ));
    let rounds = results.first().map_or(0, |(_, rounds)| rounds.len());
    out.push_str(&format!(
        "\n{rounds} rounds of {} s each, after 1 s of warm-up.",
        window.as_secs()
    ));
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_even_and_odd_counts() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
    }
}
