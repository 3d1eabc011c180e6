//! What can go wrong between a member or a client and the scheduler, in words that say what to do.

use std::time::Duration;
use thiserror::Error;

/// A call to the scheduler did not succeed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The scheduler's address cannot be understood.
    #[error("`{url}` is not a scheduler's address, such as http://127.0.0.1:7000: {reason}")]
    Address {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Nobody answered in time.
    #[error("no scheduler answered at {url} within {waited:?}: {reason}; start it, or check the address")]
    Unreachable {
        /// Where it was looked for.
        url: String,
        /// For how long.
        waited: Duration,
        /// What the last attempt met.
        reason: String,
    },
    /// Somebody answers who is not a scheduler.
    #[error("what answers at {url} is not a stepmesh scheduler: {reason}")]
    NotScheduler {
        /// Where.
        url: String,
        /// What it said.
        reason: String,
    },
    /// The token is missing or wrong.
    #[error("the scheduler at {url} refused the token: {reason}")]
    Unauthenticated {
        /// Where.
        url: String,
        /// What it said.
        reason: String,
    },
    /// The scheduler is of another release.
    #[error(
        "the scheduler at {url} speaks version {theirs} of the {protocol} protocol, this build version {ours}: run the \
         same release everywhere"
    )]
    Version {
        /// Where.
        url: String,
        /// `control` or `wire`.
        protocol: &'static str,
        /// This build's.
        ours: u32,
        /// The scheduler's.
        theirs: u32,
    },
    /// The deployment is not complete.
    #[error("{0}")]
    NotReady(String),
    /// The scheduler will not do it.
    #[error("the scheduler refused: {0}")]
    Refused(String),
    /// The scheduler has as much to do as it takes; later it may have less.
    #[error("the scheduler refused: {0}")]
    Overloaded(String),
    /// The connection or the session is over.
    #[error("the scheduler is lost: {0}")]
    Lost(String),
    /// More messages wait to be sent than the queue holds.
    #[error("{0} messages to the scheduler are waiting to be sent: it does not keep up")]
    Full(usize),
    /// The system refused a thread or a runtime.
    #[error("cannot start the control plane's thread: {0}")]
    System(#[from] std::io::Error),
}
