//! The programs on the devices of containers, and the map of containers that all programs read.

use anyhow::Result;
use tracing::debug;

use super::{
    Report,
    ebpf::{Attachment, OverlaySet, Target, TcxLinks},
};
use crate::{
    containers::Containers,
    netlink::{Netlink, device_name},
};

/// What is attached for the bypass. Devices come and go with containers: none of them is essential.
#[derive(Default)]
pub(super) struct LocalPrograms {
    attachments: Vec<Attachment>,
    containers: usize,
    /// Why the kernel cannot have the bypass.
    pub(super) refused: Option<String>,
}

impl LocalPrograms {
    /// Makes the map and the attachments what they should be. A device that the kernel refuses is tried again at the next call;
    /// its packets take the host's stack. Fails when the kernel refuses an update of the map.
    pub(super) async fn reconcile(
        &mut self,
        netlink: &Netlink,
        set: &mut OverlaySet,
        containers: &Containers,
        targets: &[Target],
        report: &mut Report,
    ) -> Result<()> {
        // A packet for a container that is gone takes the stack before its device loses the program.
        let none = Containers::default();
        let containers = if targets.is_empty() { &none } else { containers };
        let left = set.set_endpoints(&containers.endpoints)?;
        if left > 0 {
            report.no_bypass.push(format!("the kernel's map has no room for {left} more containers"));
        }
        self.containers = containers.endpoints.len().saturating_sub(left);
        self.drop_others(netlink, set, targets).await;
        for target in targets {
            if self.attachments.iter().any(|attachment| attachment.target == *target) {
                continue;
            }
            // The device may be gone already.
            let Ok(device) = device_name(target.ifindex) else { continue };
            match set.programs.attach(netlink, *target).await {
                Ok(attachment) => {
                    debug!("{} attached to {device}", target.hook.program);
                    self.attachments.push(attachment);
                }
                Err(error) => report.no_bypass.push(format!("{error:#}")),
            }
        }
        Ok(())
    }

    /// Detaches what should not be there, and forgets what the kernel has detached: with its device, or because another program
    /// asked for it.
    async fn drop_others(&mut self, netlink: &Netlink, set: &OverlaySet, targets: &[Target]) {
        let Ok(links) = TcxLinks::read() else { return };
        let mut kept = Vec::new();
        for attachment in std::mem::take(&mut self.attachments) {
            let is_wanted = targets.contains(&attachment.target);
            if is_wanted && matches!(set.programs.is_attached(netlink, &attachment, &links).await, Ok(true)) {
                kept.push(attachment);
            }
        }
        self.attachments = kept;
    }

    /// Whether the kernel still has the programs on all devices that are still there.
    pub(super) async fn is_attached(&self, netlink: &Netlink, set: &OverlaySet, links: &TcxLinks) -> bool {
        for attachment in &self.attachments {
            let is_there = device_name(attachment.target.ifindex).is_ok();
            if is_there && !matches!(set.programs.is_attached(netlink, attachment, links).await, Ok(true)) {
                return false;
            }
        }
        true
    }

    /// The programs.
    pub(super) fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.attachments.iter()
    }

    /// The programs, for others to take their place.
    pub(super) fn attachments_mut(&mut self) -> impl Iterator<Item = &mut Attachment> {
        self.attachments.iter_mut()
    }

    /// Leaves pinned programs in the kernel.
    pub(super) fn leave(&mut self) {
        self.attachments.iter_mut().for_each(Attachment::keep);
        self.detach();
    }

    /// Detaches all programs.
    pub(super) fn detach(&mut self) {
        self.attachments.clear();
        self.containers = 0;
    }

    /// Devices with programs, and containers in the map.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.attachments.len(), self.containers)
    }
}
