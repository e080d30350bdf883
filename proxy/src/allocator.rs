//! mimalloc, asked in the way that costs least.
//!
//! The wrapper of its crate always names an alignment, and version 3 then gives more room than was asked for, by a
//! longer way, unless the size is a power of two: a request's larger parts never are.

#![allow(unsafe_code, reason = "an allocator is")]

use std::alloc::{GlobalAlloc, Layout};

use libmimalloc_sys::{mi_malloc, mi_zalloc};
use mimalloc::MiMalloc;

/// The program's allocator.
#[derive(Clone, Copy, Debug)]
pub struct Allocator;

/// What every block is aligned to that is no smaller: a word.
const NATURAL: usize = align_of::<usize>();

fn is_natural(layout: Layout) -> bool {
    layout.align() <= NATURAL && layout.align() <= layout.size()
}

// SAFETY: all is done by mimalloc, which keeps to the contract, on blocks of its own: it frees and resizes what
// `mi_malloc` gave like what `mi_malloc_aligned` gave. `mi_malloc` is C's `malloc`: its blocks suit every object that
// fits into them (C11 7.22.3), so those that are not smaller than their alignment are aligned, up to a word's at least.
unsafe impl GlobalAlloc for Allocator {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_natural(layout) {
            // SAFETY: any size will do.
            return unsafe { mi_malloc(layout.size()) }.cast();
        }
        // SAFETY: the caller's layout.
        unsafe { MiMalloc.alloc(layout) }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_natural(layout) {
            // SAFETY: any size will do.
            return unsafe { mi_zalloc(layout.size()) }.cast();
        }
        // SAFETY: the caller's layout.
        unsafe { MiMalloc.alloc_zeroed(layout) }
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: a block of mimalloc's, by the caller's word.
        unsafe { MiMalloc.dealloc(block, layout) }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: a block of mimalloc's, by the caller's word.
        unsafe { MiMalloc.realloc(block, layout, size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_and_hold_what_was_written() {
        for size in (1..200).chain([1024, 3000, 70_000, 5 << 20]) {
            for align in [1, 2, 4, 8, 16, 64, 4096] {
                let layout = Layout::from_size_align(size, align).unwrap();
                // SAFETY: no size is 0; each block is used within its size, and given back with its layout.
                unsafe {
                    let block = Allocator.alloc_zeroed(layout);
                    assert_eq!(block.addr() % align, 0, "{layout:?}");
                    assert_eq!((*block, *block.add(size - 1)), (0, 0));
                    block.write_bytes(7, size);
                    let longer = Allocator.realloc(block, layout, size * 2);
                    assert_eq!(longer.addr() % align, 0, "{layout:?}");
                    assert_eq!((*longer, *longer.add(size - 1)), (7, 7));
                    let layout = Layout::from_size_align(size * 2, align).unwrap();
                    Allocator.dealloc(longer, layout);
                    let other = Allocator.alloc(layout);
                    assert_eq!(other.addr() % align, 0, "{layout:?}");
                    Allocator.dealloc(other, layout);
                }
            }
        }
    }
}
