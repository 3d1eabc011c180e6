//! What messages do when they arrive: prove, write, read, answer, refuse, end.

use super::link::{Half, HalfId, State};
use super::network::Network;
use crate::{Access, Completion, Disconnect, LinkId, LinkSpec, Region, WorkError};
use std::time::Instant;

pub(super) enum Body {
    /// A half introduces itself to the one it was told to connect to.
    Hello(LinkSpec),
    /// The other half is not who was expected.
    Reject(String),
    /// Something to do.
    Work { lane: u8, work: Request },
    /// It is done, or will not be.
    Answer { lane: u8, answer: Answer },
    /// The link was closed in good order.
    Bye,
}

impl Body {
    pub(super) fn lane(&self) -> Option<u8> {
        match self {
            Self::Work { lane, .. } | Self::Answer { lane, .. } => Some(*lane),
            Self::Hello(_) | Self::Reject(_) | Self::Bye => None,
        }
    }
}

pub(super) enum Request {
    Write { source: Bytes, place: Option<Place>, immediate: Option<u32> },
    Read { place: Place, target: Stretch },
}

/// Where in the receiver's granted memory.
pub(super) struct Place {
    pub(super) key: u64,
    pub(super) offset: u64,
}

/// Bytes that were copied at the post, or that stay where they are until they arrive.
pub(super) enum Bytes {
    Inline(Vec<u8>),
    Region(Stretch),
}

/// A range of a region, which it keeps alive.
pub(super) struct Stretch {
    pub(super) region: Region,
    pub(super) offset: usize,
    pub(super) len: usize,
}

impl Bytes {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Inline(bytes) => bytes.len(),
            Self::Region(stretch) => stretch.len,
        }
    }

    fn read(self) -> Result<Vec<u8>, String> {
        match self {
            Self::Inline(bytes) => Ok(bytes),
            Self::Region(stretch) => stretch.read(),
        }
    }
}

impl Stretch {
    fn read(&self) -> Result<Vec<u8>, String> {
        read(&self.region, self.offset, self.len)
    }
}

fn read(region: &Region, offset: usize, len: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; len];
    region.read(offset, &mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// The link that a completion is of.
fn link_of(completion: &Completion) -> LinkId {
    match *completion {
        Completion::Connected { link }
        | Completion::Sent { link, .. }
        | Completion::Immediate { link, .. }
        | Completion::Disconnected { link, .. } => link,
    }
}

pub(super) enum Answer {
    Done,
    Bytes { bytes: Vec<u8>, target: Stretch },
    Refused(String),
}

impl Answer {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Bytes { bytes, .. } => bytes.len(),
            Self::Done | Self::Refused(_) => 0,
        }
    }
}

impl Network {
    pub(super) fn deliver(&mut self, at: Instant, from: HalfId, to: HalfId, body: Body) {
        match body {
            Body::Hello(spec) => self.greeted(at, from, to, &spec),
            Body::Reject(why) => {
                if self.half(to).is_some_and(|half| half.state == State::Open && half.peer == Some(from)) {
                    self.end(to, Disconnect::Rejected(why));
                }
            }
            // Whatever else arrives must come from the peer of a link that stands: this is the fence.
            body if !self.half(to).is_some_and(|half| half.is_connected_to(from)) => drop(body),
            Body::Work { lane, work } => match self.perform(to, lane, work) {
                Ok(answer) => self.send_answer(at, to, from, lane, answer),
                Err(why) => {
                    self.send_answer(at, to, from, lane, Answer::Refused(why.clone()));
                    self.end(to, Disconnect::AccessRefused(why));
                }
            },
            Body::Answer { lane, answer } => self.answered(to, lane, answer),
            Body::Bye => self.end(to, Disconnect::Closed),
        }
    }

    /// A half introduces itself to the one it is to connect to; its work will not arrive before.
    pub(super) fn greet(&mut self, at: Instant, from: HalfId, to: HalfId, hello: Body) {
        let arrival = self.send(at, from, to, None, hello);
        for lane in self.half(from).into_iter().flat_map(|half| &mut half.lanes) {
            lane.work_until = lane.work_until.max(arrival);
        }
    }

    /// A half has introduced itself to another one.
    fn greeted(&mut self, at: Instant, from: HalfId, to: HalfId, spec: &LinkSpec) {
        if !self.stations.get(to.endpoint).is_some_and(|station| station.alive) {
            return;
        }
        let objection = match self.half(to) {
            Some(half) if half.state == State::Open => half.objection(spec),
            _ => Some("the link is of a dead incarnation, or taken"),
        };
        if let Some(why) = objection {
            self.send(at, to, from, None, Body::Reject(why.into()));
            return;
        }
        if let Some(half) = self.half(to) {
            half.proven = Some(from);
        }
        self.connect_if_ready(to);
    }

