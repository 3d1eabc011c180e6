//! What the device brings to an endpoint: completions, messages of the peers, silence, deadlines; and how links end.

use super::connection_manager::PERIOD;
use super::control::{self, Message};
use super::descriptor::Contact;
use super::endpoint::{Rail, VerbsEndpoint};
use super::lane::SEND;
use super::link::{CONTROL, CONTROL_RAIL, Link, Phase};
use super::sys::*;
use crate::{Completion, Disconnect, LinkId, Side, TransportError, WorkError};
use std::time::{Duration, Instant};

/// Completions that one poll appends, about.
const COMPLETIONS_PER_POLL: usize = 256;
/// How long a failed lane may take to give back what was posted to it.
const DRAIN: Duration = Duration::from_secs(1);

/// What a completion is about, from its id.
struct About {
    link: LinkId,
    lane: u8,
    /// The sequence number of posted work; none for a receive.
    sent: Option<u16>,
}

impl About {
    fn decode(id: u64) -> Self {
        let sent = (id & SEND != 0).then_some(id as u16);
        Self { link: LinkId((id >> 32) as u32), lane: (id >> 24) as u8, sent }
    }
}

impl VerbsEndpoint {
    /// Takes what has completed, and does what is due.
    pub(super) fn progress(&mut self, completions: &mut Vec<Completion>) -> Result<(), TransportError> {
        let limit = completions.len() + COMPLETIONS_PER_POLL;
        let now = self.clock.look();
        let first = self.turn;
        self.turn = if first + 1 < self.rails.len() { first + 1 } else { 0 };
        for rail in (first..self.rails.len()).chain(0..first) {
            while completions.len() < limit && self.rails[rail].queue.look()? {
                while let Some(completion) = self.rails[rail].queue.next() {
                    self.take(&completion, now, completions);
                }
                if !self.rails[rail].queue.was_full() {
                    break;
                }
            }
        }
        if self.due.is_some_and(|due| now >= due) {
            self.expire(now, completions);
        }
        Ok(())
    }

    fn take(&mut self, completion: &ibv_wc, now: Instant, completions: &mut Vec<Completion>) {
        let Completed { id, status, immediate } = completed(completion);
        let About { link: id, lane, sent } = About::decode(id);
        let immediate = u32::from_be(immediate);
        let Some(link) = self.links.get_mut(&id) else {
            if let Some((control, _)) = self.lingering.get_mut(&id)
                && lane == CONTROL
                && sent.is_some()
            {
                control.unsent = control.unsent.saturating_sub(1);
                control.failed |= status != IBV_WC_SUCCESS;
                self.remind(now);
            }
            return;
        };
        if status == IBV_WC_SUCCESS {
            (link.heard, link.asked) = (now, None);
        }
        let settled = status == IBV_WC_SUCCESS && !matches!(link.phase, Phase::Ending { .. });
        if lane == CONTROL {
            return self.take_control(id, sent.is_some(), status, immediate, completions);
        }
        let Some(open) = link.lanes.get_mut(usize::from(lane)) else { return };
        let flushed = status == IBV_WC_WR_FLUSH_ERR;
        match sent {
            Some(sequence) => {
                let error = match status {
                    IBV_WC_SUCCESS => None,
                    IBV_WC_REM_ACCESS_ERR | IBV_WC_REM_INV_REQ_ERR | IBV_WC_REM_OP_ERR => Some(WorkError::RemoteAccess),
                    _ => Some(WorkError::Flushed),
                };
                open.sent(sequence, error, completions);
                if status != IBV_WC_SUCCESS && !flushed {
                    let (reason, last_word) = self.judge(status, lane);
                    self.end(id, reason, Some(last_word));
                }
            }
            None => {
                let replenished = open.received(status != IBV_WC_SUCCESS);
                if status == IBV_WC_SUCCESS {
                    if matches!(link.phase, Phase::Connecting { .. }) {
                        // The peer has greeted on the other queue pair, and sends already.
                        self.welcome(id, now, completions);
                    }
                    completions.push(Completion::Immediate { link: id, lane, immediate });
                    if let Err(error) = replenished {
                        self.end(id, Disconnect::PeerGone(error.to_string()), Some(Message::Lost));
                    }
                } else if matches!(link.phase, Phase::Connected | Phase::Connecting { .. }) {
                    // A refused peer learns it from its own device, and then says so.
                    let reason = judge_flush(&self.rails[link.rail_of(lane)], lane);
                    self.end(id, reason, None);
                }
            }
        }
        if !settled {
            self.settle(id, now, completions);
        }
    }

    /// Why a link ends of which work failed, and what to tell the peer.
    fn judge(&self, status: ibv_wc_status, lane: u8) -> (Disconnect, Message) {
        match status {
            IBV_WC_REM_ACCESS_ERR | IBV_WC_REM_INV_REQ_ERR | IBV_WC_REM_OP_ERR => {
                let why = format!("the peer's device refused work on lane {lane}");
                (Disconnect::AccessRefused(why), Message::Refused)
            }
            IBV_WC_RETRY_EXC_ERR | IBV_WC_RNR_RETRY_EXC_ERR => {
                (Disconnect::PeerGone(format!("its device does not answer on lane {lane}")), Message::Lost)
            }
            other => {
                let why = format!("work on lane {lane} failed with status {other} of ibv_wc_status");
                (Disconnect::PeerGone(why), Message::Lost)
            }
        }
    }

