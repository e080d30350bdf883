//! Mixer adapters that are WebAssembly components.
//!
//! A handler of adapter `wasm` names a file. It is compiled when the configuration is loaded ([`program`]), held
//! against the interfaces of the templates ([`interface`]) and run in a few copies ([`copies`]), each with a memory
//! of its own, so much fuel and time for a call, and nothing to reach the world with but a log and a clock.
//! Instances and answers cross over as values of the component model ([`abi`]). When the file changes, calls go to
//! the new program as soon as it is ready ([`watch`]); one that is not as it should be changes nothing.
//!
//! A guest that traps, loops or wants too much memory fails that call, which is settled by its rule's fail mode, and
//! loses that copy. It cannot take a thread: it gives way to others each millisecond.

mod params;
mod engine;
mod program;
mod interface;
mod copies;
pub mod abi;
mod handler;
mod watch;
#[cfg(feature = "testing")]
pub mod testing;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use arc_swap::ArcSwap;
use lateen_adapter::{
    Adapter, BuildError, Candidate, Env, Handler, Info, Template, Variety, params as parse,
    template,
};

use self::{
    copies::{Copies, Counts, Setting},
    handler::Guest,
    params::Params,
    program::{Program, Source},
    watch::Watch,
};

/// The adapter.
#[derive(Clone, Default)]
pub struct Wasm {
    programs: Programs,
}

impl fmt::Debug for Wasm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wasm")
    }
}

/// Programs that handlers use, by the hash of their file and what they are to take: a handler that is built anew
/// because its instances changed need not wait for the compiler.
#[derive(Clone, Default)]
struct Programs(Arc<Mutex<HashMap<[u8; 32], Weak<Program>>>>);

impl Programs {
    fn get(
        &self,
        source: &Source,
        templates: &[&'static Template],
    ) -> Result<Arc<Program>, String> {
        let known = |program: &Weak<Program>| program.upgrade();
        let mut programs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = programs.get(&source.sha256).and_then(known);
        if let Some(program) = found.filter(|p| p.knows(templates)) {
            return Ok(program);
        }
        drop(programs); // compiling takes its time
        let program = Arc::new(Program::compile(source, templates)?);
        programs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        programs.retain(|_, program| program.strong_count() > 0);
        programs.insert(source.sha256, Arc::downgrade(&program));
        Ok(program)
    }
}

impl Adapter for Wasm {
    fn info(&self) -> Info {
        Info {
            name: "wasm",
            description: "runs a WebAssembly component",
            templates: template::ALL,
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        let params = parse::parse::<Params>(candidate.params).and_then(Params::checked);
        params.err().into_iter().collect()
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let params = parse::parse::<Params>(candidate.params)
            .and_then(Params::checked)
            .map_err(BuildError)?;
        let templates = templates(candidate);
        let source = Source::read(&params.file, params.sha256).map_err(BuildError)?;
        let setting = Setting::new(candidate, &params, Counts::new(&env), env.clock().clone());
        let program = self.programs.get(&source, &templates).map_err(BuildError)?;
        let (used, copies) = (program, Arc::new(setting));
        let copies = Copies::start(used, Arc::clone(&copies)).map_err(BuildError)?;
        let guest = Arc::new(Guest::new(ArcSwap::from_pointee(copies)));
        let watch = Watch {
            programs: self.programs.clone(),
            templates: templates.clone(),
            guest: Arc::clone(&guest),
            seen: source.stamp,
            sha256: source.sha256,
            params,
        };
        env.spawn(watch.run(env.clone()))
            .map_err(|e| BuildError(e.to_string()))?;
        Ok(handler(guest, &templates))
    }
}

/// The templates of the instances that will come.
fn templates(candidate: &Candidate<'_>) -> Vec<&'static Template> {
    let mut templates: Vec<&'static Template> = Vec::new();
    for instance in candidate.instances {
        let known = template::find(instance.template);
        templates.extend(known.filter(|t| templates.iter().all(|other| other.name != t.name)));
    }
    templates
}

/// What `guest` does for `templates`.
fn handler(guest: Arc<Guest>, templates: &[&'static Template]) -> Handler {
    let mut handler = Handler::new();
    for template in templates {
        let guest = Arc::clone(&guest);
        handler = match template.variety {
            Variety::Check => handler.with_check(guest),
            Variety::CheckWithOutput => handler.with_check_output(guest),
            Variety::Report => handler.with_report(guest),
            Variety::Quota => handler.with_quota(guest),
            Variety::AttributeGenerator => handler.with_generate(guest),
        };
    }
    handler
}
