//! Messages of sock_diag about UDP sockets (include/uapi/linux/sock_diag.h, inet_diag.h), as far as they are needed here.

use nix::{
    errno::Errno,
    libc::{AF_INET, NLM_F_ACK, NLM_F_DUMP, NLMSG_DONE, NLMSG_ERROR},
};
use overlay_ebpf::service::abi::Address;

use crate::netlink_frame::{HEADER, kind_of_answer, number, request};

/// `SOCK_DIAG_BY_FAMILY`.
const DESCRIBE: u16 = 20;
/// `SOCK_DESTROY`.
const DESTROY: u16 = 21;
/// `IPPROTO_UDP`.
const UDP: u8 = 17;
/// The bit of `TCP_ESTABLISHED`, in which connected UDP sockets are.
const CONNECTED: u32 = 1 << 1;

/// Length of `struct inet_diag_sockid` in bytes: ports, two addresses of 16 bytes, device, cookie.
const ID: usize = 48;
/// Where it stands in `struct inet_diag_msg`, and how long that is.
const ID_AT: usize = 4;
const DESCRIPTION: usize = 72;
/// Where the port and the address of the peer stand in the former.
const PEER_PORT: usize = 2;
const PEER_ADDRESS: usize = 20;
/// Where its cookie stands in it, the lower half first.
const COOKIE: usize = 40;

/// A connected socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Socket {
    /// `AF_INET` or `AF_INET6`.
    family: u8,
    /// What names it to the kernel: the cookie keeps it apart from a later one with the same addresses.
    id: [u8; ID],
    /// Its peer, if that is an IPv4 address.
    pub(super) peer: Option<Address>,
}

impl Socket {
    /// The number of the socket: no other of this machine has it.
    pub(super) fn cookie(&self) -> u64 {
        let half = |at| u64::from(number(&self.id, at).unwrap_or_default());
        half(COOKIE) | half(COOKIE + 4) << 32
    }
}

/// The request to describe all connected UDP sockets of a family.
pub(super) fn describe_all(family: i32, sequence: u32) -> Vec<u8> {
    request(DESCRIBE, NLM_F_DUMP, sequence, &selection(family as u8, CONNECTED, &[0; ID]))
}

/// The request to end the connection of a socket.
pub(super) fn destroy(socket: &Socket, sequence: u32) -> Vec<u8> {
    // With all bits of states, as ss(8) does.
    request(DESTROY, NLM_F_ACK, sequence, &selection(socket.family, u32::MAX, &socket.id))
}

/// `struct inet_diag_req_v2`.
fn selection(family: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    [&[family, UDP, 0, 0][..], &states.to_ne_bytes(), id].concat()
}

/// An answer of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Socket(Socket),
    /// The request was carried out: no more answers follow.
    Done,
    /// It was not.
    Error(Errno),
}

