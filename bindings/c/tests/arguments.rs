//! Whatever C hands in, the answer is a status with words.
#![allow(clippy::unwrap_used, reason = "a test's own functions")]

use std::ffi::{CStr, CString};
use std::ptr::{null, null_mut};
use stepmesh_c::*;
use stepmesh_mesh::scheduler::{SchedulerOptions, ServeOptions, spawn};

fn last() -> String {
    // SAFETY: never null, and terminated.
    unsafe { CStr::from_ptr(stepmesh_last_error_message()) }.to_str().unwrap().to_owned()
}

fn nothing() -> StepmeshOptions {
    StepmeshOptions {
        scheduler: null(),
        token: null(),
        name: null(),
        workload: null(),
        transport: 0,
        lanes: 0,
        address: null(),
        rank_plus_one: 0,
        microbatches: 1,
        request: null(),
        request_parts: 0,
        reply: null(),
        reply_parts: 0,
        memory_limit_bytes: 0,
        join_timeout_ms: 1,
        gpu_plus_one: 0,
    }
}

/// Joining with these options is refused with this status and these words.
fn refused(options: &StepmeshOptions, status: StepmeshStatus, words: &str) {
    let mut handle = 0;
    // SAFETY: both point to values of this test.
    let found = unsafe { stepmesh_join_attention(options, &mut handle) };
    assert_eq!(found, status, "{}", last());
    assert!(last().contains(words), "{}", last());
    assert_eq!(handle, 0);
}

#[test]
fn handles_that_are_none_are_unknown() {
    for handle in [0, 77, u64::MAX] {
        // SAFETY: null where a pointer is optional or refused.
        let found = unsafe {
            [
                stepmesh_wait_complete(handle, 0),
                stepmesh_poll(handle, null_mut()),
                stepmesh_acquire(handle, 0),
                stepmesh_wait(handle, 1, 0),
                stepmesh_cancel(handle, 1),
                stepmesh_release(handle, 0),
                stepmesh_leave(handle, 0),
                stepmesh_respond(handle, 1),
                stepmesh_segment_fail(handle, 1, 0, null()),
                stepmesh_wake(handle),
                stepmesh_close(handle),
            ]
        };
        assert_eq!(found, [StepmeshStatus::Unknown; 11]);
        assert!(last().contains("no member's handle"), "{}", last());
    }
}

#[test]
fn null_pointers_are_refused_by_name() {
    // SAFETY: null pointers are what is tested.
    let found = unsafe {
        [
            stepmesh_join_attention(null(), &mut 0),
            stepmesh_join_ffn(&nothing(), null_mut()),
            stepmesh_describe(1, null_mut()),
            stepmesh_next_event(1, null_mut()),
            stepmesh_send_part(1, 0, 0, null_mut(), &mut 0),
            stepmesh_push_pull(1, 0, null(), &mut 0),
            stepmesh_reply(1, 0, 0, 0, null_mut()),
            stepmesh_next_batch(1, 0, 0, 0, null_mut()),
            stepmesh_segment(1, 1, 0, null_mut()),
            stepmesh_segment_part(1, 1, 0, 0, null_mut()),
            stepmesh_segment_reply(1, 1, 0, 0, null_mut(), null_mut()),
            stepmesh_segment_set_reply(1, 1, 0, null(), 1),
        ]
    };
    assert_eq!(found, [StepmeshStatus::Invalid; 12]);
    assert!(last().contains("parts is null"), "{}", last());
}

