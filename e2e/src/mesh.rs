//! A whole mesh on this machine.
//!
//! Start: Auth, then Pilot and Mixer, then every proxy and application at once; ready when every proxy
//! says so and Pilot has every proxy's word that the current configuration is live. Nothing waits by
//! the clock: each step waits for a signal, with a limit after which the error names what was missing.

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    address::{Block, PodAddress},
    bootstrap::{HTTP_PROXY_PORT, Role, Subscription, admin_url, bootstrap},
    http::Client,
    process::{Process, Spec, program},
    samples,
    workload::{self, Workload},
};

/// Longest wait for one step of the start or for a configuration to become live.
const STEP: Duration = Duration::from_secs(30);
/// A refusal that is listed for so long is no remainder of an earlier change.
const STALE: Duration = Duration::from_secs(1);
/// Between two looks at a signal that cannot be waited for.
const LOOK: Duration = Duration::from_millis(10);

/// How to run it.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder of YAML that Pilot watches; a temporary one when absent.
    pub config_dir: Option<PathBuf>,
    /// Run stock Envoy from this path as every workload's sidecar, with our proxy as its agent.
    pub envoy: Option<PathBuf>,
    /// Whether the ingress gateway is that program too.
    pub envoy_gateway: bool,
    /// Time to live of workload certificates; Auth's default when absent.
    pub workload_ttl: Option<Duration>,
    /// Threads of each proxy.
    pub concurrency: u16,
    /// Keep child processes out of our process group (a Ctrl-C then reaches only us).
    pub own_group: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            config_dir: None,
            envoy: None,
            envoy_gateway: false,
            workload_ttl: None,
            concurrency: 1,
            own_group: false,
        }
    }
}

/// A running workload instance.
#[derive(Debug)]
pub struct Instance {
    /// What it is.
    pub workload: Workload,
    /// Where it is.
    pub address: PodAddress,
    /// Its sidecar.
    pub sidecar: Option<Process>,
    /// Its application, unless that runs in the test's own process.
    pub app: Option<Process>,
}

impl Instance {
    /// Admin interface of its sidecar.
    pub fn admin(&self) -> String {
        admin_url(self.address.ip)
    }

    /// Its sidecar's outbound HTTP proxy, as `http://IP:PORT`.
    pub fn http_proxy(&self) -> String {
        format!("http://{}:{HTTP_PROXY_PORT}", self.address.outbound)
    }

    /// What its sidecar has printed (access log included).
    pub fn sidecar_output(&self) -> String {
        self.sidecar
            .as_ref()
            .map(Process::output)
            .unwrap_or_default()
    }
}

/// A running mesh; everything ends and every file goes when it is dropped.
#[derive(Debug)]
pub struct Mesh {
    // Fields drop in order: what depends on others ends first.
    instances: Vec<Instance>,
    /// Hostnames of the services that were added.
    services: BTreeSet<String>,
    /// The ingress gateway.
    pub gateway: Option<Process>,
    /// Another Mixer, see [`Mesh::add_mixer`].
    second_mixer: Option<Process>,
    /// Mixer.
    pub mixer: Process,
    /// Pilot.
    pub pilot: Process,
    /// Auth.
    pub auth: Process,
    block: Block,
    options: Options,
    client: Client,
    config: PathBuf,
    folder: TempDir,
}

