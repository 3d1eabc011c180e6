//! Whatever the network does, a token is right or its sequence fails with a typed error, and nothing hangs.

#![allow(clippy::unwrap_used)]

mod world;

use rand::Rng;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use stepmesh_model::{
    AttentionStage, Checkpoint, CpuAttention, CpuFfn, Dtype, FfnInput, FfnStage, KvCache, ModelConfig, ModelError, Row,
    Shard, log_probability,
};
use stepmesh_pipeline::Wire;
use stepmesh_proto::control::{GenerateRequest, Sampling};
use stepmesh_transport::mem::FaultPlan;
use world::{Outcome, Shape, Stages, World};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/step3-tiny");
const FP8_FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/step3-tiny-fp8");

struct Golden {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
}

fn golden() -> &'static [Golden] {
    static GOLDEN: OnceLock<Vec<Golden>> = OnceLock::new();
    GOLDEN.get_or_init(|| read_golden(&format!("{FIXTURE}/golden_f32.json")))
}

fn read_golden(path: &str) -> Vec<Golden> {
    let text = std::fs::read_to_string(path).unwrap();
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let cases: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    cases.iter().map(|case| Golden { prompt: ids(&case["prompt"]), greedy: ids(&case["greedy"]) }).collect()
}

/// One set of weights for all nodes of all deployments.
struct Tiny {
    config: ModelConfig,
    dtype: Dtype,
    attention: Arc<Mutex<CpuAttention>>,
    shards: Vec<Vec<Arc<Mutex<CpuFfn>>>>,
}

impl Tiny {
    fn load(most_ffn: usize) -> Self {
        let splits: Vec<_> = (1..=most_ffn).map(|count| (count, 1)).collect();
        Self::of(FIXTURE, Dtype::F32, &splits)
    }

    /// `splits`: numbers of FFN instances, and among how many of them each expert is cut.
    fn of(fixture: &str, dtype: Dtype, splits: &[(usize, usize)]) -> Self {
        let checkpoint = Checkpoint::open(fixture.as_ref()).unwrap();
        let shard = |index, count, tensor| {
            let shard = Shard::with_tensor_parallel(index, count, tensor).unwrap();
            Arc::new(Mutex::new(CpuFfn::load(&checkpoint, dtype, shard).unwrap()))
        };
        Self {
            config: checkpoint.config().clone(),
            dtype,
            attention: Arc::new(Mutex::new(CpuAttention::load(&checkpoint, dtype).unwrap())),
            shards: splits
                .iter()
                .map(|&(count, tensor)| (0..count).map(|index| shard(index, count, tensor)).collect())
                .collect(),
        }
    }
}

impl Stages for Tiny {
    fn attention(&self) -> Box<dyn AttentionStage> {
        Box::new(SharedAttention(self.config.clone(), self.dtype, self.attention.clone()))
    }

    fn ffn(&self, rank: usize, count: usize) -> Box<dyn FfnStage> {
        Box::new(SharedFfn(
            self.config.clone(),
            self.shards.iter().find(|split| split.len() == count).unwrap()[rank].clone(),
        ))
    }
}

struct SharedAttention(ModelConfig, Dtype, Arc<Mutex<CpuAttention>>);

impl AttentionStage for SharedAttention {
    fn config(&self) -> &ModelConfig {
        &self.0
    }
    fn dtype(&self) -> Dtype {
        self.1
    }
    fn weight_bytes(&self) -> usize {
        0
    }
    fn embed(&mut self, tokens: &[u32], x: &mut [f32]) -> Result<(), ModelError> {
        self.2.lock().unwrap().embed(tokens, x)
    }
    fn attention(
        &mut self,
        layer: usize,
        rows: &[Row],
        x: &mut [f32],
        cache: &mut KvCache,
        y: &mut [f32],
    ) -> Result<(), ModelError> {
        self.2.lock().unwrap().attention(layer, rows, x, cache, y)
    }
    fn route(&mut self, layer: usize, y: &[f32], ids: &mut [u16], weights: &mut [f32]) -> Result<(), ModelError> {
        self.2.lock().unwrap().route(layer, y, ids, weights)
    }
    fn combine(&mut self, x: &mut [f32], partials: &[&[f32]]) -> Result<(), ModelError> {
        self.2.lock().unwrap().combine(x, partials)
    }
    fn logits(&mut self, x: &[f32], logits: &mut [f32]) -> Result<(), ModelError> {
        self.2.lock().unwrap().logits(x, logits)
    }
}

