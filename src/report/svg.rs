//! Plots as inline SVG: coordinates and text only. Colours are the page's, by class, so that they
//! follow light and dark; series differ by dash and mark as well, for print in grey.

use std::fmt::Write;

/// Drawn width; the page scales it.
const WIDTH: f64 = 440.0;
const HEIGHT: f64 = 250.0;
/// Left, right, top, bottom of the plot area.
const MARGIN: (f64, f64, f64, f64) = (56.0, 12.0, 30.0, 40.0);
/// Mean width of a letter of the labels.
const LETTER: f64 = 6.2;
/// Classes of series, in order.
const CLASSES: [&str; 4] = ["a", "b", "c", "d"];

/// One line or cloud of points.
#[derive(Debug, Clone, Default)]
pub struct Series {
    /// For the legend; empty: not in it.
    pub label: String,
    /// In data coordinates.
    pub points: Vec<(f64, f64)>,
    /// x, low and high of an interval around the line.
    pub band: Vec<(f64, f64, f64)>,
    /// Which of the page's series colours, 0 to 3.
    pub class: usize,
    /// Mark every point.
    pub marks: bool,
    /// Join the points.
    pub line: bool,
    /// One of many: thin and faint.
    pub faint: bool,
}

/// An axis.
#[derive(Debug, Clone)]
pub struct Axis {
    /// Quantity and unit.
    pub label: String,
    /// Values that must be on it.
    pub include: Vec<f64>,
    /// Values are decimal logarithms: ticks at whole powers.
    pub log: bool,
}

impl Axis {
    /// A linear axis.
    pub fn linear(label: &str, include: &[f64]) -> Self {
        Self {
            label: label.to_owned(),
            include: include.to_vec(),
            log: false,
        }
    }

    /// Of decimal logarithms.
    pub fn log(label: &str) -> Self {
        Self {
            label: label.to_owned(),
            include: Vec::new(),
            log: true,
        }
    }

    /// Range and ticks for `values`.
    fn scale(&self, values: impl Iterator<Item = f64>) -> (f64, f64, Vec<(f64, String)>) {
        let all = values.chain(self.include.iter().copied());
        let (mut low, mut high) = all
            .filter(|v| v.is_finite())
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
                (l.min(v), h.max(v))
            });
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        if self.log {
            (low, high) = (low.floor(), high.ceil());
        }
        if high - low < 1e-12 {
            high = low + 1.0;
        }
        let step = nice((high - low) / 4.0).max(if self.log { 1.0 } else { 0.0 });
        // To whole steps, or the outermost ticks would stand inside.
        (low, high) = (
            (low / step + 1e-9).floor() * step,
            (high / step - 1e-9).ceil() * step,
        );
        let n = ((high - low) / step).round() as usize;
        let ticks = (0..=n).map(|i| {
            let v = low + i as f64 * step;
            let text = match self.log {
                true => format!("1e{v:.0}"),
                false => tick(v, step),
            };
            (v, text)
        });
        (low, high, ticks.collect())
    }
}

/// The next of 1, 2, 5 times a power of ten.
fn nice(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let times = [1.0, 2.0, 5.0, 10.0];
    let fits = times.iter().find(|&&t| t * power >= step * 0.999);
    fits.unwrap_or(&10.0) * power
}

fn tick(v: f64, step: f64) -> String {
    let digits = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
    let v = if v.abs() < step / 1e3 { 0.0 } else { v };
    format!("{v:.digits$}")
}

/// Text made safe for XML.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Not allowed in XML at all.
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

fn open(title: &str, height: f64) -> String {
    let title = escape(title);
    format!(
        "<svg class=\"plot\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\"><title>{title}</title>"
    )
}

fn text(out: &mut String, (x, y): (f64, f64), class: &str, anchor: &str, words: &str) {
    let words = escape(words);
    write!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\" text-anchor=\"{anchor}\">{words}</text>"
    )
    .expect("strings take all text");
}

fn line(out: &mut String, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    write!(
        out,
        "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
    )
    .expect("strings take all text");
}

/// Marks differ in shape from class to class.
fn mark(out: &mut String, class: usize, (x, y): (f64, f64)) {
    let name = CLASSES[class % CLASSES.len()];
    let drawn = match class % CLASSES.len() {
        0 => write!(
            out,
            "<circle class=\"m {name}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>"
        ),
        1 => write!(
            out,
            "<rect class=\"m {name}\" x=\"{:.1}\" y=\"{:.1}\" width=\"5.6\" height=\"5.6\"/>",
            x - 2.8,
            y - 2.8
        ),
        _ => write!(
            out,
            "<path class=\"m {name}\" d=\"M{x:.1} {:.1}l3.6 3.6l-3.6 3.6l-3.6 -3.6z\"/>",
            y - 3.6
        ),
    };
    drawn.expect("strings take all text");
}

