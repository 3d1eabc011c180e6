//! The attention side on a GPU.

use std::sync::Arc;

use half::bf16;
use stepmesh_transport::cuda::{Context, Span, Stream};

use super::cache::{Batch, CudaCache};
use super::gpu::{CachePlace, Gpu, Grouping, Heads, Input, MOST_PARTIALS, RowPlaces};
use super::matrix::{Matrix, Rows, upload_table};
use super::memory::{Arena, PATIENCE, Scratch, Staging};
use super::{check_sizes, rounds};
use crate::cache::BLOCK_TOKENS;
use crate::fp8::fp8_groups;
use crate::load::load;
use crate::stage::{AttentionStage, Row, check_len, check_tokens, whole_rows};
use crate::weights::AttentionLayer;
use crate::{Checkpoint, Dtype, KvCache, LoadOptions, LoadProgress, ModelConfig, ModelError};

/// Tokens of a part of a long sequence, each of which is attended to on its own.
const SPLIT: usize = 2048;

/// Embedding, attention, norms, routers and output head of the whole model, on a GPU.
pub struct CudaAttention {
    gpu: Gpu,
    config: ModelConfig,
    dtype: Dtype,
    staging: Staging,
    arena: Arena,
    embedding: (Span, bool),
    layers: Vec<Layer>,
    final_norm: Span,
    head: Matrix,
    frequencies: Span,
    split: usize,
    scratch: Buffers,
}

struct Layer {
    input_norm: Span,
    /// The low-rank query, key and value, one under the other.
    inward: Matrix,
    query_norm: Span,
    query_up: Matrix,
    output: Matrix,
    post_norm: Span,
    router: Option<Matrix>,
}

#[derive(Default)]
struct Buffers {
    normed: Scratch,
    inward: Scratch,
    low_rank: Scratch,
    query: Scratch,
    heads: Scratch,
    parts: Scratch,
    states: Scratch,
    codes: Scratch,
    scales: Scratch,
    scores: Scratch,
    x: Scratch,
    y: Scratch,
    ids: Scratch,
    chosen: Scratch,
    partials: Scratch,
    tokens: Scratch,
    logits: Scratch,
    positions: Scratch,
    tables: Scratch,
}

impl CudaAttention {
    /// Loads the attention side of `checkpoint` to GPU `index`; `observe` hears how far it is.
    ///
    /// # Errors
    /// As [`crate::CpuAttention::load`]; [`ModelError::Cuda`], [`ModelError::Kernels`], [`ModelError::Unsupported`].
    pub fn load(
        checkpoint: &Checkpoint,
        options: LoadOptions,
        index: u32,
        observe: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let (config, dtype) = (checkpoint.config().clone(), options.dtype);
        check_sizes(&config)?;
        let gpu = Gpu::open(&Context::open(index)?, rounds(dtype)?)?;
        let (mut arena, staging) = (Arena::new(&gpu.context), Staging::new(&gpu.context)?);
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        // The first pass only checks; what it would upload is empty.
        let loaded = load(checkpoint, dtype, observe, |loader| {
            let arena = &mut arena;
            let table = loader.table("model.embed_tokens.weight", vocabulary, hidden)?;
            let embedding = upload_table(&table, arena, &staging)?;
            let mut layers = Vec::with_capacity(config.num_layers);
            for layer in 0..config.num_layers {
                let weights = AttentionLayer::<Rows>::load(loader, &config, layer)?;
                layers.push(Layer::upload(weights, dtype, arena, &staging)?);
            }
            let final_norm = upload_norm(&loader.norm("model.norm.weight", hidden)?, arena, &staging)?;
            let head = loader.matrix("lm_head.weight", vocabulary, hidden)?;
            let head = Matrix::upload(vec![vec![head]], false, dtype, arena, &staging)?;
            Ok((embedding, layers, final_norm, head))
        })?;
        Self::of(gpu, config, dtype, staging, arena, loaded)
    }

