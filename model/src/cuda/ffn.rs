//! The FFN side on a GPU, or one shard of it.

use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use stepmesh_transport::cuda::{Context, Span, Stream};

use super::attention::read_values;
use super::gpu::{Gpu, Grouping, Input};
use super::matrix::{Matrix, PAD, Rows};
use super::memory::{Arena, PATIENCE, Scratch, Staging};
use super::{check_sizes, rounds};
use crate::fp8::{self, fp8_groups};
use crate::load::load;
use crate::mlp::Mlp as Weights;
use crate::stage::{FfnInput, FfnStage, Hidden, check_len, check_segments};
use crate::weights::FfnLayer;
use crate::{Checkpoint, Dtype, LoadOptions, LoadProgress, ModelConfig, ModelError, Shard};

/// The dense layers, routed experts and shared expert of one shard, on a GPU.
pub struct CudaFfn {
    gpu: Gpu,
    config: ModelConfig,
    dtype: Dtype,
    shard: Shard,
    staging: Staging,
    arena: Arena,
    layers: Vec<Layer>,
    scratch: Buffers,
}

enum Layer {
    Dense(Box<Mlp>),
    Moe { held: Range<usize>, experts: Option<Box<Mlp>>, shared: Box<Mlp> },
}

/// A gated MLP, or as many of one shape as there are experts.
struct Mlp {
    /// Gate and up, one under the other.
    inward: Matrix,
    down: Matrix,
    /// The intermediate width, padded.
    width: usize,
}

#[derive(Default)]
struct Buffers {
    both: Scratch,
    act: Scratch,
    codes: Scratch,
    scales: Scratch,
    ends: Scratch,
    order: Scratch,
    place: Scratch,
    results: Scratch,
    shared: Scratch,
    x: Scratch,
    x_codes: Scratch,
    x_scales: Scratch,
    ids: Scratch,
    weights: Scratch,
    out: Scratch,
}

/// Rows on the device as they came, and what the router chose for them.
#[derive(Clone, Debug)]
pub struct DeviceInput {
    /// Activations `[rows, hidden]`, as the compute type has them.
    pub hidden: Span,
    /// Experts `[rows, top_k]`, 16 bits each; nothing for a dense layer.
    pub experts: Option<Span>,
    /// Their weights `[rows, top_k]`, f32; nothing for a dense layer.
    pub weights: Option<Span>,
    /// The same activations as FP8 codes and scales, where they came so; what needs them makes them otherwise.
    pub quantised: Option<(Span, Span)>,
}

impl CudaFfn {
    /// Loads the part of `checkpoint`'s FFN side that `shard` holds to GPU `index`; `observe` hears how far it is.
    ///
    /// # Errors
    /// As [`crate::CpuFfn::load`]; [`ModelError::Cuda`], [`ModelError::Kernels`], [`ModelError::Unsupported`].
    pub fn load(
        checkpoint: &Checkpoint,
        options: LoadOptions,
        shard: Shard,
        index: u32,
        observe: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let (config, dtype) = (checkpoint.config().clone(), options.dtype);
        check_sizes(&config)?;
        let gpu = Gpu::open(&Context::open(index)?, rounds(dtype)?)?;
        let (mut arena, staging) = (Arena::new(&gpu.context), Staging::new(&gpu.context)?);
        let layers = load(checkpoint, dtype, observe, |loader| {
            let arena = &mut arena;
            let mut layers = Vec::with_capacity(config.num_layers);
            for layer in 0..config.num_layers {
                layers.push(match FfnLayer::<Rows>::load(loader, &config, shard, layer)? {
                    FfnLayer::Dense(mlp) => Layer::Dense(Box::new(Mlp::upload(vec![mlp], dtype, arena, &staging)?)),
                    FfnLayer::Moe { first, experts, shared } => Layer::Moe {
                        held: first..first + experts.len(),
                        experts: match experts.is_empty() {
                            true => None,
                            false => Some(Box::new(Mlp::upload(experts, dtype, arena, &staging)?)),
                        },
                        shared: Box::new(Mlp::upload(vec![shared], dtype, arena, &staging)?),
                    },
                });
            }
            Ok(layers)
        })?;
        Ok(Self { gpu, config, dtype, shard, staging, arena, layers, scratch: Buffers::default() })
    }

