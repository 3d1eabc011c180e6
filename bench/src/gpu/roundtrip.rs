//! Round trips from stream to stream: the attention side's stream announces, the CPUs move descriptors, the FFN side's stream
//! passes its gate and announces, and the attention side's stream passes its own.

use super::members::{Place, ROUNDS, Task, announced, on_device, pair, parts, replied, reply_span, request_span};
use super::{GpuOptions, Tell, quantile};
use crate::process::Program;
use crate::{BenchError, HIDDEN};
use serde_json::json;
use std::time::Instant;
use stepmesh_mesh::Request;
use stepmesh_transport::GateSet;
use stepmesh_transport::cuda::{Context, Gates, Graph, PinnedMemory, Span, Stream};
use stepmesh_transport::{HostMemory, Region};

pub(super) fn run(options: &GpuOptions, tell: &mut Tell<'_>) -> Result<(), BenchError> {
    let graphs = if options.quick { 4 } else { 40 };
    let copies = CopyEngine::new(options.gpu)?;
    for second in [None, options.second.as_ref()] {
        for place in [Place::InPlace, Place::Staged] {
            for batch in [1, 16, 128] {
                let sorted = rounds(options.gpu, place, batch, second, graphs)?;
                let copy_us = if place == Place::Staged { copies.transfer_us(batch)? } else { 0.0 };
                let p50 = quantile(&sorted, 0.5);
                tell(json!({
                    "part": "pushpull", "batch": batch, "hidden": HIDDEN, "place": place.name(),
                    "processes": if second.is_some() { 2 } else { 1 }, "mps": options.is_mps && second.is_some(),
                    "rounds": sorted.len(), "p50_us": p50, "p99_us": quantile(&sorted, 0.99), "copy_us": copy_us,
                    "copy_share": copy_us / p50,
                }))?;
            }
        }
        if options.second.is_none() {
            break;
        }
    }
    Ok(())
}

/// Times of round trips in microseconds, sorted.
fn rounds(gpu: u32, place: Place, batch: u32, second: Option<&Program>, graphs: usize) -> Result<Vec<f64>, BenchError> {
    let (mut mesh, other) =
        pair(gpu, place, if place == Place::InPlace { Task::Rounds } else { Task::Answer }, batch, second)?;
    let context = Context::open(gpu)?;
    let [request, reply] = parts(batch);
    let (output, input) =
        (on_device(&context, request.bytes() as usize)?, on_device(&context, reply.bytes() as usize)?);
    let (to, from) = (request_span(&mesh, 0)?, reply_span(&mesh, 0)?);
    // Last, so that it opens first: memory is freed when nothing waits any more.
    let (stream, gates) = (Stream::new(&context)?, Gates::new(&context, ROUNDS)?);
    // Two graphs of one process that wait for one another must not both hold copies by copy engines: the driver queues those one
    // behind the other, whatever graph they are of. So what copies is put on the stream round by round.
    let is_graph = place == Place::InPlace;
    let capture = |stream: &Stream| {
        (0..ROUNDS).filter_map(|round| gates.gate(round)).try_for_each(|gate| {
            gate.announce(stream)?;
            gate.pass(stream)
        })
    };
    let graph = if is_graph { Some(Graph::capture(&stream, capture)?) } else { None };
    let mut times = Vec::with_capacity(graphs * ROUNDS);
    for number in 0..=graphs {
        if let Some(graph) = &graph {
            graph.launch(&stream)?;
        }
        let mut before: Option<Instant> = None;
        for round in 0..ROUNDS {
            let gate = gates.gate(round).ok_or_else(|| BenchError::Sequence("no such gate".into()))?;
            if !is_graph {
                stream.copy(&output, &to)?;
                gate.announce(&stream)?;
            }
            announced(&gates, round, || mesh.poll().map(|_| true))?;
            let now = Instant::now();
            // The first graph warms up, the first round of each waits for the launch.
            if let Some(before) = before.replace(now).filter(|_| number > 0) {
                times.push((now - before).as_secs_f64() * 1e6);
            }
            let buffer = mesh.acquire(0)?;
            let asked = Request { group: round as u32, app: [0; 16], parts: &[request], leave: false };
            let ticket = mesh.push_pull(buffer, asked)?;
            if !is_graph {
                gate.pass(&stream)?;
                stream.copy(&from, &input)?;
            }
            replied(&mut mesh, ticket)?;
            gates.open(round);
        }
        stream.finish(super::members::PATIENCE)?;
    }
    drop(mesh);
    other.finish()?;
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// What copy engines take by themselves.
struct CopyEngine {
    stream: Stream,
    device: Span,
    host: Span,
}

impl CopyEngine {
    fn new(gpu: u32) -> Result<Self, BenchError> {
        let context = Context::open(gpu)?;
        let bytes = parts(128)[1].bytes() as usize;
        let host = PinnedMemory::pin(&context, Region::new(std::sync::Arc::new(HostMemory::allocate(bytes, None)?)))?;
        let (stream, device) = (Stream::new(&context)?, on_device(&context, bytes)?);
        Ok(Self { stream, device, host: Span::new(&host, 0..bytes)? })
    }

    /// The four copies of a transfer there and back, one after the other.
    fn transfer_us(&self, batch: u32) -> Result<f64, BenchError> {
        let mut all = 0.0;
        for part in parts(batch) {
            let (device, host) =
                (self.device.part(0..part.bytes() as usize)?, self.host.part(0..part.bytes() as usize)?);
            for (from, to) in [(&device, &host), (&host, &device)] {
                let time = |count: u32| -> Result<f64, BenchError> {
                    let started = Instant::now();
                    (0..count).try_for_each(|_| self.stream.copy(from, to))?;
                    self.stream.finish(super::members::PATIENCE)?;
                    Ok(started.elapsed().as_secs_f64() * 1e6 / f64::from(count))
                };
                time(20)?;
                all += super::median((0..9).map(|_| time(200)).collect::<Result<_, _>>()?);
            }
        }
        Ok(all)
    }
}