    /// A model whose weights are noise, for measurements.
    ///
    /// # Errors
    /// As [`CudaAttention::load`].
    pub fn of_noise(config: ModelConfig, dtype: Dtype, index: u32) -> Result<Self, ModelError> {
        check_sizes(&config)?;
        let gpu = Gpu::open(&Context::open(index)?, rounds(dtype)?)?;
        let (mut arena, staging) = (Arena::new(&gpu.context), Staging::new(&gpu.context)?);
        let mut noise = super::measure::Noise { gpu: &gpu, arena: &mut arena, staging: &staging, dtype, seed: 0 };
        let (hidden, share_q, dim) = (config.hidden_size, config.share_q_dim, config.head_dim);
        let all_heads = config.num_heads * dim;
        let embedding = (noise.values(config.vocab_size * hidden, 1.0)?, gpu.rounds);
        let mut layers = Vec::new();
        for layer in 0..config.num_layers {
            layers.push(Layer {
                input_norm: noise.ones(hidden)?,
                inward: noise.matrix(share_q + 2 * dim, hidden, 1)?,
                query_norm: noise.ones(share_q)?,
                query_up: noise.matrix(all_heads, share_q, 1)?,
                output: noise.matrix(hidden, all_heads, 1)?,
                post_norm: noise.ones(hidden)?,
                router: config.is_moe(layer).then(|| noise.plain_matrix(config.num_experts, hidden)).transpose()?,
            });
        }
        let (final_norm, head) = (noise.ones(hidden)?, noise.plain_matrix(config.vocab_size, hidden)?);
        staging.stream().finish(PATIENCE)?;
        Self::of(gpu, config, dtype, staging, arena, (embedding, layers, final_norm, head))
    }

    fn of(
        gpu: Gpu,
        config: ModelConfig,
        dtype: Dtype,
        staging: Staging,
        mut arena: Arena,
        (embedding, layers, final_norm, head): ((Span, bool), Vec<Layer>, Span, Matrix),
    ) -> Result<Self, ModelError> {
        let frequencies = arena.take(config.head_dim / 2 * 4)?;
        let frequency = |i: usize| 1.0 / config.rope_theta.powf((2 * i) as f32 / config.head_dim as f32);
        staging.upload((0..config.head_dim / 2).map(frequency), &frequencies)?;
        Ok(Self {
            gpu,
            config,
            dtype,
            staging,
            arena,
            embedding,
            layers,
            final_norm,
            head,
            frequencies,
            split: SPLIT,
            scratch: Buffers::default(),
        })
    }

    /// Cuts sequences every so many tokens instead of 2048; a multiple of 128.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for what is none.
    pub fn set_split(&mut self, tokens: usize) -> Result<(), ModelError> {
        if tokens == 0 || !tokens.is_multiple_of(128) {
            return Err(ModelError::Unsupported {
                reason: format!("parts of {tokens} tokens: a multiple of 128 is needed"),
            });
        }
        self.split = tokens;
        Ok(())
    }

    /// The GPU that it is on.
    pub fn context(&self) -> &Arc<Context> {
        &self.gpu.context
    }

    /// Bytes of an activation.
    pub fn element(&self) -> usize {
        self.gpu.element()
    }

    /// Device memory of so many bytes that lives as long as this.
    ///
    /// # Errors
    /// [`ModelError::Cuda`].
    pub fn take(&mut self, bytes: usize) -> Result<Span, ModelError> {
        self.arena.take(bytes)
    }

    /// Room for `rows` rows' places, of sequences of up to `tokens` tokens.
    ///
    /// # Errors
    /// [`ModelError::Cuda`].
    pub fn new_batch(&mut self, rows: usize, tokens: usize) -> Result<Batch, ModelError> {
        Batch::new(&mut self.arena, rows, tokens.div_ceil(BLOCK_TOKENS))
    }

    /// Says where the rows of a batch stand, which the cache has been told to hold, and notes that `layers` hold them.
    ///
    /// # Errors
    /// As [`AttentionStage::attention`].
    pub fn place(&mut self, batch: &Batch, rows: &[Row], cache: &mut KvCache) -> Result<(), ModelError> {
        check_len("rows", rows.len(), batch.rows())?;
        for layer in 0..self.config.num_layers {
            cache.check(&self.config, self.dtype, true, layer, rows)?;
        }
        let table = rows.iter().map(|row| (row.position, cache.table(*row)));
        batch.write(&self.staging, table)?;
        for layer in 0..self.config.num_layers {
            rows.iter().for_each(|row| cache.hold(layer, *row));
        }
        Ok(())
    }

