//! The conformance suite: what every provider promises, one public function a behaviour.
//!
//! A provider implements [`Fixture`] and writes `stepmesh_transport::conformance_suite!(MyFixture::new());` in an
//! integration test; that makes one `#[test]` of each behaviour. Both ends of every test live on one thread, which
//! polls them in turn; descriptors are exchanged by hand. Functions panic where a promise is broken: this module is a
//! test harness and nothing else uses it.
//!
//! ```ignore
//! struct Tcp;
//!
//! impl Fixture for Tcp {
//!     fn device(&mut self) -> Arc<dyn Device> {
//!         stepmesh_transport::open(Provider::Tcp, &DeviceOptions::default()).expect("a loopback device")
//!     }
//!     fn doomed_peer(&mut self) -> Option<Box<dyn DoomedPeer>> {
//!         Some(Box::new(testing::child::spawn("doomed_peer")))
//!     }
//! }
//!
//! /// Not a test of its own: the process that `doomed_peer` starts and kills.
//! #[test]
//! fn doomed_peer() {
//!     testing::child::serve(|| Tcp.device());
//! }
//!
//! stepmesh_transport::conformance_suite!(Tcp);
//! ```

mod connecting;
mod ending;
mod fetch_add;
mod mapping;
mod memory;
mod queueing;
mod refusing;
mod registering;
mod soak;
mod waiting;
mod world;
mod writing;

pub mod child;

pub use connecting::*;
pub use ending::*;
pub use fetch_add::*;
pub use mapping::*;
pub use memory::{DeviceMemory, MappedFile};
pub use queueing::*;
pub use refusing::*;
pub use registering::*;
pub use soak::*;
pub use waiting::*;
pub use world::{A, B, End, Granted, Link, World, notify, pattern, spec, work, write, write_immediate};
pub use writing::*;

use crate::{Clock, Descriptor, Device, LinkSpec};
use std::sync::Arc;
use std::time::Duration;

/// How the suite gets at a provider.
pub trait Fixture {
    /// Opens a device; those of one fixture reach each other.
    fn device(&mut self) -> Arc<dyn Device>;

    /// Lets a little time pass, after a round of polls that brought nothing. A virtual clock moves to its next event.
    fn pass(&mut self) {
        std::thread::sleep(Duration::from_micros(20));
    }

    /// The clock that time-outs are measured with.
    fn clock(&self) -> Clock {
        Clock::system()
    }

    /// Starts a peer that can be killed without warning; none skips the tests that need one.
    fn doomed_peer(&mut self) -> Option<Box<dyn DoomedPeer>> {
        None
    }
}

/// A peer, in a process of its own where the provider's peers are processes, that dies as by `kill -9`.
pub trait DoomedPeer {
    /// Opens a link with `spec`, connects it to the descriptor `peer`, and returns its own.
    fn connect(&mut self, spec: LinkSpec, peer: &[u8]) -> Descriptor;

    /// Waits for the link to be connected, allocates `len` bytes and grants them for writing.
    fn grant(&mut self, len: usize) -> Descriptor;

    /// Polls, if nobody else does it for the peer.
    fn poll(&mut self) {}

    /// Kills it.
    fn kill(&mut self);
}

/// One `#[test]` for each behaviour of the suite, with a fresh fixture from the expression.
#[macro_export]
macro_rules! conformance_suite {
    ($fixture:expr) => {
        $crate::conformance_suite! { @tests $fixture;
            connects_both_ways_and_each_end_sees_it_once
            refuses_a_wrong_secret
            refuses_a_wrong_incarnation
            refuses_the_descriptor_of_a_dead_incarnation
            gives_up_connecting_to_nobody_in_time
            refuses_garbage_descriptors
            refuses_link_specs_that_cannot_be
            posts_nothing_to_a_link_that_is_not_connected
            writes_bytes
            delivers_bytes_before_their_immediate
            reads_bytes
            carries_zero_length_writes_and_immediates
            writes_a_whole_region_at_once
            writes_odd_sizes_at_unaligned_offsets
            carries_traffic_both_ways_at_once
            loses_nothing_when_queues_are_full
            posts_a_chain_whole_or_not_at_all
            refuses_work_that_cannot_be
            lets_an_inline_source_be_reused_at_once
            reports_only_what_was_signalled
            counts_two_lanes_once_each
            counts_all_lanes_once_each
            refuses_a_wrong_key
            refuses_an_offset_beyond_the_region
            refuses_a_length_beyond_the_region
            refuses_an_offset_that_overflows
            refuses_a_read_beyond_the_region
            refuses_a_write_to_a_read_only_grant
            refuses_the_key_of_another_link
            nothing_reaches_memory_after_the_end
            grants_no_more_than_was_allocated
            ends_one_link_and_leaves_the_others
            closes_after_what_was_sent_has_arrived
            a_closed_link_is_unknown_and_closing_again_does_nothing
            flushes_what_was_outstanding_when_the_peer_closes
            keeps_a_dropped_source_alive_until_it_is_sent
            keeps_a_granted_region_alive_when_its_owner_drops_it
            a_late_stripe_never_reaches_the_next_incarnation
            sees_a_killed_peer_within_a_second
            a_waker_ends_a_wait
            a_wake_before_the_wait_is_not_lost
            a_wait_ends_by_its_timeout
            a_wait_ends_when_something_arrives
            shows_what_was_produced_in_a_mapped_region
            maps_a_read_only_grant_read_only
            maps_regions_side_by_side
            sends_from_memory_of_the_caller_and_receives_into_it
            lets_peers_reach_memory_of_the_caller
            refuses_to_register_what_cannot_be
            grants_no_more_than_was_registered
            keeps_registered_memory_until_nothing_uses_it
            touches_no_device_memory
            adds_to_a_number_of_the_peers
            adds_one_after_the_other_from_several_links
            refuses_a_fetch_add_that_cannot_be
            refuses_a_fetch_add_that_was_not_granted
            survives_a_random_soak
        }
    };
    (@tests $fixture:expr; $($behaviour:ident)*) => {
        $(
            #[test]
            fn $behaviour() {
                $crate::testing::$behaviour(&mut $fixture);
            }
        )*
    };
}
