//! One run of a script over a request or response, and the handle that the script has of it.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use lateen_protocols::envoy::google::protobuf as pb;
use mlua::{MultiValue, String as LuaString, Table, UserData, UserDataMethods, Value};

use super::{
    headers::{HeaderMap, checked_name, checked_value},
    info::{Connection, Info, Metadata},
    values::fields_to_table,
};
use crate::{
    body::{Body, BodyError, Frame},
    filter::{
        gather::{self, Gathered},
        grpc_service::local_address,
    },
    grpc::Upstream,
    head::{Headers, Known, Name, Protocol, RequestHead, ResponseHead},
    info::{ResponseFlags, StreamInfo},
    reject::Reject,
    shared::Shared,
};

/// Longest body a script may have whole. Envoy: the connection's buffer limit, by default the same.
const MAX_BODY_BYTES: usize = 1 << 20;
/// Calls that scripts of one worker may have sent and not wait for.
const MAX_UNWATCHED: usize = 1024;

/// The head that passes.
#[derive(Debug)]
pub(super) enum Head {
    Request(RequestHead),
    Response(ResponseHead),
}

/// A run. Script and filter share it as long as the script runs.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) head: RefCell<Head>,
    body: RefCell<Body>,
    pub(super) shared: Arc<Shared>,
    pub(super) info: Rc<RefCell<StreamInfo>>,
    metadata: pb::Struct,
    context: Arc<pb::Struct>,
    reply: RefCell<Option<Reject>>,
    /// Waits so far. What a script got before one is of no use after it, as with Envoy.
    pub(super) waits: Cell<u64>,
    clear_route_cache: Cell<bool>,
}

/// What a run leaves.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) head: Head,
    pub(super) body: Body,
    pub(super) reply: Option<Reject>,
    pub(super) clear_route_cache: bool,
}

impl Run {
    pub(super) fn new(
        head: Head,
        body: Body,
        shared: Arc<Shared>,
        info: Rc<RefCell<StreamInfo>>,
        metadata: pb::Struct,
        context: Arc<pb::Struct>,
    ) -> Rc<Run> {
        Rc::new(Run {
            head: RefCell::new(head),
            body: RefCell::new(body),
            shared,
            info,
            metadata,
            context,
            reply: RefCell::new(None),
            waits: Cell::new(0),
            clear_route_cache: Cell::new(false),
        })
    }

    pub(super) fn has_answered(&self) -> bool {
        self.reply.borrow().is_some()
    }

    /// Ends the run; what a script has kept of it is empty from now on.
    pub(super) fn end(&self) -> Ended {
        self.waits.set(u64::MAX);
        let nothing = Head::Response(ResponseHead {
            status: 200,
            headers: Headers::default(),
        });
        Ended {
            head: self.head.replace(nothing),
            body: self.body.take(),
            reply: self.reply.take(),
            clear_route_cache: self.clear_route_cache.get(),
        }
    }

    /// # Errors
    /// The script has waited since the thing was made.
    pub(super) fn current(&self, made: u64) -> mlua::Result<()> {
        match made == self.waits.get() {
            true => Ok(()),
            false => Err(mlua::Error::runtime("object used outside of proper scope")),
        }
    }

    fn wait(&self) {
        self.waits.set(self.waits.get().saturating_add(1));
    }

    fn answer(&self, reply: Reject) {
        *self.reply.borrow_mut() = Some(reply);
    }

    /// Reads all of the body and leaves it in its place.
    async fn whole(&self) -> mlua::Result<Option<Bytes>> {
        let mut body = self.body.take();
        if body.is_end_stream() {
            *self.body.borrow_mut() = body;
            return Ok(None);
        }
        self.wait();
        let read = gather::read(&mut body, MAX_BODY_BYTES).await;
        *self.body.borrow_mut() = body;
        match read {
            Ok(Gathered { data, whole: true }) => Ok(Some(data)),
            Ok(_) => {
                let of_request = matches!(*self.head.borrow(), Head::Request(_));
                self.answer(match of_request {
                    true => gather::too_large(),
                    false => Reject::new(
                        500,
                        "Internal Server Error",
                        ResponseFlags::default(),
                        "response_payload_too_large",
                    ),
                });
                std::future::pending().await
            }
            Err(error) => Err(broken(&error)),
        }
    }
}

