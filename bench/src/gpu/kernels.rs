//! A layer of the released shape, against what the card could do at best: its memory read once, its tensor cores never idle.

use super::members::on_device;
use super::{GpuOptions, Tell};
use crate::BenchError;
use serde_json::json;
use std::time::{Duration, Instant};
use stepmesh_model::cuda::{AttendBench, CudaAttention, CudaFfn, DeviceInput, GemmBench};
use stepmesh_model::{AttentionStage, Dtype, ModelConfig, Row, Shard};
use stepmesh_transport::cuda::{Context, Span, Stream};

const PATIENCE: Duration = Duration::from_secs(60);
/// Tokens of a part of a sequence.
const SPLIT: usize = 2048;

/// The released shape with one layer, which is a MoE layer.
fn released() -> Result<ModelConfig, BenchError> {
    let json = r#"{"architectures":["Step3TextForCausalLM"],"model_type":"step3_text","hidden_size":7168,
        "intermediate_size":18432,"num_attention_heads":64,"num_attention_groups":1,"num_hidden_layers":1,
        "max_seq_len":65536,"vocab_size":1024,"rms_norm_eps":1e-05,"moe_intermediate_size":5120,"moe_num_experts":48,
        "moe_top_k":3,"rope_theta":500000.0,"rope_scaling":null,"max_position_embedding":65536,"share_expert_dim":5120,
        "share_q_dim":2048,"head_dim":256,"norm_expert_weight":false,"moe_layers_enum":"0","tie_word_embeddings":false}"#;
    Ok(ModelConfig::from_json(json, "the released shape")?)
}

/// What the card does at best: bytes a second of device memory, read and written, and operations of bf16 products a second.
struct Floor {
    bytes_a_second: f64,
    operations_a_second: f64,
}

impl Floor {
    fn measure(options: &GpuOptions) -> Result<Self, BenchError> {
        let context = Context::open(options.gpu)?;
        let stream = Stream::new(&context)?;
        let bytes = 2 << 30;
        let (from, to) = (on_device(&context, bytes)?, on_device(&context, bytes)?);
        let copy = time(&stream, options.quick, || Ok(stream.copy(&from, &to)?))?;
        let gemm = GemmBench::new(options.gpu, [8192; 3], true)?;
        let product = gemm.time(5, 20)?.as_secs_f64();
        Ok(Self { bytes_a_second: 2.0 * bytes as f64 / copy, operations_a_second: gemm.operations() / product })
    }
}

/// The median time of one of many, in seconds.
fn time(stream: &Stream, quick: bool, mut work: impl FnMut() -> Result<(), BenchError>) -> Result<f64, BenchError> {
    work()?;
    stream.finish(PATIENCE)?;
    let started = Instant::now();
    work()?;
    stream.finish(PATIENCE)?;
    let one = started.elapsed().as_secs_f64().max(1e-6);
    let count = ((0.02 / one) as usize).clamp(2, 200);
    let mut times = Vec::new();
    for _ in 0..if quick { 2 } else { 7 } {
        let started = Instant::now();
        (0..count).try_for_each(|_| work())?;
        stream.finish(PATIENCE)?;
        times.push(started.elapsed().as_secs_f64() / count as f64);
    }
    Ok(super::median(times))
}

pub(super) fn attention(options: &GpuOptions, tell: &mut Tell<'_>) -> Result<(), BenchError> {
    let (floor, config) = (Floor::measure(options)?, released()?);
    tell(
        json!({ "part": "floor", "memory_tb_s": floor.bytes_a_second / 1e12, "bf16_tflops": floor.operations_a_second / 1e12 }),
    )?;
    for batch in [64, 256] {
        for context in [8192, 32768] {
            for is_fp8 in [false, true] {
                let positions = vec![context - 1; batch];
                let attend = AttendBench::new(options.gpu, &positions, [64, 256], is_fp8, SPLIT)?;
                let us = attend.time(if options.quick { 2 } else { 7 }, 20)?.as_secs_f64() * 1e6;
                let floor_us = attend.bytes() as f64 / floor.bytes_a_second * 1e6;
                let work = 4.0 * 64.0 * 256.0 * (batch * context) as f64 / floor.operations_a_second * 1e6;
                tell(json!({
                    "part": "attention", "what": "attend", "batch": batch, "context": context,
                    "kv_dtype": if is_fp8 { "fp8" } else { "bf16" }, "us": us, "floor_us": floor_us, "ratio": floor_us / us,
                    "tensor_core_floor_us": work,
                }))?;
            }
            let us = layer(options, &config, batch, context)?;
            let weights = 7168.0 * (2048.0 + 512.0) + 2048.0 * 16384.0 + 16384.0 * 7168.0 + 48.0 * 7168.0;
            let bytes = weights * 2.0 + (batch * context * 512 * 2) as f64;
            let operations = 2.0 * weights * batch as f64 + 4.0 * 64.0 * 256.0 * (batch * context) as f64;
            let floor_us = (bytes / floor.bytes_a_second).max(operations / floor.operations_a_second) * 1e6;
            tell(json!({
                "part": "attention", "what": "layer", "batch": batch, "context": context, "kv_dtype": "bf16", "us": us,
                "floor_us": floor_us, "ratio": floor_us / us,
            }))?;
        }
    }
    Ok(())
}

