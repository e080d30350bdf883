//! Access logs: one line per stream, written at its end. Which streams (filters), as what (text or JSON),
//! and where to (a file or a standard stream, through a writer thread that the request path never waits for).

use std::sync::Arc;

use lateen_protocols::envoy::{
    envoy::{
        config::{accesslog::v3 as proto, core::v3 as core},
        data::accesslog::v3 as data,
        extensions::access_loggers::{
            file::v3::{FileAccessLog, file_access_log::AccessLogFormat},
            filters::cel::v3::ExpressionFilter,
            stream::v3::{
                StderrAccessLog, StdoutAccessLog,
                stderr_access_log::AccessLogFormat as StderrFormat,
                stdout_access_log::AccessLogFormat as StdoutFormat,
            },
        },
    },
    google::protobuf as pb,
};
use proto::{access_log_filter::FilterSpecifier, comparison_filter::Op};

use crate::{
    cel::Condition,
    config_error::ConfigError,
    filter::rbac::MetadataMatch,
    format::{Facts, Format, JsonFormat},
    info::ResponseFlags,
    proto::{Chance, invalid, unpack},
    route::{data_source, matcher::HeaderMatch},
};

mod sink;

use sink::Sink;
pub use sink::{count, flush, reopen};

/// Envoy's format when none is given.
pub const DEFAULT_FORMAT: &str = "[%START_TIME%] \"%REQ(:METHOD)% \
    %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% %RESPONSE_FLAGS% \
    %BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \
    \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \
    \"%UPSTREAM_HOST%\"\n";

/// One access log of a connection manager, TCP proxy or listener.
#[derive(Debug)]
pub struct AccessLog {
    filter: Option<Filter>,
    format: LineFormat,
    sink: Arc<Sink>,
}

#[derive(Debug)]
enum LineFormat {
    Text(Format),
    Json(JsonFormat),
}

/// Which streams are meant.
#[derive(Debug)]
pub(crate) enum Filter {
    Status(Op, u64),
    Duration(Op, u64),
    NotHealthCheck,
    Sample(Chance),
    All(Vec<Filter>),
    Any(Vec<Filter>),
    Header(HeaderMatch),
    Flags(Vec<String>),
    Grpc(Vec<i32>, bool),
    /// Kinds of entries, or all others.
    Types(Vec<i32>, bool),
    /// Dynamic metadata; whether a stream without the key is meant.
    Metadata(Option<MetadataMatch>, bool),
    Cel(Condition),
}

impl AccessLog {
    /// Compiles a list of access logs.
    ///
    /// # Errors
    /// When a logger or filter is not supported, a format is not valid, or a file cannot be opened.
    pub fn compile_all(list: &[proto::AccessLog]) -> Result<Vec<AccessLog>, ConfigError> {
        list.iter()
            .map(|log| {
                AccessLog::compile(log)
                    .map_err(|error| error.within(format_args!("access log {}", log.name)))
            })
            .collect()
    }

    fn compile(log: &proto::AccessLog) -> Result<AccessLog, ConfigError> {
        let Some(proto::access_log::ConfigType::TypedConfig(any)) = log.config_type.as_ref() else {
            return Err(invalid("typed_config", "absent"));
        };
        let (path, format) = if let Some(file) = unpack::<FileAccessLog>(any)? {
            let format = match file.access_log_format.as_ref() {
                None => default_format()?,
                Some(AccessLogFormat::Format(text)) => text_format(text)?,
                Some(
                    AccessLogFormat::JsonFormat(json) | AccessLogFormat::TypedJsonFormat(json),
                ) => LineFormat::Json(JsonFormat::compile(json, false)?),
                Some(AccessLogFormat::LogFormat(format)) => log_format(format)?,
            };
            (file.path, format)
        } else if let Some(stdout) = unpack::<StdoutAccessLog>(any)? {
            let format = match stdout.access_log_format.as_ref() {
                None => default_format()?,
                Some(StdoutFormat::LogFormat(format)) => log_format(format)?,
            };
            ("/dev/stdout".to_owned(), format)
        } else if let Some(stderr) = unpack::<StderrAccessLog>(any)? {
            let format = match stderr.access_log_format.as_ref() {
                None => default_format()?,
                Some(StderrFormat::LogFormat(format)) => log_format(format)?,
            };
            ("/dev/stderr".to_owned(), format)
        } else {
            return Err(invalid(
                any.type_url.clone(),
                "this access logger is not supported",
            ));
        };
        Ok(AccessLog {
            filter: log.filter.as_ref().map(Filter::compile).transpose()?,
            format,
            sink: Sink::open(&path).map_err(|error| invalid(path, error.to_string()))?,
        })
    }

