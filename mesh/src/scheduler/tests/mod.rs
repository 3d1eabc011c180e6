//! The scheduler's behaviour, in sentences.

mod hostile;
mod links;
mod members;
mod sequences;
mod world;
