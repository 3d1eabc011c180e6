//! Host memory that copy engines reach at full speed and without a detour: the staging of providers that move bytes by CPU.

use super::{Context, CudaError};
use crate::{Memory, Region};
use cudarc::driver::sys::{self, CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_READ_ONLY};
use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

/// A provider's region, page-locked for the GPU for as long as anybody refers to it. To the provider it is the region that it
/// was.
pub struct PinnedMemory {
    context: Arc<Context>,
    inner: Region,
}

impl fmt::Debug for PinnedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedMemory({:?}, GPU {})", self.inner, self.context.index())
    }
}

impl PinnedMemory {
    /// Locks the pages of a region of host memory.
    ///
    /// # Errors
    /// [`CudaError::Invalid`] for device memory; the driver refuses, as when the pages may not be locked.
    pub fn pin(context: &Arc<Context>, region: Region) -> Result<Region, CudaError> {
        if region.on_device() || region.is_empty() {
            return Err(CudaError::Invalid(format!("pinning {region:?}: it is not host memory with bytes")));
        }
        let (base, len) = (region.base().as_ptr().cast(), region.len());
        let read_only = if region.writable() { 0 } else { CU_MEMHOSTREGISTER_READ_ONLY };
        let flags = CU_MEMHOSTREGISTER_PORTABLE | read_only;
        // SAFETY: so many bytes of this process, mapped for as long as the region is kept below, unregistered before; if they may
        // only be read, the driver is told so.
        let register = || unsafe { sys::cuMemHostRegister_v2(base, len, flags) };
        context.call("cuMemHostRegister", register)?;
        Ok(Region::new(Arc::new(Self { context: context.clone(), inner: region })))
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        let base = self.inner.base().as_ptr().cast();
        // SAFETY: registered once; streams keep what they copy, so no copy is under way.
        let freed = self.context.call("cuMemHostUnregister", || unsafe { sys::cuMemHostUnregister(base) });
        if let Err(error) = freed {
            tracing::warn!("unpinning {self:?}: {error}");
        }
    }
}

// SAFETY: all is the region's own promise, which is kept for as long as this is.
unsafe impl Memory for PinnedMemory {
    fn base(&self) -> NonNull<u8> {
        self.inner.base()
    }

    fn len(&self) -> usize {
        self.inner.len()
    }

    fn writable(&self) -> bool {
        self.inner.writable()
    }

    fn as_any(&self) -> &dyn Any {
        self.inner.memory().as_any()
    }
}
