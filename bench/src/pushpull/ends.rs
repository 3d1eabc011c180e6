//! The calls of one round, whoever drives the member.

use crate::BenchError;
use std::time::{Duration, Instant};
use stepmesh_mesh::threaded::{AttentionEngine, FfnEngine};
use stepmesh_mesh::{AttentionMesh, Batch, FfnMesh, Policy, Replies, Request, SendBuffer, Ticket, TicketStatus};

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

/// A member whose caller waits a moment at a time, and in between leaves its CPU to whoever else wants it.
pub(super) struct GivesWay<M>(pub(super) M);

/// The moment.
const GLANCE: Duration = Duration::from_micros(4);

impl AttentionEnd for GivesWay<AttentionMesh> {
    fn acquire(&mut self, microbatch: u16) -> Result<SendBuffer, BenchError> {
        Ok(self.0.acquire(microbatch)?)
    }

    fn push_pull(&mut self, buffer: SendBuffer, request: Request<'_>) -> Result<Ticket, BenchError> {
        Ok(self.0.push_pull(buffer, request)?)
    }

    fn wait<T>(&mut self, ticket: Ticket, look: impl FnOnce(&Replies) -> T) -> Result<T, BenchError> {
        let start = Instant::now();
        self.0.poll()?;
        while self.0.status(ticket) == TicketStatus::Pending && start.elapsed() < PATIENCE {
            self.0.sleep(Instant::now() + GLANCE)?;
            std::thread::yield_now();
            self.0.poll()?;
        }
        Ok(look(&*self.0.wait(ticket, Duration::ZERO)?))
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

impl FfnEnd for GivesWay<FfnMesh> {
    fn next_batch(&mut self, timeout: Duration) -> Result<Option<Batch>, BenchError> {
        let start = Instant::now();
        loop {
            let batch = self.0.next_batch(Policy::All, GLANCE)?;
            if batch.is_some() || start.elapsed() >= timeout {
                return Ok(batch);
            }
            self.forget_events();
            std::thread::yield_now();
        }
    }

    fn respond(&mut self, batch: Batch) -> Result<(), BenchError> {
        Ok(self.0.respond(batch)?)
    }

    fn forget_events(&mut self) {
        self.0.forget_events();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pushpull::deployment::Deployment;
    use crate::pushpull::ffn::serve;
    use crate::pushpull::payload::{Ask, Payload};
    use crate::transport::Mode;
    use std::sync::atomic::{AtomicBool, Ordering};
    use stepmesh_transport::{DeviceOptions, Provider};

    #[test]
    fn ends_that_give_way_play_rounds_and_wait_no_longer_than_they_are_to() {
        let payload = Payload::new(1);
        let layout = payload.layout(1).expect("a layout");
        let deployment = Deployment::join(Provider::Shm, &DeviceOptions::default(), [1, 1], &layout).expect("members");
        let mut attention: Vec<_> = deployment.attention.into_iter().map(GivesWay).collect();
        let mut ffn: Vec<_> = deployment.ffn.into_iter().map(GivesWay).collect();
        assert!(ffn[0].next_batch(Duration::from_millis(1)).expect("a wait").is_none(), "nobody has asked");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let serving = scope.spawn(|| serve(&mut ffn, &payload, Duration::ZERO, || over.load(Ordering::Acquire)));
            for group in 0..10 {
                let buffer = attention[0].acquire(0).expect("the slot");
                let app = Ask::Reply(Mode::InPlace).encode();
                let request = Request { group, app, parts: payload.request(), leave: false };
                let ticket = attention[0].push_pull(buffer, request).expect("posted");
                assert_eq!(attention[0].wait(ticket, Replies::ranks).expect("a reply"), 1);
            }
            over.store(true, Ordering::Release);
            serving.join().expect("no panic").expect("served");
        });
    }
}