    /// A model whose weights are noise, for measurements.
    ///
    /// # Errors
    /// As [`CudaFfn::load`].
    pub fn of_noise(config: ModelConfig, dtype: Dtype, shard: Shard, index: u32) -> Result<Self, ModelError> {
        check_sizes(&config)?;
        let gpu = Gpu::open(&Context::open(index)?, rounds(dtype)?)?;
        let (mut arena, staging) = (Arena::new(&gpu.context), Staging::new(&gpu.context)?);
        let mut noise = super::measure::Noise { gpu: &gpu, arena: &mut arena, staging: &staging, dtype, seed: 1 << 20 };
        let hidden = config.hidden_size;
        let mut mlp = |full: usize, shard: Shard, count: usize| -> Result<Mlp, ModelError> {
            let width = shard.range_of(full, 1).len().next_multiple_of(PAD);
            let (inward, down) = (noise.matrix(2 * width, hidden, count)?, noise.matrix(hidden, width, count)?);
            Ok(Mlp { inward, down, width })
        };
        let mut layers = Vec::new();
        for layer in 0..config.num_layers {
            if !config.is_moe(layer) {
                layers.push(Layer::Dense(Box::new(mlp(config.intermediate_size, shard, 1)?)));
                continue;
            }
            let held = shard.experts(&config);
            layers.push(Layer::Moe {
                experts: Some(Box::new(mlp(config.moe_intermediate_size, shard.of_expert(), held.len())?)),
                held,
                shared: Box::new(mlp(config.share_expert_dim, shard, 1)?),
            });
        }
        staging.stream().finish(PATIENCE)?;
        Ok(Self { gpu, config, dtype, shard, staging, arena, layers, scratch: Buffers::default() })
    }

    /// The GPU that it is on.
    pub fn context(&self) -> &Arc<Context> {
        &self.gpu.context
    }

    /// Device memory of so many bytes that lives as long as this.
    ///
    /// # Errors
    /// [`ModelError::Cuda`].
    pub fn take(&mut self, bytes: usize) -> Result<Span, ModelError> {
        self.arena.take(bytes)
    }

    /// Rows that are noise, for measurements.
    ///
    /// # Errors
    /// [`ModelError::Cuda`].
    pub fn noise(&mut self, elements: usize) -> Result<Span, ModelError> {
        let span = self.arena.take(elements * self.gpu.element())?;
        self.gpu.fill(&self.staging.stream(), &span, 1.0, 3)?;
        self.staging.stream().finish(PATIENCE)?;
        Ok(span)
    }

    /// A router's choices on the device: experts and their weights.
    ///
    /// # Errors
    /// [`ModelError::Cuda`].
    pub fn choices(&mut self, experts: &[u16], weights: &[f32]) -> Result<(Span, Span), ModelError> {
        let (ids, with) = (self.arena.take(experts.len() * 2)?, self.arena.take(weights.len() * 4)?);
        self.staging.upload(experts.iter().copied(), &ids)?;
        self.staging.upload(weights.iter().copied(), &with)?;
        Ok((ids, with))
    }

    /// Bytes of an activation.
    pub fn element(&self) -> usize {
        self.gpu.element()
    }

    /// Puts activations on a stream that came as FP8: codes `[rows, hidden]`, and scales of 32 bits for every 128 of them.
    ///
    /// # Errors
    /// Spans of other lengths.
    pub fn dequantise_on(
        &self,
        stream: &Stream,
        rows: usize,
        codes: &Span,
        scales: &Span,
        out: &Span,
    ) -> Result<(), ModelError> {
        let hidden = self.config.hidden_size;
        check_len("codes", codes.len(), rows * hidden)?;
        check_len("scales", scales.len(), rows * fp8_groups(hidden) * 4)?;
        check_len("out", out.len(), rows * hidden * self.gpu.element())?;
        self.gpu.dequantise(stream, out, codes, scales, hidden)
    }

