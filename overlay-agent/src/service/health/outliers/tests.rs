//! Counters of connections, second by second.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::service::health::tests;

/// A network of one service `shop/web`, with endpoints at 10.244.1.0, 10.244.1.1 and so on.
struct Stage {
    outliers: Outliers,
    catalog: Arc<Catalog>,
    outcomes: Outcomes,
    start: Instant,
    second: u64,
}

impl Stage {
    fn new(states: &[&str]) -> Self {
        let (outliers, outcomes) = (Outliers::default(), Outcomes::new());
        Self { outliers, catalog: catalog(states), outcomes, start: Instant::now(), second: 0 }
    }

    /// Connections to an endpoint since the last look.
    fn count(&mut self, number: u8, established: u64, failed: u64) {
        *self.outcomes.entry(target(number)).or_default() += Outcome { established, failed };
    }

    /// A look some seconds after the last one.
    fn look(&mut self, after: u64) -> Vec<News> {
        self.second += after;
        let now = self.start + Duration::from_secs(self.second);
        self.outliers.observe(now, &self.outcomes, &self.catalog)
    }

    /// Failures of an endpoint that make one look.
    fn fail(&mut self, number: u8, failed: u64) -> Vec<News> {
        self.count(number, 0, failed);
        self.look(1)
    }

    fn out(&self) -> Vec<u8> {
        self.outliers.ejected().map(|ejected| ejected.target.1.ip().octets()[3]).collect()
    }
}

