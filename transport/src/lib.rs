//! stepmesh transport.
