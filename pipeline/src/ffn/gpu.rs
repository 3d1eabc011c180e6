//! An FFN stage on a GPU. A layer's kernels read the requests where they arrived and leave the replies where they are read; a word
//! behind them says when they are there. The requests of several attention instances are put side by side first, so that weights
//! are read once.

use super::compute::{Compute, is_request, say};
use crate::DaemonError;
use crate::gpu::{Points, Room, end, span};
use crate::wire::Wire;
use std::collections::VecDeque;
use stepmesh_mesh::{Batch, Segment};
use stepmesh_model::FfnStage;
use stepmesh_model::cuda::{CudaFfn, DeviceInput};
use stepmesh_transport::cuda::{Span, Stream};

/// Batches on the stream: one that is computed, and those behind it.
const DEPTH: usize = 8;

pub(super) struct GpuCompute {
    stage: CudaFfn,
    wire: Wire,
    stream: Stream,
    points: Points,
    /// The next of them.
    turn: usize,
    under_way: VecDeque<UnderWay>,
    /// The parts of requests, side by side.
    parts: Vec<Room>,
    /// Hidden states that came quantised.
    plain: Room,
    out: Room,
}

struct UnderWay {
    point: usize,
    batch: Batch,
    /// Rows of each segment; none for one that was refused.
    rows: Vec<Option<usize>>,
}

impl GpuCompute {
    pub(super) fn new(stage: CudaFfn, wire: Wire) -> Result<Self, DaemonError> {
        Ok(Self {
            stream: Stream::new(stage.context())?,
            points: Points::new(stage.context(), DEPTH)?,
            turn: 0,
            stage,
            wire,
            under_way: VecDeque::with_capacity(DEPTH),
            parts: (0..4).map(|_| Room::default()).collect(),
            plain: Room::default(),
            out: Room::default(),
        })
    }

    /// A part of all requests as one span: where it is, if one request has it and its slot is the device's; else a copy.
    fn gather(&mut self, live: &[(&Segment, usize)], part: usize, row_bytes: usize) -> Result<Span, DaemonError> {
        let places = live.iter().map(|(segment, rows)| span(segment.part_place(part), rows * row_bytes));
        let places: Vec<Span> = places.collect::<Result<_, _>>()?;
        if let [place] = places.as_slice()
            && place.region().on_device()
        {
            return Ok(place.clone());
        }
        let all = self.parts[part].of(self.stage.context(), places.iter().map(Span::len).sum())?;
        let mut start = 0;
        for place in &places {
            self.stream.copy(place, &all.part(start..start + place.len())?)?;
            start += place.len();
        }
        Ok(all)
    }

    /// Puts a layer on the stream for the segments that have rows.
    fn forward(&mut self, layer: usize, live: &[(&Segment, usize)]) -> Result<(), DaemonError> {
        let config = self.stage.config();
        let (hidden, top_k, is_moe) = (config.hidden_size, config.top_k, config.is_moe(layer));
        let rows: usize = live.iter().map(|(_, rows)| rows).sum();
        let experts = self.wire.request_parts();
        let sizes: Vec<usize> = self.wire.request_row_bytes(hidden).chain([top_k * 2, top_k * 4]).collect();
        let parts = if is_moe { experts + 2 } else { experts };
        let mut given = Vec::with_capacity(4);
        for (part, row_bytes) in sizes.into_iter().enumerate().take(parts) {
            given.push(self.gather(live, part, row_bytes)?);
        }
        let mut input = DeviceInput { hidden: given[0].clone(), experts: None, weights: None, quantised: None };
        let row_bytes = hidden * self.stage.element();
        if experts == 2 {
            input.hidden = self.plain.of(self.stage.context(), rows * row_bytes)?;
            self.stage.dequantise_on(&self.stream, rows, &given[0], &given[1], &input.hidden)?;
            input.quantised = Some((given[0].clone(), given[1].clone()));
        }
        if is_moe {
            (input.experts, input.weights) = (Some(given[experts].clone()), Some(given[experts + 1].clone()));
        }
        let replies = live.iter().map(|(segment, rows)| span(segment.reply_place(0), rows * row_bytes));
        let replies: Vec<Span> = replies.collect::<Result<_, _>>()?;
        if let [reply] = replies.as_slice()
            && reply.region().on_device()
        {
            return Ok(self.stage.forward_on(&self.stream, layer, rows, &input, reply)?);
        }
        let out = self.out.of(self.stage.context(), rows * row_bytes)?;
        self.stage.forward_on(&self.stream, layer, rows, &input, &out)?;
        let mut start = 0;
        for reply in &replies {
            self.stream.copy(&out.part(start..start + reply.len())?, reply)?;
            start += reply.len();
        }
        Ok(())
    }
}

impl Drop for GpuCompute {
    fn drop(&mut self) {
        end(&self.stream);
    }
}

impl Compute for GpuCompute {
    fn has_room(&self) -> bool {
        self.under_way.len() < DEPTH
    }

    fn begin(&mut self, mut batch: Batch) -> Result<(), DaemonError> {
        let layer = batch.group as usize;
        let mut rows = Vec::with_capacity(batch.segments.len());
        for segment in &mut batch.segments {
            let fits = is_request(segment, layer, self.stage.config(), self.wire);
            if !fits {
                tracing::warn!(rank = segment.rank(), layer, "a request that does not fit the layer");
                segment.fail("bad request");
            }
            rows.push(fits.then(|| segment.rows()));
        }
        let live = batch.segments.iter().zip(&rows).filter_map(|(segment, rows)| Some((segment, (*rows)?)));
        let live: Vec<(&Segment, usize)> = live.filter(|(_, rows)| *rows > 0).collect();
        if self.under_way.is_empty() {
            // Lets go of what only former work referred to, such as the slots of peers that are gone.
            self.stream.is_idle()?;
        }
        let point = self.turn;
        self.turn = (point + 1) % DEPTH;
        if !live.is_empty() {
            self.points.arrive(point, &self.stream)?;
            self.forward(layer, &live)?;
        }
        self.points.put(point, &self.stream)?;
        self.under_way.push_back(UnderWay { point, batch, rows });
        Ok(())
    }

    fn end(&mut self) -> Result<Option<Batch>, DaemonError> {
        let Some(first) = self.under_way.front() else { return Ok(None) };
        if !self.points.is_passed(first.point)? {
            return Ok(None);
        }
        let Some(UnderWay { mut batch, rows, .. }) = self.under_way.pop_front() else { return Ok(None) };
        let hidden = self.stage.config().hidden_size;
        for (segment, rows) in batch.segments.iter_mut().zip(rows) {
            if let Some(rows) = rows {
                say(segment, self.wire, rows, hidden)?;
            }
        }
        Ok(Some(batch))
    }

    fn is_busy(&self) -> bool {
        !self.under_way.is_empty()
    }
}
