//! The running copies of a program: how many there are, what each may use, and what becomes of one that fails.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use lateen_adapter::{Candidate, Clock, Counter, Env, HandlerError, wit};
use serde_json::Value as Json;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};
use wasmtime::{
    ResourceLimiter, Store, Trap,
    component::{ComponentExportIndex, Instance, Linker, Val},
};

use crate::{
    abi,
    engine::Running,
    params::Params,
    program::{Entry, Program},
};

/// What an answer may weigh in our memory, in bytes. Values of the component model are many times larger here
/// than in the guest, and a guest may say the same megabyte a thousand times.
const MAX_ANSWER_BYTES: usize = 4 << 20;
/// Elements of all tables of a copy together.
const MAX_TABLE_ELEMENTS: usize = 1 << 20;
/// Longest line of a guest in the log, in bytes.
const MAX_LINE_BYTES: usize = 1024;
/// Lines of a guest in the log, for each second of one copy.
const LINES_PER_SECOND: u32 = 10;

/// What happened to guests, as counters of the handler.
#[derive(Clone, Debug)]
pub(crate) struct Counts {
    pub(crate) traps: Counter,
    pub(crate) out_of_fuel: Counter,
    pub(crate) late: Counter,
    pub(crate) refused_memory: Counter,
    pub(crate) bad_answers: Counter,
    pub(crate) lines_dropped: Counter,
    pub(crate) reloads: Counter,
    pub(crate) failed_reloads: Counter,
}

impl Counts {
    pub(crate) fn new(env: &Env) -> Self {
        Self {
            traps: env.counter("guest_traps"),
            out_of_fuel: env.counter("guest_out_of_fuel"),
            late: env.counter("guest_late"),
            refused_memory: env.counter("guest_memory_refused"),
            bad_answers: env.counter("guest_bad_answers"),
            lines_dropped: env.counter("guest_log_lines_dropped"),
            reloads: env.counter("reloads"),
            failed_reloads: env.counter("reloads_failed"),
        }
    }
}

/// What all copies of a handler's guest have in common, whichever program they run.
pub(crate) struct Setting {
    handler: Arc<str>,
    /// The parameters and instance types, as `configure` gets them.
    configuration: [Val; 2],
    fuel: u64,
    memory_bytes: usize,
    copies: usize,
    pub(crate) timeout: std::time::Duration,
    pub(crate) counts: Counts,
    clock: Clock,
}

impl Setting {
    pub(crate) fn new(
        candidate: &Candidate<'_>,
        params: &Params,
        counts: Counts,
        clock: Clock,
    ) -> Self {
        let config = match &params.config {
            Json::Null => "{}".to_owned(),
            config => config.to_string(),
        };
        Self {
            handler: Arc::from(candidate.name),
            configuration: [
                Val::String(config),
                abi::instance_types(candidate.instances),
            ],
            fuel: params.fuel,
            memory_bytes: params.memory_bytes,
            copies: params.copies,
            timeout: params.timeout,
            counts,
            clock,
        }
    }
}

/// What a copy has besides its memory.
pub(crate) struct State {
    setting: Arc<Setting>,
    memory_bytes: usize,
    table_elements: usize,
    lines: u32,
    second: u64,
}

impl State {
    fn new(setting: Arc<Setting>) -> Self {
        Self {
            setting,
            memory_bytes: 0,
            table_elements: 0,
            lines: 0,
            second: 0,
        }
    }

    /// Makes the interface `host`.
    pub(crate) fn lend(linker: &mut Linker<Self>) -> wasmtime::Result<()> {
        let mut host = linker.instance(&wit::qualified("host"))?;
        host.func_new("log", |mut store, _, params, _| {
            if let [Val::Enum(level), Val::String(line)] = params {
                store.data_mut().log(level, line);
            }
            Ok(())
        })?;
        host.func_new("now", |store, _, _, results| {
            let now = store.data().setting.clock.now();
            if let [result] = results {
                *result = Val::U64(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
            }
            Ok(())
        })
    }

    fn log(&mut self, level: &str, line: &str) {
        let second = self.setting.clock.now().as_secs();
        if second != self.second {
            (self.second, self.lines) = (second, 0);
        }
        if self.lines >= LINES_PER_SECOND {
            self.setting.counts.lines_dropped.inc();
            return;
        }
        self.lines += 1;
        let end = line.floor_char_boundary(MAX_LINE_BYTES);
        let line = line.get(..end).unwrap_or_default();
        let handler = &*self.setting.handler;
        match level {
            "error" => tracing::error!(handler, line, "a guest says"),
            "warn" => tracing::warn!(handler, line, "a guest says"),
            "info" => tracing::info!(handler, line, "a guest says"),
            _ => tracing::debug!(handler, line, "a guest says"),
        }
    }
}

impl ResourceLimiter for State {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let all = self
            .memory_bytes
            .saturating_add(desired.saturating_sub(current));
        if all > self.setting.memory_bytes {
            self.setting.counts.refused_memory.inc();
            return Ok(false);
        }
        self.memory_bytes = all;
        Ok(true)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let all = self
            .table_elements
            .saturating_add(desired.saturating_sub(current));
        if all > MAX_TABLE_ELEMENTS {
            self.setting.counts.refused_memory.inc();
            return Ok(false);
        }
        self.table_elements = all;
        Ok(true)
    }
}