/// All of a layer's attention half and its router, in microseconds.
fn layer(options: &GpuOptions, config: &ModelConfig, batch: usize, context: usize) -> Result<f64, BenchError> {
    let mut stage = CudaAttention::of_noise(config.clone(), Dtype::Bf16, options.gpu)?;
    let mut cache = stage.new_cache(batch * context)?;
    let mut rows = Vec::new();
    for _ in 0..batch {
        let sequence = cache.reserve(context)?;
        cache.assume_held(sequence, context - 1)?;
        rows.push(Row { sequence, position: context - 1 });
    }
    let places = stage.new_batch(batch, context)?;
    stage.place(&places, &rows, &mut cache)?;
    let bytes = batch * config.hidden_size * 2;
    let (x, y) = (stage.take(bytes)?, stage.take(bytes)?);
    let (ids, weights) = (stage.take(batch * config.top_k * 2)?, stage.take(batch * config.top_k * 4)?);
    let stream = Stream::new(&stage.context().clone())?;
    let tokens = stage.take(batch * 4)?;
    stage.write(&(0..batch as u32).collect::<Vec<_>>(), &tokens)?;
    stage.embed_on(&stream, &tokens, &x)?;
    let seconds = time(&stream, options.quick, || {
        stage.attention_on(&stream, 0, &places, context, &x, &cache, &y)?;
        Ok(stage.route_on(&stream, 0, batch, &y, &ids, &weights)?)
    })?;
    Ok(seconds * 1e6)
}

pub(super) fn ffn(options: &GpuOptions, tell: &mut Tell<'_>) -> Result<(), BenchError> {
    let (floor, config) = (Floor::measure(options)?, released()?);
    for dtype in [Dtype::Bf16, Dtype::Fp8] {
        let mut stage = CudaFfn::of_noise(config.clone(), dtype, Shard::WHOLE, options.gpu)?;
        let stream = Stream::new(&stage.context().clone())?;
        for tokens in [128, 256, 512, 1024, 2048] {
            let input = chosen(&mut stage, &config, tokens)?;
            let out = stage.take(tokens * config.hidden_size * 2)?;
            let seconds = time(&stream, options.quick, || Ok(stage.forward_on(&stream, 0, tokens, &input, &out)?))?;
            let of_expert = 3.0 * (config.hidden_size * config.moe_intermediate_size) as f64;
            let operations = 2.0 * of_expert * (tokens * (config.top_k + 1)) as f64;
            let (bytes_a_weight, speed) = if dtype == Dtype::Fp8 { (1.0, 2.0) } else { (2.0, 1.0) };
            // With so many tokens every expert is visited.
            let memory_us = of_expert * 49.0 * bytes_a_weight / floor.bytes_a_second * 1e6;
            let tensor_us = operations / (speed * floor.operations_a_second) * 1e6;
            let (us, floor_us) = (seconds * 1e6, memory_us.max(tensor_us));
            tell(json!({
                "part": "ffn", "tokens": tokens, "dtype": dtype.name(), "us": us, "floor_us": floor_us, "ratio": floor_us / us,
                "tensor_core_floor_us": tensor_us, "memory_floor_us": memory_us, "tflops": operations / seconds / 1e12,
            }))?;
        }
    }
    Ok(())
}

/// Rows that are noise, each of which goes to three experts that are spread evenly.
fn chosen(stage: &mut CudaFfn, config: &ModelConfig, tokens: usize) -> Result<DeviceInput, BenchError> {
    let pick = |i: usize| (i / config.top_k * 7 + i % config.top_k * 16) % config.num_experts;
    let ids: Vec<u16> = (0..tokens * config.top_k).map(|i| pick(i) as u16).collect();
    let hidden: Span = stage.noise(tokens * config.hidden_size)?;
    let (experts, weights) = stage.choices(&ids, &vec![0.25; ids.len()])?;
    Ok(DeviceInput { hidden, experts: Some(experts), weights: Some(weights), quantised: None })
}
