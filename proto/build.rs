//! Compiles the control plane's messages with protox, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=control.proto");
    #[cfg(feature = "control")]
    {
        let descriptors = protox::compile(["control.proto"], ["."])?;
        tonic_prost_build::configure().compile_fds(descriptors)?;
    }
    Ok(())
}