/// One copy.
struct Copy {
    store: Store<State>,
    instance: Instance,
}

/// The copies of one program.
pub(crate) struct Copies {
    program: Arc<Program>,
    setting: Arc<Setting>,
    slots: Semaphore,
    idle: Mutex<Vec<Copy>>,
}

impl fmt::Debug for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Copies").finish_non_exhaustive()
    }
}

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error("the guest did not answer in time")]
    Late,
    #[error("the guest computed more than its fuel allows")]
    OutOfFuel,
    #[error("the guest failed: {0}")]
    Trapped(String),
    #[error("the guest's answer cannot be read: {0}")]
    BadAnswer(String),
    #[error("{0}")]
    Said(String),
}

impl CallError {
    /// As the handler's failure. No `From`: a second one would make `?` in closures of other crates ambiguous.
    pub(crate) fn told(self) -> HandlerError {
        HandlerError::unavailable(self.to_string())
    }
}

impl Copies {
    /// The copies of `program`, the first of which says what it thinks of the configuration.
    pub(crate) fn start(program: Arc<Program>, setting: Arc<Setting>) -> Result<Self, String> {
        let copies = Self {
            slots: Semaphore::new(setting.copies),
            program,
            setting,
            idle: Mutex::default(),
        };
        // A guest waits for nothing but its turn, so this is the guest's own time, which fuel bounds.
        let first = futures::executor::block_on(copies.copy()).map_err(|e| e.to_string())?;
        copies.give_back(first);
        Ok(copies)
    }

    pub(crate) fn setting(&self) -> &Arc<Setting> {
        &self.setting
    }

    pub(crate) fn program(&self) -> &Program {
        &self.program
    }

    /// Calls the guest with an instance (or several) of `entry`'s template. When the call is dropped, so is the copy.
    pub(crate) async fn call(
        &self,
        entry: &Entry,
        params: &[Val],
        deadline: Instant,
    ) -> Result<Val, CallError> {
        let deadline = deadline.min(Instant::now() + self.setting.timeout);
        let work = async {
            let _slot = self.slots.acquire().await.map_err(|_| CallError::Late)?;
            let _running = Running::begin(self.program.shared);
            let idle = self.idle().pop();
            let mut copy = match idle {
                Some(copy) => copy,
                None => self.copy().await?,
            };
            let answer = self.run(&mut copy, &entry.handle, params).await?;
            self.give_back(copy);
            Ok(answer)
        };
        let answer = timeout_at(deadline, work)
            .await
            .unwrap_or(Err(CallError::Late));
        let counts = &self.setting.counts;
        match &answer {
            Err(CallError::Late) => counts.late.inc(),
            Err(CallError::OutOfFuel) => counts.out_of_fuel.inc(),
            Err(CallError::Trapped(_)) => counts.traps.inc(),
            Err(CallError::BadAnswer(_)) => counts.bad_answers.inc(),
            Err(CallError::Said(_)) | Ok(_) => {}
        }
        answer
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Copy>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a copy for the next call, unless it has grown so much that it will soon be refused more memory.
    fn give_back(&self, copy: Copy) {
        if copy.store.data().memory_bytes <= self.setting.memory_bytes / 4 * 3 {
            self.idle().push(copy);
        }
    }

    /// A new copy, configured.
    async fn copy(&self) -> Result<Copy, CallError> {
        let _running = Running::begin(self.program.shared);
        let mut store = Store::new(
            &self.program.shared.engine,
            State::new(Arc::clone(&self.setting)),
        );
        store.limiter(|state| state);
        store.epoch_deadline_async_yield_and_update(1);
        store.set_fuel(self.setting.fuel).map_err(trapped)?;
        store.set_hostcall_fuel(MAX_ANSWER_BYTES);
        let instance = self.program.instance.instantiate_async(&mut store).await;
        let instance = instance.map_err(trapped)?;
        let mut copy = Copy { store, instance };
        let configure = &self.program.configure;
        let answer = self.run(&mut copy, configure, &self.setting.configuration);
        match abi::configured(&answer.await?).map_err(CallError::BadAnswer)? {
            problems if problems.is_empty() => Ok(copy),
            problems => Err(CallError::Said(problems.join("; "))),
        }
    }

    async fn run(
        &self,
        copy: &mut Copy,
        function: &ComponentExportIndex,
        params: &[Val],
    ) -> Result<Val, CallError> {
        let Copy { store, instance } = copy;
        store.set_fuel(self.setting.fuel).map_err(trapped)?;
        store.set_hostcall_fuel(MAX_ANSWER_BYTES);
        store.set_epoch_deadline(1);
        let function = instance
            .get_func(&mut *store, function)
            .ok_or_else(|| CallError::Trapped("it has lost a function".to_owned()))?;
        let mut results = [Val::Bool(false)];
        function
            .call_async(&mut *store, params, &mut results)
            .await
            .map_err(trapped)?;
        let [answer] = results;
        Ok(answer)
    }
}

fn trapped(error: wasmtime::Error) -> CallError {
    match error.downcast_ref::<Trap>() {
        Some(Trap::OutOfFuel) => CallError::OutOfFuel,
        _ => CallError::Trapped(format!("{error:#}")),
    }
}