struct SharedFfn(ModelConfig, Arc<Mutex<CpuFfn>>);

impl FfnStage for SharedFfn {
    fn config(&self) -> &ModelConfig {
        &self.0
    }
    fn shard(&self) -> Shard {
        self.1.lock().unwrap().shard()
    }
    fn weight_bytes(&self) -> usize {
        0
    }
    fn forward(&mut self, layer: usize, segments: &[FfnInput<'_>], out: &mut [f32]) -> Result<(), ModelError> {
        self.1.lock().unwrap().forward(layer, segments, out)
    }
}

fn shape(seed: u64, attention: u32, ffn: u32, microbatches: u16) -> Shape {
    Shape {
        wire: Wire::of(Dtype::F32),
        seed,
        attention,
        ffn,
        microbatches,
        max_rows: 16,
        lanes: 1,
        maps_peer_memory: false,
        latency: Duration::from_micros(2)..Duration::from_micros(20),
        control_latency: Duration::from_micros(50)..Duration::from_micros(500),
    }
}

fn request(prompt: &[u32], max_new_tokens: u32) -> GenerateRequest {
    GenerateRequest { prompt: prompt.to_vec(), max_new_tokens, ignore_eos: true, ..GenerateRequest::default() }
}

const MOST_TURNS: usize = 2_000_000;
const PATIENCE: Duration = Duration::from_secs(120);

/// Turns the world until `done`, or panics: a hang.
fn until(world: &mut World, what: &str, mut done: impl FnMut(&mut World) -> bool) {
    let start = world.now();
    for _ in 0..MOST_TURNS {
        if done(world) {
            return;
        }
        world.turn();
        assert!(world.now() - start < PATIENCE, "a hang: {what} after {PATIENCE:?}: {:?}", world.clients);
    }
    panic!("a hang: {what} after {MOST_TURNS} turns: {:?}", world.clients);
}

#[test]
fn every_deployment_decodes_the_golden_tokens() {
    let tiny = Tiny::load(3);
    for (attention, ffn) in [(1, 1), (2, 2), (3, 1), (1, 3)] {
        for microbatches in 1..=3 {
            for (lanes, maps_peer_memory) in [(1, false), (3, false), (1, true)] {
                let shape = Shape { lanes, maps_peer_memory, ..shape(7, attention, ffn, microbatches) };
                let mut world = World::new(shape, &tiny);
                until(&mut world, "joining", |world| world.is_complete());
                let sequences: Vec<_> =
                    golden().iter().map(|case| world.generate(request(&case.prompt, 8)).unwrap()).collect();
                until(&mut world, "decoding", |world| world.clients.values().all(|client| client.outcome.is_some()));
                for (case, sequence) in golden().iter().zip(sequences) {
                    let client = &world.clients[&sequence];
                    assert_eq!(client.outcome, Some(Outcome::Finished), "{attention}A{ffn}F");
                    assert_eq!(client.tokens, case.greedy[..8], "{attention}A{ffn}F, {microbatches} microbatches");
                }
            }
        }
    }
}

/// Decodes what is asked on a 2A2F deployment whose microbatches take `max_rows` rows.
fn decode(max_rows: u32, requests: &[GenerateRequest]) -> Vec<world::Client> {
    let tiny = Tiny::load(2);
    let mut world = World::new(Shape { max_rows, ..shape(5, 2, 2, 3) }, &tiny);
    until(&mut world, "joining", |world| world.is_complete());
    let sequences: Vec<_> = requests.iter().map(|request| world.generate(request.clone()).unwrap()).collect();
    until(&mut world, "decoding", |world| world.clients.values().all(|client| client.outcome.is_some()));
    sequences.iter().map(|sequence| world.clients[sequence].clone()).collect()
}

#[test]
fn a_prompts_scores_are_the_golden_log_probabilities_however_the_prompt_is_cut() {
    let bytes = std::fs::read(format!("{FIXTURE}/golden_f32.safetensors")).unwrap();
    let golden_logits = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let requests: Vec<_> = golden()
        .iter()
        .enumerate()
        .map(|(index, case)| GenerateRequest {
            prompt: [case.prompt.as_slice(), &case.greedy].concat(),
            // One asks for scores and tokens.
            max_new_tokens: if index == 0 { 2 } else { 0 },
            score_prompt: true,
            ..Default::default()
        })
        .collect();
    let whole = decode(64, &requests);
    for (index, (case, client)) in golden().iter().zip(&whole).enumerate() {
        assert_eq!(client.outcome, Some(Outcome::Finished));
        assert_eq!(
            (client.scores.len(), client.tokens.len()),
            (requests[index].prompt.len() - 1, if index == 0 { 2 } else { 0 })
        );
        let logits = golden_logits.tensor(&format!("logits.{index}")).unwrap();
        let (words, _) = logits.data().as_chunks::<4>();
        let logits: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
        let expected =
            logits.chunks_exact(512).zip(&case.greedy).map(|(row, token)| log_probability(row, *token).unwrap());
        for (found, expected) in client.scores[case.prompt.len() - 1..].iter().zip(expected) {
            assert!((found - expected).abs() < 2e-5, "{found} {expected}");
        }
    }
    for (whole, cut) in whole.iter().zip(decode(7, &requests)) {
        assert_eq!((&whole.scores, &whole.tokens), (&cut.scores, &cut.tokens));
    }
}

#[test]
fn a_seed_gives_the_same_tokens_alone_and_among_others_and_a_stop_token_ends() {
    let sampled = |case: usize, seed| GenerateRequest {
        sampling: Some(Sampling { temperature: 1.0, top_k: 40, top_p: 0.9, seed }),
        ..request(&golden()[case].prompt, 12)
    };
    let alone = decode(32, &[sampled(0, 1)]).remove(0);
    let together = decode(32, &[sampled(1, 1), sampled(0, 1), sampled(0, 2)]);
    assert_eq!(alone.tokens, together[1].tokens);
    assert_ne!(alone.tokens, together[2].tokens);
    let stop = alone.tokens[5];
    let place = alone.tokens.iter().position(|token| *token == stop).unwrap();
    let stopped = decode(32, &[GenerateRequest { stop_tokens: vec![stop], ..sampled(0, 1) }]).remove(0);
    assert_eq!(stopped.tokens, alone.tokens[..=place]);
}

/// Stages of which one row of logits, the `at`-th that is asked for, comes out as NaN.
struct OneNan<'a> {
    stages: &'a Tiny,
    at: usize,
}

