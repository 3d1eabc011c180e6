//! The transport suite without the command: `cargo run --release -p stepmesh-bench --example transport -- shm [quick]`.

use stepmesh_bench::transport::{Options, Progress, Row, run};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let provider = arguments.next().as_deref().unwrap_or("shm").parse()?;
    let quick = arguments.next().is_some();
    println!("{}", Row::HEAD);
    let report = run(&Options { quick, ..Options::new(provider) }, &mut |progress| {
        if let Progress::Done(row) = progress {
            println!("{row}");
        }
    })?;
    println!("{:?}", report.machine);
    Ok(())
}