    /// What completes on a control queue pair.
    fn take_control(
        &mut self,
        id: LinkId,
        sent: bool,
        status: ibv_wc_status,
        immediate: u32,
        completions: &mut Vec<Completion>,
    ) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let Some(control) = &mut link.control else { return };
        if sent {
            control.unsent = control.unsent.saturating_sub(1);
        }
        if status != IBV_WC_SUCCESS {
            if !sent && link.phase != Phase::Connected {
                return;
            }
            let first = !std::mem::replace(&mut control.failed, true);
            if link.phase == Phase::Connected && first {
                let reason = match status {
                    IBV_WC_WR_FLUSH_ERR => port_lost(&self.rails[CONTROL_RAIL]),
                    _ => Disconnect::PeerGone("its device does not answer".into()),
                };
                self.end(id, reason, None);
            }
            // Before that, a hello has failed, as the peer has not connected yet: it is sent again.
            self.remind(Instant::now());
            return;
        }
        if sent {
            return;
        }
        control.replenish();
        let connects = match control.read(immediate) {
            Some(Message::Hello) => {
                control.send(Message::Welcome);
                link.spec.side == Side::Passive
            }
            Some(Message::Welcome) => link.spec.side == Side::Active,
            Some(Message::Ping) => false,
            Some(Message::Bye) => return self.told(id, Disconnect::Closed, None),
            Some(Message::Refused) => {
                let reason = Disconnect::AccessRefused("the peer says that an access was refused".into());
                return self.told(id, reason, Some(Message::Refused));
            }
            Some(Message::Lost) => return self.told(id, Disconnect::PeerGone("it has lost the link".into()), None),
            None => {
                let reason = Disconnect::Protocol(format!("the control message {immediate:#x} is none of this link"));
                return self.end(id, reason, None);
            }
        };
        if connects && matches!(link.phase, Phase::Connecting { .. }) {
            self.welcome(id, Instant::now(), completions);
        }
    }

    /// Both ends can receive; from now on the peer is looked after.
    fn welcome(&mut self, id: LinkId, now: Instant, completions: &mut Vec<Completion>) {
        if let Some(link) = self.links.get_mut(&id) {
            link.phase = Phase::Connected;
            completions.push(Completion::Connected { link: id });
            self.remind(now);
        }
    }

    /// Begins to end a link: the lanes fail at once, and are drained.
    pub(super) fn end(&mut self, id: LinkId, reason: Disconnect, last_word: Option<Message>) {
        let now = Instant::now();
        let Some(link) = self.links.get_mut(&id) else { return };
        match link.phase {
            Phase::Ended | Phase::Ending { .. } => return,
            Phase::Connected => {
                link.lanes.iter_mut().for_each(|lane| lane.fail());
                let unconfirmed = matches!(reason, Disconnect::AccessRefused(_));
                link.phase = Phase::Ending { deadline: now + DRAIN, reason, unconfirmed };
            }
            // Nothing was posted: there is nothing to wait for.
            Phase::Opened | Phase::Connecting { .. } => link.end_by(now, reason),
        }
        link.say(last_word);
        self.remind(now);
    }

    /// Ends a link by the peer's word, which is better than what its silence says; answers it if it was not foreseen.
    fn told(&mut self, id: LinkId, word: Disconnect, answer: Option<Message>) {
        self.end(id, word.clone(), answer);
        let Some(link) = self.links.get_mut(&id) else { return };
        link.say(answer);
        if let Phase::Ending { reason, unconfirmed, .. } = &mut link.phase {
            *unconfirmed = false;
            if matches!(reason, Disconnect::PeerGone(_)) {
                *reason = word;
            }
        }
        self.remind(Instant::now());
    }

    /// Ends a link for good, once its lanes are drained or have had their time.
    fn settle(&mut self, id: LinkId, now: Instant, completions: &mut Vec<Completion>) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let Some(reason) = link.verdict(now) else { return };
        link.phase = Phase::Ended;
        link.lanes.iter_mut().for_each(|lane| lane.abandon(completions));
        link.drop_lanes(&mut self.rails);
        let control = link.control.take();
        completions.push(Completion::Disconnected { link: id, reason });
        if let Some(control) = control {
            self.linger(id, control);
        }
    }

    /// Ends the links that have lanes on a port which has gone down; where the control queue pair is on another, the
    /// peer is told.
    fn look_for_losses(&mut self, rail: usize) {
        let Rail { context, losses, .. } = &mut self.rails[rail];
        let now = context.losses();
        if now == std::mem::replace(losses, now) {
            return;
        }
        let reason = port_lost(&self.rails[rail]);
        let last_word = (rail != CONTROL_RAIL).then_some(Message::Lost);
        let uses = |link: &Link| rail < link.rails(&self.rails).len();
        let ids: Vec<_> = self.links.iter().filter(|(_, link)| uses(link)).map(|(&id, _)| id).collect();
        ids.into_iter().for_each(|id| self.end(id, reason.clone(), last_word));
    }

    /// Does what is due, and finds out what is next.
    fn expire(&mut self, now: Instant, completions: &mut Vec<Completion>) {
        self.due = None;
        // A system call a rail. While every peer is heard of there is no need to; on several rails one may hide another.
        let keep_alive = self.rails[CONTROL_RAIL].context.options.keep_alive;
        let quiet = |link: &Link| link.phase != Phase::Connected || now >= link.heard + keep_alive;
        if self.rails.len() > 1 || self.links.values().any(quiet) {
            self.rails.iter().for_each(|rail| rail.context.take_events());
        }
        for rail in 0..self.rails.len() {
            self.look_for_losses(rail);
        }
        self.take_calls(now);
        let before = self.lingering.len();
        self.lingering.retain(|_, (control, deadline)| *deadline > now && control.unsent > 0 && !control.failed);
        self.rails[CONTROL_RAIL].queue.retire((before - self.lingering.len()) * control::COMPLETIONS);
        let mut late = Vec::new();
        let mut next = self.lingering.values().map(|(_, deadline)| *deadline).min();
        for (&id, link) in &mut self.links {
            let due = match &link.phase {
                Phase::Opened | Phase::Ended => continue,
                &Phase::Ending { deadline, unconfirmed, .. } => {
                    late.push(id);
                    if unconfirmed { look_after(link, now, keep_alive).min(deadline) } else { deadline }
                }
                Phase::Connecting { deadline } if *deadline <= now => {
                    late.push(id);
                    continue;
                }
                &Phase::Connecting { deadline } => {
                    dial_again(link);
                    deadline
                }
                Phase::Connected => look_after(link, now, keep_alive),
            };
            next = Some(next.map_or(due, |next| next.min(due)));
        }
        if self.links.values().any(Link::awaits_connections) {
            next = Some(next.map_or(now + PERIOD, |next| next.min(now + PERIOD)));
        }
        if let Some(next) = next {
            self.remind(next.max(now));
        }
        for id in late {
            let why = "the peer did not connect in time";
            self.end(id, Disconnect::NotConnected(why.into()), None);
            self.settle(id, now, completions);
        }
    }
}

