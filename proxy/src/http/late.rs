//! Answers of HTTP/1.1 that leave at the end of the worker's turn.
//!
//! What the tasks that are ready now have to say goes out together: a peer that was woken for the first answer still
//! runs when the others come, and need not be woken again. One task of the worker writes for all; who had something
//! to say is not polled a second time for it.
//!
//! The list holds each connection once, and a connection has no more than 16 KiB to say this way: it is bounded by them.

use std::{
    cell::RefCell,
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

/// Writes of one turn of the task: then the reactor, and other tasks, have theirs.
const AT_ONCE: usize = 64;

/// Who has something to write at the end of the turn.
pub(super) trait Late {
    /// Writes what the socket takes.
    fn write(&self);
}

struct Worker {
    waiting: Vec<Rc<dyn Late>>,
    /// The task is there.
    runs: bool,
    /// It will be polled.
    called: bool,
    task: Option<Waker>,
}

thread_local! {
    static WORKER: RefCell<Worker> = const {
        RefCell::new(Worker {
            waiting: Vec::new(),
            runs: false,
            called: false,
            task: None,
        })
    };
}

/// Has `who` write when the tasks that are ready now have run.
pub(super) fn put(who: Rc<dyn Late>) {
    let task = WORKER.with_borrow_mut(|worker| {
        worker.waiting.push(who);
        if std::mem::replace(&mut worker.called, true) {
            return None;
        }
        if !std::mem::replace(&mut worker.runs, true) {
            tokio::spawn(Writer);
            return None;
        }
        worker.task.clone()
    });
    if let Some(task) = task {
        task.wake();
    }
}

/// The task that writes, one a thread. It ends with its runtime; the next answer starts another.
struct Writer;

impl Future for Writer {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut now = WORKER.with_borrow_mut(|worker| {
            if !worker
                .task
                .as_ref()
                .is_some_and(|task| task.will_wake(cx.waker()))
            {
                worker.task = Some(cx.waker().clone());
            }
            worker.called = false;
            std::mem::take(&mut worker.waiting)
        });
        let later = now.split_off(now.len().min(AT_ONCE));
        // Outside of the borrow: the last of a connection may end with this.
        for who in now.drain(..) {
            who.write();
        }
        WORKER.with_borrow_mut(|worker| {
            let since = std::mem::replace(&mut worker.waiting, now);
            worker.waiting.extend(later);
            worker.waiting.extend(since);
            if !worker.waiting.is_empty() && !std::mem::replace(&mut worker.called, true) {
                cx.waker().wake_by_ref();
            }
        });
        Poll::Pending
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The thread may be on its way out; then there is nothing left to tell.
        let left = WORKER.try_with(|worker| {
            let mut worker = worker.try_borrow_mut().ok()?;
            worker.runs = false;
            worker.called = false;
            Some((std::mem::take(&mut worker.waiting), worker.task.take()))
        });
        drop(left);
    }
}
