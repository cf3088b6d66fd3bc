//! The frame of netlink messages (`struct nlmsghdr`, include/uapi/linux/netlink.h) of subsystems for which the netlink library has no types.

use nix::libc::NLM_F_REQUEST;

/// Length of `struct nlmsghdr` in bytes.
pub(crate) const HEADER: usize = 16;

/// A request. `flags` are those beside `NLM_F_REQUEST`.
pub(crate) fn request(kind: u16, flags: i32, sequence: u32, body: &[u8]) -> Vec<u8> {
    let length = HEADER + body.len();
    let mut message = Vec::with_capacity(length);
    message.extend((length as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(((NLM_F_REQUEST | flags) as u16).to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    message.extend(0_u32.to_ne_bytes());
    message.extend(body);
    message
}

/// The kind of an answer to the request with this number; `None` for another message.
pub(crate) fn kind_of_answer(message: &[u8], sequence: u32) -> Option<u16> {
    let kind = u16::from_ne_bytes(*message.get(4..)?.first_chunk()?);
    (number(message, 8)? == sequence).then_some(kind)
}

/// The 32 bits at `at`, in the byte order of this host.
pub(crate) fn number(message: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*message.get(at..)?.first_chunk()?))
}
