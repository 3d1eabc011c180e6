//! One page of everything that was measured: results files of any suites, as HTML that needs nothing else.

mod baseline;
mod chart;
mod figures;

pub use baseline::{Moved, compare};
pub use figures::{FileError, Results};

use chart::escape;
use std::fmt::Write as _;

/// Offers every plot as a file: the SVG as it is, and as a PNG of twice its size that the browser draws.
const EXPORT: &str = include_str!("export.js");

/// A plot with a name that a file can have.
pub struct Plot {
    /// Lower case, no spaces.
    pub name: String,
    /// The whole of an SVG file.
    pub svg: String,
}

/// The plots that the results give.
pub fn plots(all: &[Results]) -> Vec<Plot> {
    all.iter().flat_map(figures::plots).collect()
}

/// Tables for a terminal.
pub fn text(all: &[Results]) -> String {
    all.iter().map(figures::plain).collect::<Vec<_>>().join("\n")
}

/// The page.
pub fn html(all: &[Results]) -> String {
    let mut page = String::from(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>stepmesh bench</title>\n<style>\n\
         body{font:15px/1.5 sans-serif;margin:2em auto;max-width:1100px;padding:0 1em;color:#222;background:#fff}\n\
         table{border-collapse:collapse;font-size:13px;margin:1em 0;display:block;overflow-x:auto}\n\
         th,td{border:1px solid #ddd;padding:3px 8px;text-align:right;white-space:nowrap}th{background:#f4f4f4}\n\
         figure{margin:.5em 0;width:fit-content;max-width:100%}svg{max-width:100%;height:auto;border:1px solid #eee}\
         figcaption{font-size:13px;text-align:right}code{background:#f4f4f4;padding:2px 4px}\n\
         </style></head><body>\n<h1>stepmesh bench</h1>\n",
    );
    for results in all {
        let _ = writeln!(
            page,
            "<h2>{}</h2>\n<p>{}<br><code>{}</code></p>",
            escape(&results.name),
            escape(&results.machine_line()),
            escape(&results.command)
        );
        for plot in figures::plots(results) {
            let (name, svg) = (escape(&plot.name), &plot.svg);
            let _ = write!(page, "<figure data-name=\"{name}\">{svg}<figcaption></figcaption></figure>");
        }
        page.push_str(&figures::table(results));
    }
    page + "<script>\n" + EXPORT + "</script></body></html>\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn results() -> Vec<Results> {
        let machine = json!({"cpu": "A <CPU>", "cpus": 2, "pinned": [0, 1], "kernel": "6", "load": [0.1, 0.0, 0.0]});
        let floor = json!({"name": "cache_line", "p50_us": 0.1});
        let transport = json!({"provider": "shm", "op": "pingpong", "mode": "copy", "bytes": 8, "p50_us": 0.2,
            "p99_us": 0.4, "gbytes_per_s": 0.1, "floor": floor, "ratio": 2.0});
        let peer = json!({"peer": "ucx_am", "version": "1.13.1", "provider": "shm", "mode": "copy", "bytes": 8,
            "peer_p50_us": 0.4, "ours_p50_us": 0.2, "ratio": 0.5});
        let push = json!({"attention": 1, "ffn": 1, "microbatches": 1, "provider": "shm", "mode": "in_place",
            "engine": "caller", "batch": 128, "a2f_bytes": 948480, "f2a_bytes": 1835008, "p50_us": 1.0, "p90_us": 1.1,
            "p99_us": 2.0, "p999_us": 9.0, "max_us": 90.0, "phases": {"fill": 0.1, "a2f_wire": 0.4}, "floor": floor,
            "ratio": 10.0, "budget": {"stage_us": 272.0, "share": 0.01, "wire_400g_us": 55.0, "share_with_wire": 0.2}});
        let pipeline = json!({"clock": "wall", "provider": "shm", "attention_us": 272.0, "ffn_us": 272.0,
            "wire_us": 272.0, "layers": 61, "microbatches": 3, "runs": 5, "tpot_us": 50000.0, "ideal_us": 49776.0,
            "predicted_us": 49900.0, "efficiency": 0.99, "stall_share": {"attention": 0.01, "ffn": 0.01}});
        let failure = json!({"peer": "nixl", "provider": "tcp", "bytes": 8, "failed": "no such backend"});
        let scaling = json!({"provider": "mem", "attention": 16, "ffn": 16, "transfers": 256, "round_us": 500.0,
            "cpu_us_per_transfer": 2.5, "relative": 1.2});
        let product = json!({"op": "gemm", "layer": "down", "weights": "fp8", "tokens": 128, "rows": 7168, "cols": 5120,
            "threads": 2, "gflops": 160.0, "floor": {"name": "fma", "gflops": 200.0}, "ratio": 0.8});
        let decoding = json!({"op": "decode", "model": "step3-story", "dtype": "bf16", "batch": 16, "threads": 2,
            "tokens_per_s": 4000.0,
            "peers": [{"peer": "pytorch", "dtype": "bf16", "tokens_per_s": 1000.0, "ratio": 4.0}]});
        let model = json!([product, decoding]);
        [json!([transport, peer, failure]), json!([push]), json!([pipeline]), json!([scaling]), model]
            .into_iter()
            .map(|results| json!({"machine": machine, "command": "stepmesh bench <x>", "results": results}).to_string())
            .map(|text| Results::parse("a file", &text).expect("results"))
            .collect()
    }

    #[test]
    fn a_page_holds_the_machine_the_command_a_plot_and_every_row_of_each_suite() {
        let page = html(&results());
        assert!(page.contains("A &lt;CPU&gt;") && page.contains("stepmesh bench &lt;x&gt;") && !page.contains("NaN"));
        assert!(page.matches("<svg").count() >= 8, "{}", page.matches("<svg").count());
        for row in ["pingpong", "ucx_am", "no such backend", "in_place", "49776", "cpu_us_per_transfer", "pytorch"] {
            assert!(page.contains(row), "{row}");
        }
        let names: Vec<_> = plots(&results()).into_iter().map(|plot| plot.name).collect();
        assert!(
            names.iter().all(|name| name.chars().all(|c| c.is_ascii_lowercase() || "_-0123456789".contains(c))),
            "{names:?}"
        );
    }

    #[test]
    fn plain_writes_that_bounce_are_among_the_round_trips() {
        let mut results = results();
        results.truncate(1);
        results[0].rows.truncate(1);
        results[0].rows[0]["op"] = json!("pingpong_plain");
        let names: Vec<_> = plots(&results).into_iter().map(|plot| plot.name).collect();
        assert!(names.len() == 1 && names[0].contains("transport-latency"), "{names:?}");
    }

    #[test]
    fn a_file_that_is_not_results_is_refused_by_name() {
        for text in
            ["", "[]", "{\"results\": []}", "{\"machine\": {}, \"command\": \"x\", \"results\": [{\"odd\": 1}]}"]
        {
            let error = Results::parse("old.json", text).err().map(|error| error.to_string());
            assert!(error.is_some_and(|error| error.contains("old.json")), "{text}");
        }
    }

    #[test]
    fn only_what_moved_beyond_noise_is_told() {
        let (before, mut now) = (results(), results());
        assert!(compare(&before, &now).is_empty());
        now[0].rows[0]["ratio"] = json!(2.1);
        assert!(compare(&before, &now).is_empty(), "5 % are noise");
        now[0].rows[0]["ratio"] = json!(3.0);
        let moved = compare(&before, &now);
        assert_eq!(moved.len(), 1);
        assert!(moved[0].worse && (moved[0].change - 0.5).abs() < 1e-9);
        now[2].rows[0]["efficiency"] = json!(0.5);
        assert!(compare(&before, &now).iter().all(|moved| moved.worse));
    }
}
