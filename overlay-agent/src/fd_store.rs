//! Descriptors in systemd's file descriptor store, where they outlive the process: sd_notify(3), sd_listen_fds(3).
//!
//! The queue of the overlay device and the UDP sockets are there from the moment they are opened. So packets wait in them also when the
//! process crashes, until systemd has started the next one.

use std::{
    collections::BTreeMap,
    os::fd::{OwnedFd, RawFd},
};

use anyhow::{Context as _, Result};
use nix::unistd::close;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use sd_notify::NotifyState;
use tracing::{debug, warn};

use crate::datapath::{Descriptor, Inherited};

/// What systemd keeps for the next start: each name with the number of its descriptor.
#[derive(Debug, Default)]
pub(crate) struct FdStore(BTreeMap<String, u64>);

impl FdStore {
    /// Takes what systemd has kept out of its store. To be called once, before any descriptor of this process is opened by number.
    pub(crate) fn take() -> Inherited {
        let passed: Vec<_> = match sd_notify::listen_fds_with_names() {
            Ok(passed) => passed.collect(),
            Err(error) => {
                warn!("systemd's descriptors are not used: {error}");
                Vec::new()
            }
        };
        let mut taken = Vec::new();
        for (raw, name) in passed {
            // Those that are used get into the store again, under their names of then.
            notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(&name)]);
            match own(raw) {
                Ok(fd) => taken.push((name, fd)),
                Err(error) => warn!("the descriptor {name} of systemd is not used: {error:#}"),
            }
        }
        Inherited::new(taken)
    }

    /// Makes the store have these descriptors and no others.
    pub(crate) fn update(&mut self, descriptors: &[Descriptor<'_>]) {
        let wanted: BTreeMap<_, _> =
            descriptors.iter().map(|descriptor| (descriptor.name.clone(), descriptor.id)).collect();
        if self.0 == wanted {
            return;
        }
        self.0.retain(|name, id| {
            let stays = wanted.get(name) == Some(id);
            if !stays {
                notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
            }
            stays
        });
        for Descriptor { name, id, fd } in descriptors {
            if self.0.contains_key(name) {
                continue;
            }
            let stored =
                sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name)], &[*fd]);
            match stored {
                Ok(()) => drop(self.0.insert(name.clone(), *id)),
                Err(error) => warn!("systemd does not keep {name}, which a restart needs: {error}"),
            }
        }
    }

    /// Takes everything out of the store.
    pub(crate) fn clear(&mut self) {
        self.update(&[]);
    }
}

/// This process's own descriptor with a number that systemd has passed. Fails before kernel 5.6.
fn own(raw: RawFd) -> Result<OwnedFd> {
    let process = pidfd_open(getpid(), PidfdFlags::empty()).context("open this process")?;
    // A duplicate: its type knows that it has to be closed.
    let fd = pidfd_getfd(process, raw, PidfdGetfdFlags::empty()).context("duplicate it");
    close(raw).with_context(|| format!("close the descriptor {raw}"))?;
    fd
}

/// Does nothing when systemd did not start the agent.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!("notify systemd: {error}");
    }
}
