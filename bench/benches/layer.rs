//! One MoE layer of the tiny checkpoint on one core, by side and batch: what the wire has to hide behind.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark's own functions")]

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use std::time::Duration;
use stepmesh_bench::TinyLayer;
use stepmesh_model::Dtype;

const CONTEXT: usize = 64;

fn sides(c: &mut Criterion) {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let mut group = c.benchmark_group(format!("tiny MoE layer, {dtype}, context {CONTEXT}"));
        for batch in [1, 16] {
            let mut layer = TinyLayer::load(dtype, batch, CONTEXT).unwrap();
            let id = |side| BenchmarkId::new(side, format!("{batch} rows"));
            group.bench_function(id("attention"), |b| b.iter(|| layer.attend().unwrap()));
            group.bench_function(id("router"), |b| b.iter(|| layer.route().unwrap()));
            group.bench_function(id("FFN"), |b| b.iter(|| layer.feed_forward().unwrap()));
            group.bench_function(id("both, no wire"), |b| b.iter(|| layer.step().unwrap()));
        }
        group.finish();
    }
}

criterion_group! {
    name = layer;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = sides
}
criterion_main!(layer);
