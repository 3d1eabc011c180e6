//! The attention daemon's loop: `M` microbatches in turn through attention, the wire, and the FFN instances.

mod finish;
mod sequences;

use crate::figures::Figures;
use crate::layout::{EXPERT_IDS, EXPERT_WEIGHTS, HIDDEN, SCALES, StageTag};
use crate::microbatch::{Microbatch, Phase};
use crate::options::Notice;
use crate::sequence::{Admitted, Outbox, Sequence, deal};
use crate::wire::{self, Wire};
use crate::{DaemonError, Step};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use stepmesh_mesh::{AttentionMesh, MeshError, Request, Ticket, TicketFailure, TicketStatus};
use stepmesh_model::{AttentionStage, KvCache, Row};
use stepmesh_proto::control::failed::Kind;
use stepmesh_proto::{Dtype as WireElement, Part};

/// An attention instance at work.
pub struct AttentionExecutor {
    mesh: AttentionMesh,
    stage: Box<dyn AttentionStage>,
    cache: KvCache,
    kv_tokens: usize,
    wire: Wire,
    scales: Vec<f32>,
    max_rows: usize,
    microbatches: Vec<Microbatch>,
    queue: VecDeque<Admitted>,
    queue_limit: usize,
    turn: usize,
    partials: Vec<Vec<f32>>,
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
        stage: Box<dyn AttentionStage>,
        wire: Wire,
        kv_tokens: usize,
        microbatches: u16,
        max_rows: u32,
        queue: usize,
    ) -> Result<Self, DaemonError> {
        let cache = stage.new_cache(kv_tokens)?;
        Ok(Self {
            wire,
            scales: Vec::new(),
            mesh,
            stage,
            cache,
            kv_tokens,
            max_rows: max_rows as usize,
            microbatches: (0..microbatches).map(|_| Microbatch::new()).collect(),
            queue: VecDeque::new(),
            queue_limit: queue,
            turn: 0,
            partials: Vec::new(),
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
        let ranks = reply.ranks();
        self.partials.resize_with(ranks, Vec::new);
        for rank in 0..ranks {
            self.figures.record(reply.trace(rank));
            let partial = &mut self.partials[rank];
            partial.resize(microbatch.x.len(), 0.0);
            if let Err(error) = self.wire.reply().decode(reply.part(rank, 0), partial) {
                return Ok(Err(format!("ffn {rank} replied with another shape: {error}")));
            }
        }
        let partials: Vec<&[f32]> = self.partials.iter().map(Vec::as_slice).collect();
        self.stage.combine(&mut microbatch.x, &partials)?;
        microbatch.phase = Phase::Compute { layer: layer + 1 };
        Ok(Ok(()))
    }

    /// Computes and sends for the microbatch whose turn it is. False if there is none to compute for.
    fn work(&mut self) -> Result<bool, DaemonError> {
        let count = self.microbatches.len();
        let mut worked = false;
        for offset in 0..count {
            let index = (self.turn + offset) % count;
            if !worked && self.compute(index)? {
                self.turn = (index + 1) % count;
                worked = true;
            }
            match self.microbatches[index].phase {
                Phase::Push { layer } => self.push(index, layer)?,
                Phase::Leave => self.leave(index)?,
                _ => {}
            }
        }
        Ok(worked)
    }

    /// One unit: the end of a step, the start of the next, or the attention half of a layer.
    fn compute(&mut self, index: usize) -> Result<bool, DaemonError> {
        match self.microbatches[index].phase {
            Phase::Compute { layer } if layer == self.stage.config().num_layers => {
                self.finish_step(index)?;
                self.start_step(index)?;
                Ok(true)
            }
            Phase::Compute { layer } => {
                self.attend(index, layer)?;
                Ok(true)
            }
            Phase::Idle | Phase::Leave if !self.microbatches[index].joining.is_empty() && self.mesh.is_linked() => {
                self.start_step(index)?;
                Ok(true)
            }
            _ => Ok(false),
        }
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
        microbatch.x.resize(tokens.len() * self.stage.config().hidden_size, 0.0);
        microbatch.y.resize(microbatch.x.len(), 0.0);
        self.stage.embed(&tokens, &mut microbatch.x)?;
        microbatch.phase = Phase::Compute { layer: 0 };
        Ok(())
    }

    /// The attention half of a layer, and the router.
    fn attend(&mut self, index: usize, layer: usize) -> Result<(), DaemonError> {
        let microbatch = &mut self.microbatches[index];
        let Microbatch { rows, x, y, experts, weights, .. } = microbatch;
        self.stage.attention(layer, rows, x, &mut self.cache, y)?;
        let top_k = if self.stage.config().is_moe(layer) { self.stage.config().top_k } else { 0 };
        experts.resize(rows.len() * top_k, 0);
        weights.resize(rows.len() * top_k, 0.0);
        if top_k > 0 {
            self.stage.route(layer, y, experts, weights)?;
        }
        microbatch.phase = Phase::Push { layer };
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
        let config = self.stage.config();
        let rows = microbatch.rows.len() as u32;
        wire::encode(self.wire, &microbatch.y, config.hidden_size, &mut self.scales, &mut buffer)?;
        let experts = self.wire.request_parts();
        for (bytes, id) in buffer.part_mut(experts).as_chunks_mut::<2>().0.iter_mut().zip(&microbatch.experts) {
            *bytes = id.to_le_bytes();
        }
        for (bytes, weight) in buffer.part_mut(experts + 1).as_chunks_mut::<4>().0.iter_mut().zip(&microbatch.weights) {
            *bytes = weight.to_le_bytes();
        }
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
        let used = if microbatch.experts.is_empty() { experts } else { experts + 2 };
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