struct NanAttention {
    stage: Box<dyn AttentionStage>,
    rows_left: usize,
}

impl Stages for OneNan<'_> {
    fn attention(&self) -> Box<dyn AttentionStage> {
        Box::new(NanAttention { stage: self.stages.attention(), rows_left: self.at })
    }

    fn ffn(&self, rank: usize, count: usize) -> Box<dyn FfnStage> {
        self.stages.ffn(rank, count)
    }
}

impl AttentionStage for NanAttention {
    fn config(&self) -> &ModelConfig {
        self.stage.config()
    }
    fn dtype(&self) -> Dtype {
        self.stage.dtype()
    }
    fn weight_bytes(&self) -> usize {
        self.stage.weight_bytes()
    }
    fn embed(&mut self, tokens: &[u32], x: &mut [f32]) -> Result<(), ModelError> {
        self.stage.embed(tokens, x)
    }
    fn attention(
        &mut self,
        layer: usize,
        rows: &[Row],
        x: &mut [f32],
        cache: &mut KvCache,
        y: &mut [f32],
    ) -> Result<(), ModelError> {
        self.stage.attention(layer, rows, x, cache, y)
    }
    fn route(&mut self, layer: usize, y: &[f32], ids: &mut [u16], weights: &mut [f32]) -> Result<(), ModelError> {
        self.stage.route(layer, y, ids, weights)
    }
    fn combine(&mut self, x: &mut [f32], partials: &[&[f32]]) -> Result<(), ModelError> {
        self.stage.combine(x, partials)
    }
    fn logits(&mut self, x: &[f32], logits: &mut [f32]) -> Result<(), ModelError> {
        self.stage.logits(x, logits)?;
        if self.rows_left == 0 {
            logits[3] = f32::NAN;
        }
        self.rows_left = self.rows_left.wrapping_sub(1);
        Ok(())
    }
}

