//! An attention stage on a GPU. A layer's kernels are put on one stream and leave the hidden states, the experts and their weights
//! in the slot; a word behind them says when they are there. Replies are added up where they landed. The residual stream never
//! leaves the device.

use super::compute::Compute;
use crate::DaemonError;
use crate::gpu::{Points, Room, end, span};
use crate::wire::Wire;
use std::ops::Range;
use std::sync::Arc;
use stepmesh_mesh::{AttentionMesh, Replies, SendBuffer};
use stepmesh_model::cuda::{Batch, CudaAttention};
use stepmesh_model::{AttentionStage, KvCache, ModelConfig, Row};
use stepmesh_transport::cuda::{Context, PinnedMemory, Span, Stream};
use stepmesh_transport::{HostMemory, Region};

pub(super) struct GpuCompute {
    stage: CudaAttention,
    cache: KvCache,
    wire: Wire,
    stream: Stream,
    /// One a microbatch.
    points: Points,
    microbatches: Vec<Rows>,
    /// Hidden states that are quantised into the slot.
    plain: Room,
    /// Partial sums that landed in host memory.
    partials: Vec<Room>,
}

/// A microbatch's place on the device, for the most rows that it may have.
struct Rows {
    places: Batch,
    /// This step's rows, in `places`.
    batch: Batch,
    /// Tokens of the longest of its sequences.
    context: usize,
    tokens: Span,
    /// Residual stream `[rows, hidden]`.
    x: Span,
    /// The parts of a request, where the slot is host memory.
    parts: Vec<Room>,
    logits: Room,
    /// The same, pinned for the CPU, and the row that they begin with.
    results: Option<Region>,
    first: usize,
}

impl GpuCompute {
    pub(super) fn new(
        mut stage: CudaAttention,
        wire: Wire,
        kv_tokens: usize,
        microbatches: u16,
        max_rows: usize,
    ) -> Result<Self, DaemonError> {
        let cache = stage.new_cache(kv_tokens)?;
        let context = stage.config().context_length.min(kv_tokens);
        let row_bytes = stage.config().hidden_size * stage.element();
        let mut rows = || -> Result<Rows, DaemonError> {
            let places = stage.new_batch(max_rows, context)?;
            Ok(Rows {
                batch: places.within(0, context)?,
                places,
                context,
                tokens: stage.take(max_rows * 4)?,
                x: stage.take(max_rows * row_bytes)?,
                parts: (0..4).map(|_| Room::default()).collect(),
                logits: Room::default(),
                results: None,
                first: 0,
            })
        };
        let microbatches: Vec<Rows> = (0..microbatches).map(|_| rows()).collect::<Result<_, _>>()?;
        Ok(Self {
            stream: Stream::new(stage.context())?,
            points: Points::new(stage.context(), microbatches.len())?,
            stage,
            cache,
            wire,
            microbatches,
            plain: Room::default(),
            partials: Vec::new(),
        })
    }

    fn context(&self) -> Arc<Context> {
        self.stage.context().clone()
    }
}

impl Drop for GpuCompute {
    fn drop(&mut self) {
        end(&self.stream);
    }
}

impl Compute for GpuCompute {
    fn config(&self) -> &ModelConfig {
        self.stage.config()
    }

    fn cache(&mut self) -> &mut KvCache {
        &mut self.cache
    }

    fn fills_slots(&self) -> bool {
        true
    }

    fn begin(&mut self, microbatch: usize, tokens: &[u32], rows: &[Row]) -> Result<(), DaemonError> {
        let element = self.stage.element();
        // Lets go of what only former work referred to, such as the slots of peers that are gone.
        self.stream.is_idle()?;
        let at = &mut self.microbatches[microbatch];
        at.context = rows.iter().map(|row| row.position + 1).max().unwrap_or(1);
        at.batch = at.places.within(rows.len(), at.context)?;
        self.stage.place(&at.batch, rows, &mut self.cache)?;
        let on_device = at.tokens.part(0..tokens.len() * 4)?;
        self.stage.write(tokens, &on_device)?;
        let x = at.x.part(0..tokens.len() * self.stage.config().hidden_size * element)?;
        Ok(self.stage.embed_on(&self.stream, &on_device, &x)?)
    }

