#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    stepmesh_transport::shm::fuzzing::packets(bytes);
});