#[test]
fn options_that_make_no_sense_are_refused_by_name() {
    let url = CString::new("http://127.0.0.1:1").unwrap();
    let good = StepmeshOptions { scheduler: url.as_ptr(), ..nothing() };
    let spec = [StepmeshPartSpec { row_bytes: 1, max_rows: 1 }; 9];
    refused(&nothing(), StepmeshStatus::Invalid, "scheduler is null");
    refused(&StepmeshOptions { transport: 9, ..good }, StepmeshStatus::Invalid, "9 is no transport");
    refused(&StepmeshOptions { microbatches: 0, ..good }, StepmeshStatus::Invalid, "0 microbatches");
    refused(&StepmeshOptions { microbatches: 1 << 20, ..good }, StepmeshStatus::Invalid, "too many");
    refused(&StepmeshOptions { lanes: 300, ..good }, StepmeshStatus::Invalid, "300 lanes");
    let nine = StepmeshOptions { request: spec.as_ptr(), request_parts: 9, ..good };
    refused(&nine, StepmeshStatus::Invalid, "at most 8");
    refused(&StepmeshOptions { reply_parts: 2, ..good }, StepmeshStatus::Invalid, "is null, with a count of 2");
    refused(&StepmeshOptions { token: c"two words".as_ptr(), ..good }, StepmeshStatus::Invalid, "token");
    refused(&StepmeshOptions { name: c"\xff".as_ptr(), ..good }, StepmeshStatus::Invalid, "name is not UTF-8");
    refused(&StepmeshOptions { address: c"here".as_ptr(), ..good }, StepmeshStatus::Invalid, "address `here`");
    refused(&good, StepmeshStatus::SchedulerLost, "127.0.0.1:1");
}

#[test]
fn a_member_alone_says_what_is_missing() {
    let scheduler = spawn(ServeOptions::new(SchedulerOptions::new(1, 1))).unwrap();
    let url = CString::new(scheduler.url()).unwrap();
    let spec = StepmeshPartSpec { row_bytes: 64, max_rows: 4 };
    let options = StepmeshOptions {
        scheduler: url.as_ptr(),
        request: &spec,
        request_parts: 1,
        reply: &spec,
        reply_parts: 1,
        join_timeout_ms: 10_000,
        ..nothing()
    };
    let mut mesh = 0;
    let mut member = StepmeshMember { rank: 9, peers: 9, complete: 9 };
    let (mut data, mut bytes) = (null_mut(), 0);
    // SAFETY: all point to values of this test.
    unsafe {
        assert_eq!(stepmesh_join_attention(&options, &mut mesh), StepmeshStatus::Ok, "{}", last());
        assert_eq!(stepmesh_describe(mesh, &mut member), StepmeshStatus::Ok);
        assert_eq!(stepmesh_send_part(mesh, 0, 0, &mut data, &mut bytes), StepmeshStatus::Unknown);
        assert_eq!(stepmesh_next_batch(mesh, 0, 0, 0, &mut std::mem::zeroed()), StepmeshStatus::Unknown);
    }
    assert!(last().contains("not an FFN instance"), "{}", last());
    assert_eq!((member.rank, member.peers, member.complete), (0, 1, 0));
    assert_eq!(stepmesh_acquire(mesh, 0), StepmeshStatus::NotLinked);
    assert_eq!(stepmesh_acquire(mesh, 1), StepmeshStatus::Invalid);
    assert_eq!(stepmesh_wait_complete(mesh, 10), StepmeshStatus::Timeout);
    let mut handle = 0;
    // SAFETY: both point to values of this test.
    let taken = unsafe { stepmesh_join_attention(&options, &mut handle) };
    assert_eq!(taken, StepmeshStatus::Refused, "{}", last());
    assert!(last().contains("ranks are taken"), "{}", last());
    let mut event = StepmeshEvent { kind: 9, role: 0, rank: 0, complete: 0, epoch: 0, message: [0; 256] };
    // SAFETY: points to a value of this test.
    assert_eq!(unsafe { stepmesh_next_event(mesh, &mut event) }, StepmeshStatus::Ok);
    assert_eq!(event.kind, StepmeshEventKind::Joined as u32);
    let waiting = std::thread::spawn(move || stepmesh_wait_complete(mesh, 500));
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert_eq!(stepmesh_acquire(mesh, 0), StepmeshStatus::Busy);
    assert_eq!(stepmesh_close(mesh), StepmeshStatus::Busy);
    assert_eq!(waiting.join().unwrap(), StepmeshStatus::Timeout);
    assert_eq!(stepmesh_close(mesh), StepmeshStatus::Ok);
    assert_eq!(stepmesh_close(mesh), StepmeshStatus::Unknown);
}
