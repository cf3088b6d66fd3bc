//! Tells systemd, where it started the agent, how the agent fares: READY, STATUS, WATCHDOG, STOPPING.
//!
//! Meant to be called from the agent's main loop. A task of its own would go on saying that all is well when the loop hangs.

use std::time::Duration;

use sd_notify::NotifyState;
use tracing::debug;

use crate::health::Health;

/// How much longer a start that waits may take until the next word: more than asking every member of a large cluster takes.
const STARTING: Duration = Duration::from_secs(180);

/// What systemd was told so far.
#[derive(Debug, Default)]
pub struct Systemd {
    ready: bool,
    status: String,
}

impl Systemd {
    /// How often [`Systemd::alive`] should be called: half of what the unit's WatchdogSec allows. `None` without it.
    pub fn watchdog_period() -> Option<Duration> {
        sd_notify::watchdog_enabled().map(|limit| limit / 2)
    }

    /// Says what is new in `health`: READY once, STATUS when it is another.
    pub fn tell(&mut self, health: &Health) {
        let status = health.to_string();
        let mut news = Vec::new();
        if health.ready.is_ok() && !self.ready {
            self.ready = true;
            news.push(NotifyState::Ready);
        }
        if status != self.status {
            news.push(NotifyState::Status(&status));
        }
        if !news.is_empty() {
            notify(&news);
        }
        self.status = status;
    }

    /// Says that the main loop turns. An agent that is unhealthy says so too: a restart would take away routes that packets
    /// still use, and cannot bring back a device or an etcd that is gone.
    pub fn alive(&self) {
        notify(&[NotifyState::Watchdog]);
    }

    /// Says that the start takes longer, because of what [`Systemd::tell`] said, and that it is not stuck.
    pub fn still_starting(&self) {
        notify(&[NotifyState::ExtendTimeoutUsec(STARTING.as_micros().try_into().unwrap_or(u32::MAX))]);
    }

    /// Says that the agent ends because it was told to.
    pub fn stopping(&self) {
        notify(&[NotifyState::Stopping]);
    }
}

/// Without systemd there is nobody to tell, and what it does not hear it asks for with a restart.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!("cannot tell systemd: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixDatagram, process::Command};

    use super::*;

    /// Says in which of the two processes of the test this is.
    const INNER: &str = "OVERLAY_AGENT_TEST_UNDER_SYSTEMD";

    /// The variables that systemd sets can only be set for another process: the test runs itself as the agent.
    #[test]
    fn systemd_hears_what_is_new_and_no_more() {
        if std::env::var_os(INNER).is_some() {
            return an_agents_life();
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "systemd::tests::systemd_hears_what_is_new_and_no_more"])
            .env(INNER, "1")
            .env("NOTIFY_SOCKET", &path)
            .env("WATCHDOG_USEC", "3000000")
            .env_remove("WATCHDOG_PID")
            .output()
            .unwrap();
        assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stdout));
        let mut heard = Vec::new();
        let mut buffer = [0; 1024];
        while let Ok(length) = socket.recv(&mut buffer) {
            heard.push(String::from_utf8_lossy(&buffer[..length]).trim_end().to_owned());
        }
        assert_eq!(
            heard,
            [
                "STATUS=not ready: starting",
                "EXTEND_TIMEOUT_USEC=180000000",
                "READY=1\nSTATUS=ok",
                "WATCHDOG=1",
                "STATUS=degraded: etcd is away",
                "STATUS=unhealthy: no datapath",
                "WATCHDOG=1",
                "STOPPING=1",
            ]
        );
    }

    fn an_agents_life() {
        assert_eq!(Systemd::watchdog_period(), Some(Duration::from_millis(1500)));
        let mut systemd = Systemd::default();
        let mut health = Health::starting();
        systemd.tell(&health);
        systemd.tell(&health);
        systemd.still_starting();
        health.ready = Ok(());
        systemd.tell(&health);
        systemd.alive();
        health.degraded = Some("etcd is away".to_owned());
        systemd.tell(&health);
        health.healthy = Err("no datapath".to_owned());
        systemd.tell(&health);
        systemd.alive();
        systemd.stopping();
    }
}
