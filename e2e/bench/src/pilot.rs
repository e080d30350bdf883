//! `make bench-pilot`: what a change costs Pilot and how long it takes until all sidecars have it, how long a cold
//! start takes, and what each sidecar weighs. Services, their endpoints and as many sidecars, which are simulated
//! ([`fleet`]); Pilot is the program as it ships, on a processor of its own.

mod fleet;

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde_json::json;

use self::fleet::{Fleet, Sidecar, What};
use crate::{
    compare::median,
    plot,
    process::{CpuClock, LOAD_CPU, PROXY_CPU, Running, use_processor},
    report::Progress,
};

/// Services and sidecars of a namespace.
const NAMESPACE: usize = 50;

/// How long Pilot may work on after the last acknowledgement: its cost is part of the change's.
const REST: Duration = Duration::from_millis(300);

/// Goals, of docs/benchmarks.md.
const GOALS: [(&str, f64); 6] = [
    (
        "ms until an endpoint change is acknowledged by all, p99",
        250.0,
    ),
    ("ms of Pilot's CPU per endpoint change", 40.0),
    (
        "ms until a VirtualService is acknowledged by all that see it",
        1_000.0,
    ),
    ("s of a cold start with all reconnecting", 10.0),
    ("MiB resident, without Sidecar scoping", 286.0), // 300 MB
    ("KiB per additional scoped sidecar", 39.1),      // 40 KB
];

/// What to do.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) pilot: PathBuf,
    /// Services, and as many sidecars, of each measurement.
    pub(crate) sizes: Vec<usize>,
    /// Endpoints of each service.
    pub(crate) endpoints: usize,
    /// Endpoint changes of each measurement.
    pub(crate) changes: usize,
    /// How long anything is waited for.
    pub(crate) patience: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            pilot: "target/release/pilot".into(),
            sizes: vec![100, 250, 500, 1_000],
            endpoints: 10,
            changes: 20,
            patience: Duration::from_secs(300),
        }
    }
}

/// What was found for one size, in the units of [`GOALS`]; nothing for what was not reached.
#[derive(Clone, Debug)]
struct Row {
    size: usize,
    half: f64,
    figures: [f64; 6],
    /// Sidecars that got something of the VirtualService, and those that see it.
    told: (usize, usize),
    /// Bytes that came after all had acknowledged the VirtualService.
    bytes: usize,
}

/// A folder of configuration.
struct Scene<'a> {
    folder: &'a Path,
    size: usize,
    endpoints: usize,
}

impl Scene<'_> {
    fn namespace(number: usize) -> String {
        format!("ns-{}", number / NAMESPACE)
    }

    /// Replaces a file whole, as kubectl's and editors' writes are.
    fn put(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let fresh = self.folder.join(format!(".{name}"));
        fs::write(&fresh, text)?;
        fs::rename(fresh, self.folder.join(name))?;
        Ok(())
    }

    fn write(&self, scoped: bool) -> anyhow::Result<()> {
        let mut text = String::new();
        for number in 0..self.size {
            let namespace = Self::namespace(number);
            let (high, low) = (number / 250, number % 250 + 1);
            text += &format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{ name: svc-{number}, namespace: {namespace} }}\n\
                 spec: {{ clusterIP: 10.100.{high}.{low}, selector: {{ app: svc-{number} }}, ports: [{{ name: http, port: 80, targetPort: 8080 }}] }}\n\
                 ---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: pod-{number}, namespace: {namespace}, labels: {{ app: svc-{number} }} }}\n\
                 spec: {{ containers: [{{ name: app, ports: [{{ containerPort: 8080 }}] }}] }}\n\
                 status: {{ podIP: {}, phase: Running, conditions: [{{ type: Ready, status: \"True\" }}] }}\n",
                Self::address(number, 0)
            );
            self.slice(number, self.endpoints)?;
        }
        if scoped {
            for number in (0..self.size).step_by(NAMESPACE) {
                text += &format!(
                    "---\napiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{ name: default, namespace: {} }}\n\
                     spec: {{ egress: [{{ hosts: [\"./*\"] }}] }}\n",
                    Self::namespace(number)
                );
            }
        }
        self.put("mesh.yaml", &text)
    }

    fn address(service: usize, endpoint: usize) -> String {
        format!(
            "10.{}.{}.{}",
            1 + endpoint,
            service / 250,
            service % 250 + 1
        )
    }

    /// The first `count` endpoints of a service are ready; the first is the service's sidecar's pod.
    fn slice(&self, number: usize, count: usize) -> anyhow::Result<()> {
        let endpoints: Vec<_> = (0..count)
            .map(|endpoint| json!({ "addresses": [Self::address(number, endpoint)] }))
            .collect();
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("svc-{number}-a"),
                "namespace": Self::namespace(number),
                "labels": { "kubernetes.io/service-name": format!("svc-{number}") },
            },
            "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": [{ "name": "http", "port": 8080 }],
        });
        self.put(&format!("slice-{number}.yaml"), &slice.to_string())
    }

    /// A VirtualService that only its namespace sees.
    fn route(&self, seconds: usize) -> anyhow::Result<()> {
        self.put(
            "route.yaml",
            &format!(
                "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: own, namespace: ns-0 }}\n\
                 spec: {{ hosts: [svc-1.ns-0.svc.cluster.local], exportTo: [\".\"], http: [{{ timeout: {seconds}s, route: [{{ destination: {{ host: svc-1.ns-0.svc.cluster.local }} }}] }}] }}\n"
            ),
        )
    }

    fn sidecar(number: usize) -> Sidecar {
        Sidecar {
            name: format!("pod-{number}"),
            namespace: Self::namespace(number),
            address: Self::address(number, 0),
            app: format!("svc-{number}"),
        }
    }
}

