//! The values of all rounds, and their medians and ratios.

use serde::Serialize;

use super::{metric::Metric, system::System};
use crate::{bench::spread::Spread, topology::Underlay};

/// One metric of one system on one underlay.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    pub(super) underlay: Underlay,
    pub(super) system: System,
    pub(super) metric: Metric,
    /// The round and the value.
    values: Vec<(u32, f64)>,
    /// Why a round has no value.
    pub(super) failure: Option<String>,
    /// Rounds in which nothing was lost, so that the sender or its CPU was the limit.
    pub(super) without_loss: u32,
}

impl Cell {
    /// The values of all rounds; `None` when there are none or a round failed.
    pub(super) fn spread(&self) -> Option<Spread> {
        if self.failure.is_some() {
            return None;
        }
        Spread::of(self.values.iter().map(|(_, value)| *value).collect())
    }

    /// Number of values.
    pub(super) const fn rounds(&self) -> usize {
        self.values.len()
    }

    /// The ratios to `baseline` of each round in which both have a value.
    fn ratio(&self, baseline: &Self) -> Option<Spread> {
        if self.failure.is_some() || baseline.failure.is_some() {
            return None;
        }
        let of =
            |round: u32| baseline.values.iter().find(|(other, _)| *other == round).map(|(_, value)| *value);
        let ratio =
            |(round, value): &(u32, f64)| of(*round).filter(|base| *base > 0.0).map(|base| value / base);
        Spread::of(self.values.iter().filter_map(ratio).collect())
    }
}

/// All cells of a run.
#[derive(Clone, Debug, Default)]
pub(super) struct Results {
    pub(super) cells: Vec<Cell>,
}

impl Results {
    fn cell(&mut self, underlay: Underlay, system: System, metric: Metric) -> Option<&mut Cell> {
        let is = |cell: &Cell| (cell.underlay, cell.system, cell.metric) == (underlay, system, metric);
        let index = self.cells.iter().position(is).unwrap_or_else(|| {
            let (values, failure, without_loss) = (Vec::new(), None, 0);
            self.cells.push(Cell { underlay, system, metric, values, failure, without_loss });
            self.cells.len() - 1
        });
        self.cells.get_mut(index)
    }

    /// Adds a value.
    pub(super) fn add(&mut self, underlay: Underlay, system: System, metric: Metric, round: u32, value: f64) {
        if let Some(cell) = self.cell(underlay, system, metric) {
            cell.values.push((round, value));
        }
    }

    /// Notes that nothing was lost in a round.
    pub(super) fn without_loss(&mut self, underlay: Underlay, system: System, metric: Metric) {
        if let Some(cell) = self.cell(underlay, system, metric) {
            cell.without_loss += 1;
        }
    }

    /// Notes why a value is missing.
    pub(super) fn fail(&mut self, underlay: Underlay, system: System, metric: Metric, reason: &str) {
        if let Some(cell) = self.cell(underlay, system, metric) {
            cell.failure.get_or_insert_with(|| reason.to_owned());
        }
    }

    /// One cell.
    pub(super) fn get(&self, underlay: Underlay, system: System, metric: Metric) -> Option<&Cell> {
        self.cells.iter().find(|cell| (cell.underlay, cell.system, cell.metric) == (underlay, system, metric))
    }

    /// The median of the ratios of each round to `baseline`, and their spread.
    pub(super) fn ratio(&self, cell: &Cell, baseline: System) -> Option<Spread> {
        cell.ratio(self.get(cell.underlay, baseline, cell.metric)?)
    }

    /// Every failure: where and why; the metrics of a system that failed for the same reason together.
    pub(super) fn failures(&self) -> Vec<String> {
        let mut failures: Vec<(Underlay, System, &str, Vec<&str>)> = Vec::new();
        for cell in &self.cells {
            let (Some(reason), metric) = (cell.failure.as_deref(), cell.metric.name()) else { continue };
            let is_same = |(underlay, system, other, _): &&mut (_, _, &str, _)| {
                (*underlay, *system, *other) == (cell.underlay, cell.system, reason)
            };
            match failures.iter_mut().find(is_same) {
                Some((.., metrics)) => metrics.push(metric),
                None => failures.push((cell.underlay, cell.system, reason, vec![metric])),
            }
        }
        let line = |(underlay, system, reason, metrics): &(Underlay, System, &str, Vec<&str>)| {
            format!("{} {system} {}: {reason}", underlay.name(), metrics.join(", "))
        };
        failures.iter().map(line).collect()
    }

