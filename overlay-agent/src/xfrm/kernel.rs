//! Lists the kernel's IPsec policies over netlink, and subscribes to their changes.
#![allow(clippy::wildcard_enum_match_arm, reason = "the library adds payloads; only a few are expected")]

use std::{io, pin::Pin};

use anyhow::{Context as _, Error, Result, bail};
use futures_util::{Stream, StreamExt as _, future};
use netlink_packet_xfrm::{
    XFRM_MSG_DELPOLICY, XFRM_MSG_FLUSHPOLICY, XFRM_MSG_GETDEFAULT, XFRM_MSG_GETPOLICY, XFRM_MSG_NEWPOLICY,
    XFRM_MSG_POLEXPIRE, XFRM_MSG_UPDPOLICY, XFRMNLGRP_EXPIRE, XFRMNLGRP_POLICY,
};
use nix::libc::{EINVAL, EPERM, EPROTONOSUPPORT};
use rtnetlink::{
    packet_core::{DoneMessage, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    proto::{ConnectionHandle, new_connection},
    sys::{AsyncSocket as _, SocketAddr, protocols::NETLINK_XFRM},
};

use super::{
    Policies,
    message::{Message, all_policies, default_policies, read_defaults, read_policy},
};

/// A connection to the kernel in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Kernel(ConnectionHandle<Message>);

/// One item for each change of a policy; ends when the connection fails.
pub(super) type Changes = Pin<Box<dyn Stream<Item = ()> + Send + Sync>>;

/// Lists the IPsec policies of this network namespace; none when the kernel has no IPsec. Needs `CAP_NET_ADMIN`.
/// Fails when the kernel refuses, or answers what cannot be understood.
pub async fn list() -> Result<Policies> {
    match connect(&[])? {
        Some((kernel, _)) => kernel.policies().await,
        None => Ok(Policies::default()),
    }
}

/// Connects and subscribes to changes; `None` when the kernel has no IPsec.
/// Fails when the kernel refuses a socket.
pub(super) fn subscribe() -> Result<Option<(Kernel, Changes)>> {
    // A policy whose lifetime ends is not announced as deleted.
    connect(&[XFRMNLGRP_POLICY, XFRMNLGRP_EXPIRE])
}

fn connect(groups: &[u32]) -> Result<Option<(Kernel, Changes)>> {
    let (mut connection, handle, messages) = match new_connection::<Message>(NETLINK_XFRM) {
        Err(error) if error.raw_os_error() == Some(EPROTONOSUPPORT) => return Ok(None),
        opened => opened.map_err(refused)?,
    };
    let mask = groups.iter().fold(0, |mask, group| mask | 1 << (group - 1));
    connection.socket_mut().socket_mut().bind(&SocketAddr::new(0, mask)).map_err(refused)?;
    // Without the end of a list, a failed connection would look like one.
    connection.set_forward_done(true);
    tokio::spawn(connection);
    let changes = messages.filter_map(|(message, _)| future::ready(is_change(&message).then_some(())));
    Ok(Some((Kernel(handle), Box::pin(changes))))
}

/// Whether a message that is no answer says, or may say, that a policy has changed.
fn is_change(message: &NetlinkMessage<Message>) -> bool {
    match &message.payload {
        NetlinkPayload::InnerMessage(message) => [
            XFRM_MSG_NEWPOLICY,
            XFRM_MSG_UPDPOLICY,
            XFRM_MSG_DELPOLICY,
            XFRM_MSG_FLUSHPOLICY,
            XFRM_MSG_POLEXPIRE,
            XFRM_MSG_GETDEFAULT,
        ]
        .contains(&message.kind),
        // Among others, that messages were lost.
        _ => true,
    }
}

impl Kernel {
    /// All policies that can concern the overlay.
    pub(super) async fn policies(&self) -> Result<Policies> {
        let mut policies = self.defaults().await?;
        let request = Message { kind: XFRM_MSG_GETPOLICY, body: all_policies() };
        let mut answers = self.request(request, NLM_F_DUMP)?;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(message) if message.kind == XFRM_MSG_NEWPOLICY => {
                    policies.extend(read_policy(&message.body)?);
                }
                NetlinkPayload::Done(DoneMessage { code: 0, .. }) => {
                    return Ok(policies.into_iter().collect());
                }
                NetlinkPayload::Error(error) => return Err(refused(error.to_io())),
                other => bail!("list the IPsec policies: the kernel answers {other:?}"),
            }
        }
        bail!("list the IPsec policies: the connection to the kernel failed")
    }

    /// The default policies that drop.
    async fn defaults(&self) -> Result<Vec<super::Policy>> {
        let request = Message { kind: XFRM_MSG_GETDEFAULT, body: default_policies() };
        let answer = self.request(request, 0)?.next().await;
        match answer
            .context("look up the default IPsec policies: the connection to the kernel failed")?
            .payload
        {
            NetlinkPayload::InnerMessage(message) => read_defaults(&message.body),
            // Kernels before 5.14 have none.
            NetlinkPayload::Error(error) if error.raw_code() == -EINVAL => Ok(Vec::new()),
            NetlinkPayload::Error(error) => Err(refused(error.to_io())),
            other => bail!("look up the default IPsec policies: the kernel answers {other:?}"),
        }
    }

    fn request(
        &self,
        request: Message,
        flags: u16,
    ) -> Result<impl Stream<Item = NetlinkMessage<Message>> + use<>> {
        let mut request = NetlinkMessage::from(request);
        request.header.flags = NLM_F_REQUEST | flags;
        self.0.request(request, SocketAddr::new(0, 0)).context("request the IPsec policies")
    }
}

fn refused(error: io::Error) -> Error {
    let remedy = match error.raw_os_error() {
        Some(EPERM) => {
            ": the process needs CAP_NET_ADMIN (AmbientCapabilities= and CapabilityBoundingSet= of a systemd unit, cap_add of a \
             container) in the user namespace of its network"
        }
        _ => "",
    };
    Error::new(error).context(format!("read the kernel's IPsec policies{remedy}"))
}
