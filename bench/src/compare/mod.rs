//! Other systems on the same machine in the same run, taking turns with ours.
//!
//! Some bounce messages of one size and are set beside our transport; some are used as AFD would use them, a request of one
//! size and a reply of another, and are set beside whole rounds of our mesh.

mod bounce;
mod echo;
mod libfabric;
mod row;
mod suite;
mod turns;
mod ucx;

pub use bounce::Bouncer;
pub use echo::{Echo, System};
pub use libfabric::Libfabric;
pub use row::{Comparison, Failure, Line};
pub use suite::{ECHOES, Options, Peers, SIZES, run};
pub use ucx::{Ucx, UcxTest};

pub(crate) use bounce::beside;

/// Rounds in which ours and the peers take turns.
pub(crate) const ROUNDS: usize = 5;
