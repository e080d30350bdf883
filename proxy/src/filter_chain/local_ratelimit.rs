//! How often a filter chain may be connected to. Envoy: `envoy.filters.network.local_ratelimit`.

use std::time::Duration;

use lateen_protocols::envoy::envoy::extensions::filters::network::local_ratelimit::v3::LocalRateLimit as LimitProto;

use crate::{
    config_error::ConfigError,
    filter::bucket::TokenBucket,
    proto::invalid,
    stats::{Counter, Registry},
};

/// Shortest time in which the bucket may be filled. Envoy: the same.
const SHORTEST_FILL: Duration = Duration::from_millis(50);

/// The filter of one filter chain; all workers share its bucket.
#[derive(Debug)]
pub struct ConnectionRate {
    bucket: TokenBucket,
    limited: Counter,
}

impl ConnectionRate {
    /// Compiles the filter; counts in `local_rate_limit.PREFIX.`. `None` if it is switched off.
    ///
    /// # Errors
    /// A field is absent, not valid or not supported.
    pub fn compile(
        config: &LimitProto,
        stats: &Registry,
    ) -> Result<Option<ConnectionRate>, ConfigError> {
        if config.stat_prefix.is_empty() {
            return Err(invalid("stat_prefix", "absent"));
        }
        if !config.share_key.is_empty() {
            return Err(invalid("share_key", "not supported"));
        }
        let bucket = config
            .token_bucket
            .as_ref()
            .ok_or_else(|| invalid("token_bucket", "absent"))?;
        let scope = stats.scope(&format!("local_rate_limit.{}.", config.stat_prefix));
        let bucket = TokenBucket::compile(bucket, SHORTEST_FILL)?;
        let enabled = config.runtime_enabled.as_ref().is_none_or(|flag| {
            flag.default_value
                .as_ref()
                .is_none_or(|default| default.value)
        });
        Ok(enabled.then(|| ConnectionRate {
            bucket,
            limited: scope.counter("rate_limited"),
        }))
    }

    /// Whether one more connection may come now.
    pub fn admits(&self) -> bool {
        if self.bucket.take(1) {
            return true;
        }
        self.limited.inc();
        false
    }
}

#[cfg(test)]
mod tests {
    use lateen_protocols::envoy::{
        envoy::{config::core::v3::RuntimeFeatureFlag, r#type::v3::TokenBucket as BucketProto},
        google::protobuf as pb,
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn connections_come_as_fast_as_tokens() {
        let stats = Registry::new();
        let mut config = LimitProto {
            stat_prefix: "p".to_owned(),
            token_bucket: Some(BucketProto {
                max_tokens: 1,
                tokens_per_fill: None,
                fill_interval: Some(pb::Duration {
                    seconds: 1,
                    nanos: 0,
                }),
            }),
            ..LimitProto::default()
        };
        let limit = ConnectionRate::compile(&config, &stats).unwrap().unwrap();
        assert!(limit.admits() && !limit.admits());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(limit.admits());
        let scope = stats.scope("local_rate_limit.p.");
        assert_eq!(scope.counter("rate_limited").value(), 1);
        config.runtime_enabled = Some(RuntimeFeatureFlag {
            default_value: Some(pb::BoolValue { value: false }),
            runtime_key: String::new(),
        });
        assert!(ConnectionRate::compile(&config, &stats).unwrap().is_none());
    }
}
