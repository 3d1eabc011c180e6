//! What tests on the double have in common.

use std::sync::Arc;
use stepmesh_transport::cuda::{Context, PinnedMemory, Span, Stream};
use stepmesh_transport::{HostMemory, Region};

pub(crate) use stepmesh_fake_cuda::harness::*;

pub(crate) fn context() -> Arc<Context> {
    Context::open(0).unwrap()
}

/// Pinned host memory with these bytes.
pub(crate) fn host(bytes: &[u8]) -> Region {
    let region = Region::new(Arc::new(HostMemory::allocate(bytes.len(), None).unwrap()));
    region.write(0, bytes).unwrap();
    PinnedMemory::pin(&context(), region).unwrap()
}

pub(crate) fn whole(region: &Region) -> Span {
    Span::new(region, 0..region.len()).unwrap()
}

/// Waits for a stream, with a deadline.
pub(crate) fn finish(stream: &Stream) {
    let started = std::time::Instant::now();
    while !stream.is_idle().unwrap() {
        assert!(started.elapsed().as_secs() < 30, "the stream does not end");
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
}
