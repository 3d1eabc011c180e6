//! The gated MLP that dense layers, routed experts and the shared expert are made of.

/// `down(silu(gate x) * up x)`, or the part of it that a range of the intermediate dimension contributes.
#[derive(Debug)]
pub(crate) struct Mlp<M> {
    /// `[width, hidden]`.
    pub(crate) gate: M,
    /// `[width, hidden]`.
    pub(crate) up: M,
    /// `[hidden, width]`.
    pub(crate) down: M,
    /// The part of the intermediate dimension that is held.
    pub(crate) width: usize,
}
