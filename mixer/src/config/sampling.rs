//! Sampling of reports: `sampling` of a rule's spec (istio.io/api `policy/v1beta1/cfg.proto`, message Sampling).

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use lateen_engine::{AttributeTable, Bag, Expression, Language, Tracker, parse_duration};
use serde::Deserialize;
use serde_json::Value as Json;
use tokio::time::Instant;

use super::object::Fault;

/// Which of the reports that a rule's match holds for are taken.
#[derive(Debug)]
pub struct Sampling {
    random: Option<Random>,
    rate: Option<Rate>,
}

#[derive(Debug)]
struct Random {
    /// Requests with the same value are taken together or not at all.
    by: Option<Expression>,
    /// Decides apart from other rules about the same value.
    salt: Option<u64>,
    /// Out of `u64::MAX`.
    threshold: u64,
}

/// The first entries of each window, and then one of so many.
#[derive(Debug)]
struct Rate {
    window: Duration,
    unsampled: u64,
    one_in: u64,
    state: Mutex<Option<(Instant, u64)>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Raw {
    random: Option<RawRandom>,
    #[serde(alias = "rate_limit")]
    rate_limit: Option<RawRate>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawRandom {
    #[serde(alias = "attribute_expression")]
    attribute_expression: String,
    #[serde(alias = "percent_sampled")]
    percent_sampled: Percent,
    #[serde(alias = "use_independent_randomness")]
    use_independent_randomness: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Percent {
    numerator: u32,
    denominator: Denominator,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Denominator {
    #[default]
    Hundred,
    TenThousand,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawRate {
    #[serde(alias = "sampling_duration")]
    sampling_duration: String,
    #[serde(alias = "max_unsampled_entries")]
    max_unsampled_entries: u64,
    #[serde(alias = "sampling_rate")]
    sampling_rate: u64,
}

impl Sampling {
    /// Reads `sampling` of rule `rule`; nothing is written: all are taken.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(
        json: &Json,
        rule: &str,
        language: Language,
        table: &AttributeTable,
    ) -> Result<Option<Self>, Fault> {
        if json.is_null() {
            return Ok(None);
        }
        let raw = Raw::deserialize(json).map_err(|error| Fault::new("sampling", error))?;
        let random = raw
            .random
            .map(|raw| Random::read(&raw, rule, language, table))
            .transpose()?;
        let rate = raw.rate_limit.map(|raw| Rate::read(&raw)).transpose()?;
        if random.is_none() && rate.is_none() {
            return Err(Fault::new("sampling", "say random or rateLimit"));
        }
        Ok(Some(Self { random, rate }))
    }

    /// Whether this one is taken.
    pub fn takes(&self, bag: &Bag) -> bool {
        self.random.as_ref().is_none_or(|random| random.takes(bag))
            && self.rate.as_ref().is_none_or(Rate::takes)
    }
}

impl Random {
    fn read(
        raw: &RawRandom,
        rule: &str,
        language: Language,
        table: &AttributeTable,
    ) -> Result<Self, Fault> {
        let by = match raw.attribute_expression.as_str() {
            "" => None,
            text => Some(
                Expression::compile_in(language, text, table)
                    .map_err(|error| Fault::new("sampling.random.attributeExpression", error))?,
            ),
        };
        let of: u32 = match raw.percent_sampled.denominator {
            Denominator::Hundred => 100,
            Denominator::TenThousand => 10_000,
        };
        let part = raw.percent_sampled.numerator;
        if part > of {
            let reason = format!("{part} of {of} are more than all");
            return Err(Fault::new("sampling.random.percentSampled", reason));
        }
        let threshold = u128::from(u64::MAX) * u128::from(part) / u128::from(of);
        Ok(Self {
            by,
            salt: raw.use_independent_randomness.then(|| hash(&rule, 0)),
            threshold: u64::try_from(threshold).unwrap_or(u64::MAX),
        })
    }

    fn takes(&self, bag: &Bag) -> bool {
        let value = self
            .by
            .as_ref()
            .and_then(|by| by.evaluate(bag, &mut Tracker::off()).ok());
        let drawn = match value {
            // Every Mixer decides alike about a request.
            Some(value) => hash(&value.to_string(), self.salt.unwrap_or(0)),
            None => rand::random(),
        };
        self.threshold == u64::MAX || drawn < self.threshold
    }
}

fn hash(value: &(impl std::hash::Hash + ?Sized), salt: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    salt.hash(&mut hasher);
    value.hash(&mut hasher);
    hasher.finish()
}

impl Rate {
    fn read(raw: &RawRate) -> Result<Self, Fault> {
        let window = parse_duration(&raw.sampling_duration)
            .and_then(|span| span.to_std().ok())
            .filter(|span| !span.is_zero())
            .ok_or_else(|| {
                let reason = format!("{:?} is no time; write 1s", raw.sampling_duration);
                Fault::new("sampling.rateLimit.samplingDuration", reason)
            })?;
        Ok(Self {
            window,
            unsampled: raw.max_unsampled_entries,
            one_in: raw.sampling_rate,
            state: Mutex::new(None),
        })
    }

    fn takes(&self) -> bool {
        let now = Instant::now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let count = match *state {
            Some((begun, count)) if now.duration_since(begun) < self.window => {
                *state = Some((begun, count + 1));
                count
            }
            _ => {
                *state = Some((now, 1));
                0
            }
        };
        match count.checked_sub(self.unsampled) {
            None => true,
            // A rate of nothing: no more in this window.
            Some(over) => self.one_in > 0 && over % self.one_in == 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sampling(json: &Json) -> Result<Sampling, Fault> {
        let table = AttributeTable::default_vocabulary();
        Ok(Sampling::read(json, "a.rule.b", Language::Cexl, &table)?.expect("written"))
    }

    fn share(json: &Json) -> usize {
        let sampling = sampling(json).unwrap();
        let mut bag = Bag::new(&AttributeTable::default_vocabulary());
        let ids = (0..20_000).map(|i| format!("id-{i}"));
        ids.filter(|id| {
            bag.set_by_name("request.id", id.as_str()).unwrap();
            sampling.takes(&bag)
        })
        .count()
    }

    #[test]
    fn one_percent_is_one_percent() {
        let percent = |numerator: u32| json!({"numerator": numerator});
        let by_id =
            json!({"random": {"attributeExpression": "request.id", "percentSampled": percent(1)}});
        assert!((150..250).contains(&share(&by_id)), "{}", share(&by_id));
        assert_eq!(share(&by_id), share(&by_id), "the same ones each time");
        let by_chance = json!({"random": {"percent_sampled": {"numerator": 50, "denominator": "TEN_THOUSAND"}}});
        assert!((50..160).contains(&share(&by_chance)));
        assert_eq!(
            share(&json!({"random": {"percentSampled": percent(100)}})),
            20_000
        );
        assert_eq!(share(&json!({"random": {}})), 0);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_rate_takes_the_first_and_then_some() {
        let sampling = sampling(&json!({"rateLimit": {
            "samplingDuration": "3600s", "maxUnsampledEntries": 3, "samplingRate": 4
        }}))
        .unwrap();
        let bag = Bag::new(&AttributeTable::default_vocabulary());
        let taken: String = (0..12)
            .map(|_| if sampling.takes(&bag) { 'x' } else { '-' })
            .collect();
        assert_eq!(taken, "xxxx---x---x");
    }

    #[test]
    fn nonsense_is_refused() {
        for json in [
            json!({}),
            json!({"randomly": {}}),
            json!({"random": {"percentSampled": {"numerator": 101}}}),
            json!({"random": {"attributeExpression": "request.idd"}}),
            json!({"rateLimit": {"samplingDuration": "1"}}),
        ] {
            assert!(sampling(&json).is_err(), "{json}");
        }
    }
}
