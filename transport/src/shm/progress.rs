//! Polling and waiting: the rings at every look, the sockets only now and then.

use super::dial::Progress;
use super::endpoint::ShmEndpoint;
use super::link::{Link, State};
use super::ring::Nonsense;
use super::watch::Source;
use crate::looks::between_polls;
use crate::{Completion, Disconnect, LinkId, Side, TransportError};
use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};

/// Completions of one poll.
const AT_ONCE: usize = 256;
/// How long the sockets may go unheard while polling: the time in which a death is noticed.
const SOCKETS_MS: u64 = 10;
/// How many polls pass between two looks at the clock, which would cost a good part of a poll.
const CLOCK_POLLS: u32 = 64;
/// How many polls pass between two looks at the sockets while a hello is under way.
const HELLO_POLLS: u32 = 8;
const _: () = assert!(CLOCK_POLLS.is_multiple_of(HELLO_POLLS));
/// How often a wait that spins looks at the rings between two looks at the clock, which takes longer.
const LOOKS: u32 = 16;
/// How long a wait sleeps before it looks at the sockets.
const SLICE: Duration = Duration::from_millis(25);
/// The same while something is expected that rings no bell: a step of a hello, or room in a full lane.
const SHORT_SLICE: Duration = Duration::from_millis(1);

/// When the sockets are looked at next.
#[derive(Default)]
pub(super) struct Schedule {
    due: bool,
    /// They went unheard for long.
    late: bool,
    /// A hello is under way.
    hello: bool,
    polls: u32,
    heard_ms: u64,
}

impl Schedule {
    /// A hello has begun.
    pub(super) fn hurry(&mut self) {
        (self.due, self.hello) = (true, true);
    }

    /// Counts a poll. Once due, they stay so until they are heard: a wait that ends for them must not have used it up.
    #[inline]
    fn is_due(&mut self) -> bool {
        self.polls = self.polls.wrapping_add(1);
        if self.polls.is_multiple_of(HELLO_POLLS) {
            self.consider();
        }
        self.due || self.late
    }

    #[cold]
    fn consider(&mut self) {
        self.due |= self.hello;
        self.late |= self.polls.is_multiple_of(CLOCK_POLLS) && coarse_ms().wrapping_sub(self.heard_ms) >= SOCKETS_MS;
    }

    fn heard(&mut self) {
        (self.due, self.late, self.heard_ms) = (false, false, coarse_ms());
    }
}

