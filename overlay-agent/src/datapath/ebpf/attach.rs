//! Attaching: tcx links where the kernel has them (6.6), clsact filters before, native XDP and nothing else.

use anyhow::{Context as _, Result, bail};
use aya::{
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType, XdpMode,
        links::FdLink,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
    },
    util::KernelVersion,
};

use super::{Hook, Programs};

/// Where our filters stand among those of a clsact qdisc: first.
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

/// An attached program. Dropping it detaches.
pub enum Attachment {
    /// A link that the kernel removes with its last file descriptor, so also when the agent is killed.
    Link {
        /// The link.
        _link: FdLink,
    },
    /// A filter that stays until someone removes it.
    Filter {
        /// The link.
        _link: SchedClassifierLink,
    },
}

impl TcAttach {
    /// Whether tcx is to be used on this kernel.
    fn tcx(self) -> bool {
        match self {
            Self::Auto => KernelVersion::current().is_ok_and(|kernel| kernel >= KernelVersion::new(6, 6, 0)),
            Self::Tcx => true,
            Self::Clsact => false,
        }
    }
}

impl Programs {
    /// Attaches a tc program and checks that the kernel runs it there.
    ///
    /// # Errors
    ///
    /// When the kernel refuses; nothing stays attached then.
    pub fn attach_tc(&mut self, hook: Hook, device: &str, how: TcAttach, port: u16) -> Result<Attachment> {
        let direction = match hook {
            Hook::Egress => TcAttachType::Egress,
            Hook::Ingress => TcAttachType::Ingress,
            Hook::Xdp => bail!("ovl_xdp is no tc program"),
        };
        let tcx = how.tcx();
        let program = self.tc(hook)?;
        let options = if tcx {
            // Before all others: what they see on the underlay is not ours any more.
            TcAttachOptions::TcxOrder(LinkOrder::first())
        } else {
            ensure_clsact(device)?;
            detach_filter(device, direction, port);
            TcAttachOptions::Netlink(NlOptions {
                priority: FILTER_PRIORITY,
                handle: filter_handle(port),
                ..NlOptions::default()
            })
        };
        let context = || format!("attach {} to {device}", hook.program());
        let id = program.attach_with_options(device, direction, options).with_context(context)?;
        let link = program.take_link(id).with_context(context)?;
        if !tcx {
            return Ok(Attachment::Filter { _link: link });
        }
        let attachment = Attachment::Link { _link: FdLink::try_from(link).with_context(context)? };
        let own = program.info().with_context(context)?.id();
        let (_, attached) = SchedClassifier::query_tcx(device, direction).with_context(context)?;
        if !attached.iter().any(|info| info.id() == own) {
            bail!("{}: the kernel took the program but does not list it", context());
        }
        Ok(attachment)
    }

    /// Attaches the XDP program in native mode.
    ///
    /// # Errors
    ///
    /// When the driver has no native XDP, another program is there, or the kernel refuses.
    pub fn attach_xdp(&mut self, device: &str) -> Result<Attachment> {
        let program = self.xdp()?;
        let id = match program.attach(device, XdpMode::Driver) {
            Ok(id) => id,
            Err(ProgramError::SyscallError(error))
                if matches!(error.io_error.raw_os_error(), Some(nix::libc::EBUSY | nix::libc::EEXIST)) =>
            {
                bail!(
                    "another XDP program is on {device}: remove it (ip link set dev {device} xdp off) or choose --datapath tc"
                )
            }
            Err(ProgramError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) =>
            {
                bail!("the driver of {device} has no native XDP: choose --datapath tc")
            }
            Err(error) => return Err(error).with_context(|| format!("attach ovl_xdp to {device}")),
        };
        // The library falls back to an attachment that outlives us when the kernel has no XDP links; taking it detaches it.
        let link = program.take_link(id)?;
        let link = FdLink::try_from(link)
            .with_context(|| format!("attach ovl_xdp to {device}: the kernel has no XDP links (5.9)"))?;
        Ok(Attachment::Link { _link: link })
    }
}

/// Removes the filter that a killed agent of the network on `port` left, if there is one. tcx and XDP links leave nothing.
pub fn detach_filter(device: &str, direction: TcAttachType, port: u16) {
    // Dropping the link detaches what is there; that nothing is there is the rule.
    drop(SchedClassifierLink::attached(device, direction, FILTER_PRIORITY, filter_handle(port), None));
}

/// Filters of agents for several networks share a device; their ports tell them apart.
fn filter_handle(port: u16) -> TcHandle {
    TcHandle::new(0, port)
}

fn ensure_clsact(device: &str) -> Result<()> {
    match tc::qdisc_add_clsact(device) {
        Ok(()) => Ok(()),
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(nix::libc::EEXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("add a clsact qdisc to {device}")),
    }
}
