//! What a cluster counts, under Envoy's names.

use std::{fmt, ops::Deref, sync::Arc};

use crate::stats::{LazyCounter, Scope, instruments};

instruments! {
    /// Instruments of one cluster, named as in `cluster.NAME.*`.
    #[allow(missing_docs, reason = "Envoy's names")]
    pub struct Instruments {
        counter {
            assignment_stale, assignment_timeout_received, bind_errors,
            upstream_cx_total, upstream_cx_http1_total, upstream_cx_http2_total, upstream_cx_connect_fail,
            upstream_cx_connect_timeout, upstream_cx_connect_attempts_exceeded, upstream_cx_overflow,
            upstream_cx_pool_overflow,
            upstream_cx_destroy, upstream_cx_destroy_remote, upstream_cx_destroy_local,
            upstream_cx_destroy_with_active_rq, upstream_cx_destroy_local_with_active_rq,
            upstream_cx_destroy_remote_with_active_rq, upstream_cx_none_healthy,
            upstream_cx_max_requests, upstream_cx_max_duration_reached, upstream_cx_idle_timeout,
            upstream_cx_protocol_error,
            upstream_cx_rx_bytes_total, upstream_cx_tx_bytes_total, upstream_cx_close_notify,
            upstream_flow_control_backed_up_total, upstream_flow_control_drained_total,
            upstream_flow_control_paused_reading_total, upstream_flow_control_resumed_reading_total,
            upstream_internal_redirect_failed_total, upstream_internal_redirect_succeeded_total,
            upstream_rq_total, upstream_rq_completed, upstream_rq_pending_total, upstream_rq_pending_overflow,
            upstream_rq_pending_failure_eject, upstream_rq_cancelled, upstream_rq_maintenance_mode,
            upstream_rq_timeout, upstream_rq_max_duration_reached, upstream_rq_per_try_timeout,
            upstream_rq_per_try_idle_timeout, upstream_rq_rx_reset, upstream_rq_tx_reset, upstream_rq_retry,
            upstream_rq_retry_success, upstream_rq_retry_overflow, upstream_rq_retry_limit_exceeded,
            upstream_rq_retry_backoff_exponential, upstream_rq_retry_backoff_ratelimited,
            retry_or_shadow_abandoned,
            lb_healthy_panic, lb_subsets_created, lb_subsets_fallback, lb_subsets_fallback_panic,
            lb_subsets_removed, lb_subsets_selected, lb_zone_cluster_too_small, lb_zone_routing_all_directly,
            lb_zone_routing_cross_zone, lb_zone_routing_sampled,
            membership_change, original_dst_host_invalid,
            update_attempt, update_success, update_failure, update_empty, update_no_rebuild,
        }
        on_demand {
            upstream_rq_1xx, upstream_rq_2xx, upstream_rq_3xx, upstream_rq_4xx, upstream_rq_5xx,
            upstream_rq_200, upstream_rq_201, upstream_rq_204, upstream_rq_304, upstream_rq_400,
            upstream_rq_401, upstream_rq_403, upstream_rq_404, upstream_rq_429, upstream_rq_500,
            upstream_rq_502, upstream_rq_503, upstream_rq_504,
            internal_completed = "internal.upstream_rq_completed", internal_200 = "internal.upstream_rq_200",
            internal_2xx = "internal.upstream_rq_2xx", internal_3xx = "internal.upstream_rq_3xx",
            internal_4xx = "internal.upstream_rq_4xx", internal_5xx = "internal.upstream_rq_5xx",
            external_completed = "external.upstream_rq_completed", external_200 = "external.upstream_rq_200",
            external_2xx = "external.upstream_rq_2xx", external_3xx = "external.upstream_rq_3xx",
            external_4xx = "external.upstream_rq_4xx", external_5xx = "external.upstream_rq_5xx",
            http2_rx_reset = "http2.rx_reset", http2_tx_reset = "http2.tx_reset",
            http2_rx_messaging_error = "http2.rx_messaging_error", http2_trailers = "http2.trailers",
            http2_keepalive_timeout = "http2.keepalive_timeout",
            ssl_handshake = "ssl.handshake", ssl_connection_error = "ssl.connection_error",
            ssl_fail_verify_error = "ssl.fail_verify_error", ssl_fail_verify_san = "ssl.fail_verify_san",
        }
        gauge {
            upstream_cx_active, upstream_rq_active, upstream_rq_pending_active, lb_subsets_active,
            max_host_weight,
            membership_total, membership_healthy, membership_degraded, membership_excluded,
        }
        histogram { upstream_cx_connect_ms, upstream_cx_length_ms }
        histogram_on_demand { upstream_rq_time }
    }
}

