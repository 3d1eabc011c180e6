//! Device memory: who owns it, who may touch it, how others reach it.

use crate::double::{allocated, attribute, context, fail, finish, host, process, whole, with_double, with_driver};
use cudarc::driver::sys::{CUdevice_attribute, CUresult};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::Stdio;
use std::sync::Arc;
use stepmesh_transport::cuda::{CudaError, DeviceMemory, ExportedMemory, PeerMemory, Span, Stream};
use stepmesh_transport::{Access, Device, DeviceOptions, HostMemory, Memory, Provider, Region, TransportError};

#[test]
fn bytes_go_to_the_device_and_come_back_and_the_cpu_touches_none() {
    with_driver("memory::bytes_go_to_the_device_and_come_back_and_the_cpu_touches_none", || {
        let context = context();
        let device = Region::new(DeviceMemory::allocate(&context, 1000).unwrap());
        assert_eq!(device.len(), 2 << 20, "whole granules");
        assert!(device.on_device());
        assert!(matches!(device.read(0, &mut [0]), Err(TransportError::DeviceMemory)));
        assert!(matches!(device.write(0, &[1]), Err(TransportError::DeviceMemory)));

        let stream = Stream::new(&context).unwrap();
        let bytes: Vec<u8> = (0..1000).map(|i| (i * 7) as u8).collect();
        let (there, back) = (host(&bytes), host(&[0; 1000]));
        let middle = Span::new(&device, 4096..5096).unwrap();
        stream.copy(&whole(&there), &middle).unwrap();
        stream.copy(&middle, &whole(&back)).unwrap();
        finish(&stream);
        let mut found = vec![0; 1000];
        back.read(0, &mut found).unwrap();
        assert_eq!(found, bytes);
    });
}

#[test]
fn a_stream_refuses_host_memory_that_is_not_pinned_for_the_driver_would_have_the_cpu_wait() {
    let name = "memory::a_stream_refuses_host_memory_that_is_not_pinned_for_the_driver_would_have_the_cpu_wait";
    with_driver(name, || {
        let device = Region::new(DeviceMemory::allocate(&context(), 5).unwrap());
        let plain = Region::new(Arc::new(HostMemory::allocate(5, None).unwrap()));
        let stream = Stream::new(&context()).unwrap();
        let (device, plain) = (Span::new(&device, 0..5).unwrap(), whole(&plain));
        for (from, to) in [(&device, &plain), (&plain, &device)] {
            let error = stream.copy(from, to).unwrap_err().to_string();
            assert!(error.contains("not pinned"), "{error}");
        }
        let (one, other) = (host(&[0; 5]), host(&[0; 5]));
        let error = stream.copy(&whole(&one), &whole(&other)).unwrap_err().to_string();
        assert!(error.contains("CPU's work"), "{error}");
        assert!(stream.is_idle().unwrap());
    });
}

#[test]
fn memory_is_freed_when_the_last_of_region_stream_and_graph_lets_go() {
    with_double("memory::memory_is_freed_when_the_last_of_region_stream_and_graph_lets_go", || {
        let context = context();
        let stream = Stream::new(&context).unwrap();
        let region = Region::new(DeviceMemory::allocate(&context, 1).unwrap());
        let back = host(&[0; 8]);
        let span = Span::new(&region, 0..8).unwrap();
        let graph =
            stepmesh_transport::cuda::Graph::capture(&stream, |stream| stream.copy(&span, &whole(&back))).unwrap();
        drop((region, span));
        assert_eq!(allocated(), 2 << 20, "the graph refers to it");
        graph.launch(&stream).unwrap();
        drop(graph);
        finish(&stream);
        assert_eq!(allocated(), 0);
    });
}

#[test]
fn more_than_there_is_is_refused_and_what_there_was_stays() {
    with_double("memory::more_than_there_is_is_refused_and_what_there_was_stays", || {
        let context = context();
        let kept = DeviceMemory::allocate(&context, 100 << 20).unwrap();
        let error = DeviceMemory::allocate(&context, 1 << 30).unwrap_err();
        let CudaError::OutOfMemory { bytes, free, total, .. } = error else { panic!("{error}") };
        assert_eq!((bytes, free, total), (1 << 30, (1 << 30) - (100 << 20), 1 << 30));
        assert!(matches!(DeviceMemory::allocate(&context, 0), Err(CudaError::Invalid(_))));
        assert_eq!(allocated(), 100 << 20);
        drop(kept);
        assert_eq!(allocated(), 0);
    });
}

