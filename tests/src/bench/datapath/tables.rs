//! The tables on the terminal: medians, and ratios to the baselines.

use super::{
    metric::Metric,
    results::{Cell, Results},
    selection::Selection,
    system::System,
};
use crate::{
    table::{Row, render},
    topology::Underlay,
};

/// A value with three digits, more where there are more before the point.
pub(super) fn digits(value: f64) -> String {
    let decimals = match value {
        value if value >= 100.0 => 0,
        value if value >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

/// The tables of one underlay: the medians, then the ratios to each baseline.
pub(super) fn tables(results: &Results, selection: &Selection, underlay: Underlay) -> String {
    let title = |metric: &Metric| format!("{metric}\n{}", metric.unit());
    let corner = format!("{}\nmedian", underlay.name());
    let mut text = table(results, selection, underlay, (&corner, &title), &selection.systems, &|cell| {
        Some(cell.spread().map_or_else(|| "failed".to_owned(), |spread| digits(spread.median)))
    });
    for baseline in baselines(selection) {
        let others: Vec<System> =
            selection.systems.iter().copied().filter(|system| *system != baseline).collect();
        let corner = format!("x {baseline}");
        let ratio = |cell: &Cell| results.ratio(cell, baseline).map(|ratio| digits(ratio.median));
        text.push('\n');
        text += &table(results, selection, underlay, (&corner, &Metric::to_string), &others, &ratio);
    }
    text
}

/// The selected systems that others are compared with.
pub(super) fn baselines(selection: &Selection) -> Vec<System> {
    System::BASELINES.into_iter().filter(|baseline| selection.systems.contains(baseline)).collect()
}

fn table(
    results: &Results,
    selection: &Selection,
    underlay: Underlay,
    (corner, title): (&str, &dyn Fn(&Metric) -> String),
    systems: &[System],
    text: &dyn Fn(&Cell) -> Option<String>,
) -> String {
    let mut titles = vec![corner.to_owned()];
    titles.extend(selection.metrics.iter().map(title));
    let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
    let row = |system: &System| {
        let cell = |metric: &Metric| {
            results.get(underlay, *system, *metric).and_then(text).unwrap_or_else(|| "-".to_owned())
        };
        let mut cells = vec![system.name().to_owned()];
        cells.extend(selection.metrics.iter().map(cell));
        Row { cells }
    };
    render(&titles, &systems.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::datapath::results::tests::{TC, sample};

    fn selection() -> Selection {
        let systems = vec![System::ROUTED, System::VXLAN, System::Proxy, TC];
        Selection { metrics: vec![Metric::Tcp1, Metric::RrP50], systems }
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([0.834, 8.456, 15.14, 182.4].map(digits), ["0.83", "8.46", "15.1", "182"]);
    }

    #[test]
    fn tables_show_medians_ratios_and_failures() {
        let text = tables(&sample(), &selection(), Underlay::Virtual);
        let line = |start: &str, nth: usize| {
            let mut lines = text.lines().filter(|line| line.starts_with(&format!("│ {start} ")));
            lines.nth(nth).unwrap().split_whitespace().collect::<String>()
        };
        assert_eq!(line("tc", 0), "│tc┆12.0┆24.8│");
        assert_eq!(line("tc", 1), "│tc┆0.80┆1.10│");
        assert_eq!(line("tc", 2), "│tc┆1.60┆0.82│");
        assert_eq!(line("tc", 3), "│tc┆-┆-│");
        assert_eq!(line("proxy", 0), "│proxy┆failed┆failed│");
        let widths = text.lines().filter(|line| line.starts_with('│')).map(|line| line.chars().count());
        assert!(widths.clone().take(6).all(|width| width == widths.clone().next().unwrap()), "{text}");
    }
}
