//! stepmesh mesh.

pub mod control;
pub mod scheduler;
