//! Weights from a checkpoint into matrices, whole or the part that a shard holds: panels for the CPU, rows for a GPU.
//!
//! Loading goes over the same list of tensors twice: first it checks that each is there, of the right shape and of a
//! known type, and counts bytes; only then does it read.

use std::cell::{Cell, RefCell};
use std::ops::Range;

use half::bf16;

use crate::dtype::{round_bf16, to_bf16};
use crate::fp8::{self, FP8_GROUP};
use crate::kernel::{Matrix, Values, WIDTH, Weights};
use crate::mlp::Mlp;
use crate::tensor::{Element, Tensor};
use crate::{Checkpoint, Dtype, ModelError, Shard};

/// How a stage is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    /// What is computed in.
    pub dtype: Dtype,
    /// Threads that share large products, the calling one included.
    pub threads: usize,
}

impl LoadOptions {
    /// One thread.
    pub fn new(dtype: Dtype) -> Self {
        Self { dtype, threads: 1 }
    }
}

/// How far loading is, in bytes of the checkpoint's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Read.
    pub done_bytes: u64,
    /// To be read in all: what this instance holds.
    pub total_bytes: u64,
}

/// Bytes between two reports.
const REPORT_EVERY: u64 = 16 << 20;

/// Builds something from a checkpoint's weights: checks everything, then reads. `observe` hears how far it is, at the
/// beginning and the end at least.
pub(crate) fn load<T>(
    checkpoint: &Checkpoint,
    dtype: Dtype,
    observe: &mut dyn FnMut(LoadProgress),
    mut build: impl FnMut(&Loader<'_>) -> Result<T, ModelError>,
) -> Result<T, ModelError> {
    if dtype.quantises() && !checkpoint.config().fp8_weights {
        return Err(ModelError::NotFp8 { dtype });
    }
    let count = Cell::new(0);
    build(&Loader { checkpoint, dtype, work: Work::Check(&count) })?;
    let total_bytes = count.get();
    observe(LoadProgress { done_bytes: 0, total_bytes });
    let reader = Reader { total_bytes, done: Cell::new(0), told: Cell::new(0), observe: RefCell::new(observe) };
    let built = build(&Loader { checkpoint, dtype, work: Work::Read(&reader) })?;
    reader.tell();
    Ok(built)
}

/// A checkpoint seen through a compute type.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    dtype: Dtype,
    work: Work<'a>,
}

enum Work<'a> {
    /// Count the bytes that there are to read.
    Check(&'a Cell<u64>),
    Read(&'a Reader<'a>),
}

struct Reader<'a> {
    total_bytes: u64,
    done: Cell<u64>,
    told: Cell<u64>,
    observe: RefCell<&'a mut dyn FnMut(LoadProgress)>,
}

impl Reader<'_> {
    fn tell(&self) {
        self.told.set(self.done.get());
        (self.observe.borrow_mut())(LoadProgress { done_bytes: self.done.get(), total_bytes: self.total_bytes });
    }
}

/// A matrix as a stage keeps it.
pub(crate) trait Loaded: Sized {
    /// What stands for it while tensors are only checked.
    fn none() -> Self;

    /// Reads a part of a tensor, with its scales if it is FP8; `narrow` if its elements are kept in two bytes otherwise.
    fn read(tensor: &Tensor<'_>, part: &Part<'_>, scales: Option<Scales>, narrow: bool) -> Result<Self, ModelError>;
}

/// A rectangle of a tensor that is seen as a matrix.
#[derive(Clone)]
pub(crate) struct Part<'a> {
    name: &'a str,
    shape: &'a [usize],
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

/// The scales of an FP8 part: one for every 128 x 128 of its tensor.
pub(crate) struct Scales {
    values: Vec<f32>,
    /// Rows of one matrix, and blocks of rows: stacked matrices begin with a block of their own.
    height: usize,
    high: usize,
    /// The first block of rows that is held.
    first: usize,
    /// Blocks of columns that are held.
    pub(crate) blocks: usize,
}

impl Scales {
    /// That of a row of the tensor, and of a block of the part's columns.
    pub(crate) fn at(&self, row: usize, block: usize) -> f32 {
        let block_row = row / self.height * self.high + row % self.height / FP8_GROUP;
        self.values[(block_row - self.first) * self.blocks + block]
    }
}

