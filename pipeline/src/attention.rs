//! The attention daemon's loop: `M` microbatches in turn through attention, the wire, and the FFN instances.

mod compute;
mod finish;
mod gpu;
mod host;
mod sequences;

use crate::figures::Figures;
use crate::layout::{EXPERT_IDS, EXPERT_WEIGHTS, HIDDEN, SCALES, StageTag};
use crate::microbatch::{Microbatch, Phase};
use crate::options::Notice;
use crate::sequence::{Admitted, Outbox, Sequence, deal};
use crate::wire::Wire;
use crate::{DaemonError, Step};
use compute::Compute;
use gpu::GpuCompute;
use host::HostCompute;
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use stepmesh_mesh::{AttentionMesh, MeshError, Request, Ticket, TicketFailure, TicketStatus};
use stepmesh_model::cuda::CudaAttention;
use stepmesh_model::{AttentionStage, Row};
use stepmesh_proto::control::failed::Kind;
use stepmesh_proto::{Dtype as WireElement, Part};

/// An attention stage, and where hidden states pass between it and its slots.
pub enum AttentionSide {
    /// Through host slices.
    Host(Box<dyn AttentionStage>),
    /// The GPU computes in the slots themselves: the mesh's device is [`beside`](stepmesh_transport::cuda::beside) it, and partial
    /// sums travel as its activations are.
    Gpu(Box<CudaAttention>),
}

/// An attention instance at work.
pub struct AttentionExecutor {
    mesh: AttentionMesh,
    compute: Box<dyn Compute>,
    kv_tokens: usize,
    wire: Wire,
    max_rows: usize,
    microbatches: Vec<Microbatch>,
    queue: VecDeque<Admitted>,
    queue_limit: usize,
    turn: usize,
    logits: Vec<f32>,
    dealt: Vec<usize>,
    figures: Figures,
    outbox: Outbox,
    unlinked_since: Option<Instant>,
    patience: Duration,
    draining: bool,
}

impl AttentionExecutor {
    /// Joins a mesh, an attention stage and a KV cache of `kv_tokens` tokens.
    pub fn new(
        mesh: AttentionMesh,
        side: AttentionSide,
        wire: Wire,
        kv_tokens: usize,
        microbatches: u16,
        max_rows: u32,
        queue: usize,
    ) -> Result<Self, DaemonError> {
        let compute: Box<dyn Compute> = match side {
            AttentionSide::Host(stage) => Box::new(HostCompute::new(stage, wire, kv_tokens, microbatches)?),
            AttentionSide::Gpu(stage) => {
                Box::new(GpuCompute::new(*stage, wire, kv_tokens, microbatches, max_rows as usize)?)
            }
        };
        Ok(Self {
            wire,
            mesh,
            compute,
            kv_tokens,
            max_rows: max_rows as usize,
            microbatches: (0..microbatches).map(|_| Microbatch::new()).collect(),
            queue: VecDeque::new(),
            queue_limit: queue,
            turn: 0,
            logits: Vec::new(),
            dealt: Vec::new(),
            figures: Figures::default(),
            outbox: Outbox::default(),
            unlinked_since: None,
            patience: Duration::from_secs(10),
            draining: false,
        })
    }

    /// The mesh.
    pub fn mesh(&mut self) -> &mut AttentionMesh {
        &mut self.mesh
    }

    /// The next thing that whoever started the daemon should know.
    pub fn next_notice(&mut self) -> Option<Notice> {
        self.outbox.notices.pop_front()
    }

    /// The scheduler asked this daemon to go.
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Takes no more sequences; those that wait are refused, those that run go on.
    pub fn drain(&mut self) {
        self.draining = true;
        while let Some(waiting) = self.queue.pop_front() {
            self.outbox.fail(waiting.number, Kind::Overloaded, "this attention instance is shutting down");
        }
    }

