//! A short run of the transport suite over each provider, so that it keeps working.

use std::ops::ControlFlow;
use stepmesh_bench::compare::Ucx;
use stepmesh_bench::transport::{Line, Mode, Operation, Options, SIZES, run};
use stepmesh_bench::{BenchError, Cpus, Progress, Report};
use stepmesh_transport::Provider;

/// None on a machine with one CPU: two ends that spin need two.
fn options(provider: Provider) -> Option<Options> {
    match Cpus::choose(None) {
        Err(BenchError::Cpus(_)) => None,
        cpus => Some(Options { quick: true, ..Options::new(provider, cpus.expect("CPUs")) }),
    }
}

fn measure(options: &Options, enough: usize) -> (Report<Line>, Result<(), BenchError>) {
    let mut report = Report::new(options.cpus, "the test");
    let mut seen = 0;
    let outcome = run(options, &mut report, &mut |progress| {
        seen += usize::from(matches!(progress, Progress::Done(_)));
        if seen < enough { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    assert_eq!(seen, report.results.len());
    (report, outcome)
}

fn quick(provider: Provider) {
    let Some(options) = options(provider) else { return println!("skipped: one CPU") };
    let (report, outcome) = measure(&options, usize::MAX);
    outcome.expect("a whole run");
    let modes = if provider == Provider::Shm { 2 } else { 1 };
    assert_eq!(report.results.len(), modes * SIZES.len() + 4);
    for line in &report.results {
        let Line::Row(row) = line else { panic!("nothing to compare with") };
        assert!(row.p50_us > 0.0 && row.p99_us > 0.0 && row.ratio > 0.0, "{row}");
        assert_eq!(row.floor.p50_us.is_some(), row.op == Operation::PingPong);
        assert!(row.op == Operation::PingPong || row.mode == Mode::Copy);
    }
    let json = serde_json::to_value(&report).expect("plain data");
    let row = &json["results"][0];
    assert_eq!(row["provider"], provider.name());
    assert_eq!(row["op"], "pingpong");
    assert_eq!(row["mode"], "copy");
    assert_eq!(row["bytes"], 8);
    assert!(row["floor"]["name"].is_string() && row["ratio"].is_f64() && row["drift"]["share"].is_f64());
    assert!(json["machine"]["cpu"].is_string() && json["machine"]["versions"]["stepmesh"].is_string());
}

#[test]
fn shm_is_measured() {
    quick(Provider::Shm);
}

#[test]
fn tcp_is_measured() {
    quick(Provider::Tcp);
}

#[test]
fn a_run_that_is_stopped_keeps_what_it_has() {
    let Some(options) = options(Provider::Shm) else { return println!("skipped: one CPU") };
    let (report, outcome) = measure(&options, 2);
    assert!(matches!(outcome, Err(BenchError::Interrupted)));
    assert_eq!(report.results.len(), 2);
}

#[test]
fn ucx_takes_turns_with_ours_where_it_is_installed() {
    let (Some(mut options), Some(ucx)) = (options(Provider::Shm), Ucx::find()) else {
        return println!("skipped: one CPU, or no ucx_perftest");
    };
    options.sizes = vec![8];
    options.ucx = Some(ucx);
    let (report, outcome) = measure(&options, usize::MAX);
    outcome.expect("a whole run");
    let comparisons: Vec<_> = report.results.iter().filter(|line| matches!(line, Line::Comparison(_))).collect();
    assert_eq!(comparisons.len(), 3);
    let json = serde_json::to_value(comparisons[0]).expect("plain data");
    assert_eq!(json["peer"], "ucx_put");
    assert!(json["version"].as_str().is_some_and(|version| version.starts_with(|first: char| first.is_ascii_digit())));
    let figure = |name: &str| json[name].as_f64().expect("a number");
    assert!((figure("ours_p50_us") / figure("peer_p50_us") - figure("ratio")).abs() < 1e-9);
}

#[test]
fn two_ends_need_two_cpus_that_this_process_may_use() {
    assert!(matches!(Cpus::choose(Some([0, 0])), Err(BenchError::SameCpu(0))));
    assert!(matches!(Cpus::choose(Some([0, 100_000])), Err(BenchError::NoCpu { .. } | BenchError::Cpus(_))));
}