impl Loader<'_> {
    /// A whole matrix `[rows, cols]`.
    pub(crate) fn matrix<M: Loaded>(&self, name: &str, rows: usize, cols: usize) -> Result<M, ModelError> {
        self.rectangle(Part { name, shape: &[rows, cols], rows: 0..rows, cols: 0..cols })
    }

    /// A whole table `[rows, cols]`, row by row.
    pub(crate) fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Values, ModelError> {
        let tensor = self.unscaled(name, &[rows, cols])?;
        if !self.read(rows * cols * tensor.element().bytes()) {
            return Ok(Values::F32(Vec::new()));
        }
        Ok(if self.narrow(tensor.element()) {
            let mut values = Vec::new();
            tensor.read(0..rows, 0..cols, &mut values, to_bf16)?;
            Values::Bf16(values)
        } else {
            let mut values = Vec::new();
            tensor.read(0..rows, 0..cols, &mut values, |value| value)?;
            Values::F32(values)
        })
    }

    /// A norm's weight `[width]`, as f32 values rounded as the compute type says.
    pub(crate) fn norm(&self, name: &str, width: usize) -> Result<Vec<f32>, ModelError> {
        let tensor = self.unscaled(name, &[width])?;
        let mut weight = Vec::new();
        if self.read(width * tensor.element().bytes()) {
            let rounds = self.dtype.rounds();
            tensor.read(0..1, 0..width, &mut weight, |value| if rounds { round_bf16(value) } else { value })?;
        }
        Ok(weight)
    }

    /// A shard's part of a gated MLP `prefix.{gate,up,down}_proj.weight` of full width `full`.
    pub(crate) fn mlp<M: Loaded>(
        &self,
        prefix: &str,
        hidden: usize,
        full: usize,
        shard: Shard,
    ) -> Result<Mlp<M>, ModelError> {
        let [gate, up, down] = names(prefix);
        let width = self.cut(&gate, &[full, hidden], shard, full)?;
        let inward =
            |name: &str| self.rectangle(Part { name, shape: &[full, hidden], rows: width.clone(), cols: 0..hidden });
        let outward = Part { name: &down, shape: &[hidden, full], rows: 0..hidden, cols: width.clone() };
        Ok(Mlp { gate: inward(&gate)?, up: inward(&up)?, down: self.rectangle(outward)?, width: width.len() })
    }

    /// A shard's part of expert `expert` of `experts` gated MLPs of width `full` that are stacked on the first
    /// dimension.
    pub(crate) fn stacked_mlp<M: Loaded>(
        &self,
        prefix: &str,
        hidden: usize,
        full: usize,
        experts: usize,
        expert: usize,
        shard: Shard,
    ) -> Result<Mlp<M>, ModelError> {
        let [gate, up, down] = names(prefix);
        let width = self.cut(&gate, &[experts, full, hidden], shard, full)?;
        let one = |name: &str, rows: usize, cols: usize, some: Range<usize>, of: Range<usize>| {
            let rows_from = expert * rows;
            let some = rows_from + some.start..rows_from + some.end;
            self.rectangle(Part { name, shape: &[experts, rows, cols], rows: some, cols: of })
        };
        Ok(Mlp {
            gate: one(&gate, full, hidden, width.clone(), 0..hidden)?,
            up: one(&up, full, hidden, width.clone(), 0..hidden)?,
            down: one(&down, hidden, full, 0..hidden, width.clone())?,
            width: width.len(),
        })
    }

    /// The part of an intermediate dimension that a shard holds: whole blocks where the weights are FP8.
    fn cut(&self, name: &str, shape: &[usize], shard: Shard, full: usize) -> Result<Range<usize>, ModelError> {
        let fp8 = self.checkpoint.tensor(name, shape)?.element() == Element::Fp8;
        Ok(shard.range_of(full, if fp8 { FP8_GROUP } else { 1 }))
    }

    /// Counts bytes, as there or as read. False if this is the first pass, which reads nothing.
    fn read(&self, bytes: usize) -> bool {
        match &self.work {
            Work::Check(count) => {
                count.set(count.get() + bytes as u64);
                false
            }
            Work::Read(reader) => {
                reader.done.set(reader.done.get() + bytes as u64);
                if reader.done.get() - reader.told.get() >= REPORT_EVERY {
                    reader.tell();
                }
                true
            }
        }
    }

    /// Whether elements of this type are kept in two bytes: exactly, or because the compute type rounds them anyway.
    fn narrow(&self, element: Element) -> bool {
        element == Element::Bf16 || self.dtype.rounds()
    }

    /// A tensor that has no scales.
    fn unscaled<'a>(&'a self, name: &'a str, shape: &[usize]) -> Result<Tensor<'a>, ModelError> {
        let tensor = self.checkpoint.tensor(name, shape)?;
        if tensor.element() == Element::Fp8 {
            let advice = "only linear layers can be FP8; embeddings and norms cannot";
            let (tensor, file) = (name.into(), tensor.file().into());
            return Err(ModelError::TensorDtype { tensor, file, dtype: "F8_E4M3".into(), advice });
        }
        Ok(tensor)
    }

    fn rectangle<M: Loaded>(&self, part: Part<'_>) -> Result<M, ModelError> {
        let tensor = self.checkpoint.tensor(part.name, part.shape)?;
        let (rows, cols) = (part.rows.len(), part.cols.len());
        let scales = match tensor.element() {
            Element::Fp8 => self.scales(&tensor, &part)?,
            _ => None,
        };
        if !self.read(rows * cols * tensor.element().bytes()) {
            return Ok(M::none());
        }
        M::read(&tensor, &part, scales, self.narrow(tensor.element()))
    }

    /// The scales of an FP8 part; none while tensors are only checked.
    fn scales(&self, tensor: &Tensor<'_>, part: &Part<'_>) -> Result<Option<Scales>, ModelError> {
        let name = format!("{}_scale_inv", part.name);
        let [.., height, width] = *part.shape else { return Err(missing(tensor, part)) };
        let (high, wide) = (height.div_ceil(FP8_GROUP), width.div_ceil(FP8_GROUP));
        let shape: Vec<usize> = part.shape[..part.shape.len() - 2].iter().copied().chain([high, wide]).collect();
        let scales = match self.checkpoint.tensor(&name, &shape) {
            Err(ModelError::MissingTensor { .. }) => return Err(missing(tensor, part)),
            found => found?,
        };
        if !part.cols.start.is_multiple_of(FP8_GROUP) && !part.cols.is_empty() {
            return Err(ModelError::Fp8Cut { tensor: part.name.into(), at: part.cols.start });
        }
        if matches!(self.work, Work::Check(_)) {
            return Ok(None);
        }
        if part.rows.is_empty() || part.cols.is_empty() {
            return Ok(Some(Scales { values: Vec::new(), height, high, first: 0, blocks: 0 }));
        }
        let block_row = |row: usize| row / height * high + row % height / FP8_GROUP;
        let first = block_row(part.rows.start);
        let blocks = part.cols.start / FP8_GROUP..part.cols.end.div_ceil(FP8_GROUP);
        let mut values = Vec::new();
        scales.read(first..block_row(part.rows.end - 1) + 1, blocks.clone(), &mut values, |value| value)?;
        if let Some(&value) = values.iter().find(|value| **value < 0.0) {
            let file = scales.file().into();
            return Err(ModelError::Scale { tensor: name.clone(), file, value });
        }
        Ok(Some(Scales { values, height, high, first, blocks: blocks.len() }))
    }
}

