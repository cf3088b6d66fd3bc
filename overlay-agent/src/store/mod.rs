//! Where lease records live, and what a store has to say to whoever follows it.

use std::{net::Ipv4Addr, time::Duration};

use ipnet::Ipv4Net;

use crate::route_table::{Record, RecordChange};

pub mod dir;
pub mod etcd;

/// What a store has to say to whoever follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// All records as they are now.
    Snapshot(Vec<Record>),
    /// What has changed since the last event, in order.
    Changes(Vec<RecordChange>),
    /// The store cannot be read, and why. What was known stays known; a snapshot follows when it can be read again.
    Lost(String),
    /// Something about our own lease.
    Lease(LeaseEvent),
}

/// What became of this host's claim on its subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaseEvent {
    /// The store confirms the claim.
    Confirmed {
        /// How long it lasts without another word from us; `None` for a reservation, which does not end.
        expires_in: Option<Duration>,
    },
    /// The store cannot be asked about the claim. Said once, until it is confirmed again.
    Unconfirmed {
        /// One sentence.
        why: String,
        /// How long the last confirmation still lasts; `None` for a reservation.
        expires_in: Option<Duration>,
    },
    /// The claim was lost and the same subnet taken again.
    Retaken {
        /// The subnet.
        subnet: Ipv4Net,
        /// How it was lost.
        why: String,
    },
    /// The claim was lost, and the subnet is somebody else's by now: this host has another one.
    Moved {
        /// The subnet that was ours.
        from: Ipv4Net,
        /// The subnet that is ours now.
        to: Ipv4Net,
        /// How it was lost.
        why: String,
    },
    /// The record stands under another public address of this host.
    Readdressed {
        /// The address.
        public_ip: Ipv4Addr,
    },
    /// The claim was lost and nothing could be taken instead so far; more attempts follow.
    Unheld {
        /// How it was lost, and why there is no other.
        why: String,
    },
    /// Another host has taken over our public address: the subnet is in its hands, ours are off it.
    Superseded {
        /// Who, and what to do.
        why: String,
    },
}
