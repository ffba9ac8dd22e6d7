//! Numbers and words as the page shows them.

use minijinja::{Environment, Value};

/// Register the page's filters.
pub fn register(env: &mut Environment<'_>) {
    env.add_filter("num", num);
    env.add_filter("mean", mean);
    env.add_filter("range", range);
    env.add_filter("percent", percent);
    env.add_filter("sci", sci);
    env.add_filter("bytes", bytes);
    env.add_filter("words", |s: String| s.replace('_', " "));
}

/// Four significant decimals, powers of ten where those would hide the value.
pub fn number(v: f64) -> String {
    match v.abs() {
        0.0 => "0".into(),
        a if !(1e-3..1e6).contains(&a) => format!("{v:.2e}"),
        a if a < 100.0 => {
            let text = format!("{v:.4}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        _ => format!("{v:.0}"),
    }
}

fn num(v: Value) -> String {
    f64::try_from(v).map_or_else(|_| "–".into(), number)
}

fn field(v: &Value, name: &str) -> Option<f64> {
    f64::try_from(v.get_attr(name).ok()?).ok()
}

/// Of a `Mean`: "0.4403 [0.31, 0.57]".
fn mean(v: Value) -> String {
    let Some(m) = field(&v, "mean") else {
        return "–".into();
    };
    let interval = v.get_attr("interval").map(range).unwrap_or_default();
    format!("{m:.4} {interval}")
}

/// Of an `Interval`.
fn range(v: Value) -> String {
    match (field(&v, "low"), field(&v, "high")) {
        (Some(low), Some(high)) => format!("[{low:.3}, {high:.3}]"),
        _ => String::new(),
    }
}

fn percent(v: Value) -> String {
    f64::try_from(v).map_or_else(|_| "–".into(), |v| format!("{:.2} %", 100.0 * v))
}

fn sci(v: Value) -> String {
    f64::try_from(v).map_or_else(|_| "–".into(), |v| format!("{v:.1e}"))
}

fn bytes(v: Value) -> String {
    let n = f64::try_from(v).unwrap_or(0.0);
    match n {
        n if n < 1e6 => format!("{:.1} kB", n / 1e3),
        n if n < 1e9 => format!("{:.1} MB", n / 1e6),
        n => format!("{:.2} GB", n / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_what_matters() {
        for (v, text) in [
            (0.0, "0"),
            (0.4403, "0.4403"),
            (1.0, "1"),
            (0.5, "0.5"),
            (3.2e-7, "3.20e-7"),
            (1234.0, "1234"),
        ] {
            assert_eq!(number(v), text);
        }
        assert_eq!(num(Value::from(())), "–");
    }
}
