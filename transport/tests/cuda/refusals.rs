//! Drivers and devices that are missing, old, incapable or lost: an error that says so, and no abort.

use crate::double::{attribute, context, fail, host, version, whole, with_double, without_driver};
use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUresult};
use stepmesh_transport::cuda::{Context, CudaError, DeviceMemory, Gates, Graph, Span, Stream};
use stepmesh_transport::{GateSet, Region};

#[test]
fn no_driver() {
    without_driver("refusals::no_driver", || {
        // A machine may have one in its own place.
        if ["/usr/lib/x86_64-linux-gnu/libcuda.so", "/usr/lib64/libcuda.so"]
            .iter()
            .any(|path| std::fs::exists(path).unwrap())
        {
            return;
        }
        for _ in 0..2 {
            let error = Context::open(0).unwrap_err();
            assert_eq!(error, CudaError::NoDriver);
            assert!(error.to_string().contains("install the NVIDIA driver"));
        }
    });
}

#[test]
fn a_driver_that_is_too_old() {
    with_double("refusals::a_driver_that_is_too_old", || {
        version(11_040);
        let error = Context::open(0).unwrap_err();
        assert!(matches!(&error, CudaError::TooOld { found, .. } if found == "11.4"), "{error}");
    });
}

#[test]
fn a_device_that_does_not_exist() {
    with_double("refusals::a_device_that_does_not_exist", || {
        let error = Context::open(3).unwrap_err();
        assert_eq!(error, CudaError::NoDevice { index: 3, count: 1 });
        assert!(error.to_string().contains("CUDA_VISIBLE_DEVICES"));
        assert_eq!(context().name(), "Fake GPU");
    });
}

#[test]
fn a_machine_without_a_gpu() {
    with_double("refusals::a_machine_without_a_gpu", || {
        fail("cuInit", CUresult::CUDA_ERROR_NO_DEVICE, 1);
        assert_eq!(Context::open(0).unwrap_err(), CudaError::NoDevice { index: 0, count: 0 });
    });
}

#[test]
fn a_device_that_cannot_signal_or_order() {
    with_double("refusals::a_device_that_cannot_signal_or_order", || {
        let wide = Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS;
        attribute(wide, 0);
        assert!(Context::open(0).unwrap_err().to_string().contains("64-bit stream memory operations"));
        attribute(wide, 1);
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING, 0);
        assert!(Context::open(0).unwrap_err().to_string().contains("order what network devices write"));
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES, 1);
        // It flushes instead: the wait still passes.
        let context = Context::open(0).unwrap();
        let (gates, stream) = (Gates::new(&context, 1).unwrap(), Stream::new(&context).unwrap());
        let gate = gates.gate(0).unwrap();
        gate.pass(&stream).unwrap();
        gates.open(0);
        crate::double::finish(&stream);
    });
}

#[test]
fn a_device_that_is_lost() {
    with_double("refusals::a_device_that_is_lost", || {
        let context = context();
        let stream = Stream::new(&context).unwrap();
        let to = Region::new(DeviceMemory::allocate(&context, 8).unwrap());
        let (from, to) = (host(&[1; 8]), Span::new(&to, 0..8).unwrap());
        for (call, error) in [
            ("cuMemcpyAsync", CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE),
            ("cuStreamQuery", CUresult::CUDA_ERROR_ECC_UNCORRECTABLE),
            ("cuMemAlloc_v2", CUresult::CUDA_ERROR_UNKNOWN),
        ] {
            fail(call, error, 1);
            let found = match call {
                "cuMemcpyAsync" => stream.copy(&whole(&from), &to).unwrap_err(),
                "cuStreamQuery" => stream.is_idle().unwrap_err(),
                _ => DeviceMemory::allocate(&context, 1).unwrap_err(),
            };
            assert!(matches!(found, CudaError::Lost { index: 0, .. }), "{found}");
            assert!(found.to_string().contains("nvidia-smi"));
        }
    });
}

#[test]
fn what_the_driver_refuses_leaves_nothing_behind() {
    with_double("refusals::what_the_driver_refuses_leaves_nothing_behind", || {
        let context = context();
        fail("cuStreamCreate", CUresult::CUDA_ERROR_OUT_OF_MEMORY, 1);
        let error = Stream::new(&context).unwrap_err();
        assert!(matches!(&error, CudaError::Refused { call: "cuStreamCreate", .. }), "{error}");
        fail("cuMemHostGetDevicePointer_v2", CUresult::CUDA_ERROR_INVALID_VALUE, 1);
        assert!(Gates::new(&context, 4).is_err());
        assert!(Gates::new(&context, 4).is_ok());

        let stream = Stream::new(&context).unwrap();
        let device = Region::new(DeviceMemory::allocate(&context, 8).unwrap());
        let (from, to, there) = (host(&[1; 8]), host(&[0; 8]), Span::new(&device, 0..8).unwrap());
        // A capture that fails half-way: in the work, at its end, and when it is built.
        fail("cuMemcpyAsync", CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 1);
        let capture = || {
            Graph::capture(&stream, |stream| {
                stream.copy(&whole(&from), &there)?;
                stream.copy(&there, &whole(&to))
            })
        };
        assert!(matches!(capture().unwrap_err(), CudaError::Refused { call: "cuMemcpyAsync", .. }));
        fail("cuGraphInstantiateWithFlags", CUresult::CUDA_ERROR_INVALID_VALUE, 1);
        assert!(matches!(capture().unwrap_err(), CudaError::Capture { .. }));
        let graph = capture().unwrap();
        graph.launch(&stream).unwrap();
        crate::double::finish(&stream);
        let mut found = [0; 8];
        to.read(0, &mut found).unwrap();
        assert_eq!(found, [1; 8]);
    });
}
