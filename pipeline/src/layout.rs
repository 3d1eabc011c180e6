//! How the stages use the mesh: the parts of a transfer, the application's sixteen bytes, what members must agree on.
//!
//! | direction | part | shape |
//! |---|---|---|
//! | A2F | 0 hidden state after the post-attention norm | `[rows, hidden]`, the wire's type |
//! | A2F | 1 expert ids (MoE layers) | `[rows, top_k]` u16 |
//! | A2F | 2 expert weights (MoE layers) | `[rows, top_k]` f32 |
//! | F2A | 0 partial sum of the layer's output | `[rows, hidden]`, the wire's type |

use stepmesh_mesh::{MeshError, PartSpec, SlotLayout};
use stepmesh_model::{Dtype, ModelConfig, WireDtype};
use stepmesh_proto as proto;

/// Keys of the parts.
pub(crate) const HIDDEN: u64 = 0;
pub(crate) const EXPERT_IDS: u64 = 1;
pub(crate) const EXPERT_WEIGHTS: u64 = 2;

/// The wire's type for a compute type: exact for f32, BF16 both ways for bf16.
pub fn wire_dtype(dtype: Dtype) -> WireDtype {
    match dtype {
        Dtype::F32 => WireDtype::F32,
        Dtype::Bf16 => WireDtype::Bf16,
    }
}

/// The wire's type as headers write it.
pub(crate) fn header_dtype(wire: WireDtype) -> proto::Dtype {
    match wire {
        WireDtype::F32 => proto::Dtype::F32,
        WireDtype::Bf16 => proto::Dtype::Bf16,
    }
}

/// The slots of a deployment of this model.
pub fn slot_layout(
    config: &ModelConfig,
    dtype: Dtype,
    microbatches: u16,
    max_rows: u32,
) -> Result<SlotLayout, MeshError> {
    let part = |row_bytes: usize| match u32::try_from(row_bytes) {
        Ok(row_bytes) if max_rows > 0 => Ok(PartSpec { row_bytes, max_rows }),
        _ => Err(MeshError::Layout(format!("{max_rows} rows of {row_bytes} bytes"))),
    };
    let hidden = part(wire_dtype(dtype).row_bytes(config.hidden_size))?;
    let request = vec![hidden, part(config.top_k.max(1) * 2)?, part(config.top_k.max(1) * 4)?];
    SlotLayout::new(microbatches, request, vec![hidden])
}

/// What the members compute, to be compared by the scheduler and read by people.
pub fn workload(config: &ModelConfig, dtype: Dtype) -> String {
    format!(
        "step3 {} layers, hidden {}, {} experts, top {}, dense {}, vocabulary {}, {dtype}",
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
