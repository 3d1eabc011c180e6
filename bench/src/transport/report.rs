//! What the suite found, in JSON and as lines of a table.

use crate::Drift;
use crate::compare::Comparison;
use serde::Serialize;
use std::fmt;
use stepmesh_transport::Provider;

/// One result.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Line {
    /// Ours on its floor.
    Row(Row),
    /// Ours next to another system.
    Comparison(Comparison),
}

/// What is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// A write-with-immediate there, one of the same size back.
    #[serde(rename = "pingpong")]
    PingPong,
    /// A plain write there, one of the same size back; each side polls the byte that lands last.
    #[serde(rename = "pingpong_plain")]
    PingPongPlain,
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
    /// What `ratio` refers to: the mean of before and after the row, or the median of the rounds.
    pub floor: Floor,
    /// Ours / floor: times for round trips, bandwidths for streams.
    pub ratio: f64,
    /// What the floor did meanwhile.
    pub drift: Drift,
    /// The same work under other circumstances: memory that no cache holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cold: Option<Floor>,
    /// Where ours and the floor took turns: ours and the floor of each round, in the unit of the floor.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<[f64; 2]>,
}

fn by_name<S: serde::Serializer>(provider: &Provider, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(provider.name())
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::PingPong => "pingpong",
            Self::PingPongPlain => "pingpong_plain",
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
    pub const HEAD: &'static str = "op             mode         bytes     p50 µs     p99 µs     GB/s  floor                    \
                                    floor µs     GB/s  ratio";
}

/// A line of the table.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op, mode, bytes, p50_us, p99_us, gbytes_per_s, floor, ratio, drift, cold, .. } = self;
        write!(
            f,
            "{op:<14} {mode:<9} {bytes:>8} {p50_us:>10.3} {p99_us:>10.3} {gbytes_per_s:>8.2}  {:<22}",
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

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Row(row) => row.fmt(f),
            Self::Comparison(comparison) => comparison.fmt(f),
        }
    }
}
