//! Whole deployments of the mesh in one thread on a virtual clock: the members and the scheduler's state are the code
//! that ships, the fabric and the control plane between them are simulated.

#![allow(clippy::unwrap_used)]

mod control;
mod hostile;
mod joining;
mod listening;
mod losing;
mod placing;
mod policies;
mod random;
mod rogue;
mod shapes;
mod transfers;
mod waiting;
mod world;
