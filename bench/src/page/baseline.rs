//! What has moved since an earlier run, beyond what runs differ by anyway.

use super::Results;
use super::figures::{Kind, figure, kind};
use serde_json::Value;

/// Runs of the same program differ by less.
const NOISE: f64 = 0.1;

/// A figure that moved.
#[derive(Clone, Debug)]
pub struct Moved {
    /// Which result.
    pub what: String,
    /// The figure.
    pub figure: &'static str,
    /// Then.
    pub before: f64,
    /// Now.
    pub now: f64,
    /// By which share.
    pub change: f64,
    /// For the worse.
    pub worse: bool,
}

/// The figures that moved, by the ratio to the floor of the same run where there is one. A result whose floor drifted
/// has to move further.
pub fn compare(before: &[Results], now: &[Results]) -> Vec<Moved> {
    let rows = |all: &'_ [Results]| all.iter().flat_map(|results| results.rows.clone()).collect::<Vec<_>>();
    let (before, now) = (rows(before), rows(now));
    let pairs =
        now.iter().filter_map(|now| Some((before.iter().find(|before| identity(before) == identity(now))?, now)));
    pairs.filter_map(|(before, now)| moved(before, now)).collect()
}

fn moved(before: &Value, now: &Value) -> Option<Moved> {
    let (name, more_is_better) = match kind(now)? {
        Kind::Pipeline => ("efficiency", true),
        Kind::Transport => ("ratio", !now["op"].as_str().is_some_and(|op| op.starts_with("pingpong"))),
        Kind::Comparison => ("ratio", false),
        Kind::PushPull if now.get("ratio").is_some() => ("ratio", false),
        Kind::PushPull => ("p50_us", false),
        Kind::Scaling => ("cpu_us_per_transfer", false),
        Kind::Product => ("ratio", true),
        Kind::Decoding => ("tokens_per_s", true),
        Kind::Failure => return None,
    };
    let (was, is) = (figure(before, name), figure(now, name));
    let change = is / was - 1.0;
    let drift = [before, now].map(|row| figure(&row["drift"], "share")).into_iter().fold(0.0, f64::max);
    let beyond = change.is_finite() && change.abs() > NOISE.max(drift);
    beyond.then(|| Moved {
        what: identity(now),
        figure: name,
        before: was,
        now: is,
        change,
        worse: (change > 0.0) != more_is_better,
    })
}

/// What a result is of: everything that is not measured.
fn identity(row: &Value) -> String {
    let keys = [
        "peer",
        "provider",
        "op",
        "mode",
        "bytes",
        "reply_bytes",
        "attention",
        "ffn",
        "engine",
        "routing",
        "batch",
        "a2f_bytes",
        "f2a_bytes",
        "ffn_us",
        "clock",
        "attention_us",
        "wire_us",
        "layers",
        "microbatches",
        "layer",
        "weights",
        "tokens",
        "rows",
        "cols",
        "model",
        "dtype",
        "threads",
        "new_tokens",
        "sides",
        "driver",
    ];
    let shown = keys.iter().filter_map(|key| Some(format!("{key} {}", row.get(key)?)));
    shown.collect::<Vec<_>>().join(", ").replace('"', "")
}
