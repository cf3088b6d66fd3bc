//! The part traffic: each metric of each system in every round, the systems in turn.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use super::{
    bars::{Bar, digits},
    clients,
    scene::Scene,
    servers,
};
use crate::{
    bench::spread::Spread,
    progress::Progress,
    table::{Row as TableRow, render},
};

/// How a client reaches the endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum System {
    /// By its own address, without a service.
    Direct,
    /// By the virtual address, which eBPF programs translate when the client's socket connects.
    Ebpf,
    /// By the virtual address, through the proxy on the client's host.
    Proxy,
}

impl System {
    pub(super) const ALL: [Self; 3] = [Self::Direct, Self::Ebpf, Self::Proxy];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Ebpf => "ebpf",
            Self::Proxy => "proxy",
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Metric {
    Tcp1,
    ConnectP50,
    UdpRrP50,
    HttpRps,
}

impl Metric {
    const ALL: [Self; 4] = [Self::Tcp1, Self::ConnectP50, Self::UdpRrP50, Self::HttpRps];

    const fn name(self) -> &'static str {
        match self {
            Self::Tcp1 => "tcp1",
            Self::ConnectP50 => "connect_p50",
            Self::UdpRrP50 => "udp_rr_p50",
            Self::HttpRps => "http_rps",
        }
    }

    const fn unit(self) -> &'static str {
        match self {
            Self::Tcp1 => "bits/s",
            Self::ConnectP50 | Self::UdpRrP50 => "us",
            Self::HttpRps => "requests/s",
        }
    }

    const fn duration(self) -> Duration {
        Duration::from_millis(match self {
            Self::Tcp1 | Self::HttpRps => 400,
            Self::ConnectP50 => 300,
            Self::UdpRrP50 => 200,
        })
    }

    /// A value for the table, in a unit that is read more easily.
    fn text(self, value: f64) -> String {
        match self {
            Self::Tcp1 => format!("{} Gbit/s", digits(value / 1e9)),
            Self::ConnectP50 | Self::UdpRrP50 => format!("{} us", digits(value)),
            Self::HttpRps => format!("{}/s", digits(value)),
        }
    }

    /// The bar of a system, if it has one.
    fn bar(self, system: System, ratio: Spread) -> Option<Bar> {
        let what = format!("{} {} / direct", system.name(), self.name());
        match (system, self) {
            (System::Ebpf, Self::Tcp1) => Some(Bar::at_least(what, ratio, 0.98)),
            (System::Ebpf, Self::ConnectP50) => Some(Bar::at_most(what, ratio, 1.10)),
            (System::Ebpf, Self::HttpRps) => Some(Bar::at_least(what, ratio, 0.97)),
            (System::Proxy, Self::Tcp1 | Self::HttpRps) => Some(Bar::at_least(what, ratio, 0.5)),
            (System::Proxy, Self::ConnectP50) => Some(Bar::at_most(what, ratio, 2.5)),
            (System::Direct, _) | (_, Self::UdpRrP50) => None,
        }
    }
}

/// Values of one metric in all rounds, for each of [`System::ALL`].
type Rounds = Vec<[f64; 3]>;

/// The results of the part.
pub(super) struct Results(Vec<(Metric, Rounds)>);

/// One row of the JSON output.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    system: &'static str,
    metric: &'static str,
    unit: &'static str,
    median: f64,
    min: f64,
    max: f64,
    vs_direct: f64,
    vs_direct_min: f64,
    vs_direct_max: f64,
}

/// Measures all rounds.
pub(super) fn measure(scene: &Scene, rounds: u32, progress: &Progress) -> Result<Results> {
    let mut results = Vec::new();
    for metric in Metric::ALL {
        // Not counted: connection tracking, neighbours and caches are warm then.
        round(scene, metric, 0)?;
        let values = (0..rounds).map(|number| round(scene, metric, number)).collect::<Result<Rounds>>()?;
        progress.line(&format!("traffic: {} in {rounds} rounds", metric.name()));
        results.push((metric, values));
    }
    scene.leave()?;
    Ok(Results(results))
}

/// Measures each system once, beginning with another one in each round.
fn round(scene: &Scene, metric: Metric, number: u32) -> Result<[f64; 3]> {
    let mut values = [0.0; 3];
    let mut order: Vec<_> = System::ALL.into_iter().zip(&mut values).collect();
    let count = order.len();
    order.rotate_left(number as usize % count);
    if number as usize / count % 2 == 1 {
        order.reverse();
    }
    for (system, value) in order {
        *value = one(scene, metric, system)
            .with_context(|| format!("round {number}: {} by {}", metric.name(), system.name()))?;
    }
    Ok(values)
}

