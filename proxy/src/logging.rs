//! The process's own log, on standard error; its level can be changed while running (`/logging`).

use std::{
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
};

use tracing_subscriber::{
    EnvFilter, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt,
};

/// Changes the level. Clones are the same log.
#[derive(Clone)]
pub struct Logging {
    handle: Option<reload::Handle<EnvFilter, Registry>>,
    level: Arc<Mutex<String>>,
}

impl Logging {
    /// Starts logging.
    ///
    /// # Errors
    /// The level does not parse, or somebody started before.
    pub fn start(level: &str, json: bool) -> Result<Logging, String> {
        let (filter, handle) = reload::Layer::new(parse(level)?);
        let ansi = io::IsTerminal::is_terminal(&io::stderr());
        let format = tracing_subscriber::fmt::layer()
            .with_writer(io::stderr)
            .with_ansi(ansi);
        let started = match json {
            true => tracing_subscriber::registry()
                .with(filter)
                .with(format.json().flatten_event(true))
                .try_init(),
            false => tracing_subscriber::registry()
                .with(filter)
                .with(format)
                .try_init(),
        };
        started.map_err(|e| e.to_string())?;
        Ok(Logging {
            handle: Some(handle),
            level: Arc::new(Mutex::new(level.to_owned())),
        })
    }

    /// For tests: changes nothing.
    pub fn none() -> Logging {
        Logging {
            handle: None,
            level: Arc::new(Mutex::new("off".to_owned())),
        }
    }

    /// The level last set.
    pub fn level(&self) -> String {
        self.level
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Sets the level: Envoy's word, or `target=level` pairs.
    ///
    /// # Errors
    /// It does not parse.
    pub fn set(&self, level: &str) -> Result<(), String> {
        let filter = parse(level)?;
        if let Some(handle) = &self.handle {
            handle.reload(filter).map_err(|e| e.to_string())?;
        }
        *self.level.lock().unwrap_or_else(PoisonError::into_inner) = level.to_owned();
        Ok(())
    }
}

impl fmt::Debug for Logging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Logging({})", self.level())
    }
}

/// Envoy says `warning` and `critical`.
fn parse(level: &str) -> Result<EnvFilter, String> {
    let ours = match level {
        "warning" => "warn",
        "critical" => "error",
        other => other,
    };
    EnvFilter::try_new(ours).map_err(|e| format!("{level:?} is no log level: {e}"))
}
