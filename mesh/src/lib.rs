//! stepmesh mesh.
