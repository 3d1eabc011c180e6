//! Questions for the attention instances' figures, and the answers gathered so far.

use super::action::{Action, Outbox, Session, StatsId, Violation, violation};
use super::alarm::Alarm;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;
use stepmesh_proto::control::{MemberStats, ReportStats, StatsReply, to_member::Body};

#[derive(Debug)]
struct Question {
    waiting: BTreeSet<Session>,
    replies: Vec<MemberStats>,
    deadline: Instant,
}

/// The questions that are not answered yet.
#[derive(Debug, Default)]
pub(super) struct Stats {
    last: u64,
    open: BTreeMap<u64, Question>,
    pub(super) alarm: Alarm,
}

impl Stats {
    /// Asks the attention members; the answer comes when all have replied, or at the deadline with those that have.
    pub(super) fn ask(
        &mut self,
        members: BTreeSet<Session>,
        reset: bool,
        deadline: Instant,
        out: &mut Outbox,
    ) -> StatsId {
        self.last += 1;
        let request = self.last;
        for session in &members {
            out.send(*session, Body::ReportStats(ReportStats { request, reset }));
        }
        self.open.insert(request, Question { waiting: members, replies: Vec::new(), deadline });
        self.alarm.at_latest(deadline);
        self.settle(request, out);
        StatsId(request)
    }

    /// A member's figures.
    pub(super) fn reply(
        &mut self,
        session: Session,
        rank: u32,
        mut stats: MemberStats,
        out: &mut Outbox,
    ) -> Result<(), Violation> {
        let request = stats.request;
        if request == 0 || request > self.last {
            return violation(format!("figures for question {request}, which was never asked"));
        }
        if let Some(question) = self.open.get_mut(&request)
            && question.waiting.remove(&session)
        {
            stats.attention_rank = rank;
            question.replies.push(stats);
            self.settle(request, out);
        }
        Ok(())
    }

    /// A member is gone; nobody waits for its figures.
    pub(super) fn lose(&mut self, session: Session, out: &mut Outbox) {
        let asked: Vec<_> =
            self.open.iter_mut().filter_map(|(id, q)| q.waiting.remove(&session).then_some(*id)).collect();
        asked.into_iter().for_each(|request| self.settle(request, out));
    }

    /// Answers what has waited long enough.
    pub(super) fn tick(&mut self, now: Instant, out: &mut Outbox) {
        if self.alarm.rings(now) {
            for question in self.open.values_mut().filter(|question| question.deadline <= now) {
                question.waiting.clear();
            }
            let open: Vec<_> = self.open.keys().copied().collect();
            open.into_iter().for_each(|request| self.settle(request, out));
            self.open.values().for_each(|question| self.alarm.at_latest(question.deadline));
        }
    }

    fn settle(&mut self, request: u64, out: &mut Outbox) {
        let settled = |question: &Question| question.waiting.is_empty();
        if self.open.get(&request).is_some_and(settled)
            && let Some(Question { replies: mut members, .. }) = self.open.remove(&request)
        {
            members.sort_by_key(|stats| stats.attention_rank);
            out.push(Action::Answer { request: StatsId(request), reply: StatsReply { members } });
        }
    }
}
