//! Attaching: tcx links where the kernel has them (6.6), clsact filters before, native XDP and nothing else.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use aya::{
    programs::{
        LinkOrder, ProgramError, TcAttachType, XdpMode,
        links::FdLink,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
    },
    util::KernelVersion,
};
use nix::libc;
use tracing::warn;

use super::{
    Hook, HookKind, Place, ProgramSet,
    pins::{pin_link, pinned_link, unpin},
    tcx_link::{self, TcxLinks},
};
use crate::netlink::{Netlink, device_name};

/// Position of our filters among those of a clsact qdisc: first.
const FILTER_PRIORITY: u16 = 1;

/// How tc programs are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum TcAttach {
    /// tcx where the kernel has it, else clsact
    #[default]
    Auto,
    /// tcx links (kernel 6.6): ordered among other programs, gone with the agent
    Tcx,
    /// filters of a clsact qdisc
    Clsact,
}

/// [`TcAttach`], decided for this kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TcMode {
    Tcx,
    /// Filters with this minor handle, which distinguishes those of several agents on one device.
    Clsact {
        handle: u16,
    },
}

/// A program on a hook of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) hook: Hook,
    pub(crate) ifindex: u32,
    /// How it is attached if it is a tc program.
    pub(crate) mode: TcMode,
}

/// An attached program. Dropping it detaches, unless [`Attachment::keep`] was called.
pub(crate) struct Attachment {
    pub(crate) target: Target,
    /// `None` after its program could not be replaced, when it was not pinned.
    link: Option<Link>,
    /// Where the link is pinned.
    pin: Option<PathBuf>,
}

impl Attachment {
    /// A pinned link stays when this value is dropped.
    pub(crate) fn keep(&mut self) {
        self.pin = None;
    }

    /// Where the link is pinned.
    pub(crate) fn pin(&self) -> Option<&Path> {
        self.pin.as_deref()
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if let Some(pin) = &self.pin
            && let Err(error) = unpin(pin)
        {
            warn!("{} stays attached: {error:#}", self.target.hook.program);
        }
    }
}

/// The kernel removes tcx and XDP links with their last file descriptor and pin. A clsact filter stays until it is removed.
enum Link {
    Tcx(FdLink),
    Clsact { handle: u16, link: SchedClassifierLink },
    Xdp(FdLink),
}

impl Link {
    fn of(target: Target, link: FdLink) -> Self {
        match target.hook.kind {
            HookKind::Xdp => Self::Xdp(link),
            HookKind::TcIngress | HookKind::TcEgress => Self::Tcx(link),
        }
    }
}

impl TcAttach {
    /// Decides for this kernel; clsact filters get `handle`.
    pub(crate) fn mode(self, handle: u16) -> TcMode {
        let tcx = match self {
            Self::Auto => KernelVersion::current().is_ok_and(|kernel| kernel >= KernelVersion::new(6, 6, 0)),
            Self::Tcx => true,
            Self::Clsact => false,
        };
        if tcx { TcMode::Tcx } else { TcMode::Clsact { handle } }
    }
}

impl ProgramSet {
    /// Loads a program if it is not, attaches it, and checks that the kernel runs it there. After an error it is not attached.
    pub(crate) async fn attach(&mut self, netlink: &Netlink, target: Target) -> Result<Attachment> {
        let device = device_name(target.ifindex)?;
        self.load_program(target.hook)?;
        let has_link = target.mode == TcMode::Tcx || target.hook.kind == HookKind::Xdp;
        let pins = self.pins().filter(|_| has_link);
        let pin = pins.map(|pins| pins.link(target.hook.program, target.ifindex));
        let left = pin.as_deref().map(|pin| left_link(pin, target.ifindex)).transpose()?.flatten();
        let adopted = left.is_some();
        let link = self.attach_or_replace(target, &device, left.map(|left| Link::of(target, left)))?;
        let link = match (link, &pin) {
            (Link::Tcx(link), Some(pin)) if !adopted => Link::Tcx(pin_link(link, pin)?),
            (Link::Xdp(link), Some(pin)) if !adopted => Link::Xdp(pin_link(link, pin)?),
            (link, _) => link,
        };
        let attachment = Attachment { target, link: Some(link), pin };
        self.check(netlink, &attachment, &device).await?;
        Ok(attachment)
    }

