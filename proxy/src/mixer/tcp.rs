//! The network filter `mixer`: a check when a connection opens, reports when it opens, while it lasts and
//! when it closes.

use std::{cell::Cell, rc::Rc, sync::Arc, time::Duration};

use lateen_protocols::istio::mixer::v1::config::client::TcpClientConfig;
use tokio::task::JoinHandle;

use super::{
    Fail,
    attributes::{Attributes, KEYS},
    client::Client,
    of_connection,
    quota::Quotas,
};
use crate::{config_error::ConfigError, info::ResponseFlags, router::SharedInfo, shared::Shared};

/// Between two reports of a connection that lasts. Istio: `TcpClientConfig.report_interval`.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);
/// Between two looks whether the upstream is connected, so that the first report can name it.
const OPEN_LOOK: Duration = Duration::from_millis(20);
/// The first report is sent after this long even if no upstream is connected.
const OPEN_LIMIT: Duration = Duration::from_secs(1);
/// More often than this nobody wants to know.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);

/// The filter, compiled.
#[derive(Debug)]
pub struct TcpMixer {
    client: Arc<Client>,
    fail: Fail,
    attributes: Attributes,
    check: bool,
    report: bool,
    quotas: Quotas,
    interval: Duration,
}

impl TcpMixer {
    /// Compiles the filter.
    ///
    /// # Errors
    /// No check cluster is named, or the quota spec is not valid.
    pub fn compile(config: &TcpClientConfig, shared: &Shared) -> Result<TcpMixer, ConfigError> {
        let transport = config.transport.clone().unwrap_or_default();
        Ok(TcpMixer {
            client: Client::get(&transport, shared).map_err(|error| error.within("transport"))?,
            fail: Fail::compile(transport.network_fail_policy.as_ref()),
            attributes: config
                .mixer_attributes
                .as_ref()
                .map_or_else(Attributes::default, |a| Attributes::from_plain(a, true)),
            check: !config.disable_check_calls,
            report: !config.disable_report_calls,
            quotas: Quotas::compile(config.connection_quota_spec.as_slice())
                .map_err(|error| error.within("connection_quota_spec"))?,
            interval: config
                .report_interval
                .and_then(|interval| Duration::try_from(interval).ok())
                .map_or(REPORT_INTERVAL, |interval| interval.max(SHORTEST_INTERVAL)),
        })
    }

    /// Asks about a connection before a byte of it goes on. `None`: it has to be closed. Otherwise the
    /// value reports until it is dropped, which is the close.
    pub async fn open(
        self: &Arc<TcpMixer>,
        shared: &Arc<Shared>,
        info: &SharedInfo,
    ) -> Option<TcpReport> {
        let attributes = self.collect(info);
        if self.check {
            let quotas = self.quotas.of(&attributes);
            let checked = self
                .client
                .check(shared, &attributes, &quotas, &self.fail.retries, false)
                .await;
            let allowed = match checked {
                Ok(checked) => checked.verdict.refusal().is_none() && checked.exhausted.is_none(),
                Err(_) => self.fail.open,
            };
            if !allowed {
                let mut info = info.borrow_mut();
                info.flags.set(ResponseFlags::UNAUTHORIZED_EXTERNAL_SERVICE);
                info.response_code_details = "mixer_denied".into();
                return None;
            }
        }
        Some(TcpReport::start(
            self.clone(),
            shared.clone(),
            info.clone(),
            attributes,
        ))
    }

    fn collect(&self, info: &SharedInfo) -> Attributes {
        let info = info.borrow();
        let mut all = self.attributes.clone();
        of_connection(&info.connection, &mut all);
        all.set(KEYS.context_protocol, "tcp");
        all.set(KEYS.context_time, info.start_time);
        all.set_address(KEYS.source_ip, KEYS.source_port, info.downstream_remote);
        all.set(KEYS.connection_id, format!("{}", info.connection.id));
        all
    }
}

/// Reports one connection; its end is the connection's end.
#[derive(Debug)]
pub struct TcpReport {
    inner: Rc<Inner>,
    ticker: JoinHandle<()>,
}

#[derive(Debug)]
struct Inner {
    filter: Arc<TcpMixer>,
    shared: Arc<Shared>,
    info: SharedInfo,
    attributes: Attributes,
    /// Whether the first report has been sent.
    opened: Cell<bool>,
    /// Bytes received and sent that have been reported.
    reported: Cell<(u64, u64)>,
}

impl TcpReport {
    fn start(
        filter: Arc<TcpMixer>,
        shared: Arc<Shared>,
        info: SharedInfo,
        attributes: Attributes,
    ) -> TcpReport {
        let inner = Rc::new(Inner {
            filter,
            shared,
            info,
            attributes,
            opened: Cell::new(false),
            reported: Cell::new((0, 0)),
        });
        let ticking = inner.clone();
        let ticker = tokio::task::spawn_local(async move {
            let looks = OPEN_LIMIT.as_millis() / OPEN_LOOK.as_millis();
            for _ in 0..looks {
                if ticking.info.borrow().upstream_host.is_some() {
                    break;
                }
                tokio::time::sleep(OPEN_LOOK).await;
            }
            ticking.open();
            loop {
                tokio::time::sleep(ticking.filter.interval).await;
                ticking.send("continue");
            }
        });
        TcpReport { inner, ticker }
    }
}

impl Drop for TcpReport {
    fn drop(&mut self) {
        self.ticker.abort();
        self.inner.open();
        self.inner.send("close");
    }
}

impl Inner {
    /// The first report, if it is still to be sent.
    fn open(&self) {
        if !self.opened.replace(true) {
            self.send("open");
        }
    }

    fn send(&self, event: &'static str) {
        if !self.filter.report {
            return;
        }
        let mut all = self.attributes.clone();
        let info = self.info.borrow();
        if all.get(KEYS.destination_ip).is_none()
            && let Some(host) = info.upstream_host
        {
            all.set_address(KEYS.destination_ip, KEYS.destination_port, host);
        }
        let (received, sent) = self.reported.get();
        all.set(KEYS.connection_event, event);
        all.set(
            KEYS.connection_received,
            info.bytes_received.saturating_sub(received),
        );
        all.set(KEYS.connection_sent, info.bytes_sent.saturating_sub(sent));
        all.set(KEYS.connection_received_total, info.bytes_received);
        all.set(KEYS.connection_sent_total, info.bytes_sent);
        self.reported.set((info.bytes_received, info.bytes_sent));
        if event == "close" {
            all.set(KEYS.connection_duration, info.start.elapsed());
            all.set(KEYS.context_proxy_error_code, info.flags.short());
        }
        drop(info);
        self.filter.client.report(&self.shared, all);
    }
}
