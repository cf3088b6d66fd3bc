//! Tells the kernel's connection tracking about connections whose packets it does not see all.

mod message;

use std::io::ErrorKind;

use anyhow::{Context as _, Result, bail};
use nix::{errno::Errno, libc};
use overlay_ebpf::{flow::FlowKey, wire::ipv4::PROTOCOL_TCP};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use self::message::Answer;

/// Longest answer in bytes: a connection with all its attributes, and the end of the request's processing.
const LONGEST: usize = 16 << 10;

/// A netlink socket for tracked connections, in the network namespace of the thread that opened it. The kernel answers while it
/// takes a request, so nothing is waited for.
#[derive(Debug)]
pub(crate) struct Conntrack {
    socket: Socket,
    sequence: u32,
}

impl Conntrack {
    /// Opens the socket. Fails when the kernel refuses one.
    pub(crate) fn open() -> Result<Self> {
        Ok(Self { socket: open()?, sequence: 0 })
    }

    /// Makes sure that connection tracking need not see all packets of the connection of `flow`: no helper reads what it carries
    /// (FTP, SIP), and TCP windows are not checked any more, as the kernel itself does for connections that its flow table forwards
    /// (`nf_ct_set_tcp_be_liberal`). Needs `CAP_NET_ADMIN`. `false` when there is no such connection, or a helper reads it.
    /// Fails when the kernel refuses.
    pub(crate) fn release(&mut self, flow: &FlowKey) -> Result<bool> {
        let is_free = match self.ask(|sequence| message::get(flow, sequence))? {
            Answer::Connection { has_helper } => !has_helper,
            Answer::Done => bail!("the kernel does not describe a tracked connection"),
            Answer::Error(error) => not_found(error)?,
        };
        if !is_free || flow.protocol != PROTOCOL_TCP {
            return Ok(is_free);
        }
        match self.ask(|sequence| message::lenient(flow, sequence))? {
            Answer::Done => Ok(true),
            Answer::Connection { .. } => bail!("the kernel describes a connection that it should change"),
            Answer::Error(error) => not_found(error),
        }
    }

    /// Sends a request and returns the answer.
    fn ask(&mut self, request: impl FnOnce(u32) -> Vec<u8>) -> Result<Answer> {
        self.sequence = self.sequence.wrapping_add(1);
        let answer = self.exchange(&request(self.sequence));
        if answer.is_err() {
            // An answer that was not read must not be taken for that to the next request.
            self.socket = open()?;
        }
        answer.context("ask for a tracked connection")
    }

    fn exchange(&self, request: &[u8]) -> Result<Answer> {
        self.socket.send(request, 0)?;
        loop {
            let mut messages = Vec::with_capacity(LONGEST);
            match self.socket.recv(&mut messages, libc::MSG_DONTWAIT) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                received => received?,
            };
            if let Some(answer) = message::answer(&messages, self.sequence) {
                return Ok(answer);
            }
        }
    }
}

/// `false` for a connection that is gone. Fails for another error.
fn not_found(error: Errno) -> Result<bool> {
    if error == Errno::ENOENT {
        return Ok(false);
    }
    Err(error).context("ask for a tracked connection")
}

fn open() -> Result<Socket> {
    let mut socket =
        Socket::new(NETLINK_NETFILTER).context("open a netlink socket for connection tracking")?;
    socket.bind(&SocketAddr::new(0, 0)).context("open a netlink socket for connection tracking")?;
    Ok(socket)
}
