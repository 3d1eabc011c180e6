//! The bounded form of a fuzz target, for the ordinary tests: its seeds, seeds that were damaged, and random bytes. Each
//! crate with parsers includes this file into its tests.

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::TestRunner;
use std::path::Path;

/// Runs `target`, which panics if its parser breaks a promise and says whether it took the bytes. It takes every seed.
/// The files that the fuzzer begins with are the seeds; `STEPMESH_BLESS=1` writes them anew.
pub(crate) fn check(name: &str, seeds: &[Vec<u8>], target: fn(&[u8]) -> bool) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(name);
    let bless = std::env::var_os("STEPMESH_BLESS").is_some();
    if bless {
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
    }
    for (number, seed) in seeds.iter().enumerate() {
        let file = directory.join(number.to_string());
        if bless {
            std::fs::write(&file, seed).unwrap();
        }
        let kept = std::fs::read(&file).unwrap_or_default() == *seed;
        assert!(kept, "{} is not seed {number} of {name}: run the test with STEPMESH_BLESS=1", file.display());
        assert!(target(seed), "{name} does not take its seed {number}");
    }
    let config = ProptestConfig::default();
    let config = ProptestConfig { cases: 4 * config.cases, failure_persistence: None, ..config };
    let run = TestRunner::new(config).run(&inputs(seeds.to_vec()), |bytes| {
        target(&bytes);
        Ok(())
    });
    run.unwrap();
}

/// One damage to bytes.
#[derive(Clone, Debug)]
enum Damage {
    Set(Index, u8),
    Flip(Index, u8),
    /// As lengths and counts like to be: all ones, or one bit, over so many bytes.
    Fill(Index, usize, bool),
    Cut(Index),
    Remove(Index, usize),
    /// Says again what was said before.
    Repeat(Index, Index, usize),
    Append(Vec<u8>),
}

impl Damage {
    fn apply(self, bytes: &mut Vec<u8>) {
        if let Self::Append(more) = self {
            return bytes.extend(more);
        }
        if bytes.is_empty() {
            return;
        }
        let count = bytes.len();
        match self {
            Self::Set(at, value) => bytes[at.index(count)] = value,
            Self::Flip(at, bit) => bytes[at.index(count)] ^= 1 << bit,
            Self::Fill(at, len, ones) => {
                let at = at.index(count);
                let end = count.min(at + len);
                bytes[at..end].fill(if ones { 0xFF } else { 0 });
                bytes[end - 1] |= 0x80;
            }
            Self::Cut(at) => bytes.truncate(at.index(count)),
            Self::Remove(at, len) => drop(bytes.drain(at.index(count)..count.min(at.index(count) + len))),
            Self::Repeat(from, to, len) => {
                let from = from.index(count);
                let again = bytes[from..count.min(from + len)].to_vec();
                let to = to.index(count);
                bytes.splice(to..to, again);
            }
            Self::Append(_) => {}
        }
    }
}

fn inputs(seeds: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let at = any::<Index>;
    let damage = prop_oneof![
        4 => (at(), any::<u8>()).prop_map(|(at, value)| Damage::Set(at, value)),
        4 => (at(), 0..8_u8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        2 => (at(), 1..9_usize, any::<bool>()).prop_map(|(at, len, ones)| Damage::Fill(at, len, ones)),
        1 => at().prop_map(Damage::Cut),
        1 => (at(), 1..64_usize).prop_map(|(at, len)| Damage::Remove(at, len)),
        2 => (at(), at(), 1..128_usize).prop_map(|(from, to, len)| Damage::Repeat(from, to, len)),
        1 => prop::collection::vec(any::<u8>(), 1..64).prop_map(Damage::Append),
    ];
    let damaged = (0..seeds.len(), prop::collection::vec(damage, 1..5)).prop_map(move |(seed, damages)| {
        let mut bytes = seeds[seed].clone();
        damages.into_iter().for_each(|damage| damage.apply(&mut bytes));
        bytes
    });
    prop_oneof![3 => damaged, 1 => prop::collection::vec(any::<u8>(), 0..600)]
}
