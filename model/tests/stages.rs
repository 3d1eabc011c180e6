//! What a caller or a peer gets wrong is refused by a typed error, before anything is changed.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Model, checkpoint};
use stepmesh_model::{Dtype, FfnInput, Hidden, KvCache, ModelError, Row};

#[track_caller]
fn assert_says<T: std::fmt::Debug>(result: Result<T, ModelError>, words: &[&str]) {
    let error = result.unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "`{error}` does not say `{word}`");
    }
}

#[test]
fn a_full_cache_refuses_and_recovers() {
    let config = checkpoint().config().clone();
    let mut cache = KvCache::new(&config, Dtype::Bf16, 100).unwrap();
    assert_eq!((cache.stats().blocks, cache.stats().free_blocks, cache.stats().sequences), (7, 7, 0));
    assert_eq!(cache.bytes_per_token(), 4 * 2 * 64 * 2);
    assert_eq!(cache.bytes(), 7 * 16 * cache.bytes_per_token());

    let first = cache.reserve(65).unwrap();
    let second = cache.reserve(32).unwrap();
    assert_eq!((cache.stats().free_blocks, cache.stats().sequences), (0, 2));
    assert!(matches!(
        cache.reserve(1),
        Err(ModelError::CacheFull { needed_blocks: 1, free_blocks: 0, total_blocks: 7 })
    ));
    cache.free(second).unwrap();
    assert_says(cache.reserve(33), &["full", "3 blocks needed", "2 of 7 free"]);
    let third = cache.reserve(32).unwrap();
    assert_ne!(second, third);
    assert!(matches!(cache.free(second), Err(ModelError::UnknownSequence)));
    assert!(matches!(cache.len(second), Err(ModelError::UnknownSequence)));
    cache.free(first).unwrap();
    cache.free(third).unwrap();
    assert_eq!((cache.stats().free_blocks, cache.stats().sequences), (7, 0));
}

#[test]
fn caches_and_sequences_of_impossible_sizes() {
    let config = checkpoint().config().clone();
    assert_says(KvCache::new(&config, Dtype::F32, 0), &["0 tokens", "hold nothing"]);
    assert_says(KvCache::new(&config, Dtype::F32, usize::MAX), &["more than can be addressed"]);
    assert_says(KvCache::with_bytes(&config, Dtype::F32, 100), &["hold nothing"]);
    let cache = KvCache::with_bytes(&config, Dtype::F32, 70_000).unwrap();
    assert_eq!((cache.stats().blocks, cache.bytes()), (2, 65_536));

    let mut cache = KvCache::new(&config, Dtype::F32, 2048).unwrap();
    assert_says(cache.reserve(0), &["0 tokens", "1 to 1024"]);
    assert_says(cache.reserve(1025), &["1025 tokens", "1 to 1024"]);
}

#[test]
fn rows_that_do_not_continue_their_sequence() {
    let mut model = Model::new(Dtype::F32, 1);
    let sequence = model.cache.reserve(20).unwrap();
    model.feed(sequence, 0, &[1, 2, 3], 3);
    let before = model.feed(sequence, 3, &[4], 1);

    let mut attempt = |positions: &[usize]| {
        let rows: Vec<Row> = positions.iter().map(|position| Row { sequence, position: *position }).collect();
        let mut x = vec![1.0; rows.len() * 256];
        let mut y = vec![2.0; rows.len() * 256];
        let result = model.attention.attention(0, &rows, &mut x, &mut model.cache, &mut y);
        assert!(x.iter().all(|value| *value == 1.0) && y.iter().all(|value| *value == 2.0));
        result
    };
    assert_says(attempt(&[5]), &["row 0", "position 5", "holds 4 tokens"]);
    assert_says(attempt(&[4, 6]), &["row 1", "position 6", "should be 5"]);
    assert_says(attempt(&[4, 4]), &["row 1", "position 4", "should be 5"]);
    assert_says(attempt(&[20]), &["position 20", "beyond the 20 tokens reserved"]);
    assert_eq!(model.feed(sequence, 3, &[4], 1), before);

    let freed = model.cache.reserve(20).unwrap();
    model.cache.free(freed).unwrap();
    let rows = [Row { sequence: freed, position: 0 }];
    let (mut x, mut y) = (vec![0.0; 256], vec![0.0; 256]);
    assert_says(
        model.attention.attention(0, &rows, &mut x, &mut model.cache, &mut y),
        &["does not hold this sequence"],
    );

    let mut other = KvCache::new(&model.config(), Dtype::Bf16, 16).unwrap();
    let rows = [Row { sequence: other.reserve(1).unwrap(), position: 0 }];
    let result = model.attention.attention(0, &rows, &mut x, &mut other, &mut y);
    assert_says(result, &["in bf16", "needs 4 layers of head dimension 64 in f32"]);
}

