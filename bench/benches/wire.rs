//! What every transfer costs besides its bytes: header, immediate, the slot's check, notification and completion; what a
//! hidden state's encoding costs, and what surrounds the experts.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark's own functions")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::Duration;
use stepmesh_bench::{HIDDEN, Transfer};
use stepmesh_mesh::Direction;
use stepmesh_mesh::probe::Slot;
use stepmesh_model::probe::Visits;
use stepmesh_model::{Dtype, FfnInput, Hidden, WireDtype, fp8_groups, quantise_rows};
use stepmesh_proto::{HEADER_MAX_BYTES, Header, Immediate, MAX_PARTS, Part};
use stepmesh_transport::shm::probe::Ring;

fn header(c: &mut Criterion) {
    let mut group = c.benchmark_group("header");
    let request = Transfer::new(128).unwrap().header;
    let mut longest = request;
    longest.set_parts(&[Part { key: 1, rows: 128, row_bytes: 8, ..Part::default() }; MAX_PARTS]).unwrap();
    for (name, header) in [("request of 3 parts", request), ("8 parts", longest)] {
        let mut bytes = [0; HEADER_MAX_BYTES];
        group.bench_function(format!("encode, {name}"), |b| b.iter(|| black_box(&header).encode(&mut bytes)));
        let length = header.encode(&mut bytes);
        group.bench_function(format!("decode, {name}"), |b| b.iter(|| Header::decode(black_box(&bytes[..length]))));
    }
    group.finish();
}

fn immediate(c: &mut Criterion) {
    let mut group = c.benchmark_group("immediate");
    let immediate = Immediate { slot: 2, lanes: 4, lane: 3, sequence: 65_535 };
    let bits = immediate.encode().unwrap();
    group.bench_function("encode", |b| b.iter(|| black_box(immediate).encode()));
    group.bench_function("decode", |b| b.iter(|| Immediate::decode(black_box(bits))));
    group.finish();
}

fn slot(c: &mut Criterion) {
    let mut group = c.benchmark_group("slot");
    let Transfer { layout, parts, mut header } = Transfer::new(128).unwrap();
    group.bench_function("place", |b| b.iter(|| layout.place(Direction::A2F, black_box(&parts), &mut header)));
    group.bench_function("check", |b| b.iter(|| layout.check(Direction::A2F, black_box(&header))));
    group.finish();
}

fn rows(c: &mut Criterion) {
    const ROWS: usize = 64;
    let mut group = c.benchmark_group("64 hidden states");
    let mut values: Vec<f32> = (0..ROWS * HIDDEN).map(|i| (i as f32).sin()).collect();
    for (name, wire) in [("bf16", WireDtype::Bf16), ("f32", WireDtype::F32)] {
        let mut bytes = vec![0; wire.row_bytes(values.len())];
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(format!("encode {name}"), |b| b.iter(|| wire.encode(black_box(&values), &mut bytes)));
        group.bench_function(format!("decode {name}"), |b| b.iter(|| wire.decode(black_box(&bytes), &mut values)));
    }
    group.finish();
}

fn fp8(c: &mut Criterion) {
    const ROWS: usize = 64;
    let mut group = c.benchmark_group("64 hidden states");
    let values: Vec<f32> = (0..ROWS * HIDDEN).map(|i| (i as f32).sin()).collect();
    let (mut codes, mut scales) = (vec![0; values.len()], vec![0.0; ROWS * fp8_groups(HIDDEN)]);
    group.throughput(Throughput::Bytes(codes.len() as u64));
    group.bench_function("quantise to FP8", |b| {
        b.iter(|| quantise_rows(black_box(&values), HIDDEN, &mut codes, &mut scales).unwrap());
    });
    group.finish();
}

fn experts(c: &mut Criterion) {
    const ROWS: usize = 128;
    let mut group = c.benchmark_group("128 hidden states and their 3 of 48 experts");
    let values: Vec<f32> = (0..ROWS * HIDDEN).map(|i| (i as f32).sin()).collect();
    let experts: Vec<u16> =
        (0..ROWS).flat_map(|row| [row, row * 7 + 1, row * 5 + 2].map(|e| (e % 48) as u16)).collect();
    let weights = vec![0.25; experts.len()];
    let mut out = vec![0.0; values.len()];
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Fp8] {
        let mut visits = Visits::new(dtype, HIDDEN, 48);
        group.bench_function(format!("gather and scatter, {dtype}"), |b| {
            let segment = FfnInput { hidden: Hidden::Plain(&values), experts: &experts, weights: &weights };
            b.iter(|| visits.round(black_box(&[segment]), 3, &mut out));
        });
    }
    group.finish();
}

fn notification(c: &mut Criterion) {
    let mut ring = Ring::default();
    c.bench_function("ring/push and pop", |b| b.iter(|| ring.push(black_box(7)) && ring.pop().is_some()));
    let mut group = c.benchmark_group("slot");
    for (ranks, lanes) in [(1, 1), (2, 1), (2, 4), (16, 1)] {
        let mut slot = Slot::new(ranks, lanes);
        group.bench_function(format!("complete, {ranks} ranks, {lanes} lanes"), |b| b.iter(|| slot.round()));
    }
    group.finish();
}

criterion_group! {
    name = wire;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = header, immediate, slot, notification, rows, fp8, experts
}
criterion_main!(wire);
