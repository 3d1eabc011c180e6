//! Slots on a GPU from C's side, on a double of the driver: both sides get the device's addresses, and streams use them.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test's own functions")]

use std::ffi::{CStr, CString, c_void};
use std::ptr::null_mut;
use std::time::Instant;
use stepmesh_c::*;
use stepmesh_fake_cuda::BIAS;
use stepmesh_fake_cuda::harness::{with_double, without_driver};
use stepmesh_mesh::scheduler::{SchedulerOptions, ServeOptions, spawn};

const BYTES: usize = 4096;

fn last() -> String {
    // SAFETY: never null, and terminated.
    unsafe { CStr::from_ptr(stepmesh_last_error_message()) }.to_str().unwrap().to_owned()
}

fn ok(status: StepmeshStatus) {
    assert_eq!(status, StepmeshStatus::Ok, "{}", last());
}

/// Joins both sides on a GPU.
fn options(scheduler: &CString, spec: &StepmeshPartSpec) -> StepmeshOptions {
    // SAFETY: zero is the default of every option.
    let defaults: StepmeshOptions = unsafe { std::mem::zeroed() };
    StepmeshOptions {
        scheduler: scheduler.as_ptr(),
        microbatches: 1,
        request: spec,
        request_parts: 1,
        reply: spec,
        reply_parts: 1,
        gpu_plus_one: 1,
        ..defaults
    }
}

#[test]
fn both_sides_get_the_addresses_of_the_device() {
    with_double("both_sides_get_the_addresses_of_the_device", || {
        let scheduler = spawn(ServeOptions::new(SchedulerOptions::new(1, 1))).unwrap();
        let url = CString::new(scheduler.url()).unwrap();
        let spec = StepmeshPartSpec { row_bytes: BYTES as u32, max_rows: 1 };
        let options = options(&url, &spec);
        let part = StepmeshPart { key: 1, dtype: StepmeshDtype::U8 as u32, rows: 1, row_bytes: BYTES as u32 };
        let (mut attention, mut ffn) = (0, 0);
        // SAFETY: all pointers are to values of this test.
        unsafe {
            ok(stepmesh_join_attention(&options, &mut attention));
            ok(stepmesh_join_ffn(&options, &mut ffn));
            let started = Instant::now();
            while stepmesh_wait_complete(attention, 1) != StepmeshStatus::Ok {
                assert!(started.elapsed().as_secs() < 30, "{}", last());
                stepmesh_poll(ffn, null_mut());
            }
            ok(stepmesh_acquire(attention, 0));
            let (mut sent, mut reply, mut bytes): (*mut c_void, *mut c_void, _) = (null_mut(), null_mut(), 0);
            ok(stepmesh_send_part(attention, 0, 0, &mut sent, &mut bytes));
            assert!(sent as u64 >= BIAS && bytes == BYTES, "an address of the device");
            let request = StepmeshRequest { group: 7, parts: &part, part_count: 1, ..std::mem::zeroed() };
            let (mut ticket, mut batch) = (0, std::mem::zeroed::<StepmeshBatch>());
            ok(stepmesh_push_pull(attention, 0, &request, &mut ticket));
            ok(stepmesh_next_batch(ffn, StepmeshPolicy::All as u32, 0, 10_000, &mut batch));
            let mut tensor = std::mem::zeroed::<StepmeshTensor>();
            ok(stepmesh_segment_part(ffn, batch.id, 0, 0, &mut tensor));
            assert_eq!(tensor.data.cast_mut(), sent, "in the same process it is the same memory");
            ok(stepmesh_segment_reply(ffn, batch.id, 0, 0, &mut reply, &mut bytes));
            assert!(reply as u64 >= BIAS && bytes == BYTES && reply != sent);
            ok(stepmesh_segment_set_reply(ffn, batch.id, 0, &part, 1));
            ok(stepmesh_respond(ffn, batch.id));
            ok(stepmesh_wait(attention, ticket, 10_000));
            ok(stepmesh_reply(attention, 0, 0, 0, &mut tensor));
            assert_eq!(tensor.data.cast_mut(), reply);
        }
        ok(stepmesh_close(attention));
        ok(stepmesh_close(ffn));
    });
}

#[test]
fn without_a_driver_joining_says_what_to_install() {
    without_driver("without_a_driver_joining_says_what_to_install", || {
        let (url, spec) = (CString::new("http://127.0.0.1:1").unwrap(), StepmeshPartSpec { row_bytes: 8, max_rows: 1 });
        let mut handle = 0;
        // SAFETY: both point to values of this test.
        let status = unsafe { stepmesh_join_attention(&options(&url, &spec), &mut handle) };
        assert_eq!((status, handle), (StepmeshStatus::Transport, 0));
        assert!(last().contains("NVIDIA driver"), "{}", last());
    });
}
