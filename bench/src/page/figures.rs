//! Results files of any suite: read, told apart by what a result holds, drawn and tabulated.

use super::Plot;
use super::chart::{Bar, Scale, Series, Span, escape, gantt, lines, number, stack};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use thiserror::Error;

/// Why a file is not results.
#[derive(Debug, Error)]
pub enum FileError {
    /// It is not JSON.
    #[error("{name} is not JSON: {reason}")]
    Json {
        /// The file.
        name: String,
        /// Where it stops being JSON.
        reason: String,
    },
    /// It is JSON, of something else or of another release.
    #[error("{name} is not a results file of this release's suites: {what}")]
    Schema {
        /// The file.
        name: String,
        /// What is missing.
        what: String,
    },
}

/// A suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Transport,
    Comparison,
    PushPull,
    Pipeline,
    Scaling,
    Product,
    Decoding,
    /// A peer that could not be measured.
    Failure,
}

/// In the order of the page.
const KINDS: [Kind; 8] = [
    Kind::Transport,
    Kind::Comparison,
    Kind::Failure,
    Kind::PushPull,
    Kind::Pipeline,
    Kind::Scaling,
    Kind::Product,
    Kind::Decoding,
];

/// The results of one run.
#[derive(Clone, Debug)]
pub struct Results {
    pub(super) name: String,
    pub(super) command: String,
    machine: Value,
    pub(super) rows: Vec<Value>,
}

impl Results {
    /// Reads the text of the file of that name.
    ///
    /// # Errors
    /// It is not JSON, or not of the suites of this release.
    pub fn parse(name: &str, text: &str) -> Result<Self, FileError> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| FileError::Json { name: name.into(), reason: error.to_string() })?;
        let schema = |what: &str| FileError::Schema { name: name.into(), what: what.into() };
        let machine = value.get("machine").filter(|machine| machine.is_object());
        let command = value.get("command").and_then(Value::as_str);
        let rows = value.get("results").and_then(Value::as_array);
        let results = Self {
            name: name.into(),
            command: command.ok_or_else(|| schema("no `command`"))?.into(),
            machine: machine.cloned().ok_or_else(|| schema("no `machine`"))?,
            rows: rows.cloned().ok_or_else(|| schema("no `results`"))?,
        };
        match results.rows.iter().position(|row| kind(row).is_none()) {
            Some(row) => Err(schema(&format!("result {row} is of no suite that is known"))),
            None => Ok(results),
        }
    }

    pub(super) fn machine_line(&self) -> String {
        let text = |key: &str| self.machine.get(key).map_or_else(String::new, show);
        format!(
            "{}, {} CPUs, pinned to {}, Linux {}, load {}, versions {}",
            text("cpu"),
            text("cpus"),
            text("pinned"),
            text("kernel"),
            text("load"),
            text("versions")
        )
    }

    fn of(&self, wanted: Kind) -> impl Iterator<Item = &Value> {
        self.rows.iter().filter(move |row| kind(row) == Some(wanted))
    }
}

pub(super) fn kind(row: &Value) -> Option<Kind> {
    let has = |keys: &[&str]| keys.iter().all(|key| row.get(key).is_some());
    match () {
        () if has(&["peer", "ours_p50_us", "peer_p50_us"]) => Some(Kind::Comparison),
        () if has(&["op", "bytes", "floor"]) => Some(Kind::Transport),
        () if has(&["engine", "phases", "p50_us"]) => Some(Kind::PushPull),
        () if has(&["tpot_us", "ideal_us", "efficiency"]) => Some(Kind::Pipeline),
        () if has(&["transfers", "cpu_us_per_transfer", "relative"]) => Some(Kind::Scaling),
        () if has(&["op", "gflops", "floor"]) => Some(Kind::Product),
        () if has(&["op", "tokens_per_s", "peers"]) => Some(Kind::Decoding),
        () if has(&["peer", "failed"]) => Some(Kind::Failure),
        () => None,
    }
}

pub(super) fn text<'a>(row: &'a Value, key: &str) -> &'a str {
    row.get(key).and_then(Value::as_str).unwrap_or_default()
}

pub(super) fn figure(row: &Value, key: &str) -> f64 {
    row.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN)
}

