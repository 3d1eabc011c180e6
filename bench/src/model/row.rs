//! What was found, in JSON and as lines of a table.

use super::PyTorch;
use crate::Drift;
use serde::Serialize;
use std::fmt;

/// One result.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Row {
    /// A matrix product.
    Gemm(Gemm),
    /// Decoding.
    Decode(Decode),
}

impl Row {
    /// Over products, which come first.
    pub const HEAD: &str = "layer      weights     rows   cols  tokens   GFLOP/s   peak GFLOP/s   ratio";
}

/// A matrix product of an expert's batch.
#[derive(Clone, Debug, Serialize)]
pub struct Gemm {
    /// `gemm`.
    pub op: &'static str,
    /// Which of the expert's.
    pub layer: &'static str,
    /// The weights' type; `w8a8` quantises activations, too, which is part of what is measured.
    pub weights: &'static str,
    /// Of the batch.
    pub tokens: usize,
    /// Of the weights: outputs.
    pub rows: usize,
    /// Of the weights: inputs.
    pub cols: usize,
    /// Threads that share it.
    pub threads: usize,
    /// Two operations for each multiply-add; the median of all repetitions.
    pub gflops: f64,
    /// What the processor does at most, on as many threads.
    pub floor: Floor,
    /// Ours / the floor.
    pub ratio: f64,
    /// How the floor moved.
    pub drift: Drift,
}

/// A most that a rate can be.
#[derive(Clone, Debug, Serialize)]
pub struct Floor {
    /// Of what.
    pub name: &'static str,
    /// Mean of before and after.
    pub gflops: f64,
}

/// Decoding through the daemons, after the prompts.
#[derive(Clone, Debug, Serialize)]
pub struct Decode {
    /// `decode`.
    pub op: &'static str,
    /// The model.
    pub model: String,
    /// Attention instances.
    pub attention: u32,
    /// FFN instances.
    pub ffn: u32,
    /// The transport.
    pub provider: &'static str,
    /// What is computed in.
    pub dtype: String,
    /// Sequences at once.
    pub batch: usize,
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Tokens that each sequence gets.
    pub new_tokens: usize,
    /// CPUs of the whole deployment, and threads of PyTorch.
    pub threads: usize,
    /// All sequences together, once each has its first token; the median of the rounds.
    pub tokens_per_s: f64,
    /// PyTorch, in turn with ours; empty where it is not installed.
    pub peers: Vec<PeerFigures>,
}

/// PyTorch in one of its types.
#[derive(Clone, Debug, Serialize)]
pub struct PeerFigures {
    /// `pytorch`.
    pub peer: &'static str,
    /// Of the package.
    pub version: String,
    /// What it computes in.
    pub dtype: &'static str,
    /// Of the same prompts; the median of the rounds.
    pub tokens_per_s: f64,
    /// Ours / the peer's.
    pub ratio: f64,
}

impl PeerFigures {
    pub(super) fn new(peer: &PyTorch, dtype: &'static str, tokens_per_s: f64, ours: f64) -> Self {
        Self { peer: "pytorch", version: peer.version.clone(), dtype, tokens_per_s, ratio: ours / tokens_per_s }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gemm(row) => row.fmt(f),
            Self::Decode(row) => row.fmt(f),
        }
    }
}

impl fmt::Display for Gemm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, weights, rows, cols, tokens, gflops, floor, ratio, .. } = self;
        let peak = floor.gflops;
        write!(
            f,
            "{layer:<9}  {weights:<7}  {rows:>7}  {cols:>5}  {tokens:>6}  {gflops:>8.1}  {peak:>13.1}  {ratio:>6.2}"
        )?;
        if self.drift.is_steady() {
            Ok(())
        } else {
            write!(f, "  (its floor moved by {:.0} %)", self.drift.share * 100.0)
        }
    }
}

impl fmt::Display for Decode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, attention, ffn, provider, dtype, batch, threads, tokens_per_s, .. } = self;
        write!(
            f,
            "\ndecoding {model}, {batch} sequences, {attention}A{ffn}F over {provider}, {dtype}, {threads} CPUs: \
             {tokens_per_s:.0} tokens/s"
        )?;
        for peer in &self.peers {
            let PeerFigures { version, dtype, tokens_per_s, ratio, .. } = peer;
            write!(
                f,
                "\n  PyTorch {version}, one process, {dtype}: {tokens_per_s:.0} tokens/s; ours is {ratio:.2} times that"
            )?;
        }
        Ok(())
    }
}
