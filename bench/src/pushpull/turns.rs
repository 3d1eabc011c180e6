//! Round trips driven by one thread, both members in turn: always the same instructions, for those who count them.

use super::deployment::Deployment;
use super::payload::{Ask, Payload, SLOTS};
use crate::BenchError;
use crate::transport::Mode;
use stepmesh_mesh::{Policy, Request, TicketStatus};
use stepmesh_transport::{DeviceOptions, Provider};

/// One attention instance and one FFN instance that answers at once, tensors in place.
pub struct Turns {
    deployment: Deployment,
    payload: Payload,
    next: u32,
}

impl Turns {
    /// Joins the two over a provider, for transfers of `batch` tokens.
    pub fn join(provider: Provider, batch: u32) -> Result<Self, BenchError> {
        let payload = Payload::new(batch);
        let deployment = Deployment::join(provider, &DeviceOptions::default(), [1, 1], &payload.layout(SLOTS)?)?;
        Ok(Self { deployment, payload, next: 0 })
    }

    /// Acquire, push and pull, next batch, respond, take.
    pub fn round(&mut self) -> Result<(), BenchError> {
        let (Some(attention), Some(ffn)) = (self.deployment.attention.first_mut(), self.deployment.ffn.first_mut())
        else {
            return Ok(());
        };
        let microbatch = (self.next % u32::from(SLOTS)) as u16;
        let buffer = attention.acquire(microbatch)?;
        let app = Ask::Reply(Mode::InPlace).encode();
        let request = Request { group: self.next, app, parts: self.payload.request(), leave: false };
        let ticket = attention.push_pull(buffer, request)?;
        loop {
            ffn.poll()?;
            if let Some(mut batch) = ffn.try_next_batch(Policy::All) {
                for segment in &mut batch.segments {
                    segment.set_reply(self.payload.reply())?;
                }
                ffn.respond(batch)?;
            }
            attention.poll()?;
            if attention.status(ticket) != TicketStatus::Pending {
                attention.take(ticket)?;
                self.next += 1;
                return Ok(());
            }
        }
    }
}
