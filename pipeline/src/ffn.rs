//! The FFN daemon's loop: the next batch, this shard's part of its layer, the replies.

use crate::layout::{HIDDEN, StageTag};
use crate::options::Notice;
use crate::wire::{HiddenRows, Wire};
use crate::{DaemonError, Step};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use stepmesh_mesh::{Batch, FfnMesh, MeshEvent, Policy, Segment};
use stepmesh_model::{FfnInput, FfnStage};
use stepmesh_proto::Part;
use stepmesh_proto::control::to_member;

/// An FFN instance at work.
pub struct FfnExecutor {
    mesh: FfnMesh,
    stage: Box<dyn FfnStage>,
    wire: Wire,
    policy: Policy,
    batch: Rows,
    notices: VecDeque<Notice>,
    draining: bool,
}

/// A batch's tensors, decoded from the wire; kept from batch to batch.
#[derive(Default)]
struct Rows {
    hidden: HiddenRows,
    /// `[rows, top_k]`.
    experts: Vec<u16>,
    /// `[rows, top_k]`.
    weights: Vec<f32>,
    /// `[rows, hidden]`.
    out: Vec<f32>,
    /// Rows of each segment; none for one that was refused.
    segments: Vec<Option<usize>>,
}

impl FfnExecutor {
    /// Joins a mesh and a shard of the model.
    pub fn new(mesh: FfnMesh, stage: Box<dyn FfnStage>, wire: Wire, policy: Policy) -> Self {
        Self { mesh, stage, wire, policy, batch: Rows::default(), notices: VecDeque::new(), draining: false }
    }

    /// The mesh.
    pub fn mesh(&mut self) -> &mut FfnMesh {
        &mut self.mesh
    }

    /// The next thing that whoever started the daemon should know.
    pub fn next_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    /// The scheduler asked this daemon to go.
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Makes progress: at most one batch.
    pub fn poll(&mut self) -> Result<Step, DaemonError> {
        self.mesh.poll()?;
        self.take_events()?;
        match self.mesh.try_next_batch(self.policy) {
            Some(batch) => {
                self.process(batch)?;
                Ok(Step::Worked)
            }
            None => Ok(Step::Idle),
        }
    }

    /// Makes progress, and sleeps until something arrives or `timeout` has passed if there is nothing to do.
    pub fn run_once(&mut self, timeout: Duration) -> Result<(), DaemonError> {
        if self.poll()? == Step::Worked {
            return Ok(());
        }
        let deadline: Instant = self.mesh.clock().after(timeout);
        if let Some(batch) = self.mesh.next_batch(self.policy, deadline - self.mesh.clock().now())? {
            self.process(batch)?;
        }
        self.take_events()
    }

