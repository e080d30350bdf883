//! A bucket of tokens that fills evenly, shared by all workers without a lock. Envoy: `AtomicTokenBucketImpl`.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use lateen_protocols::envoy::envoy::r#type::v3::TokenBucket as BucketProto;
use tokio::time::Instant;

use crate::{
    clock,
    config_error::ConfigError,
    proto::{duration, invalid},
};

/// The bucket; full when it is made.
#[derive(Debug)]
pub(crate) struct TokenBucket {
    most: u32,
    per_second: f64,
    made: Instant,
    /// Seconds after `made` when the bucket was last empty, or would have been; bits of an `f64`.
    empty: AtomicU64,
}

impl TokenBucket {
    /// Compiles a bucket that fills no more often than each `shortest`.
    ///
    /// # Errors
    /// When it has no room, or the interval is too short.
    pub(crate) fn compile(
        config: &BucketProto,
        shortest: Duration,
    ) -> Result<TokenBucket, ConfigError> {
        if config.max_tokens == 0 {
            return Err(invalid("token_bucket.max_tokens", "must be greater than 0"));
        }
        let tokens = config.tokens_per_fill.map_or(1, |tokens| tokens.value);
        if tokens == 0 {
            return Err(invalid(
                "token_bucket.tokens_per_fill",
                "must be greater than 0",
            ));
        }
        let interval = config
            .fill_interval
            .as_ref()
            .ok_or_else(|| invalid("token_bucket.fill_interval", "absent"))?;
        let interval = duration("token_bucket.fill_interval", interval)?;
        if interval.is_zero() || interval < shortest {
            return Err(invalid(
                "token_bucket.fill_interval",
                format!("must be at least {} ms", shortest.as_millis().max(1)),
            ));
        }
        Ok(TokenBucket {
            most: config.max_tokens,
            per_second: f64::from(tokens) / interval.as_secs_f64(),
            made: clock::now(),
            empty: AtomicU64::new(f64::NEG_INFINITY.to_bits()),
        })
    }

    /// Takes `count` tokens, if there are so many.
    pub(crate) fn take(&self, count: u64) -> bool {
        // Fewer than 2^53 or more than any bucket holds.
        #[allow(clippy::cast_precision_loss, reason = "beyond any bucket's size")]
        let count = count as f64;
        let now = self.now();
        let taken = |empty: u64| {
            let left = self.at(now, f64::from_bits(empty)) - count;
            (left >= 0.0).then(|| (now - left / self.per_second).to_bits())
        };
        self.empty.fetch_update(Relaxed, Relaxed, taken).is_ok()
    }

    /// How many tokens there may be.
    pub(crate) fn most(&self) -> u32 {
        self.most
    }

    /// Tokens per second.
    pub(crate) fn rate(&self) -> f64 {
        self.per_second
    }

    /// Whole tokens that are left.
    pub(crate) fn left(&self) -> u32 {
        let left = self.at(self.now(), f64::from_bits(self.empty.load(Relaxed)));
        // Never negative, and no more than fit.
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "between 0 and `most`"
        )]
        let whole = left.max(0.0) as u32;
        whole
    }

    /// Until there is a token; zero if there is one.
    pub(crate) fn wait(&self) -> Duration {
        let left = self.at(self.now(), f64::from_bits(self.empty.load(Relaxed)));
        Duration::try_from_secs_f64(((1.0 - left) / self.per_second).max(0.0))
            .unwrap_or(Duration::MAX)
    }

    fn at(&self, now: f64, empty: f64) -> f64 {
        ((now - empty) * self.per_second).min(f64::from(self.most))
    }

    fn now(&self) -> f64 {
        clock::now()
            .saturating_duration_since(self.made)
            .as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use lateen_protocols::envoy::google::protobuf as pb;

    use super::*;

    fn bucket(most: u32, per_fill: u32, seconds: i64) -> TokenBucket {
        let config = BucketProto {
            max_tokens: most,
            tokens_per_fill: Some(pb::UInt32Value { value: per_fill }),
            fill_interval: Some(pb::Duration { seconds, nanos: 0 }),
        };
        TokenBucket::compile(&config, Duration::from_millis(50)).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_bucket_begins_full_and_fills_no_further() {
        let bucket = bucket(2, 1, 10);
        assert_eq!((bucket.left(), bucket.wait()), (2, Duration::ZERO));
        assert!(bucket.take(1) && bucket.take(1) && !bucket.take(1));
        assert_eq!((bucket.left(), bucket.wait()), (0, Duration::from_secs(10)));
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!(!bucket.take(1));
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!(bucket.take(1) && !bucket.take(1));
        tokio::time::advance(Duration::from_secs(1000)).await;
        assert_eq!(bucket.left(), 2);
        assert!(!bucket.take(3) && bucket.take(2));
    }

    #[test]
    fn a_bucket_that_cannot_be_is_refused() {
        let compile = |config: BucketProto| {
            TokenBucket::compile(&config, Duration::from_millis(50))
                .unwrap_err()
                .path
        };
        let none = BucketProto::default();
        assert_eq!(compile(none), "token_bucket.max_tokens");
        let some = BucketProto {
            max_tokens: 1,
            ..none
        };
        assert_eq!(compile(some), "token_bucket.fill_interval");
        let fast = BucketProto {
            fill_interval: Some(pb::Duration {
                seconds: 0,
                nanos: 1_000_000,
            }),
            ..some
        };
        assert_eq!(compile(fast), "token_bucket.fill_interval");
    }
}
