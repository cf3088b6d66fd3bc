//! What a socket remembers: which virtual address stands for which endpoint. Lives and ends with the socket.

use bytemuck::{Pod, Zeroable};

use super::abi::{Address, Backend};

/// Nanoseconds after which a connection that its program gives up counts as one that the endpoint did not answer. TCP repeats its first
/// packet after one second (RFC 6298 section 2).
pub const ANSWER_DUE: u64 = 1_000_000_000;

/// Endpoints that an unconnected UDP socket remembers, one or more for each service that it sends to. A socket that sends to more
/// forgets the oldest, whose late replies then have the endpoint's address.
pub const REMEMBERED: usize = 16;

/// A virtual address that was replaced by an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Translation {
    /// What the program connected or sent to.
    pub from: Address,
    /// Where that went.
    pub to: Address,
    /// [`Backend::id`] of the endpoint.
    pub backend: u32,
    state: u32,
}

impl Translation {
    const NONE: u32 = 0;
    const CURRENT: u32 = 1;
    /// New datagrams go elsewhere, replies are still expected.
    const REPLIES: u32 = 2;

    /// A translation of new connections or datagrams.
    #[inline(always)]
    pub const fn new(from: Address, backend: &Backend) -> Self {
        Self { from, to: backend.address, backend: backend.id, state: Self::CURRENT }
    }

    /// The endpoint whose connections this is one of, if this is a translation.
    #[inline(always)]
    pub const fn counted(&self) -> Option<u32> {
        match self.state {
            Self::NONE => None,
            _ => Some(self.backend),
        }
    }

    /// The virtual address that stands for `address`.
    #[inline(always)]
    pub fn back(&self, address: Address) -> Option<Address> {
        (self.state != Self::NONE && self.to == address).then_some(self.from)
    }

    #[inline(always)]
    fn is_current(&self, from: Address) -> bool {
        self.state == Self::CURRENT && self.from == from
    }
}

/// A connected socket: its translation, and for TCP what became of the connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Connection {
    /// The virtual address and its endpoint.
    pub translation: Translation,
    /// [`super::abi::ServiceEntry::service`] of the virtual port.
    pub service: u32,
    /// When the first packet was sent, in nanoseconds of the monotonic clock.
    started: u64,
    phase: u32,
    reserved: u32,
}

impl Connection {
    /// Nothing is expected: no packet was sent, the outcome is known, or this is UDP.
    const SETTLED: u32 = 0;
    const CONNECTING: u32 = 1;

    /// A connection of which nothing was sent yet.
    #[inline(always)]
    pub const fn new(from: Address, backend: &Backend, service: u32) -> Self {
        let translation = Translation::new(from, backend);
        Self { translation, service, started: 0, phase: Self::SETTLED, reserved: 0 }
    }

    /// The first packet is sent. Returns whether that is of interest.
    #[inline(always)]
    pub fn start(&mut self, now: u64) -> bool {
        if self.translation.counted().is_none() {
            return false;
        }
        (self.started, self.phase) = (now, Self::CONNECTING);
        true
    }

    /// The endpoint accepts. Returns the nanoseconds since the start, the first time.
    #[inline(always)]
    pub fn establish(&mut self, now: u64) -> Option<u64> {
        self.settle().then(|| now.saturating_sub(self.started))
    }

    /// The connection is closed. Returns whether it failed: whether nothing else was known before.
    #[inline(always)]
    pub fn fail(&mut self) -> bool {
        self.settle()
    }

    /// The program closes the socket. Returns whether the endpoint had time to answer and did not.
    #[inline(always)]
    pub fn abandon(&mut self, now: u64) -> bool {
        self.settle() && now.saturating_sub(self.started) >= ANSWER_DUE
    }

    #[inline(always)]
    fn settle(&mut self) -> bool {
        let was_connecting = self.phase == Self::CONNECTING;
        self.phase = Self::SETTLED;
        was_connecting
    }
}

/// Translations of an unconnected UDP socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Translations {
    /// Index of the one that is replaced next, less than [`REMEMBERED`].
    next: u32,
    /// Index of the one that was used last.
    last: u32,
    /// All of them.
    pub all: [Translation; REMEMBERED],
}

impl Translations {
    /// The endpoint to which datagrams for a virtual address go.
    #[inline(always)]
    pub fn current(&mut self, from: Address) -> Option<Translation> {
        for (index, translation) in (0..).zip(&self.all) {
            if translation.is_current(from) {
                self.last = index;
                return Some(*translation);
            }
        }
        None
    }

    /// Sends datagrams for the address elsewhere from now on, and still expects replies.
    #[inline(always)]
    pub fn retire(&mut self, from: Address) {
        for translation in &mut self.all {
            if translation.is_current(from) {
                translation.state = Translation::REPLIES;
            }
        }
    }