/// A few milliseconds' resolution, for a few nanoseconds.
fn coarse_ms() -> u64 {
    let time = clock_gettime(ClockId::MonotonicCoarse);
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

impl ShmEndpoint {
    /// [`crate::Endpoint::poll`].
    pub(super) fn make_progress(&mut self, completions: &mut Vec<Completion>) -> Result<usize, TransportError> {
        let before = completions.len();
        let limit = before + AT_ONCE;
        if self.schedule.is_due() {
            self.see_to_sockets()?;
        }
        if !self.ready.is_empty() {
            self.report(limit, completions);
        }
        if self.ready.is_empty() {
            self.collect(limit, completions);
            if !self.ready.is_empty() {
                self.report(limit, completions);
            }
        }
        let found = completions.len() - before;
        if found == 0 {
            between_polls();
        }
        Ok(found)
    }

    #[inline(never)]
    fn report(&mut self, limit: usize, completions: &mut Vec<Completion>) {
        while completions.len() < limit
            && let Some(completion) = self.ready.pop_front()
        {
            if let Completion::Sent { link, lane, .. } = completion
                && let Some(connection) = self.link(link).and_then(Link::connection)
            {
                connection.unreported[usize::from(lane)] -= 1;
            }
            completions.push(completion);
        }
    }

    /// Takes what has arrived in the rings, from each link in turn.
    #[inline]
    fn collect(&mut self, limit: usize, completions: &mut Vec<Completion>) {
        let count = self.links.len();
        let after = |index: usize| if index + 1 < count { index + 1 } else { 0 };
        self.first = after(self.first);
        let mut index = self.first;
        for _ in 0..count {
            if let Link { id, state: State::Connected(connection), .. } = &mut self.links[index] {
                let before = completions.len();
                let sound = connection.collect(*id, limit, completions);
                if sound.is_err() || !connection.is_open() {
                    self.conclude(index, sound, completions.len() - before, completions.len() < limit);
                }
            }
            index = after(index);
        }
    }

    /// Ends a link whose peer wrote nonsense, or is gone and everything it had sent is taken.
    #[cold]
    fn conclude(&mut self, index: usize, sound: Result<(), Nonsense>, taken: usize, all: bool) {
        let reason = match sound {
            Ok(()) => self.links[index].connection().and_then(|connection| connection.conclude(taken, all)),
            Err(Nonsense) => Some(Disconnect::Protocol("the peer wrote nonsense into a ring".into())),
        };
        if let Some(reason) = reason {
            self.fail(index, reason);
        }
    }

    /// Hears the sockets, unless it is only a matter of whether the peers are alive, and their immediates say that they are:
    /// so a link that is busy makes no system call.
    #[cold]
    fn see_to_sockets(&mut self) -> Result<(), TransportError> {
        if self.all_speak() && !self.schedule.due && !self.deaf {
            self.schedule.heard();
            return Ok(());
        }
        self.hear_sockets()
    }

    fn hear_sockets(&mut self) -> Result<(), TransportError> {
        if self.deaf
            && let Some(listener) = &self.listener
        {
            self.watch.rename(listener, Source::Listener)?;
            self.deaf = false;
        }
        for source in self.watch.ready()? {
            match source {
                Source::Listener => self.accept()?,
                Source::Candidate(number) => self.hear(number)?,
                Source::Link(id) => self.hear_link(id),
            }
        }
        if self.schedule.hello {
            self.press_on()?;
        }
        let connecting = self.links.iter().any(|link| link.deadline().is_some());
        self.schedule.hello = connecting || !self.candidates.is_empty();
        self.schedule.heard();
        Ok(())
    }

    /// Whether every link is connected and its peer has sent something since the last time.
    fn all_speak(&mut self) -> bool {
        let speaks =
            |link: &mut Link| link.connection().is_some_and(|connection| std::mem::take(&mut connection.spoke));
        !self.links.is_empty() && self.links.iter_mut().fold(true, |all, link| speaks(link) & all)
    }

    fn hear_link(&mut self, id: LinkId) {
        let Some(index) = self.position(id) else { return };
        let link = &mut self.links[index];
        match &mut link.state {
            State::Connected(connection) => connection.listen(),
            // Proven, not yet welcomed, and yet it speaks: it has hung up, most likely.
            State::Opened(arrived) => *arrived = None,
            State::Dialling(dial) => match dial.advance(&link.spec, &self.bell) {
                Progress::Waiting => {}
                Progress::Connected(connection) => {
                    link.state = State::Connected(connection);
                    self.ready.push_back(Completion::Connected { link: id });
                }
                Progress::Failed(reason) => self.fail(index, reason),
            },
            State::Awaiting(_) | State::Ended => {}
        }
    }

    /// Dials those that wait to be dialled, and gives up what has taken too long.
    fn press_on(&mut self) -> Result<(), TransportError> {
        let now = Instant::now();
        self.expire_candidates(now);
        for index in 0..self.links.len() {
            let link = &mut self.links[index];
            let Some(deadline) = link.deadline() else { continue };
            if deadline.is_some_and(|deadline| deadline <= now) {
                let reason = match (link.refusal, link.spec.side) {
                    (Some(why), _) => Disconnect::Rejected(why.into()),
                    (None, Side::Active) => Disconnect::NotConnected("the peer did not answer in time".into()),
                    (None, Side::Passive) => Disconnect::NotConnected("the peer did not dial in time".into()),
                };
                self.fail(index, reason);
                continue;
            }
            let State::Dialling(dial) = &mut link.state else { continue };
            match dial.dial(&link.spec) {
                Ok(None) => {}
                Ok(Some(socket)) => self.watch.add(socket, Source::Link(link.id))?,
                Err(reason) => self.fail(index, reason),
            }
        }
        Ok(())
    }

    /// [`crate::Endpoint::wait`].
    pub(super) fn sleep(&mut self, timeout: Duration) -> Result<(), TransportError> {
        if self.bell.take_wake() || self.has_work() {
            return Ok(());
        }
        let start = Instant::now();
        let spin = self.options.spin.min(timeout);
        while !spin.is_zero() && start.elapsed() < spin {
            for _ in 0..LOOKS {
                if self.bell.take_wake() || self.has_work() || self.schedule.is_due() {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
        }
        let blocked = self.take_blocked();
        let slice = if self.schedule.hello || blocked { SHORT_SLICE } else { SLICE };
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(());
            }
            if self.bell.sleep(slice.min(left), || self.bell.take_wake() || self.has_work()) || self.has_work() {
                return Ok(());
            }
            // A step of a hello, a hang-up, a time-out to see to: the next poll does it.
            if self.schedule.hello || !self.watch.ready()?.is_empty() {
                self.schedule.due = true;
                return Ok(());
            }
            if blocked {
                return Ok(());
            }
        }
    }

    /// Whether a poll would find something.
    fn has_work(&self) -> bool {
        self.schedule.due
            || !self.ready.is_empty()
            || self.links.iter().any(|link| match &link.state {
                State::Connected(connection) => connection.is_ready(),
                _ => false,
            })
    }

    /// Whether a lane was found full since the last wait.
    fn take_blocked(&mut self) -> bool {
        let connections = self.links.iter_mut().filter_map(Link::connection);
        connections.fold(false, |blocked, connection| std::mem::take(&mut connection.blocked) | blocked)
    }
}
