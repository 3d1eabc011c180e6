//! What every transfer costs besides its bytes: header, immediate, the slot's check; and a hidden state's encoding.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark's own functions")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::Duration;
use stepmesh_bench::{HIDDEN, Transfer};
use stepmesh_mesh::Direction;
use stepmesh_model::WireDtype;
use stepmesh_proto::{HEADER_MAX_BYTES, Header, Immediate, MAX_PARTS, Part};

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

criterion_group! {
    name = wire;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = header, immediate, slot, rows
}
criterion_main!(wire);
