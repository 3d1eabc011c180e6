//! The scheduler's state machine: takes messages and the time, gives [`Action`]s.

use super::action::{Action, Event, Outbox, SequenceId, Session, StatsId, Violation, clip, describe, violation};
use super::alarm::Alarm;
use super::barriers::Barriers;
use super::links::Links;
use super::membership::Membership;
use super::sequences::{GenerateRefusal, Sequences};
use super::stats::Stats;
use super::{OptionsError, SchedulerOptions, SecretSource};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;
use stepmesh_proto::WIRE_VERSION;
use stepmesh_proto::control::{
    BarrierGroup, CONTROL_VERSION, Drain, Epoch, FromMember, GenerateRequest, Hello, Leave, MemberStatus, PeerLost,
    Role, StatusReply, Welcome, from_member::Body as Said, to_member::Body,
};

/// The longest reason that a member gives for leaving, in bytes.
const MAX_REASON_BYTES: usize = 1024;

/// Members, links, barriers and sequences of one deployment.
///
/// Feed it with [`connected`](Self::connected), [`message`](Self::message), [`disconnected`](Self::disconnected),
/// [`tick`](Self::tick) and the clients' calls; after each, take all of [`next_action`](Self::next_action), and call
/// `tick` again at [`next_tick`](Self::next_tick).
pub struct State {
    options: SchedulerOptions,
    secrets: SecretSource,
    last_session: u64,
    /// When each session was last heard, members and those that have not said Hello.
    heard: BTreeMap<Session, Instant>,
    silence: Alarm,
    membership: Membership,
    links: Links,
    barriers: Barriers,
    sequences: Sequences,
    stats: Stats,
    complete: bool,
    draining: bool,
    out: Outbox,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { options, membership, links, complete, draining, .. } = self;
        f.debug_struct("State")
            .field("options", options)
            .field("epoch", &membership.epoch)
            .field("members", &membership.sessions().count())
            .field("links_up", &links.up())
            .field("complete", complete)
            .field("draining", draining)
            .finish_non_exhaustive()
    }
}

impl State {
    /// A deployment without members.
    pub fn new(options: SchedulerOptions, secrets: SecretSource) -> Result<Self, OptionsError> {
        options.check()?;
        Ok(Self {
            options,
            secrets,
            last_session: 0,
            heard: BTreeMap::new(),
            silence: Alarm::default(),
            membership: Membership::default(),
            links: Links::default(),
            barriers: Barriers::default(),
            sequences: Sequences::default(),
            stats: Stats::default(),
            complete: false,
            draining: false,
            out: Outbox::default(),
        })
    }

    /// What it was made with.
    pub fn options(&self) -> &SchedulerOptions {
        &self.options
    }

    /// The next thing to do.
    pub fn next_action(&mut self) -> Option<Action> {
        self.out.pop()
    }

    /// When [`tick`](Self::tick) has something to do at the earliest.
    pub fn next_tick(&self) -> Option<Instant> {
        [self.silence, self.links.alarm, self.stats.alarm].into_iter().filter_map(Alarm::when).min()
    }

    /// Somebody opened a session.
    pub fn connected(&mut self, now: Instant) -> Session {
        self.last_session += 1;
        let session = Session(self.last_session);
        self.heard.insert(session, now);
        self.silence.at_latest(now + self.options.loss);
        session
    }

    /// A message of a session. One whose session the state has ended is dropped.
    pub fn message(&mut self, session: Session, message: FromMember, now: Instant) {
        let Some(heard) = self.heard.get_mut(&session) else { return };
        *heard = now;
        if let Err(Violation(reason)) = self.dispatch(session, message, now) {
            self.expel(session, format!("it broke the protocol: {reason}"));
        }
        self.announce_completeness();
    }

    /// A session ended without a Leave.
    pub fn disconnected(&mut self, session: Session, reason: &str) {
        if self.heard.remove(&session).is_some() {
            self.gone(session, reason, false);
        }
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Instant) {
        if self.silence.rings(now) {
            let loss = self.options.loss;
            let silent = |heard: &Instant| now.saturating_duration_since(*heard) >= loss;
            let lost: Vec<_> =
                self.heard.iter().filter(|(_, heard)| silent(heard)).map(|(session, _)| *session).collect();
            for session in lost {
                self.expel(session, format!("nothing was heard of it for {loss:?}"));
            }
            self.heard.values().for_each(|heard| self.silence.at_latest(*heard + loss));
        }
        let due = self.links.tick(&self.options, now, &mut self.out);
        for (session, reason) in due.silent {
            self.expel(session, reason);
        }
        for retry in due.retries {
            self.introduce(retry.pair, retry.failures, now);
        }
        self.stats.tick(now, &mut self.out);
        self.announce_completeness();
    }