    /// Puts a layer on a stream, as [`FfnStage::forward`] does it: `out` `[rows, hidden]`, as activations are. What peers sent is
    /// not checked here: an expert that this shard does not hold, or that does not exist, adds nothing.
    ///
    /// # Errors
    /// A layer that does not exist; spans of other lengths; [`ModelError::Cuda`].
    pub fn forward_on(
        &mut self,
        stream: &Stream,
        layer: usize,
        rows: usize,
        input: &DeviceInput,
        out: &Span,
    ) -> Result<(), ModelError> {
        check_len("hidden", input.hidden.len(), rows * self.config.hidden_size * self.gpu.element())?;
        if let Some((codes, scales)) = &input.quantised {
            check_len("codes", codes.len(), rows * self.config.hidden_size)?;
            check_len("scales", scales.len(), rows * fp8_groups(self.config.hidden_size) * 4)?;
        }
        let Self { gpu, config, dtype, layers, scratch, .. } = self;
        let weights = layers.get(layer).ok_or(ModelError::Layer { layer, reason: "does not exist" })?;
        let (hidden, element, ctx) = (config.hidden_size, gpu.element(), gpu.context.clone());
        check_len("out", out.len(), rows * hidden * element)?;
        let quantised = match input.quantised.clone() {
            None if dtype.quantises() => {
                let codes = scratch.x_codes.room(&ctx, rows * hidden)?;
                let scales = scratch.x_scales.room(&ctx, rows * fp8_groups(hidden) * 4)?;
                gpu.quantise(stream, &codes, &scales, &input.hidden, hidden, rows)?;
                Some((codes, scales))
            }
            given => given,
        };
        let x = Input { plain: input.hidden.clone(), quantised };
        let (held, experts, shared) = match weights {
            Layer::Dense(mlp) => return mlp.apply(gpu, stream, scratch, &x, rows, out, rows, None),
            Layer::Moe { held, experts, shared } => (held, experts, shared),
        };
        let top_k = config.top_k;
        let (Some(ids), Some(chosen)) = (&input.experts, &input.weights) else {
            return Err(ModelError::Length { argument: "experts", found: 0, expected: rows * top_k });
        };
        check_len("experts", ids.len(), rows * top_k * 2)?;
        check_len("weights", chosen.len(), rows * top_k * 4)?;
        let visits = rows * top_k;
        let ends = scratch.ends.room(&ctx, held.len().max(1) * 4)?;
        let order = scratch.order.room(&ctx, visits * 4)?;
        let place = scratch.place.room(&ctx, visits * 4)?;
        let results = scratch.results.room(&ctx, visits * hidden * element)?;
        let of_shared = scratch.shared.room(&ctx, rows * hidden * element)?;
        gpu.sort_visits(stream, &ends, &order, &place, ids, [rows, top_k], held.clone())?;
        if let Some(experts) = experts {
            let average = visits.div_ceil(config.num_experts.max(1));
            experts.apply(gpu, stream, scratch, &x, visits, &results, average, Some((&ends, &order)))?;
        }
        shared.apply(gpu, stream, scratch, &x, rows, &of_shared, rows, None)?;
        gpu.gather_results(stream, out, &results, &of_shared, (ids, chosen, &place), [rows, top_k, hidden])
    }
}

impl Mlp {
    fn upload(
        mlps: Vec<Weights<Rows>>,
        dtype: Dtype,
        arena: &mut Arena,
        staging: &Staging,
    ) -> Result<Self, ModelError> {
        let width = mlps.first().map_or(0, |mlp| mlp.width).next_multiple_of(PAD);
        let (mut inward, mut down) = (Vec::new(), Vec::new());
        for mlp in mlps {
            inward.push(vec![mlp.gate, mlp.up]);
            down.push(vec![mlp.down]);
        }
        Ok(Self {
            inward: Matrix::upload(inward, true, dtype, arena, staging)?,
            down: Matrix::upload(down, false, dtype, arena, staging)?,
            width,
        })
    }

