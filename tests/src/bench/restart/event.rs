//! What happens to the agent of one host while traffic passes.

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use anyhow::Result;
use clap::ValueEnum;

use crate::agent::{Agent, Rung, Site};

/// An event. Another one needs a variant, its place in [`Event::ALL`], a name, a bar and what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Event {
    /// SIGKILL, then a start
    Kill,
    /// SIGTERM, then a start
    Restart,
    /// SIGTERM, then a start of another binary with programs of the same ABI version
    Upgrade,
}

/// What an event needs.
pub(super) struct Context<'a> {
    /// Arguments of the agent.
    pub(super) arguments: &'a [String],
    /// The binary of [`Event::Upgrade`].
    pub(super) upgrade_to: &'a Path,
}

impl Event {
    pub(super) const ALL: [Self; 3] = [Self::Kill, Self::Restart, Self::Upgrade];

    /// Name in the output.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Restart => "restart",
            Self::Upgrade => "upgrade",
        }
    }

    /// Whether the event may lose nothing on a rung: on tun, packets that arrive while no process runs are lost.
    pub(super) const fn has_bar(self, rung: Rung) -> bool {
        match self {
            Self::Kill => rung.is_fast(),
            Self::Restart | Self::Upgrade => true,
        }
    }

    /// Lets the event happen to `agent`. Returns the agent that runs afterwards.
    ///
    /// # Errors
    ///
    /// When the agent does not end, or the next one does not start.
    pub(super) fn happen(self, agent: Agent, context: &Context<'_>) -> Result<Agent> {
        let site = Arc::clone(agent.site());
        match self {
            Self::Kill => {
                agent.crash()?;
                site.start(context.arguments)
            }
            Self::Restart => {
                agent.stop()?;
                site.start(context.arguments)
            }
            Self::Upgrade => {
                agent.stop()?;
                let mut upgraded = site.launch(command(&site, context))?;
                upgraded.wait_until_running()?;
                Ok(upgraded)
            }
        }
    }
}

/// The usual command line, with the other binary.
fn command(site: &Site, context: &Context<'_>) -> Command {
    let usual = site.run_command(context.arguments);
    let mut command = Command::new(context.upgrade_to);
    command.args(usual.get_args()).env_remove("RUST_LOG").stdin(Stdio::null());
    command
}
