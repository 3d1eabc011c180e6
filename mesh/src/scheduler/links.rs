//! The links between attention and FFN members: introduced, up, fenced on both ends, introduced again.
//!
//! ```text
//!            LinkUp from both              LinkDown from one: CloseLink to the other
//!   OpenLink ───────────────▶ up ──────────────────────────────────▶ fencing
//!      ▲                                                                │ LinkDown from both
//!      └──────────────────── back-off, new incarnation ◀────────────────┘
//! ```

use super::action::{Event, Outbox, Violation, clip, violation};
use super::alarm::Alarm;
use super::options::SecretSource;
use super::{Session, options::SchedulerOptions};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use stepmesh_proto::control::{CloseLink, LinkDown, LinkGrants, LinkOffer, OpenLink, Peer, to_member::Body};

/// The longest descriptor of a link's half or of a region, in bytes.
const MAX_DESCRIPTOR_BYTES: usize = 4096;
/// Regions granted in one message.
const MAX_GRANTS: usize = 64;
/// Offers and grants that one end may send over a link's life.
const MAX_RELAYED: u8 = 16;
/// The longest reason that is passed on, in bytes.
const MAX_REASON_BYTES: usize = 1024;
/// The wait after a link's first failure; it doubles with each that follows.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LAST_BACKOFF: Duration = Duration::from_secs(5);
/// A link that was up for this long starts again at the first back-off.
const STABLE: Duration = Duration::from_secs(10);

/// The two members of a link, the attention member first.
type Pair = [Session; 2];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Told to open its half.
    Opening,
    /// Has all that it needs to use the link.
    Up,
    /// Told to fence its half.
    Closing,
    /// Has fenced its half.
    Down,
}

#[derive(Debug)]
struct Link {
    pair: Pair,
    phases: [Phase; 2],
    relayed: [u8; 2],
    failures: u32,
    /// By when the link must be up, or fenced on both ends.
    deadline: Option<Instant>,
    up_since: Option<Instant>,
}

impl Link {
    fn end(&self, session: Session) -> Option<usize> {
        self.pair.iter().position(|end| *end == session)
    }
}

/// A pair whose link is to be opened again.
#[derive(Debug)]
pub(super) struct Retry {
    pub(super) pair: Pair,
    pub(super) failures: u32,
    at: Instant,
}

/// What a tick found.
#[derive(Debug, Default)]
pub(super) struct Due {
    pub(super) retries: Vec<Retry>,
    /// Members that did not fence their end of a link in time, and why they are lost.
    pub(super) silent: Vec<(Session, String)>,
}

/// Every link, by incarnation.
#[derive(Debug, Default)]
pub(super) struct Links {
    last_incarnation: u32,
    live: BTreeMap<u32, Link>,
    waiting: Vec<Retry>,
    up: usize,
    pub(super) alarm: Alarm,
}

impl Links {
    /// Links that both ends can use.
    pub(super) fn up(&self) -> usize {
        self.up
    }

    /// Links of `session` that both ends can use.
    pub(super) fn up_of(&self, session: Session) -> u32 {
        let links = self.live.values().filter(|link| link.up_since.is_some() && link.end(session).is_some());
        links.count() as u32
    }

    /// Introduces two members to each other under a fresh incarnation and secret.
    pub(super) fn open(
        &mut self,
        ends: [(Session, &Peer); 2],
        failures: u32,
        options: &SchedulerOptions,
        secrets: &mut SecretSource,
        now: Instant,
        out: &mut Outbox,
    ) {
        let [(attention, attention_peer), (ffn, ffn_peer)] = ends;
        let pair = [attention, ffn];
        let incarnation = self.last_incarnation.checked_add(1).ok_or_else(|| "all incarnations are used up".to_owned());
        let (incarnation, secret) = match incarnation.and_then(|incarnation| Ok((incarnation, secrets()?))) {
            Ok(fresh) => fresh,
            Err(reason) => {
                out.note(Event::LinkDelayed { reason });
                return self.retry(pair, failures, now);
            }
        };
        self.last_incarnation = incarnation;
        let deadline = now + options.link_timeout;
        self.alarm.at_latest(deadline);
        let link = Link {
            pair,
            phases: [Phase::Opening; 2],
            relayed: [0; 2],
            failures,
            deadline: Some(deadline),
            up_since: None,
        };
        self.live.insert(incarnation, link);
        for (session, peer) in [(attention, ffn_peer), (ffn, attention_peer)] {
            let open = OpenLink { peer: Some(peer.clone()), incarnation, secret: secret.to_vec() };
            out.send(session, Body::OpenLink(open));
        }
    }

    fn retry(&mut self, pair: Pair, failures: u32, now: Instant) {
        let at = now + FIRST_BACKOFF.saturating_mul(1 << failures.min(16)).min(LAST_BACKOFF);
        self.alarm.at_latest(at);
        self.waiting.push(Retry { pair, failures: failures.saturating_add(1), at });
    }

    pub(super) fn offer(&mut self, session: Session, offer: LinkOffer, out: &mut Outbox) -> Result<(), Violation> {
        check_descriptor(offer.incarnation, &offer.descriptor)?;
        self.relay(session, offer.incarnation, Body::LinkOffer(offer), out)
    }

    pub(super) fn grants(&mut self, session: Session, grants: LinkGrants, out: &mut Outbox) -> Result<(), Violation> {
        let LinkGrants { incarnation, descriptors } = &grants;
        if descriptors.len() > MAX_GRANTS {
            let granted = descriptors.len();
            return violation(format!("{granted} regions granted over link {incarnation}: at most {MAX_GRANTS}"));
        }
        descriptors.iter().try_for_each(|descriptor| check_descriptor(*incarnation, descriptor))?;
        self.relay(session, *incarnation, Body::LinkGrants(grants), out)
    }

