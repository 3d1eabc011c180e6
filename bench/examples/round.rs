//! Round trips through the mesh over shm, both members driven by one thread in turn: what callgrind counts.
//! `cargo run --release -p stepmesh-bench --example round -- 1000`.

use stepmesh_bench::pushpull::Turns;
use stepmesh_transport::Provider;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let rounds = std::env::args().nth(1).map_or(Ok(1000), |rounds| rounds.parse())?;
    let mut turns = Turns::join(Provider::Shm, 1)?;
    for _ in 0..rounds {
        turns.round()?;
    }
    Ok(())
}