/// Series over x, with horizontal `rules` (value, label).
pub fn lines(
    title: &str,
    x_axis: &Axis,
    y_axis: &Axis,
    series: &[Series],
    rules: &[(f64, &str)],
) -> String {
    let (left, right, top, bottom) = MARGIN;
    let points = || series.iter().flat_map(|s| &s.points);
    let bands = || series.iter().flat_map(|s| &s.band);
    let (x0, x1, x_ticks) = x_axis.scale(points().map(|p| p.0));
    let ys = points().map(|p| p.1);
    let ys = ys.chain(bands().flat_map(|b| [b.1, b.2]));
    let (y0, y1, y_ticks) = y_axis.scale(ys.chain(rules.iter().map(|r| r.0)));
    let x = |v: f64| left + (v - x0) / (x1 - x0) * (WIDTH - left - right);
    let y = |v: f64| HEIGHT - bottom - (v - y0) / (y1 - y0) * (HEIGHT - top - bottom);
    let mut out = open(title, HEIGHT);
    for (v, label) in &y_ticks {
        line(&mut out, "grid", (left, y(*v)), (WIDTH - right, y(*v)));
        text(&mut out, (left - 6.0, y(*v) + 4.0), "t", "end", label);
    }
    for (v, label) in &x_ticks {
        line(&mut out, "tick", (x(*v), y(y0)), (x(*v), y(y0) + 4.0));
        text(&mut out, (x(*v), y(y0) + 16.0), "t", "middle", label);
    }
    line(&mut out, "axis", (left, y(y0)), (WIDTH - right, y(y0)));
    let middle = (left + WIDTH - right) / 2.0;
    text(
        &mut out,
        (middle, HEIGHT - 6.0),
        "t",
        "middle",
        &x_axis.label,
    );
    let label = escape(&y_axis.label);
    let y_middle = (top + HEIGHT - bottom) / 2.0;
    write!(
        out,
        "<text class=\"t\" text-anchor=\"middle\" transform=\"translate(13 {y_middle:.1}) rotate(-90)\">{label}</text>"
    )
    .expect("strings take all text");
    for s in series {
        let name = CLASSES[s.class % CLASSES.len()];
        if s.band.len() > 1 {
            let up = s.band.iter().map(|b| (b.0, b.2));
            let down = s.band.iter().rev().map(|b| (b.0, b.1));
            let corners: Vec<String> = up
                .chain(down)
                .map(|(a, b)| format!("{:.1},{:.1}", x(a), y(b)))
                .collect();
            write!(
                out,
                "<polygon class=\"band {name}\" points=\"{}\"/>",
                corners.join(" ")
            )
            .expect("strings take all text");
        }
        let finite = s
            .points
            .iter()
            .filter(|p| p.0.is_finite() && p.1.is_finite());
        let at: Vec<(f64, f64)> = finite.map(|p| (x(p.0), y(p.1))).collect();
        if s.line {
            let corners: Vec<String> = at.iter().map(|(a, b)| format!("{a:.1},{b:.1}")).collect();
            let faint = if s.faint { " faint" } else { "" };
            write!(
                out,
                "<polyline class=\"l {name}{faint}\" points=\"{}\"/>",
                corners.join(" ")
            )
            .expect("strings take all text");
        }
        if s.marks {
            at.iter().for_each(|&p| mark(&mut out, s.class, p));
        }
    }
    for (v, label) in rules {
        line(&mut out, "rule", (left, y(*v)), (WIDTH - right, y(*v)));
        // Below the line where there is no room above.
        let above = if y(*v) < top + 14.0 { 13.0 } else { -5.0 };
        text(
            &mut out,
            (left + 4.0, y(*v) + above),
            "t halo",
            "start",
            label,
        );
    }
    legend(&mut out, series);
    out + "</svg>"
}

fn legend(out: &mut String, series: &[Series]) {
    let mut x = MARGIN.0;
    let named = series.iter().filter(|s| !s.label.is_empty());
    for s in named {
        let name = CLASSES[s.class % CLASSES.len()];
        if s.line {
            line(out, &format!("l {name}"), (x, 12.0), (x + 18.0, 12.0));
        }
        if s.marks {
            mark(out, s.class, (x + 9.0, 12.0));
        }
        text(out, (x + 23.0, 16.0), "t", "start", &s.label);
        x += 37.0 + LETTER * s.label.chars().count() as f64;
    }
}

/// A row of [`intervals`]: label, mean, low, high; a heading without numbers.
#[derive(Debug, Clone)]
pub struct Row {
    /// At the left.
    pub label: String,
    /// Mean, low, high.
    pub value: Option<(f64, f64, f64)>,
    /// Which of the page's series colours.
    pub class: usize,
}