    /// `visits` are how many rows of results there are at most; `sorted` says which row each is of, if they are of experts.
    #[allow(clippy::too_many_arguments, reason = "what an MLP takes")]
    fn apply(
        &self,
        gpu: &Gpu,
        stream: &Stream,
        scratch: &mut Buffers,
        x: &Input,
        visits: usize,
        out: &Span,
        average: usize,
        sorted: Option<(&Span, &Span)>,
    ) -> Result<(), ModelError> {
        let (ctx, element, width) = (gpu.context.clone(), gpu.element(), self.width);
        if width == 0 {
            // A shard may hold nothing of a small matrix.
            return gpu.fill(stream, out, 0.0, 0);
        }
        let both = scratch.both.room(&ctx, visits * 2 * width * element)?;
        let act = scratch.act.room(&ctx, visits * width * element)?;
        let grouping = |order| match sorted {
            None => Grouping::One,
            Some((ends, _)) => Grouping::Experts { ends, order, average },
        };
        gpu.multiply(stream, &self.inward, x, visits, &both, grouping(sorted.map(|(_, order)| order)))?;
        gpu.silu_times(stream, &act, &both, width, visits)?;
        let mut input = Input { plain: act.clone(), quantised: None };
        if self.down.is_fp8 {
            let codes = scratch.codes.room(&ctx, visits * width)?;
            let scales = scratch.scales.room(&ctx, visits * fp8_groups(width) * 4)?;
            gpu.quantise(stream, &codes, &scales, &act, width, visits)?;
            input.quantised = Some((codes, scales));
        }
        gpu.multiply(stream, &self.down, &input, visits, out, grouping(None))
    }
}

impl FfnStage for CudaFfn {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn shard(&self) -> Shard {
        self.shard
    }

    fn weight_bytes(&self) -> usize {
        self.arena.bytes()
    }

    fn forward(&mut self, layer: usize, segments: &[FfnInput<'_>], out: &mut [f32]) -> Result<(), ModelError> {
        let (hidden, quantises) = (self.config.hidden_size, self.dtype.quantises());
        let top_k = match self.layers.get(layer) {
            None => return Err(ModelError::Layer { layer, reason: "does not exist" }),
            Some(Layer::Dense(_)) => 0,
            Some(Layer::Moe { .. }) => self.config.top_k,
        };
        let rows = check_segments(&self.config, top_k, segments)?;
        check_len("out", out.len(), rows * hidden)?;
        if rows == 0 {
            return Ok(());
        }
        let groups = fp8_groups(hidden);
        let (mut plain, mut codes, mut scales) = (vec![0.0; rows * hidden], Vec::new(), Vec::new());
        let mut row = 0;
        for segment in segments {
            let count = segment.hidden.len() / hidden;
            let place = &mut plain[row * hidden..][..count * hidden];
            row += count;
            match segment.hidden {
                Hidden::Plain(values) => {
                    place.copy_from_slice(values);
                    if quantises {
                        let (mut of, mut with) = (vec![0; count * hidden], vec![0.0; count * groups]);
                        fp8::quantise_rows(values, hidden, &mut of, &mut with)?;
                        codes.extend(of);
                        scales.extend(with);
                    }
                }
                Hidden::Fp8 { codes: arrived, scales: with } => {
                    fp8::dequantise_rows(arrived, with, hidden, place);
                    if quantises {
                        codes.extend_from_slice(arrived);
                        scales.extend_from_slice(with);
                    }
                }
            }
        }
        let (ctx, element) = (self.gpu.context.clone(), self.gpu.element());
        let x = self.scratch.x.room(&ctx, rows * hidden * element)?;
        match self.gpu.rounds {
            true => self.staging.upload(plain.iter().map(|value| bf16::from_f32(*value)), &x)?,
            false => self.staging.upload(plain.iter().copied(), &x)?,
        }
        let mut input = DeviceInput { hidden: x, experts: None, weights: None, quantised: None };
        if top_k > 0 {
            let ids = self.scratch.ids.room(&ctx, rows * top_k * 2)?;
            let weights = self.scratch.weights.room(&ctx, rows * top_k * 4)?;
            self.staging.upload(segments.iter().flat_map(|segment| segment.experts.iter().copied()), &ids)?;
            self.staging.upload(segments.iter().flat_map(|segment| segment.weights.iter().copied()), &weights)?;
            (input.experts, input.weights) = (Some(ids), Some(weights));
        }
        input.quantised = match quantises {
            true => {
                let place = self.scratch.x_codes.room(&ctx, codes.len())?;
                let with = self.scratch.x_scales.room(&ctx, scales.len() * 4)?;
                self.staging.upload_bytes(&codes, &place)?;
                self.staging.upload(scales, &with)?;
                Some((place, with))
            }
            false => None,
        };
        let result = self.scratch.out.room(&ctx, rows * hidden * element)?;
        let stream = self.staging.stream();
        self.forward_on(&stream, layer, rows, &input, &result)?;
        read_values(&self.staging, self.gpu.rounds, &result, out)
    }
}
