//! Runs scripts over requests and responses. Envoy: `envoy.filters.http.lua`.
//!
//! The language is Lua 5.2, whose numbers are those of the 5.1 that Envoy's LuaJIT has; `unpack`, `loadstring` and
//! `math.pow` are there as in 5.1, `setfenv`, `bit`, `ffi` and `jit` are not. What a script may take is bounded:
//! memory of each worker's state and instructions of each run. Nothing of the machine can be reached (no `io`, no
//! processes, no bytecode).

use std::{collections::HashMap, sync::Arc};

use lateen_protocols::envoy::{
    envoy::extensions::filters::http::lua::v3::{
        Lua as FilterProto, LuaPerRoute, lua_per_route::Override,
    },
    google::protobuf as pb,
};

use self::{
    run::{Head, Run},
    script::{Script, Side},
};
use crate::{
    body::Body,
    config_error::ConfigError,
    filter::{FilterContext, ResponseContext, RouteFilterConfig},
    head::{RequestHead, ResponseHead},
    info::ResponseFlags,
    proto::invalid,
    reject::Reject,
    route::data_source,
    stats::{Counter, Scope},
};

mod headers;
mod info;
mod run;
mod script;
#[cfg(test)]
mod tests;
mod values;

/// The filter of one connection manager.
#[derive(Debug)]
pub struct Lua {
    default: Option<Arc<Script>>,
    named: HashMap<String, Arc<Script>>,
    context: Arc<pb::Struct>,
    clear_route_cache: bool,
    errors: Counter,
    executions: Counter,
}

/// What a route has in the filter's place.
#[derive(Debug)]
pub struct LuaRoute {
    what: Which,
    context: Arc<pb::Struct>,
}

#[derive(Debug)]
enum Which {
    /// The filter's own.
    Default,
    /// One of the filter's `source_codes`.
    Named(String),
    Own(Arc<Script>),
}

impl Lua {
    /// Compiles the filter, scripts and all; counts in `http.PREFIX.lua.`.
    ///
    /// # Errors
    /// When a script is no Lua, or fails when it is loaded.
    pub fn compile(config: &FilterProto, scope: &Scope) -> Result<Lua, ConfigError> {
        no_packages(&config.package_paths, &config.package_cpaths)?;
        let default = match (
            config.default_source_code.as_ref(),
            old_source(config).as_str(),
        ) {
            (Some(_), code) if !code.is_empty() => {
                return Err(invalid("inline_code", "given beside default_source_code"));
            }
            (Some(source), _) => {
                Some(compiled(source).map_err(|error| error.within("default_source_code"))?)
            }
            (None, "") => None,
            (None, code) => Some(Script::compile(code).map_err(|e| invalid("inline_code", e))?),
        };
        let named = config.source_codes.iter().map(|(name, source)| {
            let script = compiled(source)
                .map_err(|error| error.within(format_args!("source_codes[{name}]")))?;
            Ok((name.clone(), script))
        });
        let prefix = match config.stat_prefix.as_str() {
            "" => "lua.".to_owned(),
            prefix => format!("lua.{prefix}."),
        };
        Ok(Lua {
            default,
            named: named.collect::<Result<_, ConfigError>>()?,
            context: Arc::new(config.filter_context.clone().unwrap_or_default()),
            clear_route_cache: config.clear_route_cache.is_none_or(|flag| flag.value),
            errors: scope.counter(&format!("{prefix}errors")),
            executions: scope.counter(&format!("{prefix}executions")),
        })
    }

    /// The script for a stream, and its context.
    fn chosen(&self, own: Option<&RouteFilterConfig>) -> Option<(Arc<Script>, Arc<pb::Struct>)> {
        let Some(RouteFilterConfig::Lua(route)) = own else {
            return Some((self.default.clone()?, self.context.clone()));
        };
        let script = match &route.what {
            Which::Default => self.default.as_ref(),
            Which::Named(name) => self.named.get(name),
            Which::Own(script) => Some(script),
        };
        Some((script?.clone(), route.context.clone()))
    }

