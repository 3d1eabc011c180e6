//! Whole decode steps as graphs: 61 layers and three microbatches of a small model, captured once on each side and replayed for
//! every token, with the transfers inside. The hidden states, the experts and their weights are produced in the slots, and the
//! FFN side's results where the attention side adds them up.

use super::members::{PATIENCE, Place, SLOTS, device};
use super::{GpuOptions, Tell, quantile};
use crate::BenchError;
use serde_json::json;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use stepmesh_mesh::control::LocalScheduler;
use stepmesh_mesh::scheduler::SchedulerOptions;
use stepmesh_mesh::{
    AttentionMesh, AttentionStep, Batch, FfnMesh, FfnStep, FfnWork, MemberOptions, MeshError, PartSpec, Segment,
    SlotLayout, Transfer,
};
use stepmesh_model::cuda::{Batch as Places, CudaAttention, CudaFfn, DeviceInput};
use stepmesh_model::{
    AttentionStage, Checkpoint, CpuAttention, CpuFfn, Dtype, KvCache, LoadOptions, ModelConfig, ModelError, Row,
    SequenceId, Shard, greedy,
};
use stepmesh_proto::{Dtype as Element, Part};
use stepmesh_transport::cuda::{Context, CudaError, Gates, Graph, PinnedMemory, Span, Stream};
use stepmesh_transport::{Clock, GateSet, HostMemory, Region};

const LAYERS: usize = 61;
const MICROBATCHES: usize = SLOTS as usize;
/// Sequences of a microbatch.
const ROWS: usize = 2;

/// A small model with as many layers as the released one.
fn checkpoint() -> Result<Checkpoint, BenchError> {
    let moe: Vec<String> = (1..LAYERS).map(|layer| layer.to_string()).collect();
    let config = format!(
        r#"{{"architectures":["Step3TextForCausalLM"],"model_type":"step3_text","hidden_size":256,"intermediate_size":512,
        "num_attention_heads":4,"num_attention_groups":1,"num_hidden_layers":{LAYERS},"max_seq_len":2048,"vocab_size":512,
        "rms_norm_eps":1e-05,"moe_intermediate_size":128,"moe_num_experts":8,"moe_top_k":3,"rope_theta":500000.0,
        "rope_scaling":null,"max_position_embedding":2048,"share_expert_dim":128,"share_q_dim":128,"head_dim":64,
        "norm_expert_weight":false,"moe_layers_enum":"{}","tie_word_embeddings":false}}"#,
        moe.join(",")
    );
    let mut file = Tensors::default();
    file.add("model.embed_tokens.weight", &[512, 256], 1.0);
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize], scale: f32| {
            file.add(&format!("model.layers.{layer}.{name}.weight"), shape, scale)
        };
        add("input_layernorm", &[256], 0.0);
        add("self_attn.q_proj", &[128, 256], 0.1);
        add("self_attn.k_proj", &[64, 256], 0.1);
        add("self_attn.v_proj", &[64, 256], 0.1);
        add("self_attn.inter_norm", &[128], 0.0);
        add("self_attn.wq", &[256, 128], 0.15);
        add("self_attn.o_proj", &[256, 256], 0.05);
        add("post_attention_layernorm", &[256], 0.0);
        if layer == 0 {
            add("mlp.gate_proj", &[512, 256], 0.1);
            add("mlp.up_proj", &[512, 256], 0.1);
            add("mlp.down_proj", &[256, 512], 0.05);
            continue;
        }
        add("moe.gate", &[8, 256], 0.2);
        add("moe.gate_proj", &[8, 128, 256], 0.1);
        add("moe.up_proj", &[8, 128, 256], 0.1);
        add("moe.down_proj", &[8, 256, 128], 0.05);
        add("share_expert.gate_proj", &[128, 256], 0.1);
        add("share_expert.up_proj", &[128, 256], 0.1);
        add("share_expert.down_proj", &[256, 128], 0.05);
    }
    file.add("model.norm.weight", &[256], 0.0);
    file.add("lm_head.weight", &[512, 256], 0.3);
    Ok(Checkpoint::from_bytes(&config, Vec::leak(file.finish()))?)
}