fn show(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => {
            let value = number.as_f64().unwrap_or_default();
            if value.abs() >= 100.0 { format!("{value:.0}") } else { format!("{value:.3}") }
        }
        Value::Object(fields) => {
            fields.iter().map(|(key, value)| format!("{key} {}", show(value))).collect::<Vec<_>>().join(", ")
        }
        Value::Array(items) => items.iter().map(show).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// Lines by name, each with its points in order.
#[derive(Default)]
struct Lines(BTreeMap<String, Vec<(f64, f64)>>);

impl Lines {
    fn add(&mut self, name: String, x: f64, y: f64) {
        self.0.entry(name).or_default().push((x, y));
    }

    fn plot(self, plots: &mut Vec<Plot>, name: &str, title: &str, scale: Scale, labels: [&str; 2]) {
        if self.0.is_empty() {
            return;
        }
        let series = self.0.into_iter().map(|(name, mut points)| {
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            Series { name, points }
        });
        plots.push(Plot { name: name.into(), svg: lines(title, scale, labels, &series.collect::<Vec<_>>()) });
    }
}

pub(super) fn plots(results: &Results) -> Vec<Plot> {
    let mut plots = Vec::new();
    transport(results, &mut plots);
    push_pull(results, &mut plots);
    pipeline(results, &mut plots);
    scaling(results, &mut plots);
    model(results, &mut plots);
    plots
}

fn transport(results: &Results, plots: &mut Vec<Plot>) {
    let (mut latency, mut bandwidth) = (Lines::default(), Lines::default());
    // One plot for each provider and each kind of exchange: more lines than that nobody can tell apart.
    let mut peers: BTreeMap<(&str, bool), Lines> = BTreeMap::new();
    for row in results.of(Kind::Transport) {
        let (provider, op, mode, bytes) =
            (text(row, "provider"), text(row, "op"), text(row, "mode"), figure(row, "bytes"));
        let floor = &row["floor"];
        if op.starts_with("pingpong") {
            let what = if op == "pingpong" { mode } else { "plain" };
            latency.add(format!("{provider} {what}"), bytes, figure(row, "p50_us"));
            latency.add(format!("floor of {what}"), bytes, figure(floor, "p50_us"));
        } else {
            bandwidth.add(format!("{provider} {op}"), bytes, figure(row, "gbytes_per_s"));
            bandwidth.add(format!("floor of {op}"), bytes, figure(floor, "gbytes_per_s"));
        }
    }
    for row in results.of(Kind::Comparison) {
        // A request and its reply, or one size both ways.
        let is_echo = row["reply_bytes"].as_f64().is_some_and(|reply| reply != figure(row, "bytes"));
        let lines = peers.entry((text(row, "provider"), is_echo)).or_default();
        lines.add("ours".into(), figure(row, "bytes"), figure(row, "ours_p50_us"));
        lines.add(text(row, "peer").into(), figure(row, "bytes"), figure(row, "peer_p50_us"));
    }
    latency.plot(plots, "transport-latency", "Round trip of a transport, median", Scale::Log, ["bytes each way", "µs"]);
    bandwidth.plot(plots, "transport-bandwidth", "Streams of a transport", Scale::Log, ["bytes of a transfer", "GB/s"]);
    for ((provider, is_echo), lines) in peers {
        let (name, title, bytes) = if is_echo {
            (format!("compare-{provider}-mesh"), "Requests and replies over", "bytes there")
        } else {
            (format!("compare-{provider}"), "Messages that bounce over", "bytes each way")
        };
        let title = format!("{title} {provider}, beside other systems");
        lines.plot(plots, &name, &title, Scale::Log, [bytes, "µs"]);
    }
}

fn push_pull(results: &Results, plots: &mut Vec<Plot>) {
    let (mut latency, mut bars, mut shares) = (Lines::default(), Vec::new(), Vec::new());
    let mut tails: BTreeMap<String, Lines> = BTreeMap::new();
    for row in results.of(Kind::PushPull) {
        let what = format!("{} {}", text(row, "engine"), text(row, "mode"));
        let batch = figure(row, "batch");
        latency.add(what.clone(), batch, figure(row, "p50_us"));
        if let Some(floor) = row.get("floor") {
            latency.add(format!("floor of {}", text(row, "mode")), batch, figure(floor, "p50_us"));
        }
        if let Some(headed) = row.get("with_headers") {
            latency.add(format!("headers, {}", text(row, "mode")), batch, figure(headed, "p50_us"));
        }
        let quantiles = [("p50_us", 2.0), ("p90_us", 10.0), ("p99_us", 100.0), ("p999_us", 1000.0)];
        for (key, one_in) in quantiles {
            tails.entry(what.clone()).or_default().add(format!("{batch:>3} tokens"), figure(row, key), one_in);
        }
        let phases = row["phases"].as_object().into_iter().flatten();
        let order =
            ["fill", "request_post", "a2f_wire", "ffn_queue", "ffn_process", "response_post", "f2a_wire", "wake_up"];
        let mut pieces: Vec<_> = phases.map(|(name, time)| (name.clone(), time.as_f64().unwrap_or_default())).collect();
        pieces.sort_by_key(|(name, _)| order.iter().position(|known| known == name));
        // As shares: the rounds of one sweep differ a thousandfold.
        let whole = pieces.iter().map(|piece| piece.1).sum::<f64>().max(f64::MIN_POSITIVE);
        pieces.iter_mut().for_each(|piece| piece.1 *= 100.0 / whole);
        bars.push(Bar { label: format!("{what}, {batch}"), pieces });
        let budget = &row["budget"];
        let software = figure(budget, "share") * figure(budget, "stage_us");
        let pieces =
            vec![("software, memory".into(), software), ("400 Gb/s wire".into(), figure(budget, "wire_400g_us"))];
        shares.push(Bar { label: format!("{what}, {batch}"), pieces });
    }
    latency.plot(plots, "pushpull-latency", "push_pull to wait, median", Scale::Log, ["tokens", "µs"]);
    for (what, tails) in tails {
        let name = format!("pushpull-tail-{}", what.replace(' ', "-"));
        let title = format!("How late one round in so many is: {what}");
        tails.plot(plots, &name, &title, Scale::Log, ["µs", "one in"]);
    }
    if !bars.is_empty() {
        plots.push(Plot {
            name: "pushpull-phases".into(),
            svg: stack("Where a round goes: shares of the medians", "%", &bars, None),
        });
        let svg = stack("Of the 272 µs of a stage", "µs", &shares, Some((272.0, "272 µs")));
        plots.push(Plot { name: "pushpull-budget".into(), svg });
    }
}

fn pipeline(results: &Results, plots: &mut Vec<Plot>) {
    let mut token = Lines::default();
    for row in results.of(Kind::Pipeline) {
        let (attention, ffn, wire) = (figure(row, "attention_us"), figure(row, "ffn_us"), figure(row, "wire_us"));
        if attention == ffn {
            let name = format!("M {}, {attention:.0} µs", show(&row["microbatches"]));
            token.add(name.clone(), wire, figure(row, "tpot_us"));
            token.add(format!("{name}, ideal"), wire, figure(row, "ideal_us"));
        }
    }
    token.plot(
        plots,
        "pipeline-wire",
        "Time per output token over wire time",
        Scale::Linear,
        ["µs of wire, both ways", "µs"],
    );
    if let Some(row) = results.of(Kind::Pipeline).next() {
        plots.push(Plot { name: "pipeline-gantt".into(), svg: schedule(row) });
    }
}

fn scaling(results: &Results, plots: &mut Vec<Plot>) {
    let mut cost = Lines::default();
    for row in results.of(Kind::Scaling) {
        let series = match text(row, "driver") {
            "processes" => format!("{}, processes", text(row, "provider")),
            _ => text(row, "provider").into(),
        };
        cost.add(series, figure(row, "attention"), figure(row, "cpu_us_per_transfer"));
    }
    let labels = ["instances of each side", "µs of CPU"];
    cost.plot(plots, "scaling", "CPU time of a request with its reply", Scale::Linear, labels);
}

fn model(results: &Results, plots: &mut Vec<Plot>) {
    let bar = |label: String, name: &str, value: f64| Bar { label, pieces: vec![(name.into(), value)] };
    let shares: Vec<_> = results
        .of(Kind::Product)
        .map(|row| {
            let label = format!("{}, {}", text(row, "layer"), text(row, "weights"));
            bar(label, "share of the peak", 100.0 * figure(row, "ratio"))
        })
        .collect();
    if !shares.is_empty() {
        let svg = stack("Products of an expert's batch", "%", &shares, Some((100.0, "the processor's peak")));
        plots.push(Plot { name: "model-products".into(), svg });
    }
    let mut rates = Vec::new();
    for row in results.of(Kind::Decoding) {
        let batch = show(&row["batch"]);
        rates.push(bar(format!("ours, {}, {batch}", text(row, "dtype")), "ours", figure(row, "tokens_per_s")));
        for peer in row["peers"].as_array().into_iter().flatten() {
            let name = text(peer, "peer");
            rates.push(bar(format!("{name}, {}, {batch}", text(peer, "dtype")), name, figure(peer, "tokens_per_s")));
        }
    }
    if !rates.is_empty() {
        let svg = stack("Decoding on the CPU, sequences at once", "tokens/s", &rates, None);
        plots.push(Plot { name: "model-decoding".into(), svg });
    }
}

/// The first layers of a pipeline with these stages: who computes which microbatch when.
fn schedule(row: &Value) -> String {
    const LAYERS: usize = 4;
    let [attention, ffn, wire] = ["attention_us", "ffn_us", "wire_us"].map(|key| figure(row, key));
    let count = row["microbatches"].as_u64().unwrap_or(1).clamp(1, 8) as usize;
    let (mut ready, mut spans) = (vec![0.0_f64; count], Vec::new());
    let (mut attention_free, mut ffn_free) = (0.0_f64, 0.0_f64);
    for _ in 0..LAYERS {
        for (of, ready) in ready.iter_mut().enumerate() {
            let mut span = |row, from, to| spans.push(Span { row, from, to, of });
            let sent = attention_free.max(*ready) + attention;
            span(0, sent - attention, sent);
            attention_free = sent;
            let served = ffn_free.max(sent + wire / 2.0) + ffn;
            span(1, sent, sent + wire / 2.0);
            span(2, served - ffn, served);
            ffn_free = served;
            *ready = served + wire / 2.0;
            span(3, served, *ready);
        }
    }
    let names: Vec<_> = (0..count).map(|index| format!("microbatch {index}")).collect();
    let title = format!("{LAYERS} layers of {} + {} + {} µs, ideal", number(attention), number(wire), number(ffn));
    gantt(&title, "µs", &["attention", "A2F", "FFN", "F2A"], &names, &spans)
}

/// Every suite, and what its results hold.
fn suites(results: &Results) -> impl Iterator<Item = (Kind, Vec<&String>)> {
    KINDS.into_iter().filter_map(|wanted| {
        let mut columns: Vec<&String> = Vec::new();
        for key in results.of(wanted).filter_map(Value::as_object).flat_map(|row| row.keys()) {
            if !columns.contains(&key) {
                columns.push(key);
            }
        }
        (!columns.is_empty()).then_some((wanted, columns))
    })
}

/// A table for each suite in the file, for a terminal: the plain figures only.
pub(super) fn plain(results: &Results) -> String {
    let mut out = format!("{}\n{}\n{}\n", results.name, results.machine_line(), results.command);
    for (wanted, columns) in suites(results) {
        let is_plain = |column: &&&String| {
            results.of(wanted).all(|row| !matches!(row.get(column.as_str()), Some(Value::Object(_) | Value::Array(_))))
        };
        let columns: Vec<_> = columns.iter().filter(is_plain).collect();
        let rows = results.of(wanted).map(|row| {
            columns.iter().map(|column| row.get(column.as_str()).map_or_else(String::new, show)).collect::<Vec<_>>()
        });
        let head = columns.iter().map(|column| (**column).clone()).collect::<Vec<_>>();
        let cells: Vec<_> = std::iter::once(head).chain(rows).collect();
        let width = |index: usize| cells.iter().map(|row| row[index].chars().count()).max().unwrap_or(0);
        for row in &cells {
            let padded = row.iter().enumerate().map(|(index, cell)| format!("{cell:>width$}", width = width(index)));
            let _ = writeln!(out, "{}", padded.collect::<Vec<_>>().join("  "));
        }
    }
    out
}

/// A table for each suite in the file.
pub(super) fn table(results: &Results) -> String {
    let mut html = String::new();
    for (wanted, columns) in suites(results) {
        html.push_str("<table><tr>");
        for column in &columns {
            let _ = write!(html, "<th>{}</th>", escape(column));
        }
        html.push_str("</tr>\n");
        for row in results.of(wanted) {
            let cell = |column: &&String| row.get(column.as_str()).map_or_else(String::new, show);
            html.push_str("<tr>");
            for column in &columns {
                let _ = write!(html, "<td>{}</td>", escape(&cell(column)));
            }
            html.push_str("</tr>\n");
        }
        html.push_str("</table>\n");
    }
    html
}