    /// The rows of `--json`.
    pub(super) fn rows(&self) -> Vec<Row<'_>> {
        self.cells.iter().map(|cell| self.row(cell)).collect()
    }

    fn row<'a>(&self, cell: &'a Cell) -> Row<'a> {
        let vs = |baseline| self.ratio(cell, baseline).map(|ratio| ratio.median);
        let Cell { underlay, system, metric, failure, .. } = cell;
        let spread = cell.spread();
        Row {
            underlay: underlay.name(),
            system: system.name(),
            metric: metric.name(),
            unit: metric.unit(),
            median: spread.map(|spread| spread.median),
            min: spread.map(|spread| spread.min),
            max: spread.map(|spread| spread.max),
            vs_routed: vs(System::ROUTED),
            vs_vxlan: vs(System::VXLAN),
            vs_proxy: vs(System::Proxy),
            error: failure.as_deref(),
        }
    }
}

/// One row of `--json`.
#[derive(Debug, Serialize)]
pub(super) struct Row<'a> {
    underlay: &'static str,
    system: &'static str,
    metric: &'static str,
    unit: &'static str,
    median: Option<f64>,
    min: Option<f64>,
    max: Option<f64>,
    vs_routed: Option<f64>,
    vs_vxlan: Option<f64>,
    vs_proxy: Option<f64>,
    /// Why there are no values.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::agent::Rung;

    pub(in super::super) const TC: System = System::Agent(Rung::Tc, super::super::system::Bypass::Off);
    const VIRTUAL: Underlay = Underlay::Virtual;

    /// Two rounds in which everything was half as fast in the second, and a failed system.
    pub(in super::super) fn sample() -> Results {
        let mut results = Results::default();
        for (round, speed) in [(1, 2.0), (2, 1.0)] {
            results.add(VIRTUAL, System::ROUTED, Metric::Tcp1, round, 10.0 * speed);
            results.add(VIRTUAL, System::VXLAN, Metric::Tcp1, round, 5.0 * speed);
            results.add(VIRTUAL, TC, Metric::Tcp1, round, 8.0 * speed);
            results.add(VIRTUAL, System::ROUTED, Metric::RrP50, round, 30.0 / speed);
            results.add(VIRTUAL, System::VXLAN, Metric::RrP50, round, 40.0 / speed);
            results.add(VIRTUAL, TC, Metric::RrP50, round, 33.0 / speed);
        }
        results.fail(VIRTUAL, System::Proxy, Metric::Tcp1, "no byte arrived");
        results.fail(VIRTUAL, System::Proxy, Metric::Tcp1, "a later reason");
        results.fail(VIRTUAL, System::Proxy, Metric::RrP50, "no byte arrived");
        results
    }

    #[test]
    fn ratios_are_of_one_round_each() {
        let results = sample();
        let cell = results.get(VIRTUAL, TC, Metric::Tcp1).unwrap();
        // The machine's speed differs between rounds, the ratio does not.
        assert_eq!(results.ratio(cell, System::ROUTED), Some(Spread { median: 0.8, min: 0.8, max: 0.8 }));
        assert_eq!(cell.spread(), Some(Spread { median: 12.0, min: 8.0, max: 16.0 }));
        assert_eq!(results.ratio(cell, System::Proxy), None);
        let other = results.get(Underlay::Wire, TC, Metric::Tcp1);
        assert!(other.is_none());
    }

    #[test]
    fn a_round_without_the_baseline_has_no_ratio() {
        let mut results = Results::default();
        for (round, value) in [(1, 10.0), (3, 40.0)] {
            results.add(VIRTUAL, System::ROUTED, Metric::Fwd64, round, value);
        }
        for (round, value) in [(1, 10.0), (2, 10.0), (3, 20.0)] {
            results.add(VIRTUAL, TC, Metric::Fwd64, round, value);
        }
        let cell = results.get(VIRTUAL, TC, Metric::Fwd64).unwrap();
        assert_eq!(results.ratio(cell, System::ROUTED), Some(Spread { median: 0.75, min: 0.5, max: 1.0 }));
    }

    #[test]
    fn rows_have_the_documented_fields() {
        let rows = serde_json::to_value(sample().rows()).unwrap();
        let row = |system: &str, metric: &str| {
            let is = |row: &&serde_json::Value| row["system"] == system && row["metric"] == metric;
            rows.as_array().unwrap().iter().find(is).unwrap().clone()
        };
        let expected = serde_json::json!({
            "underlay": "virtual", "system": "tc", "metric": "tcp1", "unit": "Gbit/s", "median": 12.0, "min": 8.0,
            "max": 16.0, "vs_routed": 0.8, "vs_vxlan": 1.6, "vs_proxy": null,
        });
        assert_eq!(row("tc", "tcp1"), expected);
        let failed = row("proxy", "tcp1");
        assert!(failed["median"].is_null() && failed["error"] == "no byte arrived", "{failed}");
    }

    #[test]
    fn failures_name_the_cells() {
        assert_eq!(sample().failures(), ["virtual proxy tcp1, rr_p50: no byte arrived"]);
    }
}
