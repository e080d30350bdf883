//! Flags → [`Config`].

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lateen_identity::{SpiffeId, TrustDomain};
use lateen_kubernetes::ClusterArgs;
use lateen_service::telemetry::TelemetryArgs;

/// Auth: mints SPIFFE identities for mutual TLS.
#[derive(Debug, clap::Parser)]
#[command(
    name = "auth",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub struct Cli {
    /// What to do; `serve` when nothing is said.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Flags of `serve`.
    #[command(flatten)]
    pub serve: Option<ServeArgs>,
    /// Flags about logging.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

/// What to do.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Serve certificates.
    Serve(ServeArgs),
    /// Make a token with which one workload can get its first certificate, once.
    JoinToken(JoinTokenArgs),
}

/// Flags of `auth serve`.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// Folder with the signing key and the join tokens; a new root is made in an empty one. To bring your
    /// own, put ca-cert.pem, ca-key.pem, cert-chain.pem and root-cert.pem into DIR/ca first.
    #[arg(long, value_name = "DIR")]
    pub state: PathBuf,
    /// Folder with the signing key and its certificates, read only, instead of DIR/ca of the state folder: a mounted Secret.
    #[arg(long, value_name = "DIR")]
    pub ca_dir: Option<PathBuf>,
    /// Trust domain of all identities.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: TrustDomain,
    /// Address to listen on.
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    pub bind: IpAddr,
    /// Port for certificate requests (gRPC over TLS).
    #[arg(long, default_value_t = 8060)]
    pub port: u16,
    /// Port for health and metrics (HTTP).
    #[arg(long, default_value_t = 15014)]
    pub admin_port: u16,
    /// Life of a certificate when the request does not say.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration)]
    pub workload_ttl: Duration,
    /// Longest life a request may ask for.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = duration)]
    pub max_workload_ttl: Duration,
    /// DNS names in Auth's own certificate, for clients that check those instead of the SPIFFE ID.
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "auth.istio-system.svc,istiod.istio-system.svc,localhost"
    )]
    pub dns_names: Vec<String>,
    /// DNS names that a service account's certificates have beside its SPIFFE ID, for clients that check those: an API
    /// server that calls a webhook. May be given several times.
    #[arg(long, value_name = "NAMESPACE/ACCOUNT=NAME,…", value_parser = grant)]
    pub dns_names_of: Vec<Grant>,
    /// Service accounts of the cluster that the current context of this file names get certificates for the tokens of
    /// their pods.
    #[arg(long, value_name = "FILE", conflicts_with = "kube")]
    pub kubeconfig: Option<PathBuf>,
    /// The same for the cluster this program runs in, which is asked as its service account.
    // Not flattened: clap does not see that an optional group is given when it has another inside.
    #[arg(long)]
    pub kube: bool,
    /// Write the root certificates to ConfigMap istio-ca-root-cert in every namespace of the cluster, and keep them
    /// there. Several Auths of one cluster must have the same roots.
    #[arg(long)]
    pub publish_roots: bool,
    /// Whom such a token must be meant for: one of these.
    #[arg(
        long,
        value_name = "AUDIENCES",
        value_delimiter = ',',
        default_value = "istio-ca"
    )]
    pub token_audiences: Vec<String>,
}

/// DNS names of a service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub account: String,
    /// The names.
    pub names: Vec<String>,
}

/// Flags of `auth join-token`.
#[derive(Clone, Debug, clap::Args)]
pub struct JoinTokenArgs {
    /// The state folder of the Auth that shall honour the token.
    #[arg(long, value_name = "DIR")]
    pub state: PathBuf,
    /// What the bearer becomes: spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT.
    #[arg(long, value_name = "ID")]
    pub identity: SpiffeId,
    /// How long the token can be used.
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = duration)]
    pub ttl: Duration,
}

