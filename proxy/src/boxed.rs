//! Futures that begin in the memory they stay in.

use std::pin::Pin;

/// Boxes the future that `make` gives.
///
/// Like `Box::pin(make())`, but the memory is there first. A future of a request is some kilobytes, nearly all of
/// which nothing stands in at first; `Box::pin` makes it on the stack and copies all of it.
#[inline(always)]
pub(crate) fn boxed<F>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    Box::into_pin(Box::write(Box::new_uninit(), make()))
}
