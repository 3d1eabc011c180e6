//! `src/generated.rs` is what `control.proto` says. Checked in, so that nobody who builds the project compiles a compiler of
//! protobuf first; after a change of `control.proto`: `STEPMESH_BLESS=1 cargo test -p stepmesh-proto --test generated`.

use std::path::Path;

#[test]
fn the_messages_that_are_checked_in_are_those_of_control_proto() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let descriptors = protox::compile(["control.proto"], [package]).expect("control.proto");
    tonic_prost_build::configure().out_dir(out).compile_fds(descriptors).expect("messages");
    let made = std::fs::read_to_string(out.join("stepmesh.v1.rs")).expect("what was made");
    let checked_in = package.join("src/generated.rs");
    if std::env::var_os("STEPMESH_BLESS").is_some() {
        std::fs::write(&checked_in, &made).expect("the messages");
    }
    let known = std::fs::read_to_string(checked_in).expect("the messages");
    assert!(known == made, "control.proto has changed: STEPMESH_BLESS=1 cargo test -p stepmesh-proto --test generated");
}