/// Who asked for a response that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Caller {
    /// One inside the mesh (`x-envoy-internal`).
    Internal,
    /// Any other.
    External,
    /// A health checker, whose requests are not counted.
    HealthChecker,
}

/// The statistics of one cluster.
#[derive(Clone)]
pub struct ClusterStats {
    instruments: Arc<Instruments>,
    scope: Scope,
}

impl Deref for ClusterStats {
    type Target = Instruments;

    fn deref(&self) -> &Instruments {
        &self.instruments
    }
}

impl fmt::Debug for ClusterStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.scope.fmt(f)
    }
}

impl ClusterStats {
    pub(super) fn new(scope: Scope) -> ClusterStats {
        ClusterStats {
            instruments: scope.group(),
            scope,
        }
    }

    /// The scope all of it is in.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Counts the status that ended a request, whether the upstream sent it or we did.
    pub(crate) fn answered(&self, status: u16, caller: Caller) {
        self.answered_to(status, caller);
        if caller == Caller::HealthChecker {
            return;
        }
        self.upstream_rq_completed.inc();
        match status / 100 {
            1 => self.upstream_rq_1xx.inc(),
            2 => self.upstream_rq_2xx.inc(),
            3 => self.upstream_rq_3xx.inc(),
            4 => self.upstream_rq_4xx.inc(),
            _ => self.upstream_rq_5xx.inc(),
        }
        match self.common(status) {
            Some(counter) => counter.inc(),
            None => self.status("", status),
        }
    }

    fn answered_to(&self, status: u16, caller: Caller) {
        let (prefix, completed, ok, classes) = match caller {
            Caller::HealthChecker => return,
            Caller::Internal => (
                "internal.",
                &self.internal_completed,
                &self.internal_200,
                [
                    &self.internal_2xx,
                    &self.internal_3xx,
                    &self.internal_4xx,
                    &self.internal_5xx,
                ],
            ),
            Caller::External => (
                "external.",
                &self.external_completed,
                &self.external_200,
                [
                    &self.external_2xx,
                    &self.external_3xx,
                    &self.external_4xx,
                    &self.external_5xx,
                ],
            ),
        };
        completed.inc();
        if let Some(class) = classes.get(usize::from(status / 100).wrapping_sub(2)) {
            class.inc();
        }
        match status {
            200 => ok.inc(),
            _ => self.status(prefix, status),
        }
    }

    /// Counts the status of an attempt that is made again.
    pub(crate) fn retried(&self, status: u16) {
        let class = format!("retry.upstream_rq_{}xx", status / 100);
        self.scope.counter(&class).inc();
        self.status("retry.", status);
    }

    /// The counter of a status that has one of its own: no name is looked up for it.
    fn common(&self, status: u16) -> Option<&LazyCounter> {
        Some(match status {
            200 => &self.upstream_rq_200,
            201 => &self.upstream_rq_201,
            204 => &self.upstream_rq_204,
            304 => &self.upstream_rq_304,
            400 => &self.upstream_rq_400,
            401 => &self.upstream_rq_401,
            403 => &self.upstream_rq_403,
            404 => &self.upstream_rq_404,
            429 => &self.upstream_rq_429,
            500 => &self.upstream_rq_500,
            502 => &self.upstream_rq_502,
            503 => &self.upstream_rq_503,
            504 => &self.upstream_rq_504,
            _ => return None,
        })
    }

    fn status(&self, prefix: &'static str, status: u16) {
        self.scope
            .counter(&format!("{prefix}upstream_rq_{status}"))
            .inc();
    }
}
