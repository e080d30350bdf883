//! Groups: the instruments that every cluster, listener or connection manager has, made all at once.
//!
//! A group is a struct of instruments that take four bytes each and no memory of their own before they are
//! touched; their names are in the code. A hundred counters that nobody counts in are one small allocation.

use std::{any::Any, fmt};

use super::{Instrument, cells::Lazy, count_in};

/// Instruments of a scope that are made together; see [`instruments`].
pub trait Group: Any + Send + Sync + fmt::Debug {
    /// Gives all of them with their names, and whether admin shows them before they are touched.
    fn each<'a>(&'a self, see: &mut dyn FnMut(&'static str, Instrument<'a>, Shown));
}

/// When admin shows an instrument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// Always.
    Always,
    /// Once it was touched.
    OnceTouched,
}

/// A counter of a group.
#[derive(Default)]
pub struct LazyCounter(pub(super) Lazy);

impl LazyCounter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        count_in(self.0.index(), n);
    }

    /// The sum over all workers.
    pub fn value(&self) -> u64 {
        self.0.sum()
    }
}

impl fmt::Debug for LazyCounter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Counter({})", self.value())
    }
}

/// A gauge of a group. It is either set or counted, not both at once.
#[derive(Default)]
pub struct LazyGauge(pub(super) Lazy);

impl LazyGauge {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Takes one off.
    pub fn dec(&self) {
        self.add(-1);
    }

    /// Adds `n`, which may be negative.
    pub fn add(&self, n: i64) {
        count_in(self.0.index(), n.cast_unsigned());
    }

    /// Makes the value `value`.
    pub fn set(&self, value: u64) {
        if value != 0 || self.0.touched() {
            super::cells::set(self.0.index(), value);
        }
    }

    /// The sum over all workers; a difference that is briefly negative reads as 0.
    pub fn value(&self) -> u64 {
        super::positive(self.0.sum())
    }
}

impl fmt::Debug for LazyGauge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gauge({})", self.value())
    }
}

/// Declares a [`Group`]: `struct Name { counter { a, b = "name.of.b" } gauge { c } histogram { d } }`. Kinds
/// `on_demand` (counters), `gauge_on_demand` and `histogram_on_demand` are shown only once they were touched.
macro_rules! instruments {
    ($(#[$meta:meta])* $vis:vis struct $group:ident {
        $($kind:ident { $($(#[$doc:meta])* $field:ident $(= $text:literal)?),+ $(,)? })+
    }) => {
        $(#[$meta])*
        #[derive(Debug, Default)]
        $vis struct $group { $($($(#[$doc])* pub $field: $crate::stats::instruments!(@type $kind),)+)+ }

        impl $crate::stats::Group for $group {
            fn each<'a>(
                &'a self,
                see: &mut dyn FnMut(&'static str, $crate::stats::Instrument<'a>, $crate::stats::Shown),
            ) {
                $($(
                    see(
                        $crate::stats::instruments!(@name $field $($text)?),
                        $crate::stats::instruments!(@instrument $kind &self.$field),
                        $crate::stats::instruments!(@shown $kind),
                    );
                )+)+
            }
        }
    };
    (@name $name:ident) => { stringify!($name) };
    (@name $name:ident $text:literal) => { $text };
    (@type counter) => { $crate::stats::LazyCounter };
    (@type on_demand) => { $crate::stats::LazyCounter };
    (@type gauge) => { $crate::stats::LazyGauge };
    (@type gauge_on_demand) => { $crate::stats::LazyGauge };
    (@type histogram_on_demand) => { $crate::stats::LazyHistogram };
    (@type histogram) => { $crate::stats::LazyHistogram };
    (@instrument counter $field:expr) => { $crate::stats::Instrument::Counter($field) };
    (@instrument on_demand $field:expr) => { $crate::stats::Instrument::Counter($field) };
    (@instrument gauge $field:expr) => { $crate::stats::Instrument::Gauge($field) };
    (@instrument gauge_on_demand $field:expr) => { $crate::stats::Instrument::Gauge($field) };
    (@instrument histogram_on_demand $field:expr) => { $crate::stats::Instrument::Histogram($field) };
    (@instrument histogram $field:expr) => { $crate::stats::Instrument::Histogram($field) };
    (@shown on_demand) => { $crate::stats::Shown::OnceTouched };
    (@shown histogram_on_demand) => { $crate::stats::Shown::OnceTouched };
    (@shown gauge_on_demand) => { $crate::stats::Shown::OnceTouched };
    (@shown $kind:ident) => { $crate::stats::Shown::Always };
}
pub(crate) use instruments;
