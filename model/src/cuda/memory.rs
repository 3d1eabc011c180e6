//! Device memory for weights and for what is computed with them, and the way of host values there and back.

use std::sync::Arc;
use std::time::Duration;

use half::bf16;
use stepmesh_transport::cuda::{Context, DeviceMemory, PinnedMemory, Span, Stream};
use stepmesh_transport::{HostMemory, Region};

use crate::ModelError;

/// What every piece begins at a multiple of: what tensor cores and copies of 16 bytes want, and more.
const ALIGN: usize = 256;
/// What an arena allocates at least.
const CHUNK: usize = 32 << 20;
/// Bytes of host memory that copies go through.
const STAGING: usize = 8 << 20;
/// How long a copy, or what is before it on its stream, may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Memory that is taken piece by piece and given back all at once, when the last piece is dropped.
pub(super) struct Arena {
    context: Arc<Context>,
    chunk: Option<Region>,
    used: usize,
    bytes: usize,
}

impl Arena {
    pub(super) fn new(context: &Arc<Context>) -> Self {
        Self { context: context.clone(), chunk: None, used: 0, bytes: 0 }
    }

    /// So many bytes, of undefined contents.
    pub(super) fn take(&mut self, bytes: usize) -> Result<Span, ModelError> {
        let needed = bytes.max(1).next_multiple_of(ALIGN);
        let chunk = match self.chunk.take() {
            Some(chunk) if chunk.len() - self.used >= needed => chunk,
            _ => {
                self.used = 0;
                Region::new(DeviceMemory::allocate(&self.context, needed.max(CHUNK))?)
            }
        };
        let span = Span::new(&chunk, self.used..self.used + bytes)?;
        self.chunk = Some(chunk);
        self.used += needed;
        self.bytes += bytes;
        Ok(span)
    }

    /// Bytes that were taken.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Memory that grows to the largest batch seen and then stays.
#[derive(Default)]
pub(super) struct Scratch(Option<Span>);

impl Scratch {
    /// At least so many bytes, of undefined contents. What an earlier call returned may still be in use: streams keep it.
    pub(super) fn room(&mut self, context: &Arc<Context>, bytes: usize) -> Result<Span, ModelError> {
        if let Some(span) = self.0.as_ref().filter(|span| span.len() >= bytes) {
            return Ok(span.part(0..bytes)?);
        }
        let region = Region::new(DeviceMemory::allocate(context, bytes.max(1))?);
        let all = Span::new(&region, 0..region.len())?;
        self.0 = Some(all.clone());
        Ok(all.part(0..bytes)?)
    }
}

/// Values that are copied as they are.
pub(super) trait Plain: Copy {
    /// Appends its bytes.
    fn put(self, bytes: &mut Vec<u8>);
}

macro_rules! plain {
    ($($type:ty),*) => {$(
        impl Plain for $type {
            fn put(self, bytes: &mut Vec<u8>) {
                bytes.extend_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}
plain!(u8, u16, u32, i32, u64, f32);

impl Plain for bf16 {
    fn put(self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.to_bits().to_le_bytes());
    }
}

/// The way of host values to a device and back, through pinned memory: every call waits until it is done.
pub(super) struct Staging {
    stream: Arc<Stream>,
    pinned: Region,
}

impl Staging {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, ModelError> {
        let region = Region::new(Arc::new(HostMemory::allocate(STAGING, None)?));
        Ok(Self { stream: Arc::new(Stream::new(context)?), pinned: PinnedMemory::pin(context, region)? })
    }

    /// The stream on which it copies: what is put there before is done before, and what is put there after comes after.
    pub(super) fn stream(&self) -> Arc<Stream> {
        self.stream.clone()
    }

    pub(super) fn upload<T: Plain>(&self, values: impl IntoIterator<Item = T>, to: &Span) -> Result<(), ModelError> {
        let mut bytes = Vec::with_capacity(to.len());
        values.into_iter().for_each(|value| value.put(&mut bytes));
        self.upload_bytes(&bytes, to)
    }

    pub(super) fn upload_bytes(&self, bytes: &[u8], to: &Span) -> Result<(), ModelError> {
        for (at, chunk) in (0..bytes.len()).step_by(STAGING).zip(bytes.chunks(STAGING)) {
            self.pinned.write(0, chunk)?;
            self.stream.copy(&Span::new(&self.pinned, 0..chunk.len())?, &to.part(at..at + chunk.len())?)?;
            self.stream.finish(PATIENCE)?;
        }
        Ok(())
    }

    pub(super) fn download(&self, from: &Span) -> Result<Vec<u8>, ModelError> {
        let mut bytes = vec![0; from.len()];
        for (at, chunk) in (0..from.len()).step_by(STAGING).zip(bytes.chunks_mut(STAGING)) {
            self.stream.copy(&from.part(at..at + chunk.len())?, &Span::new(&self.pinned, 0..chunk.len())?)?;
            self.stream.finish(PATIENCE)?;
            self.pinned.read(0, chunk)?;
        }
        Ok(bytes)
    }
}