fn free() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn pilot(
    settings: &Settings,
    configuration: &Path,
    grpc: SocketAddr,
    log: PathBuf,
) -> anyhow::Result<Running> {
    let http = free()?;
    let arguments = [
        ("--config-dir", configuration.display().to_string()),
        ("--bind", "127.0.0.1".to_owned()),
        ("--grpc-port", grpc.port().to_string()),
        ("--http-port", http.port().to_string()),
    ];
    let arguments: Vec<_> = arguments
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect();
    Running::start(&settings.pilot, &arguments, PROXY_CPU, log)
}

fn ready(what: &What) -> bool {
    matches!(what, What::Ready)
}

fn expected(what: &What) -> bool {
    matches!(what, What::Acknowledged { expected: true, .. })
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn measure(settings: &Settings, size: usize, progress: &mut Progress) -> anyhow::Result<Row> {
    let place = tempfile::tempdir()?;
    let folder = place.path().join("configuration");
    fs::create_dir(&folder)?;
    let scene = Scene {
        folder: &folder,
        size,
        endpoints: settings.endpoints,
    };
    scene.write(false)?;
    let grpc = free()?;
    let log = || place.path().join("pilot.log");
    let limit = settings.patience;

    progress.begin(&format!("{size} services and sidecars: connecting"));
    let mut process = pilot(settings, &folder, grpc, log())?;
    let mut fleet = Fleet::new(grpc)?;
    (0..size).for_each(|number| fleet.join(Scene::sidecar(number)));
    fleet.wait(size, limit, ready)?;
    process.check()?;
    fleet.run_for(REST);
    let resident = process.memory()?.resident as f64 / 1024.0;

    progress.begin(&format!("{size} services and sidecars: endpoint changes"));
    let clock = [process.clock()?];
    let (mut times, mut costs) = (Vec::new(), Vec::new());
    for change in 0..settings.changes {
        progress.round(change + 1, settings.changes);
        let service = (change * 7 + 3) % size;
        fleet.expect(&format!(
            "|svc-{service}.{}.svc.cluster.local",
            Scene::namespace(service)
        ));
        let before = CpuClock::sum(&clock)?;
        let begun = Instant::now();
        scene.slice(service, settings.endpoints - 1)?;
        let done = fleet.wait(size, limit, expected)?;
        let last = done.values().max().copied().unwrap_or(begun);
        times.push(milliseconds(last - begun));
        fleet.run_for(REST);
        costs.push((CpuClock::sum(&clock)? - before) as f64 / 1e6);
    }
    process.check()?;
    times.sort_by(f64::total_cmp);
    let p99 = times
        .get((times.len() * 99).div_ceil(100) - 1)
        .copied()
        .context("no change was made")?;

    progress.begin(&format!("{size} services and sidecars: a VirtualService"));
    let see = size.min(NAMESPACE);
    scene.route(5)?;
    fleet.expect("");
    fleet.wait(see, limit, |what| matches!(what, What::Acknowledged { .. }))?;
    fleet.run_for(REST);
    let begun = Instant::now();
    scene.route(6)?;
    let done = fleet.wait(see, limit, |what| matches!(what, What::Acknowledged { .. }))?;
    let route = milliseconds(done.values().max().copied().unwrap_or(begun) - begun);
    // Whoever else is told something is told it now.
    let others = fleet.run_for(REST * 4);
    let told = done
        .keys()
        .copied()
        .chain(others.iter().map(|event| event.client))
        .collect::<std::collections::BTreeSet<_>>()
        .len();
    let bytes = others
        .iter()
        .map(|event| match event.what {
            What::Acknowledged {
                bytes, resources, ..
            } if resources > 0 => bytes,
            _ => 0,
        })
        .sum();

    progress.begin(&format!("{size} services and sidecars: cold start"));
    drop(process);
    fleet.run_for(REST);
    let begun = Instant::now();
    let process = pilot(settings, &folder, grpc, log())?;
    let done = fleet.wait(size, limit, ready)?;
    let cold = done.values().max().copied().unwrap_or(begun) - begun;
    drop(process);
    drop(fleet);

    progress.begin(&format!("{size} services and sidecars: scoped"));
    scene.write(true)?;
    let grpc = free()?;
    let process = pilot(settings, &folder, grpc, log())?;
    let mut fleet = Fleet::new(grpc)?;
    let half = size / 2;
    (0..half).for_each(|number| fleet.join(Scene::sidecar(number)));
    fleet.wait(half, limit, ready)?;
    fleet.run_for(REST);
    let before = process.memory()?.resident;
    (half..size).for_each(|number| fleet.join(Scene::sidecar(number)));
    fleet.wait(size - half, limit, ready)?;
    fleet.run_for(REST);
    let each = process.memory()?.resident.saturating_sub(before) as f64 / (size - half) as f64;
    Ok(Row {
        size,
        half: median(&times),
        figures: [
            p99,
            median(&costs),
            route,
            cold.as_secs_f64(),
            resident,
            each,
        ],
        told: (told, see),
        bytes,
    })
}

/// Runs all sizes, prints, and writes the document's part.
pub(crate) fn run(settings: &Settings, document: Option<&Path>) -> anyhow::Result<()> {
    anyhow::ensure!(
        settings.pilot.is_file(),
        "{} is not there",
        settings.pilot.display()
    );
    anyhow::ensure!(
        settings.changes > 0
            && settings.endpoints > 1
            && settings.sizes.iter().all(|size| *size > 1),
        "there must be changes, two endpoints and two services"
    );
    use_processor(LOAD_CPU)?;
    let mut progress = Progress::new(settings.sizes.len() * 5);
    let mut rows: Vec<Row> = Vec::new();
    let mut failures = Vec::new();
    for size in &settings.sizes {
        match measure(settings, *size, &mut progress) {
            Ok(row) => {
                progress.say(&line(&row));
                rows.push(row);
            }
            Err(e) => {
                let failure = format!("{size} services and sidecars: {e:#}");
                progress.say(&failure);
                failures.push(failure);
            }
        }
    }
    progress.end();
    let table = table(settings, &rows, &failures);
    println!("{table}");
    if let Some(file) = document {
        write(&rows, &table, file)?;
    }
    anyhow::ensure!(failures.is_empty(), "not measured: {}", failures.join("; "));
    Ok(())
}

fn line(row: &Row) -> String {
    let [p99, cost, route, cold, resident, each] = row.figures;
    format!(
        "{}: endpoints p50 {:.0} ms, p99 {p99:.0} ms, CPU {cost:.1} ms; VirtualService {route:.0} ms, {} told of {} that see it, \
         {} bytes later; cold start {cold:.1} s; {resident:.0} MiB; {each:.0} KiB a scoped sidecar",
        row.size, row.half, row.told.0, row.told.1, row.bytes
    )
}

const BEGIN: &str = "<!-- Made by `make bench-pilot` from here -->";
const END: &str = "<!-- `make bench-pilot` to here -->";

fn table(settings: &Settings, rows: &[Row], failures: &[String]) -> String {
    let mut table = String::from("| |");
    rows.iter()
        .for_each(|row| table += &format!(" {} |", row.size));
    table += " goal |\n|---|";
    table += &"---|".repeat(rows.len() + 1);
    table += "\n| ms until an endpoint change is acknowledged by all, p50 |";
    rows.iter()
        .for_each(|row| table += &format!(" {:.0} |", row.half));
    table += " |\n";
    for (index, (title, goal)) in GOALS.iter().enumerate() {
        table += &format!("| {title} |");
        for row in rows {
            let value = row.figures.get(index).copied().unwrap_or(f64::NAN);
            let missed = if value <= *goal { "" } else { " ✗" };
            table += &format!(" {value:.1}{missed} |");
        }
        table += &format!(" ≤ {goal:.0} |\n");
    }
    table += "| sidecars told of the VirtualService / that see it |";
    rows.iter()
        .for_each(|row| table += &format!(" {} / {} |", row.told.0, row.told.1));
    table += &format!(
        " |\n\nColumns: services, and as many sidecars; {} endpoints a service; {} endpoint changes, one after the other.\n",
        settings.endpoints, settings.changes
    );
    for failure in failures {
        table += &format!("\nNot measured: `{}`\n", failure.replace(['\n', '`'], " "));
    }
    table
}

fn write(rows: &[Row], table: &str, file: &Path) -> anyhow::Result<()> {
    let plots = file.with_extension("");
    fs::create_dir_all(&plots)?;
    let points: Vec<_> = rows
        .iter()
        .map(|row| (row.size, row.figures[0], row.figures[1]))
        .collect();
    fs::write(plots.join("pilot.svg"), plot::growth(&points))?;
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let (before, rest) = text
        .split_once(BEGIN)
        .context("no place for Pilot's table")?;
    let (_, after) = rest.split_once(END).context("no end of Pilot's table")?;
    fs::write(
        file,
        format!("{before}{BEGIN}\n\n![Growth](benchmarks/pilot.svg)\n\n{table}\n{END}{after}"),
    )?;
    Ok(())
}
