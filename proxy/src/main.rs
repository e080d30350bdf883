//! The proxy's program: parse, build, run, drain.

fn main() {}