fn broken(error: &BodyError) -> mlua::Error {
    mlua::Error::runtime(format!("the body broke off: {error}"))
}

/// Envoy's stream handle.
#[derive(Debug)]
pub(super) struct Handle(pub(super) Rc<Run>);

/// Envoy's buffer.
#[derive(Debug)]
struct Buffer {
    run: Rc<Run>,
    made: u64,
    data: Bytes,
}

impl UserData for Handle {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("headers", |_, this, ()| Ok(HeaderMap::of(&this.0)));
        methods.add_async_method("body", |_, this, always: Option<bool>| {
            let run = this.0.clone();
            async move {
                let data = run.whole().await?;
                let data = match (data, always) {
                    (None, Some(true)) => Some(Bytes::new()),
                    (data, _) => data,
                };
                Ok(data.map(|data| Buffer {
                    made: run.waits.get(),
                    data,
                    run,
                }))
            }
        });
        methods.add_async_method("bodyChunks", |lua, this, ()| {
            let run = this.0.clone();
            async move {
                // The body is read whole, so that it can go on whatever the script does with its pieces.
                let mut data = run.whole().await?.filter(|data| !data.is_empty());
                lua.create_function_mut(move |_, _: MultiValue| {
                    Ok(data.take().map(|data| Buffer {
                        made: run.waits.get(),
                        data,
                        run: run.clone(),
                    }))
                })
            }
        });
        methods.add_async_method("trailers", |_, this, ()| {
            let run = this.0.clone();
            async move {
                // After all of the body, which must not be lost.
                run.whole().await?;
                let mut body = run.body.take();
                let mut pieces = Vec::new();
                while let Some(frame) = body.frame().await {
                    pieces.push(frame.map_err(|error| broken(&error))?);
                }
                let trailers = match pieces.pop() {
                    Some(Frame::Trailers(trailers)) => Some(trailers),
                    Some(data) => {
                        pieces.push(data);
                        None
                    }
                    None => None,
                };
                let data = pieces.iter().fold(Vec::new(), |mut all, piece| {
                    if let Frame::Data(data) = piece {
                        all.extend_from_slice(data);
                    }
                    all
                });
                let map = trailers.map(|trailers| Rc::new(RefCell::new(trailers)));
                *run.body.borrow_mut() = gather::with_trailers(data.into(), map.clone());
                Ok(map.map(|trailers| HeaderMap::of_trailers(&run, trailers)))
            }
        });
        methods.add_async_method(
            "respond",
            |_, this, (headers, body): (Table, Option<LuaString>)| {
                let run = this.0.clone();
                async move {
                    let reply = reply(&headers, body.as_ref())?;
                    run.answer(reply);
                    // The run ends here.
                    std::future::pending::<()>().await;
                    Ok(())
                }
            },
        );
        methods.add_async_method("httpCall", |lua, this, arguments: MultiValue| {
            let run = this.0.clone();
            async move {
                let call = Call::read(&run, arguments)?;
                run.wait();
                call.make(&lua, &run).await
            }
        });
        methods.add_method("metadata", |_, this, ()| {
            Ok(Metadata(this.0.metadata.clone()))
        });
        methods.add_method("filterContext", |lua, this, ()| {
            fields_to_table(lua, &this.0.context)
        });
        methods.add_method("streamInfo", |_, this, ()| Ok(Info(this.0.info.clone())));
        methods.add_method("connection", |_, this, ()| {
            Ok(Connection(this.0.info.borrow().connection.clone()))
        });
        methods.add_method("clearRouteCache", |_, this, ()| {
            this.0.clear_route_cache.set(true);
            Ok(())
        });
        methods.add_method("base64Escape", |_, _, text: LuaString| {
            Ok(STANDARD.encode(text.as_bytes()))
        });
        methods.add_method("timestamp", |_, _, unit: Value| {
            // Milliseconds, the only unit there is, or by default.
            let _unit = unit;
            Ok(since_epoch().as_millis() as f64)
        });
        methods.add_method("timestampString", |_, _, unit: Option<LuaString>| {
            let micros = unit.is_some_and(|unit| unit.as_bytes() == b"microsecond");
            Ok(match micros {
                true => since_epoch().as_micros().to_string(),
                false => since_epoch().as_millis().to_string(),
            })
        });
        log(methods, "logTrace", |text| {
            tracing::trace!("script log: {text}")
        });
        log(methods, "logDebug", |text| {
            tracing::debug!("script log: {text}")
        });
        log(methods, "logInfo", |text| {
            tracing::info!("script log: {text}")
        });
        log(methods, "logWarn", |text| {
            tracing::warn!("script log: {text}")
        });
        log(methods, "logErr", |text| {
            tracing::error!("script log: {text}")
        });
        log(methods, "logCritical", |text| {
            tracing::error!("script log: {text}")
        });
    }
}