    /// Puts the look-up of `tokens` (32 bits each) on a stream: `x` `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`ModelError::Cuda`]. Tokens are not checked: they must be of the vocabulary.
    pub fn embed_on(&self, stream: &Stream, tokens: &Span, x: &Span) -> Result<(), ModelError> {
        let (table, narrow) = &self.embedding;
        check_len("x", x.len(), tokens.len() / 4 * self.config.hidden_size * self.gpu.element())?;
        self.gpu.embed(stream, x, (table, *narrow), tokens, self.config.hidden_size)
    }

    /// Puts the attention half of a layer on a stream, as [`AttentionStage::attention`] does it, for sequences of up to `context`
    /// tokens. `x` and `y` hold activations as the compute type has them.
    ///
    /// # Errors
    /// A layer that does not exist; spans of other lengths; [`ModelError::Cuda`].
    #[allow(clippy::too_many_arguments, reason = "what a layer takes")]
    pub fn attention_on(
        &mut self,
        stream: &Stream,
        layer: usize,
        batch: &Batch,
        context: usize,
        x: &Span,
        cache: &KvCache,
        y: &Span,
    ) -> Result<(), ModelError> {
        let Self { gpu, config, layers, frequencies, split, scratch, .. } = self;
        let weights = layers.get(layer).ok_or(ModelError::Layer { layer, reason: "does not exist" })?;
        let (rows, hidden, dim, element) = (batch.rows(), config.hidden_size, config.head_dim, gpu.element());
        check_len("x", x.len(), rows * hidden * element)?;
        check_len("y", y.len(), rows * hidden * element)?;
        let Some(CudaCache { pages }) = cache.on_device() else {
            return Err(ModelError::Unsupported { reason: "a cache in host memory; take one of `new_cache`".into() });
        };
        let place = CachePlace { pages, first: cache.first_page(layer), is_fp8: false };
        let heads = Heads { count: config.num_heads, dim, split: *split };
        let (share_q, all_heads, eps) = (config.share_q_dim, config.num_heads * dim, config.rms_norm_eps);
        let ctx = gpu.context.clone();
        let stride = share_q + 2 * dim;
        let normed = scratch.normed.room(&ctx, rows * hidden * element)?;
        let inward = scratch.inward.room(&ctx, rows * stride * element)?;
        let low_rank = scratch.low_rank.room(&ctx, rows * share_q * element)?;
        let query = scratch.query.room(&ctx, rows * all_heads * element)?;
        let out = scratch.heads.room(&ctx, rows * all_heads * element)?;
        let splits = context.div_ceil(*split).max(1);
        let parts = scratch.parts.room(&ctx, if splits > 1 { rows * splits * all_heads * 4 } else { 4 })?;
        let states = scratch.states.room(&ctx, rows * splits * config.num_heads * 8)?;
        let widest = hidden.max(all_heads).max(share_q);
        let codes = scratch.codes.room(&ctx, rows * widest)?;
        let scales = scratch.scales.room(&ctx, rows * fp8_groups(widest) * 4)?;
        let input = |plain: &Span, width: usize, matrix: &Matrix| -> Result<Input, ModelError> {
            if !matrix.is_fp8 {
                return Ok(Input { plain: plain.clone(), quantised: None });
            }
            gpu.quantise(stream, &codes, &scales, plain, width, rows)?;
            Ok(Input { plain: plain.clone(), quantised: Some((codes.clone(), scales.clone())) })
        };

        gpu.rms_norm(stream, &normed, x, hidden, &weights.input_norm, rows, eps)?;
        let from = input(&normed, hidden, &weights.inward)?;
        gpu.multiply(stream, &weights.inward, &from, rows, &inward, Grouping::One)?;
        gpu.rms_norm(stream, &low_rank, &inward, stride, &weights.query_norm, rows, eps)?;
        let from = input(&low_rank, share_q, &weights.query_up)?;
        gpu.multiply(stream, &weights.query_up, &from, rows, &query, Grouping::One)?;
        gpu.rotate_and_store(stream, &query, (&inward, stride, share_q), place, &batch.places, frequencies, heads)?;
        gpu.attend(stream, &out, (&parts, &states), &query, place, &batch.places, heads, context)?;
        let from = input(&out, all_heads, &weights.output)?;
        gpu.multiply(stream, &weights.output, &from, rows, &normed, Grouping::One)?;
        gpu.add_rms_norm(stream, y, x, &normed, &weights.post_norm, rows, eps)
    }

