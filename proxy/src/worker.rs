//! Workers: threads that accept connections and serve them, each with a single-threaded runtime and its own
//! socket (`SO_REUSEPORT`). Nothing on one worker waits for another.

use std::{
    collections::HashMap,
    io,
    net::{SocketAddr, TcpListener as StdListener},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use arc_swap::ArcSwap;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::TcpListener,
    runtime::{Builder, LocalOptions, LocalRuntime},
    sync::{mpsc, watch},
    time::Instant,
};

use crate::{
    config_error::ConfigError,
    listener::Listener,
    mixer,
    proto::invalid,
    shared::Shared,
    stats::{self, Gauge},
    trace,
};

/// The workers and their listeners. Owned by the main runtime; commands go to the threads.
#[derive(Debug)]
pub struct Workers {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    commands: Vec<mpsc::UnboundedSender<Command>>,
    active: Mutex<HashMap<Arc<str>, Active>>,
    listeners: Gauge,
}

/// A listener in service.
#[derive(Debug)]
struct Active {
    current: Arc<ArcSwap<Listener>>,
    addresses: Vec<SocketAddr>,
    /// Dropped to make all workers stop accepting.
    _accepting: watch::Sender<()>,
}

/// What the main runtime tells a worker. Unbounded channels: commands are as many as configuration changes.
#[derive(Debug)]
enum Command {
    Accept {
        socket: StdListener,
        listener: Arc<ArcSwap<Listener>>,
        accepting: watch::Receiver<()>,
    },
    Stop,
}

impl Workers {
    /// Starts `concurrency` workers (at least one).
    ///
    /// # Errors
    /// When a thread or runtime cannot be made.
    pub fn start(concurrency: usize, shared: Arc<Shared>) -> io::Result<Workers> {
        let mut threads = Vec::new();
        let mut commands = Vec::new();
        for index in 0..concurrency.max(1) {
            let (sender, receiver) = mpsc::unbounded_channel();
            // The runtime never leaves its thread, so it is made there.
            let (started, starting) = std::sync::mpsc::sync_channel(1);
            threads.push(
                std::thread::Builder::new()
                    .name(format!("wrk:{index}"))
                    .spawn(move || {
                        stats::set_worker(index);
                        match runtime() {
                            Ok(runtime) => {
                                drop(started.send(Ok(())));
                                runtime.block_on(run(receiver));
                            }
                            Err(error) => drop(started.send(Err(error))),
                        }
                    })?,
            );
            starting.recv().map_err(io::Error::other)??;
            commands.push(sender);
        }
        let scope = shared.stats.scope("listener_manager.");
        scope.gauge("workers_started").set(1);
        Ok(Workers {
            threads: Mutex::new(threads),
            commands,
            active: Mutex::default(),
            listeners: scope.gauge("total_listeners_active"),
            shared,
        })
    }

    /// Puts a listener into service. One of the same name is replaced: with the same addresses, new
    /// connections simply find the new filter chains; otherwise the old one drains.
    ///
    /// # Errors
    /// When an address cannot be bound; then the old listener stays.
    pub fn add_listener(&self, listener: Arc<Listener>) -> Result<(), ConfigError> {
        let mut active = self.lock();
        let wanted: Vec<SocketAddr> = if listener.bind_to_port {
            listener.addresses().collect()
        } else {
            Vec::new()
        };
        if let Some(present) = active.get(&listener.name) {
            let old = present.current.load();
            let same = old.bind_to_port == listener.bind_to_port
                && old.address == listener.address
                && old.additional == listener.additional
                && old.transparent == listener.transparent;
            if same {
                let old = present.current.swap(listener);
                old.drain.start();
                return Ok(());
            }
        }
        let mut sockets = Vec::new();
        for address in wanted {
            let bound = bind_all(address, &listener, self.commands.len()).map_err(|error| {
                invalid(
                    format!("listener {}", listener.name),
                    format!("cannot bind '{address}': {error}"),
                )
            })?;
            sockets.push(bound);
        }
        let (accepting, receiver) = watch::channel(());
        let current = Arc::new(ArcSwap::new(listener.clone()));
        let mut addresses = Vec::new();
        for per_worker in sockets {
            if let Some(address) = per_worker
                .first()
                .and_then(|socket| socket.local_addr().ok())
            {
                addresses.push(address);
            }
            for (worker, socket) in self.commands.iter().zip(per_worker) {
                let command = Command::Accept {
                    socket,
                    listener: current.clone(),
                    accepting: receiver.clone(),
                };
                if worker.send(command).is_err() {
                    return Err(invalid(
                        format!("listener {}", listener.name),
                        "the workers have stopped",
                    ));
                }
            }
        }
        let replaced = active.insert(
            listener.name.clone(),
            Active {
                current,
                addresses,
                _accepting: accepting,
            },
        );
        if let Some(replaced) = replaced {
            replaced.current.load().drain.start();
        }
        self.publish(&active);
        Ok(())
    }

    /// Takes a listener out of service: it stops accepting at once, its connections drain. Whether there
    /// was one.
    pub fn remove_listener(&self, name: &str) -> bool {
        let mut active = self.lock();
        let removed = active.remove(name);
        self.publish(&active);
        match removed {
            Some(removed) => {
                removed.current.load().drain.start();
                true
            }
            None => false,
        }
    }

    /// Stops accepting on all listeners and drains their connections.
    pub fn drain_all(&self) {
        let mut active = self.lock();
        for (_, removed) in active.drain() {
            removed.current.load().drain.start();
        }
        self.publish(&active);
    }

