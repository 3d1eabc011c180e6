//! A whole round trip through the mesh over shm, tensors in place, both members driven by one thread: the instructions of
//! both sides without the way between two cores. `cargo bench -p stepmesh-bench --bench round -- --profile-time 10` under
//! a profiler says where they go.

use criterion::{Criterion, criterion_group, criterion_main};
use stepmesh_bench::pushpull::Turns;
use stepmesh_transport::Provider;

fn round(c: &mut Criterion) {
    let mut turns = Turns::join(Provider::Shm, [1, 1], 1).expect("a deployment");
    c.bench_function("round trip, shm, one thread", |b| b.iter(|| turns.round().expect("a round")));
}

criterion_group!(benches, round);
criterion_main!(benches);
