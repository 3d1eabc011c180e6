//! What a scheduler is told at its start: the deployment's shape, its deadlines and its limits.

use std::time::Duration;
use thiserror::Error;

/// The shape of the deployment and the scheduler's deadlines.
#[derive(Clone, Debug)]
pub struct SchedulerOptions {
    /// Attention instances of a complete deployment.
    pub attention: u32,
    /// FFN instances of a complete deployment.
    pub ffn: u32,
    /// How often a member says that it lives; told to it in `Welcome`.
    pub heartbeat: Duration,
    /// A member that said nothing for this long is lost. Any message counts.
    pub loss: Duration,
    /// The longest that a link may take to come up, and that a member may take to fence its end of one.
    pub link_timeout: Duration,
    /// The longest that a question for figures waits for attention instances.
    pub stats_timeout: Duration,
    /// Sequences in flight at most.
    pub max_sequences: usize,
}

impl SchedulerOptions {
    /// An `attention` A, `ffn` F deployment with a heartbeat a second and a loss after three.
    pub fn new(attention: u32, ffn: u32) -> Self {
        Self {
            attention,
            ffn,
            heartbeat: Duration::from_secs(1),
            loss: Duration::from_secs(3),
            link_timeout: Duration::from_secs(60),
            stats_timeout: Duration::from_secs(2),
            max_sequences: 65_536,
        }
    }

    /// Members of a complete deployment.
    pub fn members(&self) -> usize {
        self.attention as usize + self.ffn as usize
    }

    pub(super) fn check(&self) -> Result<(), OptionsError> {
        if self.attention == 0 || self.ffn == 0 {
            return Err(OptionsError::EmptySide { attention: self.attention, ffn: self.ffn });
        }
        if self.heartbeat.is_zero() || self.loss < self.heartbeat * 2 {
            return Err(OptionsError::Heartbeat { heartbeat: self.heartbeat, loss: self.loss });
        }
        Ok(())
    }
}

/// Why a scheduler cannot be started with these options.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OptionsError {
    /// A side without instances.
    #[error("a deployment has at least one instance on each side, not {attention} attention and {ffn} FFN")]
    EmptySide {
        /// Attention instances asked for.
        attention: u32,
        /// FFN instances asked for.
        ffn: u32,
    },
    /// A member would be lost between two heartbeats.
    #[error(
        "a heartbeat of {heartbeat:?} and a loss after {loss:?}: the loss must be at least two heartbeats, and the \
         heartbeat above zero"
    )]
    Heartbeat {
        /// The interval asked for.
        heartbeat: Duration,
        /// The silence asked for.
        loss: Duration,
    },
}

/// Where link secrets come from: 16 fresh bytes a call, or why there are none now.
pub type SecretSource = Box<dyn FnMut() -> Result<[u8; 16], String> + Send>;

/// Link secrets from the system's random number generator.
pub fn system_secrets() -> SecretSource {
    Box::new(|| {
        let mut secret = [0; 16];
        getrandom::fill(&mut secret).map_err(|error| format!("the system has no random bytes: {error}"))?;
        Ok(secret)
    })
}
