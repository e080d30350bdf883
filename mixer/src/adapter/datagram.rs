//! What the two adapters for StatsD share: lines gathered into UDP packets, and the numbers in them.

use std::{net::SocketAddr, time::Duration};

use lateen_adapter::{
    Candidate, Counter, HandlerError, Value, ValueType,
    instance::{Metric, ReportInstance},
    value,
};
use serde::Deserialize;
use tokio::{net::UdpSocket, time::Instant};

use super::export::{Queue, SendError, Sink, outcome};

/// A name is looked up again after so long, and after a failure.
const LOOKUP: Duration = Duration::from_secs(60);

/// What a metric is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum Kind {
    #[default]
    Unknown,
    Counter,
    Gauge,
    Distribution,
}

/// Sends lines over UDP: as many to a packet as fit.
pub(super) struct Packets {
    address: String,
    max_bytes: usize,
    lost: Counter,
    socket: Option<(UdpSocket, Instant)>,
}

impl Packets {
    pub(super) fn new(address: String, max_bytes: usize, lost: Counter) -> Self {
        Self {
            address,
            max_bytes,
            lost,
            socket: None,
        }
    }

    async fn connect(&self) -> std::io::Result<UdpSocket> {
        let mut last = std::io::Error::other("the name has no address");
        for to in tokio::net::lookup_host(&self.address).await? {
            let any: SocketAddr = if to.is_ipv4() {
                ([0, 0, 0, 0], 0).into()
            } else {
                ([0_u16; 8], 0).into()
            };
            let socket = UdpSocket::bind(any).await?;
            match socket.connect(to).await {
                Ok(()) => return Ok(socket),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

impl Sink for Packets {
    type Record = String;

    async fn send(&mut self, batch: &[String]) -> Result<(), SendError> {
        let fresh = self.socket.take().filter(|(_, at)| at.elapsed() < LOOKUP);
        let (socket, at) = match fresh {
            Some(fresh) => fresh,
            None => match self.connect().await {
                Ok(socket) => (socket, Instant::now()),
                Err(error) => return Err(SendError::Again(format!("{}: {error}", self.address))),
            },
        };
        let mut has_failed = false;
        for packet in packets(batch, self.max_bytes) {
            // Not sent again: lines of other packets would be counted twice, and nobody acknowledges.
            if socket.send(packet.as_bytes()).await.is_err() {
                self.lost.inc();
                has_failed = true;
            }
        }
        if !has_failed {
            self.socket = Some((socket, at));
        }
        Ok(())
    }
}

/// Lines in packets of at most `max_bytes`, unless one line is longer.
fn packets(lines: &[String], max_bytes: usize) -> Vec<String> {
    let mut packets: Vec<String> = Vec::new();
    for line in lines {
        match packets.last_mut() {
            Some(packet) if packet.len() + 1 + line.len() <= max_bytes => {
                packet.push('\n');
                packet.push_str(line);
            }
            _ => packets.push(line.clone()),
        }
    }
    packets
}

/// Text within a line: what would end a field becomes `_`.
pub(super) fn clean(text: &str) -> String {
    let is_special =
        |c: char| matches!(c, ':' | '|' | '@' | '#' | ',') || c.is_whitespace() || c.is_control();
    text.chars()
        .map(|c| if is_special(c) { '_' } else { c })
        .collect()
}

/// Queues the lines of each metric of a batch. What is wrong with one does not keep the others.
pub(super) fn report(
    queue: &Queue<String>,
    batch: Vec<ReportInstance>,
    lines: impl Fn(&Metric) -> Result<Vec<String>, HandlerError>,
) -> Result<(), HandlerError> {
    let mut dropped = 0;
    let mut problem = None;
    for instance in batch {
        let ReportInstance::Metric(metric) = instance else {
            continue;
        };
        match lines(&metric) {
            Ok(lines) => {
                for line in lines {
                    let bytes = line.len();
                    dropped += usize::from(!queue.push(line, bytes));
                }
            }
            Err(error) => problem = Some(error), // the last one speaks for all
        }
    }
    problem.map_or_else(|| outcome(dropped), Err)
}

/// The value of a metric and what its lines say of the `rate` (0 to 1) at which such are sent; `None` for one that is
/// left out. A gauge that is sampled would stay wrong for long, so all of them are sent.
pub(super) fn sample(
    metric: &Metric,
    kind: Kind,
    rate: f64,
) -> Result<Option<(f64, String)>, HandlerError> {
    let value = metric.value.as_ref().and_then(number).ok_or_else(|| {
        HandlerError::invalid(format!("{} has no number as its value", metric.name))
    })?;
    if kind == Kind::Gauge || rate >= 1.0 {
        return Ok(Some((value, String::new())));
    }
    Ok((rand::random::<f64>() < rate).then(|| (value, format!("|@{rate}"))))
}

/// A sample: durations in milliseconds.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Duration(_) => value::number(value).map(|seconds| seconds * 1e3),
        other => value::number(other).filter(|n| n.is_finite()),
    }
}

/// The lines that give `name` the value `sample`, with `suffix` behind each.
pub(super) fn lines(kind: Kind, name: &str, sample: f64, timer: &str, suffix: &str) -> Vec<String> {
    let unit = match kind {
        Kind::Counter => "c",
        Kind::Gauge => "g",
        Kind::Distribution | Kind::Unknown => timer,
    };
    let mut lines = vec![format!("{name}:{sample}|{unit}{suffix}")];
    if kind == Kind::Gauge && sample < 0.0 {
        // With a sign it would be a difference; from 0 that is the value.
        lines.insert(0, format!("{name}:0|{unit}{suffix}"));
    }
    lines
}

/// What is wrong with instances, whose metrics are `known`.
pub(super) fn problems<'a>(
    candidate: &Candidate<'_>,
    known: impl Iterator<Item = (&'a String, Kind)> + Clone,
) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, kind) in known.clone() {
        if kind == Kind::Unknown {
            problems.push(format!(
                "metrics: {name}: type must be COUNTER, GAUGE or DISTRIBUTION"
            ));
        }
    }
    for instance in candidate.instances {
        if !known.clone().any(|(name, _)| **name == *instance.name) {
            problems.push(format!(
                "metrics: instance {} is sent here but has no entry",
                instance.name
            ));
        }
        match instance.field("value") {
            Some(ValueType::Int64 | ValueType::Double | ValueType::Duration) => {}
            Some(other) => problems.push(format!(
                "{}: its value is {other}, no number",
                instance.name
            )),
            None => problems.push(format!("{} has no value", instance.name)),
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_full_but_not_fuller() {
        let lines = ["aaaa", "bbbb", "cc", "dddddddddddd", "e"].map(str::to_owned);
        assert_eq!(
            packets(&lines, 9),
            ["aaaa\nbbbb", "cc", "dddddddddddd", "e"]
        );
    }

    #[test]
    fn lines_cannot_be_forged() {
        assert_eq!(clean("a:1|c\nb:1|c #x,é"), "a_1_c_b_1_c__x_é");
        assert_eq!(lines(Kind::Gauge, "g", -2.0, "ms", ""), ["g:0|g", "g:-2|g"]);
        assert_eq!(
            lines(Kind::Counter, "c", 2.0, "ms", "|@0.5"),
            ["c:2|c|@0.5"]
        );
    }
}