/// The answers to the request with this number in what was received at once. What cannot be read is left out.
pub(super) fn answers(mut received: &[u8], sequence: u32) -> Vec<Answer> {
    let mut answers = Vec::new();
    while let Some(length) = number(received, 0) {
        let length = length as usize;
        let Some(message) = received.get(..length).filter(|message| message.len() >= HEADER) else { break };
        answers.extend(answer(message, sequence));
        received = received.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    answers
}

fn answer(message: &[u8], sequence: u32) -> Option<Answer> {
    let kind = kind_of_answer(message, sequence)?;
    // Both have an error number, which is 0 for none.
    if [NLMSG_ERROR, NLMSG_DONE].contains(&i32::from(kind)) {
        return Some(match number(message, HEADER)? as i32 {
            code if code < 0 => Answer::Error(Errno::from_raw(code.saturating_neg())),
            _ => Answer::Done,
        });
    }
    let body = message.get(HEADER..).filter(|_| kind == DESCRIBE)?;
    socket(body).map(Answer::Socket)
}

fn socket(body: &[u8]) -> Option<Socket> {
    // What follows is of no interest.
    let body = body.get(..DESCRIPTION)?;
    let family = *body.first()?;
    let id: [u8; ID] = *body.get(ID_AT..)?.first_chunk()?;
    let port: [u8; 2] = *id.get(PEER_PORT..)?.first_chunk()?;
    let ip: [u8; 16] = *id.get(PEER_ADDRESS..)?.first_chunk()?;
    let ip = match i32::from(family) == AF_INET {
        true => ip.first_chunk::<4>().copied(),
        false => std::net::Ipv6Addr::from(ip).to_ipv4_mapped().map(|ip| ip.octets()),
    };
    Some(Socket { family, id, peer: ip.map(|ip| Address { ip, port }) })
}

#[cfg(test)]
mod tests {
    use nix::libc::AF_INET6;

    use super::*;

    const ENDPOINT: Address = Address { ip: [10, 244, 1, 2], port: [0x1f, 0x90] };

    fn id(peer: [u8; 16]) -> [u8; ID] {
        let mut id = [0xee; ID];
        id[2..4].copy_from_slice(&ENDPOINT.port);
        id[20..36].copy_from_slice(&peer);
        id[40..44].copy_from_slice(&7_u32.to_ne_bytes());
        id[44..48].copy_from_slice(&1_u32.to_ne_bytes());
        id
    }

    fn mapped() -> [u8; 16] {
        std::net::Ipv4Addr::from(ENDPOINT.ip).to_ipv6_mapped().octets()
    }

    /// A description as the kernel writes it, with the attribute of what is shut down.
    fn description(family: i32, id: &[u8; ID]) -> Vec<u8> {
        let body = [&[family as u8, 1, 0, 0][..], id, &[0; 20], &[5, 0, 8, 0, 0, 0, 0, 0]].concat();
        let mut message = request(DESCRIBE, 0, 9, &body);
        message[6..8].fill(0);
        message
    }

    #[test]
    fn requests_have_the_layout_of_the_kernel() {
        let hex: String = describe_all(AF_INET6, 9).iter().map(|byte| format!("{byte:02x}")).collect();
        let header = "48000000 1400 0103 09000000 00000000";
        let expected = format!("{header} 0a110000 02000000 {}", "00".repeat(48)).replace(' ', "");
        assert_eq!(hex, expected);

        let socket = Socket { family: 2, id: id([7; 16]), peer: None };
        let message = destroy(&socket, 9);
        assert_eq!(message.len(), 16 + 56);
        assert_eq!(message[4..8], [21, 0, 5, 0]);
        assert_eq!(message[16..24], [2, 17, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(message[24..], id([7; 16]));
    }

    #[test]
    fn sockets_are_read_with_their_peer_and_cookie() {
        let mut v4 = [0; 16];
        v4[..4].copy_from_slice(&ENDPOINT.ip);
        let of_ipv6 = [0x20; 16];
        for (family, ip, peer) in
            [(AF_INET, v4, Some(ENDPOINT)), (AF_INET6, mapped(), Some(ENDPOINT)), (AF_INET6, of_ipv6, None)]
        {
            let found = answers(&description(family, &id(ip)), 9);
            assert_eq!(found, [Answer::Socket(Socket { family: family as u8, id: id(ip), peer })]);
            let [Answer::Socket(socket)] = found[..] else { panic!("{found:?}") };
            assert_eq!(socket.cookie(), (1 << 32) + 7);
        }
    }

    #[test]
    fn several_messages_and_the_end_are_read() {
        let done = request(3, 0, 9, &[0; 4]);
        let error = request(2, 0, 9, &[&(-1_i32).to_ne_bytes()[..], &[0; 16]].concat());
        let other = request(3, 0, 8, &[0; 4]);
        let received = [description(AF_INET6, &id(mapped())), other, done, error].concat();
        let found = answers(&received, 9);
        assert!(
            matches!(found[..], [Answer::Socket(_), Answer::Done, Answer::Error(Errno::EPERM)]),
            "{found:?}"
        );
    }

    #[test]
    fn malformed_messages_do_no_harm() {
        let whole = description(AF_INET, &id(mapped()));
        for length in 0..whole.len() {
            assert!(answers(&whole[..length], 9).is_empty(), "{length}");
            // Cut, and its header says so, too.
            let mut cut = whole[..length].to_vec();
            if let Some(header) = cut.first_chunk_mut::<4>() {
                *header = (length as u32).to_ne_bytes();
            }
            let expected = usize::from(length >= HEADER + DESCRIPTION);
            assert_eq!(answers(&cut, 9).len(), expected, "{length}");
        }
        for _ in 0..20_000 {
            let mut message = [whole.as_slice(), &whole].concat();
            for _ in 0..rand::random_range(1..8) {
                let at = rand::random_range(0..message.len());
                message[at] = rand::random();
            }
            // It must end, and not panic.
            answers(&message, 9);
        }
    }
}