    /// Connects a half that has been told whom to connect to and has heard from it, if that one is still there.
    pub(super) fn connect_if_ready(&mut self, id: HalfId) {
        let ready = |half: &&mut Half| half.state == State::Open && half.peer == half.proven;
        let Some(peer) = self.half(id).filter(ready).and_then(|half| half.peer) else { return };
        if self.half(peer).is_none() {
            return;
        }
        let Some(half) = self.half(id) else { return };
        half.state = State::Connected;
        if let Some(deadline) = half.deadline.take() {
            self.cancel(deadline);
        }
        self.complete(id.endpoint, Completion::Connected { link: id.link });
    }

    /// Does what a peer asks of a half, if it may.
    fn perform(&mut self, to: HalfId, lane: u8, work: Request) -> Result<Answer, String> {
        let half = self.half(to).ok_or("the link is closed")?;
        match work {
            Request::Write { source, place, immediate } => {
                if let Some(place) = place.filter(|_| source.len() > 0) {
                    let region = half.permitted(place.key, place.offset, source.len(), Access::PeerWrite)?;
                    let bytes = source.read()?;
                    region.write(place.offset as usize, &bytes).map_err(|error| error.to_string())?;
                }
                if let Some(immediate) = immediate {
                    self.complete(to.endpoint, Completion::Immediate { link: to.link, lane, immediate });
                }
                Ok(Answer::Done)
            }
            Request::Read { place, target } => {
                let region = half.permitted(place.key, place.offset, target.len, Access::PeerRead)?;
                let bytes = read(region, place.offset as usize, target.len)?;
                Ok(Answer::Bytes { bytes, target })
            }
        }
    }

    /// The oldest work of a lane is answered.
    fn answered(&mut self, id: HalfId, lane: u8, answer: Answer) {
        let lane_state = self.half(id).and_then(|half| half.lanes.get_mut(usize::from(lane)));
        let Some(signal) = lane_state.and_then(|lane| lane.outstanding.pop_front()) else { return };
        let result = match &answer {
            Answer::Done => Ok(()),
            // The target's range was checked when the read was posted.
            Answer::Bytes { bytes, target } => {
                target.region.write(target.offset, bytes).map_err(|_| WorkError::RemoteAccess)
            }
            Answer::Refused(_) => Err(WorkError::RemoteAccess),
        };
        if signal.is_some() || result.is_err() {
            let token = signal.unwrap_or(u64::MAX);
            self.complete(id.endpoint, Completion::Sent { link: id.link, lane, token, result });
        }
        if let Answer::Refused(why) = answer {
            self.end(id, Disconnect::AccessRefused(why));
        }
    }

    /// Forgets a half: its grants are withdrawn, and its peer learns of it after all that was sent before.
    pub(super) fn close(&mut self, id: HalfId) {
        let now = self.clock.now();
        let Some(station) = self.stations.get_mut(id.endpoint) else { return };
        let Some(half) = station.halves.remove(id.link.0) else { return };
        station.completed.retain(|completion| link_of(completion) != id.link);
        if let Some(deadline) = half.deadline {
            self.cancel(deadline);
        }
        // Through a lost lane the farewell does not get either; the peer notices in its own way.
        let lost = half.lanes.iter().any(|lane| lane.lost);
        if let Some(peer) = half.peer.filter(|_| half.state != State::Ended && !lost) {
            self.send(now, id, peer, half.quiet_at(), Body::Bye);
        }
    }

    /// A half that is connected notices that its peer is gone.
    pub(super) fn bereave(&mut self, id: HalfId, reason: Disconnect) {
        if self.half(id).is_some_and(|half| half.state == State::Connected) {
            self.end(id, reason);
        }
    }

    /// A connect that is still not answered has failed.
    pub(super) fn give_up(&mut self, id: HalfId) {
        if self.half(id).is_some_and(|half| half.state == State::Open) {
            self.end(id, Disconnect::NotConnected("the peer did not answer in time".into()));
        }
    }

    /// Ends a half, with what was outstanding, unless it has ended.
    pub(super) fn end(&mut self, id: HalfId, reason: Disconnect) {
        let Some(half) = self.half(id).filter(|half| half.state != State::Ended) else { return };
        half.state = State::Ended;
        let deadline = half.deadline.take();
        let mut flushed = Vec::new();
        for (lane, state) in (0..).zip(&mut half.lanes) {
            for signal in state.outstanding.drain(..) {
                let (token, result) = (signal.unwrap_or(u64::MAX), Err(WorkError::Flushed));
                flushed.push(Completion::Sent { link: id.link, lane, token, result });
            }
        }
        for completion in flushed {
            self.complete(id.endpoint, completion);
        }
        self.complete(id.endpoint, Completion::Disconnected { link: id.link, reason });
        if let Some(deadline) = deadline {
            self.cancel(deadline);
        }
    }
}
