//! The transport suite without the command: `cargo run --release -p stepmesh-bench --example transport -- shm [quick]`.

use std::ops::ControlFlow;
use stepmesh_bench::transport::{Options, Progress, Row, run};
use stepmesh_bench::{Cpus, Report};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let provider = arguments.next().as_deref().unwrap_or("shm").parse()?;
    let quick = arguments.next().is_some();
    let cpus = Cpus::choose(None)?;
    let mut report = Report::new(cpus, "the example");
    println!("{}\n{}", report.machine, Row::HEAD);
    run(&Options { quick, ..Options::new(provider, cpus) }, &mut report, &mut |progress| {
        if let Progress::Done(row) = progress {
            println!("{row}");
        }
        ControlFlow::Continue(())
    })?;
    Ok(())
}