/// Tensors of noise, as a file in the safetensors format. A norm's, whose scale is 0, are ones.
#[derive(Default)]
struct Tensors {
    header: String,
    data: Vec<u8>,
    state: u64,
}

impl Tensors {
    fn add(&mut self, name: &str, shape: &[usize], scale: f32) {
        let (elements, start) = (shape.iter().product::<usize>(), self.data.len());
        for _ in 0..elements {
            self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let noise = (self.state >> 40) as f32 / (1_u32 << 23) as f32 - 1.0;
            let value = if scale == 0.0 { 1.0 } else { noise * scale };
            // The upper half of its bits, as a bf16 has them.
            self.data.extend_from_slice(&((value.to_bits() >> 16) as u16).to_le_bytes());
        }
        let comma = if self.header.is_empty() { "" } else { "," };
        let (end, shape) = (self.data.len(), json!(shape));
        let _ =
            write!(self.header, r#"{comma}"{name}":{{"dtype":"BF16","shape":{shape},"data_offsets":[{start},{end}]}}"#);
    }

    fn finish(self) -> Vec<u8> {
        let mut header = format!("{{{}}}", self.header);
        while !header.len().is_multiple_of(8) {
            header.push(' ');
        }
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &self.data].concat()
    }
}

/// What a transfer is: hidden states, experts and their weights there, hidden states back.
fn request_parts(top_k: usize, hidden: usize) -> Vec<Part> {
    let part = |key, dtype: Element, elements: usize| Part {
        key,
        dtype,
        rows: ROWS as u32,
        row_bytes: (elements * dtype.bytes()) as u32,
        offset: 0,
    };
    vec![part(0, Element::F32, hidden), part(1, Element::U16, top_k), part(2, Element::F32, top_k)]
}

fn reply_part(hidden: usize) -> Part {
    Part { key: 3, dtype: Element::F32, rows: ROWS as u32, row_bytes: hidden as u32 * 4, offset: 0 }
}

/// The microbatches of a step's transfers: all of them, layer by layer.
fn microbatches() -> impl Iterator<Item = u16> {
    (0..LAYERS * MICROBATCHES).map(|index| (index % MICROBATCHES) as u16)
}

fn transfers(config: &ModelConfig) -> Vec<Transfer> {
    let parts = request_parts(config.top_k, config.hidden_size);
    let layers = (0..LAYERS * MICROBATCHES).map(|index| (index / MICROBATCHES) as u32);
    let transfer = |(microbatch, group)| Transfer { microbatch, group, parts: parts.clone(), app: [0; 16] };
    microbatches().zip(layers).map(transfer).collect()
}

fn missing(what: &str) -> BenchError {
    BenchError::Sequence(format!("there is no {what}"))
}

fn within(place: Option<(Region, std::ops::Range<usize>)>, bytes: usize) -> Result<Span, BenchError> {
    let (region, range) = place.ok_or_else(|| missing("such slot"))?;
    Ok(Span::new(&region, range.start..range.start + bytes)?)
}

/// A capture takes errors of the driver only.
fn driver(error: ModelError) -> CudaError {
    match error {
        ModelError::Cuda(error) => error,
        error => CudaError::Invalid(error.to_string()),
    }
}

/// What is captured: kernels and transfers, or only one of the two.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Both,
    Kernels,
    Transfers,
}

struct Attention {
    /// First, so that they open first: memory is freed when nothing waits any more.
    gates: Arc<Gates>,
    stage: CudaAttention,
    cache: KvCache,
    sequences: Vec<SequenceId>,
    places: Vec<Places>,
    x: Vec<Span>,
    tokens: Vec<Span>,
    logits: Span,
    /// Pinned: what the end of a step leaves.
    results: Region,
    slots: Vec<[Span; 3]>,
    replies: Vec<Span>,
    stream: Stream,
    context: usize,
}

