//! Reports agent health over HTTP and to systemd.

use std::net::SocketAddr;

use anyhow::Result;
use tokio::{
    sync::watch,
    time::{Interval, MissedTickBehavior, interval},
};
use tracing::info;

use crate::{
    health::{Health, HealthServer, Report},
    systemd::Systemd,
};

/// The last report, and its receivers.
pub(super) struct HealthNotifier {
    report: watch::Sender<Report>,
    systemd: Systemd,
    watchdog: Option<Interval>,
}

impl HealthNotifier {
    /// Starts the HTTP server, if there is an address for it.
    /// Fails when the address is not available.
    pub(super) async fn start(healthz: Option<SocketAddr>) -> Result<Self> {
        let report = watch::Sender::new(Report::now(Health::starting()));
        let watchdog = Systemd::watchdog_period().map(|period| {
            let mut interval = interval(period);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        });
        let notifier = Self { report, systemd: Systemd::default(), watchdog };
        notifier.serve(healthz).await?;
        Ok(notifier)
    }

    /// Starts the HTTP server, if there is an address for it.
    /// Fails when the address is not available.
    pub(super) async fn serve(&self, healthz: Option<SocketAddr>) -> Result<()> {
        if let Some(address) = healthz {
            tokio::spawn(HealthServer::listen(address).await?.serve(self.report.subscribe()));
        }
        Ok(())
    }

    /// Reports that the start waits for something. A new reason is logged.
    pub(super) fn waiting(&mut self, why: &str) {
        let waiting = format!("waiting: {why}");
        if self.notify(Health { ready: Err(waiting.clone()), ..Health::starting() }) {
            info!("{waiting}");
        }
        self.extend_start();
    }

    /// Extends the start timeout of systemd.
    pub(super) fn extend_start(&self) {
        self.systemd.extend_start();
    }

    /// The report, as it changes.
    pub(super) fn subscribe(&self) -> watch::Receiver<Report> {
        self.report.subscribe()
    }

    /// Reports the health, and that the main loop runs. To be called at least every 5 s once the agent is ready.
    /// Returns whether the health changed.
    pub(super) fn notify(&mut self, health: Health) -> bool {
        self.systemd.notify(&health);
        // The time of the report is updated even when the health did not change; that wakes no receiver.
        self.report.send_if_modified(|report| report.update(health))
    }

    /// Waits until systemd's watchdog expects a ping; for ever without a watchdog.
    pub(super) async fn watchdog(&mut self) {
        match &mut self.watchdog {
            Some(interval) => drop(interval.tick().await),
            None => std::future::pending().await,
        }
    }

    /// Resets systemd's watchdog.
    pub(super) fn ping_watchdog(&self) {
        self.systemd.ping_watchdog();
    }

    /// Reports that the agent shuts down as requested.
    pub(super) fn stopping(&self) {
        self.systemd.stopping();
    }
}
