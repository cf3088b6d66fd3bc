//! The rates of one lane, and their median over rounds.

use std::fmt;

use anyhow::Result;
use serde::Serialize;

use crate::{
    demo::{SMALL_DURATION, TCP_DURATION, TRIP_DURATION},
    topology::Endpoint,
    traffic::rate::{request_latency, small_packets, tcp_throughput},
};

/// Rates of one lane, container to container.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// TCP from A to B in Gbit/s.
    pub tcp_there: f64,
    /// TCP from B to A in Gbit/s.
    pub tcp_back: f64,
    /// Small packets from A to B in thousands per second.
    pub kpps_there: f64,
    /// Small packets from B to A in thousands per second.
    pub kpps_back: f64,
    /// Median time of a request and its answer over TCP in microseconds.
    pub trip: f64,
}

impl Rates {
    /// Measures each rate, one at a time.
    pub fn measure(a: Endpoint<'_>, b: Endpoint<'_>) -> Result<Self> {
        Ok(Self {
            trip: request_latency(a, b, TRIP_DURATION)?.p50.as_secs_f64() * 1e6,
            tcp_there: tcp_throughput(a, b, TCP_DURATION)? / 1e9,
            tcp_back: tcp_throughput(b, a, TCP_DURATION)? / 1e9,
            kpps_there: small_packets(a, b, SMALL_DURATION)? / 1e3,
            kpps_back: small_packets(b, a, SMALL_DURATION)? / 1e3,
        })
    }

    /// The median of each rate by itself; `None` when nothing was measured.
    pub fn median(rounds: &[Self]) -> Option<Self> {
        let of = |rate: fn(&Self) -> f64| {
            let mut values: Vec<f64> = rounds.iter().map(rate).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied()
        };
        Some(Self {
            tcp_there: of(|rates| rates.tcp_there)?,
            tcp_back: of(|rates| rates.tcp_back)?,
            kpps_there: of(|rates| rates.kpps_there)?,
            kpps_back: of(|rates| rates.kpps_back)?,
            trip: of(|rates| rates.trip)?,
        })
    }

    /// TCP throughput of both directions as a multiple of `other`'s.
    pub fn tcp_ratio(&self, other: &Self) -> f64 {
        (self.tcp_there + self.tcp_back) / (other.tcp_there + other.tcp_back)
    }

    /// Small packets of both directions as a multiple of `other`'s.
    pub fn kpps_ratio(&self, other: &Self) -> f64 {
        (self.kpps_there + self.kpps_back) / (other.kpps_there + other.kpps_back)
    }
}

impl fmt::Display for Rates {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tcp_there, tcp_back, kpps_there, kpps_back, trip } = self;
        write!(
            formatter,
            "TCP {tcp_there:.1} and {tcp_back:.1} Gbit/s, {kpps_there:.0} and {kpps_back:.0} kpps, {trip:.1} us"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(value: f64) -> Rates {
        Rates { tcp_there: value, tcp_back: value, kpps_there: value, kpps_back: value, trip: value }
    }

    #[test]
    fn one_bad_round_does_not_move_the_median() {
        assert_eq!(Rates::median(&[rates(9.0), rates(0.1), rates(10.0)]), Some(rates(9.0)));
        assert_eq!(Rates::median(&[]), None);
    }

    #[test]
    fn ratios_are_over_both_directions() {
        let uneven = Rates { tcp_there: 1.0, tcp_back: 3.0, ..rates(4.0) };
        assert_eq!(uneven.tcp_ratio(&rates(1.0)), 2.0);
        assert_eq!(uneven.kpps_ratio(&rates(1.0)), 4.0);
    }
}
