//! Plots as SVG, readable on light and on dark pages.

use crate::report::{Row, Unit};

const ROW: usize = 24;
const LEFT: usize = 340;
const WIDTH: usize = 440;
const TOP: usize = 44;
const FULL: usize = LEFT + WIDTH + 70;

/// Colours of both themes; the second set is for dark pages.
const STYLE: &str = "<style>\
text{font:13px system-ui,sans-serif;fill:#24292f}.small{font-size:11px;fill:#57606a}\
.met{fill:#2da44e}.missed{fill:#cf222e}.envoy{fill:#8c959f}.relay{fill:#54aeff}.goal{stroke:#24292f;stroke-width:2}\
.grid{stroke:#d0d7de}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#8b949e}.met{fill:#3fb950}.missed{fill:#f85149}\
.envoy{fill:#6e7681}.relay{fill:#388bfd}.goal{stroke:#e6edf3}.grid{stroke:#30363d}}\
</style>";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn svg(height: usize, title: &str, body: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {FULL} {height}\" width=\"{FULL}\" height=\"{height}\" role=\"img\">\n\
         <title>{title}</title>\n{STYLE}\n<text x=\"8\" y=\"20\" font-weight=\"600\">{title}</text>\n{body}</svg>\n",
        title = escape(title)
    )
}

/// Nothing here wants more digits than a screen has pixels.
fn pixels(part: f64) -> f64 {
    if part.is_finite() {
        (part.clamp(0.0, 1.0) * WIDTH as f64 * 10.0).round() / 10.0
    } else {
        0.0
    }
}

/// A bar per row: our part of what Envoy needs, with the goal as a line.
pub(crate) fn ratios(rows: &[Row]) -> String {
    let rows: Vec<_> = rows
        .iter()
        .filter(|row| row.unit != Unit::Latency || !row.name.ends_with("p99"))
        .collect();
    let height = TOP + rows.len() * ROW + 30;
    let bottom = height - 26;
    let mut body = String::new();
    for step in 0..=4 {
        let part = f64::from(step) / 4.0;
        let x = LEFT as f64 + pixels(part);
        body.push_str(&format!(
            "<line class=\"grid\" x1=\"{x}\" y1=\"{}\" x2=\"{x}\" y2=\"{bottom}\"/>\
             <text class=\"small\" x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{part}</text>\n",
            TOP - 8,
            bottom + 16
        ));
    }
    for (index, row) in rows.iter().enumerate() {
        let y = TOP + index * ROW;
        let bar = pixels(row.envoy_ratio);
        let goal = LEFT as f64 + pixels(row.envoy_goal);
        let met = row.envoy_ratio <= row.envoy_goal + 0.005 && row.bad == 0;
        let class = if met { "met" } else { "missed" };
        body.push_str(&format!(
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
             <rect class=\"{class}\" x=\"{LEFT}\" y=\"{y}\" width=\"{bar}\" height=\"16\" rx=\"2\"/>\
             <line class=\"goal\" x1=\"{goal}\" y1=\"{}\" x2=\"{goal}\" y2=\"{}\"/>\
             <text class=\"small\" x=\"{}\" y=\"{}\">{:.2}</text>\n",
            LEFT - 8,
            y + 13,
            escape(&row.title),
            y as i64 - 3,
            y + 19,
            (LEFT as f64 + bar).max(goal) + 6.0,
            y + 13,
            row.envoy_ratio,
        ));
    }
    svg(
        height,
        "Ours, as a part of what Envoy needs; the line is the goal",
        &body,
    )
}

/// Added latency of each peer.
pub(crate) fn latency(rows: &[Row]) -> String {
    let rows: Vec<_> = rows
        .iter()
        .filter(|row| row.unit == Unit::Latency)
        .collect();
    let most = rows
        .iter()
        .flat_map(|row| [row.ours, row.envoy, row.relay.unwrap_or(0.0)])
        .fold(1.0, f64::max);
    let mut body = String::new();
    let mut y = TOP;
    for row in &rows {
        body.push_str(&format!(
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\n",
            LEFT - 8,
            y + 27,
            escape(&row.title)
        ));
        let ours = if row.met() { "met" } else { "missed" };
        for (name, class, value) in [
            ("ours", ours, Some(row.ours)),
            ("Envoy", "envoy", Some(row.envoy)),
            ("relay", "relay", row.relay),
        ] {
            let Some(value) = value else { continue };
            let bar = pixels(value / most);
            body.push_str(&format!(
                "<rect class=\"{class}\" x=\"{LEFT}\" y=\"{y}\" width=\"{bar}\" height=\"12\" rx=\"2\"/>\
                 <text class=\"small\" x=\"{}\" y=\"{}\">{name} {value:.0}</text>\n",
                LEFT as f64 + bar + 5.0,
                y + 10
            ));
            y += 15;
        }
        y += 14;
    }
    svg(
        y + 8,
        "Latency added at 30 % of the rate that Envoy can carry, µs",
        &body,
    )
}

/// What an endpoint change takes (p99) and costs Pilot (CPU), ms, by number of services and sidecars.
pub(crate) fn growth(points: &[(usize, f64, f64)]) -> String {
    const HEIGHT: f64 = 220.0;
    let widest = points.iter().map(|point| point.0).max().unwrap_or(1) as f64;
    let most = points
        .iter()
        .flat_map(|point| [point.1, point.2])
        .fold(1.0, f64::max);
    let x = |size: usize| LEFT as f64 + pixels(size as f64 / widest);
    let y = |value: f64| {
        let part = (value / most).clamp(0.0, 1.0);
        TOP as f64 + ((1.0 - part) * HEIGHT * 10.0).round() / 10.0
    };
    let mut body = String::new();
    for step in 0..=4 {
        let value = most * f64::from(step) / 4.0;
        body.push_str(&format!(
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{0}\" x2=\"{1}\" y2=\"{0}\"/>\
             <text class=\"small\" x=\"{2}\" y=\"{0}\" text-anchor=\"end\">{value:.0}</text>\n",
            y(value),
            LEFT + WIDTH,
            LEFT - 8
        ));
    }
    for (size, _, _) in points {
        body.push_str(&format!(
            "<text class=\"small\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{size}</text>\n",
            x(*size),
            y(0.0) + 16.0
        ));
    }
    type Series = fn(&(usize, f64, f64)) -> f64;
    let all: [(&str, &str, Series); 2] = [
        ("until all have it, p99", "relay", |point| point.1),
        ("Pilot's CPU", "met", |point| point.2),
    ];
    for (index, (name, class, value)) in all.into_iter().enumerate() {
        let mut last: Option<(f64, f64)> = None;
        for point in points {
            let (px, py) = (x(point.0), y(value(point)));
            if let Some((fx, fy)) = last {
                body.push_str(&format!(
                    "<line class=\"grid\" x1=\"{fx}\" y1=\"{fy}\" x2=\"{px}\" y2=\"{py}\"/>"
                ));
            }
            body.push_str(&format!(
                "<circle class=\"{class}\" cx=\"{px}\" cy=\"{py}\" r=\"4\"/>\n"
            ));
            last = Some((px, py));
        }
        let row = TOP + index * ROW;
        body.push_str(&format!(
            "<circle class=\"{class}\" cx=\"12\" cy=\"{}\" r=\"4\"/><text x=\"22\" y=\"{}\">{name}</text>\n",
            row + 8,
            row + 12
        ));
    }
    svg(
        TOP + HEIGHT as usize + 30,
        "An endpoint change, ms, by services and sidecars",
        &body,
    )
}
