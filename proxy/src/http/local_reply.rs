//! `local_reply_config`: what answers of our own look like. Envoy: `LocalReply`.

use std::borrow::Cow;

use lateen_protocols::envoy::envoy::{
    config::core::v3::{SubstitutionFormatString, substitution_format_string::Format as Kind},
    extensions::filters::network::http_connection_manager::v3::{LocalReplyConfig, ResponseMapper},
};

use crate::{
    access_log::Filter,
    config_error::ConfigError,
    format::{Facts, Format, JsonFormat},
    head::{Known, RequestHead},
    proto::invalid,
    reject::Reject,
    route::{Selected, data_source, headers::HeaderOps},
    router::SharedInfo,
};

/// Mappers in order, of which the first that matches acts, and the form of all bodies.
#[derive(Debug)]
pub(super) struct LocalReplies {
    mappers: Vec<Mapper>,
    form: Option<Form>,
}

#[derive(Debug)]
struct Mapper {
    filter: Filter,
    status: Option<u16>,
    body: Option<String>,
    headers: HeaderOps,
    form: Option<Form>,
}

#[derive(Debug)]
struct Form {
    body: BodyFormat,
    content_type: String,
}

#[derive(Debug)]
enum BodyFormat {
    Text(Format),
    Json(JsonFormat),
}

impl LocalReplies {
    /// Compiles Envoy's configuration.
    ///
    /// # Errors
    /// When a filter or format is not valid or not supported.
    pub(super) fn compile(config: &LocalReplyConfig) -> Result<LocalReplies, ConfigError> {
        Ok(LocalReplies {
            mappers: config
                .mappers
                .iter()
                .map(|mapper| Mapper::compile(mapper).map_err(|error| error.within("mappers")))
                .collect::<Result<_, _>>()?,
            form: form(config.body_format.as_ref(), "body_format")?,
        })
    }

    /// Changes a reply as configured; formats and access log see the status it is changed to.
    pub(super) fn rewrite(
        &self,
        reject: &mut Reject,
        info: &SharedInfo,
        request: Option<&RequestHead>,
        route: Option<&Selected>,
    ) {
        let mapper = {
            let info = info.borrow();
            let facts = Facts {
                request,
                route,
                ..Facts::of_connection(&info)
            };
            self.mappers
                .iter()
                .find(|mapper| mapper.filter.holds(&facts))
        };
        if let Some(mapper) = mapper {
            if let Some(status) = mapper.status {
                reject.status = status;
                info.borrow_mut().response_code = status;
            }
            if let Some(body) = &mapper.body {
                reject.body = Cow::Owned(body.clone());
            }
        }
        let info = info.borrow();
        let facts = Facts {
            request,
            route,
            local_reply: &reject.body,
            ..Facts::of_connection(&info)
        };
        let values = mapper.map(|mapper| (&mapper.headers, mapper.headers.values(&facts)));
        let form = mapper
            .and_then(|mapper| mapper.form.as_ref())
            .or(self.form.as_ref());
        let body = form.map(|form| {
            let mut body = Vec::new();
            match &form.body {
                BodyFormat::Text(format) => format.write(&facts, &mut body),
                BodyFormat::Json(format) => {
                    format.write(&facts, &mut body);
                    body.push(b'\n');
                }
            }
            String::from_utf8_lossy(&body).into_owned()
        });
        if let Some((ops, values)) = values {
            ops.apply(&mut reject.headers, values);
        }
        if let Some(body) = body {
            reject.body = Cow::Owned(body);
        }
        if let Some(form) = form
            && !reject.body.is_empty()
            && reject.headers.known(Known::ContentType).is_none()
        {
            reject
                .headers
                .append(Known::ContentType, &form.content_type);
        }
    }
}

impl Mapper {
    fn compile(config: &ResponseMapper) -> Result<Mapper, ConfigError> {
        let status = match config.status_code.as_ref() {
            None => None,
            Some(status) => Some(
                u16::try_from(status.value)
                    .ok()
                    .filter(|status| (200..600).contains(status))
                    .ok_or_else(|| invalid("status_code", "not within 200 to 599"))?,
            ),
        };
        let body = match config.body.as_ref() {
            None => None,
            Some(source) => Some(
                String::from_utf8(data_source(source)?.to_vec())
                    .map_err(|_| invalid("body", "not UTF-8"))?,
            ),
        };
        Ok(Mapper {
            filter: Filter::compile(
                config
                    .filter
                    .as_ref()
                    .ok_or_else(|| invalid("filter", "absent"))?,
            )?,
            status,
            body,
            headers: HeaderOps::compile(&config.headers_to_add, &[])?,
            form: form(config.body_format_override.as_ref(), "body_format_override")?,
        })
    }
}

fn form(
    config: Option<&SubstitutionFormatString>,
    field: &str,
) -> Result<Option<Form>, ConfigError> {
    config
        .map(|config| Form::compile(config).map_err(|error| error.within(field)))
        .transpose()
}

impl Form {
    fn compile(config: &SubstitutionFormatString) -> Result<Form, ConfigError> {
        let omit = config.omit_empty_values;
        let (body, usual) = match config.format.as_ref() {
            Some(Kind::TextFormat(text)) => {
                (BodyFormat::Text(Format::text(text, omit)?), "text/plain")
            }
            Some(Kind::TextFormatSource(source)) => {
                let text = data_source(source)?;
                let text = std::str::from_utf8(&text)
                    .map_err(|_| invalid("text_format_source", "not UTF-8"))?;
                (BodyFormat::Text(Format::text(text, omit)?), "text/plain")
            }
            Some(Kind::JsonFormat(json)) => (
                BodyFormat::Json(JsonFormat::compile(json, omit)?),
                "application/json",
            ),
            None => return Err(invalid("format", "absent")),
        };
        Ok(Form {
            body,
            content_type: match config.content_type.as_str() {
                "" => usual.to_owned(),
                given => given.to_owned(),
            },
        })
    }
}
