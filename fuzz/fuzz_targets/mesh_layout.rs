#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    stepmesh_mesh::fuzzing::layout(bytes);
});