fn catalog(states: &[&str]) -> Arc<Catalog> {
    let endpoint = |(number, state): (usize, &&str)| {
        let ip = format!("10.244.1.{number}");
        (format!("shop/web/a/{number}"), format!(r#"{{"overlay_ip":"{ip}","state":"{state}"}}"#))
    };
    let endpoints: Vec<_> = states.iter().enumerate().map(endpoint).collect();
    let endpoints: Vec<_> = endpoints.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    tests::catalog(&[("shop/web", tests::WEB)], &endpoints)
}

fn target(number: u8) -> Target {
    (Protocol::Tcp, SocketAddrV4::new(Ipv4Addr::new(10, 244, 1, number), 80))
}

fn name(number: u8) -> EndpointName {
    format!("shop/web/a/{number}").parse().unwrap()
}

fn ejected(number: u8, seconds: u64) -> Vec<News> {
    let duration = Duration::from_secs(seconds);
    vec![News::Ejected { endpoint: name(number), target: target(number), duration }]
}

fn let_in(number: u8) -> Vec<News> {
    vec![News::LetIn { endpoint: name(number) }]
}

#[test]
fn failures_in_a_row_eject_for_a_time() {
    let mut stage = Stage::new(&["ready", "ready", "ready"]);
    assert_eq!(stage.fail(0, 4), []);
    assert_eq!(stage.fail(0, 1), ejected(0, 30));
    assert!(stage.outliers.is_ejected(&name(0)) && !stage.outliers.is_ejected(&name(1)));
    assert_eq!(stage.outliers.services().len(), 1);
    assert_eq!(stage.look(29), []);
    assert_eq!(stage.look(1), let_in(0));
    assert!(stage.out().is_empty() && stage.outliers.services().is_empty());
    assert_eq!(stage.fail(0, 4), [], "it has another five");
}

#[test]
fn a_connection_between_them_ends_the_row() {
    let mut stage = Stage::new(&["ready", "ready"]);
    for _ in 0..10 {
        assert_eq!(stage.fail(0, 4), []);
        stage.count(0, 1, 100);
        assert_eq!(stage.look(1), [], "all failures of that second may have been before it");
    }
    assert_eq!(stage.fail(0, 5), ejected(0, 30));
}

#[test]
fn ejections_in_a_row_take_longer() {
    let mut stage = Stage::new(&["ready", "ready"]);
    for count in 1..=12 {
        let seconds = (30 * count).min(300);
        assert_eq!(stage.fail(0, 5), ejected(0, seconds));
        assert_eq!(stage.look(seconds), let_in(0));
    }
    // A connection ends the row.
    stage.count(0, 1, 0);
    stage.look(1);
    assert_eq!(stage.fail(0, 5), ejected(0, 30));
    // So does time without an ejection.
    stage.look(30);
    assert_eq!(stage.look(299), []);
    assert_eq!(stage.fail(0, 4), []);
    assert_eq!(stage.fail(0, 1), ejected(0, 30));
}

#[test]
fn half_of_the_endpoints_are_out_but_never_all() {
    for (count, most) in [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (10, 5)] {
        let mut stage = Stage::new(&vec!["ready"; count]);
        for second in 0..10 {
            for number in 0..count {
                stage.count(number as u8, 0, 5);
            }
            stage.look(1);
            assert_eq!(stage.out().len(), most, "{count} endpoints, second {second}");
        }
    }
    // Those that are down or draining are not there.
    let mut stage = Stage::new(&["ready", "down", "draining"]);
    assert_eq!(stage.fail(0, 50), []);
    assert_eq!(stage.fail(1, 50), []);
}

#[test]
fn what_was_full_is_ejected_when_there_is_room_and_it_still_fails() {
    let mut stage = Stage::new(&["ready", "ready"]);
    assert_eq!(stage.fail(0, 5), ejected(0, 30));
    assert_eq!(stage.fail(1, 9), []);
    assert_eq!(stage.look(29), let_in(0), "nothing new about the other one");
    assert_eq!(stage.fail(1, 1), ejected(1, 30));
}

#[test]
fn an_endpoint_that_its_node_has_taken_up_again_is_let_in() {
    let mut stage = Stage::new(&["ready", "ready"]);
    assert_eq!(stage.fail(0, 5), ejected(0, 30));
    stage.catalog = catalog(&["down", "ready"]);
    assert_eq!(stage.look(1), []);
    stage.catalog = catalog(&["ready", "ready"]);
    assert_eq!(stage.look(1), let_in(0));
    assert_eq!(stage.fail(0, 5), ejected(0, 30), "the row has ended");
    stage.catalog = catalog(&["down"]);
    stage.look(1);
    stage.catalog = Arc::default();
    assert_eq!((stage.look(1), stage.out()), (vec![], vec![]));
}

#[test]
fn counters_that_begin_again_count_from_there() {
    let mut stage = Stage::new(&["ready", "ready"]);
    stage.count(0, 7, 100);
    assert_eq!(stage.look(1), []);
    stage.outcomes.clear();
    assert_eq!(stage.fail(0, 4), []);
    assert_eq!(stage.fail(0, 1), ejected(0, 30));
    let mut stage = Stage::new(&["ready", "ready"]);
    stage.fail(0, 3);
    stage.outcomes.clear();
    stage.look(1);
    assert_eq!(stage.fail(0, 4), []);
}

proptest! {
    #[test]
    fn some_endpoint_that_could_serve_is_always_in(
        steps in prop::collection::vec((0u64..40, prop::collection::vec((0u64..3, 0u64..8), 6)), 1..60),
        states in prop::collection::vec(0usize..3, 1..6)
    ) {
        let states: Vec<&str> = states.iter().map(|state| ["ready", "ready", "down"][*state]).collect();
        let ready = states.iter().filter(|state| **state == "ready").count();
        let mut stage = Stage::new(&states);
        for (after, counts) in steps {
            for (number, (established, failed)) in counts.into_iter().enumerate() {
                stage.count(number as u8, established, failed);
            }
            let news = stage.look(after);
            let out = stage.out().len();
            prop_assert!(out == 0 || out < ready && out <= (ready / 2).max(1), "{out} of {ready}: {news:?}");
            for ejected in stage.outliers.ejected() {
                let left = ejected.until.duration_since(stage.start + Duration::from_secs(stage.second));
                prop_assert!(!left.is_zero() && left <= LONGEST);
            }
        }
    }
}
