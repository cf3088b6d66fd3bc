//! Limits the lines of one kind in the log.

use std::time::Duration;

use tokio::time::Instant;

/// The lines since the start of a window. Times are passed in. As long as windows overflow, each is twice as long as the one
/// before: something that changes for days must not fill the log either.
#[derive(Debug, Default)]
pub(super) struct LogWindow {
    start: Option<Instant>,
    lines: usize,
    /// Whether a line had no room.
    overflowed: bool,
    /// How often the length was doubled.
    doublings: u32,
}

impl LogWindow {
    /// The shortest window.
    pub(super) const LENGTH: Duration = Duration::from_secs(10);
    /// The longest window is the shortest, doubled this often: 10 min 40 s.
    const MOST_DOUBLINGS: u32 = 6;

    /// Starts a new window if the last one has ended. Returns the seconds that it took.
    pub(super) fn renew(&mut self, now: Instant) -> Option<u64> {
        let length = Self::LENGTH * 2_u32.pow(self.doublings);
        let elapsed = self.start.map_or(length, |start| now.duration_since(start));
        if elapsed < length {
            return None;
        }
        let doublings = if self.overflowed { (self.doublings + 1).min(Self::MOST_DOUBLINGS) } else { 0 };
        *self = Self { start: Some(now), doublings, ..Self::default() };
        Some(elapsed.as_secs())
    }

    /// Whether there is room for another line, of `most` in a window.
    pub(super) fn has_room(&self, most: usize) -> bool {
        self.lines < most
    }

    /// Takes the room for a line. `false` when there is none.
    pub(super) fn take_line(&mut self, most: usize) -> bool {
        let has_room = self.has_room(most);
        self.lines += usize::from(has_room);
        self.overflowed |= !has_room;
        has_room
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_all_the_time_takes_fewer_and_fewer_lines() {
        let (mut window, start) = (LogWindow::default(), Instant::now());
        let mut lines = 0;
        // Ten lines per second for an hour.
        for tenth in 0..36_000 {
            window.renew(start + tenth * Duration::from_millis(100));
            lines += usize::from(window.take_line(5));
        }
        // Windows of 10, 20, 40, 80, 160, 320 and 640 s, and then of 640 s each.
        assert_eq!(lines, 5 * 11);
        // Without an overflow, windows are short again.
        let quiet = start + Duration::from_secs(7200);
        assert!(window.renew(quiet).is_some() && window.renew(quiet + 64 * LogWindow::LENGTH).is_some());
        assert!(window.renew(quiet + 65 * LogWindow::LENGTH).is_some());
    }
}
