//! What connection managers and their codecs count, under Envoy's names.

use crate::stats::{Counter, Gauge, Histogram, Scope};

macro_rules! stats {
    ($($field:ident: $kind:ident = $name:literal,)+) => {
        /// `http.PREFIX.*`, under Envoy's names.
        #[derive(Debug)]
        #[allow(missing_docs, reason = "each is the name it has")]
        pub struct Stats { $(pub $field: stats!(@type $kind)),+ }

        impl Stats {
            pub(super) fn new(scope: &Scope) -> Stats {
                Stats { $($field: scope.$kind($name)),+ }
            }
        }
    };
    (@type counter) => { Counter };
    (@type gauge) => { Gauge };
    (@type histogram) => { Histogram };
}

stats! {
    cx_total: counter = "downstream_cx_total",
    cx_active: gauge = "downstream_cx_active",
    cx_http1_total: counter = "downstream_cx_http1_total",
    cx_http1_active: gauge = "downstream_cx_http1_active",
    cx_http2_total: counter = "downstream_cx_http2_total",
    cx_http2_active: gauge = "downstream_cx_http2_active",
    cx_ssl_total: counter = "downstream_cx_ssl_total",
    cx_ssl_active: gauge = "downstream_cx_ssl_active",
    cx_destroy: counter = "downstream_cx_destroy",
    cx_destroy_local: counter = "downstream_cx_destroy_local",
    cx_destroy_remote: counter = "downstream_cx_destroy_remote",
    cx_destroy_active_rq: counter = "downstream_cx_destroy_active_rq",
    cx_destroy_local_active_rq: counter = "downstream_cx_destroy_local_active_rq",
    cx_destroy_remote_active_rq: counter = "downstream_cx_destroy_remote_active_rq",
    cx_idle_timeout: counter = "downstream_cx_idle_timeout",
    cx_max_duration_reached: counter = "downstream_cx_max_duration_reached",
    cx_max_requests_reached: counter = "downstream_cx_max_requests_reached",
    cx_drain_close: counter = "downstream_cx_drain_close",
    cx_protocol_error: counter = "downstream_cx_protocol_error",
    cx_upgrades_total: counter = "downstream_cx_upgrades_total",
    cx_upgrades_active: gauge = "downstream_cx_upgrades_active",
    cx_rx_bytes_total: counter = "downstream_cx_rx_bytes_total",
    cx_tx_bytes_total: counter = "downstream_cx_tx_bytes_total",
    cx_length_ms: histogram = "downstream_cx_length_ms",
    rq_total: counter = "downstream_rq_total",
    rq_http1_total: counter = "downstream_rq_http1_total",
    rq_http2_total: counter = "downstream_rq_http2_total",
    rq_active: gauge = "downstream_rq_active",
    rq_completed: counter = "downstream_rq_completed",
    rq_1xx: counter = "downstream_rq_1xx",
    rq_2xx: counter = "downstream_rq_2xx",
    rq_3xx: counter = "downstream_rq_3xx",
    rq_4xx: counter = "downstream_rq_4xx",
    rq_5xx: counter = "downstream_rq_5xx",
    rq_time: histogram = "downstream_rq_time",
    rq_rx_reset: counter = "downstream_rq_rx_reset",
    rq_tx_reset: counter = "downstream_rq_tx_reset",
    rq_timeout: counter = "downstream_rq_timeout",
    rq_header_timeout: counter = "downstream_rq_header_timeout",
    rq_idle_timeout: counter = "downstream_rq_idle_timeout",
    rq_max_duration_reached: counter = "downstream_rq_max_duration_reached",
    rq_non_relative_path: counter = "downstream_rq_non_relative_path",
    rq_response_before_rq_complete: counter = "downstream_rq_response_before_rq_complete",
    rq_ws_on_non_ws_route: counter = "downstream_rq_ws_on_non_ws_route",
    cx_delayed_close_timeout: counter = "downstream_cx_delayed_close_timeout",
    no_route: counter = "no_route",
    no_cluster: counter = "no_cluster",
    rq_redirect: counter = "rq_redirect",
    rq_direct_response: counter = "rq_direct_response",
    router_rq_total: counter = "rq_total",
    redirect_bad_location: counter = "passthrough_internal_redirect_bad_location",
    redirect_unsafe_scheme: counter = "passthrough_internal_redirect_unsafe_scheme",
    redirect_too_many: counter = "passthrough_internal_redirect_too_many_redirects",
    redirect_no_route: counter = "passthrough_internal_redirect_no_route",
    redirect_predicate: counter = "passthrough_internal_redirect_predicate",
}

/// `http2.*`: what the codec counts, under Envoy's names.
#[derive(Debug)]
pub(super) struct Http2Stats {
    scope: Scope,
    pub(super) rx_reset: Counter,
    pub(super) tx_reset: Counter,
    pub(super) rx_messaging_error: Counter,
    pub(super) trailers: Counter,
    pub(super) keepalive_timeout: Counter,
    pub(super) tx_flush_timeout: Counter,
    pub(super) requests_rejected_with_underscores_in_headers: Counter,
    pub(super) dropped_headers_with_underscores: Counter,
}

/// `http1.*`.
#[derive(Debug)]
pub(super) struct Http1Stats {
    pub(super) requests_rejected_with_underscores_in_headers: Counter,
    pub(super) dropped_headers_with_underscores: Counter,
}

impl Http1Stats {
    pub(super) fn new(scope: &Scope) -> Http1Stats {
        Http1Stats {
            requests_rejected_with_underscores_in_headers: scope
                .counter("requests_rejected_with_underscores_in_headers"),
            dropped_headers_with_underscores: scope.counter("dropped_headers_with_underscores"),
        }
    }
}

impl Http2Stats {
    pub(super) fn new(scope: Scope) -> Http2Stats {
        Http2Stats {
            rx_reset: scope.counter("rx_reset"),
            tx_reset: scope.counter("tx_reset"),
            rx_messaging_error: scope.counter("rx_messaging_error"),
            trailers: scope.counter("trailers"),
            keepalive_timeout: scope.counter("keepalive_timeout"),
            tx_flush_timeout: scope.counter("tx_flush_timeout"),
            requests_rejected_with_underscores_in_headers: scope
                .counter("requests_rejected_with_underscores_in_headers"),
            dropped_headers_with_underscores: scope.counter("dropped_headers_with_underscores"),
            scope,
        }
    }

    /// Counts what ended a connection, by the codec's name for it.
    pub(super) fn count(&self, name: Option<&'static str>) {
        if let Some(name) = name {
            self.scope.counter(name).inc();
        }
    }
}

impl Stats {
    /// Counts the end of a connection; `busy` says whether requests were under way.
    pub(super) fn count_end(&self, by_peer: bool, busy: bool) {
        let (all, with_requests) = match by_peer {
            true => (&self.cx_destroy_remote, &self.cx_destroy_remote_active_rq),
            false => (&self.cx_destroy_local, &self.cx_destroy_local_active_rq),
        };
        all.inc();
        if busy {
            with_requests.inc();
            self.cx_destroy_active_rq.inc();
        }
    }

    /// Counts a response.
    pub(super) fn count_status(&self, status: u16) {
        match status {
            100..=199 => self.rq_1xx.inc(),
            200..=299 => self.rq_2xx.inc(),
            300..=399 => self.rq_3xx.inc(),
            400..=499 => self.rq_4xx.inc(),
            500..=599 => self.rq_5xx.inc(),
            _ => {}
        }
    }
}
