//! The words on the wire: the data-plane [`Header`] and [`Immediate`], and (feature `control`) the control
//! plane's gRPC messages. No I/O, no clock.

mod checksum;
#[cfg(test)]
#[path = "../../fuzz/inputs.rs"]
mod fuzz_inputs;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod header;
mod immediate;

pub use header::{
    Dtype, Flags, HEADER_FIXED_BYTES, HEADER_MAX_BYTES, Header, HeaderError, MAX_PARTS, PART_BYTES, Part, Stamps,
    WIRE_VERSION,
};
pub use immediate::{Immediate, ImmediateError, MAX_LANES, MAX_SLOTS};

/// The control plane's messages and services, generated from `control.proto` (`tests/generated.rs`).
#[cfg(feature = "control")]
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod control {
    include!("generated.rs");

    /// The version of the control protocol that this build speaks. A member and a scheduler must agree exactly.
    pub const CONTROL_VERSION: u32 = 2;
}
