//! Numbers of bytes as people write them: `8`, `7KiB`, `1.75MiB`; and both ways of a round, `7168:14336`.

use std::str::FromStr;

/// What a suite can be asked to move at once: no bytes are not a transfer, and more than this is not one of AFD's.
const LIMIT: usize = 64 << 20;

/// Bytes of one transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) usize);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unit_at = text.find(|letter: char| letter.is_ascii_alphabetic()).unwrap_or(text.len());
        let (number, unit) = text.split_at(unit_at);
        let unit: usize = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            _ => return Err(format!("`{unit}` is not a unit: B, KiB or MiB")),
        };
        let bytes = number.trim().parse::<f64>().map_err(|_| format!("`{number}` is not a number"))? * unit as f64;
        if bytes.fract() != 0.0 || !(1.0..=LIMIT as f64).contains(&bytes) {
            return Err(format!("a transfer has between 1 and {LIMIT} whole bytes"));
        }
        Ok(Self(bytes as usize))
    }
}

/// Bytes there and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ways(pub(crate) [u32; 2]);

impl FromStr for Ways {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (there, back) = text.split_once(':').ok_or("bytes there and back, as in `7168:14336`")?;
        let bytes = |text: &str| text.parse::<Size>().map(|Size(bytes)| bytes as u32);
        Ok(Self([bytes(there)?, bytes(back)?]))
    }
}

#[cfg(test)]
mod tests {
    use super::{Size, Ways};

    #[test]
    fn both_ways_have_their_sizes() {
        assert_eq!("7KiB:14336".parse(), Ok(Ways([7168, 14336])));
        for wrong in ["", "8", ":", "8:", ":8", "8:0", "1:2:3"] {
            assert!(wrong.parse::<Ways>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_have_units_and_limits() {
        let bytes = |text: &str| text.parse::<Size>().map(|size| size.0);
        assert_eq!(bytes("8"), Ok(8));
        assert_eq!(bytes("7KiB"), Ok(7168));
        assert_eq!(bytes("1.75MiB"), Ok(1792 << 10));
        assert_eq!(bytes("64m"), Ok(64 << 20));
        for wrong in ["", "0", "-1", "0.5", "1e99", "nan", "7KB", "65MiB", "KiB"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
