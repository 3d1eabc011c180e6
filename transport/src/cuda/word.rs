//! Stream memory operations: a stream writes a word, or waits for one. What gates are made of, and an engine's own flags.

use super::{CudaError, Stream};
use cudarc::driver::sys::{
    CUdeviceptr, CUstreamBatchMemOpParams, CUstreamBatchMemOpParams_union_CUstreamMemOpWaitValueParams_st as WaitValue,
    CUstreamBatchMemOpParams_union_CUstreamMemOpWaitValueParams_st__bindgen_ty_1 as Awaited,
    CUstreamBatchMemOpParams_union_CUstreamMemOpWriteValueParams_st as WriteValue,
    CUstreamBatchMemOpParams_union_CUstreamMemOpWriteValueParams_st__bindgen_ty_1 as Written,
    CUstreamBatchMemOpType as Kind, CUstreamWaitValue_flags as WaitFlags,
};

/// A word of either size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Four bytes.
    U32(u32),
    /// Eight bytes.
    U64(u64),
}

impl Stream {
    /// Writes a word, behind all that is on the stream.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// The address is aligned, of the GPU's memory or of pinned memory, and valid until the stream has passed this.
    pub unsafe fn write_word(&self, address: CUdeviceptr, value: Word) -> Result<(), CudaError> {
        // SAFETY: by the contract.
        unsafe { self.operate(&mut [write(address, value)]) }
    }

    /// Goes on when the word is at least `value`, going around: whatever comes later on the stream waits.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// As for [`Stream::write_word`].
    pub unsafe fn wait_word(&self, address: CUdeviceptr, value: Word) -> Result<(), CudaError> {
        // SAFETY: by the contract.
        unsafe { self.operate(&mut [wait(address, value, self.flush())]) }
    }

    /// What a wait is to do besides, so that what network devices have written is seen behind it.
    pub(super) fn flush(&self) -> u32 {
        if self.context().flushes() { WaitFlags::CU_STREAM_WAIT_VALUE_FLUSH as u32 } else { 0 }
    }
}

pub(super) fn write(address: CUdeviceptr, value: Word) -> CUstreamBatchMemOpParams {
    let (operation, value) = match value {
        Word::U32(value) => (Kind::CU_STREAM_MEM_OP_WRITE_VALUE_32, Written { value }),
        Word::U64(value64) => (Kind::CU_STREAM_MEM_OP_WRITE_VALUE_64, Written { value64 }),
    };
    CUstreamBatchMemOpParams {
        writeValue: WriteValue { operation, address, __bindgen_anon_1: value, flags: 0, alias: 0 },
    }
}

/// Until the word is at least `value`: one that was overtaken is not missed.
pub(super) fn wait(address: CUdeviceptr, value: Word, flush: u32) -> CUstreamBatchMemOpParams {
    let (operation, value) = match value {
        Word::U32(value) => (Kind::CU_STREAM_MEM_OP_WAIT_VALUE_32, Awaited { value }),
        Word::U64(value64) => (Kind::CU_STREAM_MEM_OP_WAIT_VALUE_64, Awaited { value64 }),
    };
    let flags = WaitFlags::CU_STREAM_WAIT_VALUE_GEQ as u32 | flush;
    CUstreamBatchMemOpParams { waitValue: WaitValue { operation, address, __bindgen_anon_1: value, flags, alias: 0 } }
}
