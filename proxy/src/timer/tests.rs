use std::{future::poll_fn, time::Duration};

use proptest::prelude::*;

use super::*;

const TICK: Duration = Duration::from_nanos(1 << TICK_BITS);

async fn wait(deadline: &mut Deadline) {
    poll_fn(|cx| deadline.poll(cx)).await;
}

#[tokio::test(start_paused = true)]
async fn is_never_early_and_hardly_late() {
    for millis in [0, 1, 2, 3, 7, 100, 133, 135, 1000, 15_000, 3_600_000] {
        let start = Instant::now();
        let wanted = Duration::from_millis(millis);
        let mut deadline = Deadline::default();
        deadline.set(start + wanted);
        wait(&mut deadline).await;
        let took = start.elapsed();
        assert!(took >= wanted, "{took:?} for {wanted:?}");
        assert!(
            took < wanted + Duration::from_millis(4),
            "{took:?} for {wanted:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_moved_deadline_keeps_the_last_time() {
    let start = Instant::now();
    let mut deadline = Deadline::default();
    for second in 1..100 {
        deadline.set(start + Duration::from_secs(second));
    }
    wait(&mut deadline).await;
    assert!(start.elapsed() >= Duration::from_secs(99));
    deadline.set(start + Duration::from_secs(300));
    deadline.set(start + Duration::from_secs(200));
    wait(&mut deadline).await;
    let took = start.elapsed();
    assert!(took >= Duration::from_secs(200) && took < Duration::from_secs(201));
}

#[tokio::test(start_paused = true)]
async fn a_cleared_deadline_stays_silent() {
    let start = Instant::now();
    let mut deadline = Deadline::default();
    deadline.set(start + Duration::from_secs(1));
    assert!(deadline.is_set());
    deadline.clear();
    assert!(!deadline.is_set());
    let waited = tokio::time::timeout(Duration::from_secs(5), wait(&mut deadline)).await;
    assert!(waited.is_err());
    // And works again, also when it was due.
    deadline.set(start);
    wait(&mut deadline).await;
    deadline.clear();
    let waited = tokio::time::timeout(Duration::from_secs(5), wait(&mut deadline)).await;
    assert!(waited.is_err());
    deadline.set(Instant::now() + Duration::from_secs(1));
    wait(&mut deadline).await;
}

#[tokio::test(start_paused = true)]
async fn an_earlier_deadline_wakes_the_driver() {
    let start = Instant::now();
    let mut late = Deadline::default();
    late.set(start + Duration::from_secs(3600));
    let never = tokio::time::timeout(Duration::from_secs(1), wait(&mut late)).await;
    assert!(never.is_err());
    let mut early = Deadline::default();
    early.set(start + Duration::from_secs(2));
    wait(&mut early).await;
    assert!(start.elapsed() < Duration::from_millis(2004));
}

#[tokio::test(start_paused = true)]
async fn many_tasks_wait_at_once() {
    let local = tokio::task::LocalSet::new();
    let start = Instant::now();
    for index in 0..1000_u64 {
        local.spawn_local(async move {
            let mut deadline = Deadline::default();
            for round in 1..5 {
                let at = Instant::now() + Duration::from_millis(index * round % 977);
                deadline.set(at);
                wait(&mut deadline).await;
                assert!(Instant::now() >= at);
                assert!(Instant::now() < at + Duration::from_millis(4));
            }
        });
    }
    local.await;
    assert!(start.elapsed() < Duration::from_secs(4));
    WORKER.with_borrow(|worker| assert_eq!(worker.wheel.linked, 0));
}

/// The clock of the second runtime begins before the end of the first's.
#[test]
fn another_runtime_on_the_thread_has_timers_too() {
    for _ in 0..2 {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let start = Instant::now();
            let mut deadline = Deadline::default();
            deadline.set(start + Duration::from_secs(86_400));
            wait(&mut deadline).await;
            assert!(start.elapsed() >= Duration::from_secs(86_400));
        });
    }
}

#[test]
fn nothing_allocates_once_warm() {
    let mut wheel = Wheel::new();
    let keys: Vec<u32> = (0..100).map(|_| wheel.allocate()).collect();
    for key in keys {
        wheel.release(key);
    }
    let capacity = wheel.nodes.capacity();
    for round in 0..1000 {
        let key = wheel.allocate();
        wheel.set(key, round * 3);
        wheel.advance(round);
        wheel.release(key);
    }
    assert_eq!(wheel.nodes.capacity(), capacity);
}