    /// Writes the line of a stream that has ended.
    pub fn write(&self, facts: &Facts<'_>) {
        if self
            .filter
            .as_ref()
            .is_some_and(|filter| !filter.holds(facts))
        {
            return;
        }
        self.sink.append(|out| match &self.format {
            LineFormat::Text(format) => format.write(facts, out),
            LineFormat::Json(format) => {
                format.write(facts, out);
                out.push(b'\n');
            }
        });
    }
}

fn default_format() -> Result<LineFormat, ConfigError> {
    Format::text(DEFAULT_FORMAT, false).map(LineFormat::Text)
}

fn text_format(text: &str) -> Result<LineFormat, ConfigError> {
    if text.is_empty() {
        return default_format();
    }
    Format::text(text, false).map(LineFormat::Text)
}

fn log_format(format: &core::SubstitutionFormatString) -> Result<LineFormat, ConfigError> {
    use core::substitution_format_string::Format as Kind;
    for extension in &format.formatters {
        // Formatters that only add commands we have anyway (metadata, req_without_query) may be named.
        tracing::debug!(name = %extension.name, "format extension named");
    }
    let omit = format.omit_empty_values;
    match format.format.as_ref() {
        Some(Kind::TextFormat(text)) => Format::text(text, omit).map(LineFormat::Text),
        Some(Kind::JsonFormat(json)) => JsonFormat::compile(json, omit).map(LineFormat::Json),
        Some(Kind::TextFormatSource(source)) => {
            let text = data_source(source)?;
            let text = std::str::from_utf8(&text)
                .map_err(|_| invalid("text_format_source", "not UTF-8"))?;
            Format::text(text, omit).map(LineFormat::Text)
        }
        None => default_format(),
    }
}

