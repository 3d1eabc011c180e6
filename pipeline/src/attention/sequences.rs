//! How sequences come and go: requests from the scheduler, room in the cache, failures by name.

use super::AttentionExecutor;
use crate::DaemonError;
use crate::microbatch::Phase;
use crate::options::Notice;
use crate::sequence::{Sequence, admit};
use stepmesh_mesh::{MeshError, MeshEvent, Role};
use stepmesh_model::ModelError;
use stepmesh_proto::control::{self, failed::Kind, from_member, to_member};

impl AttentionExecutor {
    pub(super) fn take_events(&mut self) -> Result<(), DaemonError> {
        while let Some(event) = self.mesh.next_event() {
            match event {
                MeshEvent::Epoch { epoch, complete: true } => self.outbox.notices.push_back(Notice::Ready { epoch }),
                MeshEvent::PeerLost { peer, reason } => {
                    if peer.role == Role::Ffn {
                        self.fail_all(Kind::PeerLost, &format!("lost {peer}: {reason}"));
                    }
                    self.outbox.notices.push_back(Notice::PeerLost(format!("{peer}: {reason}")));
                }
                MeshEvent::LinkDown { peer, reason } => {
                    self.outbox.notices.push_back(Notice::LinkDown(format!("{peer}: {reason}")));
                }
                MeshEvent::SchedulerLost(reason) => return Err(MeshError::SchedulerLost(reason).into()),
                MeshEvent::Control(body) => self.take_control(body)?,
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn take_control(&mut self, body: to_member::Body) -> Result<(), DaemonError> {
        match body {
            to_member::Body::StartSequence(start) => {
                let Some(request) = start.request else { return Ok(()) };
                if self.draining {
                    self.outbox.fail(start.sequence, Kind::Overloaded, "this attention instance is shutting down");
                    return Ok(());
                }
                match admit(start.sequence, request, self.compute.config(), self.kv_tokens) {
                    Err(reason) => self.outbox.fail(start.sequence, Kind::Invalid, reason),
                    Ok(_) if self.queue.len() >= self.queue_limit => {
                        let message = format!("{} sequences wait already: try again later", self.queue.len());
                        self.outbox.fail(start.sequence, Kind::Overloaded, message);
                    }
                    Ok(admitted) => self.queue.push_back(admitted),
                }
            }
            to_member::Body::CancelSequence(cancel) => {
                self.queue.retain(|waiting| waiting.number != cancel.sequence);
                for sequence in self.microbatches.iter_mut().flat_map(|m| m.sequences.iter_mut().chain(&mut m.joining))
                {
                    sequence.cancelled |= sequence.number == cancel.sequence;
                }
            }
            to_member::Body::ReportStats(report) => {
                let stats = self.figures.report(report.request, self.mesh.rank().unwrap_or_default());
                if report.reset {
                    self.figures.reset();
                }
                self.mesh.send_control(from_member::Body::Stats(stats))?;
            }
            to_member::Body::Drain(_) => {
                self.drain();
                self.outbox.notices.push_back(Notice::Draining);
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn send_events(&mut self) -> Result<(), DaemonError> {
        while let Some((sequence, body)) = self.outbox.events.pop_front() {
            let event = control::SequenceEvent { sequence, body: Some(body) };
            self.mesh.send_control(from_member::Body::SequenceEvent(event))?;
        }
        Ok(())
    }

    /// A link that is away may come back; one that stays away fails what waits for it.
    pub(super) fn watch_links(&mut self) {
        if self.is_idle() || self.mesh.is_linked() {
            self.unlinked_since = None;
            return;
        }
        let now = self.mesh.clock().now();
        let since = *self.unlinked_since.get_or_insert(now);
        if now.saturating_duration_since(since) > self.patience {
            self.unlinked_since = None;
            let why = self.mesh.acquire(0).err().map_or_else(String::new, |error| error.to_string());
            self.fail_all(Kind::PeerLost, &format!("{why} for {:?}", self.patience));
        }
    }

    /// Moves waiting requests into the microbatches while the cache has room.
    pub(super) fn admit(&mut self) {
        while let Some(waiting) = self.queue.front() {
            let Some(index) = (0..self.microbatches.len())
                .min_by_key(|&index| self.microbatches[index].load())
                .filter(|&index| self.microbatches[index].load() < self.max_rows)
            else {
                return;
            };
            match self.compute.cache().reserve(waiting.length()) {
                Ok(cache) => {
                    let Some(admitted) = self.queue.pop_front() else { return };
                    let now_ns = self.mesh.clock().now_ns();
                    self.microbatches[index].joining.push(Sequence::new(admitted, cache, now_ns));
                }
                Err(ModelError::CacheFull { .. }) => return,
                Err(error) => {
                    let Some(refused) = self.queue.pop_front() else { return };
                    self.outbox.fail(refused.number, Kind::Invalid, error.to_string());
                }
            }
        }
    }

    pub(super) fn fail_all(&mut self, kind: Kind, message: &str) {
        for index in 0..self.microbatches.len() {
            self.fail_microbatch(index, kind, message);
        }
        while let Some(waiting) = self.queue.pop_front() {
            self.outbox.fail(waiting.number, kind, message);
        }
    }

    /// Fails a microbatch's sequences. A ticket that is outstanding is given up; its links are gone or going.
    pub(super) fn fail_microbatch(&mut self, index: usize, kind: Kind, message: &str) {
        let microbatch = &mut self.microbatches[index];
        if let Phase::Wait { ticket, .. } = microbatch.phase {
            self.mesh.cancel(ticket);
            let _ = self.mesh.take(ticket);
        }
        for sequence in microbatch.sequences.drain(..).chain(microbatch.joining.drain(..)) {
            let _ = self.compute.cache().free(sequence.cache);
            self.outbox.fail(sequence.number, kind, message);
        }
        if microbatch.phase != Phase::Idle {
            microbatch.phase = Phase::Leave;
        }
    }
}
