//! In loom: what the application's thread and the progress thread say to each other, in every interleaving.

use super::ask::Ask;
use super::doze::Doze;
use super::seat::Seat;
use super::standing::Standing;
use crate::Policy;
use crate::sync::ArrayQueue;
use loom::cell::UnsafeCell;
use loom::sync::{Arc, Condvar, Mutex};
use std::convert::Infallible;

/// What an endpoint sleeps on: a wake-up before the sleep is not forgotten. No time passes in a model, so that one that
/// does not come is a deadlock.
#[derive(Default)]
struct Event {
    set: Mutex<bool>,
    changed: Condvar,
}

impl Event {
    fn wake(&self) {
        *self.set.lock().unwrap() = true;
        self.changed.notify_one();
    }

    fn sleep(&self) {
        let mut set = self.set.lock().unwrap();
        while !*set {
            set = self.changed.wait(set).unwrap();
        }
        *set = false;
    }
}

struct Shared {
    doze: Doze,
    event: Event,
    commands: ArrayQueue<u32>,
}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Self { doze: Doze::new(), event: Event::default(), commands: ArrayQueue::new(4) })
    }

    /// On the progress thread.
    fn sleep(&self) {
        let sleep = |_: &mut ()| -> Result<(), Infallible> {
            self.event.sleep();
            Ok(())
        };
        let Ok(()) = self.doze.doze(&mut (), |()| !self.commands.is_empty(), sleep);
    }

    /// On the application's.
    fn command(&self, command: u32) {
        self.commands.push(command).unwrap();
        self.doze.nudge(|| self.event.wake());
    }
}

#[test]
fn a_thread_that_goes_to_sleep_misses_no_command() {
    loom::model(|| {
        let shared = Shared::new();
        let progress = shared.clone();
        let thread = loom::thread::spawn(move || {
            for expected in 0..2 {
                let command = loop {
                    match progress.commands.pop() {
                        Some(command) => break command,
                        None => progress.sleep(),
                    }
                };
                assert_eq!(command, expected);
            }
        });
        shared.command(0);
        shared.command(1);
        thread.join().unwrap();
    });
}

#[test]
fn a_thread_that_goes_to_sleep_is_stopped() {
    loom::model(|| {
        let shared = Shared::new();
        let progress = shared.clone();
        let thread = loom::thread::spawn(move || {
            while !progress.doze.is_stopped() {
                progress.sleep();
            }
        });
        shared.doze.stop(|| shared.event.wake());
        thread.join().unwrap();
    });
}

#[test]
fn a_question_is_answered_once_and_no_answer_is_lost() {
    loom::model(|| {
        let shared = Arc::new((Ask::new(), ArrayQueue::new(1)));
        let progress = shared.clone();
        let thread = loom::thread::spawn(move || {
            let (ask, batch) = &*progress;
            let mut answers = 0;
            for _ in 0..3 {
                if let Some((_, word)) = ask.get().filter(|_| batch.is_empty()) {
                    answers += 1;
                    ask.answer(word);
                    batch.push(answers).expect("there was room");
                }
            }
            answers
        });
        let (ask, batch) = &*shared;
        let mut fetched = 0;
        for _ in 0..2 {
            ask.put(Policy::Any);
            fetched += u32::from(batch.pop().is_some());
            ask.withdraw();
        }
        let answers = thread.join().unwrap();
        fetched += u32::from(batch.pop().is_some());
        assert!(answers <= 2 && fetched == answers);
    });
}

/// The application's thread writes the slot only while the seat is free; the progress thread sends from it until it
/// vacates the seat. Loom fails the model if the two are not ordered.
#[test]
fn a_slot_is_written_again_only_when_nothing_sends_from_it() {
    loom::model(|| {
        let shared = Shared::new();
        let seat = Arc::new((Seat::<u32, ()>::new(7), UnsafeCell::new(0)));
        let (progress, its_seat) = (shared.clone(), seat.clone());
        let thread = loom::thread::spawn(move || {
            let (seat, slot) = &*its_seat;
            let sent = |expected: u32| {
                while progress.commands.pop().is_none() {
                    progress.sleep();
                }
                // SAFETY: what loom checks.
                assert_eq!(slot.with(|slot| unsafe { *slot }), expected);
                seat.vacate();
            };
            sent(1);
            seat.end(Ok(7));
            sent(2);
        });
        let (seat, slot) = &*seat;
        let write = |value: u32| {
            while !seat.is_free() {
                loom::thread::yield_now();
            }
            // SAFETY: what loom checks.
            slot.with_mut(|slot| unsafe { *slot = value });
        };
        write(1);
        let replies = seat.begin().unwrap();
        shared.command(replies);
        let replies = loop {
            match seat.outcome() {
                Some(outcome) => break outcome.unwrap(),
                None => loom::thread::yield_now(),
            }
        };
        assert!(!seat.is_free(), "a reply is read");
        seat.give_back(replies);
        write(2);
        seat.take();
        shared.command(0);
        write(3);
        thread.join().unwrap();
    });
}

#[test]
fn who_sees_the_rank_sees_the_members() {
    loom::model(|| {
        let standing = Arc::new(Standing::new());
        let progress = standing.clone();
        let thread = loom::thread::spawn(move || progress.set(Some(1), [2, 3], true));
        if standing.rank().is_some() || standing.is_complete() {
            assert_eq!([standing.peers(), standing.siblings()], [2, 3]);
        }
        thread.join().unwrap();
    });
}
