//! The queue of the overlay device: a descriptor that this agent opened, or one that an earlier agent or systemd kept open.
//!
//! Packets wait in the queue of a tun device as long as any process has its descriptor open, whether it reads or not.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use tun_rs::{SyncDevice, VIRTIO_NET_HDR_LEN, VirtioNetHdr, checksum, gso_split};

/// `flags` of the virtio header: the checksum has to be completed.
const NEEDS_CSUM: u8 = 1;
/// `gso_type`: no super-packet.
const GSO_NONE: u8 = 0;
/// `gso_type`: UDP datagrams of equal length.
const GSO_UDP: u8 = 5;
/// Length of a UDP header in bytes.
const UDP_HEADER: usize = 8;
/// Where the length of a TCP header is (RFC 9293 section 3.1), and the shortest one, in bytes.
const TCP_DATA_OFFSET: usize = 12;
const TCP_HEADER: usize = 20;

/// An open, non-blocking descriptor of a tun device whose packets have a virtio header.
#[derive(Debug)]
pub(crate) struct Queue {
    fd: OwnedFd,
    id: u64,
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Queue {
    /// The queue of a device that this process has opened.
    pub(crate) fn of(device: &SyncDevice) -> io::Result<Self> {
        Self::new(device.as_fd().try_clone_to_owned()?)
    }

    /// The queue behind a descriptor of a tun device.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        static OPENED: AtomicU64 = AtomicU64::new(0);
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd, id: OPENED.fetch_add(1, Relaxed) })
    }

    /// A number that no other queue of this process has.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The present name of the device; `None` when it was removed.
    pub(crate) fn device_name(&self) -> Option<String> {
        device_of(self.as_fd())
    }

    /// Reads a packet into `raw`, with its virtio header, and splits a super-packet into the packets that it stands for, with their
    /// checksums complete. Returns how many of `packets` there are; `sizes` has their lengths.
    /// Fails with the kernel's error, or without one when this packet cannot be split.
    pub(super) fn receive(
        &self,
        raw: &mut [u8],
        packets: &mut [Vec<u8>],
        sizes: &mut [usize],
    ) -> io::Result<usize> {
        let len = rustix::io::read(&self.fd, &mut *raw)?;
        split(raw.get_mut(..len).unwrap_or_default(), packets, sizes)
    }

    /// Writes a packet with its virtio header.
    pub(super) fn send(&self, packet: &[u8]) -> io::Result<()> {
        // A packet is taken whole or not at all.
        rustix::io::write(&self.fd, packet)?;
        Ok(())
    }
}

/// The name of the device that a descriptor belongs to; `None` when it is none of a tun device, or that was removed.
pub(crate) fn device_of(fd: BorrowedFd<'_>) -> Option<String> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    let name = info.lines().find_map(|line| line.strip_prefix("iff:"))?.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

/// Copies a packet that was read to the first of `packets`, or the segments of a super-packet to as many of them.
fn split(raw: &mut [u8], packets: &mut [Vec<u8>], sizes: &mut [usize]) -> io::Result<usize> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut header = VirtioNetHdr::decode(raw)?;
    let packet = raw.get_mut(VIRTIO_NET_HDR_LEN..).filter(|packet| !packet.is_empty());
    let packet = packet.ok_or_else(|| invalid("no packet behind the virtio header"))?;
    let start = usize::from(header.csum_start);
    if header.gso_type != GSO_NONE {
        // The kernel's length of the headers may be that of a whole segment.
        let transport = match header.gso_type {
            GSO_UDP => UDP_HEADER,
            _ => {
                let offset =
                    packet.get(start + TCP_DATA_OFFSET).map_or(0, |offset| usize::from(offset >> 4) * 4);
                if offset < TCP_HEADER {
                    return Err(invalid("a TCP header is too short"));
                }
                offset
            }
        };
        let headers = u16::try_from(start + transport).map_err(|_| invalid("headers are too long"))?;
        header.hdr_len = headers;
        let is_v6 = packet.first().is_some_and(|first| first >> 4 == 6);
        return gso_split(packet, header, packets, sizes, 0, is_v6);
    }
    if header.flags & NEEDS_CSUM != 0 {
        complete_checksum(packet, start, start + usize::from(header.csum_offset))
            .ok_or_else(|| invalid("the checksum is outside of the packet"))?;
    }
    let (into, size) = packets.first_mut().zip(sizes.first_mut()).ok_or_else(|| invalid("no buffers"))?;
    let into = into.get_mut(..packet.len()).ok_or_else(|| invalid("a packet is too long"))?;
    into.copy_from_slice(packet);
    *size = packet.len();
    Ok(1)
}

