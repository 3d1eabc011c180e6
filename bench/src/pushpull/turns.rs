//! Round trips driven by one thread, all members in turn: always the same instructions, for those who count them.

use super::deployment::Deployment;
use super::payload::{Ask, Payload, SLOTS};
use crate::BenchError;
use crate::transport::Mode;
use stepmesh_mesh::{Policy, Request, Ticket, TicketStatus};
use stepmesh_transport::mem::{Fabric, FabricOptions};
use stepmesh_transport::{DeviceOptions, Provider};

/// Attention and FFN instances that answer at once, tensors in place.
pub struct Turns {
    deployment: Deployment,
    fabric: Option<Fabric>,
    payload: Payload,
    tickets: Vec<Option<Ticket>>,
    next: u32,
}

impl Turns {
    /// Joins so many attention and FFN instances over a provider, for transfers of `batch` tokens; over `mem` by a network
    /// that takes no time.
    pub fn join(provider: Provider, members: [u32; 2], batch: u32) -> Result<Self, BenchError> {
        let payload = Payload::new(batch);
        let layout = payload.layout(SLOTS)?;
        let fabric = (provider == Provider::Mem).then(|| {
            let at_once = Default::default()..Default::default();
            Fabric::new(FabricOptions { latency: at_once, maps_peer_memory: true, ..FabricOptions::default() })
        });
        let deployment = match &fabric {
            Some(fabric) => Deployment::simulated(fabric, members, &layout)?,
            None => Deployment::join(provider, &DeviceOptions::default(), members, &layout)?,
        };
        let tickets = vec![None; members[0] as usize];
        Ok(Self { deployment, fabric, payload, tickets, next: 0 })
    }

    /// Transfers of a round: every attention instance's to every FFN instance.
    pub fn transfers(&self) -> usize {
        self.deployment.attention.len() * self.deployment.ffn.len()
    }

    /// Acquire, push and pull, next batch, respond, take: of every attention instance once.
    pub fn round(&mut self) -> Result<(), BenchError> {
        let Deployment { attention, ffn } = &mut self.deployment;
        let microbatch = (self.next % u32::from(SLOTS)) as u16;
        for (mesh, ticket) in attention.iter_mut().zip(&mut self.tickets) {
            let buffer = mesh.acquire(microbatch)?;
            let app = Ask::Reply(Mode::InPlace).encode();
            let request = Request { group: self.next, app, parts: self.payload.request(), leave: false };
            *ticket = Some(mesh.push_pull(buffer, request)?);
        }
        self.next += 1;
        let mut open = attention.len();
        while open > 0 {
            deliver(&self.fabric);
            for mesh in &mut *ffn {
                mesh.poll()?;
                while let Some(mut batch) = mesh.try_next_batch(Policy::All) {
                    for segment in &mut batch.segments {
                        segment.set_reply(self.payload.reply())?;
                    }
                    mesh.respond(batch)?;
                }
            }
            deliver(&self.fabric);
            for (mesh, ticket) in attention.iter_mut().zip(&mut self.tickets) {
                let Some(pending) = *ticket else { continue };
                mesh.poll()?;
                if mesh.status(pending) != TicketStatus::Pending {
                    mesh.take(pending)?;
                    *ticket = None;
                    open -= 1;
                }
            }
        }
        Ok(())
    }
}

/// Lets everything that is under way arrive.
fn deliver(fabric: &Option<Fabric>) {
    while fabric.as_ref().is_some_and(Fabric::advance_to_next) {}
}