    fn attend(
        &mut self,
        mesh: &AttentionMesh,
        microbatch: usize,
        layer: usize,
        rows: &[Row],
    ) -> Result<(), DaemonError> {
        let context = self.context();
        let Self { stage, cache, wire, stream, points, microbatches, plain, .. } = self;
        let at = &mut microbatches[microbatch];
        let (hidden, top_k, is_moe) = (stage.config().hidden_size, stage.config().top_k, stage.config().is_moe(layer));
        let experts = wire.request_parts();
        let sizes = wire.request_row_bytes(hidden).chain([top_k * 2, top_k * 4]);
        let (mut targets, mut copies) = (Vec::with_capacity(4), Vec::new());
        for (part, row_bytes) in sizes.enumerate().take(if is_moe { experts + 2 } else { experts }) {
            let slot = span(mesh.request_place(microbatch as u16, part), rows.len() * row_bytes)?;
            if slot.region().on_device() {
                targets.push(slot);
            } else {
                let target = at.parts[part].of(&context, slot.len())?;
                copies.push((target.clone(), slot));
                targets.push(target);
            }
        }
        let row_bytes = hidden * stage.element();
        let x = at.x.part(0..rows.len() * row_bytes)?;
        let y = match experts {
            1 => targets[0].clone(),
            _ => plain.of(&context, x.len())?,
        };
        stage.attention_on(stream, layer, &at.batch, at.context, &x, cache, &y)?;
        if experts == 2 {
            stage.quantise_on(stream, rows.len(), &y, &targets[0], &targets[1])?;
        }
        if is_moe {
            stage.route_on(stream, layer, rows.len(), &y, &targets[experts], &targets[experts + 1])?;
        }
        for (target, slot) in &copies {
            stream.copy(target, slot)?;
        }
        Ok(points.put(microbatch, stream)?)
    }

    fn is_over(&mut self, microbatch: usize) -> Result<bool, DaemonError> {
        Ok(self.points.is_passed(microbatch)?)
    }

    fn fill(&mut self, _microbatch: usize, _buffer: &mut SendBuffer) -> Result<(), DaemonError> {
        Ok(())
    }

    fn combine(
        &mut self,
        microbatch: usize,
        rows: usize,
        replies: &Replies,
    ) -> Result<Result<(), String>, DaemonError> {
        let context = self.context();
        let row_bytes = self.wire.reply().row_bytes(self.stage.config().hidden_size);
        let x = self.microbatches[microbatch].x.part(0..rows * row_bytes)?;
        self.partials.resize_with(replies.ranks(), Room::default);
        self.points.arrive(microbatch, &self.stream)?;
        let mut partials = Vec::with_capacity(replies.ranks());
        for (rank, room) in self.partials.iter_mut().enumerate() {
            let is_whole = replies.parts(rank).first().is_some_and(|part| {
                (part.rows as usize, part.row_bytes as usize) == (rows, row_bytes)
                    && part.dtype == self.wire.reply_dtype()
            });
            if !is_whole {
                return Ok(Err(format!("ffn {rank} replied with another shape")));
            }
            let landed = span(replies.part_place(rank, 0), x.len())?;
            partials.push(match landed.region().on_device() {
                true => landed,
                false => {
                    let partial = room.of(&context, landed.len())?;
                    self.stream.copy(&landed, &partial)?;
                    partial
                }
            });
        }
        self.stage.combine_on(&self.stream, &x, &partials)?;
        Ok(Ok(()))
    }

    fn begin_logits(&mut self, microbatch: usize, rows: Range<usize>) -> Result<(), DaemonError> {
        let context = self.context();
        let (hidden, vocabulary) = (self.stage.config().hidden_size, self.stage.config().vocab_size);
        let element = self.stage.element();
        let at = &mut self.microbatches[microbatch];
        at.first = rows.start;
        if rows.is_empty() {
            return Ok(());
        }
        let bytes = rows.len() * vocabulary * element;
        let results = match at.results.take().filter(|results| results.len() >= bytes) {
            Some(results) => results,
            None => PinnedMemory::pin(&context, Region::new(Arc::new(HostMemory::allocate(bytes, None)?)))?,
        };
        let x = at.x.part(rows.start * hidden * element..rows.end * hidden * element)?;
        let logits = at.logits.of(&context, bytes)?;
        self.stage.logits_on(&self.stream, rows.len(), &x, &logits)?;
        self.stream.copy(&logits, &Span::new(&results, 0..bytes)?)?;
        at.results = Some(results);
        Ok(self.points.put(microbatch, &self.stream)?)
    }

    fn logits(&mut self, microbatch: usize, row: usize, logits: &mut [f32]) -> Result<(), DaemonError> {
        let at = &self.microbatches[microbatch];
        let mut bytes = vec![0; logits.len() * self.stage.element()];
        if let Some(results) = &at.results {
            results.read((row - at.first) * bytes.len(), &mut bytes)?;
        }
        Ok(self.wire.reply().decode(&bytes, logits)?)
    }
}
