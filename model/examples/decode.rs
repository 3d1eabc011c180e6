//! Decodes on one thread and prints the time of a step, side by side: `decode CHECKPOINT [BATCH] [PROMPT] [STEPS]`.

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use stepmesh_model::{
    AttentionStage, Checkpoint, CpuAttention, CpuFfn, Dtype, FfnInput, FfnStage, Hidden, KvCache, Row, Shard, greedy,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().ok_or("usage: decode CHECKPOINT [BATCH] [PROMPT] [STEPS]")?);
    let mut number = |default| args.next().map_or(Ok(default), |arg| arg.parse::<usize>());
    let (batch, prompt, steps) = (number(1)?, number(1)?, number(200)?);

    let checkpoint = Checkpoint::open(&dir)?;
    let config = checkpoint.config().clone();
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let mut attention = CpuAttention::load(&checkpoint, dtype)?;
        let mut ffn = CpuFfn::load(&checkpoint, dtype, Shard::WHOLE)?;
        let mut cache = KvCache::new(&config, dtype, batch * (prompt + steps).next_multiple_of(16))?;
        let mut sequences = Vec::new();
        for _ in 0..batch {
            sequences.push(cache.reserve(prompt + steps)?);
        }
        let mut tokens = vec![config.bos_token_id.unwrap_or(0); batch];
        let choices = batch * config.top_k;
        let (mut ids, mut weights) = (vec![0; choices], vec![0.0; choices]);
        let (mut x, mut logits) = (vec![0.0; batch * config.hidden_size], vec![0.0; batch * config.vocab_size]);
        let (mut y, mut f) = (x.clone(), x.clone());
        let (mut attention_time, mut ffn_time) = (Duration::ZERO, Duration::ZERO);
        for position in 0..prompt + steps {
            if position == prompt {
                (attention_time, ffn_time) = (Duration::ZERO, Duration::ZERO);
            }
            let rows: Vec<Row> = sequences.iter().map(|sequence| Row { sequence: *sequence, position }).collect();
            let start = Instant::now();
            let ffn_before = ffn_time;
            attention.embed(&tokens, &mut x)?;
            for layer in 0..config.num_layers {
                attention.attention(layer, &rows, &mut x, &mut cache, &mut y)?;
                let moe = if config.is_moe(layer) { choices } else { 0 };
                if moe > 0 {
                    attention.route(layer, &y, &mut ids, &mut weights)?;
                }
                let input = FfnInput { hidden: Hidden::Plain(&y), experts: &ids[..moe], weights: &weights[..moe] };
                let start = Instant::now();
                ffn.forward(layer, &[input], &mut f)?;
                ffn_time += start.elapsed();
                attention.combine(&mut x, &[&f])?;
            }
            attention.logits(&x, &mut logits)?;
            for (token, logits) in tokens.iter_mut().zip(logits.chunks_exact(config.vocab_size)) {
                *token = greedy(logits)?;
            }
            attention_time += start.elapsed() - (ffn_time - ffn_before);
        }
        let ms = |time: Duration| time.as_secs_f64() * 1e3 / steps as f64;
        let (attention, ffn) = (ms(attention_time), ms(ffn_time));
        println!(
            "{dtype}: batch {batch}, context {prompt}+{steps}: {:.4} ms a step (attention side {attention:.4}, FFN side {ffn:.4}), {:.4} ms a token",
            attention + ffn,
            (attention + ffn) / batch as f64,
        );
    }
    Ok(())
}
