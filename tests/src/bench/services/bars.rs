//! What the results have to reach.

use crate::{
    bench::spread::Spread,
    table::{Row, render},
};

/// A result beside its bar.
#[derive(Clone, Debug)]
pub(super) struct Bar {
    what: String,
    value: f64,
    /// Smallest and largest of the rounds, where there are several.
    range: Option<(f64, f64)>,
    limit: Limit,
    unit: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Limit {
    AtLeast(f64),
    AtMost(f64),
    Below(f64),
}

impl Bar {
    fn new(what: impl Into<String>, value: f64, limit: Limit, unit: &'static str) -> Self {
        Self { what: what.into(), value, range: None, limit, unit }
    }

    /// A ratio that must not be smaller.
    pub(super) fn at_least(what: impl Into<String>, spread: Spread, limit: f64) -> Self {
        let range = Some((spread.min, spread.max));
        Self { range, ..Self::new(what, spread.median, Limit::AtLeast(limit), "x") }
    }

    /// A ratio that must not be larger.
    pub(super) fn at_most(what: impl Into<String>, spread: Spread, limit: f64) -> Self {
        let range = Some((spread.min, spread.max));
        Self { range, ..Self::new(what, spread.median, Limit::AtMost(limit), "x") }
    }

    /// A value that must be smaller.
    pub(super) fn below(what: impl Into<String>, value: f64, limit: f64, unit: &'static str) -> Self {
        Self::new(what, value, Limit::Below(limit), unit)
    }

    fn is_met(&self) -> bool {
        match self.limit {
            Limit::AtLeast(limit) => self.value >= limit,
            Limit::AtMost(limit) => self.value <= limit,
            Limit::Below(limit) => self.value < limit,
        }
    }

    fn row(&self) -> Row {
        let text = |value: f64| format!("{} {}", digits(value), self.unit);
        let limit = match self.limit {
            Limit::AtLeast(limit) => format!(">= {}", text(limit)),
            Limit::AtMost(limit) => format!("<= {}", text(limit)),
            Limit::Below(limit) => format!("< {}", text(limit)),
        };
        let range =
            self.range.map_or_else(String::new, |(min, max)| format!("{}-{}", digits(min), digits(max)));
        let verdict = if self.is_met() { "ok" } else { "missed" };
        Row { cells: vec![self.what.clone(), text(self.value), range, limit, verdict.to_owned()] }
    }
}

/// The table of all bars, and how many are missed.
pub(super) fn summary(bars: &[Bar]) -> (String, usize) {
    let rows: Vec<Row> = bars.iter().map(Bar::row).collect();
    let missed = bars.iter().filter(|bar| !bar.is_met()).count();
    (render(&["bar", "result", "rounds", "expected", ""], &rows), missed)
}

/// Three significant digits, for ratios as well as for large numbers.
pub(super) fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        value if value >= 100.0 => 0,
        value if value >= 10.0 => 1,
        value if value >= 0.1 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(median: f64) -> Spread {
        Spread { median, min: 0.5, max: 2.0 }
    }

    #[test]
    fn each_kind_of_bar_has_its_own_edge() {
        assert!(Bar::at_least("tcp1", spread(0.98), 0.98).is_met());
        assert!(!Bar::at_least("tcp1", spread(0.979), 0.98).is_met());
        assert!(Bar::at_most("connect", spread(1.1), 1.1).is_met());
        assert!(!Bar::at_most("connect", spread(1.101), 1.1).is_met());
        assert!(!Bar::below("load", 5.0, 5.0, "s").is_met() && Bar::below("load", 4.9, 5.0, "s").is_met());
        // What could not be measured is no success.
        assert!(!Bar::at_least("tcp1", spread(f64::NAN), 0.98).is_met());
    }

    #[test]
    fn the_table_says_which_bar_is_missed() {
        let bars = [Bar::at_least("tcp1", spread(0.9), 0.98), Bar::below("load", 1.0, 5.0, "s")];
        let (text, missed) = summary(&bars);
        let line = |what: &str| text.lines().find(|line| line.contains(what)).unwrap().to_owned();
        assert!(line("tcp1").contains("missed") && line("load").contains("ok") && missed == 1, "{text}");
        assert!(line("tcp1").contains("0.50-2.00") && line("tcp1").contains(">= 0.98 x"), "{text}");
    }
}
