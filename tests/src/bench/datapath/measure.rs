//! One measurement of one system.

use std::time::Duration;

use anyhow::Result;

use super::metric::{Measurement, Metric};
use crate::{
    topology::Endpoint,
    traffic::rate::{forwarding, highest_rate, request_latency, tcp_streams},
};

/// How long each measurement takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Durations {
    /// In whole seconds.
    tcp: Duration,
    forwarding: Duration,
    /// Of each step of the search.
    datagrams: Duration,
    requests: Duration,
}

impl Durations {
    pub(super) const fn new(quick: bool) -> Self {
        let millis = Duration::from_millis;
        match quick {
            false => Self {
                tcp: millis(2000),
                forwarding: millis(1000),
                datagrams: millis(300),
                requests: millis(1500),
            },
            true => Self {
                tcp: millis(1000),
                forwarding: millis(500),
                datagrams: millis(150),
                requests: millis(500),
            },
        }
    }

    /// About how long a measurement takes, with everything around it.
    pub(super) const fn expected(&self, measurement: Measurement) -> Duration {
        let base = match measurement {
            Measurement::Tcp1 | Measurement::Tcp8 => self.tcp,
            Measurement::Forwarding => self.forwarding.saturating_add(self.forwarding),
            Measurement::Datagrams => self.datagrams.saturating_mul(8),
            Measurement::Requests => self.requests,
        };
        base.saturating_add(Duration::from_millis(200))
    }
}

/// The values of one measurement.
#[derive(Clone, Debug, Default)]
pub(super) struct Measured {
    pub(super) values: Vec<(Metric, f64)>,
    /// Whether nothing was lost, so that the sender or its CPU was the limit.
    pub(super) without_loss: bool,
}

/// Measures once from `a` to `b`.
///
/// # Errors
///
/// When a socket or program fails or nothing arrives.
pub(super) fn measure(
    measurement: Measurement,
    a: Endpoint<'_>,
    b: Endpoint<'_>,
    durations: &Durations,
) -> Result<Measured> {
    let (values, without_loss) = match measurement {
        Measurement::Tcp1 => {
            let stream = tcp_streams(a, b, 1, durations.tcp)?;
            let cpu = stream.cpu_seconds / (stream.bytes / 1e9);
            (vec![(Metric::Tcp1, stream.bits_per_second / 1e9), (Metric::CpuPerGb, cpu)], false)
        }
        Measurement::Tcp8 => {
            (vec![(Metric::Tcp8, tcp_streams(a, b, 8, durations.tcp)?.bits_per_second / 1e9)], false)
        }
        Measurement::Forwarding => {
            let forwarded = forwarding(a, b, durations.forwarding)?;
            let cpu = forwarded.cpu_seconds / (forwarded.received as f64 / 1e6);
            let values = vec![(Metric::Fwd64, forwarded.rate() / 1e3), (Metric::CpuPerMpkt, cpu)];
            (values, forwarded.is_without_loss())
        }
        Measurement::Datagrams => {
            (vec![(Metric::Pps64, highest_rate(a, b, durations.datagrams)? / 1e3)], false)
        }
        Measurement::Requests => {
            let latency = request_latency(a, b, durations.requests)?;
            let micros = |time: Duration| time.as_secs_f64() * 1e6;
            let values =
                [(Metric::RrP50, latency.p50), (Metric::RrP99, latency.p99), (Metric::RrP999, latency.p999)];
            (values.map(|(metric, time)| (metric, micros(time))).into(), false)
        }
    };
    Ok(Measured { values, without_loss })
}
