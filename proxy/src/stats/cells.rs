//! The numbers themselves: one table of cells a worker, for all registries of the process.
//!
//! A counter is an index into these tables. Only its own worker writes to a worker's table, with a plain
//! load and store; table 0 belongs to everybody else and is added to atomically. Reading sums the tables.

use std::{
    cell::Cell,
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release},
    },
};

/// Table 0 is everybody's who is not a worker, or one of those beyond the last.
pub(crate) const SHARDS: usize = 65;
/// Cells of the first chunk of a table: one page. Every chunk is twice as long as the one before.
const FIRST: usize = 512;
/// Bounds the number of counters and gauges to 8M, far above what a configuration can make.
const CHUNKS: usize = 14;
const CELLS: usize = FIRST * ((1 << CHUNKS) - 1);

type Chunk = OnceLock<Box<[AtomicU64]>>;

static TABLES: [[Chunk; CHUNKS]; SHARDS] = [const { [const { OnceLock::new() }; CHUNKS] }; SHARDS];

static FREE: Mutex<Free> = Mutex::new(Free {
    next: 1, // 0 says that a counter has no cell
    returned: Vec::new(),
});

struct Free {
    next: u32,
    returned: Vec<u32>,
}

/// Chunks of its table a thread remembers: those of what is counted with each request.
const NEAR: usize = 4;

struct Local {
    worker: Cell<usize>,
    /// The first chunk again, if the thread is a worker and counted in it: most of what is counted with each
    /// request is there, and finding it is not to cost more than counting.
    own: Cell<&'static [AtomicU64]>,
    /// The first chunks of this thread's table, once it counted in them.
    near: [Cell<&'static [AtomicU64]>; NEAR],
}

thread_local! {
    static LOCAL: Local = const {
        Local {
            worker: Cell::new(0),
            own: Cell::new(&[]),
            near: [const { Cell::new(&[]) }; NEAR],
        }
    };
}

/// Gives the calling thread a table of its own; `index` counts workers from 0. No two threads that count
/// in the same instruments may have the same index.
pub fn set_worker(index: usize) {
    LOCAL.with(|local| {
        local
            .worker
            .set(if index < SHARDS - 1 { index + 1 } else { 0 });
        local.own.set(&[]);
        for chunk in &local.near {
            chunk.set(&[]);
        }
    });
}

/// The table of the calling thread, below [`SHARDS`]: a worker's own, or 0 for everybody else's.
#[inline]
pub(crate) fn worker() -> usize {
    LOCAL.with(|local| local.worker.get())
}

/// Adds to a cell that only this thread writes to, or to a shared one if `worker` is 0.
#[inline]
pub(super) fn add(cell: &AtomicU64, worker: usize, n: u64) {
    if worker == 0 {
        cell.fetch_add(n, Relaxed);
    } else {
        cell.store(cell.load(Relaxed).wrapping_add(n), Relaxed);
    }
}

#[inline]
fn place(index: u32) -> (usize, usize) {
    let place = index as usize + FIRST;
    let chunk = (place / FIRST).ilog2();
    (chunk as usize, place - (FIRST << chunk))
}

fn cell(shard: usize, index: u32) -> &'static AtomicU64 {
    let (chunk, at) = place(index);
    &cells(shard, chunk)[at]
}

fn cells(shard: usize, chunk: usize) -> &'static [AtomicU64] {
    match TABLES[shard][chunk].get() {
        Some(cells) => cells,
        None => allocate_chunk(shard, chunk),
    }
}

#[cold]
fn allocate_chunk(shard: usize, chunk: usize) -> &'static [AtomicU64] {
    TABLES[shard][chunk].get_or_init(|| (0..FIRST << chunk).map(|_| AtomicU64::new(0)).collect())
}

/// That cell of every table that has it.
fn each(index: u32) -> impl Iterator<Item = &'static AtomicU64> {
    let (chunk, at) = place(index);
    TABLES
        .iter()
        .filter_map(move |table| table[chunk].get())
        .map(move |cells| &cells[at])
}