impl Attention {
    fn new(mesh: &AttentionMesh, checkpoint: &Checkpoint, gpu: u32, context: usize) -> Result<Self, BenchError> {
        let mut stage = CudaAttention::load(checkpoint, LoadOptions::new(Dtype::F32), gpu, &mut |_| {})?;
        let config = stage.config().clone();
        let mut cache = stage.new_cache(MICROBATCHES * ROWS * context.next_multiple_of(16))?;
        let sequences = (0..MICROBATCHES * ROWS).map(|_| cache.reserve(context)).collect::<Result<_, _>>()?;
        let (mut places, mut x, mut tokens, mut slots, mut replies) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for microbatch in 0..SLOTS {
            places.push(stage.new_batch(ROWS, context)?);
            x.push(stage.take(ROWS * config.hidden_size * 4)?);
            tokens.push(stage.take(ROWS * 4)?);
            let mut parts = Vec::new();
            for (number, part) in request_parts(config.top_k, config.hidden_size).iter().enumerate() {
                parts.push(within(mesh.request_place(microbatch, number), part.bytes() as usize)?);
            }
            slots.push(parts.try_into().map_err(|_| missing("such part"))?);
            let bytes = reply_part(config.hidden_size).bytes() as usize;
            replies.push(within(mesh.reply_place(0, microbatch, 0), bytes)?);
        }
        let bytes = MICROBATCHES * ROWS * config.vocab_size * 4;
        let host = Region::new(Arc::new(HostMemory::allocate(bytes, None)?));
        Ok(Self {
            logits: stage.take(bytes)?,
            results: PinnedMemory::pin(stage.context(), host)?,
            gates: Arc::new(Gates::new(stage.context(), LAYERS * MICROBATCHES)?),
            stream: Stream::new(stage.context())?,
            stage,
            cache,
            sequences,
            places,
            x,
            tokens,
            slots,
            replies,
            context,
        })
    }

    fn put(&mut self, stream: &Stream, what: What) -> Result<(), ModelError> {
        let (has_kernels, has_transfers) = (what != What::Transfers, what != What::Kernels);
        for index in 0..LAYERS * MICROBATCHES {
            let (layer, microbatch) = (index / MICROBATCHES, index % MICROBATCHES);
            let (x, slot) = (&self.x[microbatch].clone(), &self.slots[microbatch].clone());
            match index.checked_sub(MICROBATCHES) {
                None if has_kernels => self.stage.embed_on(stream, &self.tokens[microbatch], x)?,
                None => {}
                Some(before) => self.land(stream, before, what)?,
            }
            if has_kernels {
                let places = &self.places[microbatch];
                self.stage.attention_on(stream, layer, places, self.context, x, &self.cache, &slot[0])?;
                if self.stage.config().is_moe(layer) {
                    self.stage.route_on(stream, layer, ROWS, &slot[0], &slot[1], &slot[2])?;
                }
            }
            if has_transfers && let Some(gate) = self.gates.gate(index) {
                gate.announce(stream)?;
            }
        }
        for index in (LAYERS - 1) * MICROBATCHES..LAYERS * MICROBATCHES {
            self.land(stream, index, what)?;
        }
        if has_kernels {
            let bytes = self.logits.len() / MICROBATCHES;
            for microbatch in 0..MICROBATCHES {
                let logits = self.logits.part(microbatch * bytes..(microbatch + 1) * bytes)?;
                self.stage.logits_on(stream, ROWS, &self.x[microbatch].clone(), &logits)?;
            }
            stream.copy(&self.logits, &Span::new(&self.results, 0..self.logits.len())?)?;
        }
        Ok(())
    }

    /// A reply is there, and is added.
    fn land(&self, stream: &Stream, index: usize, what: What) -> Result<(), ModelError> {
        let microbatch = index % MICROBATCHES;
        if what != What::Kernels
            && let Some(gate) = self.gates.gate(index)
        {
            gate.pass(stream)?;
        }
        match what {
            What::Transfers => Ok(()),
            _ => self.stage.combine_on(stream, &self.x[microbatch], &self.replies[microbatch..=microbatch]),
        }
    }

    fn capture(&mut self, what: What) -> Result<Graph, BenchError> {
        let stream = Stream::new(&self.stage.context().clone())?;
        Ok(Graph::capture(&stream, |stream| self.put(stream, what).map_err(driver))?)
    }

    /// Says that all sequences are so long, whatever their tokens are.
    fn assume_held(&mut self, tokens: usize) -> Result<(), BenchError> {
        Ok(self.sequences.iter().try_for_each(|sequence| self.cache.assume_held(*sequence, tokens))?)
    }

