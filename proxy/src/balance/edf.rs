//! Earliest deadline first: weighted round robin that spreads each choice evenly over time.

use std::{cmp::Ordering, collections::BinaryHeap};

#[derive(Debug)]
struct Entry {
    deadline: f64,
    /// Breaks ties in the order of insertion.
    order: u64,
    index: usize,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Entry) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    /// The heap gives the greatest: the earliest deadline.
    fn cmp(&self, other: &Entry) -> Ordering {
        other
            .deadline
            .total_cmp(&self.deadline)
            .then(other.order.cmp(&self.order))
    }
}

/// A schedule over the indexes `0..n`.
#[derive(Debug)]
pub(super) struct Edf {
    heap: BinaryHeap<Entry>,
    now: f64,
    order: u64,
}

impl Edf {
    /// A schedule of things with these weights; those that are not positive are never chosen.
    pub(super) fn new(weights: impl Iterator<Item = f64>) -> Edf {
        let mut edf = Edf {
            heap: BinaryHeap::new(),
            now: 0.0,
            order: 0,
        };
        for (index, weight) in weights.enumerate() {
            if weight > 0.0 {
                edf.push(index, weight);
            }
        }
        edf
    }

    fn push(&mut self, index: usize, weight: f64) {
        self.order += 1;
        self.heap.push(Entry {
            deadline: self.now + 1.0 / weight.max(f64::MIN_POSITIVE),
            order: self.order,
            index,
        });
    }

    /// The next index; `weight` gives the weight it comes back with.
    pub(super) fn pick(&mut self, weight: impl FnOnce(usize) -> f64) -> Option<usize> {
        let entry = self.heap.pop()?;
        self.now = entry.deadline;
        self.push(entry.index, weight(entry.index));
        Some(entry.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_the_weights_in_every_window() {
        let weights = [5.0, 3.0, 2.0, 0.0];
        let mut edf = Edf::new(weights.into_iter());
        let mut counts = [0; 4];
        for round in 1..=20 {
            for _ in 0..10 {
                counts[edf.pick(|index| weights[index]).unwrap()] += 1;
            }
            assert!(
                counts[0] == 5 * round || counts[0] == 5 * round + 1 || counts[0] + 1 == 5 * round
            );
        }
        assert!((i32::from(counts[1] as u16) - 60).abs() <= 1);
        assert_eq!(counts[3], 0);
    }
}
