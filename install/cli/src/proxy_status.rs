//! `lateen proxy-status`: what Pilot sent to each proxy and what became of it.

use anyhow::Context as _;
use e2e::http::Client;
use serde_json::Value;

use crate::terminal::{bold, green};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Pilot's debug interface.
    #[arg(long, env = "LATEEN_PILOT", default_value = "http://127.0.0.1:15014")]
    pilot: String,
    /// Print Pilot's answer as it is.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let client = Client::new();
    let url = format!("{}/debug/syncz", options.pilot.trim_end_matches('/'));
    let answer = client.get(&url).await.with_context(|| {
        format!(
            "cannot ask Pilot; is {} its debug interface (--pilot)?",
            options.pilot
        )
    })?;
    anyhow::ensure!(
        answer.status == 200,
        "Pilot answers {} for {url}",
        answer.status
    );
    let state = answer.json()?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&state)?);
        return Ok(());
    }
    print!("{}", table(&state));
    let url = format!("{}/debug/generation", options.pilot.trim_end_matches('/'));
    print!("{}", complaints(&client.get(&url).await?.json()?));
    Ok(())
}

/// What Pilot has against the configuration, and what its clients refused; nothing when all is well.
fn complaints(state: &Value) -> String {
    let mut out = String::new();
    for (title, field) in [
        ("Problems (the last good version is in force)", "problems"),
        ("Warnings", "warnings"),
        ("Refusals", "refusals"),
    ] {
        let all = state[field]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        if all.is_empty() {
            continue;
        }
        out.push_str(&format!("\n{}\n", bold(title)));
        for complaint in all {
            match complaint.as_str() {
                Some(text) => out.push_str(&format!("  {text}\n")),
                None => out.push_str(&format!("  {complaint}\n")),
            }
        }
    }
    out
}

/// One line a proxy, one column a type.
fn table(state: &Value) -> String {
    const TYPES: [&str; 4] = ["CDS", "EDS", "LDS", "RDS"];
    let proxies = state
        .as_array()
        .or(state["proxies"].as_array())
        .map(Vec::as_slice)
        .unwrap_or_default();
    let width = proxies
        .iter()
        .filter_map(|p| p["proxy"].as_str())
        .map(str::len)
        .max()
        .unwrap_or(4)
        .max(4);
    let mut out = bold(&format!("{:<width$}", "NAME"));
    for kind in TYPES {
        out.push_str(&bold(&format!("  {kind:<10}")));
    }
    out.push('\n');
    for proxy in proxies {
        out.push_str(&format!(
            "{:<width$}",
            proxy["proxy"].as_str().unwrap_or("?")
        ));
        for kind in TYPES {
            let status = &proxy["types"][kind];
            let text = status["status"].as_str().unwrap_or("-");
            let cell = format!("  {text:<10}");
            out.push_str(&if text == "SYNCED" { green(&cell) } else { cell });
        }
        out.push('\n');
        for kind in TYPES {
            if let Some(error) = proxy["types"][kind]["error"].as_str() {
                out.push_str(&format!("  {kind} refused: {error}\n"));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_refusal_is_shown_under_its_proxy() {
        let state = json!({"proxies": [{"proxy": "a.default", "types": {
            "CDS": {"status": "SYNCED"}, "LDS": {"status": "NACKED", "error": "no such filter"},
        }}]});
        let text = table(&state);
        assert!(text.contains("a.default"), "{text}");
        assert!(text.contains("LDS refused: no such filter"), "{text}");
    }

    #[test]
    fn complaints_are_shown_and_silence_is_silent() {
        let state = json!({"problems": ["a.yaml:1: broken"], "warnings": [], "refusals": [{"client": "m"}]});
        let text = complaints(&state);
        assert!(text.contains("  a.yaml:1: broken\n"), "{text}");
        assert!(text.contains(r#"{"client":"m"}"#), "{text}");
        assert!(!text.contains("Warnings"), "{text}");
        assert_eq!(complaints(&json!({})), "");
    }
}