    /// Puts this set's program in the place of another set's, so that no packet passes without one. After an error, a pinned link keeps the
    /// other program.
    pub(crate) async fn replace(&mut self, netlink: &Netlink, attachment: &mut Attachment) -> Result<()> {
        let target = attachment.target;
        let device = device_name(target.ifindex)?;
        self.load_program(target.hook)?;
        let present = match &attachment.pin {
            Some(pin) => pinned_link(pin)?.map(|link| Link::of(target, link)),
            None => attachment.link.take(),
        };
        attachment.link = Some(self.attach_or_replace(target, &device, present)?);
        self.check(netlink, attachment, &device).await
    }

    async fn check(&self, netlink: &Netlink, attachment: &Attachment, device: &str) -> Result<()> {
        if !self.runs(netlink, attachment).await? {
            let program = attachment.target.hook.program;
            bail!("attach {program} to {device}: the kernel took the program but does not list it");
        }
        Ok(())
    }

    /// `present` is a link or filter whose program is replaced.
    fn attach_or_replace(&mut self, target: Target, device: &str, present: Option<Link>) -> Result<Link> {
        let direction = match target.hook.kind {
            HookKind::TcIngress => TcAttachType::Ingress,
            HookKind::TcEgress => TcAttachType::Egress,
            HookKind::Xdp => {
                let present = present.and_then(|link| match link {
                    Link::Xdp(link) => Some(link),
                    Link::Tcx(_) | Link::Clsact { .. } => None,
                });
                return self.attach_xdp(target, device, present);
            }
        };
        let context = || format!("replace {} on {device}", target.hook.program);
        let present = match present {
            Some(Link::Tcx(link)) => Some(SchedClassifierLink::try_from(link).with_context(context)?),
            Some(Link::Clsact { link, .. }) => Some(link),
            Some(Link::Xdp(_)) | None => None,
        };
        self.attach_tc(target, direction, device, present)
    }

    /// Whether the kernel still has our program on its hook. `links` are those of this process, read when the kernel is asked.
    pub(crate) async fn is_attached(
        &self,
        netlink: &Netlink,
        attachment: &Attachment,
        links: &TcxLinks,
    ) -> Result<bool> {
        let is_there = match &attachment.link {
            Some(Link::Tcx(link)) => links.has(link, attachment.target.ifindex)?,
            Some(Link::Clsact { .. } | Link::Xdp(_)) => true,
            None => false,
        };
        Ok(is_there && self.runs(netlink, attachment).await?)
    }

    /// Whether the kernel runs our program by this attachment, wherever that is.
    async fn runs(&self, netlink: &Netlink, attachment: &Attachment) -> Result<bool> {
        let Attachment { target: Target { hook, ifindex, .. }, link, .. } = attachment;
        let own = self.info(*hook)?.id();
        match link {
            None => Ok(false),
            Some(Link::Xdp(_)) => Ok(netlink.xdp_program(*ifindex).await? == Some(own)),
            Some(Link::Tcx(link)) => tcx_link::runs(link, own),
            Some(Link::Clsact { handle, .. }) => {
                let egress = hook.kind == HookKind::TcEgress;
                netlink.has_filter(*ifindex, egress, FILTER_PRIORITY, *handle).await
            }
        }
    }

