//! What `--only` selects: metrics, systems, or both.

use super::{
    metric::{Measurement, Metric},
    system::System,
};

/// One word of `--only`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    Metric(Metric),
    System(System),
}

impl Word {
    /// Parses a name.
    ///
    /// # Errors
    ///
    /// With every name when this one is unknown.
    pub(super) fn parse(name: &str) -> Result<Self, String> {
        let metric = Metric::ALL.into_iter().find(|metric| metric.name() == name).map(Self::Metric);
        let system = || System::ALL.into_iter().find(|system| system.name() == name).map(Self::System);
        metric.or_else(system).ok_or_else(|| {
            format!(
                "`{name}` is neither a metric ({}) nor a system ({})",
                Metric::ALL.map(Metric::name).join(", "),
                System::ALL.map(System::name).join(", ")
            )
        })
    }
}

/// The metrics and systems of a run, in the order of the tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Selection {
    pub(super) metrics: Vec<Metric>,
    pub(super) systems: Vec<System>,
}

impl Selection {
    /// Everything of a kind that no word names. Routed and VXLAN join systems that do not include either, for the ratios.
    pub(super) fn new(words: &[Word]) -> Self {
        let named = |word: Word| words.contains(&word);
        let mut metrics: Vec<Metric> =
            Metric::ALL.into_iter().filter(|metric| named(Word::Metric(*metric))).collect();
        if metrics.is_empty() {
            metrics = Metric::ALL.into();
        }
        let is_chosen = |system: &System| named(Word::System(*system));
        let any = System::ALL.iter().any(is_chosen);
        let needs_baselines = !is_chosen(&System::ROUTED) && !is_chosen(&System::VXLAN);
        let joins = |system: &System| needs_baselines && matches!(system, System::Comparison(_));
        let systems = System::ALL.into_iter().filter(|system| !any || is_chosen(system) || joins(system));
        Self { metrics, systems: systems.collect() }
    }

    /// The measurements that the metrics come from.
    pub(super) fn measurements(&self) -> Vec<Measurement> {
        let needed = |measurement: &Measurement| {
            self.metrics.iter().any(|metric| metric.measurement() == *measurement)
        };
        Measurement::ALL.into_iter().filter(needed).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn select(names: &str) -> Selection {
        let words: Result<Vec<Word>, String> = names.split_terminator(',').map(Word::parse).collect();
        Selection::new(&words.unwrap())
    }

    fn systems(names: &str) -> String {
        select(names).systems.iter().map(|system| system.name()).collect::<Vec<_>>().join(",")
    }

    #[test]
    fn nothing_selects_everything() {
        let all = select("");
        assert_eq!((all.metrics.len(), all.systems.len()), (Metric::ALL.len(), System::ALL.len()));
        assert_eq!(all.measurements(), Measurement::ALL);
    }

    #[test]
    fn metrics_and_systems_mix_in_any_order() {
        let some = select("tc,fwd64,vxlan,tcp1,routed");
        assert_eq!(some.metrics, [Metric::Tcp1, Metric::Fwd64]);
        assert_eq!(systems("tc,fwd64,vxlan,tcp1,routed"), "routed,vxlan,tc");
        assert_eq!(select("rr_p99,cpu_per_gb").measurements(), [Measurement::Tcp1, Measurement::Requests]);
        assert_eq!(select("rr_p99").systems, System::ALL);
    }

    #[test]
    fn baselines_join_other_systems() {
        assert_eq!(systems("xdp+bypass"), "routed,vxlan,xdp+bypass");
        assert_eq!(systems("proxy,tc"), "routed,vxlan,proxy,tc");
        assert_eq!(systems("routed,tc"), "routed,tc");
        assert_eq!(systems("vxlan"), "vxlan");
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        let error = Word::parse("tcp2").unwrap_err();
        for name in ["`tcp2`", "cpu_per_mpkt", "xdp+flows"] {
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> = Metric::ALL.map(Metric::name).into();
        names.extend(System::ALL.map(System::name));
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
