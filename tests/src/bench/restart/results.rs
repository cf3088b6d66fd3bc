//! Sums over rounds, and whether they are what they have to be.

use std::time::Duration;

use serde::Serialize;

use super::event::Event;
use crate::{
    agent::Rung,
    table::{Row as TableRow, render},
    traffic::numbered::Numbered,
};

/// One event on one rung, in all rounds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Row {
    event: &'static str,
    rung: &'static str,
    sent: u64,
    lost: u64,
    reordered: u64,
    outage_ms: f64,
    /// Whether none may be lost or reordered.
    #[serde(skip)]
    has_bar: bool,
}

impl Row {
    /// A row without rounds.
    pub(super) fn new(event: Event, rung: Rung) -> Self {
        Self {
            event: event.name(),
            rung: rung.name(),
            sent: 0,
            lost: 0,
            reordered: 0,
            outage_ms: 0.0,
            has_bar: event.has_bar(rung),
        }
    }

    /// Adds the flows of a round.
    pub(super) fn add(&mut self, flows: &[Numbered]) {
        for flow in flows {
            self.sent += flow.sent + flow.refused;
            self.lost += flow.lost();
            self.reordered += flow.reordered;
            self.outage_ms = self.outage_ms.max(milliseconds(flow.outage));
        }
    }

    fn is_met(&self) -> bool {
        !self.has_bar || (self.sent > 0 && self.lost == 0 && self.reordered == 0)
    }

    fn cells(&self) -> TableRow {
        let verdict = match (self.has_bar, self.is_met()) {
            (false, _) => "",
            (true, true) => "ok",
            (true, false) => "missed",
        };
        let numbers = [self.sent, self.lost, self.reordered].map(|number| number.to_string());
        let [sent, lost, reordered] = numbers;
        let outage = format!("{:.1}", self.outage_ms);
        let (event, rung) = (self.event.to_owned(), self.rung.to_owned());
        TableRow { cells: vec![event, rung, sent, lost, reordered, outage, verdict.to_owned()] }
    }
}

/// To the microsecond.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// The table of all rows, and how many of those with a bar there are, and how many of these miss it.
pub(super) fn summary(rows: &[Row]) -> (String, usize, usize) {
    let cells: Vec<_> = rows.iter().map(Row::cells).collect();
    let titles = ["event", "rung", "sent", "lost", "reordered", "outage ms", "0 lost, 0 reordered"];
    let bars = rows.iter().filter(|row| row.has_bar).count();
    (render(&titles, &cells), bars, rows.iter().filter(|row| !row.is_met()).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(sent: u64, received: u64, outage_ms: u64) -> Numbered {
        Numbered { sent, received, outage: Duration::from_millis(outage_ms), ..Numbered::default() }
    }

    #[test]
    fn rounds_are_added_and_the_longest_outage_counts() {
        let mut row = Row::new(Event::Kill, Rung::Tun);
        row.add(&[flow(100, 100, 3), flow(100, 90, 21)]);
        row.add(&[flow(50, 50, 2), Numbered { refused: 5, reordered: 1, ..flow(50, 50, 0) }]);
        let json = serde_json::to_value(&row).unwrap();
        let expected = serde_json::json!({
            "event": "kill", "rung": "tun", "sent": 305, "lost": 15, "reordered": 1, "outage_ms": 21.0
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn loss_and_order_have_a_bar_where_no_process_is_needed() {
        let mut rows = [Rung::Tc, Rung::Tun].map(|rung| Row::new(Event::Kill, rung));
        rows.iter_mut().for_each(|row| row.add(&[flow(10, 9, 1)]));
        let (text, bars, missed) = summary(&rows);
        assert_eq!((bars, missed), (1, 1), "{text}");
        let mut planned = Row::new(Event::Restart, Rung::Tun);
        // A row without traffic is no success.
        assert!(!planned.is_met());
        planned.add(&[flow(10, 10, 1)]);
        assert!(planned.is_met());
        planned.add(&[Numbered { reordered: 1, ..flow(10, 10, 1) }]);
        assert!(!planned.is_met());
    }
}
