//! The metrics, and the measurements that they come from.

use std::fmt;

/// One column of the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Metric {
    Tcp1,
    Tcp8,
    Fwd64,
    Pps64,
    RrP50,
    RrP99,
    RrP999,
    CpuPerGb,
    CpuPerMpkt,
}

/// One run of traffic, which gives one metric or several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Measurement {
    Tcp1,
    Tcp8,
    Forwarding,
    Datagrams,
    Requests,
}

impl Metric {
    pub(super) const ALL: [Self; 9] = [
        Self::Tcp1,
        Self::Tcp8,
        Self::Fwd64,
        Self::Pps64,
        Self::RrP50,
        Self::RrP99,
        Self::RrP999,
        Self::CpuPerGb,
        Self::CpuPerMpkt,
    ];

    /// Name on the command line and in results.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Tcp1 => "tcp1",
            Self::Tcp8 => "tcp8",
            Self::Fwd64 => "fwd64",
            Self::Pps64 => "pps64",
            Self::RrP50 => "rr_p50",
            Self::RrP99 => "rr_p99",
            Self::RrP999 => "rr_p999",
            Self::CpuPerGb => "cpu_per_gb",
            Self::CpuPerMpkt => "cpu_per_mpkt",
        }
    }

    /// Unit of its values.
    pub(super) const fn unit(self) -> &'static str {
        match self {
            Self::Tcp1 | Self::Tcp8 => "Gbit/s",
            Self::Fwd64 | Self::Pps64 => "kpps",
            Self::RrP50 | Self::RrP99 | Self::RrP999 => "us",
            Self::CpuPerGb => "CPU s/GB",
            Self::CpuPerMpkt => "CPU s/Mpkt",
        }
    }

    /// Whether more is better: rates, not times.
    pub(super) const fn more_is_better(self) -> bool {
        match self {
            Self::Tcp1 | Self::Tcp8 | Self::Fwd64 | Self::Pps64 => true,
            Self::RrP50 | Self::RrP99 | Self::RrP999 | Self::CpuPerGb | Self::CpuPerMpkt => false,
        }
    }

    /// Where its values come from.
    pub(super) const fn measurement(self) -> Measurement {
        match self {
            Self::Tcp1 | Self::CpuPerGb => Measurement::Tcp1,
            Self::Tcp8 => Measurement::Tcp8,
            Self::Fwd64 | Self::CpuPerMpkt => Measurement::Forwarding,
            Self::Pps64 => Measurement::Datagrams,
            Self::RrP50 | Self::RrP99 | Self::RrP999 => Measurement::Requests,
        }
    }

    /// How it is measured, for the report.
    pub(super) const fn method(self) -> &'static str {
        match self {
            Self::Tcp1 => "TCP throughput of one stream from pod A to pod B, as iperf3's receiver counts it",
            Self::Tcp8 => "the same with eight streams at once (`iperf3 -P 8`)",
            Self::Fwd64 => {
                "forwarding capacity: pod A's packet socket sends one prebuilt frame with 64 bytes of UDP payload as often as it \
                 can (`sendmmsg`, `PACKET_QDISC_BYPASS`, one flow); counted are the packets received by pod B's device; a path \
                 through user space is measured under overload"
            }
            Self::Pps64 => {
                "datagrams of 64 bytes between two UDP sockets: the highest rate that arrives with at most 1% loss; the full speed \
                 of one sending thread if that arrives, else by bisection with a paced one"
            }
            Self::RrP50 => {
                "median time from a request to its answer, one byte each way over one TCP connection with `TCP_NODELAY`, both ends on \
                 one CPU"
            }
            Self::RrP99 => "its 99th percentile",
            Self::RrP999 => "its 99.9th percentile",
            Self::CpuPerGb => {
                "CPU time of the whole machine (user, nice, system, irq, softirq of `/proc/stat`) during tcp1 for each 1e9 bytes \
                 received, iperf3 and everything else on the machine included"
            }
            Self::CpuPerMpkt => {
                "CPU time of the whole machine during fwd64 for each million packets received, the sender included"
            }
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl Measurement {
    pub(super) const ALL: [Self; 5] =
        [Self::Tcp1, Self::Tcp8, Self::Forwarding, Self::Datagrams, Self::Requests];

    /// Name in lines of progress.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Tcp1 => "tcp1",
            Self::Tcp8 => "tcp8",
            Self::Forwarding => "fwd64",
            Self::Datagrams => "pps64",
            Self::Requests => "rr",
        }
    }
}