    fn take_events(&mut self) -> Result<(), DaemonError> {
        while let Some(event) = self.mesh.next_event() {
            match event {
                MeshEvent::Epoch { epoch, complete: true } => self.notices.push_back(Notice::Ready { epoch }),
                MeshEvent::PeerLost { peer, reason } => {
                    self.notices.push_back(Notice::PeerLost(format!("{peer}: {reason}")));
                }
                MeshEvent::LinkDown { peer, reason } => {
                    self.notices.push_back(Notice::LinkDown(format!("{peer}: {reason}")));
                }
                MeshEvent::SchedulerLost(reason) => {
                    return Err(stepmesh_mesh::MeshError::SchedulerLost(reason).into());
                }
                MeshEvent::Control(to_member::Body::Drain(_)) => {
                    self.draining = true;
                    self.notices.push_back(Notice::Draining);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn process(&mut self, mut batch: Batch) -> Result<(), DaemonError> {
        let layer = batch.group as usize;
        self.batch.decode(&mut batch, self.stage.as_ref(), self.wire);
        if let Err(error) = self.batch.forward(layer, self.wire, self.stage.as_mut()) {
            tracing::warn!(layer, %error, "a batch cannot be processed; trying its segments one by one");
            self.batch.forward_each(layer, self.wire, self.stage.as_mut(), &mut batch);
        }
        self.batch.encode(&mut batch, self.stage.config().hidden_size, self.wire)?;
        Ok(self.mesh.respond(batch)?)
    }
}

impl Rows {
    /// Decodes what the attention instances sent. A segment that is not what the model's layer takes is refused, alone.
    fn decode(&mut self, batch: &mut Batch, stage: &dyn FfnStage, wire: Wire) {
        let config = stage.config();
        let layer = batch.group as usize;
        let moe = layer < config.num_layers && config.is_moe(layer);
        self.hidden.clear();
        self.experts.clear();
        self.weights.clear();
        self.segments.clear();
        let mut total = 0;
        for segment in &mut batch.segments {
            let top_k = if moe { config.top_k } else { 0 };
            if layer >= config.num_layers || !is_request(segment, layer, config.hidden_size, top_k, wire) {
                tracing::warn!(rank = segment.rank(), layer, "a request that does not fit the layer");
                segment.fail("bad request");
                self.segments.push(None);
                continue;
            }
            let rows = segment.rows();
            // Lengths were checked above.
            let _ = self.hidden.push(wire, config.hidden_size, segment);
            total += rows;
            if moe {
                let ids = segment.part(wire.request_parts()).as_chunks::<2>().0;
                self.experts.extend(ids.iter().map(|bytes| u16::from_le_bytes(*bytes)));
                let weights = segment.part(wire.request_parts() + 1).as_chunks::<4>().0;
                self.weights.extend(weights.iter().map(|bytes| f32::from_le_bytes(*bytes)));
            }
            self.segments.push(Some(rows));
        }
        self.out.clear();
        self.out.resize(total * config.hidden_size, 0.0);
    }

    fn forward(
        &mut self,
        layer: usize,
        wire: Wire,
        stage: &mut dyn FfnStage,
    ) -> Result<(), stepmesh_model::ModelError> {
        let (rows, hidden) = (self.segments.iter().flatten().sum(), stage.config().hidden_size);
        let hidden = self.hidden.rows(0..rows, wire, hidden);
        let input = FfnInput { hidden, experts: &self.experts, weights: &self.weights };
        if rows == 0 { Ok(()) } else { stage.forward(layer, &[input], &mut self.out) }
    }

    /// One segment at a time, so that a bad one harms no other.
    fn forward_each(&mut self, layer: usize, wire: Wire, stage: &mut dyn FfnStage, batch: &mut Batch) {
        let hidden = stage.config().hidden_size;
        let rows_before: usize = self.segments.iter().flatten().sum();
        let top_k = self.experts.len().checked_div(rows_before).unwrap_or(0);
        let mut row = 0;
        for (segment, rows) in batch.segments.iter_mut().zip(&mut self.segments) {
            let Some(count) = *rows else { continue };
            let (from, to) = (row, row + count);
            row = to;
            let input = FfnInput {
                hidden: self.hidden.rows(from..to, wire, hidden),
                experts: &self.experts[from * top_k..to * top_k],
                weights: &self.weights[from * top_k..to * top_k],
            };
            if let Err(error) = stage.forward(layer, &[input], &mut self.out[from * hidden..to * hidden]) {
                tracing::warn!(rank = segment.rank(), layer, %error, "a request that cannot be processed");
                segment.fail("bad values");
            }
        }
    }

    fn encode(&self, batch: &mut Batch, hidden: usize, wire: Wire) -> Result<(), DaemonError> {
        let mut start = 0;
        for (segment, rows) in batch.segments.iter_mut().zip(&self.segments) {
            let Some(rows) = *rows else { continue };
            let row_bytes = wire.reply().row_bytes(hidden);
            let values = &self.out[start..start + rows * hidden];
            start += rows * hidden;
            wire.reply().encode(values, &mut segment.reply_mut(0)[..rows * row_bytes])?;
            segment.set_reply(&[Part {
                key: HIDDEN,
                dtype: wire.reply_dtype(),
                rows: rows as u32,
                row_bytes: row_bytes as u32,
                offset: 0,
            }])?;
        }
        Ok(())
    }
}

/// Whether a segment's parts have the shapes and types that the layer takes, and room for a reply.
fn is_request(segment: &Segment, layer: usize, hidden: usize, top_k: usize, wire: Wire) -> bool {
    use stepmesh_proto::Dtype;
    let parts = segment.parts();
    let rows = segment.rows() as u32;
    let is = |index: usize, dtype: Dtype, row_bytes: usize| {
        parts
            .get(index)
            .is_some_and(|part| part.rows == rows && part.dtype == dtype && part.row_bytes as usize == row_bytes)
    };
    let experts = wire.request_parts();
    let kinds = [wire.request_dtype(), Dtype::F32];
    StageTag::decode(segment.app()).layer as usize == layer
        && wire.request_row_bytes(hidden).zip(kinds).enumerate().all(|(i, (bytes, dtype))| is(i, dtype, bytes))
        && (top_k == 0 || (is(experts, Dtype::U16, top_k * 2) && is(experts + 1, Dtype::F32, top_k * 4)))
}
