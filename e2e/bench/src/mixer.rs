//! `bench mixer`: what Mixer costs at its own door, beside a bare gRPC server that takes and gives the same
//! messages (tonic, as Mixer, without a rule): what of the cost is transport, and what is Mixer's.
//!
//! Mixer has one processor, the load the other. Rates are per second of CPU time, so they are one core's.

mod scene;

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use lateen_protocols::istio::mixer::v1::{
    CheckRequest, CheckResponse, ReportRequest, ReportResponse,
    mixer_client::MixerClient,
    mixer_server::{Mixer, MixerServer},
};
use prost::Message as _;
use serde_json::{Value, json};
use tonic::{Request, Response, Status, transport::Channel};

use crate::{
    load::{self, Extent, Pace, Plan, Protocol},
    process::{LOAD_CPU, PROXY_CPU, Running, use_processor},
};

/// Until ten thousand rules are compiled.
const START: Duration = Duration::from_secs(60);
/// Distinct values of an attribute, and distinct names of headers.
const DISTINCT: usize = 1_000_000;
/// Calls under way while those are sent.
const WINDOW: usize = 32;
/// More than this between two thirds of the way and the end is growth.
const FLAT_KIB: u64 = 4096;

/// How to measure.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) mixer: PathBuf,
    pub(crate) scenarios: Vec<String>,
    pub(crate) rounds: usize,
    pub(crate) window: Duration,
    /// Distinct values and names of the memory scenarios.
    pub(crate) distinct: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mixer: "target/release/mixer".into(),
            scenarios: Vec::new(),
            rounds: 5,
            window: Duration::from_millis(1500),
            distinct: DISTINCT,
        }
    }
}

/// Something under load.
struct Scenario {
    name: &'static str,
    title: &'static str,
    files: Vec<(String, String)>,
    call: Call,
    goal: Goal,
}

enum Call {
    Check(Box<CheckRequest>),
    Report(ReportRequest),
}

