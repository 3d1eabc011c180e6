//! A short run of the pipeline suite, so that it keeps working: what takes its time is on the path, and nothing hides.

use std::ops::ControlFlow;
use std::time::Duration;
use stepmesh_bench::pipeline::{Options, run};
use stepmesh_bench::{BenchError, Cpus, Report};
use stepmesh_pipeline::Stages;
use stepmesh_transport::Provider;

#[test]
fn a_token_takes_no_less_than_its_stages_and_the_wire_allow() {
    let cpus = match Cpus::choose(None) {
        Err(BenchError::Cpus(_)) => return println!("skipped: one CPU"),
        cpus => cpus.expect("CPUs"),
    };
    let us = Duration::from_micros;
    let stages = Stages { attention: us(300), ffn: us(200), wire: us(1_000), microbatches: 2, layers: 61 };
    let mut options = Options::new(Provider::Shm, cpus);
    options.quick();
    options.points = vec![stages, Stages { wire: us(0), ..stages }];
    let mut report = Report::new(cpus, "the test");
    run(&options, &mut report, &mut |_| ControlFlow::Continue(())).expect("a whole run");
    let [wired, unwired] = report.results.as_slice() else { panic!("two points") };
    assert_eq!((wired.bound, unwired.bound), ("wire", "attention"));
    assert!((wired.ideal_us - 61.0 * 1_500.0).abs() < 1.0 && (unwired.ideal_us - 61.0 * 600.0).abs() < 1.0);
    for row in &report.results {
        assert!(row.tpot_us >= row.ideal_us && row.predicted_us >= row.ideal_us, "{row}");
        assert!(row.stall_share.ffn > 0.0, "the FFN side has less to do than the time of a layer: {row}");
    }
    let json = serde_json::to_value(wired).expect("plain data");
    assert_eq!((json["clock"].as_str(), json["provider"].as_str()), (Some("wall"), Some("shm")));
}

/// The executors that ship, over the simulated network: what the model predicts, at every point of the sweep.
#[test]
fn by_the_virtual_clock_a_token_takes_what_the_model_predicts_and_always_the_same() {
    let cpus = match Cpus::choose(None) {
        Err(BenchError::Cpus(_)) => return println!("skipped: one CPU"),
        cpus => cpus.expect("CPUs"),
    };
    let sweep = || {
        let mut options = Options::new(Provider::Shm, cpus);
        options.by_virtual_clock();
        let mut report = Report::new(cpus, "the test");
        run(&options, &mut report, &mut |_| ControlFlow::Continue(())).expect("a whole run");
        report.results
    };
    let (first, second) = (sweep(), sweep());
    assert_eq!(first.len(), 10);
    for (row, again) in first.iter().zip(&second) {
        assert_eq!(row.tpot_us, again.tpot_us, "{row}");
        // Without a wire the microbatches overtake each other, and the last has the pipeline to itself.
        assert!((row.tpot_us / row.predicted_us - 1.0).abs() < 0.005, "{row}");
    }
    let hidden = |wire_us: f64| {
        first.iter().find(|row| row.microbatches == 3 && row.attention_us == 272.0 && row.wire_us == wire_us)
    };
    let stalls = |wire_us| hidden(wire_us).expect("a point").stall_share.attention;
    assert!(stalls(272.0) < 0.01 && stalls(408.0) > 0.1, "the third microbatch hides a wire of one stage and no more");
}
