//! Notifies systemd of the agent's state: READY, STATUS, WATCHDOG, STOPPING.
//!
//! The main loop must call this itself: a separate task would keep the watchdog satisfied while the main loop hangs.

use std::time::Duration;

use sd_notify::NotifyState;
use tracing::debug;

use crate::health::Health;

/// Extension of the start timeout: longer than one attempt to reach every member of a large etcd cluster.
const START_EXTENSION: Duration = Duration::from_secs(180);

/// The state that systemd was notified of.
#[derive(Debug, Default)]
pub struct Systemd {
    ready: bool,
    status: String,
}

impl Systemd {
    /// Interval for [`Systemd::ping_watchdog`]: half of the unit's WatchdogSec. `None` without it.
    pub fn watchdog_period() -> Option<Duration> {
        sd_notify::watchdog_enabled().map(|limit| limit / 2)
    }

    /// Notifies of changes in `health`: READY once, STATUS when it differs.
    pub fn notify(&mut self, health: &Health) {
        let status = health.to_string();
        let mut changes = Vec::new();
        if health.ready.is_ok() && !self.ready {
            self.ready = true;
            changes.push(NotifyState::Ready);
        }
        if status != self.status {
            changes.push(NotifyState::Status(&status));
        }
        if !changes.is_empty() {
            notify(&changes);
        }
        self.status = status;
    }

    /// Resets the watchdog. An unhealthy agent does so, too: a restart would remove routes that are in use, and does not repair
    /// a missing device or an unreachable etcd.
    pub fn ping_watchdog(&self) {
        notify(&[NotifyState::Watchdog]);
    }

    /// Extends the start timeout, for a start that waits.
    pub fn extend_start(&self) {
        notify(&[NotifyState::ExtendTimeoutUsec(START_EXTENSION.as_micros().try_into().unwrap_or(u32::MAX))]);
    }

    /// Notifies that the agent shuts down as requested.
    pub fn stopping(&self) {
        notify(&[NotifyState::Stopping]);
    }
}

/// Does nothing when systemd did not start the agent. If a notification is lost, the watchdog restarts the agent.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!("notify systemd: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixDatagram, process::Command};

    use super::*;

    /// Set in the process that plays the agent.
    const INNER: &str = "OVERLAY_AGENT_TEST_UNDER_SYSTEMD";

    /// The test runs itself as the agent, because systemd's variables can only be set for another process.
    #[test]
    fn only_changes_are_sent() {
        if std::env::var_os(INNER).is_some() {
            return send_all();
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "systemd::tests::only_changes_are_sent"])
            .env(INNER, "1")
            .env("NOTIFY_SOCKET", &path)
            .env("WATCHDOG_USEC", "3000000")
            .env_remove("WATCHDOG_PID")
            .output()
            .unwrap();
        assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stdout));
        let mut received = Vec::new();
        let mut buffer = [0; 1024];
        while let Ok(length) = socket.recv(&mut buffer) {
            received.push(String::from_utf8_lossy(&buffer[..length]).trim_end().to_owned());
        }
        assert_eq!(
            received,
            [
                "STATUS=not ready: starting",
                "EXTEND_TIMEOUT_USEC=180000000",
                "READY=1\nSTATUS=ok",
                "WATCHDOG=1",
                "STATUS=degraded: etcd is unreachable",
                "STATUS=unhealthy: no datapath",
                "WATCHDOG=1",
                "STOPPING=1",
            ]
        );
    }

    fn send_all() {
        assert_eq!(Systemd::watchdog_period(), Some(Duration::from_millis(1500)));
        let mut systemd = Systemd::default();
        let mut health = Health::starting();
        systemd.notify(&health);
        systemd.notify(&health);
        systemd.extend_start();
        health.ready = Ok(());
        systemd.notify(&health);
        systemd.ping_watchdog();
        health.degraded = Some("etcd is unreachable".to_owned());
        systemd.notify(&health);
        health.healthy = Err("no datapath".to_owned());
        systemd.notify(&health);
        systemd.ping_watchdog();
        systemd.stopping();
    }
}
