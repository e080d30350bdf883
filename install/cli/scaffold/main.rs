//! The adapter as a program: `test`, `serve`, `config`.

use std::{process::ExitCode, sync::Arc};

fn main() -> ExitCode {
    lateen_adapter::program::main(Arc::new(__CRATE__::Scaffold))
}
