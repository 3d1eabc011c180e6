//! The `mem` provider: devices of one process on a simulated network with a virtual clock and scripted faults.
//!
//! A [`Fabric`] is the network. It is a discrete-event simulation: what is posted becomes a message with an arrival
//! time, drawn from the fabric's seed, and takes effect when the clock has reached that time, as on a NIC without the
//! receiving side's help. The clock moves only when it is told to. The same seed and the same calls give the same
//! schedule, so a failure that a random test finds can be replayed.
//!
//! ```
//! use stepmesh_transport::mem::{Fabric, FabricOptions};
//! # fn main() -> Result<(), stepmesh_transport::TransportError> {
//! let fabric = Fabric::new(FabricOptions { seed: 42, ..FabricOptions::default() });
//! let mut endpoint = fabric.device("attention-0").endpoint()?;
//! let mut completions = Vec::new();
//! while fabric.advance_to_next() {
//!     endpoint.poll(&mut completions)?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! * Bytes are read from their source when they arrive, not when they are posted: a source that is reused too early is
//!   seen as corruption.
//! * What a NIC enforces is enforced on arrival: key, bounds, rights, and that the grant and the link still stand.
//! * A lane keeps its order; between lanes there is none.
//! * [`crate::Endpoint::wait`] returns at once: whoever drives the clock decides what happens next.

mod delivery;
mod descriptor;
mod endpoint;
mod fault;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod link;
mod memory;
mod network;
mod numbered;

pub use fault::{Fault, FaultPlan};

use crate::{Clock, Device};
use network::Network;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a simulated network is like. A range of times that is empty or reversed means its start.
#[derive(Clone, Debug, PartialEq)]
pub struct FabricOptions {
    /// What all that is drawn is drawn from.
    pub seed: u64,
    /// How long a message is under way, drawn for each.
    pub latency: Range<Duration>,
    /// What each lane of a link adds to that, drawn once: lanes of different rails differ for good.
    pub lane_skew: Range<Duration>,
    /// Bytes per second that a device sends; unlimited if none.
    pub bandwidth: Option<u64>,
    /// How long after a death or a break a peer notices.
    pub detection: Range<Duration>,
    /// How long a partition may last before links over it end.
    pub silence: Duration,
    /// Work requests that one lane holds before `WouldBlock`.
    pub queue_depth: usize,
    /// Whether imported regions are mapped, as `shm` does it.
    pub maps_peer_memory: bool,
}

impl Default for FabricOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            latency: Duration::from_micros(2)..Duration::from_micros(10),
            lane_skew: Duration::ZERO..Duration::ZERO,
            bandwidth: None,
            detection: Duration::from_millis(1)..Duration::from_millis(50),
            silence: Duration::from_secs(1),
            queue_depth: 128,
            maps_peer_memory: false,
        }
    }
}

/// A simulated network. Clones share it.
#[derive(Clone)]
pub struct Fabric {
    network: Arc<Mutex<Network>>,
}

impl Default for Fabric {
    fn default() -> Self {
        Self::new(FabricOptions::default())
    }
}

impl Fabric {
    /// A network without devices, at the start of its time.
    pub fn new(options: FabricOptions) -> Self {
        Self { network: Arc::new(Mutex::new(Network::new(options))) }
    }

    /// A device; the name stands for it in faults. Endpoints made after the device was killed are those of its
    /// restarted process.
    pub fn device(&self, name: impl Into<String>) -> Arc<dyn Device> {
        Arc::new(endpoint::MemDevice { fabric: self.clone(), name: name.into().into() })
    }

    /// The clock. To move it by hand is to advance the fabric.
    pub fn clock(&self) -> Clock {
        self.network().clock.clone()
    }

    /// When the next thing happens, if anything will.
    pub fn next_event(&self) -> Option<Instant> {
        self.network().next_event()
    }

    /// Moves the clock to the next event, if it is not there yet, and lets all happen that is due; whether there was
    /// an event.
    pub fn advance_to_next(&self) -> bool {
        let mut network = self.network();
        let Some(next) = network.next_event() else { return false };
        let clock = network.clock.clone();
        clock.advance(next.saturating_duration_since(clock.now()));
        network.run();
        true
    }

    /// Moves the clock and lets all happen that is due.
    pub fn advance(&self, by: Duration) {
        let mut network = self.network();
        network.clock.advance(by);
        network.run();
    }

    /// Replaces the random faults and schedules the script's, counted from now.
    pub fn set_faults(&self, plan: FaultPlan) {
        self.network().set_faults(plan);
    }

    /// Makes a fault happen now.
    pub fn inject(&self, fault: Fault) {
        let mut network = self.network();
        let now = network.clock.now();
        network.inject(now, fault);
    }

    /// Kills the process of a device: its endpoints do nothing any more, and its peers notice after a while.
    pub fn kill(&self, device: &str) {
        self.inject(Fault::Kill { device: device.into() });
    }

    /// Breaks all links between two devices; both ends notice after a while.
    pub fn break_links(&self, a: &str, b: &str) {
        self.inject(Fault::BreakLinks { a: a.into(), b: b.into() });
    }

    /// Holds up what is and will be under way from one device to another on a lane, for a time.
    pub fn hold_lane(&self, from: &str, to: &str, lane: u8, time: Duration) {
        self.inject(Fault::HoldLane { from: from.into(), to: to.into(), lane, time });
    }

    /// Holds up everything between two devices for a time.
    pub fn partition(&self, a: &str, b: &str, time: Duration) {
        self.inject(Fault::Partition { a: a.into(), b: b.into(), time });
    }

    fn network(&self) -> MutexGuard<'_, Network> {
        self.network.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
