//! The file of a guest, looked at again and again: a new program takes over when it is ready.

use std::{path::Path, sync::Arc, time::Duration};

use lateen_adapter::{Env, Template};
use tokio::{sync::oneshot, time::MissedTickBehavior};

use crate::{
    Programs,
    copies::Copies,
    handler::Guest,
    params::Params,
    program::{Source, Stamp},
};

/// How often files are looked at.
const INTERVAL: Duration = Duration::from_secs(1);

/// Watches the file of one handler.
pub(crate) struct Watch {
    pub(crate) programs: Programs,
    pub(crate) templates: Vec<&'static Template>,
    pub(crate) guest: Arc<Guest>,
    /// The state of the file when it was last read, whether that went well or not.
    pub(crate) seen: Stamp,
    /// The bytes that run.
    pub(crate) sha256: [u8; 32],
    pub(crate) params: Params,
}

impl Watch {
    /// Until the handler is closed.
    pub(crate) async fn run(mut self, env: Env) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let Ok(metadata) = tokio::fs::metadata(&self.params.file).await else {
                continue; // being replaced, or gone: what runs goes on
            };
            let stamp = Stamp::from(&metadata);
            if stamp == self.seen {
                continue;
            }
            self.seen = stamp;
            let before = self.guest.copies.load_full();
            let counts = &before.setting().counts;
            match self.reload(&env, &before).await {
                Ok(None) => {}
                Ok(Some((copies, sha256))) => {
                    counts.reloads.inc();
                    tracing::info!(file = %self.file(), sha256 = hex::encode(sha256), "the guest is replaced");
                    self.sha256 = sha256;
                    self.guest.copies.store(Arc::new(copies));
                }
                Err(reason) => {
                    counts.failed_reloads.inc();
                    tracing::error!(file = %self.file(), reason, "the new guest is refused; the one before goes on");
                }
            }
        }
    }

    fn file(&self) -> std::path::Display<'_> {
        Path::display(&self.params.file)
    }

    /// The program in the file, started; `None`: it is the one that runs.
    async fn reload(
        &self,
        env: &Env,
        before: &Arc<Copies>,
    ) -> Result<Option<(Copies, [u8; 32])>, String> {
        let (tell, told) = oneshot::channel();
        let (params, running) = (self.params.clone(), self.sha256);
        let (programs, templates) = (self.programs.clone(), self.templates.clone());
        let setting = Arc::clone(before.setting());
        let work = move || {
            let started = || {
                let source = Source::read(&params.file, params.sha256)?;
                if source.sha256 == running {
                    return Ok(None);
                }
                let program = programs.get(&source, &templates)?;
                Ok(Some((Copies::start(program, setting)?, source.sha256)))
            };
            // The handler may have been closed meanwhile.
            drop(tell.send(started()));
        };
        env.spawn_blocking(work).map_err(|e| e.to_string())?;
        told.await
            .map_err(|_| "compiling it failed".to_owned())
            .flatten()
    }
}
