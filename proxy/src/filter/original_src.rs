//! Makes connections to upstreams come from the address of the downstream, as far as it is known. Envoy:
//! `envoy.filters.http.original_src`. What binds them is in `upstream`.

use crate::{filter::FilterContext, info};

/// The filter.
#[derive(Clone, Copy, Debug)]
pub struct OriginalSrc {
    /// `SO_MARK` of the connections; 0 is none.
    pub mark: u32,
}

impl OriginalSrc {
    pub(super) fn on_request(self, cx: &FilterContext<'_>) {
        let mut info = cx.info.borrow_mut();
        info.original_src = Some(info::OriginalSrc {
            ip: info.downstream_remote.ip(),
            mark: self.mark,
        });
    }
}
