//! Points in time as text.

use std::{
    cell::RefCell,
    io::Write,
    time::{Duration, SystemTime},
};

use chrono::{
    DateTime, Utc,
    format::{Item, StrftimeItems},
};

use super::command::excerpt;
use crate::{config_error::ConfigError, proto::invalid};

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
