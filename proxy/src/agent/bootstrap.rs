//! The two things the agent needs to know from Envoy's bootstrap: where Envoy will ask for secrets, and where
//! its admin endpoint is. Read as plain YAML, because only Envoy itself knows all extensions it may name.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::admin::Endpoint;

/// The static cluster whose Unix socket secrets are served on. Istio's name.
const SDS_CLUSTER: &str = "sds-grpc";

/// Why a bootstrap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// Reading the file.
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    /// Neither JSON nor YAML.
    #[error("{path} is neither JSON nor YAML: {reason}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        reason: String,
    },
    /// The cluster is no Unix socket.
    #[error("cluster {SDS_CLUSTER} must have one endpoint with a pipe path that is a file name")]
    SdsCluster,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bootstrap {
    /// Path of the pipe of cluster `sds-grpc`, as written: relative to the working directory.
    pub(super) sds_socket: Option<PathBuf>,
    /// The admin endpoint.
    pub(super) admin: Option<Endpoint>,
}

pub(super) async fn read(path: &Path) -> Result<Bootstrap, BootstrapError> {
    let text = tokio::fs::read_to_string(path)
        .await
        .map_err(|error| BootstrapError::Read(path.to_owned(), error))?;
    // JSON first: not all JSON is YAML (tabs).
    let value = match serde_json::from_str(&text) {
        Ok(value) => value,
        Err(_) => {
            serde_saphyr::from_str::<Value>(&text).map_err(|error| BootstrapError::Syntax {
                path: path.to_owned(),
                reason: error.to_string(),
            })?
        }
    };
    parse(&value)
}

fn parse(bootstrap: &Value) -> Result<Bootstrap, BootstrapError> {
    let sds = field(field(bootstrap, "static_resources"), "clusters")
        .as_array()
        .and_then(|clusters| {
            clusters
                .iter()
                .find(|cluster| field(cluster, "name") == SDS_CLUSTER)
        });
    let sds_socket = sds.map(socket_of).transpose()?;
    let admin = field(field(bootstrap, "admin"), "address");
    Ok(Bootstrap {
        sds_socket,
        admin: admin_of(admin),
    })
}

/// `None` where there is none, or one we cannot reach (a port chosen by Envoy).
fn admin_of(address: &Value) -> Option<Endpoint> {
    if let Some(path) = field(field(address, "pipe"), "path").as_str() {
        return Some(Endpoint::Pipe(path.into()));
    }
    let socket = field(address, "socket_address");
    let port = u16::try_from(field(socket, "port_value").as_u64()?)
        .ok()
        .filter(|port| *port != 0)?;
    Some(Endpoint::Tcp(SocketAddr::new(
        field(socket, "address").as_str()?.parse().ok()?,
        port,
    )))
}

fn socket_of(cluster: &Value) -> Result<PathBuf, BootstrapError> {
    let endpoints = field(field(cluster, "load_assignment"), "endpoints");
    let endpoint = field(
        field(&endpoints[0], "lb_endpoints")
            .get(0)
            .unwrap_or(&Value::Null),
        "endpoint",
    );
    let path = field(field(field(endpoint, "address"), "pipe"), "path").as_str();
    // '@' begins an abstract socket, which anybody on the machine could connect to.
    match path {
        Some(path) if !path.is_empty() && !path.starts_with('@') => Ok(PathBuf::from(path)),
        _ => Err(BootstrapError::SdsCluster),
    }
}

/// A field by its name in the proto, or by its JSON name; Envoy takes both.
fn field<'v>(value: &'v Value, name: &str) -> &'v Value {
    if let Some(found) = value.get(name) {
        return found;
    }
    let mut camel = String::with_capacity(name.len());
    let mut upper = false;
    for c in name.chars() {
        match c {
            '_' => upper = true,
            c if upper => {
                camel.push(c.to_ascii_uppercase());
                upper = false;
            }
            c => camel.push(c),
        }
    }
    value.get(&camel).unwrap_or(&Value::Null)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yaml(text: &str) -> Result<Bootstrap, BootstrapError> {
        parse(&serde_saphyr::from_str(text).unwrap())
    }

    #[test]
    fn both_spellings_are_read() {
        let want = Bootstrap {
            sds_socket: Some("./run/socket".into()),
            admin: Some(Endpoint::Tcp(SocketAddr::from(([127, 0, 0, 1], 15000)))),
        };
        let snake = "
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 15000}}}
static_resources:
  clusters:
  - name: other
  - name: sds-grpc
    load_assignment:
      endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: ./run/socket}}}}]}]
";
        assert_eq!(yaml(snake).unwrap(), want);
        let camel = snake
            .replace("socket_address", "socketAddress")
            .replace("port_value", "portValue")
            .replace("static_resources", "staticResources")
            .replace("load_assignment", "loadAssignment")
            .replace("lb_endpoints", "lbEndpoints");
        assert_eq!(yaml(&camel).unwrap(), want);
    }

    #[test]
    fn nothing_is_needed() {
        assert_eq!(yaml("{}").unwrap(), Bootstrap::default());
        assert_eq!(
            yaml("static_resources: {clusters: [{name: x}]}").unwrap(),
            Bootstrap::default()
        );
    }

    #[test]
    fn a_cluster_that_is_no_file_is_refused() {
        for address in [
            "socket_address: {address: 127.0.0.1, port_value: 1}",
            "pipe: {path: '@x'}",
            "pipe: {}",
        ] {
            let text = format!(
                "static_resources: {{clusters: [{{name: sds-grpc, load_assignment: {{endpoints: [{{lb_endpoints: \
                 [{{endpoint: {{address: {{{address}}}}}}}]}}]}}}}]}}"
            );
            assert!(
                matches!(yaml(&text), Err(BootstrapError::SdsCluster)),
                "{address}"
            );
        }
        let empty = "static_resources: {clusters: [{name: sds-grpc}]}";
        assert!(matches!(yaml(empty), Err(BootstrapError::SdsCluster)));
    }
}
