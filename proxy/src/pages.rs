//! Pages of the program that only its start needed.
//!
//! Reading the configuration runs through most of the program's text once, and the kernel maps 64 KiB around
//! each page that is touched: 10 MiB that would count as ours for good. Given back once everything serves,
//! they stay in the page cache; what serves is mapped again at its first use.

#![allow(
    unsafe_code,
    reason = "asking the loader and the kernel about our own text"
)]

use std::ffi::{c_int, c_void};

/// Unmaps the program's text and constants; they are read again from its file when they are used.
pub fn give_back() {
    // SAFETY: the callback has the type asked for and keeps nothing of what it is given.
    unsafe { libc::dl_iterate_phdr(Some(give_back_object), std::ptr::null_mut()) };
}

/// Returns other than 0, so that only the first object is seen: the program itself.
unsafe extern "C" fn give_back_object(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: the loader hands over its own list, which lives as long as the object is loaded.
    let (base, headers) = unsafe {
        let info = &*info;
        let count = usize::from(info.dlpi_phnum);
        (
            info.dlpi_addr as usize,
            std::slice::from_raw_parts(info.dlpi_phdr, count),
        )
    };
    // SAFETY: no precondition.
    let page = match usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }) {
        Ok(page) if page.is_power_of_two() => page,
        _ => return 1,
    };
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        // Whole pages of this segment alone: a page shared with the next one may have been written.
        let start = (base + header.p_vaddr as usize).next_multiple_of(page);
        let end = (base + header.p_vaddr as usize + header.p_memsz as usize) & !(page - 1);
        if start < end {
            // SAFETY: a private mapping of the program's file that nobody can have written, so its pages hold
            // what the file holds, and a file that runs cannot be written. A failure changes nothing.
            unsafe { libc::madvise(start as *mut c_void, end - start, libc::MADV_DONTNEED) };
        }
    }
    1
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_program_goes_on_where_it_was() {
        // Constants and text that were used before and are used after.
        let text = std::hint::black_box("a constant of the program");
        let before = text.to_uppercase();
        super::give_back();
        assert_eq!(before, text.to_uppercase());
    }
}
