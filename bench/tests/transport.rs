//! A short run of the transport suite over each provider, so that it keeps working.

use stepmesh_bench::transport::{Mode, Operation, Options, Progress, SIZES, run};
use stepmesh_transport::Provider;

fn quick(provider: Provider) {
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        println!("skipped: two ends that spin need two CPUs");
        return;
    }
    let mut seen = 0;
    let mut progress = |progress: Progress<'_>| seen += usize::from(matches!(progress, Progress::Done(_)));
    let report = run(&Options { quick: true, ..Options::new(provider) }, &mut progress).expect("a report");
    print!("{report}");
    assert_eq!(seen, report.results.len());
    let modes = if provider == Provider::Shm { 2 } else { 1 };
    assert_eq!(report.results.len(), modes * SIZES.len() + 4);
    for row in &report.results {
        assert!(row.p50_us > 0.0 && row.p50_us <= row.p99_us * 1.1 && row.ratio > 0.0, "{row}");
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
    assert!(json["machine"]["cpu"].is_string());
}

#[test]
fn shm_is_measured() {
    quick(Provider::Shm);
}

#[test]
fn tcp_is_measured() {
    quick(Provider::Tcp);
}
