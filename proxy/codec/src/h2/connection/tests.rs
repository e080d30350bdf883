//! Both roles against each other, and each against raw frames.

mod pair;
