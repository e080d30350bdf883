//! Timers of a worker: one coarse wheel a thread, driven by a single tokio sleep.
//!
//! A proxy sets a timeout for every request and an idle timeout for every connection, and nearly all of
//! them are moved or cleared long before they end. So a [`Deadline`] that is moved to a later time or
//! cleared only writes that down; the wheel hears of it when the old time is over.
//!
//! The wheel has seven levels of 64 slots; a slot of one level is as long as all slots of the level below.
//! Nodes live in a slab and are linked by index, so nothing allocates once the slab has grown.

use std::{
    cell::RefCell,
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::time::{Instant, Sleep};

/// A tick is 2^21 ns, about 2.1 ms: together with tokio's own millisecond a timer is late by less than 4 ms.
const TICK_BITS: u32 = 21;
const LEVEL_BITS: u32 = 6;
const SLOTS: usize = 1 << LEVEL_BITS;
const LEVELS: usize = 7;
/// 292 years. Later deadlines are kept here and looked at again, should anybody be there.
const LAST_TICK: u64 = (1 << (LEVEL_BITS * LEVELS as u32)) - 1;
/// Nodes kept where they are when their deadlines end, for the next ones.
const SPARE: usize = 256;
/// How many of them are looked at for one that suits.
const LOOKS: usize = 4;
/// No node.
const NONE: u32 = u32::MAX;
/// The `slot` of a node that is in no list.
const UNLINKED: u16 = u16::MAX;

#[derive(Debug)]
struct Node {
    /// The tick with which it is due.
    at: u64,
    prev: u32,
    /// Also links free nodes.
    next: u32,
    slot: u16,
    due: bool,
    waker: Option<Waker>,
}

#[derive(Debug)]
struct Wheel {
    nodes: Vec<Node>,
    free: u32,
    /// Nodes in slots.
    linked: usize,
    /// The last tick that was worked off.
    elapsed: u64,
    occupied: [u64; LEVELS],
    heads: [[u32; SLOTS]; LEVELS],
    /// Wakers of nodes that became due; empty but for its memory between turns.
    due: Vec<Waker>,
}

impl Wheel {
    const fn new() -> Wheel {
        Wheel {
            nodes: Vec::new(),
            free: NONE,
            linked: 0,
            elapsed: 0,
            occupied: [0; LEVELS],
            heads: [[NONE; SLOTS]; LEVELS],
            due: Vec::new(),
        }
    }

    fn node(&mut self, key: u32) -> &mut Node {
        &mut self.nodes[key as usize]
    }

    fn allocate(&mut self) -> u32 {
        let node = Node {
            at: 0,
            prev: NONE,
            next: NONE,
            slot: UNLINKED,
            due: false,
            waker: None,
        };
        if self.free == NONE {
            self.nodes.push(node);
            // A worker does not get near 4 billion timers: each belongs to a socket.
            return u32::try_from(self.nodes.len() - 1).unwrap_or(NONE);
        }
        let key = self.free;
        self.free = self.node(key).next;
        *self.node(key) = node;
        key
    }

    /// Gives a node back. Its waker is for the caller to drop when the wheel is not borrowed any more.
    fn release(&mut self, key: u32) -> Option<Waker> {
        self.unlink(key);
        let free = self.free;
        self.free = key;
        let node = self.node(key);
        node.next = free;
        node.waker.take()
    }

    /// Moves a node to the slot of its time, or makes it due when that is over.
    fn set(&mut self, key: u32, at: u64) {
        let at = at.min(LAST_TICK);
        self.unlink(key);
        self.node(key).at = at;
        let due = self.insert(key);
        self.node(key).due = due;
    }

    /// Puts an unlinked node into the slot of its time; whether it is due instead.
    fn insert(&mut self, key: u32) -> bool {
        let elapsed = self.elapsed;
        let at = self.node(key).at;
        if at <= elapsed {
            return true;
        }
        let level = (elapsed ^ at).ilog2() / LEVEL_BITS;
        let slot = (at >> (level * LEVEL_BITS)) as usize % SLOTS;
        let level = level as usize;
        let head = self.heads[level][slot];
        if head != NONE {
            self.node(head).prev = key;
        }
        self.heads[level][slot] = key;
        self.occupied[level] |= 1 << slot;
        self.linked += 1;
        let node = self.node(key);
        node.prev = NONE;
        node.next = head;
        node.slot = (level * SLOTS + slot) as u16;
        false
    }

    fn unlink(&mut self, key: u32) {
        let (slot, prev, next) = {
            let node = self.node(key);
            (node.slot, node.prev, node.next)
        };
        if slot == UNLINKED {
            return;
        }
        let (level, slot) = (usize::from(slot) / SLOTS, usize::from(slot) % SLOTS);
        if next != NONE {
            self.node(next).prev = prev;
        }
        if prev != NONE {
            self.node(prev).next = next;
        } else {
            self.heads[level][slot] = next;
            if next == NONE {
                self.occupied[level] &= !(1 << slot);
            }
        }
        self.linked -= 1;
        self.node(key).slot = UNLINKED;
    }

    /// The first slot that has nodes: its level, number and the tick it begins with.
    fn next(&self) -> Option<(usize, usize, u64)> {
        // Nodes of a level are in the same slot of all higher levels as `elapsed` is, and in a later slot of
        // their own: the lowest level with nodes has the first, and slots need not be searched round.
        let level = self.occupied.iter().position(|slots| *slots != 0)?;
        let slot = self.occupied[level].trailing_zeros();
        let bits = level as u32 * LEVEL_BITS;
        let window = !((1 << (bits + LEVEL_BITS)) - 1);
        let begin = (self.elapsed & window) | (u64::from(slot) << bits);
        Some((level, slot as usize, begin))
    }

    /// Works off all slots up to `now`; wakers of due nodes are put into `due`.
    fn advance(&mut self, now: u64) {
        while let Some((level, slot, begin)) = self.next() {
            if begin > now {
                break;
            }
            self.elapsed = begin;
            let mut key = std::mem::replace(&mut self.heads[level][slot], NONE);
            self.occupied[level] &= !(1 << slot);
            while key != NONE {
                let node = self.node(key);
                let (this, next) = (key, node.next);
                node.slot = UNLINKED;
                self.linked -= 1;
                if self.insert(this) {
                    let node = self.node(this);
                    node.due = true;
                    let waker = node.waker.take();
                    self.due.extend(waker);
                }
                key = next;
            }
        }
        self.elapsed = self.elapsed.max(now);
    }
}

/// The wheel of a thread and who drives it.
#[derive(Debug)]
struct Worker {
    wheel: Wheel,
    /// Tick 0.
    epoch: Option<Instant>,
    /// Whether the driver's task is there.
    driven: bool,
    /// The tick the driver sleeps until; `u64::MAX` when it waits for a timer to be set.
    armed: u64,
    driver: Option<Waker>,
    /// Nodes of nobody that stay in their slots, and the times they were set to. Nearly all deadlines of requests
    /// are for later than those that have just ended: they need not be put into the wheel, only moved when it
    /// comes to them.
    spare: Vec<(u32, Instant)>,
}

impl Worker {
    /// A node that becomes due no later than `at`.
    fn take_spare(&mut self, at: Instant) -> Option<(u32, Instant)> {
        let from = self.spare.len().saturating_sub(LOOKS);
        let found = self.spare[from..]
            .iter()
            .rposition(|(_, noted)| *noted <= at)?;
        Some(self.spare.swap_remove(from + found))
    }

    /// Takes the node of a deadline that has ended; see [`Wheel::release`].
    fn give_back(&mut self, key: u32, noted: Instant) -> Option<Waker> {
        // Without a driver nothing turns the wheel.
        if self.driven && self.spare.len() < SPARE {
            self.spare.push((key, noted));
            self.wheel.node(key).waker.take()
        } else {
            self.wheel.release(key)
        }
    }

    /// The first tick that begins at or after `at`.
    fn tick(&self, at: Instant) -> u64 {
        const ROUND_UP: u64 = (1 << TICK_BITS) - 1;
        self.nanos(at).saturating_add(ROUND_UP) >> TICK_BITS
    }

    /// The last tick that has begun by `now`.
    fn past(&self, now: Instant) -> u64 {
        self.nanos(now) >> TICK_BITS
    }

    fn nanos(&self, at: Instant) -> u64 {
        let since = self
            .epoch
            .map_or(Duration::ZERO, |epoch| at.saturating_duration_since(epoch));
        since
            .as_secs()
            .saturating_mul(1_000_000_000)
            .saturating_add(u64::from(since.subsec_nanos()))
    }

    /// When a tick begins.
    fn begin(&self, tick: u64) -> Instant {
        let since = Duration::from_nanos(tick << TICK_BITS);
        let epoch = self.epoch.unwrap_or_else(Instant::now);
        // A driver that looks too early only sleeps again.
        epoch.checked_add(since).unwrap_or(epoch)
    }

    /// The driver ends with its runtime; the next timer of the thread starts another.
    fn start_driver(&mut self) {
        if self.wheel.linked == 0 {
            // The clock of another runtime may be behind the last one's: a test's can be moved.
            self.epoch = Some(Instant::now());
            self.wheel.elapsed = 0;
        }
        self.driven = true;
        self.armed = u64::MAX;
        tokio::spawn(Driver { sleep: None });
    }
}

thread_local! {
    static WORKER: RefCell<Worker> = const {
        RefCell::new(Worker {
            wheel: Wheel::new(),
            epoch: None,
            driven: false,
            armed: u64::MAX,
            driver: None,
            spare: Vec::new(),
        })
    };
}

/// The task that turns the wheel of its thread.
struct Driver {
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let sleep = &mut self.sleep;
        loop {
            let now = Instant::now();
            let (mut due, next) = WORKER.with_borrow_mut(|worker| {
                worker.wheel.advance(worker.past(now));
                let next = worker.wheel.next().map(|(_, _, begin)| begin);
                worker.armed = next.unwrap_or(u64::MAX);
                if worker
                    .driver
                    .as_ref()
                    .is_none_or(|w| !w.will_wake(cx.waker()))
                {
                    worker.driver = Some(cx.waker().clone());
                }
                let due = std::mem::take(&mut worker.wheel.due);
                (due, next.map(|next| worker.begin(next)))
            });
            // Outside: what a waker does may come back here.
            for waker in due.drain(..) {
                waker.wake();
            }
            WORKER.with_borrow_mut(|worker| {
                if worker.wheel.due.capacity() == 0 {
                    worker.wheel.due = due;
                }
            });
            let Some(next) = next else {
                return Poll::Pending;
            };
            let sleep = sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(next)));
            if sleep.deadline() != next {
                sleep.as_mut().reset(next);
            }
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The thread may be on its way out; then there is nothing left to tell.
        let waker = WORKER.try_with(|worker| {
            let mut worker = worker.try_borrow_mut().ok()?;
            worker.driven = false;
            for (key, _) in std::mem::take(&mut worker.spare) {
                // Nobody's: it has no waker.
                drop(worker.wheel.release(key));
            }
            worker.driver.take()
        });
        drop(waker);
    }
}

