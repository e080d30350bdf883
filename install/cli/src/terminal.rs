//! Colours and progress, on terminals only.

use std::io::{IsTerminal as _, Write as _};

fn paint(code: &str, text: &str, terminal: bool) -> String {
    if terminal && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// For standard error.
pub(crate) fn red(text: &str) -> String {
    paint("1;31", text, std::io::stderr().is_terminal())
}

/// For standard output.
pub(crate) fn green(text: &str) -> String {
    paint("32", text, std::io::stdout().is_terminal())
}

/// For standard output.
pub(crate) fn bold(text: &str) -> String {
    paint("1", text, std::io::stdout().is_terminal())
}

/// An error, on standard output.
pub(crate) fn paint_error(text: &str) -> String {
    paint("1;31", text, std::io::stdout().is_terminal())
}

/// A warning, on standard output.
pub(crate) fn paint_warning(text: &str) -> String {
    paint("33", text, std::io::stdout().is_terminal())
}

/// A step that is under way; on a terminal its line is replaced when it is done.
pub(crate) fn doing(text: &str) {
    if std::io::stdout().is_terminal() {
        print!("\r\x1b[K  … {text}");
        std::io::stdout().flush().ok();
    }
}

/// A step that is done.
pub(crate) fn done(text: &str) {
    let back = if std::io::stdout().is_terminal() {
        "\r\x1b[K"
    } else {
        ""
    };
    println!("{back}  {} {text}", green("✓"));
}