    /// Remembers a translation. Returns the one that is forgotten for it; its state may be that of none.
    #[inline(always)]
    pub fn add(&mut self, translation: Translation) -> Translation {
        let index = self.next as usize % REMEMBERED;
        self.last = index as u32;
        self.next = (index as u32 + 1) % REMEMBERED as u32;
        match self.all.get_mut(index) {
            Some(place) => core::mem::replace(place, translation),
            None => Translation::default(),
        }
    }

    /// The virtual address that stands for `address`. When several do, the one that was sent to last.
    #[inline(always)]
    pub fn back(&self, address: Address) -> Option<Address> {
        let last = self.all.get(self.last as usize % REMEMBERED).and_then(|last| last.back(address));
        if last.is_some() {
            return last;
        }
        for translation in &self.all {
            if let Some(from) = translation.back(address) {
                return Some(from);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(ip: [u8; 4], port: u16) -> Address {
        Address { ip, port: port.to_be_bytes() }
    }

    fn endpoint(number: u8) -> Backend {
        Backend { address: address([10, 244, 1, number], 53), weight: 1, id: u32::from(number) }
    }

    fn virtual_address(number: u8) -> Address {
        address([10, 251, 0, number], 53)
    }

    #[test]
    fn nothing_is_translated_at_first() {
        let mut none = Translations::default();
        assert_eq!(none.current(Address::default()), None);
        assert_eq!(none.back(Address::default()), None);
        assert_eq!(Translation::default().back(Address::default()), None);
        assert_eq!(Translation::default().counted(), None);
    }

    #[test]
    fn a_connection_has_one_outcome() {
        let new = Connection::new(virtual_address(1), &endpoint(1), 5);
        let started = || {
            let mut connection = new;
            assert!(connection.start(1_000));
            connection
        };
        let mut established = started();
        assert_eq!(established.establish(3_500), Some(2_500));
        assert_eq!(established.establish(9_000), None);
        assert!(!established.fail() && !established.abandon(u64::MAX));
        let mut failed = started();
        assert!(failed.fail());
        assert!(!failed.fail() && failed.establish(2_000).is_none());
        assert!(!started().abandon(1_000 + ANSWER_DUE - 1), "it was given up too early to tell");
        assert!(started().abandon(1_000 + ANSWER_DUE));
        // Nothing was sent, or nothing was translated.
        let mut unsent = new;
        assert!(!unsent.fail() && !unsent.abandon(u64::MAX) && unsent.establish(1).is_none());
        let mut direct = Connection::default();
        assert!(!direct.start(1) && !direct.fail());
    }

    #[test]
    fn replies_have_the_address_that_was_sent_to() {
        let mut sent = Translations::default();
        for number in 1..=REMEMBERED as u8 {
            let forgotten = sent.add(Translation::new(virtual_address(number), &endpoint(number)));
            assert_eq!(forgotten.counted(), None);
        }
        for number in 1..=REMEMBERED as u8 {
            let current = sent.current(virtual_address(number)).unwrap();
            assert_eq!((current.to, current.counted()), (endpoint(number).address, Some(u32::from(number))));
            assert_eq!(sent.back(endpoint(number).address), Some(virtual_address(number)));
        }
        let other_port = address(endpoint(1).address.ip, 54);
        assert_eq!(sent.back(other_port), None);
    }

    #[test]
    fn a_retired_endpoint_gets_nothing_new_and_may_still_reply() {
        let mut sent = Translations::default();
        sent.add(Translation::new(virtual_address(1), &endpoint(1)));
        sent.retire(virtual_address(1));
        assert_eq!(sent.current(virtual_address(1)), None);
        sent.add(Translation::new(virtual_address(1), &endpoint(2)));
        assert_eq!(sent.current(virtual_address(1)).unwrap().to, endpoint(2).address);
        for number in [1, 2] {
            assert_eq!(sent.back(endpoint(number).address), Some(virtual_address(1)));
        }
    }

    #[test]
    fn an_endpoint_of_two_services_replies_to_the_last() {
        let mut sent = Translations::default();
        for number in [1, 2] {
            sent.add(Translation::new(virtual_address(number), &endpoint(1)));
            assert_eq!(sent.back(endpoint(1).address), Some(virtual_address(number)));
        }
        sent.current(virtual_address(1)).unwrap();
        assert_eq!(sent.back(endpoint(1).address), Some(virtual_address(1)));
    }

    #[test]
    fn of_too_many_the_oldest_is_forgotten() {
        let mut sent = Translations::default();
        for number in 1..=200_u8 {
            let forgotten = sent.add(Translation::new(virtual_address(number), &endpoint(number)));
            let expected = number.checked_sub(REMEMBERED as u8).filter(|number| *number > 0);
            assert_eq!(forgotten.counted(), expected.map(u32::from));
        }
        assert_eq!(sent.current(virtual_address(184)), None);
        assert!(sent.current(virtual_address(185)).is_some());
    }
}
