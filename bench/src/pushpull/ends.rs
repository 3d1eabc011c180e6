//! The calls of one round, whoever drives the member.

use crate::BenchError;
use std::time::Duration;
use stepmesh_mesh::threaded::{AttentionEngine, FfnEngine};
use stepmesh_mesh::{AttentionMesh, Batch, FfnMesh, Policy, Replies, Request, SendBuffer, Ticket};

/// Longer than any round takes on any machine.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) trait AttentionEnd: Send {
    fn acquire(&mut self, microbatch: u16) -> Result<SendBuffer, BenchError>;
    fn push_pull(&mut self, buffer: SendBuffer, request: Request<'_>) -> Result<Ticket, BenchError>;
    /// Waits, and shows the replies.
    fn wait<T>(&mut self, ticket: Ticket, look: impl FnOnce(&Replies) -> T) -> Result<T, BenchError>;
}

impl AttentionEnd for AttentionMesh {
    fn acquire(&mut self, microbatch: u16) -> Result<SendBuffer, BenchError> {
        Ok(self.acquire(microbatch)?)
    }

    fn push_pull(&mut self, buffer: SendBuffer, request: Request<'_>) -> Result<Ticket, BenchError> {
        Ok(self.push_pull(buffer, request)?)
    }

    fn wait<T>(&mut self, ticket: Ticket, look: impl FnOnce(&Replies) -> T) -> Result<T, BenchError> {
        Ok(look(&*self.wait(ticket, PATIENCE)?))
    }
}

impl AttentionEnd for AttentionEngine {
    fn acquire(&mut self, microbatch: u16) -> Result<SendBuffer, BenchError> {
        Ok(self.acquire(microbatch)?)
    }

    fn push_pull(&mut self, buffer: SendBuffer, request: Request<'_>) -> Result<Ticket, BenchError> {
        Ok(self.push_pull(buffer, request)?)
    }

    fn wait<T>(&mut self, ticket: Ticket, look: impl FnOnce(&Replies) -> T) -> Result<T, BenchError> {
        Ok(look(&*self.wait(ticket, PATIENCE)?))
    }
}

pub(super) trait FfnEnd: Send {
    /// The next batch; none after `timeout`.
    fn next_batch(&mut self, timeout: Duration) -> Result<Option<Batch>, BenchError>;
    fn respond(&mut self, batch: Batch) -> Result<(), BenchError>;
    /// Nobody reads events here; none must heap up, or end a wait early.
    fn forget_events(&mut self);
}

impl FfnEnd for FfnMesh {
    fn next_batch(&mut self, timeout: Duration) -> Result<Option<Batch>, BenchError> {
        Ok(self.next_batch(Policy::All, timeout)?)
    }

    fn respond(&mut self, batch: Batch) -> Result<(), BenchError> {
        Ok(self.respond(batch)?)
    }

    fn forget_events(&mut self) {
        while self.next_event().is_some() {}
    }
}

impl FfnEnd for FfnEngine {
    fn next_batch(&mut self, timeout: Duration) -> Result<Option<Batch>, BenchError> {
        Ok(self.next_batch(Policy::All, timeout)?)
    }

    fn respond(&mut self, batch: Batch) -> Result<(), BenchError> {
        Ok(self.respond(batch)?)
    }

    fn forget_events(&mut self) {
        while self.next_event().is_some() {}
    }
}
