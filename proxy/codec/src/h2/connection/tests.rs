//! Both roles against each other, and each against raw frames.

mod flood;
mod pair;
mod raw;