#[test]
fn a_tick_is_as_long_as_it_says() {
    let epoch = Instant::now();
    let worker = Worker {
        wheel: Wheel::new(),
        epoch: Some(epoch),
        driven: true,
        armed: 0,
        driver: None,
        spare: Vec::new(),
    };
    assert_eq!(worker.tick(epoch), 0);
    assert_eq!(worker.tick(epoch + Duration::from_nanos(1)), 1);
    assert_eq!(worker.tick(epoch + TICK), 1);
    assert_eq!(worker.past(epoch + TICK - Duration::from_nanos(1)), 0);
    assert_eq!(worker.past(epoch + TICK), 1);
    assert_eq!(worker.begin(1), epoch + TICK);
}

#[derive(Clone, Debug)]
enum Step {
    Set(usize, u64),
    Clear(usize),
    Drop(usize),
    Advance(u64),
}

const TIMERS: usize = 24;

fn steps(longest: u64) -> impl Strategy<Value = Vec<Step>> {
    let far = prop_oneof![0..5_u64, 0..200_u64, 0..10_000_u64, 0..longest];
    let one = prop_oneof![
        4 => (0..TIMERS, far).prop_map(|(timer, after)| Step::Set(timer, after)),
        1 => (0..TIMERS).prop_map(Step::Clear),
        1 => (0..TIMERS).prop_map(Step::Drop),
        3 => prop_oneof![0..5_u64, 0..300_u64, 0..300_000_u64].prop_map(Step::Advance),
    ];
    prop::collection::vec(one, 1..200)
}

proptest! {
    /// The wheel does what a list of times does that is searched at every step.
    #[test]
    fn a_wheel_behaves_as_a_list(steps in steps(1 << 45)) {
        let mut wheel = Wheel::new();
        let mut timers: Vec<Option<(u32, u64)>> = vec![None; TIMERS];
        let mut now = 0;
        for step in steps {
            match step {
                Step::Set(timer, after) => {
                    let key = timers[timer].map_or_else(|| wheel.allocate(), |(key, _)| key);
                    timers[timer] = Some((key, now + after));
                    wheel.set(key, now + after);
                }
                Step::Clear(timer) | Step::Drop(timer) => if let Some((key, _)) = timers[timer].take() {
                    wheel.release(key);
                },
                Step::Advance(ticks) => {
                    now += ticks;
                    wheel.advance(now);
                }
            }
            let mut first = u64::MAX;
            for (key, at) in timers.iter().flatten() {
                prop_assert_eq!(wheel.node(*key).due, *at <= now);
                if *at > now {
                    first = first.min(*at);
                }
            }
            match wheel.next() {
                Some((_, _, begin)) => prop_assert!(begin > now && begin <= first),
                None => prop_assert_eq!(first, u64::MAX),
            }
        }
        for (key, _) in timers.iter().flatten() {
            wheel.release(*key);
        }
        prop_assert_eq!(wheel.linked, 0);
        prop_assert!(wheel.next().is_none());
    }

    /// Deadlines do what a list of times does, by milliseconds of a paused clock.
    #[test]
    fn deadlines_behave_as_a_list(steps in steps(100_000_000)) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut timers: Vec<(Deadline, Option<Instant>)> = Vec::new();
            timers.resize_with(TIMERS, Default::default);
            for step in steps {
                match step {
                    Step::Set(timer, after) => {
                        let at = Instant::now() + Duration::from_millis(after);
                        timers[timer].0.set(at);
                        timers[timer].1 = Some(at);
                    }
                    Step::Clear(timer) => {
                        timers[timer].0.clear();
                        timers[timer].1 = None;
                    }
                    Step::Drop(timer) => timers[timer] = Default::default(),
                    Step::Advance(millis) => {
                        tokio::time::advance(Duration::from_millis(millis)).await;
                        tokio::task::yield_now().await;
                    }
                }
                let now = Instant::now();
                for (deadline, at) in &mut timers {
                    let due = deadline.poll(&mut Context::from_waker(Waker::noop())).is_ready();
                    match at {
                        None => prop_assert!(!due && !deadline.is_set()),
                        Some(at) => {
                            prop_assert!(!due || now >= *at, "early");
                            prop_assert!(due || now < *at + TICK, "late");
                        }
                    }
                }
            }
            Ok(())
        })?;
    }
}