    /// Puts rows as FP8 on a stream, as [`quantise_rows`](crate::quantise_rows) makes them: codes `[rows, hidden]` and scales of 32
    /// bits for every 128 of them.
    ///
    /// # Errors
    /// Spans of other lengths.
    pub fn quantise_on(
        &self,
        stream: &Stream,
        rows: usize,
        y: &Span,
        codes: &Span,
        scales: &Span,
    ) -> Result<(), ModelError> {
        let hidden = self.config.hidden_size;
        check_len("y", y.len(), rows * hidden * self.gpu.element())?;
        check_len("codes", codes.len(), rows * hidden)?;
        check_len("scales", scales.len(), rows * fp8_groups(hidden) * 4)?;
        self.gpu.quantise(stream, codes, scales, y, hidden, rows)
    }

    /// Puts a router on a stream, as [`AttentionStage::route`] does it: ids of 16 bits, weights of 32. A row that is not finite
    /// gets the id 65535.
    ///
    /// # Errors
    /// A dense layer; spans of other lengths.
    pub fn route_on(
        &mut self,
        stream: &Stream,
        layer: usize,
        rows: usize,
        y: &Span,
        ids: &Span,
        weights: &Span,
    ) -> Result<(), ModelError> {
        let Self { gpu, config, layers, scratch, .. } = self;
        let router = router_of(layers, layer)?;
        check_len("y", y.len(), rows * config.hidden_size * gpu.element())?;
        check_len("ids", ids.len(), rows * config.top_k * 2)?;
        check_len("weights", weights.len(), rows * config.top_k * 4)?;
        let scores = scratch.scores.room(&gpu.context.clone(), rows * router.n * gpu.element())?;
        let from = Input { plain: y.clone(), quantised: None };
        gpu.multiply(stream, router, &from, rows, &scores, Grouping::One)?;
        let shape = [rows, config.num_experts, config.top_k];
        gpu.choose(stream, ids, weights, &scores, shape, config.norm_expert_weight)
    }

    /// Puts the end of a layer on a stream: `x += partials[0] + partials[1] + ...`, which are as `x` is.
    ///
    /// # Errors
    /// Too many; spans of other lengths.
    pub fn combine_on(&self, stream: &Stream, x: &Span, partials: &[Span]) -> Result<(), ModelError> {
        partials.iter().try_for_each(|partial| check_len("partial", partial.len(), x.len()))?;
        self.combine_any(stream, x, partials, self.gpu.rounds)
    }

    fn combine_any(&self, stream: &Stream, x: &Span, partials: &[Span], narrow: bool) -> Result<(), ModelError> {
        if partials.len() > MOST_PARTIALS {
            let reason = format!("{} FFN instances: {MOST_PARTIALS} are summed at most", partials.len());
            return Err(ModelError::Unsupported { reason });
        }
        if partials.is_empty() {
            return Ok(());
        }
        self.gpu.combine(stream, x, partials, narrow, x.len() / self.gpu.element())
    }

    /// Puts the output head on a stream: logits as activations are.
    ///
    /// # Errors
    /// Spans of other lengths.
    pub fn logits_on(&mut self, stream: &Stream, rows: usize, x: &Span, logits: &Span) -> Result<(), ModelError> {
        let Self { gpu, config, final_norm, head, scratch, .. } = self;
        let (hidden, element) = (config.hidden_size, gpu.element());
        check_len("x", x.len(), rows * hidden * element)?;
        check_len("logits", logits.len(), rows * config.vocab_size * element)?;
        let normed = scratch.normed.room(&gpu.context.clone(), rows * hidden * element)?;
        gpu.rms_norm(stream, &normed, x, hidden, final_norm, rows, config.rms_norm_eps)?;
        gpu.multiply(stream, head, &Input { plain: normed, quantised: None }, rows, logits, Grouping::One)
    }

