//! Header fields and checksums read from bytes, without the packet core.

/// The ones' complement sum of `bytes` (RFC 1071), not inverted.
pub(crate) fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| match *pair {
        [high, low] => u64::from(high) * 256 + u64::from(low),
        [high] => u64::from(high) * 256,
        _ => 0,
    });
    let mut sum: u64 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).expect("the sum is folded")
}

/// The 16 bits at `at`, big endian.
pub(crate) fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn address(bytes: &[u8], at: usize) -> [u8; 4] {
    [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]
}

/// An IPv4 packet of which at least 20 bytes can be seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet<'a>(&'a [u8]);

impl<'a> Packet<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Option<Self> {
        (bytes.len() >= 20).then_some(Self(bytes))
    }

    pub(crate) fn version(self) -> u8 {
        self.0[0] >> 4
    }

    pub(crate) fn header_len(self) -> usize {
        usize::from(self.0[0] % 16) * 4
    }

    pub(crate) fn tos(self) -> u8 {
        self.0[1]
    }

    pub(crate) fn total_len(self) -> usize {
        word(self.0, 2).into()
    }

    /// Flags and fragment offset.
    pub(crate) fn fragment_word(self) -> u16 {
        word(self.0, 6)
    }

    pub(crate) fn dont_fragment(self) -> bool {
        self.fragment_word() & 0x4000 != 0
    }

    /// The fragment offset in bytes.
    pub(crate) fn fragment_offset(self) -> usize {
        usize::from(self.fragment_word() & 0x1fff) * 8
    }

    /// Whether it is a piece of a packet.
    pub(crate) fn is_fragment(self) -> bool {
        self.fragment_word() & 0x3fff != 0
    }

    pub(crate) fn ttl(self) -> u8 {
        self.0[8]
    }

    pub(crate) fn protocol(self) -> u8 {
        self.0[9]
    }

    pub(crate) fn source(self) -> [u8; 4] {
        address(self.0, 12)
    }

    pub(crate) fn destination(self) -> [u8; 4] {
        address(self.0, 16)
    }

    /// What can be seen behind the header.
    pub(crate) fn transport(self) -> &'a [u8] {
        self.0.get(self.header_len()..).unwrap_or_default()
    }

    /// The sum of the first 20 bytes; all ones in a valid header without options.
    pub(crate) fn header_sum(self) -> u16 {
        sum(&self.0[..20])
    }

    /// Whether the TCP or UDP checksum holds the bare sum of the pseudo header, or cannot be seen.
    pub(crate) fn is_unfinished(self) -> bool {
        let at = match self.protocol() {
            6 => 16,
            17 => 6,
            _ => return false,
        };
        let Some(length) = self.total_len().checked_sub(self.header_len()) else { return false };
        if self.is_fragment() || length < at + 2 {
            return false;
        }
        if self.transport().len() < at + 2 {
            return true;
        }
        let field = word(self.transport(), at);
        let length = u16::try_from(length).expect("a length of 16 bits").to_be_bytes();
        field != 0 && field == sum(&[&self.0[12..20], &[0, self.protocol()], &length].concat())
    }
}
