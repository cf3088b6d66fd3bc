//! The start of an agent that takes over from the one that runs: the new agent's side of `handover`.

use std::{
    net::Ipv4Addr,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use ipnet::Ipv4Net;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::{net::UnixStream, time::timeout};
use tracing::{info, warn};

use crate::{
    control,
    datapath::Inherited,
    handover::{Channel, Message, Offer, REQUEST, VERSION},
    route::Subnet,
};

/// How long an answer of the running agent may take.
const ANSWER: Duration = Duration::from_secs(10);
/// How long its end may take, which removes what it made for services.
const END: Duration = Duration::from_secs(30);
/// How long the kernel may take from the end of a connection of a process to the end of the process.
const LAST_MOMENT: Duration = Duration::from_secs(2);

/// A running agent that has agreed to be replaced.
#[derive(Debug)]
pub(super) struct TakeOver {
    channel: Channel,
    process: OwnedFd,
    offer: Offer,
}

impl TakeOver {
    /// Asks the agent that listens at `path`; `None` when there is none. Fails when it does not agree.
    pub(super) async fn request(path: &Path, device: &str) -> Result<Option<Self>> {
        let context = || format!("take over from the agent at {}", path.display());
        let stream = match StdStream::connect(path) {
            Err(error) if control::is_absent(&error) => {
                info!("no agent answers at {}: there is nothing to take over", path.display());
                return Ok(None);
            }
            stream => stream.with_context(context)?,
        };
        stream.set_nonblocking(true).with_context(context)?;
        let mut channel = Channel::new(UnixStream::from_std(stream).with_context(context)?);
        let (pid, _) = channel.peer()?;
        let pid = pid
            .and_then(Pid::from_raw)
            .context("the agent runs in another PID namespace")
            .with_context(context)?;
        let process = pidfd_open(pid, PidfdFlags::empty()).with_context(context)?;
        channel.send_line(REQUEST, &[]).await.with_context(context)?;
        let answer = timeout(ANSWER, channel.receive()).await;
        let answer = answer.unwrap_or_else(|_| bail!("it does not answer")).with_context(context)?;
        let offer = match answer.map(|(message, _)| message) {
            Some(Message::Offer(offer)) => offer,
            Some(Message::Error(why)) => bail!("the running agent cannot be taken over: {why}"),
            other => bail!("the running agent cannot be taken over, it answers {other:?}"),
        };
        if offer.protocol != VERSION || offer.device != device {
            bail!(
                "the running agent cannot be taken over: it runs {} and speaks version {} of the protocol, not {device} and {VERSION}",
                offer.device,
                offer.protocol
            );
        }
        info!("taking over {} from process {}", offer.subnet, pid.as_raw_nonzero());
        Ok(Some(Self { channel, process, offer }))
    }

    /// Fails when this agent would be another host for its peers. `subnet` is the one that is asked for.
    pub(super) fn check(
        &self,
        network: Ipv4Net,
        public_ip: Ipv4Addr,
        port: u16,
        subnet: Option<Subnet>,
    ) -> Result<()> {
        let offer = &self.offer;
        let is_same = (network, public_ip, port) == (offer.network, offer.public_ip, offer.port);
        if !is_same || subnet.is_some_and(|subnet| subnet != offer.subnet) {
            let wanted = subnet.map_or_else(|| "any subnet".to_owned(), |subnet| subnet.to_string());
            bail!(
                "the running agent cannot be taken over: it is {} with {} in {}, port {}, and this one {public_ip} with {wanted} in \
                 {network}, port {port}: stop it first",
                offer.public_ip,
                offer.subnet,
                offer.network,
                offer.port,
            );
        }
        Ok(())
    }

    /// Makes the running agent stop moving packets, which wait in the returned descriptors from now on. There are none if it has ended.
    /// Fails when it refuses.
    pub(super) async fn take(&mut self) -> Result<Inherited> {
        match self.ask(Message::Take, ANSWER).await {
            Ok((Message::Descriptors(names), descriptors)) if names.len() == descriptors.len() => {
                Ok(Inherited::new(names.into_iter().zip(descriptors).collect()))
            }
            Ok((Message::Error(why), _)) => bail!("the running agent cannot be taken over: {why}"),
            Ok((other, _)) => bail!("the running agent cannot be taken over, it answers {other:?}"),
            Err(error) if self.has_ended(LAST_MOMENT).await => {
                warn!("the agent to take over from has ended, and packets may be lost: {error:#}");
                Ok(Inherited::default())
            }
            Err(error) => Err(error),
        }
    }

    /// Ends the other agent, and waits for its end. Fails when it goes on instead.
    pub(super) async fn finish(mut self) -> Result<()> {
        let refused = match self.ask(Message::Done, ANSWER).await {
            Ok((Message::Ended, _)) => None,
            Ok((other, _)) => Some(anyhow!("it answers {other:?}")),
            Err(error) => Some(error),
        };
        let limit = if refused.is_none() { END } else { LAST_MOMENT };
        match (self.has_ended(limit).await, refused) {
            (true, _) => Ok(()),
            (false, None) => {
                warn!("the agent that was taken over does not end");
                Ok(())
            }
            (false, Some(error)) => Err(error).context("the agent that was to be taken over goes on"),
        }
    }

    async fn ask(&mut self, message: Message, limit: Duration) -> Result<(Message, Vec<OwnedFd>)> {
        let exchange = async {
            self.channel.send(&message, &[]).await?;
            self.channel.receive().await?.context("it closed the connection")
        };
        timeout(limit, exchange).await.unwrap_or_else(|_| bail!("it does not answer within {limit:?}"))
    }

    /// Whether the other process ends within this time.
    async fn has_ended(&self, limit: Duration) -> bool {
        let Ok(process) = self.process.try_clone() else { return false };
        let wait = move || {
            let mut ended = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
            let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
            poll(&mut ended, limit).is_ok_and(|count| count > 0)
        };
        tokio::task::spawn_blocking(wait).await.unwrap_or(false)
    }
}
