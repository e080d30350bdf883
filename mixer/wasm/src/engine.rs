//! The compiler and runtime that all guests share, and the clock that interrupts them.

use std::{
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread::Thread,
    time::Duration,
};

use wasmtime::{Config, Engine, OptLevel, component::Linker};

use crate::copies::State;

/// A guest that computes gives way to others so often.
const TICK: Duration = Duration::from_millis(1);
/// Without a call for so many ticks, the ticker sleeps.
const IDLE_TICKS: u32 = 64;
/// Stack of a guest, in bytes.
const STACK_BYTES: usize = 512 << 10;

/// The one engine of the process.
pub(crate) struct Shared {
    pub(crate) engine: Engine,
    pub(crate) linker: Linker<State>,
    running: AtomicUsize,
    ticker: Thread,
}

static SHARED: LazyLock<Result<Shared, String>> = LazyLock::new(|| {
    let mut config = Config::new();
    config
        .wasm_component_model(true)
        .consume_fuel(true)
        .epoch_interruption(true)
        .cranelift_opt_level(OptLevel::Speed)
        .generate_address_map(false)
        .wasm_backtrace_max_frames(None)
        .max_wasm_stack(STACK_BYTES)
        .async_stack_size(STACK_BYTES * 4);
    let engine = Engine::new(&config).map_err(|e| format!("no WebAssembly here: {e:#}"))?;
    let mut linker = Linker::new(&engine);
    State::lend(&mut linker).map_err(|e| format!("no WebAssembly here: {e:#}"))?;
    let ticked = engine.clone();
    let ticker = std::thread::Builder::new()
        .name("wasm-ticker".to_owned())
        .spawn(move || tick(&ticked))
        .map_err(|e| format!("no thread for the clock of guests: {e}"))?;
    Ok(Shared {
        engine,
        linker,
        running: AtomicUsize::new(0),
        ticker: ticker.thread().clone(),
    })
});

impl Shared {
    /// # Errors
    /// When this machine cannot run guests.
    pub(crate) fn get() -> Result<&'static Self, String> {
        SHARED.as_ref().map_err(Clone::clone)
    }
}

/// A call under way: while there is one, the ticker runs.
pub(crate) struct Running(&'static Shared);

impl Running {
    pub(crate) fn begin(shared: &'static Shared) -> Self {
        shared.running.fetch_add(1, Ordering::AcqRel);
        shared.ticker.unpark(); // costs nothing while it is awake
        Self(shared)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::AcqRel);
    }
}

fn tick(engine: &Engine) {
    let mut idle_ticks = 0;
    loop {
        std::thread::sleep(TICK);
        engine.increment_epoch();
        // While `SHARED` is being made nobody runs.
        let running = LazyLock::get(&SHARED).and_then(|shared| shared.as_ref().ok());
        let is_idle = running.is_none_or(|shared| shared.running.load(Ordering::Acquire) == 0);
        idle_ticks = if is_idle { idle_ticks + 1 } else { 0 };
        if idle_ticks >= IDLE_TICKS {
            std::thread::park();
            idle_ticks = 0;
        }
    }
}
