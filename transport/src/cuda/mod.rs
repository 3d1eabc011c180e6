//! GPU memory: regions on a device, shared with network devices and with other processes, and the gates by which a stream
//! and the CPU signal each other. Nothing here launches a kernel: bytes move by copy engines and network devices, signals
//! are stream memory operations.
//!
//! The driver is loaded when it is first asked for; a machine without one gets [`CudaError::NoDriver`], not an abort.
//!
//! ```text
//!   Context ──┬─ beside         a provider's device whose payload regions are the GPU's: what a mesh is given
//!   (one GPU) ├─ DeviceMemory   a Memory: registered by verbs (dma-buf, peer memory), exported to other processes
//!             ├─ PeerMemory     another process's DeviceMemory, mapped here
//!             ├─ PinnedMemory   a region of host memory that streams copy to and from
//!             ├─ Stream         copies in order, memory kept until they are over; captured into a Graph
//!             └─ Gates          words in host memory that a stream writes and waits for, the CPU reads and opens
//! ```

mod context;
mod device;
mod driver;
mod error;
mod gate;
mod graph;
mod memory;
mod pinned;
mod stream;
mod word;

pub use context::Context;
pub use device::{beside, beside_pinned};
pub use error::CudaError;
pub use gate::{Gate, Gates};
pub use graph::Graph;
pub use memory::{DeviceMemory, ExportedMemory, PeerMemory};
pub use pinned::PinnedMemory;
pub use stream::{Span, Stream};
pub use word::Word;
