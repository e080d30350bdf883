//! `lateen proxy-config`: what a proxy has loaded, from its admin interface. Works on stock Envoy as well, for the pages are Envoy's.

use std::process::ExitCode;

use anyhow::Context as _;
use e2e::http::Client;
use serde_json::{Value, json};

use crate::output::Format;
use crate::terminal::bold;

/// Show what a proxy has loaded.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Of what.
    #[arg(value_enum)]
    part: Part,
    /// The proxy's admin interface. Of a pod: kubectl port-forward POD 15000.
    #[arg(long, env = "LATEEN_PROXY", default_value = "http://127.0.0.1:15000")]
    admin: String,
    /// Only what has this in its name.
    #[arg(long, value_name = "TEXT", default_value = "")]
    name: String,
    /// `log` only: change the level first.
    #[arg(long, value_name = "LEVEL")]
    level: Option<String>,
    /// Print the parts themselves as YAML or JSON.
    #[arg(short = 'o', long, value_enum)]
    output: Option<Format>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Listeners,
    Routes,
    Clusters,
    Endpoints,
    Secrets,
    Bootstrap,
    /// Levels of its log.
    Log,
}

/// Does it.
pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(
        options.level.is_none() || options.part == Part::Log,
        "--level is of `proxy-config log`"
    );
    let admin = Admin {
        client: Client::new(),
        address: options.admin.trim_end_matches('/').to_owned(),
    };
    if options.part == Part::Log {
        let page = match &options.level {
            Some(level) => format!("/logging?level={level}"),
            None => "/logging".to_owned(),
        };
        print!("{}", admin.ask(http::Method::POST, &page).await?.text());
        return Ok(ExitCode::SUCCESS);
    }
    let found = match options.part {
        Part::Endpoints => endpoints(&admin.get("/clusters?format=json").await?),
        part => parts(&admin.get("/config_dump").await?, part),
    };
    let found: Vec<Found> = found
        .into_iter()
        .filter(|one| one.name.contains(&options.name))
        .collect();
    match options.output {
        Some(format) => {
            let bodies: Vec<Value> = found.into_iter().map(|one| one.body).collect();
            format.print(&Value::from(bodies))?;
        }
        // There are no columns of it.
        None if options.part == Part::Bootstrap => {
            for one in found {
                Format::Yaml.print(&one.body)?;
            }
        }
        None => print!("{}", table(options.part, &found)),
    }
    Ok(ExitCode::SUCCESS)
}

struct Admin {
    client: Client,
    address: String,
}

impl Admin {
    async fn ask(&self, method: http::Method, page: &str) -> anyhow::Result<e2e::http::Response> {
        let url = format!("{}{page}", self.address);
        let answer = self
            .client
            .send(method, &url, &[], Default::default())
            .await;
        let answer = answer.with_context(|| {
            format!(
                "cannot ask the proxy; is {} its admin interface (--admin)?",
                self.address
            )
        })?;
        anyhow::ensure!(
            answer.status == 200,
            "the proxy answers {} for {url}: {}",
            answer.status,
            answer.text().trim()
        );
        Ok(answer)
    }

    async fn get(&self, page: &str) -> anyhow::Result<Value> {
        self.ask(http::Method::GET, page).await?.json()
    }
}

