//! Faults as plain values, which a script names and a random test draws.

use std::ops::Range;
use std::time::Duration;

/// One thing that goes wrong. Devices are named as in [`super::Fabric::device`]; unknown ones are ignored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A process dies as by `kill -9`.
    Kill {
        /// Its device.
        device: String,
    },
    /// All links between two devices break: nothing more gets through on them, and both ends notice after a while.
    BreakLinks {
        /// One.
        a: String,
        /// The other.
        b: String,
    },
    /// Messages on a lane, in one direction, do not arrive before a time has passed, those under way included.
    HoldLane {
        /// The sender.
        from: String,
        /// The receiver.
        to: String,
        /// The lane, of all links between the two.
        lane: u8,
        /// For so long.
        time: Duration,
    },
    /// Nothing gets through between two devices until a time has passed; what was under way arrives then. Links end
    /// if that is longer than [`super::FabricOptions::silence`].
    Partition {
        /// One.
        a: String,
        /// The other.
        b: String,
        /// For so long.
        time: Duration,
    },
}

/// What goes wrong at random, and what goes wrong by script. The default is that nothing does.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FaultPlan {
    /// The share (0 to 1) of posted messages that are late, and hold up what follows on their lane.
    pub late: f64,
    /// How late.
    pub lateness: Range<Duration>,
    /// The share (0 to 1) of posted messages that are lost, and with them their lane and its link.
    pub lost: f64,
    /// What happens so long after the plan was set.
    pub script: Vec<(Duration, Fault)>,
}
