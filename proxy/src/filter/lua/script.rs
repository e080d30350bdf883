//! A script, and its state in each worker.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    pin::pin,
    rc::Rc,
    sync::{Arc, Weak},
    task::Poll,
};

use mlua::{Function, HookTriggers, Lua, LuaOptions, StdLib, Value, VmState};

use super::run::{Handle, Run};

/// What one state may hold.
const MAX_MEMORY_BYTES: usize = 64 << 20;
/// Instructions of one run, about a tenth of a second.
const MAX_INSTRUCTIONS: u32 = 5_000_000;
/// Instructions between two looks at how many there were.
const LOOK: u32 = 10_000;

/// As in 5.1, and nothing of the machine.
const PRELUDE: &str = r#"
unpack = table.unpack
math.pow = math.pow or function(a, b) return a ^ b end
local load_any = load
load = function(chunk, name, mode, ...) return load_any(chunk, name, "t", ...) end
loadstring = function(text, name) return load(text, name) end
dofile, loadfile, require, collectgarbage = nil, nil, nil, nil
string.dump = nil
os = { time = os.time, date = os.date, clock = os.clock, difftime = os.difftime }
"#;

/// Which way the stream goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Request,
    Response,
}

/// A script that was loaded once without a fault.
#[derive(Debug)]
pub(crate) struct Script {
    code: String,
    request: bool,
    response: bool,
    /// It may wait for a body or an answer.
    pub(super) waits: bool,
}

/// The script in one worker. Streams share it and its globals, as with Envoy.
struct State {
    lua: Lua,
    request: Option<Function>,
    response: Option<Function>,
    /// Instructions that the run at work has left.
    left: Rc<Cell<u32>>,
}

thread_local! {
    /// The states of this worker's scripts; those of scripts that are gone are dropped when another comes.
    static STATES: RefCell<Vec<(Weak<Script>, Rc<State>)>> = const { RefCell::new(Vec::new()) };
}

impl Script {
    /// Loads a script to see whether it can be.
    pub(super) fn compile(code: &str) -> Result<Arc<Script>, String> {
        let state = State::load(code).map_err(|error| error.to_string())?;
        let waits = ["body", "httpCall", "trailers"];
        Ok(Arc::new(Script {
            code: code.to_owned(),
            request: state.request.is_some(),
            response: state.response.is_some(),
            waits: waits.iter().any(|word| code.contains(word)),
        }))
    }

    pub(super) fn has(&self, side: Side) -> bool {
        match side {
            Side::Request => self.request,
            Side::Response => self.response,
        }
    }

    /// Runs the function of one side until it ends, answers or fails.
    ///
    /// # Errors
    /// The script's.
    pub(super) async fn run(self: &Arc<Self>, side: Side, run: &Rc<Run>) -> mlua::Result<()> {
        let state = self.state()?;
        let function = match side {
            Side::Request => state.request.clone(),
            Side::Response => state.response.clone(),
        };
        let Some(function) = function else {
            return Ok(());
        };
        let thread = state.lua.create_thread(function)?;
        let mut running = pin!(thread.into_async::<()>(Handle(run.clone()))?);
        let mut left = MAX_INSTRUCTIONS;
        std::future::poll_fn(|cx| {
            state.left.set(left);
            let polled = running.as_mut().poll(cx);
            left = state.left.get();
            // Who has answered does not come back.
            match polled {
                Poll::Pending if run.has_answered() => Poll::Ready(Ok(())),
                polled => polled,
            }
        })
        .await
    }

    fn state(self: &Arc<Self>) -> mlua::Result<Rc<State>> {
        let own = Arc::as_ptr(self);
        let found = STATES.with_borrow(|states| {
            let mut states = states.iter();
            let found = states.find(|(script, _)| std::ptr::eq(script.as_ptr(), own));
            found.map(|(_, state)| state.clone())
        });
        if let Some(state) = found {
            return Ok(state);
        }
        let state = Rc::new(State::load(&self.code)?);
        STATES.with_borrow_mut(|states| {
            states.retain(|(script, _)| script.strong_count() > 0);
            states.push((Arc::downgrade(self), state.clone()));
        });
        Ok(state)
    }
}

impl State {
    fn load(code: &str) -> mlua::Result<State> {
        let libraries = StdLib::STRING
            | StdLib::TABLE
            | StdLib::MATH
            | StdLib::BIT
            | StdLib::COROUTINE
            | StdLib::OS;
        let lua = Lua::new_with(libraries, LuaOptions::default())?;
        lua.set_memory_limit(MAX_MEMORY_BYTES)?;
        lua.load(PRELUDE).set_name("=prelude").exec()?;
        let print = lua.create_function(|_, text: mlua::Variadic<String>| {
            tracing::info!("script log: {}", text.join("\t"));
            Ok(())
        })?;
        lua.globals().set("print", print)?;
        let left = Rc::new(Cell::new(MAX_INSTRUCTIONS));
        let counted = left.clone();
        lua.set_global_hook(
            HookTriggers::new().every_nth_instruction(LOOK),
            move |_, _| match counted.get().checked_sub(LOOK) {
                Some(rest) => {
                    counted.set(rest);
                    Ok(VmState::Continue)
                }
                None => Err(mlua::Error::runtime("the script runs for too long")),
            },
        )?;
        lua.load(code).set_name("=script").exec()?;
        let function = |name: &str| match lua.globals().get(name)? {
            Value::Function(function) => Ok(Some(function)),
            Value::Nil => Ok(None),
            _ => Err(mlua::Error::runtime(format!("{name} is no function"))),
        };
        Ok(State {
            request: function("envoy_on_request")?,
            response: function("envoy_on_response")?,
            lua,
            left,
        })
    }
}
