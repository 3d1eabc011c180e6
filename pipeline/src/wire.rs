//! What rows are on the wire: hidden states on their way to the FFN side, partial sums on their way back.

use std::fmt;
use std::ops::Range;
use stepmesh_mesh::{Segment, SendBuffer};
use stepmesh_model::{Dtype, Hidden, ModelError, WireDtype, fp8_groups, quantise_rows};
use stepmesh_proto as proto;

/// The types of both ways, which all members of a deployment agree on: those that lose nothing which a compute type
/// does not lose.
///
/// | suits | to the FFN side | back |
/// |---|---|---|
/// | [`Dtype::F32`] | 32-bit floating point | 32-bit floating point |
/// | [`Dtype::Bf16`] | bfloat16 | bfloat16 |
/// | [`Dtype::Fp8`] | FP8 with a scale for every 128 elements | bfloat16 |
/// | [`Dtype::Fp8F32`] | FP8 with scales | 32-bit floating point |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wire(Dtype);

impl Wire {
    /// What suits a compute type.
    pub const fn of(dtype: Dtype) -> Self {
        Self(dtype)
    }

    /// The type of hidden states, unless they are FP8.
    fn request(self) -> Option<WireDtype> {
        if self.0.quantises() { None } else { Some(self.reply()) }
    }

    /// The type of partial sums.
    pub(crate) fn reply(self) -> WireDtype {
        if self.0.rounds() { WireDtype::Bf16 } else { WireDtype::F32 }
    }

    /// How headers write the type of hidden states.
    pub(crate) fn request_dtype(self) -> proto::Dtype {
        self.request().map_or(proto::Dtype::Fp8E4M3, header_dtype)
    }

    /// How headers write the type of partial sums.
    pub(crate) fn reply_dtype(self) -> proto::Dtype {
        header_dtype(self.reply())
    }

    /// Bytes of a row of hidden states, and of its scales if it has any.
    pub(crate) fn request_row_bytes(self, hidden: usize) -> impl Iterator<Item = usize> {
        let (row, scales) = match self.request() {
            Some(dtype) => (dtype.row_bytes(hidden), None),
            None => (hidden, Some(4 * fp8_groups(hidden))),
        };
        std::iter::once(row).chain(scales)
    }

    /// Parts of a request before the experts.
    pub(crate) fn request_parts(self) -> usize {
        if self.request().is_some() { 1 } else { 2 }
    }
}

fn header_dtype(dtype: WireDtype) -> proto::Dtype {
    match dtype {
        WireDtype::F32 => proto::Dtype::F32,
        WireDtype::Bf16 => proto::Dtype::Bf16,
    }
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Writes rows of hidden states to the request's parts; FP8 codes go straight into the slot.
pub(crate) fn encode(
    wire: Wire,
    values: &[f32],
    hidden: usize,
    scales: &mut Vec<f32>,
    buffer: &mut SendBuffer,
) -> Result<(), ModelError> {
    if let Some(dtype) = wire.request() {
        return dtype.encode(values, &mut buffer.part_mut(0)[..dtype.row_bytes(values.len())]);
    }
    scales.resize(values.len() / hidden.max(1) * fp8_groups(hidden), 0.0);
    quantise_rows(values, hidden, &mut buffer.part_mut(0)[..values.len()], scales)?;
    WireDtype::F32.encode(scales, &mut buffer.part_mut(1)[..scales.len() * 4])
}

/// Rows of hidden states as they arrived, of one batch; kept from batch to batch.
#[derive(Debug, Default)]
pub(crate) struct HiddenRows {
    values: Vec<f32>,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl HiddenRows {
    pub(crate) fn clear(&mut self) {
        self.values.clear();
        self.codes.clear();
        self.scales.clear();
    }

    /// Takes a segment in, whose parts have the lengths that its rows and `wire` imply.
    pub(crate) fn push(&mut self, wire: Wire, hidden: usize, segment: &Segment) -> Result<(), ModelError> {
        let rows = segment.rows();
        if let Some(dtype) = wire.request() {
            let start = self.values.len();
            self.values.resize(start + rows * hidden, 0.0);
            return dtype.decode(segment.part(0), &mut self.values[start..]);
        }
        self.codes.extend_from_slice(segment.part(0));
        let start = self.scales.len();
        self.scales.resize(start + rows * fp8_groups(hidden), 0.0);
        WireDtype::F32.decode(segment.part(1), &mut self.scales[start..])
    }

    /// Some of the rows, of `hidden` elements each.
    pub(crate) fn rows(&self, rows: Range<usize>, wire: Wire, hidden: usize) -> Hidden<'_> {
        let elements = rows.start * hidden..rows.end * hidden;
        if wire.request().is_some() {
            return Hidden::Plain(&self.values[elements]);
        }
        let groups = fp8_groups(hidden);
        Hidden::Fp8 { codes: &self.codes[elements], scales: &self.scales[rows.start * groups..rows.end * groups] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_the_released_model_takes_what_the_paper_says() {
        assert_eq!(Wire::of(Dtype::Fp8).request_row_bytes(7168).collect::<Vec<_>>(), [7168, 224]);
        assert_eq!(Wire::of(Dtype::Fp8).reply().row_bytes(7168), 14336);
        assert_eq!(Wire::of(Dtype::Bf16).request_row_bytes(7168).collect::<Vec<_>>(), [14336]);
    }
}
