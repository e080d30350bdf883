//! `envoy.service.accesslog.v3.AccessLogService`: reports.

use std::{collections::HashMap, sync::Arc};

use lateen_protocols::envoy::envoy::{
    config::core::v3::Node,
    data::accesslog::v3::TcpAccessLogEntry,
    service::accesslog::v3::{
        StreamAccessLogsMessage, StreamAccessLogsResponse,
        access_log_service_server::AccessLogService, stream_access_logs_message::LogEntries,
    },
};
use lateen_service::shutdown::Drain;
use tokio::time::Instant;
use tokio_stream::StreamExt as _;
use tonic::{Request, Response, Status, Streaming};

use super::{
    claims::Caller,
    entry::{self, Origin, Progress},
};
use crate::{metrics::Method, serve::Service, workloads::WorkloadView};

/// TCP connections of one stream whose progress is remembered. Of further ones only the end is reported.
const MAX_CONNECTIONS: usize = 65_536;

/// The service.
#[derive(Debug)]
pub struct AccessLogs {
    service: Service,
    workloads: WorkloadView,
    drain: Drain,
}

impl AccessLogs {
    pub(super) fn new(service: Service, workloads: WorkloadView, drain: Drain) -> Self {
        Self {
            service,
            workloads,
            drain,
        }
    }
}

#[tonic::async_trait]
impl AccessLogService for AccessLogs {
    async fn stream_access_logs(
        &self,
        request: Request<Streaming<StreamAccessLogsMessage>>,
    ) -> Result<Response<StreamAccessLogsResponse>, Status> {
        let caller = Arc::new(Caller::of(&request));
        let mut messages = request.into_inner();
        let mut origin = None;
        let mut connections = Connections::default();
        let stopping = self.drain.stopping();
        tokio::pin!(stopping);
        loop {
            // Both branches are cancel-safe: a message that has not come stays in the stream.
            let message = tokio::select! {
                () = &mut stopping => break,
                message = messages.next() => message,
            };
            let Some(message) = message.transpose()? else {
                break;
            };
            let node = message.identifier.and_then(|identifier| identifier.node);
            let origin = origin.get_or_insert_with(|| Arc::new(of_node(node.as_ref())));
            let Some(entries) = message.log_entries else {
                continue;
            };
            // One message after the other: a Mixer that is slow lets Envoy's buffer fill, and Envoy counts what it drops.
            let delivered = match entries {
                LogEntries::HttpLogs(logs) => {
                    let logs = logs.log_entry.into_iter().filter(entry::is_last).collect();
                    self.deliver(&caller, origin, logs, entry::http).await
                }
                LogEntries::TcpLogs(logs) => {
                    let logs = connections.follow(logs.log_entry);
                    self.deliver(&caller, origin, logs, entry::tcp).await
                }
            };
            if let Err(status) = delivered {
                tracing::debug!(%status, "access log entries are lost");
            }
        }
        Ok(Response::new(StreamAccessLogsResponse {}))
    }
}

impl AccessLogs {
    async fn deliver<T: entry::Entry>(
        &self,
        caller: &Arc<Caller>,
        origin: &Arc<Origin>,
        entries: Vec<T>,
        read: entry::Read<T>,
    ) -> Result<(), Status> {
        let workloads = self.workloads.clone();
        let (caller, origin) = (Arc::clone(caller), Arc::clone(origin));
        let service = self.service.clone();
        let work = move |table: &lateen_engine::AttributeTable| {
            let mut bags = Vec::with_capacity(entries.len());
            for entry in entries {
                let said = entry::claims(entry.common(), &origin);
                if let Err(reason) = caller.vouch(&said, &workloads) {
                    tracing::warn!(reason, "an access log entry is refused");
                    let refused: Result<(), _> = Err(Status::permission_denied(reason));
                    drop(service.count(Method::Report, Instant::now(), refused));
                    continue;
                }
                bags.push(read(table, &entry, &said, &workloads));
            }
            bags
        };
        self.service.deliver(work).await
    }
}

fn of_node(node: Option<&Node>) -> Origin {
    node.map(|node| Origin::of_node(&node.id))
        .unwrap_or_default()
}

/// What has been reported of the connections of one stream.
#[derive(Debug, Default)]
struct Connections(HashMap<String, Known>);

/// What has been reported of one connection.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    is_open: bool,
    bytes: (u64, u64),
}

impl Connections {
    /// What each entry adds to what is known. Envoy counts from the beginning, Mixer's reports from the last one;
    /// and every connection opens once, when it is known who has opened it.
    fn follow(&mut self, entries: Vec<TcpAccessLogEntry>) -> Vec<Progress> {
        let mut all = Vec::with_capacity(entries.len());
        for entry in entries {
            let (event, id) = (entry::event(&entry), entry::connection(&entry));
            let total = entry::bytes(&entry);
            let known = self.0.get(id).copied();
            let before = known.unwrap_or_default();
            let is_open = before.is_open || event != entry::OPEN || entry::knows_client(&entry);
            if event == entry::CLOSE {
                self.0.remove(id);
            } else if known.is_some() || self.0.len() < MAX_CONNECTIONS {
                let bytes = if is_open { total } else { before.bytes };
                self.0.insert(id.to_owned(), Known { is_open, bytes });
            } else {
                continue;
            }
            if !is_open {
                continue;
            }
            if !before.is_open && event != entry::OPEN {
                all.push(Progress::new(entry.clone(), entry::OPEN, (0, 0)));
            }
            let since = (
                total.0.saturating_sub(before.bytes.0),
                total.1.saturating_sub(before.bytes.1),
            );
            all.push(Progress::new(entry, event, since));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lateen_protocols::envoy::envoy::data::accesslog::v3::{
        AccessLogCommon, AccessLogType, ConnectionProperties,
    };

    fn entry(id: &str, kind: AccessLogType, received: u64) -> TcpAccessLogEntry {
        let reporter = if id == "in" { "inbound" } else { "outbound" };
        TcpAccessLogEntry {
            common_properties: Some(AccessLogCommon {
                stream_id: id.into(),
                custom_tags: [("context.reporter.kind".into(), reporter.into())].into(),
                access_log_type: kind.into(),
                ..AccessLogCommon::default()
            }),
            connection_properties: Some(ConnectionProperties {
                received_bytes: received,
                sent_bytes: 0,
            }),
        }
    }

    #[test]
    fn bytes_are_those_since_the_last_report_and_every_connection_opens_once() {
        use AccessLogType::{TcpConnectionEnd, TcpPeriodic, TcpUpstreamConnected};
        let mut connections = Connections::default();
        let told: Vec<_> = connections
            .follow(vec![
                entry("a", TcpUpstreamConnected, 1),
                // The client's handshake is still going on.
                entry("in", TcpUpstreamConnected, 0),
                entry("b", TcpConnectionEnd, 5),
                entry("a", TcpPeriodic, 10),
                entry("a", TcpConnectionEnd, 12),
                entry("in", TcpPeriodic, 3),
                entry("in", TcpConnectionEnd, 3),
            ])
            .into_iter()
            .map(|progress| (progress.event, progress.since.0))
            .collect();
        assert_eq!(
            told,
            [
                ("open", 1),
                ("open", 0),
                ("close", 5),
                ("continue", 9),
                ("close", 2),
                ("open", 0),
                ("continue", 3),
                ("close", 0),
            ]
        );
        assert!(connections.0.is_empty());
    }
}
