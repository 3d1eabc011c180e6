//! What the progress thread publishes of its member: rank, completeness, links, events.

use super::progress::Turn;
use crate::member::Member;
use crate::sync::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use crate::{MeshError, MeshEvent};
use crossbeam_queue::SegQueue;
use std::sync::OnceLock;

const NONE: u32 = u32::MAX;

/// Written by the progress thread, read by the application's.
pub(super) struct Standing {
    rank: AtomicU32,
    peers: AtomicUsize,
    siblings: AtomicUsize,
    complete: AtomicBool,
    scheduler_lost: OnceLock<String>,
    events: SegQueue<MeshEvent>,
}

impl Standing {
    pub(super) fn new() -> Self {
        Self {
            rank: AtomicU32::new(NONE),
            peers: AtomicUsize::new(0),
            siblings: AtomicUsize::new(0),
            complete: AtomicBool::new(false),
            scheduler_lost: OnceLock::new(),
            events: SegQueue::new(),
        }
    }

    /// Without events nothing here changes.
    pub(super) fn publish(&self, member: &mut Member) -> Turn {
        if member.events.is_empty() {
            return Turn::Idle;
        }
        self.set(member.rank, [member.peers, member.siblings], member.complete);
        if let Some(reason) = &member.scheduler_lost {
            let _ = self.scheduler_lost.set(reason.clone());
        }
        while let Some(event) = member.events.pop_front() {
            self.events.push(event);
        }
        Turn::Produced
    }

    /// Who sees the rank, or completeness, sees the members, too.
    pub(super) fn set(&self, rank: Option<u32>, [peers, siblings]: [usize; 2], complete: bool) {
        self.peers.store(peers, Ordering::Relaxed);
        self.siblings.store(siblings, Ordering::Relaxed);
        self.rank.store(rank.unwrap_or(NONE), Ordering::Release);
        self.complete.store(complete, Ordering::Release);
    }

    pub(super) fn rank(&self) -> Option<u32> {
        Some(self.rank.load(Ordering::Acquire)).filter(|&rank| rank != NONE)
    }

    /// Members of the other side; zero before admission.
    pub(super) fn peers(&self) -> usize {
        self.peers.load(Ordering::Relaxed)
    }

    /// Members of this side; zero before admission.
    pub(super) fn siblings(&self) -> usize {
        self.siblings.load(Ordering::Relaxed)
    }

    pub(super) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    pub(super) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    pub(super) fn next_event(&self) -> Option<MeshEvent> {
        self.events.pop()
    }

    /// Whether waiting for completeness is over, one way or the other.
    pub(super) fn completed(&self) -> Option<Result<(), MeshError>> {
        if self.is_complete() {
            return Some(Ok(()));
        }
        self.scheduler_lost.get().map(|reason| Err(MeshError::SchedulerLost(reason.clone())))
    }
}
