//! Runs the programs on packets made for it before they are trusted with the host's: a kernel may accept a program and
//! still not do what its helpers promise.

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyhow::{Context as _, Result, bail};
use aya::programs::{ProgramError, SchedClassifier, TestRun as _, TestRunAttrs, TestRunOptions, Xdp};
use ipnet::Ipv4Net;
use overlay_ebpf::{
    abi::{Config, DECAPPED_MARK, Prefix},
    wire::{Ethernet, OVERHEAD},
};

use super::{Hook, Programs};

/// `TC_ACT_REDIRECT` (linux/pkt_cls.h).
pub const TC_ACT_REDIRECT: u32 = 7;
/// `XDP_PASS` (linux/bpf.h).
pub const XDP_PASS: u32 = 2;

/// What a program did with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its return value: a tc or XDP action.
    pub action: u32,
    /// The packet as the program left it.
    pub packet: Vec<u8>,
    /// Whether XDP marked it as unwrapped.
    pub marked: bool,
}

impl Programs {
    /// Runs a loaded program on a packet without sending anything (`BPF_PROG_TEST_RUN`). tc programs see the packet with
    /// its first 14 bytes as Ethernet header.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the packet or the program is not loaded.
    pub fn run(&mut self, hook: Hook, packet: &[u8]) -> Result<Outcome> {
        // Room for what encapsulation adds.
        let mut out = vec![0; packet.len() + 64];
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: None,
            ctx_out: None,
            repeat: 1,
            attrs: TestRunAttrs::default(),
        };
        let result = match hook {
            Hook::Egress | Hook::Ingress => SchedClassifier::test_run(self.tc(hook)?, options),
            Hook::Xdp => Xdp::test_run(self.xdp()?, options),
        };
        let result = result.map_err(|error: ProgramError| {
            anyhow::Error::new(error).context(format!("run {} on a test packet", hook.program()))
        })?;
        out.truncate(result.data_size_out as usize);
        // The kernel returns XDP's metadata in front of the packet.
        let marked = hook == Hook::Xdp && out.starts_with(&DECAPPED_MARK);
        if marked {
            out.drain(..DECAPPED_MARK.len());
        }
        Ok(Outcome { action: result.return_value, packet: out, marked })
    }
}

/// Sends a packet through `hooks` of a copy of the programs: egress must wrap it and ingress must unwrap it to what it was,
/// two hops older.
///
/// # Errors
///
/// Says which program does not do what it should.
pub fn run(object: &[u8], hooks: &[Hook]) -> Result<()> {
    // Addresses for benchmarks and documentation (RFC 2544, RFC 5737): nobody's. Two copies, one for each end.
    let ends = [
        end([192, 0, 2, 1], [198, 18, 0, 0], [198, 18, 1, 0]),
        end([192, 0, 2, 2], [198, 18, 1, 0], [198, 18, 0, 0]),
    ];
    let [sender, receiver] = ends;
    let inner = inner_packet();
    let frame = [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0][..], &inner].concat();
    let mut programs = load(object, &[Hook::Egress], &sender)?;
    let wrapped = programs.run(Hook::Egress, &frame)?;
    if wrapped.action != TC_ACT_REDIRECT || wrapped.packet.len() != frame.len() + OVERHEAD {
        bail!(
            "self-test: ovl_egress did not wrap a packet (action {}, {} bytes)",
            wrapped.action,
            wrapped.packet.len()
        );
    }
    for hook in hooks.iter().filter(|hook| **hook != Hook::Egress) {
        let mut programs = load(object, &[*hook], &receiver)?;
        let unwrapped = programs.run(*hook, &wrapped.packet)?;
        let expected = if *hook == Hook::Xdp { XDP_PASS } else { TC_ACT_REDIRECT };
        let got = unwrapped.packet.get(Ethernet::LEN..).unwrap_or_default();
        if unwrapped.action != expected
            || unwrapped.marked != (*hook == Hook::Xdp)
            || !is_two_hops_older(&inner, got)
        {
            bail!(
                "self-test: {} did not unwrap a packet (action {}, {} bytes)",
                hook.program(),
                unwrapped.action,
                got.len()
            );
        }
    }
    Ok(())
}

struct End {
    config: Config,
    route: (Ipv4Net, Ipv4Addr),
}

fn end(public_ip: [u8; 4], own: [u8; 4], other: [u8; 4]) -> End {
    let peer = Ipv4Addr::new(192, 0, 2, 3 - public_ip[3]);
    let subnet = Ipv4Net::new_assert(other.into(), 24);
    End {
        config: Config::new(public_ip, Prefix::new([198, 18, 0, 0], 15), Prefix::new(own, 24), 8285)
            .with_devices(1, 1),
        route: (subnet, peer),
    }
}

fn load(object: &[u8], hooks: &[Hook], end: &End) -> Result<Programs> {
    let mut programs = Programs::load(object, hooks, Ethernet::LEN as u32).context("self-test")?;
    programs.configure(&end.config)?;
    programs.set_routes(&BTreeMap::from([end.route]))?;
    Ok(programs)
}

/// ICMP echo request from 198.18.0.2 to 198.18.1.2, TTL 64.
fn inner_packet() -> Vec<u8> {
    let mut packet =
        vec![0x45, 0, 0, 84, 0, 0, 0x40, 0, 64, 1, 0xae, 0x7f, 198, 18, 0, 2, 198, 18, 1, 2, 8, 0];
    packet.resize(84, 0xa5);
    packet
}

/// The same packet with TTL two less and the checksum to match: TTL is the upper byte of a word, so it grows by 0x0200.
fn is_two_hops_older(before: &[u8], after: &[u8]) -> bool {
    let mut expected = before.to_vec();
    if let Some([ttl, _, checksum, _]) = expected.get_mut(8..12) {
        *ttl -= 2;
        *checksum += 2;
    }
    expected == after
}
