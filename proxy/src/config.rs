//! The command line: Envoy's flags, those about our own identity, and what of the environment is read.

use std::{path::PathBuf, time::Duration};

use clap::{Parser, ValueEnum};
use lateen_service::identity::IdentityArgs;
use serde_json::{Value, json};

use crate::{agent::EnvoyArgs, bootstrap::Origin, iptables};

/// Flags as given. Those that have no meaning here are accepted, because scripts pass them.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "proxy",
    version,
    about = "The data plane of a mesh: sidecar, ingress and egress gateway",
    args_conflicts_with_subcommands = true
)]
pub struct Options {
    /// Something else than to be a proxy.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Bootstrap file, YAML or JSON.
    #[arg(short = 'c', long, value_name = "FILE")]
    pub config_path: Option<PathBuf>,
    /// Bootstrap text, merged over the file.
    #[arg(long, value_name = "YAML")]
    pub config_yaml: Option<String>,
    /// `validate` compiles everything, says OK or what is wrong, and ends.
    #[arg(long, value_enum, default_value_t = Mode::Serve)]
    pub mode: Mode,
    /// Worker threads; the number of cores by default.
    #[arg(long, value_name = "N")]
    pub concurrency: Option<usize>,
    /// Node id, over that of the bootstrap.
    #[arg(long, value_name = "ID")]
    pub service_node: Option<String>,
    /// Node cluster, over that of the bootstrap.
    #[arg(long, value_name = "NAME")]
    pub service_cluster: Option<String>,
    /// Zone, over that of the bootstrap.
    #[arg(long, value_name = "NAME")]
    pub service_zone: Option<String>,
    /// trace, debug, info, warning, error, critical, off, or target=level pairs.
    #[arg(
        short = 'l',
        long,
        value_name = "LEVEL",
        default_value = "info",
        env = "LATEEN_LOG"
    )]
    pub log_level: String,
    /// `json` for machines; anything else is text.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: String,
    /// How long connections get to finish when listeners or the process go.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub drain_time_s: u64,
    /// The process ends this long after it was told to, finished or not.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub parent_shutdown_time_s: u64,
    /// Where to write the admin address that was bound.
    #[arg(long, value_name = "FILE")]
    pub admin_address_path: Option<PathBuf>,
    /// Be the agent of this Envoy binary instead of the proxy itself.
    #[arg(long, value_name = "PATH")]
    pub envoy: Option<PathBuf>,
    /// Our own identity.
    #[command(flatten)]
    pub identity: IdentityArgs,
    /// Flags of Envoy that are accepted and change nothing.
    #[command(flatten)]
    pub accepted: Accepted,
}

/// See [`Options::command`].
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Command {
    /// Have the kernel send a workload's traffic through its sidecar, or stop that.
    #[command(subcommand)]
    Iptables(iptables::Command),
    /// Be the proxy of an injected pod, which has no bootstrap file: its environment says everything.
    Sidecar(Box<SidecarArgs>),
    /// Return when the sidecar of this pod is ready.
    Wait(WaitArgs),
}