    /// A client's prompt. Its events come as [`Action::Deliver`].
    pub fn generate(&mut self, request: GenerateRequest) -> Result<SequenceId, GenerateRefusal> {
        if self.draining {
            return Err(GenerateRefusal::Draining);
        }
        if request.prompt.is_empty() {
            return Err(GenerateRefusal::Invalid("the prompt is empty".to_owned()));
        }
        let SchedulerOptions { attention, ffn, max_sequences, .. } = self.options;
        if let Some(rank) = request.attention_rank.filter(|rank| *rank >= attention) {
            return Err(GenerateRefusal::Invalid(format!(
                "attention rank {rank} is out of range: the deployment has {attention} attention instances"
            )));
        }
        if !self.complete {
            return Err(GenerateRefusal::NotReady {
                attention: self.membership.side(Role::Attention).len() as u32,
                attention_expected: attention,
                ffn: self.membership.side(Role::Ffn).len() as u32,
                ffn_expected: ffn,
                links: self.links.up() as u64,
                links_expected: u64::from(attention) * u64::from(ffn),
            });
        }
        if self.sequences.len() >= max_sequences {
            return Err(GenerateRefusal::Overloaded(max_sequences));
        }
        let side = self.membership.side(Role::Attention);
        let session = match request.attention_rank {
            Some(rank) => side.get(&rank),
            None => side.values().min_by_key(|session| self.sequences.load(**session)),
        };
        match session.copied() {
            Some(session) => Ok(self.sequences.start(session, request, &mut self.out)),
            None => Err(GenerateRefusal::Invalid("there is no such attention rank".to_owned())),
        }
    }

    /// The client of a sequence is gone. One that has ended is left alone.
    pub fn cancel(&mut self, sequence: SequenceId) {
        self.sequences.cancel(sequence, &mut self.out);
    }

    /// Asks all attention instances for their figures. The answer comes as [`Action::Answer`].
    pub fn stats(&mut self, reset: bool, now: Instant) -> StatsId {
        let members = self.membership.side(Role::Attention).values().copied().collect();
        self.stats.ask(members, reset, now + self.options.stats_timeout, &mut self.out)
    }

    /// What the deployment looks like now.
    pub fn status(&self) -> StatusReply {
        let members = [Role::Attention, Role::Ffn].into_iter().flat_map(|role| self.membership.side(role).values());
        let terms = self.membership.terms();
        StatusReply {
            epoch: self.membership.epoch,
            complete: self.complete,
            attention: self.options.attention,
            ffn: self.options.ffn,
            members: members
                .map(|session| MemberStatus {
                    peer: self.membership.get(*session).cloned(),
                    links_up: self.links.up_of(*session),
                    sequences: self.sequences.load(*session),
                })
                .collect(),
            workload: terms.workload,
            transport: terms.transport,
            control_version: CONTROL_VERSION,
            wire_version: WIRE_VERSION.into(),
        }
    }

    /// Asks all members to finish and leave; nobody is admitted and nothing is started from here on.
    pub fn drain(&mut self) {
        self.draining = true;
        self.broadcast(&Body::Drain(Drain {}));
    }

    /// Whether nobody is connected.
    pub fn is_deserted(&self) -> bool {
        self.heard.is_empty()
    }

    fn dispatch(&mut self, session: Session, message: FromMember, now: Instant) -> Result<(), Violation> {
        let Some(said) = message.body else { return violation("a message that says nothing") };
        let Some(peer) = self.membership.get(session) else {
            return match said {
                Said::Hello(hello) => {
                    self.hello(session, hello, now);
                    Ok(())
                }
                _ => violation("the first message must be a Hello"),
            };
        };
        let (role, rank) = (peer.role(), peer.rank);
        let out = &mut self.out;
        match said {
            Said::Hello(_) => violation("a second Hello"),
            Said::Heartbeat(_) => Ok(()),
            Said::LinkOffer(offer) => self.links.offer(session, offer, out),
            Said::LinkGrants(grants) => self.links.grants(session, grants, out),
            Said::LinkUp(up) => self.links.ready(session, up.incarnation, now),
            Said::LinkDown(down) => self.links.fenced(session, down, &self.options, now, out),
            Said::SequenceEvent(event) => self.sequences.report(session, event, out),
            Said::Stats(stats) => self.stats.reply(session, rank, stats, out),
            Said::BarrierEnter(enter) => {
                let SchedulerOptions { attention, ffn, .. } = self.options;
                let expected = |group| match group {
                    BarrierGroup::All => attention as usize + ffn as usize,
                    BarrierGroup::Attention => attention as usize,
                    BarrierGroup::Ffn => ffn as usize,
                };
                if let Some((waiting, released)) = self.barriers.enter(session, role, enter, expected)? {
                    waiting.into_iter().for_each(|waiter| out.send(waiter, Body::BarrierReleased(released.clone())));
                }
                Ok(())
            }
            Said::Leave(Leave { reason }) => {
                self.heard.remove(&session);
                let reason = clip(reason, MAX_REASON_BYTES);
                self.out.push(Action::End { session, reason: reason.clone() });
                self.gone(session, &reason, true);
                Ok(())
            }
        }
    }

