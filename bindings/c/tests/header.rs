//! The header that is checked in is the one that the sources make.
#![allow(clippy::unwrap_used, reason = "a test's own functions")]

use std::path::Path;

#[test]
fn the_header_is_what_the_sources_say() {
    let crate_directory = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(crate_directory.join("cbindgen.toml")).unwrap();
    let bindings = cbindgen::Builder::new().with_crate(crate_directory).with_config(config).generate().unwrap();
    let mut made = Vec::new();
    bindings.write(&mut made);
    let made = String::from_utf8(made).unwrap();
    let path = crate_directory.join("include/stepmesh.h");
    if std::env::var_os("STEPMESH_BLESS").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(made == checked_in, "include/stepmesh.h is stale: STEPMESH_BLESS=1 cargo test -p stepmesh-c --test header");
}
