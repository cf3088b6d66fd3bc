//! How the agent fares, told to whoever asks (`/healthz`) and to whoever started it (systemd).

use std::net::SocketAddr;

use anyhow::Result;
use tokio::{
    sync::watch,
    time::{Interval, MissedTickBehavior, interval},
};

use crate::{
    health::{Health, HealthServer, Report},
    systemd::Systemd,
};

/// What was told last, and to whom.
pub(super) struct Outlook {
    report: watch::Sender<Report>,
    systemd: Systemd,
    watchdog: Option<Interval>,
}

impl Outlook {
    /// Begins to answer at `healthz`.
    ///
    /// # Errors
    ///
    /// When that address cannot be had.
    pub(super) async fn start(healthz: Option<SocketAddr>) -> Result<Self> {
        let (report, receiver) = watch::channel(Report::now(Health::starting()));
        if let Some(address) = healthz {
            tokio::spawn(HealthServer::listen(address).await?.serve(receiver));
        }
        let watchdog = Systemd::watchdog_period().map(|period| {
            let mut interval = interval(period);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        });
        Ok(Self { report, systemd: Systemd::default(), watchdog })
    }

    /// The start waits for something outside.
    pub(super) fn waiting(&mut self, why: &str) {
        let ready = Err(format!("waiting: {why}"));
        self.tell(Health { ready, ..Health::starting() });
        self.systemd.extend_start();
    }

    /// The start takes longer and is not stuck.
    pub(super) fn still_starting(&self) {
        self.systemd.extend_start();
    }

    /// What is told, as it changes.
    pub(super) fn subscribe(&self) -> watch::Receiver<Report> {
        self.report.subscribe()
    }

    /// Tells what is new, and that the main loop turns. To be called every 5 s at least once the agent is ready.
    pub(super) fn tell(&mut self, health: Health) {
        self.systemd.notify(&health);
        // The time travels also where nothing is new: nobody needs to be woken for it.
        self.report.send_if_modified(|report| report.update(health));
    }

    /// Waits until systemd's watchdog wants to hear from the main loop; for ever when there is none.
    pub(super) async fn watchdog(&mut self) {
        match &mut self.watchdog {
            Some(interval) => drop(interval.tick().await),
            None => std::future::pending().await,
        }
    }

    /// Says that the main loop turns.
    pub(super) fn alive(&self) {
        self.systemd.ping_watchdog();
    }

    /// Says that the agent ends because it was told to.
    pub(super) fn stopping(&self) {
        self.systemd.stopping();
    }
}
