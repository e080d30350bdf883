//! Points in time as text.

use std::{
    cell::RefCell,
    io::Write,
    time::{Duration, SystemTime},
};

use chrono::{
    DateTime, Local, Utc,
    format::{Item, StrftimeItems},
};

use super::command::excerpt;
use crate::{config_error::ConfigError, info::StreamInfo, proto::invalid};

/// Whose clock on the wall.
#[derive(Clone, Copy, Debug)]
pub(super) enum Zone {
    Utc,
    /// Of this process (`TZ`, `/etc/localtime`).
    Local,
}

impl Zone {
    /// A time as text; ISO 8601 with milliseconds where no format is given.
    pub(super) fn show(self, time: SystemTime, items: Option<&[Item<'static>]>) -> String {
        match (self, items) {
            (Zone::Utc, None) => iso_time(time),
            (Zone::Utc, Some(items)) => DateTime::<Utc>::from(time)
                .format_with_items(items.iter())
                .to_string(),
            (Zone::Local, items) => {
                let time = DateTime::<Local>::from(time);
                match items {
                    Some(items) => time.format_with_items(items.iter()).to_string(),
                    None => time.format("%Y-%m-%dT%H:%M:%S%.3f%z").to_string(),
                }
            }
        }
    }
}

/// What `%COMMON_DURATION%` can measure from and to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Point {
    RequestBegins,
    RequestEnds,
    UpstreamAnswers,
    ResponseEnds,
}

impl Point {
    /// By Envoy's name.
    pub(super) fn named(name: &str) -> Option<Point> {
        Some(match name {
            "DS_RX_BEG" => Point::RequestBegins,
            "DS_RX_END" => Point::RequestEnds,
            "US_RX_BEG" => Point::UpstreamAnswers,
            "DS_TX_END" => Point::ResponseEnds,
            _ => return None,
        })
    }

    /// Since the stream began; `None` if it did not come so far.
    pub(super) fn of(self, info: &StreamInfo) -> Option<Duration> {
        match self {
            Point::RequestBegins => Some(Duration::ZERO),
            Point::RequestEnds => info.request_end,
            Point::UpstreamAnswers => info.upstream_first_byte,
            Point::ResponseEnds => info.response_end,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Precision {
    Milli,
    Micro,
    Nano,
}

impl Precision {
    pub(super) fn of(self, span: Duration) -> u64 {
        let number = match self {
            Precision::Milli => span.as_millis(),
            Precision::Micro => span.as_micros(),
            Precision::Nano => span.as_nanos(),
        };
        u64::try_from(number).unwrap_or(u64::MAX)
    }
}

thread_local! {
    /// The last second that was written: its number, and its text without the fraction.
    static SECOND: RefCell<(u64, [u8; 20])> = const { RefCell::new((u64::MAX, [0; 20])) };
}

/// `2026-01-02T03:04:05.678Z`.
pub fn iso_time(time: SystemTime) -> String {
    let mut out = Vec::with_capacity(24);
    write_iso_time(time, &mut out);
    String::from_utf8(out).unwrap_or_default()
}

/// Writes `2026-01-02T03:04:05.678Z`.
pub(super) fn write_iso_time(time: SystemTime, out: &mut Vec<u8>) {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    /// The end of the year 9999: later ones are wider.
    const FOUR_DIGITS: u64 = 253_402_300_800;
    if since.as_secs() >= FOUR_DIGITS {
        let time: DateTime<Utc> = time.into();
        let text = time.to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
        out.extend_from_slice(text.as_bytes());
        return;
    }
    SECOND.with_borrow_mut(|(second, text)| {
        if *second != since.as_secs() {
            let whole: DateTime<Utc> =
                (SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs())).into();
            // Twenty bytes of a year with four digits.
            if write!(&mut text[..], "{}", whole.format("%Y-%m-%dT%H:%M:%S.")).is_ok() {
                *second = since.as_secs();
            }
        }
        out.extend_from_slice(text);
    });
    let millis = since.subsec_millis();
    for digit in [millis / 100, millis / 10 % 10, millis % 10] {
        out.push(b'0' + (digit % 10) as u8);
    }
    out.push(b'Z');
}

/// Parses a `strftime` format; Envoy's `%3f`, `%6f`, `%9f` and `%f` are fractions of a second.
pub(super) fn time_format(format: &str) -> Result<Vec<Item<'static>>, ConfigError> {
    let mut items = Vec::new();
    for item in StrftimeItems::new(format) {
        if matches!(item, Item::Error) {
            return Err(invalid(
                "format",
                format!("not a time format: {}", excerpt(format)),
            ));
        }
        items.push(item.to_owned());
    }
    // `%#z` and the like can be read but not written.
    let mut sample = String::new();
    let written = DateTime::<Utc>::UNIX_EPOCH.format_with_items(items.iter());
    if std::fmt::write(&mut sample, format_args!("{written}")).is_err() {
        return Err(invalid(
            "format",
            format!("a time cannot be written so: {}", excerpt(format)),
        ));
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn is_what_chrono_writes(millis in 0..400_000_000_000_000_u64, more in 0..3000_u64) {
            for millis in [millis, millis + more, millis + 1] {
                let time = SystemTime::UNIX_EPOCH + Duration::from_millis(millis);
                let chrono: DateTime<Utc> = time.into();
                prop_assert_eq!(
                    iso_time(time),
                    chrono.to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
                );
            }
        }
    }
}
