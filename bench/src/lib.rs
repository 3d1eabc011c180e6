//! stepmesh bench.