    /// Says which listeners there are.
    fn publish(&self, active: &HashMap<Arc<str>, Active>) {
        self.listeners.set(active.len() as u64);
        let mut all: Vec<_> = active.iter().collect();
        all.sort_by_key(|(name, _)| *name);
        let currents = all.into_iter().map(|(_, active)| &active.current);
        self.shared.destinations.set(currents);
    }

    /// The listeners in service, by name.
    pub fn listeners(&self) -> Vec<Arc<Listener>> {
        let mut all: Vec<_> = self
            .lock()
            .values()
            .map(|active| active.current.load_full())
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Where a listener is bound (port 0 resolved).
    pub fn addresses(&self, name: &str) -> Vec<SocketAddr> {
        self.lock()
            .get(name)
            .map(|active| active.addresses.clone())
            .unwrap_or_default()
    }

    /// Ends the workers: connections that are still open are cut. Waits for the threads and for the
    /// access logs.
    pub fn stop(&self) {
        const LOGS: Duration = Duration::from_secs(5);
        self.drain_all();
        for worker in &self.commands {
            // A worker that has ended needs no telling.
            drop(worker.send(Command::Stop));
        }
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a worker panicked");
            }
        }
        crate::access_log::flush(LOGS);
    }

    /// Number of connections that are open on all workers.
    pub fn active(&self) -> u64 {
        let mut open = 0;
        self.shared.stats.each(|scope, name, instrument| {
            if scope.starts_with("listener.")
                && name == "downstream_cx_active"
                && let stats::Instrument::Gauge(gauge) = instrument
            {
                open += gauge.value();
            }
        });
        open
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop();
    }
}

/// One socket per worker on the same address.
fn bind_all(
    address: SocketAddr,
    listener: &Listener,
    workers: usize,
) -> io::Result<Vec<StdListener>> {
    let mut sockets = Vec::with_capacity(workers);
    let mut address = address;
    for _ in 0..workers {
        let socket = bind(address, listener.backlog, listener.transparent)?;
        // Port 0 is chosen once; the others join it.
        address = socket.local_addr()?;
        sockets.push(socket);
    }
    Ok(sockets)
}

fn bind(address: SocketAddr, backlog: u32, transparent: bool) -> io::Result<StdListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if transparent {
        make_transparent(&socket, address)?;
    }
    socket.set_nonblocking(true)?;
    // What is accepted inherits it from the socket it was accepted on, as on Linux any option of TCP.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
    Ok(socket.into())
}

/// Lets a socket accept connections to addresses that are not the machine's, which TPROXY hands it.
fn make_transparent(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    let set = match address {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true),
        SocketAddr::V6(_) => socket.set_ip_transparent_v6(true),
    };
    set.map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => io::Error::new(
            error.kind(),
            "a transparent socket needs the capability CAP_NET_ADMIN or CAP_NET_RAW; give it to the proxy, or \
             intercept with REDIRECT instead of TPROXY",
        ),
        _ => error,
    })
}

/// One thread's runtime: its tasks never leave it, so waking one takes neither lock nor atomic queue.
fn runtime() -> io::Result<LocalRuntime> {
    Builder::new_current_thread()
        .enable_all()
        // Looking for events is a system call: not more often than every some hundred microseconds of work.
        .event_interval(128)
        .build_local(LocalOptions::default())
}

async fn run(mut commands: mpsc::UnboundedReceiver<Command>) {
    /// A stop waits no longer than this for a trace collector and for Mixer.
    const LAST_WORDS: Duration = Duration::from_secs(1);
    while let Some(command) = commands.recv().await {
        match command {
            Command::Accept {
                socket,
                listener,
                accepting,
            } => {
                tokio::task::spawn_local(accept(socket, listener, accepting));
            }
            Command::Stop => {
                tokio::join!(trace::flush(LAST_WORDS), mixer::flush(LAST_WORDS));
                return;
            }
        }
    }
}

/// Accepts until the sender of `accepting` is dropped.
async fn accept(
    socket: StdListener,
    listener: Arc<ArcSwap<Listener>>,
    mut accepting: watch::Receiver<()>,
) {
    const OUT_OF_FILES: Duration = Duration::from_millis(100);
    /// Connections taken before those that are already open get their turn.
    const AT_ONCE: u32 = 16;
    let socket = match TcpListener::from_std(socket) {
        Ok(socket) => socket,
        Err(error) => {
            tracing::error!(%error, listener = %listener.load().name, "the socket cannot be used");
            return;
        }
    };
    let mut taken = 0;
    loop {
        if taken == AT_ONCE {
            taken = 0;
            tokio::task::yield_now().await;
        }
        // Cancel-safe: both lose nothing when dropped.
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            _ = accepting.changed() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                taken += 1;
                let listener = listener.load_full();
                tokio::task::spawn_local(listener.serve(stream, peer, Instant::now()));
            }
            Err(error) => {
                // Mostly a lack of file descriptors; accepting at once again would only burn the CPU.
                tracing::warn!(%error, listener = %listener.load().name, "cannot accept");
                tokio::time::sleep(OUT_OF_FILES).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn accepted_sockets_wait_for_no_acknowledgement() {
        let bound = bind("127.0.0.1:0".parse().unwrap(), 8, false).unwrap();
        let address = bound.local_addr().unwrap();
        let listener = TcpListener::from_std(bound).unwrap();
        let (near, far) = tokio::join!(tokio::net::TcpStream::connect(address), listener.accept());
        let (accepted, peer) = far.unwrap();
        assert!(accepted.nodelay().unwrap());
        assert_eq!(peer, near.unwrap().local_addr().unwrap());
    }
}
