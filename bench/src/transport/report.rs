//! What the suite found: the JSON of the report, and its table.

use super::Machine;
use serde::Serialize;
use std::fmt;
use stepmesh_transport::Provider;

/// A floor that moved by more than this share during a row makes the row suspect.
const STEADY: f64 = 0.15;

/// All of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// How to do it again.
    pub command: String,
    /// What came of it.
    pub results: Vec<Row>,
}

/// What is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// A write-with-immediate there, one of the same size back.
    #[serde(rename = "pingpong")]
    PingPong,
    /// Writes-with-immediate one after the other.
    Stream,
    /// The same in both directions at once.
    StreamBoth,
}

/// Where the bytes are produced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// In memory of the sender's own.
    Copy,
    /// In the receiver's memory, mapped by the sender.
    InPlace,
}

/// The least that the machine can do it in.
#[derive(Clone, Debug, Serialize)]
pub struct Floor {
    /// By which means.
    pub name: &'static str,
    /// Of a round trip, or of one transfer of a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p50_us: Option<f64>,
    /// Of a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gbytes_per_s: Option<f64>,
    /// Ours / this: times for round trips, bandwidths for streams.
    #[serde(skip)]
    pub ratio: f64,
}

/// How the floor moved during a row.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Drift {
    /// The floor before the row, in the unit of the floor.
    pub before: f64,
    /// And after it.
    pub after: f64,
    /// |after − before| as a share of the smaller.
    pub share: f64,
    /// How often the row had been taken then.
    pub attempt: usize,
}

impl Drift {
    pub(super) fn new(before: f64, after: f64, attempt: usize) -> Self {
        Self { before, after, share: (after - before).abs() / before.min(after).max(f64::MIN_POSITIVE), attempt }
    }

    /// Whether the row can be trusted.
    pub fn is_steady(&self) -> bool {
        self.share <= STEADY
    }
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Over what.
    #[serde(serialize_with = "by_name")]
    pub provider: Provider,
    /// What is repeated.
    pub op: Operation,
    /// Where the bytes are produced.
    pub mode: Mode,
    /// Bytes of a transfer.
    pub bytes: usize,
    /// The median round trip, or the median time of one transfer of a stream.
    pub p50_us: f64,
    /// The 99th percentile of the same.
    pub p99_us: f64,
    /// Bytes moved in the median time, of all directions, in 10⁹ bytes a second. Of a round trip: both ways.
    pub gbytes_per_s: f64,
    /// What `ratio` refers to: the mean of before and after the row.
    pub floor: Floor,
    /// Ours / floor: times for round trips, bandwidths for streams.
    pub ratio: f64,
    /// What the floor did meanwhile.
    pub drift: Drift,
    /// The same work under other circumstances: memory that no cache holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cold: Option<Floor>,
}

fn by_name<S: serde::Serializer>(provider: &Provider, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(provider.name())
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::PingPong => "pingpong",
            Self::Stream => "stream",
            Self::StreamBoth => "stream_both",
        })
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Copy => "copy",
            Self::InPlace => "in_place",
        })
    }
}

impl Row {
    /// The head of the table that rows are lines of.
    pub const HEAD: &'static str = "op           mode         bytes     p50 µs     p99 µs     GB/s  floor                    \
                                    floor µs     GB/s  ratio";
}

/// A line of the table.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op, mode, bytes, p50_us, p99_us, gbytes_per_s, floor, ratio, drift, cold, .. } = self;
        write!(
            f,
            "{op:<12} {mode:<9} {bytes:>8} {p50_us:>10.3} {p99_us:>10.3} {gbytes_per_s:>8.2}  {:<22}",
            floor.name
        )?;
        match floor.p50_us {
            Some(time) => write!(f, " {time:>10.3}")?,
            None => write!(f, " {:>10}", "")?,
        }
        match floor.gbytes_per_s {
            Some(rate) => write!(f, " {rate:>8.2}")?,
            None => write!(f, " {:>8}", "")?,
        }
        write!(f, "  {ratio:>5.2}")?;
        if let Some(cold) = cold {
            write!(f, "  ({}: {:.2})", cold.name, cold.ratio)?;
        }
        if !drift.is_steady() {
            write!(f, "  floor drifted by {:.0} %", drift.share * 100.0)?;
        }
        Ok(())
    }
}

/// The whole table.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { cpu, cpus, pinned, kernel, load } = &self.machine;
        writeln!(f, "{cpu}, {cpus} CPUs, ends on {pinned:?}, Linux {kernel}, load {load:?}")?;
        writeln!(f, "{}", Row::HEAD)?;
        self.results.iter().try_for_each(|row| writeln!(f, "{row}"))
    }
}
