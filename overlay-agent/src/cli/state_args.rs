//! The flags for what survives a reboot.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub(super) struct StateArgs {
    /// Directory of what survives a reboot: the snapshot, with which the agent starts while etcd does not answer. `down` keeps it
    #[arg(
        long,
        env = "OVERLAY_AGENT_STATE_DIR",
        default_value = "/var/lib/overlay-agent",
        value_name = "DIR"
    )]
    pub(super) state_dir: PathBuf,
    /// Neither write a snapshot of etcd's records nor start from one: for hosts without a directory that survives a reboot
    #[arg(long, env = "OVERLAY_AGENT_NO_SNAPSHOT", value_parser = clap::builder::FalseyValueParser::new())]
    pub(super) no_snapshot: bool,
}
