//! stepmesh pipeline.
