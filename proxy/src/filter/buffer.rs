//! Lets a request go on only when its whole body is here. Envoy: `envoy.filters.http.buffer`.

use std::sync::Arc;

use lateen_protocols::envoy::envoy::extensions::filters::http::buffer::v3::{
    Buffer as BufferProto, BufferPerRoute, buffer_per_route::Override,
};

use crate::{
    body::Body,
    config_error::ConfigError,
    filter::{FilterContext, RouteFilterConfig, gather},
    head::{Known, RequestHead},
    proto::invalid,
    reject::Reject,
};

/// The filter: how many bytes are kept at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    limit: usize,
}

impl Buffer {
    /// Compiles the filter.
    ///
    /// # Errors
    /// No limit is given.
    pub fn compile(config: &BufferProto) -> Result<Buffer, ConfigError> {
        match config.max_request_bytes.as_ref() {
            Some(limit) if limit.value > 0 => Ok(Buffer {
                limit: limit.value as usize,
            }),
            _ => Err(invalid("max_request_bytes", "must be greater than 0")),
        }
    }

    /// Compiles a route's configuration.
    ///
    /// # Errors
    /// When it says nothing, or gives no limit.
    pub fn compile_route(config: &BufferPerRoute) -> Result<RouteFilterConfig, ConfigError> {
        match config.r#override.as_ref() {
            Some(Override::Disabled(true)) => Ok(RouteFilterConfig::Disabled),
            Some(Override::Disabled(false)) => Err(invalid("disabled", "may only be true")),
            Some(Override::Buffer(buffer)) => Ok(RouteFilterConfig::Buffer(Arc::new(
                Buffer::compile(buffer)?,
            ))),
            None => Err(invalid("override", "absent")),
        }
    }

    pub(super) async fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
        body: &mut Body,
    ) -> Result<(), Reject> {
        let limit = match cx.config(head) {
            Some(RouteFilterConfig::Buffer(own)) => own.limit,
            _ => self.limit,
        };
        // A tunnel has no end to wait for.
        if body.is_end_stream()
            || head.headers.known(Known::Upgrade).is_some()
            || *head.method == *b"CONNECT"
        {
            return Ok(());
        }
        let read = gather::read(body, limit)
            .await
            .map_err(|error| gather::broken(&error))?;
        if !read.whole {
            return Err(gather::too_large());
        }
        if head.headers.known(Known::ContentLength).is_none() {
            head.headers
                .append(Known::ContentLength, read.data.len().to_string());
        }
        Ok(())
    }
}
