//! TCP inside of HTTP: the connection's bytes are the bodies of a CONNECT (or POST) to another proxy. Envoy:
//! `TcpProxy.TunnelingConfig`.

use std::{
    cell::RefCell,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf as _, Bytes};
use lateen_protocols::envoy::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::TunnelingConfig;
use tokio::time::Instant;

use super::copy::{Ended, Limits, Passed, Side};
use crate::{
    body::{Body, BodyError, Frame, Source},
    clock,
    cluster::{Host, HttpVersion},
    config_error::ConfigError,
    format::{Facts, Format},
    head::{Headers, Protocol, RequestHead},
    info::StreamInfo,
    net::{Transport, stock},
    outlier::Outcome,
    proto::invalid,
    route::headers::HeaderOps,
    router::SharedInfo,
    timer::Deadline,
    upstream::{ConnectError, LocalCluster, Refusal},
};

/// How the request that becomes the tunnel looks.
#[derive(Debug)]
pub(super) struct Tunneling {
    hostname: Format,
    /// The path of a POST; CONNECT has none.
    post: Option<Bytes>,
    headers: HeaderOps,
}

impl Tunneling {
    /// Compiles the configuration. What it would leave in the filter state (`propagate_response_headers`,
    /// `propagate_response_trailers`) nothing here reads.
    pub(super) fn compile(config: &TunnelingConfig) -> Result<Tunneling, ConfigError> {
        let unsupported = [
            (
                "request_id_extension",
                config.request_id_extension.is_some(),
            ),
            ("formatters", !config.formatters.is_empty()),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
            return Err(invalid(*field, "not supported"));
        }
        if config.hostname.is_empty() {
            return Err(invalid("hostname", "absent"));
        }
        let post = match (config.use_post, config.post_path.as_str()) {
            (false, "") => None,
            (false, _) => return Err(invalid("post_path", "goes with use_post only")),
            (true, "") => Some(Bytes::from_static(b"/")),
            (true, path) => Some(path.to_owned().into()),
        };
        Ok(Tunneling {
            hostname: Format::text(&config.hostname, false)
                .map_err(|error| error.within("hostname"))?,
            post,
            headers: HeaderOps::compile(&config.headers_to_add, &[])?,
        })
    }

    /// The request for a connection.
    pub(super) fn head(&self, info: &StreamInfo) -> RequestHead {
        let facts = Facts::of_connection(info);
        let mut authority = Vec::new();
        self.hostname.write(&facts, &mut authority);
        // A value taken from a peer must not end the line.
        authority.retain(|b| !b.is_ascii_control() && *b != b' ');
        let mut headers = Headers::default();
        self.headers
            .apply(&mut headers, self.headers.values(&facts));
        let method: &[u8] = if self.post.is_some() {
            b"POST"
        } else {
            b"CONNECT"
        };
        RequestHead {
            method: Bytes::from_static(method),
            scheme: Bytes::from_static(b"http"),
            authority: authority.into(),
            path: self.post.clone().unwrap_or_default(),
            protocol: Protocol::Http11,
            headers,
        }
    }
}

/// A tunnel that stands.
pub(super) struct Tunnel {
    answer: Body,
    down: Rc<RefCell<Down>>,
}

/// The downstream, read by whoever sends the request's body and written by [`Tunnel::carry`].
struct Down {
    transport: Transport,
    /// What was read of it already.
    read: Bytes,
    /// The upstream has agreed.
    open: bool,
    /// It has ended its half.
    ended: bool,
    failed: Option<io::Error>,
    /// When bytes last moved.
    moved: Instant,
    tell: Tell,
    /// Who waits for `open`.
    sender: Option<Waker>,
    /// Who carries.
    carrier: Option<Waker>,
}

/// Is told what passes where.
pub(super) type Tell = Rc<dyn Fn(Passed, u64)>;

/// The downstream's side, shared by the attempts of one connection.
pub(super) struct Downstream(Rc<RefCell<Down>>);

impl Downstream {
    pub(super) fn new(transport: Transport, read: Bytes, tell: Tell) -> Downstream {
        Downstream(Rc::new(RefCell::new(Down {
            transport,
            read,
            open: false,
            ended: false,
            failed: None,
            moved: clock::now(),
            tell,
            sender: None,
            carrier: None,
        })))
    }