    fn hello(&mut self, session: Session, hello: Hello, now: Instant) {
        let admitted = if self.draining {
            Err("the scheduler is shutting down".to_owned())
        } else {
            self.membership.admit(session, hello, &self.options)
        };
        let peer = match admitted {
            Ok(peer) => peer,
            Err(reason) => {
                self.heard.remove(&session);
                self.out.refuse(session, reason.clone());
                return self.out.note(Event::TurnedAway { session, reason });
            }
        };
        let SchedulerOptions { attention, ffn, heartbeat, loss, .. } = self.options;
        let epoch = self.membership.epoch;
        let welcome = Welcome {
            member: session.0,
            rank: peer.rank,
            epoch,
            attention,
            ffn,
            heartbeat_ms: heartbeat.as_millis().max(1) as u32,
            loss_ms: loss.as_millis() as u32,
        };
        self.out.send(session, Body::Welcome(welcome));
        self.announce_epoch();
        let opposite: Vec<_> = self.membership.opposite(peer.role()).map(|(other, _)| other).collect();
        for other in opposite {
            let pair = if peer.role() == Role::Attention { [session, other] } else { [other, session] };
            self.introduce(pair, 0, now);
        }
        self.out.note(Event::Joined { peer, epoch });
    }

    fn introduce(&mut self, [attention, ffn]: [Session; 2], failures: u32, now: Instant) {
        if let (Some(attention_peer), Some(ffn_peer)) = (self.membership.get(attention), self.membership.get(ffn)) {
            let ends = [(attention, attention_peer), (ffn, ffn_peer)];
            self.links.open(ends, failures, &self.options, &mut self.secrets, now, &mut self.out);
        }
    }

    /// Ends a session that does not behave, and tells it why.
    fn expel(&mut self, session: Session, reason: String) {
        if self.heard.remove(&session).is_some() {
            self.out.refuse(session, reason.clone());
            self.gone(session, &reason, false);
        }
    }

    /// Everything that ends with a session.
    fn gone(&mut self, session: Session, reason: &str, orderly: bool) {
        let Some(peer) = self.membership.remove(session) else {
            return self.out.note(Event::TurnedAway { session, reason: reason.to_owned() });
        };
        let epoch = self.membership.epoch;
        self.broadcast(&Body::PeerLost(PeerLost { peer: Some(peer.clone()), epoch, reason: reason.to_owned() }));
        self.links.lose(session);
        let verb = if orderly { "left" } else { "was lost" };
        let sentence = format!("{} {verb}: {reason}", describe(&peer));
        for (waiting, broken) in self.barriers.lose(session, peer.role(), &sentence) {
            waiting.into_iter().for_each(|waiter| self.out.send(waiter, Body::BarrierReleased(broken.clone())));
        }
        self.sequences.lose(session, &sentence, &mut self.out);
        self.stats.lose(session, &mut self.out);
        let was_complete = std::mem::take(&mut self.complete);
        self.announce_epoch();
        self.out.note(Event::Gone { peer, epoch, reason: reason.to_owned(), orderly });
        if was_complete {
            self.out.note(Event::Complete { epoch, complete: false });
        }
    }

    /// Every rank is held and every link up.
    fn announce_completeness(&mut self) {
        let SchedulerOptions { attention, ffn, .. } = self.options;
        let complete = self.links.up() as u64 == u64::from(attention) * u64::from(ffn);
        if complete != self.complete {
            self.complete = complete;
            self.announce_epoch();
            self.out.note(Event::Complete { epoch: self.membership.epoch, complete });
        }
    }

    fn announce_epoch(&mut self) {
        let ranks = |role| self.membership.side(role).keys().copied().collect();
        let epoch = Epoch {
            epoch: self.membership.epoch,
            complete: self.complete,
            attention_ranks: ranks(Role::Attention),
            ffn_ranks: ranks(Role::Ffn),
        };
        self.broadcast(&Body::Epoch(epoch));
    }

    fn broadcast(&mut self, body: &Body) {
        self.membership.sessions().for_each(|session| self.out.send(session, body.clone()));
    }

    /// The incarnations in use with their two members, for tests.
    #[cfg(test)]
    pub(super) fn live_links(&self) -> Vec<(u32, [Session; 2])> {
        self.links.live().collect()
    }
}