impl Filter {
    /// Compiles Envoy's filter.
    ///
    /// # Errors
    /// When it is not supported.
    pub(crate) fn compile(filter: &proto::AccessLogFilter) -> Result<Filter, ConfigError> {
        let all = |filters: &[proto::AccessLogFilter]| -> Result<Vec<Filter>, ConfigError> {
            filters.iter().map(Filter::compile).collect()
        };
        let comparison = |comparison: Option<&proto::ComparisonFilter>| match comparison {
            Some(c) => Ok((
                c.op(),
                c.value.as_ref().map_or(0, |v| u64::from(v.default_value)),
            )),
            None => Err(invalid("comparison", "absent")),
        };
        Ok(match filter.filter_specifier.as_ref() {
            Some(FilterSpecifier::StatusCodeFilter(status)) => {
                let (op, value) = comparison(status.comparison.as_ref())?;
                Filter::Status(op, value)
            }
            Some(FilterSpecifier::DurationFilter(duration)) => {
                let (op, value) = comparison(duration.comparison.as_ref())?;
                Filter::Duration(op, value)
            }
            Some(FilterSpecifier::NotHealthCheckFilter(_)) => Filter::NotHealthCheck,
            Some(FilterSpecifier::RuntimeFilter(runtime)) => Filter::Sample(
                runtime
                    .percent_sampled
                    .as_ref()
                    .map_or(Chance::NEVER, Chance::new),
            ),
            Some(FilterSpecifier::AndFilter(and)) => Filter::All(all(&and.filters)?),
            Some(FilterSpecifier::OrFilter(or)) => Filter::Any(all(&or.filters)?),
            Some(FilterSpecifier::HeaderFilter(header)) => Filter::Header(HeaderMatch::compile(
                header
                    .header
                    .as_ref()
                    .ok_or_else(|| invalid("header", "absent"))?,
            )?),
            Some(FilterSpecifier::ResponseFlagFilter(flags)) => Filter::Flags(flags.flags.clone()),
            Some(FilterSpecifier::GrpcStatusFilter(grpc)) => {
                Filter::Grpc(grpc.statuses.clone(), grpc.exclude)
            }
            Some(FilterSpecifier::TraceableFilter(_)) => {
                return Err(invalid("traceable_filter", "not supported"));
            }
            Some(FilterSpecifier::LogTypeFilter(types)) => {
                for number in &types.types {
                    data::AccessLogType::try_from(*number)
                        .map_err(|_| invalid("log_type_filter", format!("{number} is no type")))?;
                }
                Filter::Types(types.types.clone(), types.exclude)
            }
            Some(FilterSpecifier::MetadataFilter(metadata)) => {
                let matcher = metadata.matcher.as_ref();
                Filter::Metadata(
                    matcher.map(MetadataMatch::of_stream).transpose()?,
                    metadata
                        .match_if_key_not_found
                        .as_ref()
                        .is_none_or(|v| v.value),
                )
            }
            Some(FilterSpecifier::ExtensionFilter(extension)) => {
                use proto::extension_filter::ConfigType;
                let Some(ConfigType::TypedConfig(any)) = extension.config_type.as_ref() else {
                    return Err(invalid("extension_filter.typed_config", "absent"));
                };
                match unpack::<ExpressionFilter>(any)? {
                    Some(cel) => Filter::Cel(Condition::parse(&cel.expression)?),
                    None => {
                        return Err(invalid(
                            any.type_url.clone(),
                            "this filter of access logs is not supported",
                        ));
                    }
                }
            }
            None => return Err(invalid("filter", "absent")),
        })
    }

    /// Whether it holds for a stream.
    pub(crate) fn holds(&self, facts: &Facts<'_>) -> bool {
        let info = facts.info;
        match self {
            Filter::Status(op, value) => compare(*op, info.response_code.into(), *value),
            Filter::Duration(op, value) => {
                let millis = info.response_end.unwrap_or_default().as_millis();
                compare(*op, u64::try_from(millis).unwrap_or(u64::MAX), *value)
            }
            Filter::NotHealthCheck => !info.health_check,
            Filter::Sample(chance) => chance.hits(),
            Filter::All(filters) => filters.iter().all(|filter| filter.holds(facts)),
            Filter::Any(filters) => filters.iter().any(|filter| filter.holds(facts)),
            Filter::Header(header) => facts.request.is_some_and(|head| header.matches(head)),
            Filter::Flags(_) if info.flags == ResponseFlags::default() => false,
            Filter::Flags(flags) if flags.is_empty() => true,
            Filter::Flags(flags) => info
                .flags
                .short()
                .split(',')
                .any(|flag| flags.iter().any(|f| f == flag)),
            Filter::Grpc(statuses, exclude) => {
                let status = info.grpc_status;
                let status = status.unwrap_or(crate::reject::grpc_status_of(info.response_code));
                statuses.contains(&status) != *exclude
            }
            Filter::Types(types, exclude) => {
                let kind = match facts.request {
                    Some(_) => data::AccessLogType::DownstreamEnd,
                    None => data::AccessLogType::TcpConnectionEnd,
                };
                types.contains(&i32::from(kind)) != *exclude
            }
            Filter::Metadata(None, missing) => *missing,
            Filter::Metadata(Some(metadata), missing) => metadata.finds(info).unwrap_or(*missing),
            Filter::Cel(condition) => condition.holds(facts),
        }
    }
}

