//! Where a transfer's time went, from the stamps that travel in band.

use stepmesh_proto::Stamps;

/// One request and its reply, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Trace {
    /// From `push_pull` until the FFN instance saw the request complete.
    pub a2f_ns: u64,
    /// In the FFN instance, until `next_batch` handed the request out.
    pub queue_ns: u64,
    /// In the FFN instance, from there until `respond`.
    pub process_ns: u64,
    /// From `respond` until this side saw the reply complete.
    pub f2a_ns: u64,
    /// From `push_pull` until this side saw the reply complete.
    pub round_trip_ns: u64,
    /// The two one-way times were measured with one clock. Otherwise they are halves of what both took together.
    pub same_clock: bool,
}

impl Trace {
    /// From the attention side's two stamps and the reply's. The FFN side's clock is taken for the same one when its
    /// stamps fall inside the round trip, which those of another host's clock practically never do.
    pub(crate) fn new(requested_ns: u64, landed_ns: u64, stamps: Stamps) -> Self {
        let round_trip_ns = landed_ns.saturating_sub(requested_ns);
        let queue_ns = u64::from(stamps.process_ns);
        let respond_ns = u64::from(stamps.respond_ns);
        let responded_ns = stamps.received_ns.saturating_add(respond_ns);
        let process_ns = respond_ns.saturating_sub(queue_ns);
        let same_clock = requested_ns <= stamps.received_ns && responded_ns <= landed_ns;
        let (a2f_ns, f2a_ns) = if same_clock {
            (stamps.received_ns - requested_ns, landed_ns - responded_ns)
        } else {
            let network = round_trip_ns.saturating_sub(respond_ns);
            (network / 2, network - network / 2)
        };
        Self { a2f_ns, queue_ns, process_ns, f2a_ns, round_trip_ns, same_clock }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_one_clock_the_phases_add_up_to_the_round_trip() {
        let stamps = Stamps { posted_ns: 0, received_ns: 1_010, process_ns: 5, respond_ns: 45 };
        let trace = Trace::new(1_000, 1_075, stamps);
        let expected =
            Trace { a2f_ns: 10, queue_ns: 5, process_ns: 40, f2a_ns: 20, round_trip_ns: 75, same_clock: true };
        assert_eq!(trace, expected);
    }

    #[test]
    fn across_hosts_the_wire_is_split_in_halves() {
        let stamps = Stamps { posted_ns: 0, received_ns: 9_000_000, process_ns: 5, respond_ns: 45 };
        let trace = Trace::new(1_000, 1_075, stamps);
        assert_eq!((trace.a2f_ns, trace.f2a_ns, trace.same_clock), (15, 15, false));
    }
}