/// Completes the Internet checksum of what begins at `start`. Its field at `field` has the sum of the pseudo header.
fn complete_checksum(packet: &mut [u8], start: usize, field: usize) -> Option<()> {
    let pseudo_header = std::mem::take(packet.get_mut(field..)?.first_chunk_mut::<2>()?);
    let sum = checksum(packet.get(start..)?, u64::from(u16::from_be_bytes(pseudo_header)));
    *packet.get_mut(field..)?.first_chunk_mut()? = (!sum).to_be_bytes();
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split_all(mut raw: Vec<u8>) -> io::Result<Vec<Vec<u8>>> {
        let (mut packets, mut sizes) = (vec![vec![0; 65535]; 128], vec![0; 128]);
        let count = split(&mut raw, &mut packets, &mut sizes)?;
        Ok(packets.into_iter().zip(sizes).take(count).map(|(packet, size)| packet[..size].to_vec()).collect())
    }

    /// UDP from 10.244.1.2 port 1 to 10.244.2.2 port 2 with `payload` and the pseudo header's sum in the checksum field.
    fn unfinished_udp(payload: &[u8]) -> Vec<u8> {
        let len = 8 + payload.len() as u16;
        let mut packet =
            vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 244, 1, 2, 10, 244, 2, 2, 0, 1, 0, 2];
        packet[2..4].copy_from_slice(&(20 + len).to_be_bytes());
        packet.extend(len.to_be_bytes());
        // 0x0af4 + 0x0102 + 0x0af4 + 0x0202 + 17 + the length.
        packet.extend((0x18ec + 17 + len).to_be_bytes());
        packet.extend(payload);
        packet
    }

    fn with_header(flags: u8, gso_type: u8, gso_size: u16, packet: &[u8]) -> Vec<u8> {
        let mut raw = vec![flags, gso_type, 0, 0];
        for field in [gso_size, 20, 6] {
            raw.extend(field.to_ne_bytes());
        }
        raw.extend(packet);
        raw
    }

    fn sum(words: &[u8]) -> u16 {
        let sum = words
            .chunks(2)
            .map(|word| u32::from(word[0]) << 8 | word.get(1).map_or(0, |byte| u32::from(*byte)));
        let sum: u32 = sum.sum();
        ((sum & 0xffff) + (sum >> 16)) as u16
    }

    #[test]
    fn a_packet_is_passed_on_and_an_unfinished_checksum_completed() {
        let packet = unfinished_udp(b"payload");
        assert_eq!(split_all(with_header(0, 0, 0, &packet)).unwrap(), std::slice::from_ref(&packet));
        let split = split_all(with_header(NEEDS_CSUM, 0, 0, &packet)).unwrap();
        // With the pseudo header, all words add up to 0xffff (RFC 768).
        let pseudo_header = [10, 244, 1, 2, 10, 244, 2, 2, 0, 17, 0, 15];
        assert_eq!(sum(&[&pseudo_header, &split[0][20..]].concat()), 0xffff);
        assert_eq!(split[0][28..], packet[28..]);
    }

    #[test]
    fn a_super_packet_is_split() {
        let payload: Vec<u8> = (0..=255).collect();
        let split = split_all(with_header(NEEDS_CSUM, GSO_UDP, 100, &unfinished_udp(&payload))).unwrap();
        let payloads: Vec<_> = split.iter().map(|packet| packet[28..].to_vec()).collect();
        assert_eq!(payloads, [&payload[..100], &payload[100..200], &payload[200..]]);
        let lengths: Vec<_> =
            split.iter().map(|packet| [packet[2..4].to_vec(), packet[24..26].to_vec()]).collect();
        assert_eq!(
            lengths,
            [[vec![0, 128], vec![0, 108]], [vec![0, 128], vec![0, 108]], [vec![0, 84], vec![0, 64]]]
        );
    }

    #[test]
    fn what_cannot_be_split_is_an_error_of_this_packet_only() {
        let packet = unfinished_udp(b"payload");
        for raw in [
            Vec::new(),
            with_header(0, 0, 0, &[]),
            with_header(NEEDS_CSUM, 0, 0, &packet[..27]),
            with_header(NEEDS_CSUM, 1, 100, &packet),
            with_header(NEEDS_CSUM, GSO_UDP, 0, &packet),
        ] {
            let error = split_all(raw).unwrap_err();
            assert_eq!(error.raw_os_error(), None, "{error}");
        }
    }

    #[test]
    fn only_a_tun_descriptor_has_a_device() {
        assert_eq!(device_of(fs::File::open("/proc/self/exe").unwrap().as_fd()), None);
    }

    proptest! {
        #[test]
        fn no_bytes_of_a_device_make_it_panic(raw in proptest::collection::vec(any::<u8>(), 0..200), kind in 0usize..6) {
            let mut raw = raw;
            if let Some(gso_type) = raw.get_mut(1) {
                *gso_type = [0, 1, 4, 5, 0x81, 0x85][kind];
            }
            let _ = split_all(raw);
        }
    }
}
