//! The values of settings that are words: transport, precision, policy.

use clap::ValueEnum;
use serde::Deserialize;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;
use stepmesh_mesh::Policy;
use stepmesh_model::Dtype;
use stepmesh_pipeline::{Slots, Wire};
use stepmesh_transport::{Provider, verbs};

/// The data plane: shared memory (processes of one host), TCP (any two hosts) or RDMA verbs (hosts with such devices).
#[derive(ValueEnum, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Transport {
    Shm,
    Tcp,
    Verbs,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Verbs => "verbs",
        })
    }
}

/// A type of numbers: what is computed in, or what rows travel as.
#[derive(ValueEnum, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Precision {
    /// 32-bit floating point: exact
    F32,
    /// bfloat16
    Bf16,
    /// FP8 weights times FP8 activations (W8A8), all else bfloat16; on the wire: FP8 out, bfloat16 back
    Fp8,
    /// As fp8, all else 32-bit floating point: for tests
    #[value(name = "fp8-f32")]
    #[serde(rename = "fp8-f32")]
    Fp8F32,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Dtype::from(*self).name())
    }
}

impl From<Precision> for Wire {
    fn from(precision: Precision) -> Self {
        Self::of(precision.into())
    }
}

/// Where a daemon that computes on a GPU has its slots.
#[derive(ValueEnum, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum SlotMemory {
    /// The GPU's memory (over tcp: pinned host memory); over shm all daemons alike
    Gpu,
    /// Pinned host memory, there and back by copy engines
    Pinned,
    /// Host memory, by the CPU
    Host,
}

impl fmt::Display for SlotMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gpu => "gpu",
            Self::Pinned => "pinned",
            Self::Host => "host",
        })
    }
}

impl From<SlotMemory> for Slots {
    fn from(memory: SlotMemory) -> Self {
        match memory {
            SlotMemory::Gpu => Self::Gpu,
            SlotMemory::Pinned => Self::Pinned,
            SlotMemory::Host => Self::Host,
        }
    }
}

/// How RDMA queue pairs are connected: by what the control plane carries, or by librdmacm, for fabrics that want it.
#[derive(ValueEnum, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Connect {
    Descriptors,
    ConnectionManager,
}

impl fmt::Display for Connect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Descriptors => "descriptors",
            Self::ConnectionManager => "connection-manager",
        })
    }
}

impl From<Connect> for verbs::Connect {
    fn from(connect: Connect) -> Self {
        match connect {
            Connect::Descriptors => Self::Descriptors,
            Connect::ConnectionManager => Self::ConnectionManager,
        }
    }
}

/// Names, at least one, with commas between them.
#[derive(Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(try_from = "String")]
pub(crate) struct Names(Vec<String>);

impl FromStr for Names {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names: Vec<_> = text.split(',').map(|name| name.trim().to_owned()).collect();
        if names.iter().any(String::is_empty) {
            return Err(format!("`{text}` is not a list of names with commas between them"));
        }
        Ok(Self(names))
    }
}

impl TryFrom<String> for Names {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Names> for Vec<String> {
    fn from(names: Names) -> Self {
        names.0
    }
}

/// When an FFN instance releases a batch.
#[derive(Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(try_from = "String")]
pub(crate) enum ReleasePolicy {
    /// With every attention instance that can still come.
    All,
    /// At once.
    Any,
    /// When this many have come.
    AtLeast(usize),
    /// As `All`, but no later than this after the first.
    Deadline(Duration),
}

impl FromStr for ReleasePolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || format!("`{text}` is not a policy: all, any, at-least:N (N from 1) or deadline:MICROSECONDS");
        match text.split_once(':') {
            None if text == "all" => Ok(Self::All),
            None if text == "any" => Ok(Self::Any),
            Some(("at-least", count)) => match count.parse() {
                Ok(count) if count > 0 => Ok(Self::AtLeast(count)),
                _ => Err(unknown()),
            },
            Some(("deadline", micros)) => {
                micros.parse().map(Duration::from_micros).map(Self::Deadline).map_err(|_| unknown())
            }
            _ => Err(unknown()),
        }
    }
}

impl TryFrom<String> for ReleasePolicy {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for ReleasePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Any => f.write_str("any"),
            Self::AtLeast(count) => write!(f, "at-least:{count}"),
            Self::Deadline(after) => write!(f, "deadline:{}", after.as_micros()),
        }
    }
}

impl From<Transport> for Provider {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Shm => Self::Shm,
            Transport::Tcp => Self::Tcp,
            Transport::Verbs => Self::Verbs,
        }
    }
}

impl From<Precision> for Dtype {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
            Precision::Fp8 => Self::Fp8,
            Precision::Fp8F32 => Self::Fp8F32,
        }
    }
}

impl From<ReleasePolicy> for Policy {
    fn from(policy: ReleasePolicy) -> Self {
        match policy {
            ReleasePolicy::All => Self::All,
            ReleasePolicy::Any => Self::Any,
            ReleasePolicy::AtLeast(count) => Self::AtLeast(count),
            ReleasePolicy::Deadline(after) => Self::Deadline(after),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_commas_between_them() {
        let names = |text: &str| text.parse::<Names>().map(Vec::from);
        assert_eq!(names("mlx5_0, mlx5_1:2").unwrap(), ["mlx5_0", "mlx5_1:2"]);
        assert_eq!(names("mlx5_0").unwrap(), ["mlx5_0"]);
        assert!(names("").is_err() && names("mlx5_0,").unwrap_err().contains("commas"));
    }

    #[test]
    fn a_policy_reads_what_it_writes() {
        for text in ["all", "any", "at-least:3", "deadline:250"] {
            assert_eq!(text.parse::<ReleasePolicy>().unwrap().to_string(), text);
        }
        for text in ["", "most", "at-least:0", "at-least:", "deadline:soon", "all:1"] {
            assert!(text.parse::<ReleasePolicy>().unwrap_err().contains("at-least:N"), "{text}");
        }
    }
}
