//! Tells the kernel's connection tracking about TCP connections whose packets it does not see all.

mod message;

use std::io::ErrorKind;

use anyhow::{Context as _, Result};
use nix::{errno::Errno, libc};
use overlay_ebpf::flow::FlowKey;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// Longest answer in bytes: an error repeats the request.
const LONGEST: usize = 4096;

/// A netlink socket for changes of tracked connections, in the network namespace of the thread that opened it. The kernel
/// answers while it takes a request, so nothing is waited for.
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

    /// Ends the checks of TCP windows of the connection of `flow`, as the kernel does itself for connections that its flow table
    /// forwards (`nf_ct_set_tcp_be_liberal`). Needs `CAP_NET_ADMIN`. `false` when there is no such connection.
    /// Fails when the kernel refuses.
    pub(crate) fn make_lenient(&mut self, flow: &FlowKey) -> Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        let asked = self.ask(&message::lenient(flow, self.sequence));
        if asked.is_err() {
            // An answer that was not read must not be taken for that to the next request.
            self.socket = open()?;
        }
        match asked.context("change a tracked connection")? {
            0 => Ok(true),
            code if code == -libc::ENOENT => Ok(false),
            code => Err(Errno::from_raw(-code)).context("change a tracked connection"),
        }
    }

    /// Sends a request and returns the kernel's error number, 0 for success.
    fn ask(&self, request: &[u8]) -> Result<i32> {
        self.socket.send(request, 0)?;
        loop {
            let mut answer = Vec::with_capacity(LONGEST);
            match self.socket.recv(&mut answer, libc::MSG_DONTWAIT) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                received => received?,
            };
            if let Some((sequence, code)) = message::answer(&answer)
                && sequence == self.sequence
            {
                return Ok(code);
            }
        }
    }
}

fn open() -> Result<Socket> {
    let mut socket =
        Socket::new(NETLINK_NETFILTER).context("open a netlink socket for connection tracking")?;
    socket.bind(&SocketAddr::new(0, 0)).context("open a netlink socket for connection tracking")?;
    Ok(socket)
}