fn one(scene: &Scene, metric: Metric, system: System) -> Result<f64> {
    let duration = metric.duration();
    let (port, measure): (u16, fn(_, _) -> Result<f64>) = match metric {
        Metric::Tcp1 => (servers::STREAM, clients::stream),
        Metric::ConnectP50 => (servers::ECHO, clients::connections),
        Metric::UdpRrP50 => (servers::UDP, clients::datagrams),
        Metric::HttpRps => (servers::HTTP, clients::requests),
    };
    let to = scene.enter(system, port)?;
    scene.client().run(|| measure(to, duration))?
}

impl Results {
    /// Median and range of a system's values, and of their ratios to the direct ones of the same rounds.
    fn spreads(rounds: &Rounds, system: System) -> Option<(Spread, Spread)> {
        let place = System::ALL.iter().position(|other| *other == system)?;
        let values = rounds.iter().filter_map(|round| round.get(place).copied());
        let ratios = rounds.iter().filter_map(|round| Some(round.get(place)? / round.first()?));
        Some((Spread::of(values.collect())?, Spread::of(ratios.collect())?))
    }

    fn all(&self) -> impl Iterator<Item = (Metric, System, Spread, Spread)> {
        self.0.iter().flat_map(|(metric, rounds)| {
            System::ALL.into_iter().filter_map(|system| {
                let (value, ratio) = Self::spreads(rounds, system)?;
                Some((*metric, system, value, ratio))
            })
        })
    }

    /// The rows of the JSON output.
    pub(super) fn rows(&self) -> Vec<Row> {
        let row = |(metric, system, value, ratio): (Metric, System, Spread, Spread)| Row {
            system: system.name(),
            metric: metric.name(),
            unit: metric.unit(),
            median: value.median,
            min: value.min,
            max: value.max,
            vs_direct: ratio.median,
            vs_direct_min: ratio.min,
            vs_direct_max: ratio.max,
        };
        self.all().map(row).collect()
    }

    /// The results beside their bars.
    pub(super) fn bars(&self) -> Vec<Bar> {
        let mut all: Vec<_> = self.all().collect();
        all.sort_by_key(|(_, system, ..)| system.name());
        all.into_iter().filter_map(|(metric, system, _, ratio)| metric.bar(system, ratio)).collect()
    }

    /// The table of medians and ratios.
    pub(super) fn table(&self) -> String {
        let row = |(metric, system, value, ratio): (Metric, System, Spread, Spread)| {
            let (mut median, mut range) = (String::new(), String::new());
            if system != System::Direct {
                median = digits(ratio.median);
                range = format!("{}-{}", digits(ratio.min), digits(ratio.max));
            }
            let name = format!("{} {}", metric.name(), system.name());
            TableRow { cells: vec![name, metric.text(value.median), median, range] }
        };
        let rows: Vec<TableRow> = self.all().map(row).collect();
        render(&["traffic", "median", "x direct", "rounds"], &rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Results {
        // The machine was half as fast in the second round.
        Results(vec![
            (Metric::Tcp1, vec![[20e9, 19.8e9, 8e9], [10e9, 9.9e9, 4e9], [20e9, 19.8e9, 8e9]]),
            (Metric::ConnectP50, vec![[40.0, 42.0, 80.0], [80.0, 84.0, 160.0], [40.0, 42.0, 80.0]]),
        ])
    }

    #[test]
    fn ratios_are_of_one_round_each() {
        let rows = serde_json::to_value(sample().rows()).unwrap();
        assert_eq!(rows[1]["system"], "ebpf");
        assert_eq!((&rows[1]["metric"], &rows[1]["median"]), (&"tcp1".into(), &19.8e9.into()));
        for field in ["vs_direct", "vs_direct_min", "vs_direct_max"] {
            assert!((rows[1][field].as_f64().unwrap() - 0.99).abs() < 1e-9, "{field}");
            assert_eq!(rows[0][field], 1.0);
        }
    }

    #[test]
    fn systems_have_the_bars_of_their_metrics() {
        let (text, missed) = super::super::bars::summary(&sample().bars());
        assert_eq!(missed, 1, "{text}");
        let line = |what: &str| text.lines().find(|line| line.contains(what)).unwrap().to_owned();
        assert!(line("proxy tcp1").contains("missed") && line("ebpf connect_p50").contains("ok"), "{text}");
        assert!(!text.contains("direct tcp1"));
        assert!(sample().table().contains("19.8 Gbit/s"), "{}", sample().table());
    }
}