    /// Asks `host` for a tunnel, once.
    ///
    /// # Errors
    /// Why there is none, for `%UPSTREAM_TRANSPORT_FAILURE_REASON%`, if there is something to say.
    pub(super) async fn ask(
        &self,
        tunneling: &Tunneling,
        local: &Rc<LocalCluster>,
        host: &Arc<Host>,
        info: &SharedInfo,
    ) -> Result<Tunnel, Option<String>> {
        let mut head = tunneling.head(&info.borrow());
        let pool = local.pool(host, &head, false, info.borrow().original_src);
        let lease = match pool.acquire().await {
            Ok(lease) => lease,
            Err(Refusal::Overflow) => return Err(None),
            Err(Refusal::Connect(error)) => {
                let outcome = match error {
                    ConnectError::Timeout => Outcome::TimedOut,
                    ConnectError::Refused(_) | ConnectError::Tls(_) => Outcome::Failed,
                };
                local.cluster.report(host, outcome);
                return Err(Some(error.to_string()));
            }
        };
        if let Some(facts) = lease.facts() {
            if facts.tls.is_some() {
                head.scheme = Bytes::from_static(b"https");
            }
            let mut info = info.borrow_mut();
            info.upstream_local = facts.local;
            info.upstream_tls.clone_from(&facts.tls);
        }
        let body = Body::stream(Upward(self.0.clone()));
        let (answer, body) = match lease.send(&head, body, &|_| {}).await {
            Ok(answer) => answer,
            Err(_) => {
                local.cluster.report(host, Outcome::Failed);
                return Err(None);
            }
        };
        let http1 = local.cluster.config.version != HttpVersion::Http2;
        // RFC 9110 §9.3.6 has any 2xx; Envoy's HTTP/2 only 200.
        let agreed = answer.status == 200 || http1 && (200..300).contains(&answer.status);
        if !agreed || body.is_end_stream() {
            local.cluster.report(host, Outcome::Failed);
            return Err(Some(format!("tunnel_response:{}", answer.status)));
        }
        local.cluster.report(host, Outcome::Connected);
        let mut down = self.0.borrow_mut();
        down.open = true;
        down.moved = clock::now();
        if let Some(sender) = down.sender.take() {
            sender.wake();
        }
        Ok(Tunnel {
            answer: body,
            down: self.0.clone(),
        })
    }
}

impl Tunnel {
    /// Carries bytes until both directions have ended.
    pub(super) async fn carry(mut self, limits: &Limits) -> Ended {
        let mut piece = Bytes::new();
        let mut answered = false;
        let mut shut = false;
        let mut idle = Deadline::default();
        let mut deadline = Deadline::default();
        if let Some(at) = limits.deadline {
            deadline.set(at);
        }
        std::future::poll_fn(|cx| {
            let mut down = self.down.borrow_mut();
            if let Some(error) = down.failed.take() {
                return Poll::Ready(Ended::Failed(Side::Downstream, error));
            }
            let down = &mut *down;
            let written = loop {
                if !piece.is_empty() {
                    match down.transport.poll_write(cx, &[IoSlice::new(&piece)]) {
                        Poll::Pending => break Ok(()),
                        Poll::Ready(Err(error)) => break Err(error),
                        Poll::Ready(Ok(0)) => break Err(io::ErrorKind::WriteZero.into()),
                        Poll::Ready(Ok(n)) => {
                            piece.advance(n);
                            down.moved = clock::now();
                            (down.tell)(Passed::ToDownstream, n as u64);
                            continue;
                        }
                    }
                }
                if answered {
                    if !shut && let Poll::Ready(closed) = down.transport.poll_shutdown(cx) {
                        // It may be closed already, which is what was wanted.
                        drop(closed);
                        shut = true;
                    }
                    break Ok(());
                }
                match self.answer.poll_frame(cx) {
                    Poll::Pending => match down.transport.poll_flush(cx) {
                        Poll::Ready(Err(error)) => break Err(error),
                        Poll::Ready(Ok(())) | Poll::Pending => break Ok(()),
                    },
                    Poll::Ready(Some(Ok(Frame::Data(data)))) => {
                        (down.tell)(Passed::FromUpstream, data.len() as u64);
                        piece = data;
                    }
                    Poll::Ready(Some(Ok(Frame::Trailers(_))) | None) => answered = true,
                    Poll::Ready(Some(Err(error))) => {
                        let error = io::Error::other(error);
                        return Poll::Ready(Ended::Failed(Side::Upstream, error));
                    }
                }
            };
            if let Err(error) = written {
                return Poll::Ready(Ended::Failed(Side::Downstream, error));
            }
            if shut && down.ended {
                return Poll::Ready(Ended::Finished);
            }
            down.carrier = Some(cx.waker().clone());
            if deadline.poll(cx).is_ready() {
                return Poll::Ready(Ended::TooLong);
            }
            let Some(limit) = limits.idle else {
                return Poll::Pending;
            };
            loop {
                let until = down.moved + limit;
                idle.set(until);
                ready!(idle.poll(cx));
                if Instant::now() >= until {
                    return Poll::Ready(Ended::Idle);
                }
            }
        })
        .await
    }
}

/// The downstream's bytes as the body of the request.
struct Upward(Rc<RefCell<Down>>);

impl Source for Upward {
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let mut down = self.0.borrow_mut();
        let down = &mut *down;
        if !down.open {
            down.sender = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if !down.read.is_empty() {
            return Poll::Ready(Some(Ok(Frame::Data(std::mem::take(&mut down.read)))));
        }
        if down.ended {
            return Poll::Ready(None);
        }
        let read = match down.transport.poll_readable(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Err(error)) => Err(error),
            Poll::Ready(Ok(())) => {
                let mut buffer = stock::get();
                match down.transport.poll_read(cx, &mut buffer) {
                    Poll::Pending => {
                        stock::put(buffer);
                        return Poll::Pending;
                    }
                    Poll::Ready(read) => read.map(|_| buffer.freeze()),
                }
            }
        };
        let frame = match read {
            Ok(data) if data.is_empty() => {
                down.ended = true;
                None
            }
            Ok(data) => {
                down.moved = clock::now();
                (down.tell)(Passed::FromDownstream, data.len() as u64);
                return Poll::Ready(Some(Ok(Frame::Data(data))));
            }
            Err(error) => {
                down.failed = Some(error);
                Some(Err(BodyError::Disconnected))
            }
        };
        if let Some(carrier) = down.carrier.take() {
            carrier.wake();
        }
        Poll::Ready(frame)
    }
}