impl Mesh {
    /// Starts the control plane and the ingress gateway.
    ///
    /// # Errors
    /// A program is missing, ends early or does not become ready; the error says which and shows its
    /// last lines.
    pub async fn start(options: Options) -> anyhow::Result<Mesh> {
        let block = Block::acquire()?;
        let folder = tempfile::Builder::new().prefix("lateen-").tempdir()?;
        for name in ["auth", "tokens", "logs", "run"] {
            fs::create_dir(folder.path().join(name))?;
        }
        let config = match &options.config_dir {
            Some(dir) => dir.clone(),
            None => folder.path().join("config"),
        };
        fs::create_dir_all(config.join("pods"))?;
        for (name, text) in [
            ("mesh.yaml", samples::MESH),
            ("services.yaml", samples::SERVICES),
            ("telemetry.yaml", samples::TELEMETRY),
        ] {
            let path = config.join(name);
            if !path.exists() {
                fs::write(path, text)?;
            }
        }
        let client = Client::new().with_timeout(Duration::from_secs(5));

        let mut auth = Process::start(auth_spec(&block, folder.path(), &options)?, &logs(&folder))?;
        let health = format!("http://{}:15014/healthz/ready", block.auth());
        wait_ready(&client, &mut auth, &health).await?;

        write_yaml(
            &config.join("pods/mixer-0.yaml"),
            &system_workload("mixer", "mixer", &[("app", "mixer")]).pod(block.mixer()),
        )?;
        let place = Place {
            block: &block,
            folder: &folder,
            own_group: options.own_group,
        };
        let of_pilot = vec!["--config-dir".to_owned(), text(&config)];
        let mut pilot = place.start("pilot", "pilot", block.pilot(), of_pilot)?;
        let mut mixer = place.start("mixer", "mixer", block.mixer(), mixer_args(&block))?;
        for (process, ip) in [(&mut pilot, block.pilot()), (&mut mixer, block.mixer())] {
            wait_ready(
                &client,
                process,
                &format!("http://{ip}:15014/healthz/ready"),
            )
            .await?;
        }

        let mut mesh = Mesh {
            instances: Vec::new(),
            services: BTreeSet::new(),
            gateway: None,
            second_mixer: None,
            mixer,
            pilot,
            auth,
            block,
            options,
            client,
            config,
            folder,
        };
        mesh.gateway = Some(mesh.start_gateway()?);
        Ok(mesh)
    }

    /// Starts a workload: its Pod goes into the folder, its sidecar starts, and so does its application
    /// when `with_app`. Does not wait; see [`Mesh::ready`].
    ///
    /// # Errors
    /// No local program stands for its image, or a program cannot be started.
    pub fn add(&mut self, workload: Workload, with_app: bool) -> anyhow::Result<&Instance> {
        let address = self.block.pod()?;
        let app = if with_app {
            let program_ = workload.program(address, HTTP_PROXY_PORT)?;
            Some(Process::start(
                Spec {
                    name: workload.name.clone(),
                    path: program(program_.name)?,
                    args: program_.args,
                    env: program_.env,
                    own_group: self.options.own_group,
                },
                &self.logs(),
            )?)
        } else {
            None
        };
        let sidecar = if workload.sidecar {
            let subscription = match self.options.envoy {
                Some(_) => Subscription::StateOfTheWorld,
                None => Subscription::Delta,
            };
            let envoy = self.options.envoy.clone();
            Some(self.start_proxy(Role::Sidecar, &workload, address, subscription, envoy)?)
        } else {
            None
        };
        write_yaml(&self.pod_file(&workload), &workload.pod(address.ip))?;
        self.instances.push(Instance {
            workload,
            address,
            sidecar,
            app,
        });
        self.instances.last().context("just pushed")
    }

    /// Starts a second Mixer with the rules of the first, waits until it is ready and proxies know of it,
    /// and gives its debug interface.
    ///
    /// # Errors
    /// There are two already, or it does not become ready.
    pub async fn add_mixer(&mut self) -> anyhow::Result<String> {
        anyhow::ensure!(self.second_mixer.is_none(), "there are two Mixers already");
        let ip = self.block.outside(5);
        let place = Place {
            block: &self.block,
            folder: &self.folder,
            own_group: self.options.own_group,
        };
        let mut mixer = place.start("mixer-1", "mixer", ip, mixer_args(&self.block))?;
        let url = format!("http://{ip}:15014");
        wait_ready(&self.client, &mut mixer, &format!("{url}/healthz/ready")).await?;
        self.second_mixer = Some(mixer);
        let mut workload = system_workload("mixer", "mixer", &[("app", "mixer")]);
        "mixer-1".clone_into(&mut workload.name);
        let pod = serde_json::to_string(&workload.pod(ip))?;
        self.apply("pods/mixer-1.yaml", &pod).await?;
        Ok(url)
    }