    /// Runs the script over a request.
    ///
    /// # Errors
    /// The answer that the script gave.
    pub(super) async fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        name: &str,
        head: &mut RequestHead,
        body: &mut Body,
    ) -> Result<(), Reject> {
        let Some((script, context)) = self.chosen(cx.config(head)) else {
            return Ok(());
        };
        if !script.has(Side::Request) {
            return Ok(());
        }
        let metadata = cx.route(head).and_then(|selected| {
            let all = &selected.route().metadata;
            all.get(name)
                .or_else(|| all.get("envoy.filters.http.lua"))
                .cloned()
        });
        let run = Run::new(
            Head::Request(head.clone()),
            std::mem::take(body),
            cx.shared.clone(),
            cx.info.clone(),
            metadata.unwrap_or_default(),
            context,
        );
        self.executions.inc();
        let outcome = script.run(Side::Request, &run).await;
        self.judge(outcome);
        let ended = run.end();
        *body = ended.body;
        if let Head::Request(changed) = ended.head
            && changed != *head
        {
            *head = changed;
            if self.clear_route_cache {
                cx.clear_route_cache();
            }
        }
        if ended.clear_route_cache {
            cx.clear_route_cache();
        }
        match ended.reply {
            Some(reply) => Err(reply),
            None => Ok(()),
        }
    }

    /// Whether the response's script may have to wait for something, so that it cannot run at once.
    pub(super) fn waits(&self, own: Option<&RouteFilterConfig>) -> bool {
        self.chosen(own)
            .is_some_and(|(script, _)| script.waits && script.has(Side::Response))
    }

    /// Runs the script over a response, as far as nothing has to be waited for.
    pub(super) fn on_response(
        &self,
        cx: &ResponseContext<'_>,
        name: &str,
        own: Option<&RouteFilterConfig>,
        head: &mut ResponseHead,
        body: &mut Body,
    ) {
        use futures::FutureExt as _;
        let run = self.run_response(cx, name, own, head, body);
        match run.now_or_never() {
            Some(Ok(())) => {}
            Some(Err(reply)) => {
                note(cx, &reply);
                (*head, *body) = reply.into_response(false);
            }
            None => {
                tracing::error!("script log: the script waits where it cannot");
                self.errors.inc();
            }
        }
    }

    /// Runs the script over a response.
    ///
    /// # Errors
    /// The answer that the script gave in its place.
    pub(super) async fn run_response(
        &self,
        cx: &ResponseContext<'_>,
        name: &str,
        own: Option<&RouteFilterConfig>,
        head: &mut ResponseHead,
        body: &mut Body,
    ) -> Result<(), Reject> {
        let Some((script, context)) = self.chosen(own) else {
            return Ok(());
        };
        if !script.has(Side::Response) {
            return Ok(());
        }
        let metadata = cx.route.and_then(|selected| {
            let all = &selected.route().metadata;
            all.get(name)
                .or_else(|| all.get("envoy.filters.http.lua"))
                .cloned()
        });
        let run = Run::new(
            Head::Response(head.clone()),
            std::mem::take(body),
            cx.shared.clone(),
            cx.info.clone(),
            metadata.unwrap_or_default(),
            context,
        );
        self.executions.inc();
        let outcome = script.run(Side::Response, &run).await;
        self.judge(outcome);
        let ended = run.end();
        *body = ended.body;
        if let Head::Response(changed) = ended.head {
            *head = changed;
        }
        match ended.reply {
            Some(reply) => Err(reply),
            None => Ok(()),
        }
    }

    /// A script that fails changes nothing more; the request goes on, as with Envoy.
    fn judge(&self, outcome: Result<(), mlua::Error>) {
        if let Err(error) = outcome {
            tracing::error!("script log: {error}");
            self.errors.inc();
        }
    }
}

/// Notes in the stream's facts that a script answered.
fn note(cx: &ResponseContext<'_>, reply: &Reject) {
    let mut info = cx.info.borrow_mut();
    info.flags.set(ResponseFlags::default());
    info.response_code = reply.status;
    info.response_code_details = reply.details.clone();
}

impl LuaRoute {
    /// Compiles a route's configuration.
    ///
    /// # Errors
    /// As [`Lua::compile`].
    pub fn compile(config: &LuaPerRoute) -> Result<RouteFilterConfig, ConfigError> {
        no_packages(&config.package_paths, &config.package_cpaths)?;
        let what = match config.r#override.as_ref() {
            Some(Override::Disabled(true)) => return Ok(RouteFilterConfig::Disabled),
            Some(Override::Disabled(false)) => {
                return Err(invalid("disabled", "may only be true"));
            }
            Some(Override::Name(name)) => Which::Named(name.clone()),
            Some(Override::SourceCode(source)) => {
                Which::Own(compiled(source).map_err(|error| error.within("source_code"))?)
            }
            None => Which::Default,
        };
        Ok(RouteFilterConfig::Lua(Arc::new(LuaRoute {
            what,
            context: Arc::new(config.filter_context.clone().unwrap_or_default()),
        })))
    }
}

#[allow(deprecated, reason = "configurations still have it")]
fn old_source(config: &FilterProto) -> String {
    config.inline_code.clone()
}

fn compiled(
    source: &lateen_protocols::envoy::envoy::config::core::v3::DataSource,
) -> Result<Arc<Script>, ConfigError> {
    let code = String::from_utf8(data_source(source)?.to_vec())
        .map_err(|_| invalid("source", "not UTF-8"))?;
    Script::compile(&code).map_err(|error| invalid("source", error))
}

fn no_packages(paths: &[String], cpaths: &[String]) -> Result<(), ConfigError> {
    match paths.is_empty() && cpaths.is_empty() {
        true => Ok(()),
        false => Err(invalid("package_paths", "not supported")),
    }
}
