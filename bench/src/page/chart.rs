//! Plots as SVG: lines over logarithmic axes, stacked bars, and bars in time. Text and strokes take the page's colours.

use std::fmt::Write as _;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 190.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 44.0;
const ROW: f64 = 26.0;
/// Told apart by eyes of every kind (Okabe and Ito).
const COLOURS: [&str; 8] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f"];

/// A named line of points.
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// A labelled bar of named pieces.
pub(super) struct Bar {
    pub(super) label: String,
    pub(super) pieces: Vec<(String, f64)>,
}

/// A named piece of a row, from when to when, and what it is of.
pub(super) struct Span {
    pub(super) row: usize,
    pub(super) from: f64,
    pub(super) to: f64,
    pub(super) of: usize,
}

/// Text that cannot be taken for markup.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

fn open(title: &str, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\" role=\"img\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"18\" font-size=\"14\" font-weight=\"bold\">{}</text>\n",
        escape(title)
    )
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escape(text));
}

fn legend(svg: &mut String, names: &[String]) {
    for (index, name) in names.iter().enumerate() {
        let y = TOP + 8.0 + index as f64 * 18.0;
        let x = WIDTH - RIGHT + 14.0;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{:.1}\" width=\"12\" height=\"12\" fill=\"{}\"/>",
            y - 10.0,
            colour(index)
        );
        text(svg, x + 18.0, y, "start", name);
    }
}

/// A number as people write it on an axis.
pub(super) fn number(value: f64) -> String {
    match value {
        value if value >= 1048576.0 && value % 1024.0 == 0.0 => {
            format!("{:.3}", value / 1048576.0).trim_end_matches('0').trim_end_matches('.').to_owned() + " Mi"
        }
        value if value >= 1024.0 && value % 1024.0 == 0.0 => format!("{} Ki", value / 1024.0),
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 1.0 => format!("{value:.3}").trim_end_matches('0').trim_end_matches('.').to_owned(),
        value => format!("{value:.4}").trim_end_matches('0').trim_end_matches('.').to_owned(),
    }
}

/// How both axes of a plot go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    /// By factors.
    Log,
    /// By steps, the upright one from zero.
    Linear,
}

impl Scale {
    fn at(self, value: f64) -> f64 {
        match self {
            Self::Log => value.ln(),
            Self::Linear => value,
        }
    }

    /// Where lines across the plot help, between two values.
    fn ticks(self, low: f64, high: f64) -> Vec<f64> {
        match self {
            Self::Log if high >= 10.0 * low => {
                let decades = low.log10().floor() as i32..=high.log10().ceil() as i32;
                decades.flat_map(|decade| [1.0, 3.0].map(|step| step * 10f64.powi(decade))).collect()
            }
            Self::Log | Self::Linear => {
                let decade = 10f64.powf((high - low).max(f64::MIN_POSITIVE).log10().floor());
                let step = if (high - low) / decade < 3.0 { decade / 2.0 } else { decade };
                (0..=20).map(|count| (low / step).ceil() * step + f64::from(count) * step).collect()
            }
        }
    }
}

/// Lines. Points that have no place on the axes are left out.
pub(super) fn lines(title: &str, scale: Scale, [x_label, y_label]: [&str; 2], series: &[Series]) -> String {
    let shown = |&(x, y): &(f64, f64)| scale.at(x).is_finite() && scale.at(y).is_finite();
    let all: Vec<_> = series.iter().flat_map(|series| series.points.iter().copied().filter(shown)).collect();
    let range = |of: fn(&(f64, f64)) -> f64| {
        all.iter().map(of).fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)))
    };
    let mut svg = open(title, HEIGHT);
    if all.is_empty() {
        return svg + "</svg>\n";
    }
    let ((left, right), (low, high)) = (range(|point| point.0), range(|point| point.1));
    let (low, high) = if scale == Scale::Log { (low / 1.1, high * 1.1) } else { (low.min(0.0), high * 1.05) };
    let share = |value: f64, from: f64, to: f64| {
        let span = scale.at(to) - scale.at(from);
        if span > 0.0 { (scale.at(value) - scale.at(from)) / span } else { 0.5 }
    };
    let px = |x: f64| LEFT + share(x, left, right) * (WIDTH - LEFT - RIGHT);
    let py = |y: f64| HEIGHT - BOTTOM - share(y, low, high) * (HEIGHT - TOP - BOTTOM);
    let mut xs: Vec<f64> = all.iter().map(|point| point.0).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    let mut last = f64::MIN;
    for x in xs {
        // Labels that would run into each other are left out.
        if px(x) - last > 52.0 {
            last = px(x);
            let _ = writeln!(
                svg,
                "<line x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"{TOP}\" y2=\"{1}\" stroke=\"#ddd\"/>",
                last,
                HEIGHT - BOTTOM
            );
            text(&mut svg, last, HEIGHT - BOTTOM + 16.0, "middle", &number(x));
        }
    }
    for y in scale.ticks(low, high).into_iter().filter(|y| (low..=high).contains(y)) {
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#ddd\"/>",
            WIDTH - RIGHT,
            py(y)
        );
        text(&mut svg, LEFT - 8.0, py(y) + 4.0, "end", &number(y));
    }
    text(&mut svg, (LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 8.0, "middle", x_label);
    let middle = (TOP + HEIGHT - BOTTOM) / 2.0;
    let _ = writeln!(
        svg,
        "<text transform=\"translate(16 {middle}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        escape(y_label)
    );
    for (index, series) in series.iter().enumerate() {
        let points: Vec<_> = series.points.iter().filter(|point| shown(point)).map(|&(x, y)| (px(x), py(y))).collect();
        let path: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"/>",
            path.join(" "),
            colour(index)
        );
        for (x, y) in points {
            let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{}\"/>", colour(index));
        }
    }
    legend(&mut svg, &series.iter().map(|series| series.name.clone()).collect::<Vec<_>>());
    svg + "</svg>\n"
}

