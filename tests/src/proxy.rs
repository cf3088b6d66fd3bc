//! A small UDP proxy that behaves as flannel's does: one packet per system call, a buffer of MTU size, checksums untouched.
//!
//! flannel's proxy (backend/udp/proxy_amd64.c) reads a packet from a plain tun device, decrements its TTL and sends it to the host
//! of its destination; what it receives, it writes to the device after another decrement. What does not fit its buffer is cut.

use std::{
    net::{Ipv4Addr, UdpSocket},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, poll};
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use crate::topology::{NETWORK, OVERLAY_MTU, Side};

/// Name of its device, as flannel's.
pub const DEVICE: &str = "flannel0";
/// UDP port of the network.
const PORT: u16 = 8285;
/// How often the threads look whether they should end.
const TICK: Duration = Duration::from_millis(TICK_MILLISECONDS as u64);
/// The same in milliseconds.
const TICK_MILLISECONDS: u8 = 50;

/// A running proxy. Dropped, it ends, and its device with it.
#[derive(Debug)]
pub struct FlannelProxy {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl FlannelProxy {
    /// Starts a proxy on the host of `side` whose only peer is at the underlay address `peer`.
    pub fn start(side: &Side, peer: Ipv4Addr) -> Result<Self> {
        let underlay = side.underlay;
        let (device, socket) = side.host.run(|| {
            let device = DeviceBuilder::new().name(DEVICE).layer(Layer::L3).build_sync();
            let device = device.context("create the device of the proxy")?;
            device.set_nonblocking(true).context("make the device of the proxy non-blocking")?;
            let socket = UdpSocket::bind((underlay, PORT)).context("bind the socket of the proxy")?;
            socket.set_read_timeout(Some(TICK)).context("set the read timeout")?;
            anyhow::Ok((device, socket))
        })??;
        side.host.tool(&format!("ip address add {}/32 dev {DEVICE}", side.host_address))?;
        side.host.tool(&format!("ip link set {DEVICE} mtu {OVERLAY_MTU} up"))?;
        side.host.tool(&format!("ip route add {NETWORK} dev {DEVICE}"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (device, socket) = (Arc::new(device), Arc::new(socket));
        let (out_device, out_socket, out_stop) =
            (Arc::clone(&device), Arc::clone(&socket), Arc::clone(&stop));
        let in_stop = Arc::clone(&stop);
        let threads = vec![
            thread::spawn(move || egress(&out_device, &out_socket, peer, &out_stop)),
            thread::spawn(move || ingress(&device, &socket, &in_stop)),
        ];
        Ok(Self { stop, threads })
    }
}

impl Drop for FlannelProxy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that panicked has printed why.
            let _ = thread.join();
        }
    }
}

fn egress(device: &SyncDevice, socket: &UdpSocket, peer: Ipv4Addr, stop: &AtomicBool) {
    let mut buffer = [0; OVERLAY_MTU];
    while !stop.load(Ordering::Relaxed) {
        match device.recv(&mut buffer) {
            Ok(length) => {
                if let Some(packet) = buffer.get_mut(..length)
                    && decrement_ttl(packet)
                {
                    // As with flannel, a packet that cannot be sent is lost.
                    let _ = socket.send_to(packet, (peer, PORT));
                }
            }
            Err(_) => wait(device),
        }
    }
}

/// Waits until the device has a packet, and looks again after a while, in case the proxy should end.
fn wait(device: &SyncDevice) {
    let mut events = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
    if poll(&mut events, TICK_MILLISECONDS).is_err() {
        thread::sleep(TICK);
    }
}

fn ingress(device: &SyncDevice, socket: &UdpSocket, stop: &AtomicBool) {
    let mut buffer = [0; OVERLAY_MTU];
    while !stop.load(Ordering::Relaxed) {
        // What is longer than the buffer is cut.
        let Ok(length) = socket.recv(&mut buffer) else { continue };
        if let Some(packet) = buffer.get_mut(..length)
            && decrement_ttl(packet)
        {
            let _ = device.send(packet);
        }
    }
}

/// Decrements the TTL of an IPv4 packet and updates the checksum (RFC 1141); `false` for another packet, or when it ends here.
fn decrement_ttl(packet: &mut [u8]) -> bool {
    let [version, _, _, _, _, _, _, _, ttl, _, high, low, ..] = packet else { return false };
    if *version >> 4 != 4 || *ttl <= 1 {
        return false;
    }
    *ttl -= 1;
    let sum = u32::from(u16::from_be_bytes([*high, *low])) + 0x0100;
    [*high, *low] = ((sum + (sum >> 16)) as u16).to_be_bytes();
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ttl_ends_at_one_and_the_checksum_follows() {
        let mut packet = [0x45, 0, 0, 84, 0, 0, 0x40, 0, 64, 1, 0x21, 0xbe, 10, 244, 1, 2, 10, 244, 2, 2];
        assert!(decrement_ttl(&mut packet));
        assert_eq!((packet[8], packet[10], packet[11]), (63, 0x22, 0xbe));
        packet[8] = 1;
        assert!(!decrement_ttl(&mut packet) && !decrement_ttl(&mut packet[..8]));
    }
}