#[test]
fn a_nan_logit_fails_its_sequence_alone_in_scoring_and_in_decoding() {
    let tiny = Tiny::load(1);
    let scored = GenerateRequest { prompt: golden()[0].prompt.clone(), score_prompt: true, ..Default::default() };
    let decoded = request(&golden()[1].prompt, 8);
    // The first row of logits is of the sequence that came first.
    for first in [&scored, &decoded] {
        let mut world = World::new(shape(5, 1, 1, 1), &OneNan { stages: &tiny, at: 0 });
        until(&mut world, "joining", |world| world.is_complete());
        let [spoilt, right] = [first, &decoded].map(|request| world.generate(request.clone()).unwrap());
        until(&mut world, "decoding", |world| world.clients.values().all(|client| client.outcome.is_some()));
        match &world.clients[&spoilt].outcome {
            Some(Outcome::Failed(message)) => assert!(message.contains("logit 3 is NaN"), "{message}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(world.clients[&right].outcome, Some(Outcome::Finished));
        assert_eq!(world.clients[&right].tokens, golden()[1].greedy[..8]);
    }
}

#[test]
fn sampling_that_makes_no_sense_is_refused() {
    let asked = Sampling { temperature: -1.0, top_k: 0, top_p: 1.0, seed: 0 };
    let [refused, nothing] = [
        GenerateRequest { sampling: Some(asked), ..request(&[1], 1) },
        GenerateRequest { max_new_tokens: 0, ..request(&[1], 1) },
    ];
    for (request, named) in [(refused, "temperature is -1"), (nothing, "max_new_tokens is 0")] {
        match decode(8, &[request]).remove(0).outcome {
            Some(Outcome::Failed(message)) => {
                assert!(message.starts_with("Invalid") && message.contains(named), "{message}")
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Scores and tokens of the golden prompts on `attention` + split, on the wire that suits `wire`, with latencies that `seed` draws.
fn run(tiny: &Tiny, wire: Dtype, attention: u32, ffn: u32, microbatches: u16, seed: u64) -> Vec<(Vec<f32>, Vec<u32>)> {
    let lanes = 1 + (seed % 3) as u8;
    let latency = Duration::from_micros(2)..Duration::from_micros(20 + seed % 7 * 100);
    let wire = Wire::of(wire);
    let mut world = World::new(Shape { wire, lanes, latency, ..shape(seed, attention, ffn, microbatches) }, tiny);
    until(&mut world, "joining", |world| world.is_complete());
    let golden = read_golden(&format!("{FP8_FIXTURE}/golden_w8_dequant_f32.json"));
    let request = |case: &Golden| GenerateRequest { score_prompt: true, ..request(&case.prompt, 6) };
    let sequences: Vec<_> = golden.iter().map(|case| world.generate(request(case)).unwrap()).collect();
    until(&mut world, "decoding", |world| world.clients.values().all(|client| client.outcome.is_some()));
    sequences
        .iter()
        .map(|sequence| {
            let client = &world.clients[sequence];
            assert_eq!(client.outcome, Some(Outcome::Finished));
            (client.scores.clone(), client.tokens.clone())
        })
        .collect()
}

#[test]
fn fp8_deployments_repeat_bit_for_bit_whatever_the_timing_and_the_microbatches() {
    for (ffn, tensor) in [(1, 1), (2, 1), (2, 2), (4, 2)] {
        for dtype in [Dtype::F32, Dtype::Fp8, Dtype::Fp8F32] {
            let tiny = Tiny::of(FP8_FIXTURE, dtype, &[(ffn as usize, tensor)]);
            let first = run(&tiny, dtype, 1, ffn, 3, 0);
            for seed in 1..20 {
                let again = run(&tiny, dtype, 1 + (seed % 2) as u32, ffn, 1 + (seed % 3) as u16, seed);
                assert!(again == first, "{ffn} FFN instances, {tensor} an expert, {dtype}, seed {seed}");
            }
        }
    }
}

#[test]
fn dequantised_fp8_weights_decode_the_golden_tokens_on_every_split() {
    let golden = read_golden(&format!("{FP8_FIXTURE}/golden_w8_dequant_f32.json"));
    let mut whole = None;
    for (ffn, tensor) in [(1, 1), (2, 1), (2, 2), (4, 2), (3, 3)] {
        let tiny = Tiny::of(FP8_FIXTURE, Dtype::F32, &[(ffn as usize, tensor)]);
        let found = run(&tiny, Dtype::F32, 2, ffn, 3, 3);
        for (case, (_, tokens)) in golden.iter().zip(&found) {
            assert_eq!(*tokens, case.greedy[..6], "{ffn} FFN instances, {tensor} an expert");
        }
        let whole = whole.get_or_insert_with(|| found.clone());
        for ((scores, _), (expected, _)) in found.iter().zip(whole.iter()) {
            assert!(scores.iter().zip(expected).all(|(a, b)| (a - b).abs() < 2e-5));
        }
    }
}

#[test]
fn an_fp8_wire_serves_weights_of_any_type() {
    let tiny = Tiny::of(FP8_FIXTURE, Dtype::F32, &[(2, 1)]);
    let exact = run(&tiny, Dtype::F32, 1, 2, 3, 1);
    let lossy = run(&tiny, Dtype::Fp8F32, 1, 2, 3, 1);
    let scores = |run: &[(Vec<f32>, Vec<u32>)]| run.iter().flat_map(|(scores, _)| scores.clone()).collect::<Vec<_>>();
    let (exact, lossy) = (scores(&exact), scores(&lossy));
    let mean = exact.iter().zip(&lossy).map(|(a, b)| (a - b).abs()).sum::<f32>() / exact.len() as f32;
    assert!(mean > 0.0 && mean < 0.2, "mean distance {mean}");
}

/// What a schedule brought about, to show that the schedules are not all the same.
#[derive(Debug, Default)]
struct Tally {
    schedules: usize,
    finished: usize,
    failed: usize,
    refused: usize,
    killed: usize,
    cancelled_tickets: usize,
    broken_links: usize,
}

/// One randomly drawn schedule: latencies, lanes that overtake each other, late and lost stripes, cancelled tickets,
/// cancelled clients, broken links, killed members and their replacements.
fn schedule(seed: u64, tiny: &Tiny, tally: &mut Tally) {
    use rand::SeedableRng;
    let mut random = rand::rngs::SmallRng::seed_from_u64(seed);
    let slow = Duration::from_micros(random.random_range(3..2000));
    let mut world = World::new(
        Shape {
            lanes: random.random_range(1..=4),
            maps_peer_memory: random.random_bool(0.3),
            max_rows: random.random_range(6..=24),
            latency: Duration::from_micros(1)..slow,
            control_latency: Duration::from_micros(10)..slow * 3,
            ..shape(seed, random.random_range(1..=3), random.random_range(1..=3), random.random_range(1..=3))
        },
        tiny,
    );
    until(&mut world, "joining", |world| world.is_complete());
    world.fabric.set_faults(FaultPlan {
        late: if random.random_bool(0.6) { 0.05 } else { 0.0 },
        lateness: slow..slow * 20,
        lost: if random.random_bool(0.3) { 0.002 } else { 0.0 },
        script: Vec::new(),
    });
    let (cancels, breaks, kills, leaves) = (
        if random.random_bool(0.4) { 0.002 } else { 0.0 },
        if random.random_bool(0.3) { 0.001 } else { 0.0 },
        if random.random_bool(0.3) { 0.001 } else { 0.0 },
        if random.random_bool(0.2) { 0.001 } else { 0.0 },
    );
    let mut to_send: Vec<usize> = (0..golden().len()).collect();
    let mut sent = Vec::new();
    let mut refusals = 0;
    let mut calm = 0;
    until(&mut world, "an end of every sequence", |world| {
        if !to_send.is_empty() && random.random_bool(0.05) {
            let case = to_send[0];
            match world.generate(request(&golden()[case].prompt, 4)) {
                Ok(sequence) => {
                    sent.push((case, sequence));
                    to_send.remove(0);
                }
                Err(_) if refusals < 500 => refusals += 1,
                Err(_) => {
                    to_send.remove(0);
                    tally.refused += 1;
                }
            }
        }
        if random.random_bool(cancels) {
            tally.cancelled_tickets += usize::from(world.cancel_somewhere());
        }
        if random.random_bool(breaks) {
            world.break_some_links();
            tally.broken_links += 1;
        }
        if random.random_bool(leaves)
            && let Some(&(_, sequence)) = sent.last()
            && world.clients[&sequence].outcome.is_none()
        {
            world.cancel_client(sequence);
            world.clients.remove(&sequence);
            sent.pop();
        }
        if random.random_bool(kills) {
            let place = random.random_range(0..world.places());
            if let Some((attention, rank)) = world.kill(place) {
                tally.killed += 1;
                if random.random_bool(0.7) {
                    if attention { world.start_attention(rank, tiny) } else { world.start_ffn(rank, tiny) }
                }
            }
        }
        calm += 1;
        to_send.is_empty() && sent.iter().all(|(_, sequence)| world.clients[sequence].outcome.is_some())
    });
    for (case, sequence) in sent {
        let client = &world.clients[&sequence];
        let expected = &golden()[case].greedy[..4];
        assert!(expected.starts_with(&client.tokens), "seed {seed}: {:?} instead of {expected:?}", client.tokens);
        match &client.outcome {
            Some(Outcome::Finished) => {
                assert_eq!(client.tokens, expected, "seed {seed}");
                tally.finished += 1;
            }
            Some(_) => tally.failed += 1,
            None => panic!("seed {seed}: no outcome"),
        }
    }
    tally.schedules += 1;
}

fn schedules(seeds: std::ops::Range<u64>) {
    let tiny = Tiny::load(3);
    let mut tally = Tally::default();
    for seed in seeds {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| schedule(seed, &tiny, &mut tally)));
        assert!(result.is_ok(), "schedule {seed} failed; run it alone with STEPMESH_SCHEDULE={seed}");
    }
    println!("{tally:?}");
    assert!(tally.finished > 0 && tally.failed > 0 && tally.killed > 0 && tally.cancelled_tickets > 0);
}

#[test]
fn schedules_0_to_249_give_right_tokens_or_typed_errors() {
    schedules(0..250);
}

#[test]
fn schedules_250_to_499_give_right_tokens_or_typed_errors() {
    schedules(250..500);
}

#[test]
fn schedules_500_to_749_give_right_tokens_or_typed_errors() {
    schedules(500..750);
}

#[test]
fn schedules_750_to_999_give_right_tokens_or_typed_errors() {
    schedules(750..1000);
}

#[test]
fn a_schedule_can_be_run_alone() {
    if let Ok(seed) = std::env::var("STEPMESH_SCHEDULE") {
        schedule(seed.parse().unwrap(), &Tiny::load(3), &mut Tally::default());
    }
}
