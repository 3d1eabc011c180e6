//! How the stages use the mesh: the parts of a transfer, the application's sixteen bytes, what members must agree on.
//!
//! | direction | part | shape |
//! |---|---|---|
//! | A2F | hidden state after the post-attention norm | `[rows, hidden]`, the wire's type |
//! | A2F | scales (an FP8 wire) | `[rows, hidden / 128]` f32 |
//! | A2F | expert ids (MoE layers) | `[rows, top_k]` u16 |
//! | A2F | expert weights (MoE layers) | `[rows, top_k]` f32 |
//! | F2A | partial sum of the layer's output | `[rows, hidden]`, the wire's type |

use crate::wire::Wire;
use stepmesh_mesh::{MeshError, PartSpec, SlotLayout};
use stepmesh_model::{Dtype, ModelConfig};

/// Keys of the parts.
pub(crate) const HIDDEN: u64 = 0;
pub(crate) const EXPERT_IDS: u64 = 1;
pub(crate) const EXPERT_WEIGHTS: u64 = 2;
pub(crate) const SCALES: u64 = 3;

/// The slots of a deployment of this model.
pub fn slot_layout(
    config: &ModelConfig,
    wire: Wire,
    microbatches: u16,
    max_rows: u32,
) -> Result<SlotLayout, MeshError> {
    let part = |row_bytes: usize| match u32::try_from(row_bytes) {
        Ok(row_bytes) if max_rows > 0 => Ok(PartSpec { row_bytes, max_rows }),
        _ => Err(MeshError::Layout(format!("{max_rows} rows of {row_bytes} bytes"))),
    };
    let top_k = config.top_k.max(1);
    let request = wire.request_row_bytes(config.hidden_size).chain([top_k * 2, top_k * 4]);
    let reply = part(wire.reply().row_bytes(config.hidden_size))?;
    SlotLayout::new(microbatches, request.map(part).collect::<Result<_, _>>()?, vec![reply])
}

/// What the members compute, to be compared by the scheduler and read by people.
pub fn workload(config: &ModelConfig, dtype: Dtype, wire: Wire, tensor_parallel: u32) -> String {
    format!(
        "step3 {} layers, hidden {}, {} experts, top {}, dense {}, vocabulary {}, {dtype}, wire {wire}, experts cut in \
         {tensor_parallel}",
        config.num_layers,
        config.hidden_size,
        config.num_experts,
        config.top_k,
        config.intermediate_size,
        config.vocab_size
    )
}

/// The application's bytes of a transfer: which part of which step it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct StageTag {
    /// The layer.
    pub layer: u32,
    /// The attention instance's step of this microbatch.
    pub step: u64,
    /// The microbatch.
    pub microbatch: u16,
}

impl StageTag {
    /// Sixteen bytes, little endian: layer 4, microbatch 2, zero 2, step 8.
    pub fn encode(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&self.layer.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.microbatch.to_le_bytes());
        bytes[8..].copy_from_slice(&self.step.to_le_bytes());
        bytes
    }

    /// The tag in sixteen bytes.
    pub fn decode(bytes: [u8; 16]) -> Self {
        let [l0, l1, l2, l3, m0, m1, _, _, step @ ..] = bytes;
        Self {
            layer: u32::from_le_bytes([l0, l1, l2, l3]),
            step: u64::from_le_bytes(step),
            microbatch: u16::from_le_bytes([m0, m1]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_survives_the_wire() {
        let tag = StageTag { layer: 60, step: u64::MAX - 1, microbatch: 1023 };
        assert_eq!(StageTag::decode(tag.encode()), tag);
    }
}
