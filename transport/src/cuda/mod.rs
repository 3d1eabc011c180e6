//! GPU memory: regions on a device, shared with network devices and with other processes, and the gates by which a stream
//! and the CPU signal each other. Nothing here launches a kernel: bytes move by copy engines and network devices, signals
//! are stream memory operations.
//!
//! The driver is loaded when it is first asked for; a machine without one gets [`CudaError::NoDriver`], not an abort.
//!
//! ```text
//!   Context ──┬─ DeviceMemory   a Memory: registered by verbs (dma-buf, peer memory), exported to other processes
//!   (one GPU) ├─ PeerMemory     another process's DeviceMemory, mapped here
//!             ├─ Stream         copies in order, memory kept until they are over; captured into a Graph
//!             └─ Gates          words in host memory that a stream writes and waits for, the CPU reads and opens
//! ```

mod context;
mod driver;
mod error;
mod gate;
mod graph;
mod memory;
mod stream;

pub use context::Context;
pub use error::CudaError;
pub use gate::{Gate, Gates};
pub use graph::Graph;
pub use memory::{DeviceMemory, ExportedMemory, PeerMemory};
pub use stream::{Span, Stream};