/// One part of a configuration.
#[derive(Debug, PartialEq)]
struct Found {
    name: String,
    /// What the table shows beside the name.
    columns: Vec<String>,
    body: Value,
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Takes a dump apart: Envoy's `ConfigDump`, whose parts are told by their types.
fn parts(dump: &Value, part: Part) -> Vec<Found> {
    let (of, lists): (_, &[(&str, &str)]) = match part {
        Part::Listeners => (
            "ListenersConfigDump",
            &[
                ("static_listeners", "/listener"),
                ("dynamic_listeners", "/active_state/listener"),
            ],
        ),
        Part::Routes => (
            "RoutesConfigDump",
            &[
                ("static_route_configs", "/route_config"),
                ("dynamic_route_configs", "/route_config"),
            ],
        ),
        Part::Clusters => (
            "ClustersConfigDump",
            &[
                ("static_clusters", "/cluster"),
                ("dynamic_active_clusters", "/cluster"),
            ],
        ),
        Part::Secrets => (
            "SecretsConfigDump",
            &[
                ("static_secrets", "/secret"),
                ("dynamic_active_secrets", "/secret"),
                ("dynamic_warming_secrets", "/secret"),
            ],
        ),
        Part::Bootstrap => ("BootstrapConfigDump", &[]),
        Part::Endpoints | Part::Log => return Vec::new(),
    };
    let mut found = Vec::new();
    for config in list(&dump["configs"]) {
        if !config["@type"]
            .as_str()
            .is_some_and(|kind| kind.ends_with(of))
        {
            continue;
        }
        if part == Part::Bootstrap {
            found.push(Found {
                name: text(&config["bootstrap"]["node"]["id"]),
                columns: Vec::new(),
                body: config["bootstrap"].clone(),
            });
        }
        for (field, path) in lists {
            for entry in list(&config[*field]) {
                let Some(body) = entry.pointer(path).filter(|body| body.is_object()) else {
                    continue;
                };
                let name = match &body["name"] {
                    Value::String(name) => name.clone(),
                    _ => text(&entry["name"]),
                };
                found.push(Found {
                    name,
                    columns: columns(part, body, field),
                    body: body.clone(),
                });
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn columns(part: Part, body: &Value, list_name: &str) -> Vec<String> {
    let origin = if list_name.starts_with("static") {
        "static"
    } else {
        "dynamic"
    };
    match part {
        Part::Listeners => {
            let socket = &body["address"]["socket_address"];
            let chains = list(&body["filter_chains"]).count();
            vec![
                format!(
                    "{}:{}",
                    text(&socket["address"]),
                    text(&socket["port_value"])
                ),
                chains.to_string(),
                origin.to_owned(),
            ]
        }
        Part::Routes => {
            let hosts: Vec<&Value> = list(&body["virtual_hosts"]).collect();
            let routes: usize = hosts.iter().map(|host| list(&host["routes"]).count()).sum();
            vec![
                hosts.len().to_string(),
                routes.to_string(),
                origin.to_owned(),
            ]
        }
        Part::Clusters => {
            let kind = match (&body["type"], &body["cluster_type"]["name"]) {
                (Value::String(kind), _) | (_, Value::String(kind)) => kind.as_str(),
                // The default of protobuf's enumeration is not written.
                _ => "STATIC",
            };
            let is_tls =
                !body["transport_socket"].is_null() || !body["transport_socket_matches"].is_null();
            vec![
                kind.to_owned(),
                if is_tls { "TLS" } else { "-" }.to_owned(),
                origin.to_owned(),
            ]
        }
        Part::Secrets => {
            let kind = [
                "tls_certificate",
                "validation_context",
                "generic_secret",
                "session_ticket_keys",
            ]
            .into_iter()
            .find(|kind| !body[*kind].is_null());
            let state = if list_name.contains("warming") {
                "warming"
            } else {
                origin
            };
            vec![kind.unwrap_or("-").to_owned(), state.to_owned()]
        }
        Part::Endpoints | Part::Bootstrap | Part::Log => Vec::new(),
    }
}

/// Hosts of all clusters, from Envoy's `Clusters`.
fn endpoints(clusters: &Value) -> Vec<Found> {
    let mut found = Vec::new();
    for cluster in list(&clusters["cluster_statuses"]) {
        for host in list(&cluster["host_statuses"]) {
            let address = match &host["address"]["socket_address"] {
                Value::Null => text(&host["address"]["pipe"]["path"]),
                socket => format!(
                    "{}:{}",
                    text(&socket["address"]),
                    text(&socket["port_value"])
                ),
            };
            let health = &host["health_status"];
            let is_out = health["failed_outlier_check"] == true;
            let status = match &health["eds_health_status"] {
                Value::String(status) => status.clone(),
                _ => "HEALTHY".to_owned(),
            };
            let failed = health["failed_active_health_check"] == true;
            found.push(Found {
                name: text(&cluster["name"]),
                columns: vec![
                    address,
                    if failed {
                        "UNHEALTHY".to_owned()
                    } else {
                        status
                    },
                    if is_out { "EJECTED" } else { "-" }.to_owned(),
                    text(&host["weight"]),
                ],
                body: json!({ "cluster": cluster["name"], "host": host }),
            });
        }
    }
    found.sort_by(|a, b| (&a.name, &a.columns).cmp(&(&b.name, &b.columns)));
    found
}

fn table(part: Part, found: &[Found]) -> String {
    let heads: &[&str] = match part {
        Part::Listeners => &["LISTENER", "ADDRESS", "CHAINS", "FROM"],
        Part::Routes => &["ROUTES", "HOSTS", "RULES", "FROM"],
        Part::Clusters => &["CLUSTER", "TYPE", "TLS", "FROM"],
        Part::Endpoints => &["CLUSTER", "ADDRESS", "HEALTH", "OUTLIER", "WEIGHT"],
        Part::Secrets => &["SECRET", "KIND", "FROM"],
        Part::Bootstrap | Part::Log => &["NAME"],
    };
    let rows: Vec<Vec<&str>> = std::iter::once(heads.to_vec())
        .chain(found.iter().map(|one| {
            let cells = std::iter::once(&one.name).chain(&one.columns);
            cells.map(String::as_str).collect()
        }))
        .collect();
    let widths: Vec<usize> = (0..heads.len())
        .map(|at| {
            rows.iter()
                .filter_map(|row| row.get(at))
                .map(|cell| cell.len())
                .max()
        })
        .map(Option::unwrap_or_default)
        .collect();
    let mut out = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        let line = cells.join("  ");
        let line = line.trim_end();
        out += &if number == 0 {
            bold(line)
        } else {
            line.to_owned()
        };
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump() -> Value {
        json!({"configs": [
            {"@type": "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump", "bootstrap": {"node": {"id": "n"}}},
            {"@type": "type.googleapis.com/envoy.admin.v3.ListenersConfigDump",
             "static_listeners": [{"listener": {"name": "s", "address": {"socket_address": {"address": "::", "port_value": 1}}}}],
             "dynamic_listeners": [
                {"name": "d", "active_state": {"listener": {"name": "d", "address": {"socket_address": {"address": "0.0.0.0", "port_value": 80}}, "filter_chains": [{}, {}]}}},
                {"name": "refused", "error_state": {"details": "no"}}]},
            {"@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump",
             "dynamic_active_clusters": [{"cluster": {"name": "b", "type": "EDS", "transport_socket": {}}}, {"cluster": {"name": "a"}}]},
            {"@type": "type.googleapis.com/envoy.admin.v3.SecretsConfigDump",
             "dynamic_active_secrets": [{"name": "default", "secret": {"name": "default", "tls_certificate": {}}}]},
        ]})
    }

    fn rows(part: Part) -> Vec<String> {
        let found = parts(&dump(), part);
        found
            .iter()
            .map(|one| format!("{} {}", one.name, one.columns.join(" ")))
            .collect()
    }

    #[test]
    fn a_dump_is_taken_apart() {
        assert_eq!(
            rows(Part::Listeners),
            ["d 0.0.0.0:80 2 dynamic", "s :::1 0 static"]
        );
        assert_eq!(
            rows(Part::Clusters),
            ["a STATIC - dynamic", "b EDS TLS dynamic"]
        );
        assert_eq!(rows(Part::Secrets), ["default tls_certificate dynamic"]);
        assert_eq!(rows(Part::Bootstrap), ["n "]);
        let text = table(Part::Clusters, &parts(&dump(), Part::Clusters));
        assert!(
            text.ends_with("\na        STATIC  -    dynamic\nb        EDS     TLS  dynamic\n"),
            "{text}"
        );
    }

    #[test]
    fn endpoints_say_how_they_are() {
        let host = |port: u16, health: Value| json!({"address": {"socket_address": {"address": "10.0.0.1", "port_value": port}}, "health_status": health, "weight": 1});
        let clusters = json!({"cluster_statuses": [{"name": "c", "host_statuses": [
            host(2, json!({"eds_health_status": "HEALTHY", "failed_outlier_check": true})),
            host(1, json!({"failed_active_health_check": true})),
        ]}]});
        let found = endpoints(&clusters);
        assert_eq!(found[0].columns, ["10.0.0.1:1", "UNHEALTHY", "-", "1"]);
        assert_eq!(found[1].columns, ["10.0.0.1:2", "HEALTHY", "EJECTED", "1"]);
    }
}
