//! What an attention instance counts while it works: wire latencies, stalls, tokens.

use hdrhistogram::Histogram;
use stepmesh_mesh::Trace;
use stepmesh_proto::control::{Bucket, MemberStats};

/// Figures since the last reset. Recording allocates nothing.
#[derive(Debug)]
pub(crate) struct Figures {
    a2f: Histogram<u64>,
    f2a: Histogram<u64>,
    pub(crate) stalled_ns: u64,
    pub(crate) busy_ns: u64,
    pub(crate) steps: u64,
    pub(crate) tokens: u64,
}

const LONGEST_NS: u64 = 60_000_000_000;

impl Default for Figures {
    fn default() -> Self {
        // Constant bounds: 1 ns to a minute at three digits.
        let histogram = || Histogram::new_with_bounds(1, LONGEST_NS, 3).unwrap_or_else(|_| unreachable!());
        Self { a2f: histogram(), f2a: histogram(), stalled_ns: 0, busy_ns: 0, steps: 0, tokens: 0 }
    }
}

impl Figures {
    pub(crate) fn record(&mut self, trace: Trace) {
        self.a2f.saturating_record(trace.a2f_ns.max(1));
        self.f2a.saturating_record(trace.f2a_ns.max(1));
    }

    pub(crate) fn report(&self, request: u64, attention_rank: u32) -> MemberStats {
        let buckets = |histogram: &Histogram<u64>| {
            let recorded = histogram.iter_recorded();
            recorded.map(|step| Bucket { value_ns: step.value_iterated_to(), count: step.count_at_value() }).collect()
        };
        MemberStats {
            request,
            attention_rank,
            a2f: buckets(&self.a2f),
            f2a: buckets(&self.f2a),
            stalled_ns: self.stalled_ns,
            busy_ns: self.busy_ns,
            steps: self.steps,
            tokens: self.tokens,
        }
    }

    pub(crate) fn reset(&mut self) {
        self.a2f.reset();
        self.f2a.reset();
        (self.stalled_ns, self.busy_ns, self.steps, self.tokens) = (0, 0, 0, 0);
    }
}
