//! Both sides of the model on a GPU: the same operations behind the same traits as on the CPU, rounded at the same points, and
//! besides as calls that put a layer on a stream, for whoever captures a whole step.
//!
//! Kernels are compiled when a stage is loaded, by NVRTC; products of bf16 matrices are cuBLASLt's where the machine has it, and
//! then a row's last bits may depend on how many rows there are. Everything else, and all of it without cuBLASLt or in f32, is
//! batch-invariant as on the CPU. Sums run in another order than the CPU's, so that results agree to rounding, not bit for bit.
//!
//! | type | weights | products |
//! |---|---|---|
//! | `f32` | any, as f32 | kernels of our own, no tensor cores |
//! | `bf16` | bf16 | cuBLASLt, and grouped ones of our own for experts, on tensor cores |
//! | `fp8` | FP8 with blocks of 128 x 128, bf16 for the rest | FP8 tensor cores, activations quantised by token and 128 elements |

mod attention;
mod cache;
mod cublas;
mod ffn;
mod gpu;
mod library;
mod matrix;
mod measure;
mod memory;
mod program;

pub use attention::CudaAttention;
pub use cache::{Batch, CudaCache};
pub use ffn::{CudaFfn, DeviceInput};
pub use measure::{AttendBench, GemmBench, SpinBench};

use crate::{Dtype, ModelError};

/// Variables of the environment that name libraries of CUDA's toolkit: NVRTC and cuBLASLt.
pub const LIBRARIES: [&str; 2] = [program::VARIABLE, cublas::VARIABLE];

/// Whether activations are bf16; refuses the types that kernels are not made for.
fn rounds(dtype: Dtype) -> Result<bool, ModelError> {
    match dtype {
        Dtype::F32 => Ok(false),
        Dtype::Bf16 | Dtype::Fp8 => Ok(true),
        Dtype::Fp8F32 => {
            Err(ModelError::Unsupported { reason: "fp8-f32 is for tests on the CPU; use fp8, bf16 or f32".into() })
        }
    }
}

/// Refuses sizes that kernels, which copy 16 bytes at a time, are not made for.
fn check_sizes(config: &crate::ModelConfig) -> Result<(), ModelError> {
    let sizes =
        [("hidden_size", config.hidden_size), ("share_q_dim", config.share_q_dim), ("head_dim", config.head_dim)];
    if let Some((name, size)) = sizes.into_iter().find(|(_, size)| !size.is_multiple_of(matrix::PAD)) {
        return Err(ModelError::Unsupported { reason: format!("{name} {size} is no multiple of {}", matrix::PAD) });
    }
    if config.num_experts > 3072 {
        let reason = format!("{} experts: 3072 are the most", config.num_experts);
        return Err(ModelError::Unsupported { reason });
    }
    Ok(())
}