impl Loaded for Matrix {
    fn none() -> Self {
        Self::new(0, 0, Weights::F32(Vec::new()))
    }

    fn read(tensor: &Tensor<'_>, part: &Part<'_>, scales: Option<Scales>, narrow: bool) -> Result<Self, ModelError> {
        let weights = match scales {
            Some(scales) => Weights::Fp8(panels(tensor, part, fp8::encode)?, scale_panels(part, &scales)),
            None if narrow => Weights::Bf16(panels::<bf16>(tensor, part, to_bf16)?),
            None => Weights::F32(panels(tensor, part, |value| value)?),
        };
        Ok(Self::new(part.rows.len(), part.cols.len(), weights))
    }
}

/// For each panel of 16 rows and each block of 128 columns, the scales of its rows.
fn scale_panels(part: &Part<'_>, scales: &Scales) -> Vec<[f32; WIDTH]> {
    let scale = |row: usize, block: usize| if part.rows.contains(&row) { scales.at(row, block) } else { 0.0 };
    let mut panels = Vec::with_capacity(part.rows.len().div_ceil(WIDTH) * scales.blocks);
    for row in part.rows.clone().step_by(WIDTH) {
        panels.extend((0..scales.blocks).map(|block| std::array::from_fn(|lane| scale(row + lane, block))));
    }
    panels
}

fn missing(tensor: &Tensor<'_>, part: &Part<'_>) -> ModelError {
    ModelError::MissingScale { tensor: part.name.into(), file: tensor.file().into() }
}

fn names(prefix: &str) -> [String; 3] {
    ["gate", "up", "down"].map(|part| format!("{prefix}.{part}_proj.weight"))
}

/// A part's elements in panels of 16 rows.
fn panels<T: Copy + Default>(
    tensor: &Tensor<'_>,
    part: &Part<'_>,
    convert: impl Fn(f32) -> T,
) -> Result<Vec<[T; WIDTH]>, ModelError> {
    let cols = part.cols.len();
    let mut panels = Vec::with_capacity(part.rows.len().div_ceil(WIDTH) * cols);
    let mut rows: Vec<T> = Vec::with_capacity(WIDTH * cols);
    for first in part.rows.clone().step_by(WIDTH) {
        rows.clear();
        tensor.read(first..part.rows.end.min(first + WIDTH), part.cols.clone(), &mut rows, &convert)?;
        rows.resize(WIDTH * cols, T::default());
        panels.extend((0..cols).map(|col| std::array::from_fn(|lane| rows[lane * cols + col])));
    }
    Ok(panels)
}
