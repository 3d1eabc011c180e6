//! Kernels against the CPU.

use super::{GpuOptions, Tell};
use crate::BenchError;
use serde_json::json;
use stepmesh_model::cuda::{AttendBench, CudaAttention, CudaFfn, GemmBench};
use stepmesh_model::{
    AttentionStage, Checkpoint, CpuAttention, CpuFfn, Dtype, FfnInput, FfnStage, Hidden, LoadOptions, Row, Shard,
    greedy,
};

pub(super) fn run(options: &GpuOptions, tell: &mut Tell<'_>) -> Result<(), BenchError> {
    for is_fp8 in [false, true] {
        for split in [256, 2048] {
            let attend = AttendBench::new(options.gpu, &[2999, 16, 700, 255, 256, 0], [64, 256], is_fp8, split)?;
            let kv_dtype = if is_fp8 { "fp8" } else { "bf16" };
            tell(
                json!({ "part": "numbers", "what": "attend", "kv_dtype": kv_dtype, "split": split, "error": attend.error()? }),
            )?;
        }
    }
    for rows in [9, 50, 300] {
        let shape = [rows, 1032, 2064];
        let (vendor, own) = (GemmBench::new(options.gpu, shape, true)?, GemmBench::new(options.gpu, shape, false)?);
        let difference = own.difference(&vendor)?;
        tell(
            json!({ "part": "numbers", "what": "gemm", "rows": rows, "cublas": vendor.has_cublas(), "error": difference }),
        )?;
    }
    let Some(directory) = &options.fp8_checkpoint else { return Ok(()) };
    let checkpoint = Checkpoint::open(directory)?;
    for dtype in [Dtype::F32, Dtype::Fp8] {
        let (load, index) = (LoadOptions::new(dtype), options.gpu);
        let config = checkpoint.config();
        let tokens: Vec<u32> = (0..91).map(|i| i * 37 % config.vocab_size as u32).collect();
        let on_cpu = logits(
            &mut CpuAttention::load(&checkpoint, dtype)?,
            &mut CpuFfn::load(&checkpoint, dtype, Shard::WHOLE)?,
            &tokens,
        )?;
        let mut attention = CudaAttention::load(&checkpoint, load, index, &mut |_| {})?;
        let mut ffn = CudaFfn::load(&checkpoint, load, Shard::WHOLE, index, &mut |_| {})?;
        let on_gpu = logits(&mut attention, &mut ffn, &tokens)?;
        let apart = on_cpu.iter().zip(&on_gpu).map(|(a, b)| (a - b).abs());
        let (largest, mean) = (apart.clone().fold(0.0, f32::max), apart.sum::<f32>() / on_cpu.len() as f32);
        let rows = on_cpu.chunks(config.vocab_size).zip(on_gpu.chunks(config.vocab_size));
        let same = rows.filter(|(a, b)| greedy(a).ok() == greedy(b).ok()).count();
        tell(json!({
            "part": "numbers", "what": "logits", "dtype": dtype.name(), "rows": tokens.len(), "largest_difference": largest,
            "mean_difference": mean, "same_tokens": same,
        }))?;
    }
    Ok(())
}

/// Of every row of one sequence.
pub(super) fn logits(
    attention: &mut dyn AttentionStage,
    ffn: &mut dyn FfnStage,
    tokens: &[u32],
) -> Result<Vec<f32>, BenchError> {
    let config = attention.config().clone();
    let mut cache = attention.new_cache(tokens.len())?;
    let sequence = cache.reserve(tokens.len())?;
    let mut all = Vec::new();
    for (number, tokens) in tokens.chunks(256).enumerate() {
        let rows: Vec<Row> = (0..tokens.len()).map(|i| Row { sequence, position: number * 256 + i }).collect();
        let mut x = vec![0.0; rows.len() * config.hidden_size];
        let (mut y, mut out) = (x.clone(), x.clone());
        attention.embed(tokens, &mut x)?;
        for layer in 0..config.num_layers {
            attention.attention(layer, &rows, &mut x, &mut cache, &mut y)?;
            let choices = if config.is_moe(layer) { rows.len() * config.top_k } else { 0 };
            let (mut experts, mut weights) = (vec![0; choices], vec![0.0; choices]);
            if choices > 0 {
                attention.route(layer, &y, &mut experts, &mut weights)?;
            }
            let input = FfnInput { hidden: Hidden::Plain(&y), experts: &experts, weights: &weights };
            ffn.forward(layer, &[input], &mut out)?;
            attention.combine(&mut x, &[&out])?;
        }
        let mut logits = vec![0.0; rows.len() * config.vocab_size];
        attention.logits(&x, &mut logits)?;
        all.extend(logits);
    }
    Ok(all)
}
