//! Sequences in flight: where each one runs, and who may speak for it.

use super::action::{Action, Outbox, SequenceId, Session, Violation, clip, violation};
use std::collections::BTreeMap;
use stepmesh_proto::control::{
    CancelSequence, Failed, GenerateRequest, SequenceEvent, StartSequence, failed, sequence_event::Body as Progress,
    to_member::Body,
};
use thiserror::Error;

/// The longest message of a failure that is passed on, in bytes.
const MAX_MESSAGE_BYTES: usize = 4096;

/// Why a prompt is not decoded.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum GenerateRefusal {
    /// Ranks are missing or links are down.
    #[error(
        "the deployment is not complete: {attention} of {attention_expected} attention and {ffn} of {ffn_expected} \
         FFN instances have joined, {links} of {links_expected} links are up; try again when it is"
    )]
    NotReady {
        /// Attention instances that are there.
        attention: u32,
        /// Attention instances of a complete deployment.
        attention_expected: u32,
        /// FFN instances that are there.
        ffn: u32,
        /// FFN instances of a complete deployment.
        ffn_expected: u32,
        /// Links that are up.
        links: u64,
        /// Links of a complete deployment.
        links_expected: u64,
    },
    /// The request cannot be met by any deployment, or not by this one.
    #[error("{0}")]
    Invalid(String),
    /// Too many sequences are in flight.
    #[error("{0} sequences are in flight, which is the limit; try again later")]
    Overloaded(usize),
    /// The scheduler is being shut down.
    #[error("the scheduler is shutting down")]
    Draining,
}

/// The sequences in flight.
#[derive(Debug, Default)]
pub(super) struct Sequences {
    last: u64,
    live: BTreeMap<u64, Session>,
    load: BTreeMap<Session, u32>,
}

impl Sequences {
    pub(super) fn len(&self) -> usize {
        self.live.len()
    }

    /// Sequences that run on an attention member.
    pub(super) fn load(&self, session: Session) -> u32 {
        self.load.get(&session).copied().unwrap_or(0)
    }

    pub(super) fn start(&mut self, session: Session, request: GenerateRequest, out: &mut Outbox) -> SequenceId {
        self.last += 1;
        self.live.insert(self.last, session);
        *self.load.entry(session).or_default() += 1;
        out.send(session, Body::StartSequence(StartSequence { sequence: self.last, request: Some(request) }));
        SequenceId(self.last)
    }

    /// The client is gone: the member need not go on.
    pub(super) fn cancel(&mut self, sequence: SequenceId, out: &mut Outbox) {
        if let Some(session) = self.finish(sequence.0) {
            out.send(session, Body::CancelSequence(CancelSequence { sequence: sequence.0 }));
        }
    }

    /// A member reports on a sequence.
    pub(super) fn report(&mut self, session: Session, event: SequenceEvent, out: &mut Outbox) -> Result<(), Violation> {
        let SequenceEvent { sequence, body } = event;
        if sequence == 0 || sequence > self.last {
            return violation(format!("sequence {sequence} was never started"));
        }
        let Some(mut event) = body else { return violation(format!("nothing said about sequence {sequence}")) };
        match self.live.get(&sequence) {
            None => return Ok(()), // cancelled; the member could not know
            Some(owner) if *owner != session => return violation(format!("sequence {sequence} runs elsewhere")),
            Some(_) => {}
        }
        if let Progress::Failed(failed) = &mut event {
            failed.message = clip(std::mem::take(&mut failed.message), MAX_MESSAGE_BYTES);
        }
        if matches!(event, Progress::Finished(_) | Progress::Failed(_)) {
            self.finish(sequence);
        }
        out.push(Action::Deliver { sequence: SequenceId(sequence), event });
        Ok(())
    }

    /// An attention member is gone: its sequences fail, for this reason.
    pub(super) fn lose(&mut self, session: Session, reason: &str, out: &mut Outbox) {
        self.load.remove(&session);
        self.live.retain(|sequence, owner| {
            let lost = *owner == session;
            if lost {
                let failed = Failed { kind: failed::Kind::PeerLost.into(), message: reason.to_owned() };
                out.push(Action::Deliver { sequence: SequenceId(*sequence), event: Progress::Failed(failed) });
            }
            !lost
        });
    }

    fn finish(&mut self, sequence: u64) -> Option<Session> {
        let session = self.live.remove(&sequence)?;
        if let Some(load) = self.load.get_mut(&session) {
            *load = load.saturating_sub(1);
        }
        Some(session)
    }
}
