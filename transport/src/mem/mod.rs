//! The `mem` provider.