fn free() -> MutexGuard<'static, Free> {
    // Nothing here panics halfway through a change.
    FREE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The last cell is handed out again and again when all are taken: wrong numbers, no crash.
fn allocate() -> u32 {
    let mut free = free();
    free.returned.pop().unwrap_or_else(|| {
        let index = free.next;
        free.next = if (index as usize) < CELLS - 1 {
            index + 1
        } else {
            index
        };
        index
    })
}

fn give_back(index: u32) {
    for cell in each(index) {
        cell.store(0, Relaxed);
    }
    if (index as usize) < CELLS - 1 {
        free().returned.push(index);
    }
}

/// Four bytes of a counter or gauge; the cells behind it are allocated when it is first touched.
#[derive(Debug, Default)]
pub(super) struct Lazy(AtomicU32);

impl Lazy {
    /// The index of its cells.
    #[inline]
    pub(super) fn index(&self) -> u32 {
        match self.0.load(Acquire) {
            0 => self.allocate(),
            index => index,
        }
    }

    #[cold]
    fn allocate(&self) -> u32 {
        let new = allocate();
        match self.0.compare_exchange(0, new, Release, Acquire) {
            Ok(_) => new,
            Err(present) => {
                give_back(new);
                present
            }
        }
    }

    pub(super) fn touched(&self) -> bool {
        self.0.load(Relaxed) != 0
    }

    /// The sum over all workers.
    pub(super) fn sum(&self) -> u64 {
        match self.0.load(Acquire) {
            0 => 0,
            index => sum(index),
        }
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        match *self.0.get_mut() {
            0 => {}
            index => give_back(index),
        }
    }
}

/// Adds to the calling thread's cell.
#[inline]
pub(super) fn count(index: u32, n: u64) {
    LOCAL.with(|local| {
        if let Some(cell) = local.own.get().get(index as usize) {
            cell.store(cell.load(Relaxed).wrapping_add(n), Relaxed);
            return;
        }
        let worker = local.worker.get();
        let (chunk, at) = place(index);
        let near = local.near.get(chunk).and_then(|cells| cells.get().get(at));
        let cell = match near {
            Some(cell) => cell,
            None => local.far(worker, chunk, at),
        };
        add(cell, worker, n);
    });
}

impl Local {
    #[cold]
    fn far(&self, worker: usize, chunk: usize, at: usize) -> &'static AtomicU64 {
        let cells = cells(worker, chunk);
        if let Some(near) = self.near.get(chunk) {
            near.set(cells);
        }
        if chunk == 0 && worker != 0 {
            self.own.set(cells);
        }
        &cells[at]
    }
}

/// Makes the sum `value`, as long as nobody counts meanwhile.
pub(super) fn set(index: u32, value: u64) {
    let shared = cell(0, index);
    let others = sum(index).wrapping_sub(shared.load(Relaxed));
    shared.store(value.wrapping_sub(others), Relaxed);
}

pub(super) fn sum(index: u32) -> u64 {
    each(index).fold(0, |sum, cell| sum.wrapping_add(cell.load(Relaxed)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_follow_each_other() {
        assert_eq!(place(0), (0, 0));
        assert_eq!(place(511), (0, 511));
        assert_eq!(place(512), (1, 0));
        assert_eq!(place(1535), (1, 1023));
        assert_eq!(place(1536), (2, 0));
        assert_eq!(
            place(CELLS as u32 - 1),
            (CHUNKS - 1, (FIRST << (CHUNKS - 1)) - 1)
        );
    }

    #[test]
    fn a_cell_is_clean_when_it_is_used_again() {
        for _ in 0..3 {
            let one = Lazy::default();
            assert!(!one.touched());
            assert_eq!(sum(one.index()), 0);
            count(one.index(), 5);
            assert_eq!(one.sum(), 5);
        }
    }
}
