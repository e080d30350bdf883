//! What a cluster counts, under Envoy's names.

use crate::stats::{Counter, Gauge, Histogram, Scope};

macro_rules! instruments {
    ($($kind:ident { $($name:ident $(= $text:literal)?),+ $(,)? })+) => {
        /// Instruments of one cluster, named as in `cluster.NAME.*`.
        #[derive(Debug)]
        #[allow(missing_docs, reason = "Envoy's names")]
        pub struct ClusterStats { $($(pub $name: instruments!(@type $kind),)+)+ scope: Scope }

        impl ClusterStats {
            pub(super) fn new(scope: Scope) -> ClusterStats {
                ClusterStats { $($($name: scope.$kind(instruments!(@name $name $($text)?)),)+)+ scope }
            }
        }
    };
    (@name $name:ident) => { stringify!($name) };
    (@name $name:ident $text:literal) => { $text };
    (@type counter) => { Counter };
    (@type gauge) => { Gauge };
    (@type histogram) => { Histogram };
}

instruments! {
    counter {
        upstream_cx_total, upstream_cx_http1_total, upstream_cx_http2_total, upstream_cx_connect_fail,
        upstream_cx_connect_timeout, upstream_cx_connect_attempts_exceeded, upstream_cx_overflow,
        upstream_cx_destroy, upstream_cx_destroy_remote, upstream_cx_destroy_local,
        upstream_cx_destroy_with_active_rq, upstream_cx_none_healthy,
        upstream_cx_max_requests, upstream_cx_idle_timeout, upstream_cx_protocol_error,
        upstream_cx_rx_bytes_total, upstream_cx_tx_bytes_total, upstream_cx_close_notify,
        upstream_rq_total, upstream_rq_completed, upstream_rq_pending_total, upstream_rq_pending_overflow,
        upstream_rq_pending_failure_eject, upstream_rq_cancelled, upstream_rq_maintenance_mode,
        upstream_rq_timeout, upstream_rq_max_duration_reached, upstream_rq_per_try_timeout,
        upstream_rq_rx_reset, upstream_rq_tx_reset, upstream_rq_retry, upstream_rq_retry_success,
        upstream_rq_retry_overflow, upstream_rq_retry_limit_exceeded,
        upstream_rq_retry_backoff_exponential, retry_or_shadow_abandoned,
        upstream_rq_1xx, upstream_rq_2xx, upstream_rq_3xx, upstream_rq_4xx, upstream_rq_5xx,
        membership_change, update_attempt, update_success, update_failure, update_empty,
    }
    counter {
        ssl_handshake = "ssl.handshake", ssl_connection_error = "ssl.connection_error",
        ssl_fail_verify_error = "ssl.fail_verify_error", ssl_fail_verify_san = "ssl.fail_verify_san",
    }
    gauge {
        upstream_cx_active, upstream_rq_active, upstream_rq_pending_active,
        membership_total, membership_healthy, membership_degraded, membership_excluded,
    }
    histogram { upstream_cx_connect_ms, upstream_cx_length_ms, upstream_rq_time }
}

impl ClusterStats {
    /// The scope all of it is in.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Counts the status that ended a request, whether the upstream sent it or we did.
    pub(crate) fn answered(&self, status: u16) {
        self.upstream_rq_completed.inc();
        match status / 100 {
            1 => self.upstream_rq_1xx.inc(),
            2 => self.upstream_rq_2xx.inc(),
            3 => self.upstream_rq_3xx.inc(),
            4 => self.upstream_rq_4xx.inc(),
            _ => self.upstream_rq_5xx.inc(),
        }
        self.status("", status);
    }

    /// Counts the status of an attempt that is made again.
    pub(crate) fn retried(&self, status: u16) {
        let class = format!("retry.upstream_rq_{}xx", status / 100);
        self.scope.counter(&class).inc();
        self.status("retry.", status);
    }

    fn status(&self, prefix: &'static str, status: u16) {
        // Common ones are spelled out so that they cost no formatting.
        let name = match (prefix, status) {
            ("", 200) => "upstream_rq_200",
            ("", 204) => "upstream_rq_204",
            ("", 304) => "upstream_rq_304",
            ("", 404) => "upstream_rq_404",
            ("", 500) => "upstream_rq_500",
            ("", 503) => "upstream_rq_503",
            ("", 504) => "upstream_rq_504",
            _ => {
                self.scope
                    .counter(&format!("{prefix}upstream_rq_{status}"))
                    .inc();
                return;
            }
        };
        self.scope.counter(name).inc();
    }
}