/// The wall clock, so that tests can turn it.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    /// The real one.
    pub fn system() -> Self {
        Self(Arc::new(SystemTime::now))
    }

    /// Any other.
    pub fn of(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    /// The time.
    pub fn now(&self) -> SystemTime {
        (self.0)()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// What Auth runs with.
#[derive(Clone, Debug)]
pub struct Config {
    /// The state folder.
    pub state: PathBuf,
    /// The folder with the CA, when it is not below that.
    pub ca_dir: Option<PathBuf>,
    /// Trust domain of all identities.
    pub trust_domain: TrustDomain,
    /// Where certificate requests are served.
    pub address: SocketAddr,
    /// Where health and metrics are served.
    pub admin_address: SocketAddr,
    /// Life of a certificate when the request does not say.
    pub workload_ttl: Duration,
    /// Longest life a request may ask for.
    pub max_workload_ttl: Duration,
    /// DNS names in Auth's own certificate.
    pub dns_names: Vec<String>,
    /// DNS names in certificates of others.
    pub dns_names_of: Vec<Grant>,
    /// The cluster that is asked about tokens, if any.
    pub cluster: ClusterArgs,
    /// Whether its namespaces get the roots.
    pub publish_roots: bool,
    /// Whom those must be meant for.
    pub token_audiences: Vec<String>,
    /// The wall clock.
    pub clock: Clock,
}

impl From<ServeArgs> for Config {
    fn from(args: ServeArgs) -> Self {
        Self {
            state: args.state,
            ca_dir: args.ca_dir,
            trust_domain: args.trust_domain,
            address: SocketAddr::new(args.bind, args.port),
            admin_address: SocketAddr::new(args.bind, args.admin_port),
            workload_ttl: args.workload_ttl,
            max_workload_ttl: args.max_workload_ttl,
            dns_names: args.dns_names,
            dns_names_of: args.dns_names_of,
            cluster: ClusterArgs {
                kubeconfig: args.kubeconfig,
                kube: args.kube,
            },
            publish_roots: args.publish_roots,
            token_audiences: args.token_audiences,
            clock: Clock::system(),
        }
    }
}

/// `NAMESPACE/ACCOUNT=NAME,…`.
fn grant(text: &str) -> Result<Grant, String> {
    let wrong = || format!("{text:?} is not NAMESPACE/ACCOUNT=NAME,…");
    let (account, names) = text.split_once('=').ok_or_else(wrong)?;
    let (namespace, account) = account.split_once('/').ok_or_else(wrong)?;
    let names: Vec<String> = names.split(',').map(str::to_owned).collect();
    if namespace.is_empty() || account.is_empty() || account.contains('/') {
        return Err(wrong());
    }
    if let Some(name) = names.iter().find(|name| !is_dns_name(name)) {
        return Err(format!("{name:?} is not a DNS name in lower case"));
    }
    Ok(Grant {
        namespace: namespace.to_owned(),
        account: account.to_owned(),
        names,
    })
}

/// RFC 1123 §2.1, in lower case, no wildcard: each name is one host's.
fn is_dns_name(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

/// `90s`, `10m`, `24h`, `7d`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration like 90s, 10m, 24h or 7d");
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(split);
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number
        .checked_mul(seconds)
        .filter(|seconds| *seconds > 0)
        .map(Duration::from_secs)
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[test]
    fn serve_is_the_default() {
        let plain = Cli::try_parse_from([
            "auth",
            "--state",
            "/s",
            "--port",
            "1",
            "--workload-ttl",
            "5s",
        ])
        .unwrap();
        let named = Cli::try_parse_from([
            "auth",
            "serve",
            "--state",
            "/s",
            "--port",
            "1",
            "--workload-ttl",
            "5s",
        ]);
        let Some(Command::Serve(named)) = named.unwrap().command else {
            panic!("not serve")
        };
        let plain = plain.serve.unwrap();
        assert_eq!(format!("{plain:?}"), format!("{named:?}"));
        assert_eq!(plain.workload_ttl, Duration::from_secs(5));
        assert!(Cli::try_parse_from(["auth"]).is_err(), "--state is needed");
    }

    #[test]
    fn join_token_has_flags_of_its_own() {
        let cli = Cli::try_parse_from([
            "auth",
            "join-token",
            "--state",
            "/s",
            "--identity",
            "spiffe://td/ns/a/sa/b",
        ]);
        let Some(Command::JoinToken(args)) = cli.unwrap().command else {
            panic!("not join-token")
        };
        assert_eq!(args.ttl, Duration::from_secs(600));
        let bad = Cli::try_parse_from([
            "auth",
            "join-token",
            "--state",
            "/s",
            "--identity",
            "spiffe://td/ns//sa/b",
        ]);
        assert!(bad.is_err());
    }

    #[test]
    fn names_are_granted_to_accounts() {
        let found = grant("mesh/pilot=pilot.mesh.svc,localhost").unwrap();
        assert_eq!((&*found.namespace, &*found.account), ("mesh", "pilot"));
        assert_eq!(found.names, ["pilot.mesh.svc", "localhost"]);
        for bad in [
            "",
            "pilot=a",
            "mesh/pilot",
            "/pilot=a",
            "mesh/=a",
            "mesh/pilot=",
            "mesh/pilot=a,",
            "a/b/c=a",
            "mesh/pilot=*.svc",
            "mesh/pilot=A",
            "mesh/pilot=-a",
            "mesh/pilot=a..b",
        ] {
            assert!(grant(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(duration("24h"), Ok(Duration::from_secs(86_400)));
        for bad in [
            "",
            "5",
            "s",
            "0s",
            "1w",
            "-1s",
            "1.5h",
            "99999999999999999999d",
            "9999999999999999999d",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
