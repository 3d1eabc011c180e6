//! A row's result is the same, bit for bit, whatever shares its batch, however its prompt is cut, wherever its pages lie.
#![allow(clippy::unwrap_used)]

mod common;

use common::Model;
use stepmesh_model::{Dtype, FfnInput, Hidden, Row};

const BOTH: [Dtype; 2] = [Dtype::F32, Dtype::Bf16];

/// Three prompts of different lengths, one of them longer than two pages.
fn prompts() -> [Vec<u32>; 3] {
    [vec![0, 5, 17, 300, 42], (100..141).collect(), vec![0, 511, 7, 7, 7, 9, 3]]
}

/// The logits after each prompt and after one more token, each sequence in a cache and batch of its own.
fn alone(dtype: Dtype) -> Vec<[Vec<f32>; 2]> {
    let one = |prompt: &Vec<u32>| {
        let mut model = Model::new(dtype, 2);
        let sequence = model.cache.reserve(64).unwrap();
        let first = model.feed(sequence, 0, prompt, usize::MAX >> 1);
        [first, model.feed(sequence, prompt.len(), &[33], 1)]
    };
    prompts().iter().map(one).collect()
}

#[test]
fn sequences_that_share_every_batch_do_not_see_each_other() {
    for dtype in BOTH {
        let mut model = Model::new(dtype, 2);
        let vocab = model.config().vocab_size;
        let sequences = [(); 3].map(|()| model.cache.reserve(64).unwrap());
        // Rows of the three prompts interleave: one of each in turn, as long as it lasts.
        let (mut rows, mut tokens, mut last) = (Vec::new(), Vec::new(), [0; 3]);
        for position in 0..41 {
            for (i, prompt) in prompts().iter().enumerate() {
                if let Some(token) = prompt.get(position) {
                    last[i] = rows.len();
                    rows.push(Row { sequence: sequences[i], position });
                    tokens.push(*token);
                }
            }
        }
        let prefill = model.run(&rows, &tokens);
        let rows = [0, 1, 2].map(|i| Row { sequence: sequences[i], position: prompts()[i].len() });
        let decode = model.run(&rows, &[33; 3]);
        for (i, [first, second]) in alone(dtype).into_iter().enumerate() {
            assert_eq!(prefill[last[i] * vocab..][..vocab], first, "{dtype}, prompt {i}");
            assert_eq!(decode[i * vocab..][..vocab], second, "{dtype}, prompt {i}");
        }
    }
}

#[test]
fn the_chunking_of_a_prompt_leaves_no_trace() {
    for dtype in BOTH {
        let expected = alone(dtype);
        for chunk in [1, 2, 7, 16, 17, 40] {
            let mut model = Model::new(dtype, 2);
            for (prompt, [first, second]) in prompts().iter().zip(&expected) {
                let sequence = model.cache.reserve(64).unwrap();
                assert_eq!(&model.feed(sequence, 0, prompt, chunk), first, "{dtype}, chunk {chunk}");
                assert_eq!(&model.feed(sequence, prompt.len(), &[33], 1), second, "{dtype}, chunk {chunk}");
            }
        }
    }
}

#[test]
fn scattered_and_reused_pages_leave_no_trace() {
    for dtype in BOTH {
        let expected = alone(dtype);
        let mut model = Model::new(dtype, 2);
        // Fill the pages with other sequences' values, then free every other one, so that pages are out of order.
        let fillers: Vec<_> = (0..32).map(|_| model.cache.reserve(17).unwrap()).collect();
        for filler in &fillers {
            model.feed(*filler, 0, &[9; 17], 17);
        }
        for filler in fillers.iter().step_by(3).chain(fillers.iter().skip(1).step_by(3)) {
            model.cache.free(*filler).unwrap();
        }
        for (prompt, [first, second]) in prompts().iter().zip(&expected) {
            let sequence = model.cache.reserve(64).unwrap();
            assert_eq!(&model.feed(sequence, 0, prompt, 5), first, "{dtype}");
            assert_eq!(&model.feed(sequence, prompt.len(), &[33], 1), second, "{dtype}");
        }
    }
}

#[test]
fn a_step_that_is_run_again_gives_the_same() {
    let mut model = Model::new(Dtype::F32, 1);
    let sequence = model.cache.reserve(64).unwrap();
    let prompt = &prompts()[1];
    let first = model.feed(sequence, 0, prompt, 8);
    assert_eq!(model.cache.len(sequence).unwrap(), 41);
    model.feed(sequence, 41, &[1, 2, 3], 3);
    assert_eq!(model.feed(sequence, 32, &prompt[32..], 9), first);
    assert_eq!(model.cache.len(sequence).unwrap(), 41);
}

#[test]
fn segments_give_what_their_rows_give_alone() {
    for dtype in BOTH {
        let mut model = Model::new(dtype, 3);
        let config = model.config();
        let (hidden, top_k) = (config.hidden_size, config.top_k);
        let tokens: Vec<u32> = (200..219).collect();
        let mut y = vec![0.0; tokens.len() * hidden];
        model.attention.embed(&tokens, &mut y).unwrap();
        y.iter_mut().for_each(|value| *value *= 16.0);
        for layer in 0..config.num_layers {
            let moe = if config.is_moe(layer) { top_k } else { 0 };
            let (mut ids, mut weights) = (vec![0; tokens.len() * moe], vec![0.0; tokens.len() * moe]);
            if moe > 0 {
                model.attention.route(layer, &y, &mut ids, &mut weights).unwrap();
            }
            let segment = |from: usize, to: usize| FfnInput {
                hidden: Hidden::Plain(&y[from * hidden..to * hidden]),
                experts: &ids[from * moe..to * moe],
                weights: &weights[from * moe..to * moe],
            };
            for ffn in &mut model.ffns {
                let mut together = vec![f32::NAN; y.len()];
                // A rank with nothing to do sends an empty segment.
                let segments = [segment(0, 4), segment(4, 4), segment(4, 5), segment(5, 19)];
                ffn.forward(layer, &segments, &mut together).unwrap();
                for row in 0..tokens.len() {
                    let mut alone = vec![f32::NAN; hidden];
                    ffn.forward(layer, &[segment(row, row + 1)], &mut alone).unwrap();
                    assert_eq!(alone, together[row * hidden..][..hidden], "{dtype}, layer {layer}, row {row}");
                }
            }
        }
    }
}

#[test]
fn empty_batches_are_legal() {
    let mut model = Model::new(Dtype::Bf16, 2);
    assert!(model.run(&[], &[]).is_empty());
}
