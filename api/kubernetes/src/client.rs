//! Flags and credentials.

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};

/// The API server is given so long for one object.
const PATIENCE: Duration = Duration::from_secs(5);

/// Which cluster, and as whom.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ClusterArgs {
    /// Ask the cluster that the current context of this file names.
    #[arg(long, value_name = "FILE", conflicts_with = "kube")]
    pub kubeconfig: Option<PathBuf>,
    /// Ask the cluster this program runs in, as its service account.
    #[arg(long)]
    pub kube: bool,
}

/// Flags of a program that reads its configuration from Kubernetes.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct KubernetesArgs {
    /// The cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Namespace of the ConfigMap `istio` with the mesh's settings.
    #[arg(long, value_name = "NAMESPACE", default_value = "istio-system")]
    pub kube_namespace: String,
    /// Read Secrets for gateways in these namespaces only; without it in all.
    #[arg(long, value_name = "NAMESPACE,…", value_delimiter = ',')]
    pub kube_secret_namespaces: Vec<String>,
}

/// Why a cluster cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The file, or what it names.
    #[error("cannot use the kubeconfig {file}")]
    Kubeconfig {
        /// Which.
        file: PathBuf,
        /// Why not.
        #[source]
        source: Box<KubeconfigError>,
    },
    /// Not in a pod, or a pod without a service account's token.
    #[error(
        "no service account to ask Kubernetes as; does this run in a pod? Else name --kubeconfig"
    )]
    InCluster(#[source] Box<InClusterError>),
    /// The credentials.
    #[error("cannot make a client of these credentials")]
    Client(#[source] Box<kube::Error>),
}

impl ClusterArgs {
    /// Whether a cluster is to be asked at all.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.kube || self.kubeconfig.is_some()
    }

    /// A client; nothing is asked yet. `None` when no flag names a cluster.
    ///
    /// # Errors
    /// The file cannot be read, or has no usable credentials.
    pub(crate) async fn client(&self) -> Result<Option<kube::Client>, ConnectError> {
        let mut config = match &self.kubeconfig {
            Some(file) => {
                let options = KubeConfigOptions::default();
                let read = async {
                    let kubeconfig = Kubeconfig::read_from(file)?;
                    kube::Config::from_custom_kubeconfig(kubeconfig, &options).await
                };
                read.await.map_err(|source| ConnectError::Kubeconfig {
                    file: file.clone(),
                    source: Box::new(source),
                })?
            }
            None if self.kube => {
                kube::Config::incluster().map_err(|e| ConnectError::InCluster(Box::new(e)))?
            }
            None => return Ok(None),
        };
        // We wait and try again ourselves, and say so.
        config.default_retry = false;
        kube::Client::try_from(config)
            .map(Some)
            .map_err(|e| ConnectError::Client(Box::new(e)))
    }
}

/// Why a request came to nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// The status that the API server answered with; 0 if there was no answer.
    pub(crate) code: u16,
    text: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The answer, within a time that is short enough to hold a lease.
pub(crate) async fn within<T>(asked: impl Future<Output = kube::Result<T>>) -> Result<T, Failure> {
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(answer) => answer.map_err(|error| Failure {
            code: match &error {
                kube::Error::Api(status) => status.code,
                _ => 0,
            },
            text: crate::follow::explain(&error),
        }),
        Err(_) => Err(Failure {
            code: 0,
            text: format!("no answer within {} s", PATIENCE.as_secs()),
        }),
    }
}
