//! An FFN stage between host slices: hidden states are decoded out of the slots, and partial sums encoded into them.

use super::compute::{Compute, is_request, say};
use crate::DaemonError;
use crate::wire::{HiddenRows, Wire};
use stepmesh_mesh::Batch;
use stepmesh_model::{FfnInput, FfnStage};

pub(super) struct HostCompute {
    stage: Box<dyn FfnStage>,
    wire: Wire,
    rows: Rows,
    done: Option<Batch>,
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

impl HostCompute {
    pub(super) fn new(stage: Box<dyn FfnStage>, wire: Wire) -> Self {
        Self { stage, wire, rows: Rows::default(), done: None }
    }
}

impl Compute for HostCompute {
    fn has_room(&self) -> bool {
        self.done.is_none()
    }

    fn begin(&mut self, mut batch: Batch) -> Result<(), DaemonError> {
        let Self { stage, wire, rows, done } = self;
        let layer = batch.group as usize;
        rows.decode(&mut batch, stage.as_ref(), *wire);
        if let Err(error) = rows.forward(layer, *wire, stage.as_mut()) {
            tracing::warn!(layer, %error, "a batch cannot be processed; trying its segments one by one");
            rows.forward_each(layer, *wire, stage.as_mut(), &mut batch);
        }
        rows.encode(&mut batch, stage.config().hidden_size, *wire)?;
        *done = Some(batch);
        Ok(())
    }

    fn end(&mut self) -> Result<Option<Batch>, DaemonError> {
        Ok(self.done.take())
    }

    fn is_busy(&self) -> bool {
        false
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
            if !is_request(segment, layer, config, wire) {
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
            say(segment, wire, rows, hidden)?;
        }
        Ok(())
    }
}
