//! Logs changed routes and skipped records, with a limit: a record that flaps must not fill the log.

use tokio::time::Instant;
use tracing::{info, warn};

use super::log_window::LogWindow;
use crate::{
    route::RouteChange,
    route_table::{Outcome, Skipped},
};

/// Changes of one kind that are logged one by one. An agent that starts in a large network gets thousands of routes at once.
const LISTED: usize = 5;
/// Most lines of one kind in a window. What exceeds them is counted, and logged as one line when the window has ended.
const LINES: usize = 50;

/// The log of changes; it decides by times that are passed in.
#[derive(Debug, Default)]
pub(super) struct ChangeLog {
    routes: RouteLines,
    skipped: SkippedLines,
}

impl ChangeLog {
    /// Logs what an update of the route table changed.
    pub(super) fn log(&mut self, outcome: &Outcome, now: Instant) {
        self.routes.of(&outcome.changes, now).iter().for_each(|line| info!("{line}"));
        self.skipped.of(&outcome.skipped, now).iter().for_each(|line| warn!("{line}"));
    }

    /// Logs what a window that has ended left out. To be called from time to time.
    pub(super) fn flush(&mut self, now: Instant) {
        self.routes.summary(now).iter().for_each(|line| info!("{line}"));
        self.skipped.summary(now).iter().for_each(|line| warn!("{line}"));
    }
}

/// Lines about routes.
#[derive(Debug, Default)]
struct RouteLines {
    window: LogWindow,
    /// Changes that were not logged.
    left_out: RouteCount,
}

#[derive(Debug, Default)]
struct RouteCount {
    set: usize,
    removed: usize,
}

impl RouteCount {
    fn of(changes: &[RouteChange]) -> Self {
        let removed = changes.iter().filter(|change| matches!(change, RouteChange::Remove(_))).count();
        Self { set: changes.len() - removed, removed }
    }
}

impl RouteLines {
    fn of(&mut self, changes: &[RouteChange], now: Instant) -> Vec<String> {
        let mut lines: Vec<_> = self.summary(now).into_iter().collect();
        let (listed, rest) = changes.split_at(changes.len().min(LISTED));
        for change in listed {
            if !self.window.take_line(LINES) {
                self.leave_out(std::slice::from_ref(change));
                continue;
            }
            lines.push(match change {
                RouteChange::Set(route) => format!("route {} via {}", route.subnet, route.via),
                RouteChange::Remove(subnet) => format!("route {subnet} removed"),
            });
        }
        if !rest.is_empty() && self.window.take_line(LINES) {
            let RouteCount { set, removed } = RouteCount::of(rest);
            lines.push(format!("and {set} more routes, {removed} more removed"));
        } else {
            self.leave_out(rest);
        }
        lines
    }

    fn leave_out(&mut self, changes: &[RouteChange]) {
        let RouteCount { set, removed } = RouteCount::of(changes);
        self.left_out.set += set;
        self.left_out.removed += removed;
    }

    fn summary(&mut self, now: Instant) -> Option<String> {
        let seconds = self.window.renew(now)?;
        let RouteCount { set, removed } = std::mem::take(&mut self.left_out);
        (set + removed > 0).then(|| {
            format!(
                "within {seconds} s, {set} more routes were set and {removed} removed: `overlay-agent routes` lists the present ones"
            )
        })
    }
}

/// Lines about records that give no route.
#[derive(Debug, Default)]
struct SkippedLines {
    window: LogWindow,
    /// Records that were not logged.
    left_out: usize,
}

impl SkippedLines {
    fn of(&mut self, skipped: &[Skipped], now: Instant) -> Vec<String> {
        let mut lines: Vec<_> = self.summary(now).into_iter().collect();
        let (listed, rest) = skipped.split_at(skipped.len().min(LISTED));
        for Skipped { record, why } in listed {
            match self.window.take_line(LINES) {
                true => lines.push(format!("skipped the record {record}: {why}")),
                false => self.left_out += 1,
            }
        }
        if !rest.is_empty() && self.window.take_line(LINES) {
            lines.push(format!("and skipped {} more records: `overlay-agent routes` lists them", rest.len()));
        } else {
            self.left_out += rest.len();
        }
        lines
    }

    fn summary(&mut self, now: Instant) -> Option<String> {
        let seconds = self.window.renew(now)?;
        let count = std::mem::take(&mut self.left_out);
        (count > 0).then(|| {
            format!(
                "within {seconds} s, {count} more records were skipped: `overlay-agent routes` lists them"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Duration};

    use super::*;
    use crate::route::Subnet;

    const MILLISECOND: Duration = Duration::from_millis(1);

    fn subnet(third: u8) -> Subnet {
        format!("10.244.{third}.0/24").parse().unwrap()
    }

    fn set(third: u8) -> RouteChange {
        RouteChange::set(subnet(third), Ipv4Addr::new(192, 168, 77, third).into())
    }

    #[test]
    fn a_large_change_is_listed_in_part_and_counted() {
        let mut routes = RouteLines::default();
        let changes: Vec<_> = (0..9).map(set).chain([RouteChange::Remove(subnet(9))]).collect();
        let lines = routes.of(&changes, Instant::now());
        assert_eq!(lines.len(), LISTED + 1);
        assert_eq!(lines[0], "route 10.244.0.0/24 via 192.168.77.0");
        assert_eq!(lines[LISTED], "and 4 more routes, 1 more removed");
        assert!(routes.of(&[], Instant::now()).is_empty());
    }

    #[test]
    fn a_route_that_flaps_takes_few_lines_and_loses_no_count() {
        let (mut routes, start) = (RouteLines::default(), Instant::now());
        let mut lines = Vec::new();
        // 8000 changes in 8 seconds.
        for index in 0..8000 {
            let change = if index % 2 == 0 { set(1) } else { RouteChange::Remove(subnet(1)) };
            lines.extend(routes.of(&[change], start + index * MILLISECOND));
        }
        assert_eq!(lines.len(), LINES);
        assert_eq!(routes.summary(start + 9 * 1000 * MILLISECOND), None, "the window has not ended");
        let summary = routes.summary(start + LogWindow::LENGTH + 2 * 1000 * MILLISECOND).unwrap();
        assert!(summary.contains("within 12 s, 3975 more routes were set and 3975 removed"), "{summary}");
        assert_eq!(routes.summary(start + 4 * LogWindow::LENGTH), None, "it is logged once");
    }

    #[test]
    fn the_next_change_after_a_window_brings_the_summary_with_it() {
        let (mut skipped, start) = (SkippedLines::default(), Instant::now());
        let record = |count| vec![Skipped { record: "junk".to_owned(), why: "bad".to_owned() }; count];
        for _ in 0..LINES {
            assert_eq!(skipped.of(&record(1), start), ["skipped the record junk: bad"]);
        }
        assert!(skipped.of(&record(7), start).is_empty());
        let lines = skipped.of(&record(1), start + LogWindow::LENGTH);
        assert!(lines[0].contains("7 more records were skipped"), "{lines:?}");
        assert_eq!(lines[1..], ["skipped the record junk: bad"]);
    }
}
