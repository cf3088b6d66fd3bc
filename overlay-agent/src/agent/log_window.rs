//! Limits the lines of one kind in the log.

use std::time::Duration;

use tokio::time::Instant;

/// The lines since the start of a window. Times are passed in.
#[derive(Debug, Default)]
pub(super) struct LogWindow {
    start: Option<Instant>,
    lines: usize,
}

impl LogWindow {
    pub(super) const LENGTH: Duration = Duration::from_secs(10);

    /// Starts a new window if the last one has ended. Returns the seconds that it took.
    pub(super) fn renew(&mut self, now: Instant) -> Option<u64> {
        let elapsed = self.start.map_or(Self::LENGTH, |start| now.duration_since(start));
        if elapsed < Self::LENGTH {
            return None;
        }
        *self = Self { start: Some(now), lines: 0 };
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
        has_room
    }
}
