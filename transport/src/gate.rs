//! Gates, as the CPU side sees them: how work that was put on a device ahead of time is told to go on.

/// Pairs of flags by which a device's stream and the CPU signal each other, one for each transfer of a step. The stream's side
/// of it is the implementation's, such as [`crate::cuda::Gates`]; one thread has the CPU's.
pub trait GateSet: Send + Sync {
    /// How many gates.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the stream has announced at this gate since it was last taken; false for a gate that there is not.
    fn take(&self, gate: usize) -> bool;

    /// Lets the stream pass this gate.
    fn open(&self, gate: usize);

    /// Gives the replay under way up: every gate opens, so that no stream waits for ever, and what it computes is worth nothing.
    fn abort(&self);

    /// Whether what the replay under way computes is worth nothing.
    fn is_aborted(&self) -> bool;
}
