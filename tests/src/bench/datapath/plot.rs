//! A bar chart as SVG: one bar for each system, with the spread of the rounds.

use std::fmt::Write as _;

use super::{metric::Metric, results::Results, system::System, tables::digits};
use crate::topology::Underlay;

/// Pixels of a chart: the whole width, the part left of the bars, the part right of them.
const WIDTH: f64 = 720.0;
/// See [`WIDTH`].
const LEFT: f64 = 110.0;
/// See [`WIDTH`].
const RIGHT: f64 = 150.0;
/// Pixels above and below the bars.
const TOP: f64 = 40.0;
/// See [`TOP`].
const BOTTOM: f64 = 34.0;
/// Pixels from bar to bar.
const STEP: f64 = 26.0;
/// Pixels of a bar's height.
const BAR: f64 = 16.0;
/// Most intervals of the axis.
const INTERVALS: f64 = 6.0;
/// Colours of the systems without and with the agent.
const BASELINE: &str = "#9aa0a6";
/// See [`BASELINE`].
const AGENT: &str = "#3b78c4";

/// The chart of a metric on one underlay: the median as a bar, smallest and largest value as a line.
pub(super) fn chart(results: &Results, systems: &[System], underlay: Underlay, metric: Metric) -> String {
    let spread = |system: System| results.get(underlay, system, metric).and_then(|cell| cell.spread());
    let largest = systems.iter().filter_map(|system| spread(*system)).map(|spread| spread.max);
    let interval = interval(largest.fold(0.0, f64::max));
    let end = interval
        * (systems.iter().filter_map(|system| spread(*system)))
            .map(|spread| (spread.max / interval).ceil())
            .fold(1.0, f64::max);
    let x = |value: f64| LEFT + value / end * (WIDTH - LEFT - RIGHT);
    let bottom = TOP + STEP * systems.len() as f64;
    let mut svg = Svg::new(bottom + BOTTOM);
    let better = if metric.more_is_better() { "more is better" } else { "less is better" };
    svg.text(
        12.0,
        22.0,
        "start",
        "600",
        &format!("{metric}, {} underlay: {}, {better}", underlay.name(), metric.unit()),
    );
    let mut tick = 0.0;
    while tick <= end * 1.001 {
        svg.line(x(tick), TOP, x(tick), bottom, "#dddddd");
        svg.text(x(tick), bottom + 18.0, "middle", "400", &axis_label(tick));
        tick += interval;
    }
    for (index, system) in systems.iter().enumerate() {
        let top = TOP + STEP * index as f64 + (STEP - BAR) / 2.0;
        let (middle, baseline) = (top + BAR / 2.0, top + BAR - 4.0);
        svg.text(LEFT - 8.0, baseline, "end", "400", system.name());
        let Some(spread) = spread(*system) else {
            svg.text(LEFT + 6.0, baseline, "start", "400", "failed");
            continue;
        };
        let colour = if matches!(system, System::Agent(..)) { AGENT } else { BASELINE };
        svg.bar(x(0.0), top, x(spread.median), colour);
        svg.line(x(spread.min), middle, x(spread.max), middle, "#202124");
        for edge in [spread.min, spread.max] {
            svg.line(x(edge), middle - 4.0, x(edge), middle + 4.0, "#202124");
        }
        let range = format!("{} ({} to {})", digits(spread.median), digits(spread.min), digits(spread.max));
        svg.text(WIDTH - RIGHT + 10.0, baseline, "start", "400", &range);
    }
    svg.finish()
}

/// A distance between the marks of the axis that is easy to read: 1, 2 or 5 times a power of ten.
fn interval(largest: f64) -> f64 {
    if largest <= 0.0 {
        return 1.0;
    }
    let rough = largest / INTERVALS;
    let power = 10f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0];
    power * steps.into_iter().find(|step| step * power >= rough).unwrap_or(10.0)
}

/// A mark's number without digits that say nothing.
fn axis_label(value: f64) -> String {
    format!("{}", (value * 1000.0).round() / 1000.0)
}

/// The text of an SVG document.
struct Svg(String);

impl Svg {
    fn new(height: f64) -> Self {
        let font = "font-family=\"sans-serif\" font-size=\"12\" fill=\"#202124\"";
        let size = format!("width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\"");
        Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" {size} {font}>\n<rect width=\"{WIDTH}\" height=\"{height}\" \
             fill=\"#ffffff\"/>\n"
        ))
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, weight: &str, text: &str) {
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-weight=\"{weight}\">{text}</text>"
        );
    }

    fn line(&mut self, x1: f64, y1: f64, x2: f64, y2: f64, colour: &str) {
        let _ = writeln!(
            self.0,
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>"
        );
    }

    fn bar(&mut self, left: f64, top: f64, right: f64, colour: &str) {
        let width = right - left;
        let _ = writeln!(
            self.0,
            "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>"
        );
    }

    fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::datapath::results::tests::{TC, sample};

    #[test]
    fn marks_are_round_numbers() {
        for (largest, expected) in [(17.0, 5.0), (266.0, 50.0), (0.84, 0.2), (6.0, 1.0), (0.0, 1.0)] {
            assert!((interval(largest) - expected).abs() < 1e-9, "{largest}: {}", interval(largest));
        }
        assert_eq!([0.6000000000000001, 50.0].map(axis_label), ["0.6", "50"]);
    }

    #[test]
    fn bars_are_as_long_as_their_medians() {
        let systems = [System::ROUTED, System::VXLAN, System::Proxy, TC];
        let svg = chart(&sample(), &systems, Underlay::Virtual, Metric::Tcp1);
        let widths: Vec<f64> = svg
            .lines()
            .filter(|line| line.contains(AGENT) || line.contains(BASELINE))
            .filter_map(|line| line.split("width=\"").nth(1)?.split('"').next()?.parse().ok())
            .collect();
        // Medians 15, 7.5 and 12; the proxy failed and has no bar.
        let [routed, vxlan, tc] = widths.as_slice() else { panic!("{svg}") };
        assert!((routed / vxlan - 2.0).abs() < 0.01 && (routed / tc - 1.25).abs() < 0.01, "{widths:?}");
        assert!(svg.contains(">failed<") && svg.contains("12.0 (8.00 to 16.0)"), "{svg}");
    }

    #[test]
    fn nothing_measured_is_drawn_without_bars() {
        let svg = chart(&Results::default(), &[System::ROUTED], Underlay::Wire, Metric::Fwd64);
        assert!(svg.contains(">failed<") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