    /// Says what the next step is of: a token of each sequence, at a position.
    fn set(&mut self, tokens: &[u32], position: usize) -> Result<(), BenchError> {
        for microbatch in 0..MICROBATCHES {
            let some = microbatch * ROWS..(microbatch + 1) * ROWS;
            let rows: Vec<Row> =
                self.sequences[some.clone()].iter().map(|sequence| Row { sequence: *sequence, position }).collect();
            self.stage.place(&self.places[microbatch], &rows, &mut self.cache)?;
            self.stage.write(&tokens[some], &self.tokens[microbatch])?;
        }
        Ok(())
    }

    /// The most likely token of each sequence.
    fn next(&self) -> Result<Vec<u32>, BenchError> {
        let mut bytes = vec![0; self.logits.len()];
        self.results.read(0, &mut bytes)?;
        let logits: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        Ok(logits.chunks(self.stage.config().vocab_size).map(greedy).collect::<Result<_, _>>()?)
    }
}

struct Ffn {
    /// First, as attention's.
    gates: Arc<Gates>,
    stage: CudaFfn,
    config: ModelConfig,
    inputs: Vec<DeviceInput>,
    outputs: Vec<Span>,
    stream: Stream,
}

impl Ffn {
    fn new(mesh: &FfnMesh, checkpoint: &Checkpoint, gpu: u32) -> Result<Self, BenchError> {
        let stage = CudaFfn::load(checkpoint, LoadOptions::new(Dtype::F32), Shard::WHOLE, gpu, &mut |_| {})?;
        let config = checkpoint.config().clone();
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for microbatch in 0..SLOTS {
            let parts = request_parts(config.top_k, config.hidden_size);
            let place = |part: usize| within(mesh.request_place(0, microbatch, part), parts[part].bytes() as usize);
            inputs.push(DeviceInput {
                hidden: place(0)?,
                experts: Some(place(1)?),
                weights: Some(place(2)?),
                quantised: None,
            });
            let bytes = reply_part(config.hidden_size).bytes() as usize;
            outputs.push(within(mesh.reply_place(0, microbatch, 0), bytes)?);
        }
        let gates = Arc::new(Gates::new(stage.context(), LAYERS * MICROBATCHES)?);
        let stream = Stream::new(stage.context())?;
        Ok(Self { stage, config, inputs, outputs, gates, stream })
    }

    fn put(&mut self, stream: &Stream, what: What) -> Result<(), ModelError> {
        for index in 0..LAYERS * MICROBATCHES {
            let (layer, microbatch) = (index / MICROBATCHES, index % MICROBATCHES);
            let gate = self.gates.gate(index).filter(|_| what != What::Kernels);
            if let Some(gate) = &gate {
                gate.pass(stream)?;
            }
            if what != What::Transfers {
                self.stage.forward_on(stream, layer, ROWS, &self.inputs[microbatch], &self.outputs[microbatch])?;
            }
            if let Some(gate) = &gate {
                gate.announce(stream)?;
            }
        }
        Ok(())
    }

    fn capture(&mut self, what: What) -> Result<Graph, BenchError> {
        let stream = Stream::new(&self.stage.context().clone())?;
        Ok(Graph::capture(&stream, |stream| self.put(stream, what).map_err(driver))?)
    }
}

/// The FFN side has nothing to add: rows are as many as ever.
struct Fixed(Part);

impl FfnWork for Fixed {
    fn arrived(&mut self, _: usize, _: &Batch) -> Result<(), MeshError> {
        Ok(())
    }

    fn answer(&mut self, _: usize, segment: &mut Segment) -> Result<(), MeshError> {
        segment.set_reply(&[self.0])
    }
}