    fn relay(&mut self, session: Session, incarnation: u32, body: Body, out: &mut Outbox) -> Result<(), Violation> {
        let Some((link, end)) = find(&mut self.live, self.last_incarnation, session, incarnation)? else {
            return Ok(());
        };
        link.relayed[end] = link.relayed[end].saturating_add(1);
        if link.relayed[end] > MAX_RELAYED {
            return violation(format!("more than {MAX_RELAYED} offers and grants over link {incarnation}"));
        }
        if link.phases.iter().all(|phase| matches!(phase, Phase::Opening | Phase::Up)) {
            out.send(link.pair[1 - end], body);
        }
        Ok(())
    }

    /// One end can use the link.
    pub(super) fn ready(&mut self, session: Session, incarnation: u32, now: Instant) -> Result<(), Violation> {
        let Some((link, end)) = find(&mut self.live, self.last_incarnation, session, incarnation)? else {
            return Ok(());
        };
        if link.phases[end] == Phase::Opening {
            link.phases[end] = Phase::Up;
            if link.phases == [Phase::Up; 2] {
                link.deadline = None;
                link.up_since = Some(now);
                self.up += 1;
            }
        }
        Ok(())
    }

    /// One end is fenced: fence the other, or open the link anew when both are.
    pub(super) fn fenced(
        &mut self,
        session: Session,
        down: LinkDown,
        options: &SchedulerOptions,
        now: Instant,
        out: &mut Outbox,
    ) -> Result<(), Violation> {
        let LinkDown { incarnation, reason } = down;
        let reason = clip(reason, MAX_REASON_BYTES);
        let Some((link, end)) = find(&mut self.live, self.last_incarnation, session, incarnation)? else {
            return Ok(());
        };
        link.phases[end] = Phase::Down;
        if let Some(since) = link.up_since.take() {
            if now.saturating_duration_since(since) >= STABLE {
                link.failures = 0;
            }
            self.up -= 1;
        }
        let other = 1 - end;
        match link.phases[other] {
            Phase::Opening | Phase::Up => {
                link.phases[other] = Phase::Closing;
                let deadline = now + options.link_timeout;
                link.deadline = Some(deadline);
                out.send(link.pair[other], Body::CloseLink(CloseLink { incarnation, reason: reason.clone() }));
                out.note(Event::LinkDown { incarnation, reason });
                self.alarm.at_latest(deadline);
            }
            Phase::Closing => {}
            Phase::Down => {
                let (pair, failures) = (link.pair, link.failures);
                self.live.remove(&incarnation);
                self.retry(pair, failures, now);
            }
        }
        Ok(())
    }

    /// A member is gone, and its links with it.
    pub(super) fn lose(&mut self, session: Session) {
        self.live.retain(|_, link| link.end(session).is_none());
        self.waiting.retain(|retry| !retry.pair.contains(&session));
        self.up = self.live.values().filter(|link| link.up_since.is_some()).count();
    }

    /// Links that are to be opened again, and those that did not come up or were not fenced in time.
    pub(super) fn tick(&mut self, options: &SchedulerOptions, now: Instant, out: &mut Outbox) -> Due {
        let mut due = Due::default();
        if !self.alarm.rings(now) {
            return due;
        }
        due.retries = self.waiting.extract_if(.., |retry| retry.at <= now).collect();
        for (&incarnation, link) in &mut self.live {
            if link.deadline.is_none_or(|deadline| deadline > now) {
                continue;
            }
            let timeout = options.link_timeout;
            link.deadline = Some(now + timeout);
            if link.phases.iter().any(|phase| matches!(phase, Phase::Closing | Phase::Down)) {
                let silent = (0..2).filter(|end| link.phases[*end] == Phase::Closing);
                due.silent.extend(silent.map(|end| {
                    (link.pair[end], format!("it did not fence its end of link {incarnation} within {timeout:?}"))
                }));
            } else {
                let reason = format!("it was not up within {timeout:?}");
                link.phases = [Phase::Closing; 2];
                for session in link.pair {
                    out.send(session, Body::CloseLink(CloseLink { incarnation, reason: reason.clone() }));
                }
                out.note(Event::LinkDown { incarnation, reason });
            }
        }
        let deadlines = self.live.values().filter_map(|link| link.deadline);
        deadlines.chain(self.waiting.iter().map(|retry| retry.at)).for_each(|at| self.alarm.at_latest(at));
        due
    }

    /// The incarnations in use with their two members, for tests.
    #[cfg(test)]
    pub(super) fn live(&self) -> impl Iterator<Item = (u32, Pair)> {
        self.live.iter().map(|(incarnation, link)| (*incarnation, link.pair))
    }
}

/// The link of that incarnation and the sender's end of it; `None` when it is over, which the sender cannot know.
fn find(
    live: &mut BTreeMap<u32, Link>,
    last_incarnation: u32,
    session: Session,
    incarnation: u32,
) -> Result<Option<(&mut Link, usize)>, Violation> {
    if incarnation == 0 || incarnation > last_incarnation {
        return violation(format!("link {incarnation} was never opened"));
    }
    let Some(link) = live.get_mut(&incarnation) else { return Ok(None) };
    match link.end(session) {
        Some(end) => Ok(Some((link, end))),
        None => violation(format!("link {incarnation} is between two other members")),
    }
}

fn check_descriptor(incarnation: u32, descriptor: &[u8]) -> Result<(), Violation> {
    if descriptor.len() > MAX_DESCRIPTOR_BYTES {
        let bytes = descriptor.len();
        return violation(format!(
            "a descriptor of {bytes} bytes for link {incarnation}: at most {MAX_DESCRIPTOR_BYTES}"
        ));
    }
    Ok(())
}