#[test]
fn buffers_layers_and_tokens_that_do_not_fit() {
    let mut model = Model::new(Dtype::F32, 1);
    let (mut x, mut short, y) = (vec![0.0; 512], vec![0.0; 511], vec![0.5; 512]);
    let (mut ids, mut weights) = (vec![0; 6], vec![0.0; 6]);
    let attention = &mut model.attention;
    assert_says(attention.embed(&[1, 512], &mut x), &["token 512", "row 1", "vocabulary of 512"]);
    assert_says(attention.embed(&[1, 2], &mut short), &["`x`", "511", "512"]);
    assert_says(attention.attention(4, &[], &mut [], &mut model.cache, &mut []), &["layer 4 does not exist"]);
    assert_says(attention.route(0, &y, &mut ids, &mut weights), &["layer 0", "dense"]);
    assert_says(attention.route(9, &y, &mut ids, &mut weights), &["layer 9", "does not exist"]);
    assert_says(attention.route(1, &y, &mut ids[1..], &mut weights), &["`ids`", "5", "6"]);
    assert_says(attention.route(1, &y[1..], &mut ids, &mut weights), &["`y`", "511"]);
    assert_says(attention.combine(&mut x, &[&y, &short]), &["`partial`", "511", "512"]);
    assert_says(attention.logits(&x, &mut [0.0; 512]), &["`logits`", "512", "1024"]);

    let mut damaged = y.clone();
    damaged[300] = f32::NAN;
    assert_says(attention.route(1, &damaged, &mut ids, &mut weights), &["row 1", "not finite"]);
}

#[test]
fn what_a_peer_sends_wrong_to_the_ffn_side() {
    let mut model = Model::new(Dtype::F32, 2);
    let ffn = &mut model.ffns[1];
    let hidden = vec![0.5; 512];
    let (experts, weights) = ([0u16, 1, 2, 3, 4, 5], [0.1f32; 6]);
    let good = FfnInput { hidden: Hidden::Plain(&hidden), experts: &experts, weights: &weights };
    let mut out = vec![7.0; 1024];
    let mut attempt = |layer, bad: FfnInput<'_>| {
        let result = ffn.forward(layer, &[good, bad], &mut out);
        assert!(out.iter().all(|value| *value == 7.0));
        result
    };
    let twice = FfnInput { experts: &[0, 1, 2, 4, 5, 4], ..good };
    let beyond = FfnInput { experts: &[0, 1, 2, 3, 8, 5], ..good };
    assert_says(attempt(1, beyond), &["segment 1, row 1", "expert id 8", "does not exist"]);
    assert_says(attempt(1, FfnInput { experts: &[0, 1, u16::MAX, 3, 4, 5], ..good }), &["row 0", "65535"]);
    assert_says(attempt(1, twice), &["segment 1, row 1", "expert id 4", "named twice"]);
    for weight in [f32::NAN, f32::INFINITY] {
        let weights = [0.1, 0.1, 0.1, 0.1, weight, 0.1];
        assert_says(
            attempt(1, FfnInput { weights: &weights, ..good }),
            &["segment 1, row 1", "expert 4", "not finite"],
        );
    }
    assert_says(attempt(1, FfnInput { experts: &experts[1..], ..good }), &["`experts`", "5", "6"]);
    assert_says(attempt(1, FfnInput { weights: &[], ..good }), &["`weights`", "0", "6"]);
    assert_says(attempt(1, FfnInput { hidden: Hidden::Plain(&hidden[1..]), ..good }), &["`hidden`", "511", "512"]);
    assert_says(attempt(0, good), &["`experts`", "6", "expected 0"]);
    assert_says(attempt(4, good), &["layer 4 does not exist"]);
    assert_says(model.ffns[1].forward(1, &[good], &mut out), &["`out`", "1024", "512"]);
}

#[test]
fn partial_results_are_added_in_the_order_given() {
    let mut model = Model::new(Dtype::F32, 1);
    let row = |value: f32| vec![value; 256];
    let mut x = row(1.0);
    model.attention.combine(&mut x, &[&row(1e8), &row(-1e8), &row(0.5)]).unwrap();
    assert_eq!(x, row(1.5));
    let mut x = row(1.0);
    model.attention.combine(&mut x, &[&row(0.5), &row(1e8), &row(-1e8)]).unwrap();
    assert_eq!(x, row(1.0));
}
