//! Stages that compute nothing and take a given time, the machine's or a virtual one: what they would send has one row and
//! is of no value.

use super::board::Board;
use crate::cpus::thread_time;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use stepmesh_model::{AttentionStage, Dtype, FfnInput, FfnStage, KvCache, ModelConfig, ModelError, Row, Shard};
use stepmesh_transport::Clock;

/// Sleeping may take this much longer than asked: the rest is spun away.
const MARGIN: Duration = Duration::from_micros(150);

/// A model of so many dense layers, as small as a model can be.
pub(super) fn config(layers: u32) -> Result<ModelConfig, ModelError> {
    let json = format!(
        r#"{{"model_type": "step3_text", "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1,
            "num_attention_groups": 1, "num_hidden_layers": {layers}, "max_seq_len": 4096, "vocab_size": 2,
            "rms_norm_eps": 1e-05, "moe_intermediate_size": 8, "moe_num_experts": 1, "moe_top_k": 1,
            "rope_theta": 500000.0, "share_expert_dim": 8, "share_q_dim": 8, "head_dim": 2, "moe_layers_enum": ""}}"#
    );
    ModelConfig::from_json(&json, "the synthetic model")
}

/// What a side's stage takes, and has taken.
#[derive(Clone)]
pub(super) struct Pace {
    clock: Clock,
    board: Board,
    end: usize,
}

impl Pace {
    /// Of end 0, attention, or 1, FFN.
    pub(super) fn new(clock: Clock, board: Board, end: usize) -> Self {
        Self { clock, board, end }
    }

    pub(super) fn set(&self, time: Duration) {
        self.board.sides[self.end].stage_ns.store(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Time spent computing so far.
    pub(super) fn busy(&self) -> Duration {
        Duration::from_nanos(self.board.sides[self.end].busy_ns.load(Ordering::Relaxed))
    }

    /// CPU time that the stage's thread had used when the stage last began.
    pub(super) fn cpu(&self) -> Duration {
        Duration::from_nanos(self.board.sides[self.end].cpu_ns.load(Ordering::Relaxed))
    }

    fn spend(&self) {
        let side = &self.board.sides[self.end];
        let time = Duration::from_nanos(side.stage_ns.load(Ordering::Relaxed));
        if time.is_zero() {
            return;
        }
        let start = self.clock.now();
        // Asked for while the stage lasts: the kernel is, and what follows a stage waits for it.
        side.cpu_ns.store(thread_time().as_nanos() as u64, Ordering::Relaxed);
        let spent = compute(&self.clock, start, time);
        side.busy_ns.fetch_add(spent.as_nanos() as u64, Ordering::Relaxed);
    }
}

/// Whether a stage is long enough for that. One that only spins leaves its CPU to nobody, so it must not be real-time.
pub(super) fn sleeps(time: Duration) -> bool {
    time > MARGIN
}

/// Takes a time from `start` on: sleeps most of it and spins the rest. The time that it took.
pub(super) fn compute(clock: &Clock, start: Instant, time: Duration) -> Duration {
    if clock.is_manual() {
        clock.advance(time);
    } else if sleeps(time) {
        std::thread::sleep(time - MARGIN);
    }
    let mut spent = clock.now() - start;
    while spent < time {
        std::hint::spin_loop();
        spent = clock.now() - start;
    }
    spent
}

pub(super) struct SyntheticAttention {
    pub(super) config: ModelConfig,
    pub(super) pace: Pace,
}

impl AttentionStage for SyntheticAttention {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn weight_bytes(&self) -> usize {
        0
    }

    fn embed(&mut self, _: &[u32], _: &mut [f32]) -> Result<(), ModelError> {
        Ok(())
    }

    fn attention(
        &mut self,
        _: usize,
        _: &[Row],
        _: &mut [f32],
        _: &mut KvCache,
        _: &mut [f32],
    ) -> Result<(), ModelError> {
        self.pace.spend();
        Ok(())
    }

    fn route(&mut self, _: usize, _: &[f32], _: &mut [u16], _: &mut [f32]) -> Result<(), ModelError> {
        Ok(())
    }

    fn combine(&mut self, _: &mut [f32], _: &[&[f32]]) -> Result<(), ModelError> {
        Ok(())
    }

    fn logits(&mut self, _: &[f32], logits: &mut [f32]) -> Result<(), ModelError> {
        logits.fill(0.0);
        Ok(())
    }
}

pub(super) struct SyntheticFfn {
    pub(super) config: ModelConfig,
    pub(super) pace: Pace,
}

impl FfnStage for SyntheticFfn {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn shard(&self) -> Shard {
        Shard::WHOLE
    }

    fn weight_bytes(&self) -> usize {
        0
    }

    fn forward(&mut self, _: usize, _: &[FfnInput<'_>], _: &mut [f32]) -> Result<(), ModelError> {
        self.pace.spend();
        Ok(())
    }
}