    /// Stops one instance and takes its Pod away.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn remove(&mut self, name: &str) -> anyhow::Result<()> {
        let index = self.index(name)?;
        fs::remove_file(self.pod_file(&self.instances[index].workload))?;
        drop(self.instances.remove(index));
        Ok(())
    }

    /// Adds everything that Bookinfo's YAML describes, and the YAML itself.
    ///
    /// # Errors
    /// See [`Mesh::add`].
    pub fn add_bookinfo(&mut self) -> anyhow::Result<()> {
        for (name, yaml) in [
            ("bookinfo.yaml", samples::BOOKINFO),
            ("gateway.yaml", samples::BOOKINFO_GATEWAY),
        ] {
            let path = self.config.join(name);
            if !path.exists() {
                fs::write(path, yaml)?;
            }
        }
        let yaml = fs::read_to_string(self.config.join("bookinfo.yaml"))?;
        for workload in Workload::from_yaml(&yaml)? {
            self.add(workload, true)?;
        }
        self.services.extend(workload::services(&yaml)?);
        Ok(())
    }

    /// Waits until every proxy serves and has acknowledged the current configuration.
    ///
    /// # Errors
    /// A program ended, or something is still missing after half a minute.
    pub async fn ready(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + STEP;
        let client = self.client.clone();
        if let Some(gateway) = &mut self.gateway {
            let url = format!("{}/ready", admin_url(self.block.gateway()));
            wait_ready(&client, gateway, &url).await?;
        }
        let mut proxies = usize::from(self.gateway.is_some());
        for instance in &mut self.instances {
            let url = format!("{}/ready", instance.admin());
            if let Some(sidecar) = &mut instance.sidecar {
                proxies += 1;
                wait_ready(&client, sidecar, &url).await?;
            }
            if let Some(app) = &mut instance.app {
                let (_, port) = *instance.workload.ports.first().context("no port")?;
                let port = instance.workload.app_port(port);
                wait_ready(
                    &client,
                    app,
                    &format!("http://{}:{port}/health", instance.address.ip),
                )
                .await?;
            }
        }
        loop {
            let unknown = self.unknown().await?;
            if unknown.is_empty() {
                break;
            }
            self.check()?;
            anyhow::ensure!(
                Instant::now() < deadline,
                "Pilot has not read of {unknown:?} after {STEP:?}"
            );
            tokio::time::sleep(LOOK).await;
        }
        loop {
            let state = self.generation().await?;
            let connected = state["proxies"].as_array().map_or(0, Vec::len);
            if connected >= proxies && state["live"] == state["generation"] {
                return Ok(());
            }
            self.check()?;
            anyhow::ensure!(
                Instant::now() < deadline,
                "the configuration is not live on all {proxies} proxies after {STEP:?}: {state}"
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    /// What was written and Pilot has not read yet: addresses of Pods, names of Services.
    async fn unknown(&self) -> anyhow::Result<Vec<String>> {
        let url = format!("http://{}:15014/debug/registryz", self.block.pilot());
        let registry = self.client.get(&url).await?;
        // Until there is a first configuration the answer is 503.
        let registry: Value = match registry.status {
            200 => registry.json()?,
            _ => Value::Null,
        };
        let names = |list: &str, field: &str| -> BTreeSet<String> {
            let list = registry[list].as_array().into_iter().flatten();
            list.filter_map(|entry| entry[field].as_str().map(str::to_owned))
                .collect()
        };
        let (addresses, hosts) = (names("workloads", "address"), names("services", "hostname"));
        let pods = self.instances.iter().map(|i| i.address.ip.to_string());
        Ok(pods
            .filter(|pod| !addresses.contains(pod))
            .chain(self.services.difference(&hosts).cloned())
            .collect())
    }

    /// Writes `NAME` into the folder and waits until every proxy has acknowledged what follows from it.
    ///
    /// # Errors
    /// Pilot refuses it (the error is Pilot's, with file and line), or it does not become live.
    pub async fn apply(&mut self, name: &str, yaml: &str) -> anyhow::Result<()> {
        let before = self.generation().await?["generation"].clone();
        // A rename, so that nobody reads half a file.
        let path = self.config.join(name);
        let temporary = self.folder.path().join("run/new.yaml");
        fs::write(&temporary, yaml)?;
        fs::rename(&temporary, &path).or_else(|_| fs::write(&path, yaml))?;
        self.wait_past(&before, Some(name)).await
    }

    /// Removes `NAME` from the folder and waits until that is live.
    ///
    /// # Errors
    /// There is no such file, or its absence does not become live.
    pub async fn delete(&mut self, name: &str) -> anyhow::Result<()> {
        let before = self.generation().await?["generation"].clone();
        fs::remove_file(self.config.join(name))?;
        self.wait_past(&before, None).await
    }

    async fn wait_past(&mut self, before: &Value, file: Option<&str>) -> anyhow::Result<()> {
        let before = before.as_u64().unwrap_or_default();
        let deadline = Instant::now() + STEP;
        let mut refused: Option<(Value, Instant)> = None;
        loop {
            let state = self.generation().await?;
            let generation = state["generation"].as_u64().unwrap_or_default();
            if generation > before {
                let problem = file.and_then(|file| {
                    state["problems"]
                        .as_array()?
                        .iter()
                        .find(|p| p.to_string().contains(file))
                });
                if let Some(problem) = problem {
                    anyhow::bail!(
                        "{}",
                        problem.as_str().map_or(problem.to_string(), str::to_owned)
                    );
                }
                // What was refused before this change is listed until its reader has answered the change.
                let refusals = &state["refusals"];
                let has_refusals = refusals.as_array().is_some_and(|all| !all.is_empty());
                refused = match refused.take() {
                    _ if !has_refusals => None,
                    Some((same, since)) if same == *refusals => Some((same, since)),
                    _ => Some((refusals.clone(), Instant::now())),
                };
                if let Some((refusals, since)) = &refused {
                    anyhow::ensure!(since.elapsed() < STALE, "refused: {refusals}");
                }
                // Mixer reads its rules from Pilot and is among the readers.
                let readers = state["readers"].as_array().into_iter().flatten();
                if !has_refusals
                    && state["live"].as_u64() >= Some(generation)
                    && readers.clone().count() > 0
                    && readers
                        .clone()
                        .all(|reader| reader["live"].as_u64() >= Some(generation))
                {
                    return Ok(());
                }
            }
            self.check()?;
            anyhow::ensure!(
                Instant::now() < deadline,
                "the change of generation {before} is not live after {STEP:?}: {state}"
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Pilot's word on what is live where.
    ///
    /// # Errors
    /// Pilot does not answer.
    pub async fn generation(&self) -> anyhow::Result<Value> {
        let url = format!("http://{}:15014/debug/generation", self.block.pilot());
        self.client.get(&url).await?.json()
    }

    /// An error that shows its last lines if any program has ended.
    ///
    /// # Errors
    /// One has.
    pub fn check(&mut self) -> anyhow::Result<()> {
        for process in [&mut self.auth, &mut self.pilot, &mut self.mixer] {
            process.check()?;
        }
        for instance in &mut self.instances {
            for process in instance.sidecar.iter_mut().chain(&mut instance.app) {
                process.check()?;
            }
        }
        self.gateway.iter_mut().try_for_each(Process::check)
    }

    /// Starts every program that has ended again, and says which and how it ended.
    ///
    /// # Errors
    /// One cannot be started, or ends again and again.
    pub fn restart_ended(&mut self) -> anyhow::Result<Vec<String>> {
        let mut all = vec![&mut self.auth, &mut self.pilot, &mut self.mixer];
        all.extend(&mut self.gateway);
        for instance in &mut self.instances {
            all.extend(instance.sidecar.iter_mut().chain(&mut instance.app));
        }
        let mut said = Vec::new();
        for process in all {
            said.extend(process.restart_if_ended()?);
        }
        Ok(said)
    }

    /// Ends every program, all at once.
    pub fn stop(&mut self) {
        let mut all: Vec<&mut Process> = Vec::new();
        for instance in &mut self.instances {
            all.extend(instance.sidecar.iter_mut().chain(&mut instance.app));
        }
        all.extend(&mut self.gateway);
        all.extend(&mut self.second_mixer);
        all.extend([&mut self.mixer, &mut self.pilot, &mut self.auth]);
        for process in &mut all {
            process.terminate();
        }
        for process in &mut all {
            process.stopped();
        }
    }

    /// The instance of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn instance(&self, name: &str) -> anyhow::Result<&Instance> {
        self.index(name).map(|index| &self.instances[index])
    }

    /// The instance of that name, to stop or restart its programs.
    ///
    /// # Errors
    /// There is none.
    pub fn instance_mut(&mut self, name: &str) -> anyhow::Result<&mut Instance> {
        self.index(name).map(|index| &mut self.instances[index])
    }

    /// All workload instances.
    pub fn instances(&self) -> &[Instance] {
        &self.instances
    }

    /// All processes by name with their process ids.
    pub fn processes(&self) -> Vec<(&str, u32)> {
        let instances = self
            .instances
            .iter()
            .flat_map(|i| i.sidecar.iter().chain(&i.app));
        [&self.auth, &self.pilot, &self.mixer]
            .into_iter()
            .chain(&self.gateway)
            .chain(instances)
            .map(|process| (process.name(), process.id()))
            .collect()
    }

    /// The ingress gateway, as `http://IP:8080`.
    pub fn gateway_url(&self) -> String {
        format!("http://{}:8080", self.block.gateway())
    }

    /// Admin interface of the ingress gateway.
    pub fn gateway_admin(&self) -> String {
        admin_url(self.block.gateway())
    }

    /// Pilot's debug interface.
    pub fn pilot_url(&self) -> String {
        format!("http://{}:15014", self.block.pilot())
    }

    /// Mixer's debug interface.
    pub fn mixer_url(&self) -> String {
        format!("http://{}:15014", self.block.mixer())
    }

    /// What Mixer's prometheus adapter exposes.
    pub fn mixer_metrics_url(&self) -> String {
        format!("http://{}:42422/metrics", self.block.mixer())
    }

    /// The folder that Pilot watches.
    pub fn config_dir(&self) -> &Path {
        &self.config
    }

    /// Logs, tokens and state of the programs.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The addresses of this mesh.
    pub fn block(&self) -> &Block {
        &self.block
    }

    fn index(&self, name: &str) -> anyhow::Result<usize> {
        self.instances
            .iter()
            .position(|instance| instance.workload.name == name)
            .with_context(|| format!("no workload instance is named {name}"))
    }

    fn logs(&self) -> PathBuf {
        logs(&self.folder)
    }

    fn pod_file(&self, workload: &Workload) -> PathBuf {
        self.config.join(format!(
            "pods/{}.{}.yaml",
            workload.name, workload.namespace
        ))
    }

    fn start_gateway(&self) -> anyhow::Result<Process> {
        let workload = Workload {
            ports: vec![(None, 8080), (None, 8443)],
            ..system_workload(
                "istio-ingressgateway",
                "istio-ingressgateway-service-account",
                &[("app", "istio-ingressgateway"), ("istio", "ingressgateway")],
            )
        };
        let address = PodAddress {
            ip: self.block.gateway(),
            outbound: self.block.gateway(),
        };
        write_yaml(&self.pod_file(&workload), &workload.pod(address.ip))?;
        let envoy = self.options.envoy.clone();
        let envoy = envoy.filter(|_| self.options.envoy_gateway);
        let subscription = match envoy {
            Some(_) => Subscription::StateOfTheWorld,
            None => Subscription::Delta,
        };
        self.start_proxy(Role::Gateway, &workload, address, subscription, envoy)
    }

    fn start_proxy(
        &self,
        role: Role,
        workload: &Workload,
        address: PodAddress,
        subscription: Subscription,
        envoy: Option<PathBuf>,
    ) -> anyhow::Result<Process> {
        let name = format!("{}.proxy", workload.name);
        let run = self.folder.path().join("run");
        let file = run.join(format!("{name}.json"));
        let value = bootstrap(
            role,
            workload,
            address,
            SocketAddr::from((self.block.pilot(), 15012)),
            &run.join(format!("{name}.sds")),
            subscription,
        );
        fs::write(&file, serde_json::to_vec_pretty(&value)?)?;
        let token = join_token(self.folder.path(), &name, &workload.identity())?;
        let mut args = vec![
            "-c".to_owned(),
            text(&file),
            "--concurrency".to_owned(),
            self.options.concurrency.to_string(),
        ];
        args.extend(identity_args(
            &self.block,
            self.folder.path(),
            &name,
            &token,
        ));
        if let Some(envoy) = envoy {
            args.extend(["--envoy".to_owned(), text(&envoy)]);
        }
        let spec = Spec {
            name,
            path: program("proxy")?,
            args,
            env: thrift(),
            own_group: self.options.own_group,
        };
        Process::start(spec, &self.logs())
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Where programs of the control plane start.
struct Place<'a> {
    block: &'a Block,
    folder: &'a TempDir,
    own_group: bool,
}

impl Place<'_> {
    /// Starts one at `ip` with the identity of its service account; `name` is the process's.
    fn start(
        &self,
        name: &str,
        account: &str,
        ip: Ipv4Addr,
        args: Vec<String>,
    ) -> anyhow::Result<Process> {
        let identity = format!("spiffe://cluster.local/ns/istio-system/sa/{account}");
        let token = join_token(self.folder.path(), name, &identity)?;
        let mut all = vec!["--bind".to_owned(), ip.to_string()];
        all.extend(args);
        all.extend(identity_args(self.block, self.folder.path(), name, &token));
        let spec = Spec {
            name: name.to_owned(),
            path: program(account)?,
            args: all,
            env: thrift(),
            own_group: self.own_group,
        };
        Process::start(spec, &logs(self.folder))
    }
}

fn mixer_args(block: &Block) -> Vec<String> {
    vec![
        "--config-ads".to_owned(),
        format!("{}:15012", block.pilot()),
    ]
}

/// A dozen programs share one machine here: their allocator gives free memory back at once rather than
/// keeping it for a busy moment (260 MB instead of 310 MB for Bookinfo).
fn thrift() -> Vec<(String, String)> {
    vec![("MIMALLOC_PURGE_DELAY".to_owned(), "0".to_owned())]
}

fn auth_spec(block: &Block, folder: &Path, options: &Options) -> anyhow::Result<Spec> {
    let mut args = vec![
        "serve".to_owned(),
        "--bind".to_owned(),
        block.auth().to_string(),
        "--state".to_owned(),
        text(&folder.join("auth")),
    ];
    if let Some(ttl) = options.workload_ttl {
        args.extend(["--workload-ttl".to_owned(), format!("{}s", ttl.as_secs())]);
    }
    Ok(Spec {
        name: "auth".to_owned(),
        path: program("auth")?,
        args,
        env: thrift(),
        own_group: options.own_group,
    })
}

/// Asks Auth's state folder for a one-time token; gives the file that holds it.
fn join_token(folder: &Path, name: &str, identity: &str) -> anyhow::Result<PathBuf> {
    use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};
    let output = std::process::Command::new(program("auth")?)
        .args(["join-token", "--state"])
        .arg(folder.join("auth"))
        .args(["--identity", identity])
        .output()?;
    anyhow::ensure!(
        output.status.success(),
        "auth join-token failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let file = folder.join("tokens").join(name);
    fs::OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&file)?
        .write_all(output.stdout.trim_ascii())?;
    Ok(file)
}

fn identity_args(block: &Block, folder: &Path, name: &str, token: &Path) -> Vec<String> {
    [
        ("--auth-address", format!("{}:8060", block.auth())),
        (
            "--auth-root",
            text(&folder.join("auth/public/root-cert.pem")),
        ),
        ("--join-token-file", text(token)),
        ("--svid-dir", text(&folder.join(format!("run/{name}.svid")))),
    ]
    .into_iter()
    .flat_map(|(flag, value)| [flag.to_owned(), value])
    .collect()
}

fn system_workload(name: &str, service_account: &str, labels: &[(&str, &str)]) -> Workload {
    Workload {
        namespace: "istio-system".to_owned(),
        service_account: service_account.to_owned(),
        ports: Vec::new(),
        ..Workload::new(name, labels, 0)
    }
}

async fn wait_ready(client: &Client, process: &mut Process, url: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + STEP;
    loop {
        let last = client.get(url).await;
        if matches!(&last, Ok(response) if response.status == 200) {
            return Ok(());
        }
        process.check()?;
        if Instant::now() > deadline {
            let said = match last {
                Ok(response) => format!("it says {}: {}", response.status, response.text()),
                Err(error) => format!("{error:#}"),
            };
            let output = process.output();
            let lines: Vec<_> = output.lines().collect();
            let tail = lines[lines.len().saturating_sub(15)..].join("\n");
            anyhow::bail!(
                "{} is not ready after {STEP:?} ({url}): {said}\n{tail}",
                process.name()
            );
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn write_yaml(path: &Path, value: &Value) -> anyhow::Result<()> {
    // JSON is YAML; a rename, so that nobody reads half of it.
    let temporary = path.with_extension("new");
    fs::write(&temporary, serde_json::to_vec_pretty(value)?)
        .with_context(|| format!("cannot write {}", temporary.display()))?;
    fs::rename(&temporary, path)?;
    Ok(())
}

fn logs(folder: &TempDir) -> PathBuf {
    folder.path().join("logs")
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
