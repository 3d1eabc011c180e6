//! What an attention instance counts while it works: wire latencies, stalls, tokens.

use hdrhistogram::Histogram;
use stepmesh_mesh::Trace;
use stepmesh_proto::control::{Bucket, MemberStats};

/// Figures since the last reset. Recording allocates nothing.
#[derive(Debug)]
pub(crate) struct Figures {
    /// What was recorded last: the histograms are large and seldom in a cache, and between two stages every microsecond counts.
    recent: Vec<Trace>,
    a2f: Histogram<u64>,
    f2a: Histogram<u64>,
    pub(crate) stalled_ns: u64,
    pub(crate) busy_ns: u64,
    pub(crate) steps: u64,
    pub(crate) tokens: u64,
}

const LONGEST_NS: u64 = 60_000_000_000;
/// Traces that go into the histograms together.
const RECENT: usize = 128;

impl Default for Figures {
    fn default() -> Self {
        // Constant bounds: 1 ns to a minute at three digits.
        let histogram = || Histogram::new_with_bounds(1, LONGEST_NS, 3).unwrap_or_else(|_| unreachable!());
        Self {
            recent: Vec::with_capacity(RECENT),
            a2f: histogram(),
            f2a: histogram(),
            stalled_ns: 0,
            busy_ns: 0,
            steps: 0,
            tokens: 0,
        }
    }
}

impl Figures {
    pub(crate) fn record(&mut self, trace: Trace) {
        self.recent.push(trace);
        if self.recent.len() == RECENT {
            self.settle();
        }
    }

    fn settle(&mut self) {
        for trace in self.recent.drain(..) {
            self.a2f.saturating_record(trace.a2f_ns.max(1));
            self.f2a.saturating_record(trace.f2a_ns.max(1));
        }
    }

    pub(crate) fn report(&mut self, request: u64, attention_rank: u32) -> MemberStats {
        self.settle();
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
        self.recent.clear();
        self.a2f.reset();
        self.f2a.reset();
        (self.stalled_ns, self.busy_ns, self.steps, self.tokens) = (0, 0, 0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_tells_of_every_trace_since_the_last_reset() {
        let mut figures = Figures::default();
        let count = |figures: &mut Figures| {
            let stats = figures.report(1, 0);
            [stats.a2f, stats.f2a].map(|buckets| buckets.iter().map(|bucket| bucket.count).sum::<u64>())
        };
        for recorded in 1..=2 * RECENT as u64 + 3 {
            figures.record(Trace { a2f_ns: recorded, f2a_ns: 2 * recorded, ..Trace::default() });
            assert_eq!(count(&mut figures), [recorded; 2]);
        }
        (0..2 * RECENT + 5).for_each(|_| figures.record(Trace::default()));
        assert_eq!(count(&mut figures), [4 * RECENT as u64 + 8; 2]);
        figures.record(Trace::default());
        figures.reset();
        assert_eq!(count(&mut figures), [0; 2]);
    }
}
