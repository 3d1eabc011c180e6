//! The stages on a GPU where there is none to compute on: typed errors that say what to do. What they compute is tested by the other
//! tests of this crate, some of which run again on a double of a GPU, and all with `STEPMESH_TEST_GPU` set, which
//! `scripts/gpu-check` does.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use common::checkpoint;
use stepmesh_fake_cuda::harness::{attribute, with_double, with_gpu, without_driver};
use stepmesh_model::cuda::{CudaAttention, CudaFfn};
use stepmesh_model::{Checkpoint, Dtype, LoadOptions, ModelError, Row, Shard};
use stepmesh_transport::cuda::CudaError;

/// What both sides say when they are to be loaded.
fn errors(dtype: Dtype, gpu: u32) -> [ModelError; 2] {
    let (checkpoint, options) = (checkpoint(), LoadOptions::new(dtype));
    [
        CudaAttention::load(&checkpoint, options, gpu, &mut |_| {}).err().unwrap(),
        CudaFfn::load(&checkpoint, options, Shard::WHOLE, gpu, &mut |_| {}).err().unwrap(),
    ]
}

#[test]
fn no_driver() {
    without_driver("no_driver", || {
        if ["/usr/lib/x86_64-linux-gnu/libcuda.so", "/usr/lib64/libcuda.so"]
            .iter()
            .any(|path| std::fs::exists(path).unwrap())
        {
            return;
        }
        for error in errors(Dtype::F32, 0) {
            assert!(matches!(error, ModelError::Cuda(CudaError::NoDriver)), "{error}");
        }
    });
}

#[test]
fn a_gpu_that_does_not_exist() {
    with_double("a_gpu_that_does_not_exist", || {
        for error in errors(Dtype::F32, 7) {
            assert!(matches!(error, ModelError::Cuda(CudaError::NoDevice { index: 7, count: 1 })), "{error}");
        }
    });
}

#[test]
fn a_driver_without_kernels_and_a_gpu_that_is_too_old() {
    use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR;
    with_double("a_driver_without_kernels_and_a_gpu_that_is_too_old", || {
        for error in errors(Dtype::Bf16, 0) {
            assert!(error.to_string().contains("the driver has no cuModuleLoadData"), "{error}");
        }
        attribute(MAJOR, 7);
        for error in errors(Dtype::Bf16, 0) {
            assert!(error.to_string().contains("compute capability 7.0, 8.9 is the least"), "{error}");
        }
    });
}

#[test]
fn types_that_no_kernel_is_made_for() {
    with_double("types_that_no_kernel_is_made_for", || {
        for error in errors(Dtype::Fp8F32, 0) {
            assert!(error.to_string().contains("use fp8, bf16 or f32"), "{error}");
        }
    });
}

/// Kernels for few, some and many rows give what the CPU computes. Each row is a sequence of its own: where a rounding tips a choice
/// of the router, no other row differs.
#[test]
fn fp8_products_of_every_tile() {
    with_gpu("fp8_products_of_every_tile", || {
        let checkpoint = Checkpoint::open(&common::fp8_fixture("")).unwrap();
        let tokens: Vec<u32> = (0..130).map(|index| (index * 37 + 11) % 512).collect();
        let logits = |gpu: Option<u32>, count: usize| {
            let mut model = common::Model::on(gpu, &checkpoint, Dtype::Fp8, 1, 1);
            model.cache = model.attention.new_cache(count * 16).unwrap();
            let row = |_| Row { sequence: model.cache.reserve(1).unwrap(), position: 0 };
            let rows: Vec<Row> = (0..count).map(row).collect();
            model.run(&rows, &tokens[..count])
        };
        for count in [24, 130] {
            let (ours, theirs) = (logits(Some(0), count), logits(None, count));
            let width = ours.len() / count;
            let means = ours.chunks(width).zip(theirs.chunks(width)).map(|(a, b)| common::difference(a, b).1);
            let (alike, others): (Vec<f32>, Vec<f32>) = means.partition(|mean| *mean < 1e-4);
            assert!(others.len() <= count / 20, "{count} rows: {} alike, the others differ by {others:?}", alike.len());
        }
    });
}