/// Horizontal bars of pieces that add up, with a line at `limit`.
pub(super) fn stack(title: &str, unit: &str, bars: &[Bar], limit: Option<(f64, &str)>) -> String {
    let mut names: Vec<String> = Vec::new();
    for (name, _) in bars.iter().flat_map(|bar| &bar.pieces) {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    let left = LEFT + 130.0;
    let height = TOP + BOTTOM + (bars.len() as f64 * ROW).max(names.len() as f64 * 18.0);
    let longest = bars.iter().map(|bar| bar.pieces.iter().map(|piece| piece.1).sum::<f64>()).fold(0.0, f64::max);
    let longest = limit.map_or(longest, |(limit, _)| longest.max(limit)).max(f64::MIN_POSITIVE);
    let scale = (WIDTH - left - RIGHT) / longest;
    let mut svg = open(title, height);
    for (row, bar) in bars.iter().enumerate() {
        let y = TOP + row as f64 * ROW;
        text(&mut svg, left - 8.0, y + 15.0, "end", &bar.label);
        let mut x = left;
        for (name, value) in &bar.pieces {
            let index = names.iter().position(|known| known == name).unwrap_or(0);
            let width = value * scale;
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.2}\" y=\"{:.1}\" width=\"{width:.2}\" height=\"18\" fill=\"{}\"><title>{}: {} {unit}</title></rect>",
                y + 2.0,
                colour(index),
                escape(name),
                number(*value)
            );
            x += width;
        }
    }
    let bottom = TOP + bars.len() as f64 * ROW;
    if let Some((limit, name)) = limit {
        let x = left + limit * scale;
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{}\" y2=\"{}\" stroke=\"#c00\" stroke-width=\"2\"/>",
            TOP - 6.0,
            bottom
        );
        text(&mut svg, x, bottom + 16.0, "end", name);
    }
    text(&mut svg, left, bottom + 32.0, "start", &format!("0 to {} {unit}", number(longest)));
    legend(&mut svg, &names);
    svg + "</svg>\n"
}

/// Rows of spans in time, coloured by what they are of.
pub(super) fn gantt(title: &str, unit: &str, rows: &[&str], names: &[String], spans: &[Span]) -> String {
    let height = TOP + BOTTOM + (rows.len() as f64 * ROW).max(names.len() as f64 * 18.0);
    let end = spans.iter().map(|span| span.to).fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - LEFT - RIGHT - 30.0) / end;
    let left = LEFT + 30.0;
    let mut svg = open(title, height);
    for (row, name) in rows.iter().enumerate() {
        text(&mut svg, left - 8.0, TOP + row as f64 * ROW + 15.0, "end", name);
    }
    for span in spans {
        let _ = writeln!(
            svg,
            "<rect x=\"{:.2}\" y=\"{:.1}\" width=\"{:.2}\" height=\"18\" fill=\"{}\" stroke=\"#fff\"/>",
            left + span.from * scale,
            TOP + span.row as f64 * ROW + 2.0,
            (span.to - span.from) * scale,
            colour(span.of)
        );
    }
    text(&mut svg, left, TOP + rows.len() as f64 * ROW + 18.0, "start", &format!("0 to {} {unit}", number(end)));
    legend(&mut svg, names);
    svg + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_drawn_is_left_out_and_nothing_is_taken_for_markup() {
        let series =
            Series { name: "<b>".into(), points: vec![(0.0, 1.0), (8.0, 0.5), (7168.0, f64::NAN), (65536.0, 3.0)] };
        let svg = lines("a & b", Scale::Log, ["bytes", "µs"], &[series]);
        assert!(svg.contains("&lt;b&gt;") && svg.contains("a &amp; b") && !svg.contains("NaN"));
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(!lines("nothing", Scale::Log, ["", ""], &[]).contains("NaN"));
        let one = Series { name: "one".into(), points: vec![(0.0, 5.0)] };
        let svg = lines("a point", Scale::Linear, ["", ""], &[one]);
        assert!(svg.contains("<circle") && !svg.contains("NaN"), "zero has a place on a linear axis");
    }

    #[test]
    fn there_are_a_few_ticks_whatever_the_range() {
        for (scale, low, high) in [
            (Scale::Linear, 0.0, 70_000.0),
            (Scale::Linear, 0.0, 1.2),
            (Scale::Log, 0.3, 120.0),
            (Scale::Log, 38.0, 107.0),
            (Scale::Log, 0.43, 0.52),
        ] {
            let ticks = scale.ticks(low, high).into_iter().filter(|tick| (low..=high).contains(tick)).count();
            assert!((3..=10).contains(&ticks), "{ticks} between {low} and {high}");
        }
    }

    #[test]
    fn numbers_read_well() {
        let numbers = [0.0, 8.0, 7168.0, 1835008.0, 0.12, 300.0, 7410.0].map(number);
        assert_eq!(numbers, ["0", "8", "7 Ki", "1.75 Mi", "0.12", "300", "7410"]);
    }
}
