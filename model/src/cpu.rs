//! Both sides of the model on the CPU.

mod attention;
mod ffn;
mod mlp;

pub use attention::CpuAttention;
pub use ffn::{CpuFfn, Visits};

/// The first `len` elements of a scratch buffer, which grows to the largest batch seen and then stays.
fn room(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}