    /// Host values as activations are.
    fn upload(&self, values: &[f32], to: &Span) -> Result<(), ModelError> {
        match self.gpu.rounds {
            true => self.staging.upload(values.iter().map(|value| bf16::from_f32(*value)), to),
            false => self.staging.upload(values.iter().copied(), to),
        }
    }

    /// Activations as host values.
    pub fn download(&self, from: &Span, values: &mut [f32]) -> Result<(), ModelError> {
        read_values(&self.staging, self.gpu.rounds, from, values)
    }

    /// Host values of any kind to a span, at once.
    ///
    /// # Errors
    /// [`ModelError::Cuda`].
    pub fn write(&self, values: &[u32], to: &Span) -> Result<(), ModelError> {
        self.staging.upload(values.iter().copied(), to)
    }
}

fn router_of(layers: &[Layer], layer: usize) -> Result<&Matrix, ModelError> {
    let held = layers.get(layer).ok_or(ModelError::Layer { layer, reason: "does not exist" })?;
    held.router.as_ref().ok_or(ModelError::Layer { layer, reason: "is dense; it has no router" })
}

/// Activations on a device as host values.
pub(super) fn read_values(staging: &Staging, rounds: bool, from: &Span, values: &mut [f32]) -> Result<(), ModelError> {
    let bytes = staging.download(from)?;
    if rounds {
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *value = bf16::from_bits(u16::from_le_bytes(*bytes)).to_f32();
        }
    } else {
        values.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes));
    }
    Ok(())
}

fn upload_norm(norm: &[f32], arena: &mut Arena, staging: &Staging) -> Result<Span, ModelError> {
    let place = arena.take(norm.len() * 4)?;
    staging.upload(norm.iter().copied(), &place)?;
    Ok(place)
}

impl Layer {
    fn upload(
        weights: AttentionLayer<Rows>,
        dtype: Dtype,
        arena: &mut Arena,
        staging: &Staging,
    ) -> Result<Self, ModelError> {
        let AttentionLayer { input_norm, query_down, key, value, query_norm, query_up, output, post_norm, router } =
            weights;
        let mut matrix = |parts| Matrix::upload(vec![parts], false, dtype, arena, staging);
        let (inward, query_up, output) =
            (matrix(vec![query_down, key, value])?, matrix(vec![query_up])?, matrix(vec![output])?);
        let router = router.map(|router| matrix(vec![router])).transpose()?;
        Ok(Self {
            input_norm: upload_norm(&input_norm, arena, staging)?,
            inward,
            query_norm: upload_norm(&query_norm, arena, staging)?,
            query_up,
            output,
            post_norm: upload_norm(&post_norm, arena, staging)?,
            router,
        })
    }
}

impl AttentionStage for CudaAttention {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn weight_bytes(&self) -> usize {
        self.arena.bytes()
    }

    fn new_cache(&self, tokens: usize) -> Result<KvCache, ModelError> {
        KvCache::on_gpu(&self.config, self.dtype, tokens, &self.gpu.context)
    }

    fn embed(&mut self, tokens: &[u32], x: &mut [f32]) -> Result<(), ModelError> {
        check_len("x", x.len(), tokens.len() * self.config.hidden_size)?;
        check_tokens(&self.config, tokens)?;
        if tokens.is_empty() {
            return Ok(());
        }
        let ctx = self.gpu.context.clone();
        let on_device = self.scratch.tokens.room(&ctx, tokens.len() * 4)?;
        let place = self.scratch.x.room(&ctx, x.len() * self.gpu.element())?;
        self.staging.upload(tokens.iter().copied(), &on_device)?;
        self.embed_on(&self.staging.stream(), &on_device, &place)?;
        self.download(&place, x)
    }

