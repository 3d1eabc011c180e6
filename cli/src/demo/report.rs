//! The figures of a run: what was measured, the table, the JSON.

use crate::client::Figures;
use crate::decode::Decoded;
use crate::error::CliError;
use crate::output::say;
use crate::prompts::Prompt;
use crate::settings::DeploymentSettings;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::time::Duration;
use stepmesh_model::Text;

/// Everything that was timed, over all rounds.
pub(crate) struct Timings {
    rounds: u64,
    tokens: u64,
    wall: Duration,
    /// Time per output token, of all but each sequence's first, in nanoseconds.
    tpot: Histogram<u64>,
    a2f: Histogram<u64>,
    f2a: Histogram<u64>,
    stalled_ns: u64,
    busy_ns: u64,
}

impl Default for Timings {
    fn default() -> Self {
        let histogram = || Histogram::new_with_bounds(1, u64::MAX >> 16, 3).unwrap_or_else(|_| unreachable!());
        Self {
            rounds: 0,
            tokens: 0,
            wall: Duration::ZERO,
            tpot: histogram(),
            a2f: histogram(),
            f2a: histogram(),
            stalled_ns: 0,
            busy_ns: 0,
        }
    }
}

/// One sequence in the JSON report.
#[derive(Serialize)]
pub(crate) struct SequenceReport<'a> {
    prompt: &'a [u32],
    tokens: &'a [u32],
    /// Prompt and continuation, where the prompt was text.
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

impl<'a> SequenceReport<'a> {
    /// Prompts and what became of them.
    pub(crate) fn all(prompts: &'a [Prompt], sequences: &'a [Decoded], text: Option<&Text>) -> Vec<Self> {
        let report = |(prompt, decoded): (&'a Prompt, &'a Decoded)| {
            let continued = text.and_then(|text| text.decode(&decoded.tokens).ok()).unwrap_or_default();
            let text = prompt.text.as_ref().map(|given| given.clone() + &continued);
            Self { prompt: &prompt.tokens, tokens: &decoded.tokens, text }
        };
        prompts.iter().zip(sequences).map(report).collect()
    }
}

/// The JSON report.
#[derive(Serialize)]
pub(crate) struct Report<'a> {
    sequences: Vec<SequenceReport<'a>>,
    deployment: DeploymentReport,
    tokens_per_s: f64,
    tpot_us: WithMean,
    a2f_us: Percentiles,
    f2a_us: Percentiles,
    stall_share: f64,
}

#[derive(Serialize)]
struct DeploymentReport {
    attention: u32,
    ffn: u32,
    microbatches: u16,
    transport: String,
    dtype: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<u32>,
    /// Where hidden states are on their way, if a GPU computes.
    #[serde(skip_serializing_if = "Option::is_none")]
    slots: Option<String>,
}

#[derive(Serialize)]
struct WithMean {
    mean: f64,
    p50: f64,
    p99: f64,
}

#[derive(Serialize)]
struct Percentiles {
    p50: f64,
    p99: f64,
}

impl Timings {
    /// Counts one round of sequences that took `wall` together.
    pub(crate) fn add_round(&mut self, sequences: &[Decoded], wall: Duration) {
        self.rounds += 1;
        self.wall += wall;
        for sequence in sequences {
            self.tokens += sequence.tokens.len() as u64;
            sequence.elapsed_ns.iter().skip(1).for_each(|ns| self.tpot.saturating_record((*ns).max(1)));
        }
    }

    /// Takes the attention instances' figures in.
    pub(crate) fn add_stats(&mut self, members: &[Figures]) {
        for member in members {
            let merge = |histogram: &mut Histogram<u64>, buckets: &[(u64, u64)]| {
                buckets.iter().for_each(|(ns, count)| histogram.saturating_record_n((*ns).max(1), *count));
            };
            merge(&mut self.a2f, &member.a2f);
            merge(&mut self.f2a, &member.f2a);
            self.stalled_ns += member.stalled_ns;
            self.busy_ns += member.busy_ns;
        }
    }

    /// Rounds so far.
    pub(crate) fn rounds(&self) -> u64 {
        self.rounds
    }

    fn tokens_per_s(&self) -> f64 {
        if self.wall.is_zero() { 0.0 } else { self.tokens as f64 / self.wall.as_secs_f64() }
    }

    fn stall_share(&self) -> f64 {
        if self.busy_ns == 0 { 0.0 } else { self.stalled_ns as f64 / self.busy_ns as f64 }
    }

    /// One line about the rounds so far.
    pub(crate) fn round_line(&self) -> String {
        format!("round {:<6}  {:>10.1} tokens/s, all rounds alike", self.rounds, self.tokens_per_s())
    }

    /// The table.
    pub(crate) fn print(&self) -> Result<(), CliError> {
        let row = |name: &str, histogram: &Histogram<u64>, mean: bool, what: &str| {
            let cell = |value: f64| format!("{:>10.1} µs", value / 1e3);
            let empty = " ".repeat(13);
            if histogram.is_empty() {
                return say(&format!("{name:<12} {:>13}   {what}", "no data"));
            }
            let mean = if mean { cell(histogram.mean()) } else { empty };
            let [p50, p99] = [0.5, 0.99].map(|q| cell(histogram.value_at_quantile(q) as f64));
            say(&format!("{name:<12} {mean} {p50} {p99}   {what}"))
        };
        let rounds = if self.rounds > 1 { format!(" in {} rounds", self.rounds) } else { String::new() };
        let seconds = self.wall.as_secs_f64();
        say("")?;
        say(&format!("{:<12} {:>13} {:>13} {:>13}", "", "mean", "p50", "p99"))?;
        row("TPOT", &self.tpot, true, "time per output token, after a sequence's first")?;
        row("A2F", &self.a2f, false, "attention to FFN")?;
        row("F2A", &self.f2a, false, "FFN to attention")?;
        say("")?;
        let (rate, share) = (self.tokens_per_s(), self.stall_share() * 100.0);
        say(&format!("{:<12} {rate:>10.1} tokens/s   {} tokens{rounds}, {seconds:.2} s", "throughput", self.tokens))?;
        say(&format!("{:<12} {share:>10.1} %          work in flight, none to compute on", "stall share"))
    }

    /// For `--json`.
    pub(crate) fn report<'a>(
        &self,
        prompts: &'a [Prompt],
        sequences: &'a [Decoded],
        text: Option<&Text>,
        settings: &DeploymentSettings,
    ) -> Report<'a> {
        let at = |histogram: &Histogram<u64>, q| histogram.value_at_quantile(q) as f64 / 1e3;
        let percentiles = |histogram| Percentiles { p50: at(histogram, 0.5), p99: at(histogram, 0.99) };
        Report {
            sequences: SequenceReport::all(prompts, sequences, text),
            deployment: DeploymentReport {
                attention: settings.attention.get(),
                ffn: settings.ffn.get(),
                microbatches: settings.microbatches.get(),
                transport: settings.transport.to_string(),
                dtype: settings.dtype.to_string(),
                gpu: settings.gpu,
                slots: settings.gpu.map(|_| settings.slots.to_string()),
            },
            tokens_per_s: self.tokens_per_s(),
            tpot_us: WithMean { mean: self.tpot.mean() / 1e3, p50: at(&self.tpot, 0.5), p99: at(&self.tpot, 0.99) },
            a2f_us: percentiles(&self.a2f),
            f2a_us: percentiles(&self.f2a),
            stall_share: self.stall_share(),
        }
    }
}