fn compare(op: Op, left: u64, right: u64) -> bool {
    match op {
        Op::Eq => left == right,
        Op::Ge => left >= right,
        Op::Le => left <= right,
        Op::Ne => left != right,
    }
}

/// Whether `any` is of a kind this module can write.
pub fn is_known(any: &pb::Any) -> bool {
    ["FileAccessLog", "StdoutAccessLog", "StderrAccessLog"]
        .iter()
        .any(|known| any.type_url.ends_with(known))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        format::tests::{connection, request},
        info::StreamInfo,
    };

    fn facts_of(status: u16, check: impl FnOnce(&Facts<'_>)) {
        let mut info = StreamInfo::new(connection(), None);
        info.response_code = status;
        info.response_end = Some(Duration::from_millis(20));
        if status == 503 {
            info.flags.set(ResponseFlags::NO_HEALTHY_UPSTREAM);
        }
        let request = request();
        check(&Facts {
            request: Some(&request),
            ..Facts::of_connection(&info)
        });
    }

    #[test]
    fn filters() {
        let bad = Filter::Status(Op::Ge, 400);
        let flagged = Filter::Flags(vec!["UH".to_owned()]);
        facts_of(200, |facts| {
            assert!(!bad.holds(facts) && !flagged.holds(facts));
            assert!(Filter::Duration(Op::Le, 20).holds(facts));
            // Not gRPC: what its status means to a gRPC client.
            assert!(Filter::Grpc(vec![2], false).holds(facts));
        });
        facts_of(503, |facts| {
            assert!(bad.holds(facts) && flagged.holds(facts));
            assert!(
                !Filter::All(vec![Filter::NotHealthCheck, Filter::Sample(Chance::NEVER)])
                    .holds(facts)
            );
            assert!(
                Filter::Any(vec![Filter::Sample(Chance::NEVER), Filter::NotHealthCheck])
                    .holds(facts)
            );
        });
    }

    #[test]
    fn lines_reach_the_file_whole_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        let log = AccessLog {
            filter: None,
            format: text_format("%RESPONSE_CODE% %REQ(:PATH)%\n").unwrap(),
            sink: Sink::open(path.to_str().unwrap()).unwrap(),
        };
        for status in 200..300 {
            facts_of(status, |facts| log.write(facts));
        }
        flush(Duration::from_secs(5));
        let want: String = (200..300)
            .map(|status| format!("{status} /p?q=1\n"))
            .collect();
        assert_eq!(std::fs::read_to_string(path).unwrap(), want);
    }
    #[test]
    fn a_file_that_was_moved_is_opened_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("a.log"), dir.path().join("old.log"));
        let log = AccessLog {
            filter: None,
            format: text_format("%RESPONSE_CODE%\n").unwrap(),
            sink: Sink::open(path.to_str().unwrap()).unwrap(),
        };
        facts_of(200, |facts| log.write(facts));
        flush(Duration::from_secs(5));
        std::fs::rename(&path, &old).unwrap();
        reopen();
        while !path.exists() {
            std::thread::yield_now();
        }
        facts_of(201, |facts| log.write(facts));
        flush(Duration::from_secs(5));
        assert_eq!(std::fs::read_to_string(&old).unwrap(), "200\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "201\n");
    }

    #[test]
    fn the_last_lines_are_written_when_the_log_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        let log = AccessLog {
            filter: None,
            format: text_format("%RESPONSE_CODE%\n").unwrap(),
            sink: Sink::open(path.to_str().unwrap()).unwrap(),
        };
        facts_of(200, |facts| log.write(facts));
        drop(log);
        while std::fs::read_to_string(&path).unwrap() != "200\n" {
            std::thread::yield_now();
        }
    }
}