/// What a scenario should reach.
#[derive(Clone, Copy, Debug)]
enum Goal {
    /// So many a second and core.
    Rate(f64),
    /// So much of the CPU of another scenario.
    Times(&'static str, f64),
    /// It is only told.
    None,
}

/// What was found.
#[derive(Clone, Debug)]
struct Row {
    title: String,
    /// Checks or records a second and core.
    rate: f64,
    /// µs of CPU time each.
    cost: f64,
    /// As part of the bare server's cost of the same messages.
    bare: f64,
    /// µs each from the message in hand to the answer, by Mixer's own clock: without HTTP/2.
    engine: f64,
    goal: String,
    met: bool,
}

fn scenarios() -> Vec<Scenario> {
    let principal = |_| "cluster.local/ns/default/sa/bookinfo-productpage".to_owned();
    vec![
        Scenario {
            name: "check",
            title: "Check, Istio's default rules and 10 policies",
            files: scene::usual(),
            call: Call::Check(Box::new(scene::check("curl/8.5.0"))),
            goal: Goal::Rate(40_000.0),
        },
        Scenario {
            name: "check-large",
            title: "Check, and 10,000 rules in 1,000 other namespaces",
            files: scene::large(),
            call: Call::Check(Box::new(scene::check("curl/8.5.0"))),
            goal: Goal::Times("check", 1.2),
        },
        Scenario {
            name: "report",
            title: "Report, one metric of 20 labels and a null log",
            files: scene::metric_and_null_log(),
            call: Call::Report(scene::report(principal)),
            goal: Goal::Rate(150_000.0),
        },
        Scenario {
            name: "report-default",
            title: "Report, Istio's default rules: 4 metrics of 20 labels, workload lookup",
            files: scene::usual(),
            call: Call::Report(scene::report(principal)),
            goal: Goal::None,
        },
    ]
}

/// Mixer, or the bare server, at its ports.
struct Served {
    process: Running,
    api: SocketAddr,
    admin: Option<SocketAddr>,
    metrics: Option<SocketAddr>,
    folder: PathBuf,
}

fn free() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

fn get(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(
        format!("GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n").as_bytes(),
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

impl Served {
    /// A Mixer with these files. `launcher`: the program that is to run it, and its arguments; nothing: none.
    fn mixer(
        mixer: &Path,
        launcher: &[String],
        files: &[(String, String)],
        folder: &Path,
    ) -> anyhow::Result<Served> {
        let configuration = folder.join("configuration");
        fs::create_dir_all(&configuration)?;
        for (name, text) in files {
            fs::write(configuration.join(name), text)?;
        }
        let [api, tls, admin, metrics] = [free()?, free()?, free()?, free()?];
        let flags = [
            ("--config-dir", configuration.display().to_string()),
            ("--bind", "127.0.0.1".to_owned()),
            ("--port", api.port().to_string()),
            ("--tls-port", tls.port().to_string()),
            ("--admin-port", admin.port().to_string()),
            ("--metrics-port", metrics.port().to_string()),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value]);
        let mut command = launcher.to_vec();
        command.push(mixer.display().to_string());
        command.extend(flags);
        let (program, arguments) = command.split_first().context("there is no program")?;
        let log = folder.join("mixer.log");
        let mut process = Running::start(Path::new(program), arguments, PROXY_CPU, log)?;
        process.listens(admin, START)?;
        let deadline = Instant::now() + START;
        while !get(admin, "/healthz/ready")?.starts_with("HTTP/1.1 200") {
            process.check()?;
            anyhow::ensure!(Instant::now() < deadline, "mixer does not become ready");
            std::thread::sleep(Duration::from_millis(20));
        }
        let configuration = get(admin, "/debug/config")?;
        anyhow::ensure!(
            !configuration.contains(r#""is_refused":true"#),
            "the configuration is refused: {configuration}"
        );
        Ok(Served {
            process,
            api,
            admin: Some(admin),
            metrics: Some(metrics),
            folder: folder.to_owned(),
        })
    }

    /// A bare server that answers checks with `answer`.
    fn bare(answer: &CheckResponse, folder: &Path) -> anyhow::Result<Served> {
        let api = free()?;
        let file = folder.join("answer");
        fs::write(&file, answer.encode_to_vec())?;
        let arguments = ["bare".into(), api.to_string(), file.display().to_string()];
        let program = std::env::current_exe()?;
        let log = folder.join("bare.log");
        let mut process = Running::start(&program, &arguments, PROXY_CPU, log)?;
        process.listens(api, START)?;
        Ok(Served {
            process,
            api,
            admin: None,
            metrics: None,
            folder: folder.to_owned(),
        })
    }

    fn client(&self, runtime: &tokio::runtime::Runtime) -> anyhow::Result<MixerClient<Channel>> {
        let address = format!("http://{}", self.api);
        Ok(runtime.block_on(MixerClient::connect(address))?)
    }
}

/// The bare server: `bench bare ADDRESS FILE`.
pub(crate) fn bare(address: SocketAddr, answer: &Path) -> anyhow::Result<()> {
    struct Bare(CheckResponse);
    #[tonic::async_trait]
    impl Mixer for Bare {
        async fn check(&self, _: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
            Ok(Response::new(self.0.clone()))
        }
        async fn report(
            &self,
            _: Request<ReportRequest>,
        ) -> Result<Response<ReportResponse>, Status> {
            Ok(Response::new(ReportResponse {}))
        }
    }
    let answer = CheckResponse::decode(&*fs::read(answer)?)?;
    let server = tonic::transport::Server::builder()
        .add_service(MixerServer::new(Bare(answer)))
        .serve(address);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    Ok(runtime.block_on(server)?)
}

/// Calls that Mixer has answered, and the seconds they took it, as it tells.
fn told(mixer: &Served, call: &Call) -> anyhow::Result<(f64, f64)> {
    let metrics = get(mixer.admin.context("it has no metrics")?, "/metrics")?;
    let method = match call {
        Call::Check(_) => "Check",
        Call::Report(_) => "Report",
    };
    let read = |name: &str| {
        let start = format!("mixer_request_seconds_{name}{{method=\"{method}\"}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&start));
        line.and_then(|number| number.parse::<f64>().ok())
            .with_context(|| format!("no {start}in its metrics"))
    };
    Ok((read("count")?, read("sum")?))
}

/// One call by hand, judged; then its load.
struct Prepared {
    plan: Plan,
    answer: CheckResponse,
}

fn prepare(
    call: &Call,
    mixer: &Served,
    runtime: &tokio::runtime::Runtime,
) -> anyhow::Result<Prepared> {
    let mut client = mixer.client(runtime)?;
    let (path, message, answer, length) = match call {
        Call::Check(request) => {
            let answer = runtime
                .block_on(client.check(CheckRequest::clone(request)))?
                .into_inner();
            let precondition = answer.precondition.as_ref().context("no verdict")?;
            let status = precondition.status.as_ref().context("no status")?;
            anyhow::ensure!(status.code == 0, "the check is denied: {status:?}");
            anyhow::ensure!(
                precondition
                    .referenced_attributes
                    .as_ref()
                    .is_some_and(|r| r.attribute_matches.len() > 8),
                "the policies looked at too little: {precondition:?}"
            );
            let length = answer.encoded_len();
            ("Check", request.encode_to_vec(), answer, length)
        }
        Call::Report(request) => {
            runtime.block_on(client.report(request.clone()))?;
            (
                "Report",
                request.encode_to_vec(),
                CheckResponse::default(),
                0,
            )
        }
    };
    // A batch of reports is long: no more of them than fit into a connection's first window.
    let streams = match call {
        Call::Check(_) => 8,
        Call::Report(_) => 1,
    };
    let plan = Plan {
        path: format!("/istio.mixer.v1.Mixer/{path}"),
        message: Some(Arc::from(message)),
        answer: length + 5,
        // As many as a node's proxies: a connection each.
        ..Plan::new(Protocol::Grpc, 8, streams)
    };
    Ok(Prepared { plan, answer })
}

/// A Mixer that `launcher` runs for a scenario, and one call at a time to it.
pub(crate) fn launched(
    launcher: &[String],
    mixer: &Path,
    scenario: &str,
    folder: &Path,
) -> anyhow::Result<(Running, SocketAddr, Plan)> {
    let mut all = scenarios().into_iter();
    let scenario = all
        .find(|one| one.name == scenario)
        .context("there is no such scenario")?;
    let served = Served::mixer(mixer, launcher, &scenario.files, folder)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let plan = Plan {
        connections: 1,
        streams: 1,
        ..prepare(&scenario.call, &served, &runtime)?.plan
    };
    Ok((served.process, served.api, plan))
}

fn measure(served: &Served, plan: &Plan, window: Duration) -> anyhow::Result<f64> {
    let extent = Extent::Window {
        warm_up: window / 3,
        window,
    };
    let clock = served.process.clock()?;
    let outcome = load::run(served.api, plan, Pace::Closed, &extent, &[clock])?;
    anyhow::ensure!(
        outcome.bad == 0 && outcome.good > 0,
        "{} bad answers: {:?}",
        outcome.bad,
        outcome.problems
    );
    Ok(outcome.cpu_ns as f64 / outcome.good as f64)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Measures everything and prints it.
pub(crate) fn run(
    settings: &Settings,
    json_file: Option<&Path>,
    document: Option<&Path>,
) -> anyhow::Result<()> {
    use_processor(LOAD_CPU)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let wanted = |name: &str| {
        settings.scenarios.is_empty() || settings.scenarios.iter().any(|wanted| wanted == name)
    };
    let mut rows = Vec::new();
    let mut costs: BTreeMap<&str, f64> = BTreeMap::new();
    for scenario in scenarios().into_iter().filter(|s| wanted(s.name)) {
        let folder = tempfile::tempdir()?;
        let mixer = Served::mixer(&settings.mixer, &[], &scenario.files, folder.path())
            .with_context(|| scenario.name)?;
        let prepared = prepare(&scenario.call, &mixer, &runtime).context(scenario.name)?;
        let bare = Served::bare(&prepared.answer, folder.path())?;
        let (mut ours, mut ratios) = (Vec::new(), Vec::new());
        let before = told(&mixer, &scenario.call)?;
        for _ in 0..settings.rounds {
            let ns = measure(&mixer, &prepared.plan, settings.window).context(scenario.name)?;
            let floor = measure(&bare, &prepared.plan, settings.window).context("bare")?;
            ours.push(ns);
            ratios.push(ns / floor);
        }
        verify(&mixer)?;
        let after = told(&mixer, &scenario.call)?;
        let records = match scenario.call {
            Call::Check(_) => 1.0,
            Call::Report(_) => scene::BATCH as f64,
        };
        let cost = median(ours) / records;
        costs.insert(scenario.name, cost);
        let rate = 1e9 / cost;
        let (goal, met) = match scenario.goal {
            Goal::Rate(goal) => (format!("≥ {goal:.0}/s"), rate >= goal),
            Goal::Times(other, goal) => match costs.get(other) {
                Some(other) => (
                    format!("{:.2} of the above, ≤ {goal:.2}", cost / other),
                    cost / other <= goal,
                ),
                None => ("not compared".to_owned(), true),
            },
            Goal::None => (String::new(), true),
        };
        let row = Row {
            title: scenario.title.to_owned(),
            rate,
            cost: cost / 1000.0,
            bare: median(ratios),
            engine: (after.1 - before.1) / (after.0 - before.0) / records * 1e6,
            goal,
            met,
        };
        println!(
            "{:<68} {:>9.0}/s {:>7.2} µs  {:>5.2} × bare  {:>6.2} µs alone  {} {}",
            row.title,
            row.rate,
            row.cost,
            row.bare,
            row.engine,
            row.goal,
            if row.met { "" } else { "✗" }
        );
        rows.push(row);
    }
    let mut memory = Vec::new();
    for (name, title) in MEMORY {
        if wanted(name) {
            let found = flat(settings, name, title, &runtime).context(name)?;
            println!("{found}");
            memory.push(found);
        }
    }
    if let Some(file) = json_file {
        let rows: Vec<Value> = rows
            .iter()
            .map(|row| {
                json!({"title": row.title, "perSecond": row.rate, "microseconds": row.cost,
                       "timesBare": row.bare, "alone": row.engine, "goal": row.goal, "met": row.met})
            })
            .collect();
        fs::write(file, serde_json::to_string_pretty(&json!(rows))?)?;
    }
    if let Some(file) = document {
        write(&rows, &memory, settings, file)?;
    }
    Ok(())
}

/// Nothing was refused, shed or lost meanwhile.
fn verify(mixer: &Served) -> anyhow::Result<()> {
    let Some(admin) = mixer.admin else {
        return Ok(());
    };
    let metrics = get(admin, "/metrics")?;
    for line in metrics.lines() {
        let lost = [
            "mixer_instance_errors_total{",
            "mixer_match_errors_total{",
            "mixer_shed_total{",
        ]
        .iter()
        .any(|name| line.starts_with(name))
            || line.starts_with("mixer_dispatches_total{") && !line.contains("\"Answered\"");
        anyhow::ensure!(!lost || line.ends_with(" 0"), "{line}");
    }
    Ok(())
}

const MEMORY: [(&str, &str); 2] = [
    (
        "memory-values",
        "distinct values of an attribute in reports",
    ),
    ("memory-headers", "distinct names of headers in checks"),
];

/// Sends what is never twice the same, and weighs Mixer on the way.
fn flat(
    settings: &Settings,
    name: &str,
    title: &str,
    runtime: &tokio::runtime::Runtime,
) -> anyhow::Result<String> {
    let folder = tempfile::tempdir()?;
    let mixer = Served::mixer(&settings.mixer, &[], &scene::usual(), folder.path())?;
    let client = mixer.client(runtime)?;
    let in_reports = name == "memory-values";
    let send = move |client: MixerClient<Channel>, number: usize| async move {
        let mut client = client;
        if in_reports {
            let principal = |record| format!("principal-{number}-{record}");
            client.report(scene::report(principal)).await.map(drop)
        } else {
            let request = scene::check_with_header(&format!("x-hostile-{number}"));
            client.check(request).await.map(drop)
        }
    };
    let calls = if in_reports {
        settings.distinct / scene::BATCH
    } else {
        settings.distinct
    };
    let mut weights = Vec::new();
    let parts = 3;
    for part in 0..parts {
        let from = calls * part / parts;
        let to = calls * (part + 1) / parts;
        runtime.block_on(async {
            let mut under_way = tokio::task::JoinSet::new();
            for number in from..to {
                if under_way.len() >= WINDOW
                    && let Some(done) = under_way.join_next().await
                {
                    done??;
                }
                under_way.spawn(send(client.clone(), number));
            }
            while let Some(done) = under_way.join_next().await {
                done??;
            }
            anyhow::Ok(())
        })?;
        weights.push(mixer.process.memory()?.anonymous);
    }
    let [_, before, after] = weights[..] else {
        anyhow::bail!("three weights are taken");
    };
    if let Some(metrics) = mixer.metrics {
        let series = get(metrics, "/metrics")?.lines().count();
        anyhow::ensure!(series < 1_000_000, "{series} lines of metrics");
    }
    let growth = after.saturating_sub(before);
    anyhow::ensure!(
        growth <= FLAT_KIB,
        "{title}: {growth} KiB more in the last third (kept in {})",
        mixer.folder.display()
    );
    Ok(format!(
        "{} {title}: {:.1} MiB after two thirds, {:.1} MiB at the end",
        settings.distinct,
        before as f64 / 1024.0,
        after as f64 / 1024.0
    ))
}

const BEGIN: &str = "<!-- Made by `make bench-mixer` from here -->";
const END: &str = "<!-- `make bench-mixer` to here -->";

fn write(rows: &[Row], memory: &[String], settings: &Settings, file: &Path) -> anyhow::Result<()> {
    let mut table = String::from(
        "| scenario | per second and core | µs | × bare gRPC server | µs without HTTP/2 | goal |\n|---|---|---|---|---|---|\n",
    );
    for row in rows {
        table += &format!(
            "| {} | {:.0} | {:.2} | {:.2} | {:.2} | {}{} |\n",
            row.title,
            row.rate,
            row.cost,
            row.bare,
            row.engine,
            row.goal,
            if row.met { "" } else { " ✗" }
        );
    }
    table += &format!(
        "\n{} rounds of {:.1} s each.\n",
        settings.rounds,
        settings.window.as_secs_f64()
    );
    if !memory.is_empty() {
        table += "\nMemory (anonymous pages):\n\n";
        for line in memory {
            table += &format!("- {line}\n");
        }
    }
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let (before, rest) = text
        .split_once(BEGIN)
        .context("no place for Mixer's table")?;
    let (_, after) = rest.split_once(END).context("no end of Mixer's table")?;
    fs::write(file, format!("{before}{BEGIN}\n\n{table}\n{END}{after}"))?;
    Ok(())
}