/// The time, for polls: reading it takes longer than an empty poll does, so polls that follow each other closely share a
/// look at it.
pub(super) struct Clock {
    now: Instant,
    /// Polls that go by what was seen last.
    shared: u8,
}

/// Polls that share a look, if as many as that took less than the time.
const SHARED: u8 = 16;
const CLOSELY: Duration = Duration::from_micros(500);

impl Clock {
    pub(super) fn new() -> Self {
        Self { now: Instant::now(), shared: 0 }
    }

    /// Looks next time, as time has passed.
    pub(super) fn wind(&mut self) {
        self.shared = 0;
    }

    /// The time of now or, while polls follow closely, of a moment ago.
    #[inline]
    fn look(&mut self) -> Instant {
        if self.shared > 0 {
            self.shared -= 1;
            return self.now;
        }
        let now = Instant::now();
        if now - self.now < CLOSELY {
            self.shared = SHARED;
        }
        self.now = now;
        now
    }
}

/// Why a lane was ended by this side's device, with nothing posted having failed.
fn judge_flush(rail: &Rail, lane: u8) -> Disconnect {
    rail.context.take_events();
    if rail.context.losses() == rail.losses && rail.context.is_port_active() {
        Disconnect::AccessRefused(format!("this device refused what the peer asked for on lane {lane}"))
    } else {
        port_lost(rail)
    }
}

fn port_lost(rail: &Rail) -> Disconnect {
    Disconnect::PeerGone(format!("port {} of {} went down", rail.context.port.number, rail.context.name))
}

/// Greets once more if the last hello was not answered: the peer was not connected yet, and the queue pair has failed.
fn dial_again(link: &mut Link) {
    let Some(Contact::QueuePairs { ports, control: half, .. }) = link.peer.as_ref().map(|peer| &peer.contact) else {
        return;
    };
    let Some(control) = &mut link.control else { return };
    if control.failed && control.reconnect(&ports[0], *half).is_ok() && link.spec.side == Side::Active {
        control.send(Message::Hello);
    }
}

/// Asks a silent peer whether it is there; when to look again.
fn look_after(link: &mut Link, now: Instant, keep_alive: Duration) -> Instant {
    let last = link.asked.unwrap_or(link.heard);
    if now < last + keep_alive {
        return last + keep_alive;
    }
    if let Some(control) = &mut link.control
        && link.asked.is_none()
    {
        control.send(Message::Ping);
    }
    link.asked = Some(now);
    now + keep_alive
}
