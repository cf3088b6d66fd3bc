//! The conversation of two agents when one takes over from the other: `overlay-agent run --take-over`.
//!
//! It begins on the control socket with the request `{"version":1,"query":"take_over"}`. Each message is one line of JSON, and each side
//! waits for the answer of the other:
//!
//! | from | message | then |
//! |---|---|---|
//! | running agent | `offer` | it does not renew the lease any more, and forwards |
//! | new agent | `take` | it has acquired the lease and knows the routes |
//! | running agent | `descriptors`, with the descriptors (SCM_RIGHTS, unix(7)) | its threads have stopped |
//! | new agent | `done` | it forwards |
//! | running agent | `ended` | it ends and removes nothing |
//!
//! When the connection ends before `done`, the running agent goes on as before, with the descriptors that it still has.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::Ipv4Addr,
    os::fd::{BorrowedFd, OwnedFd},
};

use anyhow::{Context as _, Result, bail};
use ipnet::Ipv4Net;
use rustix::{
    cmsg_space,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recvmsg, sendmsg,
    },
};
use serde::{Deserialize, Serialize};
use tokio::{io::Interest, net::UnixStream};

use crate::route::Subnet;

/// The request. It has the form of a query.
pub(crate) const REQUEST: &str = "{\"version\":1,\"query\":\"take_over\"}\n";
/// Version of the messages behind the request.
pub(crate) const VERSION: u32 = 1;
/// Longest message in bytes.
const MAX_MESSAGE: usize = 16 << 10;
/// Most descriptors of a message: one queue, and a socket for each underlay device.
const MAX_DESCRIPTORS: usize = 80;

/// What the running agent is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Offer {
    /// [`VERSION`] of the running agent.
    pub(crate) protocol: u32,
    pub(crate) device: String,
    pub(crate) network: Ipv4Net,
    pub(crate) subnet: Subnet,
    pub(crate) port: u16,
    pub(crate) public_ip: Ipv4Addr,
}

/// A message of either side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Message {
    Offer(Offer),
    Take,
    /// The names of the descriptors that come with it, in their order.
    Descriptors(Vec<String>),
    Done,
    Ended,
    /// The reason why there is no take-over.
    Error(String),
}

/// One end of the conversation.
#[derive(Debug)]
pub(crate) struct Channel {
    stream: UnixStream,
    received: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Channel {
    /// The conversation on a connection that has carried the request, and no byte behind it.
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, received: Vec::new(), descriptors: Vec::new() }
    }

    /// The process at the other end, and its user.
    pub(crate) fn peer(&self) -> Result<(Option<i32>, u32)> {
        let peer = self.stream.peer_cred().context("identify the process at the other end")?;
        Ok((peer.pid().filter(|pid| *pid > 0), peer.uid()))
    }

    /// Sends a message with descriptors.
    pub(crate) async fn send(&mut self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let line = serde_json::to_string(message)? + "\n";
        self.send_line(&line, descriptors).await
    }

    /// Sends a line as it is.
    pub(crate) async fn send_line(&mut self, line: &str, mut descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            let write = || {
                let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
                    return Err(io::Error::other("too many descriptors"));
                }
                Ok(sendmsg(&self.stream, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL)?)
            };
            let written =
                self.stream.async_io(Interest::WRITABLE, write).await.context("send to the other agent")?;
            // They come with the first byte.
            descriptors = &[];
            rest = rest.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// The next message and its descriptors; `None` when the other end is closed. A call that is given up loses nothing.
    pub(crate) async fn receive(&mut self) -> Result<Option<(Message, Vec<OwnedFd>)>> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<_> = self.received.drain(..=end).collect();
                return Ok(Some((parse(&line)?, std::mem::take(&mut self.descriptors))));
            }
            if self.received.len() > MAX_MESSAGE {
                bail!("the other agent sends a message that is too long");
            }
            let mut buffer = [0; 4096];
            let read = || {
                let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let message = recvmsg(
                    &self.stream,
                    &mut [IoSliceMut::new(&mut buffer)],
                    &mut control,
                    RecvFlags::CMSG_CLOEXEC,
                )?;
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                        self.descriptors.extend(descriptors);
                    }
                }
                Ok(message.bytes)
            };
            match self.stream.async_io(Interest::READABLE, read).await {
                Ok(0) => return Ok(None),
                Ok(length) => self.received.extend_from_slice(buffer.get(..length).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error).context("receive from the other agent"),
            }
        }
    }
}

/// An agent that does not know the request answers as to any query.
fn parse(line: &[u8]) -> Result<Message> {
    #[derive(Deserialize)]
    struct Answer {
        error: String,
    }
    let parsed = serde_json::from_slice(line);
    match parsed.or_else(|_| serde_json::from_slice(line).map(|Answer { error }| Message::Error(error))) {
        Ok(message) => Ok(message),
        Err(_) => bail!("the other agent does not speak version {VERSION} of the take-over protocol"),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, os::fd::AsFd as _};

    use super::*;

    #[tokio::test]
    async fn messages_and_their_descriptors_cross() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (Channel::new(a), Channel::new(b));
        let offer = Message::Offer(Offer {
            protocol: VERSION,
            device: "ovl0".to_owned(),
            network: "10.244.0.0/16".parse().unwrap(),
            subnet: "10.244.1.0/24".parse().unwrap(),
            port: 8285,
            public_ip: Ipv4Addr::new(192, 168, 77, 1),
        });
        a.send(&offer, &[]).await.unwrap();
        let (message, descriptors) = b.receive().await.unwrap().unwrap();
        assert_eq!((message, descriptors.len()), (offer, 0));
        let file = std::fs::File::open("/proc/self/comm").unwrap();
        let names = Message::Descriptors(vec!["tun-ovl0".to_owned(), "udp".to_owned()]);
        a.send(&names, &[file.as_fd(), file.as_fd()]).await.unwrap();
        let (message, mut descriptors) = b.receive().await.unwrap().unwrap();
        assert_eq!((message, descriptors.len()), (names, 2));
        let mut text = String::new();
        std::fs::File::from(descriptors.pop().unwrap()).read_to_string(&mut text).unwrap();
        assert!(!text.is_empty());
        drop(a);
        assert!(b.receive().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_message_may_come_in_pieces_and_may_be_none() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (Channel::new(a), Channel::new(b));
        a.send_line("\"ta", &[]).await.unwrap();
        let early = tokio::time::timeout(std::time::Duration::from_millis(20), b.receive()).await;
        assert!(early.is_err(), "{early:?}");
        a.send_line("ke\"\n{\"version\":1,\"error\":\"invalid request\"}\n", &[]).await.unwrap();
        assert_eq!(b.receive().await.unwrap().unwrap().0, Message::Take);
        assert_eq!(b.receive().await.unwrap().unwrap().0, Message::Error("invalid request".to_owned()));
        for invalid in ["{}\n", "\"status\"\n", "\u{0}\n"] {
            a.send_line(invalid, &[]).await.unwrap();
            assert!(b.receive().await.unwrap_err().to_string().contains("version 1"), "{invalid:?}");
        }
        a.send_line(&"x".repeat(2 * MAX_MESSAGE), &[]).await.unwrap();
        assert!(b.receive().await.unwrap_err().to_string().contains("too long"));
    }
}