/// Serves steps until the other side goes: first with transfers only, then with kernels, too.
fn serve(
    mut mesh: FfnMesh,
    checkpoint: &Checkpoint,
    gpu: u32,
    rehearsals: usize,
    told: &Told,
) -> Result<(), BenchError> {
    mesh.wait_complete(PATIENCE)?;
    let mut ffn = Ffn::new(&mesh, checkpoint, gpu)?;
    // So that nothing is allocated within a capture.
    let stream = Stream::new(&Context::open(gpu)?)?;
    ffn.put(&stream, What::Kernels)?;
    stream.finish(PATIENCE)?;
    let kernels = ffn.capture(What::Kernels)?;
    let alone = replays(&kernels, &ffn.stream, 20)?;
    told.ffn_ns.store((alone * 1e3) as u64, Ordering::Release);
    *told.kernels.lock().unwrap_or_else(PoisonError::into_inner) = Some(kernels);
    let graphs = [ffn.capture(What::Transfers)?, ffn.capture(What::Both)?];
    told.is_ready.store(true, Ordering::Release);
    let mut step = FfnStep::new(ffn.gates.clone(), microbatches().collect())?;
    let mut work = Fixed(reply_part(ffn.config.hidden_size));
    for replay in 0.. {
        graphs[usize::from(replay >= rehearsals)].launch(&ffn.stream)?;
        loop {
            match step.run(&mut mesh, &mut work, Duration::from_millis(200)) {
                Ok(true) => break,
                Ok(false) if mesh.is_complete() => {}
                Ok(false) => {
                    ffn.gates.abort();
                    return Ok(ffn.stream.finish(PATIENCE)?);
                }
                Err(error) if mesh.is_complete() => return Err(error.into()),
                Err(_) => return Ok(ffn.stream.finish(PATIENCE)?),
            }
        }
        ffn.stream.finish(PATIENCE)?;
    }
    Ok(())
}

/// What the FFN side's thread says.
#[derive(Default)]
struct Told {
    ffn_ns: std::sync::atomic::AtomicU64,
    /// All that it computes in a step, without a gate.
    kernels: Mutex<Option<Graph>>,
    is_ready: AtomicBool,
}

/// The median of a graph's replays by itself, in microseconds.
fn replays(graph: &Graph, stream: &Stream, count: usize) -> Result<f64, BenchError> {
    let mut times = Vec::new();
    for _ in 0..count {
        let started = Instant::now();
        graph.launch(stream)?;
        stream.finish(PATIENCE)?;
        times.push(started.elapsed().as_secs_f64() * 1e6);
    }
    Ok(super::median(times))
}

