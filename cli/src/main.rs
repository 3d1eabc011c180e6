//! The `stepmesh` command.

fn main() {}
