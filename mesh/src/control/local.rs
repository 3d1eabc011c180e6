//! A scheduler within the process: [`State`] behind a lock, and members that reach it by a call. For deployments of one
//! process (an embedded engine, a measurement, a test); nobody can be lost, so there are no heartbeats.

use super::{Control, ControlError, ControlEvent};
use crate::scheduler::{
    Action, GenerateRefusal, OptionsError, SchedulerOptions, SequenceId, Session, State, system_secrets,
};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use stepmesh_proto::control::{FromMember, GenerateRequest, sequence_event};
use stepmesh_transport::Waker;

/// The scheduler. Cloning shares it.
#[derive(Clone)]
pub struct LocalScheduler(Arc<Mutex<Hub>>);

struct Hub {
    state: State,
    members: BTreeMap<Session, (Waker, Arc<Inbox>)>,
    sequence_events: VecDeque<(SequenceId, sequence_event::Body)>,
}

/// What the scheduler has said to one member. A member that polls touches nothing that others write until it is told.
#[derive(Default)]
#[repr(align(128))]
struct Inbox {
    has_news: AtomicBool,
    events: Mutex<VecDeque<ControlEvent>>,
}

impl Inbox {
    fn put(&self, event: ControlEvent) {
        lock(&self.events).push_back(event);
        self.has_news.store(true, Ordering::Release);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LocalScheduler {
    /// A scheduler without members.
    pub fn new(options: SchedulerOptions) -> Result<Self, OptionsError> {
        let state = State::new(options, system_secrets())?;
        Ok(Self(Arc::new(Mutex::new(Hub { state, members: BTreeMap::new(), sequence_events: VecDeque::new() }))))
    }

    /// A session for a member, whose endpoint this waker wakes. Dropping it is leaving.
    pub fn session(&self, waker: Waker) -> LocalControl {
        let mut hub = lock(&self.0);
        let session = hub.state.connected(Instant::now());
        let inbox = Arc::new(Inbox::default());
        hub.members.insert(session, (waker, inbox.clone()));
        LocalControl { session, inbox, scheduler: self.clone() }
    }

    /// Has a prompt decoded; what comes of it is told by [`LocalScheduler::next_sequence_event`].
    pub fn generate(&self, request: GenerateRequest) -> Result<SequenceId, GenerateRefusal> {
        let mut hub = lock(&self.0);
        let sequence = hub.state.generate(request)?;
        hub.deliver();
        Ok(sequence)
    }

    /// The next token, or end, of a sequence.
    pub fn next_sequence_event(&self) -> Option<(SequenceId, sequence_event::Body)> {
        lock(&self.0).sequence_events.pop_front()
    }
}

impl Hub {
    /// Passes on what the state wants said.
    fn deliver(&mut self) {
        while let Some(action) = self.state.next_action() {
            match action {
                Action::Send { session, message } => self.tell(session, ControlEvent::Message(message)),
                Action::End { session, reason } => {
                    self.tell(session, ControlEvent::Lost(reason));
                    self.members.remove(&session);
                }
                Action::Deliver { sequence, event } => self.sequence_events.push_back((sequence, event)),
                // Nobody asks this scheduler for figures, and it keeps no log.
                _ => {}
            }
        }
    }

    fn tell(&self, session: Session, event: ControlEvent) {
        if let Some((waker, inbox)) = self.members.get(&session) {
            inbox.put(event);
            waker.wake();
        }
    }
}

/// A member's session with a [`LocalScheduler`].
pub struct LocalControl {
    session: Session,
    inbox: Arc<Inbox>,
    scheduler: LocalScheduler,
}

impl Control for LocalControl {
    fn send(&mut self, message: FromMember) -> Result<(), ControlError> {
        let mut hub = lock(&self.scheduler.0);
        hub.state.message(self.session, message, Instant::now());
        hub.deliver();
        Ok(())
    }

    fn poll(&mut self) -> Option<ControlEvent> {
        if !self.inbox.has_news.load(Ordering::Acquire) {
            return None;
        }
        let mut events = lock(&self.inbox.events);
        let event = events.pop_front();
        self.inbox.has_news.store(!events.is_empty(), Ordering::Release);
        event
    }
}

impl Drop for LocalControl {
    fn drop(&mut self) {
        let mut hub = lock(&self.scheduler.0);
        if hub.members.remove(&self.session).is_some() {
            hub.state.disconnected(self.session, "the member was dropped");
            hub.deliver();
        }
    }
}