/// What Kubernetes tells the container of a sidecar. The names of variables are Istio's.
#[derive(Clone, Debug, clap::Args)]
#[allow(missing_docs, reason = "each is what its help says")]
pub struct SidecarArgs {
    /// Be a gateway, which has no application beside it.
    #[arg(long)]
    pub gateway: bool,
    /// Name of the pod.
    #[arg(long, env = "POD_NAME")]
    pub pod_name: String,
    /// Its namespace.
    #[arg(long, env = "POD_NAMESPACE")]
    pub pod_namespace: String,
    /// Its address.
    #[arg(long, env = "INSTANCE_IP")]
    pub instance_ip: String,
    /// All of its addresses.
    #[arg(long, env = "INSTANCE_IPS", default_value = "")]
    pub instance_ips: String,
    /// Its service account.
    #[arg(long, env = "SERVICE_ACCOUNT", default_value = "default")]
    pub service_account: String,
    /// ProxyConfig as JSON: where Pilot is, how many threads, how long to drain.
    #[arg(long, env = "PROXY_CONFIG", default_value = "{}")]
    pub proxy_config: String,
    /// Auth; empty: no identity, and a plain stream to Pilot.
    #[arg(long, env = "CA_ADDR", default_value = "")]
    pub ca_address: String,
    /// Roots that Auth must have.
    #[arg(
        long,
        env = "CA_ROOT_CA",
        default_value = "/var/run/secrets/istio/root-cert.pem"
    )]
    pub auth_root: PathBuf,
    /// The token that proves who this is.
    #[arg(
        long,
        env = "CA_TOKEN_FILE",
        default_value = "/var/run/secrets/tokens/istio-token"
    )]
    pub token_file: PathBuf,
    /// Trust domain of the mesh.
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Processors the container may use.
    #[arg(long, env = "ISTIO_CPU_LIMIT")]
    pub cpu_limit: Option<usize>,
    /// Port on which the application's probes are answered; 0 for none.
    #[arg(long, env = "STATUS_PORT", default_value_t = 15020)]
    pub status_port: u16,
    /// The probes, by path, as JSON.
    #[arg(long, env = "ISTIO_KUBE_APP_PROBERS", default_value = "")]
    pub app_probers: String,
    /// Level of the log.
    #[arg(short = 'l', long, default_value = "info", env = "LATEEN_LOG")]
    pub log_level: String,
    /// What Pilot is told besides: variables `ISTIO_META_…` without that.
    #[arg(skip = node_metadata())]
    pub metadata: Vec<(String, String)>,
}

/// How long `proxy wait` waits.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct WaitArgs {
    /// It fails after this.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u64,
}

fn node_metadata() -> Vec<(String, String)> {
    let all = std::env::vars_os().filter_map(|(name, value)| {
        let name = name.to_str()?.strip_prefix("ISTIO_META_")?.to_owned();
        Some((name, value.to_str()?.to_owned()))
    });
    all.collect()
}

/// See [`Options::accepted`].
#[derive(Clone, Debug, Default, clap::Args)]
#[allow(missing_docs, reason = "Envoy's names, no effect")]
#[command(next_help_heading = "Accepted for compatibility, without effect")]
pub struct Accepted {
    #[arg(long, default_value_t = 0)]
    pub base_id: u64,
    #[arg(long)]
    pub use_dynamic_base_id: bool,
    #[arg(long)]
    pub base_id_path: Option<PathBuf>,
    #[arg(long)]
    pub disable_hot_restart: bool,
    #[arg(long, default_value_t = 0)]
    pub restart_epoch: u32,
    #[arg(long)]
    pub drain_strategy: Option<String>,
    #[arg(long)]
    pub component_log_level: Option<String>,
    #[arg(long)]
    pub log_format_escaped: bool,
    #[arg(long)]
    pub local_address_ip_version: Option<String>,
    #[arg(long)]
    pub allow_unknown_static_fields: bool,
    #[arg(long)]
    pub reject_unknown_dynamic_fields: bool,
    #[arg(long)]
    pub ignore_unknown_dynamic_fields: bool,
    #[arg(long)]
    pub skip_deprecated_logs: bool,
    #[arg(long)]
    pub file_flush_interval_msec: Option<u64>,
    #[arg(long)]
    pub file_flush_min_size_kb: Option<u64>,
    #[arg(long)]
    pub cpuset_threads: bool,
}

/// What to do with the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Run.
    Serve,
    /// Compile and end.
    Validate,
}

/// Levels that Envoy knows; ours may also be `target=level` pairs.
const ENVOY_LEVELS: [&str; 7] = [
    "trace", "debug", "info", "warning", "error", "critical", "off",
];
/// More threads than this are a mistake.
const MAX_CONCURRENCY: usize = 256;