#[test]
fn providers_that_copy_by_cpu_refuse_it_and_a_dma_buf_is_there_for_those_that_do_not() {
    with_double("memory::providers_that_copy_by_cpu_refuse_it_and_a_dma_buf_is_there_for_those_that_do_not", || {
        let context = context();
        let memory = DeviceMemory::allocate(&context, 1).unwrap();
        let exported = memory.dma_buf().unwrap();
        assert!(exported.fd.as_raw_fd() >= 0 && exported.offset == 0);
        for provider in [Provider::Shm, Provider::Tcp] {
            let device: std::sync::Arc<dyn Device> =
                stepmesh_transport::open(provider, &DeviceOptions::default()).unwrap();
            let refused = device.register(memory.clone(), Access::PeerWrite).unwrap_err();
            // Shared memory takes nobody's memory at all.
            let is_named = matches!(refused, TransportError::DeviceMemory | TransportError::Unsupported { .. });
            assert!(is_named, "{provider}: {refused}");
        }
        fail("cuMemGetHandleForAddressRange", CUresult::CUDA_ERROR_NOT_SUPPORTED, 1);
        assert!(DeviceMemory::allocate(&context, 1).unwrap().dma_buf().is_none(), "then it is peer memory");
        attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED, 0);
        let context = stepmesh_transport::cuda::Context::open(0).unwrap();
        assert!(!context.exports_dma_buf() && DeviceMemory::allocate(&context, 1).unwrap().dma_buf().is_none());
    });
}

/// The other process: opens what it is handed, and answers in it.
#[test]
fn opens_what_it_is_handed() {
    let Ok(handle) = std::env::var("STEPMESH_FAKE_HANDLE") else { return };
    let bytes: Vec<u8> = handle.split(',').map(|byte| byte.parse().unwrap()).collect();
    let context = context();
    let exported = ExportedMemory::decode(&bytes).unwrap();
    let peer = PeerMemory::open(&context, &exported).unwrap();
    let region = Region::new(peer);
    assert_eq!((region.len(), region.on_device()), (2 << 20, true));
    let stream = Stream::new(&context).unwrap();
    let (read, answer) = (host(&[0; 5]), host(b"world"));
    stream.copy(&Span::new(&region, 0..5).unwrap(), &whole(&read)).unwrap();
    stream.copy(&whole(&answer), &Span::new(&region, 5..10).unwrap()).unwrap();
    finish(&stream);
    let mut found = [0; 5];
    read.read(0, &mut found).unwrap();
    assert_eq!(&found, b"hello");
}

#[test]
fn another_process_opens_it_and_both_see_the_same_bytes() {
    with_driver("memory::another_process_opens_it_and_both_see_the_same_bytes", || {
        let context = context();
        let memory = DeviceMemory::allocate(&context, 1).unwrap();
        let exported = memory.export().unwrap();
        assert_eq!(ExportedMemory::decode(&exported.encode()).unwrap(), exported);
        assert!(matches!(PeerMemory::open(&context, &exported), Err(CudaError::Peer { .. })), "not in its own process");

        let region = Region::new(memory);
        let stream = Stream::new(&context).unwrap();
        stream.copy(&whole(&host(b"hello")), &Span::new(&region, 0..5).unwrap()).unwrap();
        finish(&stream);
        let handle = exported.encode().map(|byte| byte.to_string()).join(",");
        let (mut other, _directory) = process("memory::opens_what_it_is_handed", true);
        let output = other.env("STEPMESH_FAKE_HANDLE", handle).stdin(Stdio::null()).output().unwrap();
        std::io::stderr().write_all(&output.stderr).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));

        let back = host(&[0; 10]);
        stream.copy(&Span::new(&region, 0..10).unwrap(), &whole(&back)).unwrap();
        finish(&stream);
        let mut found = [0; 10];
        back.read(0, &mut found).unwrap();
        assert_eq!(&found, b"helloworld");
    });
}

#[test]
fn handles_that_make_no_sense_are_refused() {
    for (bytes, what) in
        [(vec![], "0 bytes"), (vec![0; 71], "71 bytes"), (vec![0; 73], "73 bytes"), (vec![0; 72], "of 0 bytes")]
    {
        assert!(ExportedMemory::decode(&bytes).unwrap_err().to_string().contains(what));
    }
    let with_len = |len: u64| [&[1; 64][..], &len.to_le_bytes()].concat();
    assert!(ExportedMemory::decode(&with_len(u64::MAX)).is_err() && ExportedMemory::decode(&with_len(4096)).is_err());
    assert!(ExportedMemory::decode(&with_len(2 << 20)).is_ok());
    with_driver("memory::handles_that_make_no_sense_are_refused", || {
        let stale = ExportedMemory::decode(&[&[1; 64][..], &(2_u64 << 20).to_le_bytes()].concat()).unwrap();
        let error = PeerMemory::open(&context(), &stale).unwrap_err();
        assert!(matches!(error, CudaError::Peer { .. }) && error.to_string().contains("must still exist"));
    });
}
