//! A short run of the mesh suite over each provider, so that it keeps working.

use std::ops::ControlFlow;
use std::time::Duration;
use stepmesh_bench::pushpull::{Driver, Engine, Options, Row, ScalingOptions, run, run_scaling};
use stepmesh_bench::{BenchError, Cpus, Program, Report};
use stepmesh_transport::Provider;

fn measure(provider: Provider, change: impl FnOnce(&mut Options)) -> Vec<Row> {
    let cpus = match Cpus::choose(None) {
        Err(BenchError::Cpus(_)) => {
            println!("skipped: one CPU");
            return Vec::new();
        }
        cpus => cpus.expect("CPUs"),
    };
    let mut options = Options { quick: true, batches: vec![1, 8], ..Options::new(provider, cpus) };
    change(&mut options);
    let mut report = Report::new(cpus, "the test");
    run(&options, &mut report, &mut |_| ControlFlow::Continue(())).expect("a whole run");
    assert_eq!(report.results.len(), 2 * options.modes.len() * options.engines.len());
    for row in &report.results {
        assert!(row.p50_us > 0.0 && row.p90_us > 0.0 && row.p999_us <= row.max_us, "{row}");
        assert!(row.ratio.is_some_and(|ratio| ratio > 0.0) && row.cpu.core_us_per_transfer > 0.0, "{row}");
        let names: Vec<_> = row.phases.keys().copied().collect();
        let steps = ["a2f_wire", "f2a_wire", "ffn_process", "ffn_queue", "fill", "request_post", "response_post"];
        assert_eq!(names, [&steps[..], &["wake_up"]].concat());
    }
    report.results
}

#[test]
fn shm_is_measured_however_it_is_driven() {
    measure(Provider::Shm, |options| options.engines = vec![Engine::Caller, Engine::Threaded]);
}

#[test]
fn tcp_is_measured() {
    measure(Provider::Tcp, |_| {});
}

#[test]
fn several_instances_answer_several_requests_at_once_after_a_while() {
    let compute = Duration::from_micros(300);
    let rows = measure(Provider::Shm, |options| {
        (options.attention, options.ffn, options.microbatches) = (2, 2, 2);
        options.ffn_time = compute;
    });
    for row in rows {
        assert!(row.p50_us >= 300.0, "{row}");
        assert!(row.phases["ffn_process"] >= 300.0, "{row}");
    }
}

#[test]
fn a_deployment_of_any_size_is_measured() {
    let cpus = match Cpus::choose(None) {
        Err(BenchError::Cpus(_)) => return println!("skipped: one CPU"),
        cpus => cpus.expect("CPUs"),
    };
    let series = [Provider::Mem, Provider::Shm].map(|provider| (provider, Driver::Thread)).to_vec();
    let nobody = Program { program: "/nowhere".into(), arguments: Vec::new() };
    let options = ScalingOptions { series, members: vec![1, 8], quick: true, ..ScalingOptions::new(nobody) };
    let mut report = Report::new(cpus, "the test");
    run_scaling(&options, &mut report, &mut |_| ControlFlow::Continue(())).expect("a whole run");
    let transfers: Vec<_> = report.results.iter().map(|row| row.transfers).collect();
    assert_eq!(transfers, [1, 64, 1, 64]);
    for row in &report.results {
        assert!(row.cpu_us_per_transfer > 0.0 && row.relative > 0.0, "{row}");
    }
}
