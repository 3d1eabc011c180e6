//! stepmesh model.