    /// The program of `present` is replaced, so that no packet passes without.
    fn attach_tc(
        &mut self,
        target: Target,
        direction: TcAttachType,
        device: &str,
        present: Option<SchedClassifierLink>,
    ) -> Result<Link> {
        let options = match target.mode {
            TcMode::Tcx => TcAttachOptions::TcxOrder(match target.hook.place {
                Place::First => LinkOrder::first(),
                Place::Last => LinkOrder::last(),
            }),
            TcMode::Clsact { handle } => {
                ensure_clsact(device)?;
                if present.is_none() {
                    detach_filter(device, direction, handle);
                }
                TcAttachOptions::Netlink(NlOptions {
                    priority: FILTER_PRIORITY,
                    handle: TcHandle::new(0, handle),
                    ..NlOptions::default()
                })
            }
        };
        let context = || format!("attach {} to {device}", target.hook.program);
        let program = self.tc(target.hook)?;
        let attached = match present {
            Some(present) => program.attach_to_link(present),
            None => program.attach_with_options(device, direction, options),
        };
        let id = attached.with_context(context)?;
        let link = program.take_link(id).with_context(context)?;
        Ok(match target.mode {
            TcMode::Tcx => Link::Tcx(FdLink::try_from(link).with_context(context)?),
            TcMode::Clsact { handle } => Link::Clsact { handle, link },
        })
    }

    fn attach_xdp(&mut self, target: Target, device: &str, left: Option<FdLink>) -> Result<Link> {
        let program = self.xdp(target.hook)?;
        let context = || format!("attach {} to {device}", target.hook.program);
        let attached = match left {
            Some(left) => program.attach_to_link(left.try_into().with_context(context)?),
            None => program.attach_to_if_index(target.ifindex, XdpMode::Driver),
        };
        if let Err(ProgramError::SyscallError(error)) = &attached {
            match error.io_error.raw_os_error() {
                Some(libc::EBUSY | libc::EEXIST) => bail!(
                    "another XDP program is on {device}: remove it (ip link set dev {device} xdp off) or choose --datapath tc"
                ),
                Some(libc::EOPNOTSUPP) => {
                    bail!("the driver of {device} has no native XDP: choose --datapath tc")
                }
                _ => {}
            }
        }
        let id = attached.with_context(context)?;
        // When the kernel has no XDP links, the library falls back to an attachment that outlives us; taking it detaches it.
        let link = program.take_link(id)?;
        let link = FdLink::try_from(link)
            .with_context(|| format!("{}: the kernel has no XDP links (5.9)", context()))?;
        Ok(Link::Xdp(link))
    }
}

/// The link that an earlier agent pinned at `pin`, if it is still attached to the device `ifindex`; otherwise the pin is removed.
fn left_link(pin: &Path, ifindex: u32) -> Result<Option<FdLink>> {
    let Some(link) = pinned_link(pin)? else { return Ok(None) };
    if TcxLinks::read()?.has(&link, ifindex)? {
        return Ok(Some(link));
    }
    unpin(pin)?;
    Ok(None)
}

/// Removes the filter with this handle that a killed agent left, if there is one. tcx and XDP links leave nothing.
pub(crate) fn detach_filter(device: &str, direction: TcAttachType, handle: u16) {
    // Dropping the link detaches the filter; usually there is none.
    let handle = TcHandle::new(0, handle);
    drop(SchedClassifierLink::attached(device, direction, FILTER_PRIORITY, handle, None));
}

/// Removes the filters with this handle and one of these programs that a killed agent left on any device. Fails when the kernel does
/// not list its devices.
pub(crate) async fn detach_left(netlink: &Netlink, handle: u16, hooks: &[Hook]) -> Result<()> {
    let programs: Vec<&str> = hooks.iter().map(|hook| hook.program).collect();
    for link in netlink.links().await? {
        for (direction, egress) in [(TcAttachType::Ingress, false), (TcAttachType::Egress, true)] {
            let place = (FILTER_PRIORITY, handle);
            // A device that is gone meanwhile has none.
            if matches!(netlink.has_program_filter(link.index, egress, place, &programs).await, Ok(true)) {
                detach_filter(&link.name, direction, handle);
            }
        }
    }
    Ok(())
}

fn ensure_clsact(device: &str) -> Result<()> {
    match tc::qdisc_add_clsact(device) {
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        added => added.with_context(|| format!("add a clsact qdisc to {device}")),
    }
}