/// A point in time that a task waits for; unarmed at first. Never early, late by less than 4 ms.
///
/// Belongs to the thread that first armed it, which must run a single-threaded tokio runtime. Moving it to
/// a later time and clearing it cost a comparison: the wheel is told when the old time is over, by the
/// [`poll`](Deadline::poll) of the task, which it wakes for that.
#[derive(Default)]
pub struct Deadline {
    at: Option<Instant>,
    /// The node and the time it was set to.
    node: Option<(u32, Instant)>,
    /// Nodes belong to a thread.
    _local: PhantomData<*const ()>,
}

impl Deadline {
    /// Arms it for `at`, whatever it was before.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn set(&mut self, at: Instant) {
        self.at = Some(at);
        if self.node.is_none() {
            self.node = WORKER.with_borrow_mut(|worker| worker.take_spare(at));
        }
        if self.node.is_none_or(|(_, noted)| at < noted) {
            self.note(at);
        }
    }

    /// Disarms it.
    pub fn clear(&mut self) {
        self.at = None;
    }

    /// Whether it is armed, due or not.
    pub fn is_set(&self) -> bool {
        self.at.is_some()
    }

    /// Ready once its time has come, and until it is set or cleared. Pending for ever while unarmed. The
    /// last task to ask while it was armed is woken.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let (Some(at), Some((key, noted))) = (self.at, self.node) else {
            return Poll::Pending;
        };
        if self.register(key, cx) {
            return Poll::Pending;
        }
        if noted < at {
            self.note(at);
            if self.register(key, cx) {
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }

    /// Remembers who waits; not when the node is due.
    fn register(&self, key: u32, cx: &Context<'_>) -> bool {
        // What was replaced is not dropped inside: see `drop`.
        let (waits, _old) = WORKER.with_borrow_mut(|worker| {
            let node = worker.wheel.node(key);
            match &node.waker {
                _ if node.due => (false, None),
                Some(waker) if waker.will_wake(cx.waker()) => (true, None),
                _ => (true, node.waker.replace(cx.waker().clone())),
            }
        });
        waits
    }

    /// Tells the wheel.
    #[cold]
    fn note(&mut self, at: Instant) {
        let driver = WORKER.with_borrow_mut(|worker| {
            if !worker.driven {
                worker.start_driver();
            }
            let key = match self.node {
                Some((key, _)) => key,
                None => worker.wheel.allocate(),
            };
            self.node = Some((key, at));
            let tick = worker.tick(at);
            worker.wheel.set(key, tick);
            if tick >= worker.armed || tick <= worker.wheel.elapsed {
                return None;
            }
            // Only the first of several in one turn needs to tell the driver.
            worker.armed = tick;
            worker.driver.clone()
        });
        if let Some(driver) = driver {
            driver.wake();
        }
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        if let Some((key, noted)) = self.node {
            // The last waker of a task may be the task's end, which may have timers of its own: it is
            // dropped when the wheel is free again. A thread that ends has no wheel any more.
            let waker = WORKER.try_with(|worker| worker.borrow_mut().give_back(key, noted));
            drop(waker);
        }
    }
}

impl fmt::Debug for Deadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Deadline").field(&self.at).finish()
    }
}

#[cfg(test)]
mod tests;