fn log<M: UserDataMethods<Handle>>(methods: &mut M, name: &str, write: fn(&str)) {
    methods.add_method(name, move |_, _, text: LuaString| {
        write(&text.to_string_lossy());
        Ok(())
    });
}

fn since_epoch() -> Duration {
    crate::clock::wall()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

impl UserData for Buffer {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("length", |_, this, ()| {
            this.run.current(this.made)?;
            Ok(this.data.len())
        });
        methods.add_method("getBytes", |lua, this, (from, count): (usize, usize)| {
            this.run.current(this.made)?;
            let bytes = from
                .checked_add(count)
                .and_then(|to| this.data.get(from..to))
                .ok_or_else(|| {
                    mlua::Error::runtime(
                        "index/length must be >= 0 and (index + length) must be <= buffer size",
                    )
                })?;
            lua.create_string(bytes)
        });
        methods.add_method_mut("setBytes", |_, this, text: LuaString| {
            this.run.current(this.made)?;
            let data = Bytes::copy_from_slice(&text.as_bytes());
            this.data = data.clone();
            let length = data.len();
            let mut head = this.run.head.borrow_mut();
            let headers = match &mut *head {
                Head::Request(head) => &mut head.headers,
                Head::Response(head) => &mut head.headers,
            };
            if headers.known(Known::ContentLength).is_some() {
                headers.set(Known::ContentLength, length.to_string());
            }
            *this.run.body.borrow_mut() = Body::full(data);
            Ok(length)
        });
    }
}

/// The answer a script gives.
fn reply(headers: &Table, body: Option<&LuaString>) -> mlua::Result<Reject> {
    let status: Option<String> = headers.get(":status")?;
    let status = status
        .and_then(|status| status.parse::<u16>().ok())
        .filter(|status| (200..600).contains(status))
        .ok_or_else(|| mlua::Error::runtime(":status must be between 200-599"))?;
    let body = body.map(|body| body.to_string_lossy()).unwrap_or_default();
    let mut reply = Reject::new(status, body, ResponseFlags::default(), "lua_response");
    each_header(headers, |name, value| {
        let own = name.as_bytes() == b"content-length";
        if !own {
            reply.headers.append(name, value);
        }
    })?;
    Ok(reply)
}

/// The headers of a table, pseudo headers excepted; a value may be a list.
fn each_header(table: &Table, mut see: impl FnMut(Name, &[u8])) -> mlua::Result<()> {
    for pair in table.pairs::<LuaString, Value>() {
        let (name, value) = pair?;
        if name.as_bytes().starts_with(b":") {
            continue;
        }
        let name = checked_name(&name)?;
        let mut one = |value: LuaString| {
            see(name.clone(), &checked_value(&value)?);
            Ok::<_, mlua::Error>(())
        };
        match value {
            Value::Table(values) => {
                for value in values.sequence_values::<LuaString>() {
                    one(value?)?;
                }
            }
            Value::String(value) => one(value)?,
            Value::Integer(_) | Value::Number(_) => {
                let text = value.to_string()?;
                see(name.clone(), text.as_bytes());
            }
            _ => return Err(mlua::Error::runtime("a header's value is no string")),
        }
    }
    Ok(())
}

/// `httpCall`.
struct Call {
    upstream: Upstream,
    head: RequestHead,
    body: Option<Bytes>,
    /// Nobody waits for the answer.
    unwatched: bool,
}

thread_local! {
    static UNWATCHED: Cell<usize> = const { Cell::new(0) };
}