pub(super) fn run(options: &GpuOptions, tell: &mut Tell<'_>) -> Result<(), BenchError> {
    let (steps, rehearsals, gpu) =
        (if options.quick { 20 } else { 1000 }, if options.quick { 5 } else { 100 }, options.gpu);
    let (checkpoint, context) = (Arc::new(checkpoint()?), Context::open(gpu)?);
    let config = checkpoint.config().clone();
    let specs =
        |parts: &[Part]| parts.iter().map(|part| PartSpec { row_bytes: part.row_bytes, max_rows: part.rows }).collect();
    let request = request_parts(config.top_k, config.hidden_size);
    let layout = SlotLayout::new(SLOTS, specs(&request), specs(&[reply_part(config.hidden_size)]))?;
    let scheduler = LocalScheduler::new(SchedulerOptions::new(1, 1))?;
    let join = || {
        let (device, endpoint) = device(&context, Place::InPlace)?;
        let control = Box::new(scheduler.session(endpoint.waker()));
        Ok::<_, BenchError>((MemberOptions::new(layout.clone(), "replay"), device, endpoint, control))
    };
    let (member, device, endpoint, control) = join()?;
    let ffn = FfnMesh::with_endpoint(member, device, endpoint, control, Clock::system())?;
    let told = Arc::new(Told::default());
    let (of_ffn, telling) = (checkpoint.clone(), told.clone());
    let thread = std::thread::spawn(move || serve(ffn, &of_ffn, gpu, rehearsals, &telling));
    let (member, device, endpoint, control) = join()?;
    let mut mesh = AttentionMesh::with_endpoint(member, device, endpoint, control, Clock::system())?;
    mesh.wait_complete(PATIENCE)?;
    let mut attention = Attention::new(&mesh, &checkpoint, gpu, steps + 16)?;
    let stream = Stream::new(&context)?;
    let first: Vec<u32> = (0..MICROBATCHES * ROWS).map(|sequence| (sequence * 53 + 7) as u32 % 512).collect();
    // Attention takes longer the more there is before a token: alone at the middle of what the steps will have.
    attention.assume_held(steps / 2)?;
    attention.set(&first, steps / 2)?;
    attention.put(&stream, What::Kernels)?;
    stream.finish(PATIENCE)?;
    let kernels = attention.capture(What::Kernels)?;
    let attention_us = replays(&kernels, &attention.stream, 20)?;
    let graphs = [attention.capture(What::Transfers)?, attention.capture(What::Both)?];
    let started = Instant::now();
    while !told.is_ready.load(Ordering::Acquire) && !thread.is_finished() {
        mesh.poll()?;
        if started.elapsed() > PATIENCE {
            return Err(MeshError::Timeout(PATIENCE).into());
        }
    }

    let of_ffn = told.kernels.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or_else(|| missing("graph"))?;
    let mut together = Vec::new();
    for _ in 0..20 {
        let started = Instant::now();
        of_ffn.launch(&stream)?;
        kernels.launch(&attention.stream)?;
        attention.stream.finish(PATIENCE)?;
        stream.finish(PATIENCE)?;
        together.push(started.elapsed().as_secs_f64() * 1e6);
    }
    let together_us = super::median(together);

    let mut step = AttentionStep::new(attention.gates.clone(), transfers(&config))?;
    let mut times = [Vec::new(), Vec::new()];
    let mut replay = |attention: &Attention, mesh: &mut AttentionMesh, which: usize| -> Result<(), BenchError> {
        let started = Instant::now();
        graphs[which].launch(&attention.stream)?;
        step.run(mesh, PATIENCE)?;
        attention.stream.finish(PATIENCE)?;
        times[which].push(started.elapsed().as_secs_f64() * 1e6);
        Ok(())
    };
    for _ in 0..rehearsals {
        replay(&attention, &mut mesh, 0)?;
    }
    let mut decoded = vec![first];
    for position in 0..steps {
        attention.set(&decoded[position], position)?;
        replay(&attention, &mut mesh, 1)?;
        decoded.push(attention.next()?);
    }
    drop(mesh);
    let ended = thread.join().map_err(|_| BenchError::Sequence("the FFN side's thread has ended badly".into()))?;
    ended?;

    let right = right_tokens(&checkpoint, &decoded)?;
    let sorted = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times
    });
    let [transfers_us, step_us] = [0, 1].map(|which| quantile(&sorted[which], 0.5));
    let ffn_us = told.ffn_ns.load(Ordering::Acquire) as f64 / 1e3;
    tell(json!({
        "part": "graph_replay", "layers": LAYERS, "microbatches": MICROBATCHES, "rows": ROWS, "replays": steps,
        "tokens": steps * MICROBATCHES * ROWS, "tokens_right": right, "step_p50_us": step_us,
        "step_p99_us": quantile(&sorted[1], 0.99), "attention_kernels_us": attention_us, "ffn_kernels_us": ffn_us,
        "kernels_of_both_at_once_us": together_us,
        "overhead_us_per_layer": (step_us - together_us) / LAYERS as f64, "transfers_alone_us_per_layer": transfers_us / LAYERS as f64,
    }))
}

/// How many tokens are what the CPU's stages say after the same tokens before.
fn right_tokens(checkpoint: &Checkpoint, decoded: &[Vec<u32>]) -> Result<usize, BenchError> {
    let sequences = decoded[0].len();
    let check = |sequence: usize| -> Result<usize, BenchError> {
        let tokens: Vec<u32> = decoded.iter().map(|tokens| tokens[sequence]).collect();
        let mut attention = CpuAttention::load(checkpoint, Dtype::F32)?;
        let mut ffn = CpuFfn::load(checkpoint, Dtype::F32, Shard::WHOLE)?;
        let logits = super::numbers::logits(&mut attention, &mut ffn, &tokens[..tokens.len() - 1])?;
        let said = logits.chunks(checkpoint.config().vocab_size).map(greedy).collect::<Result<Vec<_>, _>>()?;
        Ok(said.iter().zip(&tokens[1..]).filter(|(said, token)| said == token).count())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..sequences).map(|sequence| scope.spawn(move || check(sequence))).collect();
        let ended = || BenchError::Sequence("the CPU's check has ended badly".into());
        threads.into_iter().map(|thread| thread.join().map_err(|_| ended())?).sum()
    })
}
