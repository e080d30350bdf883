//! Which parts of a DestinationRule hold for one port and subset.

use lateen_config::networking::{
    ClientTls, ConnectionPool, LoadBalancer, OutlierDetection, RetryBudget, TrafficPolicy,
};

use crate::model::{DestinationPolicy, Labels};

/// The settings in effect.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Policy<'a> {
    pub(super) balancer: Option<&'a LoadBalancer>,
    pub(super) pool: Option<&'a ConnectionPool>,
    pub(super) outlier: Option<&'a OutlierDetection>,
    pub(super) tls: Option<&'a ClientTls>,
    pub(super) retry_budget: Option<&'a RetryBudget>,
}

impl<'a> Policy<'a> {
    /// For a port and subset (empty: none).
    pub(super) fn of(rule: Option<&'a DestinationPolicy>, port: u16, subset: &str) -> Self {
        let Some(rule) = rule else {
            return Self::default();
        };
        let mut policy = Self::default();
        if let Some(top) = &rule.rule.traffic_policy {
            policy = Self::top(top);
            policy.replace_for_port(top, port);
        }
        if let Some(own) = rule
            .subset(subset)
            .and_then(|subset| subset.traffic_policy.as_ref())
        {
            let over = Self::top(own);
            policy = Self {
                balancer: over.balancer.or(policy.balancer),
                pool: over.pool.or(policy.pool),
                outlier: over.outlier.or(policy.outlier),
                tls: over.tls.or(policy.tls),
                retry_budget: over.retry_budget.or(policy.retry_budget),
            };
            policy.replace_for_port(own, port);
        }
        policy
    }

    fn top(policy: &'a TrafficPolicy) -> Self {
        Self {
            balancer: policy.load_balancer.as_ref(),
            pool: policy.connection_pool.as_ref(),
            outlier: policy.outlier_detection.as_ref(),
            tls: policy.tls.as_ref(),
            retry_budget: policy.retry_budget.as_ref(),
        }
    }

    /// Port-level settings replace everything that they could say; what they leave out is back at its default.
    fn replace_for_port(&mut self, policy: &'a TrafficPolicy, port: u16) {
        let wanted = policy.port_level_settings.iter().find(|settings| {
            settings
                .port
                .as_ref()
                .is_some_and(|selector| selector.number == u32::from(port))
        });
        if let Some(settings) = wanted {
            *self = Self {
                balancer: settings.load_balancer.as_ref(),
                pool: settings.connection_pool.as_ref(),
                outlier: settings.outlier_detection.as_ref(),
                tls: settings.tls.as_ref(),
                retry_budget: self.retry_budget,
            };
        }
    }
}

/// Labels of a subset's endpoints; `None` if nobody defines it.
pub(super) fn subset_labels<'a>(
    rule: Option<&'a DestinationPolicy>,
    subset: &str,
) -> Option<&'a Labels> {
    rule?.subset(subset).map(|subset| &subset.labels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ExportTo;

    #[test]
    fn ports_replace_and_subsets_override() {
        let rule = serde_json::from_value(serde_json::json!({
            "host": "a",
            "trafficPolicy": {
                "loadBalancer": {"simple": "RANDOM"},
                "retryBudget": {"percent": 30.0},
                "connectionPool": {"tcp": {"maxConnections": 1}},
                "portLevelSettings": [{"port": {"number": 81}, "connectionPool": {"tcp": {"maxConnections": 2}}}],
            },
            "subsets": [{"name": "v1", "trafficPolicy": {"tls": {"mode": "DISABLE"}}}],
        }))
        .unwrap();
        let rule = DestinationPolicy {
            host: "a".into(),
            namespace: "n".into(),
            rule,
            export_to: ExportTo::Everyone,
            objects: Vec::new(),
        };
        let connections =
            |policy: &Policy<'_>| policy.pool.and_then(|pool| pool.tcp.max_connections);
        let top = Policy::of(Some(&rule), 80, "");
        assert_eq!(
            (connections(&top), top.balancer.is_some(), top.tls.is_some()),
            (Some(1), true, false)
        );
        let port = Policy::of(Some(&rule), 81, "");
        assert_eq!(
            (connections(&port), port.balancer.is_some()),
            (Some(2), false),
            "the balancer is the default again"
        );
        assert!(port.retry_budget.is_some(), "a port has none of its own");
        let subset = Policy::of(Some(&rule), 80, "v1");
        assert_eq!(
            (connections(&subset), subset.tls.is_some()),
            (Some(1), true)
        );
    }
}
