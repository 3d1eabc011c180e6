//! The crate's one error: every variant names the file, tensor or argument at fault and what to do about it.

use std::path::PathBuf;

use crate::Dtype;
use stepmesh_transport::TransportError;
use stepmesh_transport::cuda::CudaError;

/// What can go wrong between a checkpoint on disk and a row of logits.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The GPU or its driver.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// Host memory for what goes to the GPU and comes back.
    #[error(transparent)]
    Memory(#[from] TransportError),
    /// Kernels cannot be compiled.
    #[error("kernels cannot be compiled: {reason}")]
    Kernels {
        /// What is missing, or what the compiler said.
        reason: String,
    },
    /// A library of the GPU's refused.
    #[error("{call} failed: {status}; the log of the driver (`dmesg`, `nvidia-smi -q`) may say why")]
    Library {
        /// The call.
        call: &'static str,
        /// Its answer.
        status: i32,
    },
    /// A model or a type that the kernels are not made for.
    #[error("the GPU's kernels do not do that: {reason}")]
    Unsupported {
        /// What, and what to use.
        reason: String,
    },
    /// A file of the checkpoint cannot be opened, mapped or read.
    #[error("cannot read {}: {source}; check that the checkpoint is complete and readable", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file does not parse.
    #[error("{origin} is not valid JSON: {source}; download it again")]
    Json {
        /// The file.
        origin: String,
        /// Where and why parsing stopped.
        source: serde_json::Error,
    },
    /// A field of a configuration is missing, of the wrong type, or has a value that this crate cannot honour.
    #[error("{origin}: field `{field}` {reason}")]
    Config {
        /// The file.
        origin: String,
        /// The field, with a dotted path for nested ones.
        field: String,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// A safetensors file is truncated, corrupt, or declares overlapping tensors.
    #[error("{file} is not a usable safetensors file: {reason}; download it again")]
    Safetensors {
        /// The file.
        file: String,
        /// What the header check found.
        reason: String,
    },
    /// The index file of a sharded checkpoint contradicts the files beside it.
    #[error("{index}: {reason}; download the checkpoint again")]
    Index {
        /// The index file.
        index: String,
        /// The contradiction, naming the tensor or the file.
        reason: String,
    },
    /// A tensor that the configuration calls for is in no file of the checkpoint.
    #[error(
        "tensor `{tensor}` is missing from {origin}; config.json does not belong to these weights, or a file is missing"
    )]
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// The file or files searched.
        origin: String,
    },
    /// A tensor's shape contradicts the configuration.
    #[error("tensor `{tensor}` in {file} has shape {found:?}, but config.json calls for {expected:?}")]
    TensorShape {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        file: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// A tensor's element type cannot be loaded.
    #[error("tensor `{tensor}` in {file} has dtype {dtype}; {advice}")]
    TensorDtype {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        file: String,
        /// The element type in the file.
        dtype: String,
        /// What to do instead.
        advice: &'static str,
    },
    /// A weight is NaN or infinite.
    #[error("tensor `{tensor}` in {file} holds the value {value} at element {element}; the weights are damaged")]
    NonFiniteWeight {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        file: String,
        /// The first such element, counted in row-major order from the tensor's start.
        element: usize,
        /// The value.
        value: f32,
    },
    /// A buffer handed to a stage does not have the size that the other arguments imply.
    #[error("`{argument}` has {found} elements, expected {expected}")]
    Length {
        /// The argument.
        argument: &'static str,
        /// Its length, in elements.
        found: usize,
        /// The length implied by the other arguments, in elements.
        expected: usize,
    },
    /// A layer that the model does not have, or one of the wrong kind.
    #[error("layer {layer} {reason}")]
    Layer {
        /// The layer, counted from 0.
        layer: usize,
        /// Why it cannot be run.
        reason: &'static str,
    },
    /// A token id outside the vocabulary.
    #[error("token {token} at row {row} is outside the vocabulary of {vocab_size}")]
    Token {
        /// The id.
        token: u32,
        /// The row it came in.
        row: usize,
        /// The vocabulary's size.
        vocab_size: usize,
    },
    /// A row's position does not continue what the cache holds of its sequence.
    #[error("row {row}: position {position} {reason}")]
    Position {
        /// The row in the batch.
        row: usize,
        /// The position asked for.
        position: usize,
        /// Why it cannot be run.
        reason: String,
    },
    /// A cache handle that was freed, or that belongs to another cache.
    #[error("the key/value cache does not hold this sequence; it was freed, or it belongs to another cache")]
    UnknownSequence,
    /// A cache that was made for another model or data type.
    #[error("the key/value cache was made for {found}, but this model needs {expected}")]
    CacheMismatch {
        /// Layers, head dimension and dtype of the cache.
        found: String,
        /// Layers, head dimension and dtype of the model.
        expected: String,
    },
    /// The key/value cache has no room for a sequence now; free one, wait, or make the cache larger.
    #[error("the key/value cache is full: {needed_blocks} blocks needed, {free_blocks} of {total_blocks} free")]
    CacheFull {
        /// Blocks that the sequence needs.
        needed_blocks: usize,
        /// Blocks free now.
        free_blocks: usize,
        /// Blocks in the cache.
        total_blocks: usize,
    },
    /// A sequence longer than the model's context, or of no tokens.
    #[error("a sequence of {tokens} tokens cannot be reserved; the model's context is 1 to {context} tokens")]
    SequenceLength {
        /// The length asked for, in tokens.
        tokens: usize,
        /// The model's context length, in tokens.
        context: usize,
    },
    /// A key/value cache of an impossible size.
    #[error("cannot make a key/value cache of {tokens} tokens ({bytes_per_token} bytes a token): {reason}")]
    CacheSize {
        /// The capacity asked for, in tokens.
        tokens: usize,
        /// Bytes of one token over all layers.
        bytes_per_token: usize,
        /// Why it cannot be made.
        reason: &'static str,
    },
    /// A row names an expert that the model does not have, or names one twice.
    #[error("segment {segment}, row {row}: expert id {expert} {reason}")]
    Expert {
        /// The segment of the batch.
        segment: usize,
        /// The row in its segment.
        row: usize,
        /// The id received.
        expert: u16,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A row carries a routing weight that is NaN or infinite.
    #[error("segment {segment}, row {row}: routing weight {weight} of expert {expert} is not finite")]
    ExpertWeight {
        /// The segment of the batch.
        segment: usize,
        /// The row in its segment.
        row: usize,
        /// The expert.
        expert: u16,
        /// The weight received.
        weight: f32,
    },
    /// A shard number that its count does not allow.
    #[error("shard {index} of {count} does not exist; shards are counted from 0")]
    Shard {
        /// The shard's number.
        index: usize,
        /// The number of shards.
        count: usize,
    },
    /// A row of activations is so damaged that its experts cannot be chosen.
    #[error("row {row} of `{argument}` is not finite; a hidden state or a partial result was damaged on the way")]
    NonFiniteRow {
        /// The argument.
        argument: &'static str,
        /// The row.
        row: usize,
    },
    /// A logit is NaN, so that no token can be chosen.
    #[error("logit {token} is NaN; a hidden state or a partial result was damaged on the way")]
    NanLogit {
        /// The vocabulary index of the first such logit.
        token: usize,
    },
    /// A sampling option that makes no sense.
    #[error("{option} is {value}; it must be {expected}")]
    Sampling {
        /// The option.
        option: &'static str,
        /// Its value.
        value: f32,
        /// What it may be.
        expected: &'static str,
    },
    /// A tokenizer's file that cannot be used, or a text that it fails on.
    #[error("{file}: {reason}")]
    Tokenizer {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// A conversation that cannot be written as the model wants it.
    #[error("chat template: {reason}")]
    ChatTemplate {
        /// What is wrong.
        reason: String,
    },
    /// A number of compute threads that cannot be had.
    #[error("{threads} compute threads: {reason}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// Why not.
        reason: String,
    },
    /// A compute type that multiplies FP8 weights, for a checkpoint that has none.
    #[error("{dtype} needs FP8 weights, which config.json says this checkpoint has not; compute in bf16 or f32")]
    NotFp8 {
        /// The compute type.
        dtype: Dtype,
    },
    /// An FP8 tensor without its scales.
    #[error(
        "tensor `{tensor}` in {file} is FP8, but its scales `{tensor}_scale_inv` are missing; the checkpoint is damaged"
    )]
    MissingScale {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        file: String,
    },
    /// A scale of FP8 weights that is negative, NaN or infinite.
    #[error(
        "`{tensor}` in {file} holds the scale {value}; scales are finite and not negative, the checkpoint is damaged"
    )]
    Scale {
        /// The tensor of scales.
        tensor: String,
        /// The file that holds it.
        file: String,
        /// The scale.
        value: f32,
    },
    /// A part of an FP8 tensor that does not begin at a block of its scales.
    #[error("tensor `{tensor}` is FP8 and can be cut at multiples of 128 only, not at {at}")]
    Fp8Cut {
        /// The tensor.
        tensor: String,
        /// Where it was to be cut.
        at: usize,
    },
    /// A tensor-parallel degree that the number of FFN instances does not allow.
    #[error(
        "{count} FFN instances cannot form groups of {tensor}; the tensor-parallel degree must divide their number"
    )]
    TensorParallel {
        /// Instances that each expert was to be cut among.
        tensor: usize,
        /// FFN instances.
        count: usize,
    },
}
