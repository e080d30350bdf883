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
    most: f64,
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
            most: f64::from(config.max_tokens),
            per_second: f64::from(tokens) / interval.as_secs_f64(),
            made: clock::now(),
            empty: AtomicU64::new(f64::NEG_INFINITY.to_bits()),
        })
    }

    /// A bucket that holds what comes in a second, and now `first` of it.
    pub(crate) fn of_second(per_second: f64, first: f64) -> TokenBucket {
        TokenBucket {
            most: per_second,
            per_second,
            made: clock::now(),
            empty: AtomicU64::new((-first / per_second).to_bits()),
        }
    }

    /// Leaves `count` tokens in it, whatever there were.
    pub(crate) fn leave(&self, count: f64) {
        let empty = self.now() - count / self.per_second;
        self.empty.store(empty.to_bits(), Relaxed);
    }

    /// Takes as many whole tokens as there are, up to `count`; gives how many.
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "whole, and between 0 and `count`, which counts bytes in memory"
    )]
    pub(crate) fn take_some(&self, count: u64) -> u64 {
        let now = self.now();
        let some = |empty: u64| {
            let left = self.at(now, f64::from_bits(empty));
            (left, left.min(count as f64).floor().max(0.0))
        };
        let taken = |empty: u64| {
            let (left, taken) = some(empty);
            (taken > 0.0).then(|| (now - (left - taken) / self.per_second).to_bits())
        };
        self.empty
            .fetch_update(Relaxed, Relaxed, taken)
            .map_or(0, |before| some(before).1 as u64)
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
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "whole and positive; too many are the most that can be told"
    )]
    pub(crate) fn most(&self) -> u32 {
        self.most as u32
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
        ((now - empty) * self.per_second).min(self.most)
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

    #[tokio::test(start_paused = true)]
    async fn a_bucket_gives_what_it_has() {
        let bucket = TokenBucket::of_second(1000.0, 50.0);
        assert_eq!((bucket.take_some(40), bucket.take_some(40)), (40, 10));
        assert_eq!(bucket.take_some(1), 0);
        tokio::time::advance(Duration::from_millis(100)).await;
        assert_eq!(bucket.take_some(1000), 100);
        tokio::time::advance(Duration::from_secs(10)).await;
        bucket.leave(5.0);
        assert_eq!(bucket.take_some(1000), 5);
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