impl Options {
    /// As without flags.
    pub fn none() -> Options {
        Options::parse_from(["proxy"])
    }

    /// Number of workers.
    pub fn workers(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.concurrency
            .filter(|n| *n > 0)
            .unwrap_or_else(cores)
            .min(MAX_CONCURRENCY)
    }

    /// Where the bootstrap comes from.
    pub fn origin(&self) -> Origin {
        Origin {
            path: self.config_path.clone(),
            yaml: self.config_yaml.clone(),
            node_id: self.service_node.clone(),
            node_cluster: self.service_cluster.clone(),
            node_zone: self.service_zone.clone(),
        }
    }

    /// How to run `--envoy`; `None` when there is nothing to run it with.
    pub fn envoy(&self) -> Option<EnvoyArgs> {
        let given = |value: u64| u32::try_from(value).ok().filter(|value| *value > 0);
        Some(EnvoyArgs {
            envoy: self.envoy.clone()?,
            bootstrap: self.config_path.clone()?,
            concurrency: self.concurrency.and_then(|n| given(n as u64)),
            base_id: given(self.accepted.base_id),
            extra: self.envoy_extra(),
            drain_time: self.drain_time(),
        })
    }

    /// Flags that Envoy is to have as we got them.
    fn envoy_extra(&self) -> Vec<String> {
        let pairs = [
            (
                "--log-level",
                Some(self.log_level.clone()).filter(|l| ENVOY_LEVELS.contains(&l.as_str())),
            ),
            ("--config-yaml", self.config_yaml.clone()),
            ("--service-node", self.service_node.clone()),
            ("--service-cluster", self.service_cluster.clone()),
            ("--service-zone", self.service_zone.clone()),
        ];
        let given = pairs
            .into_iter()
            .filter_map(|(flag, value)| Some([flag.to_owned(), value?]));
        given.flatten().collect()
    }

    /// How long connections get to finish.
    pub fn drain_time(&self) -> Duration {
        Duration::from_secs(self.drain_time_s)
    }

    /// When a process that was told to end does so in any case.
    pub fn shutdown_time(&self) -> Duration {
        Duration::from_secs(self.parent_shutdown_time_s)
    }

    /// `command_line_options` of `/server_info`.
    pub fn show(&self) -> Value {
        json!({
            "base_id": self.accepted.base_id.to_string(),
            "concurrency": self.workers(),
            "config_path": self.config_path.as_ref().map(|p| p.display().to_string()).unwrap_or_default(),
            "config_yaml": self.config_yaml.clone().unwrap_or_default(),
            "log_level": self.log_level,
            "service_cluster": self.service_cluster.clone().unwrap_or_default(),
            "service_node": self.service_node.clone().unwrap_or_default(),
            "drain_time": format!("{}s", self.drain_time_s),
            "parent_shutdown_time": format!("{}s", self.parent_shutdown_time_s),
            "mode": match self.mode { Mode::Serve => "Serve", Mode::Validate => "Validate" },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_scripts_pass_to_envoy_are_understood() {
        let line = "proxy -c b.yaml --base-id 3 --concurrency 2 --service-node n --service-cluster c -l warning \
                    --drain-time-s 7 --parent-shutdown-time-s 9 --restart-epoch 0 --disable-hot-restart \
                    --local-address-ip-version v4 --drain-strategy immediate --mode validate \
                    --auth-address a:8060 --auth-root r --join-token-file t";
        let options = Options::try_parse_from(line.split_whitespace()).unwrap();
        assert_eq!((options.workers(), options.mode), (2, Mode::Validate));
        assert_eq!(options.drain_time(), Duration::from_secs(7));
        assert_eq!(options.origin().node_id.as_deref(), Some("n"));
        assert_eq!(options.identity.auth_address.as_deref(), Some("a:8060"));
        assert!(Options::try_parse_from(["proxy", "--confg"]).is_err());
    }
}