/// Means with their intervals, one per row, between 0 and 1.
pub fn intervals(title: &str, axis: &str, rows: &[Row]) -> String {
    const LABELS: f64 = 158.0;
    const LINE: f64 = 20.0;
    let height = rows.len() as f64 * LINE + 46.0;
    let bottom = height - 36.0;
    let x = |v: f64| LABELS + v.clamp(0.0, 1.0) * (WIDTH - LABELS - 16.0);
    let mut out = open(title, height);
    for i in 0..=4 {
        let v = f64::from(i) / 4.0;
        line(&mut out, "grid", (x(v), 4.0), (x(v), bottom));
        text(
            &mut out,
            (x(v), bottom + 14.0),
            "t",
            "middle",
            &tick(v, 0.05),
        );
    }
    text(&mut out, (x(0.5), height - 4.0), "t", "middle", axis);
    for (i, row) in rows.iter().enumerate() {
        let y = 14.0 + i as f64 * LINE;
        let Some((mean, low, high)) = row.value else {
            text(&mut out, (4.0, y + 4.0), "t strong", "start", &row.label);
            continue;
        };
        text(
            &mut out,
            (14.0, y + 4.0),
            "t",
            "start",
            &shorten(&row.label, 22),
        );
        let name = CLASSES[row.class % CLASSES.len()];
        line(&mut out, &format!("w {name}"), (x(low), y), (x(high), y));
        mark(&mut out, row.class, (x(mean), y));
    }
    out + "</svg>"
}

/// At most `most` characters, the middle left out.
fn shorten(label: &str, most: usize) -> String {
    let n = label.chars().count();
    if n <= most {
        return label.to_owned();
    }
    let (head, tail) = (most / 2, most - most / 2 - 1);
    let start: String = label.chars().take(head).collect();
    let end: String = label.chars().skip(n - tail).collect();
    format!("{start}…{end}")
}

/// Values by row and column as shades; `cells`: (row, column, value, words for a tooltip).
pub fn heat(
    title: &str,
    (rows, row_names): (&str, &[String]),
    (columns, n_columns): (&str, usize),
    cells: &[(usize, usize, f64, String)],
    legend: &str,
) -> String {
    const LABELS: f64 = 92.0;
    const LINE: f64 = 20.0;
    let height = row_names.len() as f64 * LINE + 74.0;
    let width = (WIDTH - LABELS - 8.0) / n_columns.max(1) as f64;
    let most = cells.iter().map(|c| c.2).fold(0.0, f64::max);
    let mut out = open(title, height);
    text(&mut out, (4.0, 12.0), "t", "start", rows);
    for (i, name) in row_names.iter().enumerate() {
        let y = 34.0 + i as f64 * LINE;
        text(&mut out, (LABELS - 6.0, y), "t", "end", &shorten(name, 14));
    }
    for (row, column, value, words) in cells {
        let share = if most > 0.0 { value / most } else { 0.0 };
        write!(
            out,
            "<rect class=\"cell\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill-opacity=\"{:.3}\"><title>{}</title></rect>",
            LABELS + *column as f64 * width,
            20.0 + *row as f64 * LINE,
            (width - 1.0).max(0.5),
            LINE - 1.0,
            0.04 + 0.96 * share,
            escape(words)
        )
        .expect("strings take all text");
    }
    let y = 34.0 + row_names.len() as f64 * LINE;
    let every = n_columns.div_ceil(10).max(1);
    for column in (0..n_columns).step_by(every) {
        let x = LABELS + (column as f64 + 0.5) * width;
        text(&mut out, (x, y), "t", "middle", &column.to_string());
    }
    let middle = (LABELS + WIDTH) / 2.0;
    text(&mut out, (middle, y + 16.0), "t", "middle", columns);
    text(&mut out, (middle, y + 34.0), "t", "middle", legend);
    out + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        let (low, high, ticks) = Axis::linear("x", &[0.0]).scale([0.03, 0.97].into_iter());
        assert!(low <= 0.0 && high >= 0.97);
        let words: Vec<&str> = ticks.iter().map(|t| t.1.as_str()).collect();
        assert_eq!(words, ["0.0", "0.5", "1.0"]);
        let (low, high, ticks) = Axis::log("x").scale([-6.4, -3.2].into_iter());
        assert_eq!((low, high), (-7.0, -3.0));
        assert_eq!(ticks[0].1, "1e-7");
        // No value, one value and no finite value still give an axis.
        for values in [vec![], vec![2.0], vec![f64::NAN]] {
            let (low, high, ticks) = Axis::linear("x", &[]).scale(values.into_iter());
            assert!(low < high && ticks.len() > 1);
        }
    }

    #[test]
    fn labels_are_escaped_and_every_plot_is_closed() {
        let hostile = "</svg><script>alert('x')</script>&\u{1}";
        let s = Series {
            label: hostile.into(),
            points: vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0)],
            line: true,
            marks: true,
            ..Series::default()
        };
        let axis = Axis::linear(hostile, &[]);
        let row = Row {
            label: hostile.into(),
            value: Some((0.5, 0.4, 2.0)),
            class: 1,
        };
        for svg in [
            lines(hostile, &axis, &axis, &[s], &[(2.0, hostile)]),
            intervals(hostile, hostile, &[row]),
            heat(
                hostile,
                (hostile, &[hostile.to_owned()]),
                (hostile, 1),
                &[(0, 0, 1.0, hostile.to_owned())],
                hostile,
            ),
        ] {
            assert!(!svg.contains("<script") && !svg.contains('\u{1}'), "{svg}");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert_eq!(svg.matches("</svg>").count(), 1);
            assert!(svg.ends_with("</svg>"));
        }
    }
}