    /// Whether no sequence runs or waits.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty()
            && self.microbatches.iter().all(|microbatch| microbatch.load() == 0 && microbatch.phase == Phase::Idle)
    }

    /// Gives up a microbatch's ticket, if one is outstanding: its sequences fail, and the FFN instances that have not
    /// replied are fenced off. True if there was one.
    pub fn cancel_microbatch(&mut self, microbatch: usize) -> bool {
        match self.microbatches.get(microbatch).map(|microbatch| microbatch.phase) {
            Some(Phase::Wait { ticket, .. }) => {
                self.mesh.cancel(ticket);
                true
            }
            _ => false,
        }
    }

    /// Makes progress: at most one unit of computation.
    pub fn poll(&mut self) -> Result<Step, DaemonError> {
        self.mesh.poll()?;
        self.take_events()?;
        self.watch_links();
        self.collect_replies()?;
        self.admit();
        let worked = self.work()?;
        self.send_events()?;
        Ok(match worked {
            true => Step::Worked,
            false if self.is_idle() => Step::Idle,
            false => Step::Stalled,
        })
    }

    /// Makes progress, and sleeps until something arrives or `timeout` has passed if there is nothing to do.
    pub fn run_once(&mut self, timeout: Duration) -> Result<Step, DaemonError> {
        let start_ns = self.mesh.clock().now_ns();
        let step = self.poll()?;
        if step != Step::Worked {
            let deadline = self.mesh.clock().after(timeout);
            let asleep_ns = self.mesh.clock().now_ns();
            self.mesh.sleep(deadline)?;
            if step == Step::Stalled {
                self.figures.stalled_ns += self.mesh.clock().now_ns().saturating_sub(asleep_ns);
            }
        }
        if step != Step::Idle {
            self.figures.busy_ns += self.mesh.clock().now_ns().saturating_sub(start_ns);
        }
        Ok(step)
    }

    /// Takes in the replies that are complete: the FFN half of a layer ends here.
    fn collect_replies(&mut self) -> Result<(), DaemonError> {
        for index in 0..self.microbatches.len() {
            let Phase::Wait { layer, ticket } = self.microbatches[index].phase else { continue };
            match self.mesh.status(ticket) {
                TicketStatus::Pending => {}
                TicketStatus::Ready => {
                    if let Err(reason) = self.combine(index, layer, ticket)? {
                        self.microbatches[index].phase = Phase::Compute { layer };
                        self.fail_microbatch(index, Kind::Internal, &reason);
                    }
                }
                TicketStatus::Failed(failure) => {
                    let _ = self.mesh.take(ticket);
                    let microbatch = &mut self.microbatches[index];
                    match failure {
                        // The link ended, not the peer: what was asked can be asked again on the next one.
                        TicketFailure::PeerLost { .. } => microbatch.phase = Phase::Push { layer },
                        TicketFailure::PeerFailed { .. } => {
                            microbatch.phase = Phase::Compute { layer };
                            self.fail_microbatch(index, Kind::Internal, &failure.to_string());
                        }
                        TicketFailure::Cancelled => {
                            microbatch.phase = Phase::Compute { layer };
                            self.fail_microbatch(index, Kind::Cancelled, "the microbatch's ticket was cancelled");
                        }
                    }
                }
                TicketStatus::Unknown => self.microbatches[index].phase = Phase::Push { layer },
            }
        }
        Ok(())
    }

    /// Adds the partial sums in rank order to the residual stream. The inner error is the peers' fault.
    fn combine(&mut self, index: usize, layer: usize, ticket: Ticket) -> Result<Result<(), String>, DaemonError> {
        let microbatch = &mut self.microbatches[index];
        let reply = self.mesh.take(ticket)?;
        (0..reply.ranks()).for_each(|rank| self.figures.record(reply.trace(rank)));
        let combined = self.compute.combine(index, microbatch.rows.len(), &reply)?;
        microbatch.phase = Phase::Compute { layer: layer + 1 };
        Ok(combined)
    }

    /// Computes and sends for the microbatch whose turn it is. False if there is none to compute for.
    fn work(&mut self) -> Result<bool, DaemonError> {
        let count = self.microbatches.len();
        let (mut worked, mut waits) = (false, false);
        for offset in 0..count {
            let index = (self.turn + offset) % count;
            if !worked && self.compute(index)? {
                self.turn = (index + 1) % count;
                worked = true;
            }
            waits |= self.end_unit(index)?;
            match self.microbatches[index].phase {
                Phase::Push { layer } => self.push(index, layer)?,
                Phase::Leave => self.leave(index)?,
                _ => {}
            }
        }
        Ok(worked || waits)
    }

    /// Begins a unit: the attention half of a layer, the end of a step, or the start of the next.
    fn compute(&mut self, index: usize) -> Result<bool, DaemonError> {
        match self.microbatches[index].phase {
            Phase::Compute { layer } if layer == self.compute.config().num_layers => self.begin_finish(index)?,
            // What is computed where it is sent from has to wait until that is free.
            Phase::Compute { .. } if self.compute.fills_slots() && self.mesh.acquire(index as u16).is_err() => {
                return Ok(false);
            }
            Phase::Compute { layer } => {
                let rows = &self.microbatches[index].rows;
                self.compute.attend(&self.mesh, index, layer, rows)?;
                self.microbatches[index].phase = Phase::Computing { layer };
            }
            Phase::Idle | Phase::Leave
                if !self.microbatches[index].joining.is_empty()
                    && self.mesh.is_linked()
                    && self.compute.is_over(index)? =>
            {
                self.start_step(index)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Goes on behind a unit that is over. True while one is not, and there is something to look at again.
    fn end_unit(&mut self, index: usize) -> Result<bool, DaemonError> {
        let Phase::Computing { layer } = self.microbatches[index].phase else { return Ok(false) };
        if !self.compute.is_over(index)? {
            return Ok(true);
        }
        if layer < self.compute.config().num_layers {
            self.microbatches[index].phase = Phase::Push { layer };
            return Ok(false);
        }
        self.finish_step(index)?;
        self.start_step(index)?;
        Ok(true)
    }

    /// Lets sequences join, deals out the step's rows and looks their tokens up. Without sequences the microbatch leaves.
    fn start_step(&mut self, index: usize) -> Result<(), DaemonError> {
        let microbatch = &mut self.microbatches[index];
        microbatch.sequences.append(&mut microbatch.joining);
        if microbatch.sequences.is_empty() {
            microbatch.phase = Phase::Leave;
            return Ok(());
        }
        microbatch.step += 1;
        self.figures.steps += 1;
        deal(microbatch.sequences.iter().map(Sequence::pending), self.max_rows, &mut self.dealt);
        microbatch.rows.clear();
        microbatch.counts.clear();
        let mut tokens = Vec::with_capacity(self.max_rows);
        for (sequence, &rows) in microbatch.sequences.iter().zip(&self.dealt) {
            let positions = sequence.done..sequence.done + rows;
            tokens.extend_from_slice(&sequence.tokens[positions.clone()]);
            microbatch.rows.extend(positions.map(|position| Row { sequence: sequence.cache, position }));
            microbatch.counts.push(rows);
        }
        self.compute.begin(index, &tokens, &microbatch.rows)?;
        microbatch.phase = Phase::Compute { layer: 0 };
        Ok(())
    }

    /// Tells the FFN instances not to wait for this microbatch: one that holds others' requests back for it would do so
    /// for ever. Stays in its phase while the slot or a link is not there.
    fn leave(&mut self, index: usize) -> Result<(), DaemonError> {
        match self.mesh.leave(index as u16) {
            Ok(()) => self.microbatches[index].phase = Phase::Idle,
            Err(MeshError::WouldBlock(_) | MeshError::NotLinked(_)) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Fills the slot and sends it. Stays in its phase while the slot or a link is not there.
    fn push(&mut self, index: usize, layer: usize) -> Result<(), DaemonError> {
        let microbatch = &mut self.microbatches[index];
        let mut buffer = match self.mesh.acquire(index as u16) {
            Ok(buffer) => buffer,
            Err(MeshError::WouldBlock(_) | MeshError::NotLinked(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let config = self.compute.config();
        let rows = microbatch.rows.len() as u32;
        let experts = self.wire.request_parts();
        let used = if config.is_moe(layer) { experts + 2 } else { experts };
        let part = |key, dtype, row_bytes: usize| Part { key, dtype, rows, row_bytes: row_bytes as u32, offset: 0 };
        let mut parts = [Part::default(); 4];
        let kinds = [(HIDDEN, self.wire.request_dtype()), (SCALES, WireElement::F32)];
        for ((to, (key, dtype)), row_bytes) in
            parts.iter_mut().zip(kinds).zip(self.wire.request_row_bytes(config.hidden_size))
        {
            *to = part(key, dtype, row_bytes);
        }
        parts[experts] = part(EXPERT_IDS, WireElement::U16, config.top_k * 2);
        parts[experts + 1] = part(EXPERT_WEIGHTS, WireElement::F32, config.top_k * 4);
        self.compute.fill(index, &mut buffer)?;
        let tag = StageTag { layer: layer as u32, step: microbatch.step, microbatch: index as u16 };
        let request = Request { group: layer as u32, app: tag.encode(), parts: &parts[..used], leave: false };
        match self.mesh.push_pull(buffer, request) {
            Ok(ticket) => microbatch.phase = Phase::Wait { layer, ticket },
            Err(MeshError::NotLinked(_)) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}
