//! The connected UDP sockets that the programs of virtual service addresses know.

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData, MapError};
use overlay_ebpf::service::translation::Translation;

use super::ProgramSet;

// aya moves map values as plain bytes, so that the type need not implement its marker trait.
type TranslationBytes = [u8; size_of::<Translation>()];

/// The connections of UDP sockets, in the kernel.
#[derive(Debug)]
pub struct UdpSockets(HashMap<MapData, u64, TranslationBytes>);

impl UdpSockets {
    pub(super) fn take(programs: &mut ProgramSet) -> Result<Self> {
        programs.take_map("UDP_SOCKETS").map(Self)
    }

    /// What the socket with this cookie connected to, and what that was translated to; `None` when it was not translated.
    pub fn connection(&self, cookie: u64) -> Result<Option<Translation>> {
        match self.0.get(&cookie, 0) {
            Ok(connection) => Ok(Some(bytemuck::cast(connection))),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("read the map UDP_SOCKETS"),
        }
    }
}