    fn attention(
        &mut self,
        layer: usize,
        rows: &[Row],
        x: &mut [f32],
        cache: &mut KvCache,
        y: &mut [f32],
    ) -> Result<(), ModelError> {
        if layer >= self.config.num_layers {
            return Err(ModelError::Layer { layer, reason: "does not exist" });
        }
        check_len("x", x.len(), rows.len() * self.config.hidden_size)?;
        check_len("y", y.len(), x.len())?;
        cache.check(&self.config, self.dtype, true, layer, rows)?;
        let Some(context) = rows.iter().map(|row| row.position + 1).max() else { return Ok(()) };
        let (ctx, pages_a_row) = (self.gpu.context.clone(), context.div_ceil(BLOCK_TOKENS));
        let places = RowPlaces {
            positions: self.scratch.positions.room(&ctx, rows.len() * 4)?,
            tables: self.scratch.tables.room(&ctx, rows.len() * pages_a_row * 4)?,
            pages_a_row,
        };
        let batch = Batch::of(places, rows.len());
        let on_device = self.scratch.x.room(&ctx, x.len() * self.gpu.element())?;
        let normed = self.scratch.y.room(&ctx, x.len() * self.gpu.element())?;
        batch.write(&self.staging, rows.iter().map(|row| (row.position, cache.table(*row))))?;
        self.upload(x, &on_device)?;
        let stream = self.staging.stream();
        self.attention_on(&stream, layer, &batch, context, &on_device, cache, &normed)?;
        self.download(&normed, y)?;
        self.download(&on_device, x)?;
        rows.iter().for_each(|row| cache.hold(layer, *row));
        Ok(())
    }

    fn route(&mut self, layer: usize, y: &[f32], ids: &mut [u16], weights: &mut [f32]) -> Result<(), ModelError> {
        let rows = whole_rows(&self.config, "y", y.len())?;
        router_of(&self.layers, layer)?;
        check_len("ids", ids.len(), rows * self.config.top_k)?;
        check_len("weights", weights.len(), rows * self.config.top_k)?;
        if rows == 0 {
            return Ok(());
        }
        let ctx = self.gpu.context.clone();
        let on_device = self.scratch.y.room(&ctx, y.len() * self.gpu.element())?;
        let chosen = self.scratch.ids.room(&ctx, ids.len() * 2)?;
        let with = self.scratch.chosen.room(&ctx, weights.len() * 4)?;
        self.upload(y, &on_device)?;
        let stream = self.staging.stream();
        self.route_on(&stream, layer, rows, &on_device, &chosen, &with)?;
        let found = self.staging.download(&chosen)?;
        let found = found.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
        if let Some(at) = found.clone().position(|id| id == u16::MAX) {
            return Err(ModelError::NonFiniteRow { argument: "y", row: at / self.config.top_k });
        }
        ids.iter_mut().zip(found).for_each(|(id, found)| *id = found);
        read_values(&self.staging, false, &with, weights)
    }

    fn combine(&mut self, x: &mut [f32], partials: &[&[f32]]) -> Result<(), ModelError> {
        whole_rows(&self.config, "x", x.len())?;
        for partial in partials {
            check_len("partial", partial.len(), x.len())?;
        }
        if x.is_empty() || partials.is_empty() {
            return Ok(());
        }
        let ctx = self.gpu.context.clone();
        let on_device = self.scratch.x.room(&ctx, x.len() * self.gpu.element())?;
        let all = self.scratch.partials.room(&ctx, partials.len() * x.len() * 4)?;
        let mut places = Vec::with_capacity(partials.len());
        for (i, partial) in partials.iter().enumerate() {
            let place = all.part(i * x.len() * 4..(i + 1) * x.len() * 4)?;
            self.staging.upload(partial.iter().copied(), &place)?;
            places.push(place);
        }
        self.upload(x, &on_device)?;
        self.combine_any(&self.staging.stream(), &on_device, &places, false)?;
        self.download(&on_device, x)
    }

    fn logits(&mut self, x: &[f32], logits: &mut [f32]) -> Result<(), ModelError> {
        let rows = whole_rows(&self.config, "x", x.len())?;
        check_len("logits", logits.len(), rows * self.config.vocab_size)?;
        if rows == 0 {
            return Ok(());
        }
        let ctx = self.gpu.context.clone();
        let on_device = self.scratch.x.room(&ctx, x.len() * self.gpu.element())?;
        let out = self.scratch.logits.room(&ctx, logits.len() * self.gpu.element())?;
        self.upload(x, &on_device)?;
        let stream = self.staging.stream();
        self.logits_on(&stream, rows, &on_device, &out)?;
        self.download(&out, logits)
    }
}
