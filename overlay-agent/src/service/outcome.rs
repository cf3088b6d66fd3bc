//! What became of connections to endpoints: what the load balancers count, and what ejects an endpoint that fails.

use std::{collections::BTreeMap, net::SocketAddrV4, ops::AddAssign};

use super::record::Protocol;

/// Connections of this node to one endpoint, counted since a load balancer of the node has known it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Connections that were made.
    pub established: u64,
    /// Connections that the endpoint refused or did not answer.
    pub failed: u64,
}

/// Outcomes by the address of the endpoint.
pub type Outcomes = BTreeMap<(Protocol, SocketAddrV4), Outcome>;

impl AddAssign for Outcome {
    fn add_assign(&mut self, other: Self) {
        self.established = self.established.saturating_add(other.established);
        self.failed = self.failed.saturating_add(other.failed);
    }
}
