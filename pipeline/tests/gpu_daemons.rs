//! Daemons whose hidden states never leave a GPU. Where there is none, on a double of one whose kernels are the processor's code
//! (`stepmesh-fake-gpu`): slow, so that a few tokens have to do.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod deployment;

use deployment::{Deployment, fixture, generate, golden};
use stepmesh_fake_cuda::harness::with_gpu;
use stepmesh_mesh::control::BlockingClient;
use stepmesh_model::Dtype;
use stepmesh_pipeline::{Slots, Wire};
use stepmesh_proto::control::{GenerateRequest, generate_event::Body};
use stepmesh_transport::Provider;

/// New tokens of a sequence.
const NEW: usize = 6;

fn request(prompt: Vec<u32>, new: usize) -> GenerateRequest {
    GenerateRequest { prompt, max_new_tokens: new as u32, ignore_eos: true, logits: true, ..Default::default() }
}

/// Some sequences at once: their tokens and logits.
fn generate_all(client: &BlockingClient, prompts: &[(Vec<u32>, Vec<u32>)], new: usize) -> Vec<(Vec<u32>, Vec<f32>)> {
    std::thread::scope(|scope| {
        let run = |(prompt, _): &(Vec<u32>, Vec<u32>)| {
            let request = request(prompt.clone(), new);
            scope.spawn(move || generate(client, request))
        };
        let runs: Vec<_> = prompts.iter().map(run).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    })
}

fn decodes_the_golden_tokens(attention: u32, ffn: u32, transport: Provider, slots: Slots) {
    let deployment = Deployment::with(attention, ffn, &fixture(), |options| {
        options.transport = transport;
        options.slots = slots;
        // Fewer than the longest prompt has, so that it is cut.
        options.max_rows = 16;
    });
    let client = deployment.client();
    let golden = &golden("f32")[..3];
    for ((tokens, _), (_, greedy)) in generate_all(&client, golden, NEW).iter().zip(golden) {
        assert_eq!(tokens[..], greedy[..NEW], "{attention}A{ffn}F over {transport}");
    }
    drop(client);
    deployment.stop();
}

#[test]
fn golden_tokens_in_slots_of_the_gpus_memory() {
    with_gpu("golden_tokens_in_slots_of_the_gpus_memory", || {
        decodes_the_golden_tokens(1, 1, Provider::Shm, Slots::Gpu);
        decodes_the_golden_tokens(2, 2, Provider::Shm, Slots::Gpu);
    });
}

#[test]
fn golden_tokens_in_pinned_slots() {
    with_gpu("golden_tokens_in_pinned_slots", || {
        decodes_the_golden_tokens(2, 2, Provider::Tcp, Slots::Gpu);
        decodes_the_golden_tokens(2, 1, Provider::Shm, Slots::Pinned);
    });
}

#[test]
fn golden_tokens_in_slots_of_host_memory() {
    with_gpu("golden_tokens_in_slots_of_host_memory", || {
        decodes_the_golden_tokens(1, 1, Provider::Shm, Slots::Host);
    });
}

/// Where slots are host memory, the other side may compute on the CPU.
#[test]
fn a_gpu_and_a_cpu() {
    with_gpu("a_gpu_and_a_cpu", || {
        for (transport, slots) in [(Provider::Tcp, Slots::Gpu), (Provider::Shm, Slots::Pinned)] {
            let deployment = Deployment::with(1, 1, &fixture(), |options| {
                (options.transport, options.slots) = (transport, slots);
                options.gpu = options.gpu.filter(|_| options.name.starts_with("attention"));
            });
            let client = deployment.client();
            let (prompt, greedy) = golden("f32").swap_remove(0);
            assert_eq!(generate(&client, request(prompt, NEW)).0, greedy[..NEW], "{transport}");
            drop(client);
            deployment.stop();
        }
    });
}

/// Over shared memory one maps the other's slots: whoever has them elsewhere is not let in, and told why.
#[test]
fn a_cpu_beside_a_gpu_is_refused_over_shm() {
    with_gpu("a_cpu_beside_a_gpu_is_refused_over_shm", || {
        let deployment = Deployment::with(1, 1, &fixture(), |options| {
            options.gpu = options.gpu.filter(|_| options.name.starts_with("attention"));
        });
        let errors = deployment.errors();
        assert!(errors.iter().any(|error| error.contains("slots in GPU memory")), "{errors:?}");
    });
}

/// Whatever the types, slots on the GPU change nothing of what is computed; an FP8 wire carries codes and scales.
#[test]
fn bf16_and_fp8_are_what_they_are_in_host_slots() {
    with_gpu("bf16_and_fp8_are_what_they_are_in_host_slots", || {
        let fp8 = fixture().with_file_name("step3-tiny-fp8");
        let cases = [(&fp8, Dtype::Fp8, Dtype::Fp8), (&fixture(), Dtype::Bf16, Dtype::Fp8)];
        for (checkpoint, dtype, wire) in cases {
            let decode = |slots| {
                let deployment = Deployment::with(2, 1, checkpoint, |options| {
                    options.dtype = dtype;
                    options.wire = Wire::of(wire);
                    options.slots = slots;
                });
                let client = deployment.client();
                let results = generate_all(&client, &golden("f32")[..2], 2);
                drop(client);
                deployment.stop();
                results
            };
            for ((_, ours), (_, theirs)) in decode(Slots::Gpu).into_iter().zip(decode(Slots::Host)) {
                // The first token's; products on tensor cores may depend on how rows are put together.
                let differences = ours.iter().zip(&theirs).take(512).map(|(a, b)| f64::from((a - b).abs()));
                let mean = differences.sum::<f64>() / 512.0;
                assert!(ours.len() == 1024 && mean < 1e-3, "{dtype} on a wire of {wire}: {mean} on the mean");
            }
        }
    });
}

/// An FFN instance that goes fails what is under way with its name, and a new one serves what comes.
#[test]
fn an_ffn_instance_that_goes_fails_its_sequences() {
    with_gpu("an_ffn_instance_that_goes_fails_its_sequences", || {
        let mut deployment = Deployment::with(1, 1, &fixture(), |_| {});
        let client = deployment.client();
        let (prompt, _) = golden("f32").swap_remove(0);
        let mut events = client.generate(request(prompt, 200)).unwrap();
        let first = events.next().unwrap().unwrap();
        assert!(matches!(first, Body::Token(_)), "{first:?}");
        deployment.stop_last();
        let failed = events.find_map(|event| match event.unwrap() {
            Body::Failed(failed) => Some(failed.message),
            _ => None,
        });
        assert!(failed.as_deref().is_some_and(|message| message.contains("ffn-0")), "{failed:?}");
        drop(client);
        deployment.stop();
    });
}
