//! stepmesh proto.
