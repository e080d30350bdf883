//! The time as a worker's tasks see it: read once a turn.
//!
//! A request needs the time some seven times (its begin, the end of its body, first byte, end, timers, the `date`
//! of its answer), and reading the clock costs more than most of what is done with it. What happens in one turn of a
//! task happens at one time.

use std::{cell::Cell, time::SystemTime};

use tokio::time::Instant;

#[derive(Clone, Copy)]
struct Turn {
    now: Instant,
    /// Read when it is asked for.
    wall: Option<SystemTime>,
}

thread_local! {
    static TURN: Cell<Option<Turn>> = const { Cell::new(None) };
}

/// The time at which the present turn began; the present time outside of turns.
#[inline]
pub fn now() -> Instant {
    match TURN.get() {
        Some(turn) => turn.now,
        None => Instant::now(),
    }
}

/// [`now`] of the calendar.
pub fn wall() -> SystemTime {
    let Some(mut turn) = TURN.get() else {
        return SystemTime::now();
    };
    let wall = turn.wall.unwrap_or_else(SystemTime::now);
    turn.wall = Some(wall);
    TURN.set(Some(turn));
    wall
}

/// Runs one turn of a task, which must not wait for anything in it.
pub fn turn<T>(run: impl FnOnce() -> T) -> T {
    /// Ends the turn, also when it panics.
    struct Ending;

    impl Drop for Ending {
        fn drop(&mut self) {
            TURN.set(None);
        }
    }

    TURN.set(Some(Turn {
        now: Instant::now(),
        wall: None,
    }));
    let _ending = Ending;
    run()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_stands_still_in_a_turn_only() {
        let before = now();
        let (began, wall_began) = turn(|| (now(), wall()));
        turn(|| {
            let (first, wall_first) = (now(), wall());
            // The clock has nanoseconds, so reading it again would show.
            while SystemTime::now() == wall_first {}
            assert_eq!((now(), wall()), (first, wall_first));
            assert!(wall_first >= wall_began);
        });
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!((began, now() - before), (before, Duration::from_secs(3)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_that_panics_is_over() {
        let panicked = std::panic::catch_unwind(|| turn(|| panic!("as it should")));
        assert!(panicked.is_err());
        let before = now();
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(now() - before, Duration::from_secs(1));
    }
}
