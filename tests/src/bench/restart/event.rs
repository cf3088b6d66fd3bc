//! What happens to the agent of one host while traffic passes.

use std::{path::Path, sync::Arc};

use anyhow::Result;
use clap::ValueEnum;

use crate::agent::{Agent, Rung, Site};

/// An event. Another one needs a variant, its place in [`Event::ALL`], a name, a bar and what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Event {
    /// SIGKILL, then a start
    Kill,
    /// SIGTERM, then a start; on tun, the next agent takes over from the running one
    Restart,
    /// A restart with another binary, with maps of the same version
    Upgrade,
    /// A restart with an agent whose maps have another version, and another one back
    Abi,
    /// `datapath set` to another rung, and back
    Rung,
}

/// What an event needs.
pub(super) struct Context<'a> {
    /// Arguments of the agent.
    pub(super) arguments: &'a [String],
    /// The binary of [`Event::Upgrade`].
    pub(super) upgrade_to: &'a Path,
    /// The binary of [`Event::Abi`].
    pub(super) next: &'a Path,
    /// The rung of the agent.
    pub(super) rung: Rung,
}

impl Event {
    pub(super) const ALL: [Self; 5] = [Self::Kill, Self::Restart, Self::Upgrade, Self::Abi, Self::Rung];

    /// Name in the output.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Restart => "restart",
            Self::Upgrade => "upgrade",
            Self::Abi => "abi",
            Self::Rung => "rung",
        }
    }

    /// Whether the event may lose and reorder nothing on a rung. On tun, packets that arrive while no process runs are lost, and those that
    /// programs forward overtake those that wait in its queues; there are no maps, and the agent of [`Event::Abi`] is built without
    /// optimisation and does not keep up with the flows.
    pub(super) const fn has_bar(self, rung: Rung) -> bool {
        match self {
            Self::Kill | Self::Abi | Self::Rung => rung.is_fast(),
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
            Self::Restart => replace(agent, &site, context),
            Self::Upgrade => replace(agent, &site.with_binary(context.upgrade_to.to_owned()), context),
            Self::Abi => {
                let next = replace(agent, &site.with_binary(context.next.to_owned()), context)?;
                replace(next, &site, context)
            }
            Self::Rung => {
                let other = if context.rung == Rung::Tc { Rung::Xdp } else { Rung::Tc };
                for rung in [other, context.rung] {
                    site.output("datapath set", &[rung.name()])?;
                }
                Ok(agent)
            }
        }
    }
}

/// A planned restart: the agent of `next` takes the place of `agent`.
fn replace(agent: Agent, next: &Arc<Site>, context: &Context<'_>) -> Result<Agent> {
    if context.rung.is_fast() {
        agent.stop()?;
        return next.start(context.arguments);
    }
    let arguments = [context.arguments, &["--take-over".to_owned()]].concat();
    let mut successor = next.launch(next.run_command(&arguments))?;
    successor.wait_until_taken_over()?;
    agent.wait_for_end()?;
    Ok(successor)
}