impl Call {
    fn read(run: &Run, arguments: MultiValue) -> mlua::Result<Call> {
        let fault = |text: &str| mlua::Error::runtime(text.to_owned());
        let mut arguments = arguments.into_iter();
        let mut next = || arguments.next().unwrap_or(Value::Nil);
        let (Value::String(cluster), Value::Table(table)) = (next(), next()) else {
            return Err(fault("httpCall: cluster and headers are required"));
        };
        let cluster = cluster.to_string_lossy();
        let body = match next() {
            Value::Nil => None,
            Value::String(body) => Some(Bytes::copy_from_slice(&body.as_bytes())),
            _ => return Err(fault("httpCall: the body is no string")),
        };
        let (timeout, unwatched) = match next() {
            Value::Table(options) => (
                options.get::<Option<u64>>("timeout_ms")?.unwrap_or(0),
                options
                    .get::<Option<bool>>("asynchronous")?
                    .unwrap_or(false),
            ),
            Value::Nil => (0, false),
            number => (
                number
                    .as_u32()
                    .map(u64::from)
                    .or_else(|| {
                        number
                            .as_f64()
                            .filter(|ms| (0.0..4e9).contains(ms))
                            .map(|ms| ms as u64)
                    })
                    .ok_or_else(|| fault("http call timeout must be >= 0"))?,
                matches!(next(), Value::Boolean(true)),
            ),
        };
        if run
            .shared
            .clusters
            .get(&Arc::from(cluster.as_str()))
            .is_none()
        {
            return Err(fault("http call cluster invalid. Must be configured"));
        }
        let pseudo = |name: &str| -> mlua::Result<Bytes> {
            let value: Option<LuaString> = table.get(name)?;
            let value = value.ok_or_else(|| {
                fault("http call headers must include ':path', ':method', and ':authority'")
            })?;
            Ok(checked_value(&value)?.into())
        };
        let mut head = RequestHead {
            method: pseudo(":method")?,
            scheme: Bytes::from_static(b"http"),
            authority: pseudo(":authority")?,
            path: pseudo(":path")?,
            protocol: Protocol::Http11,
            headers: Headers::default(),
        };
        each_header(&table, |name, value| head.headers.append(name, value))?;
        let length = body.as_ref().map_or(0, Bytes::len);
        head.headers.remove_known(Known::ContentLength);
        if length > 0 {
            head.headers
                .append(Known::ContentLength, length.to_string());
        }
        head.headers.set(Name::new("x-envoy-internal"), "true");
        head.headers.set(Known::XForwardedFor, local_address());
        Ok(Call {
            upstream: Upstream::new(&cluster, Duration::from_millis(timeout))
                .map_err(|error| fault(&error.to_string()))?,
            head,
            body,
            unwatched,
        })
    }

    async fn make(self, lua: &mlua::Lua, run: &Rc<Run>) -> mlua::Result<MultiValue> {
        let shared = run.shared.clone();
        let body = self.body.map_or_else(Body::empty, Body::full);
        if self.unwatched {
            if UNWATCHED.get() >= MAX_UNWATCHED {
                return Err(mlua::Error::runtime("too many calls that nobody waits for"));
            }
            UNWATCHED.set(UNWATCHED.get() + 1);
            tokio::task::spawn_local(async move {
                let answer = self.upstream.exchange(&shared, self.head, body).await;
                if let Ok((_, body)) = answer {
                    let _dropped = body.collect(MAX_BODY_BYTES).await;
                }
                UNWATCHED.set(UNWATCHED.get().saturating_sub(1));
            });
            return Ok(MultiValue::new());
        }
        let answer = self.upstream.exchange(&shared, self.head, body).await;
        let answer = match answer {
            Ok((head, body)) => body
                .collect(MAX_BODY_BYTES)
                .await
                .ok()
                .map(|data| (head, data)),
            Err(reject) => {
                let (head, body) = reject.into_response(false);
                Some((head, body.into_data()))
            }
        };
        let table = lua.create_table()?;
        let data = match answer {
            None => {
                table.set(":status", "503")?;
                Bytes::from_static(b"upstream failure")
            }
            Some((head, data)) => {
                table.set(":status", head.status.to_string())?;
                for (name, value) in head.headers.iter() {
                    table.set(
                        lua.create_string(name.as_bytes())?,
                        lua.create_string(value)?,
                    )?;
                }
                data
            }
        };
        let body = match data.is_empty() {
            true => Value::Nil,
            false => Value::String(lua.create_string(&data)?),
        };
        Ok(MultiValue::from_iter([Value::Table(table), body]))
    }
}

/// An address as scripts see it.
pub(super) fn address(address: SocketAddr) -> String {
    address.to_string()
}
