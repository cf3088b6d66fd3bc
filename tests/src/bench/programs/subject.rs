//! The loaded programs with a number of routes, and how a kind of packet is shown to them.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use ipnet::Ipv4Net;
use overlay_agent::{
    datapath::ebpf::{
        Hook, HookKind, LoadOptions, Metadata, OverlaySet,
        overlay_set::{EGRESS_ETHERNET, FROM_LOCAL, INGRESS, TO_LOCAL, XDP},
        self_test::{TC_ACT_REDIRECT, XDP_PASS},
    },
    route::{NextHops, Subnet, abi_prefix},
};
use overlay_ebpf::{
    abi::{Config, NextHop, UnderlayValue},
    bypass::Bypass,
    wire::{Ethernet, OVERHEAD},
};

use super::packet::{self, Kind};

/// The whole overlay, and the length of its subnets: room for 262,144.
const NETWORK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8);
const LENGTH: u8 = 26;
/// Number of subnets that other hosts may have.
pub(super) const MOST_ROUTES: i64 = 262_143;
/// The device of test runs: the loopback device, with no hardware address.
const TEST_IFINDEX: u32 = 1;
/// Most destinations that take turns.
pub(super) const DESTINATIONS: u32 = 64;
/// Most destinations in the kernel's loop: for each call that repeats an XDP program, the kernel waits for all CPUs twice.
const LOOP_DESTINATIONS: u32 = 8;
/// Runs in the kernel's loop.
const LOOP: u32 = 128_000;
/// Environment variable that names the compiled programs.
const OBJECT_VARIABLE: &str = "OVERLAY_EBPF_OBJECT";

/// A program and the packets that it is measured with.
pub(super) struct Program {
    pub(super) name: &'static str,
    pub(super) hook: Hook,
    /// The bypass that it is loaded for.
    pub(super) bypass: Bypass,
    pub(super) kinds: &'static [Kind],
    /// A kind that it leaves unchanged, by which clocks are compared.
    pub(super) reference: Kind,
}

/// All programs. That of the overlay device is run in its form for devices with an Ethernet header, as test runs need it: without
/// `change_head`.
pub(super) const PROGRAMS: [Program; 7] = [
    Program {
        name: "egress",
        hook: EGRESS_ETHERNET,
        bypass: Bypass::Off,
        kinds: &[
            Kind::Tcp,
            Kind::Udp,
            Kind::Fragment,
            Kind::PuntMtu,
            Kind::NoRoute,
            Kind::Spoofed,
            Kind::Ipv6,
        ],
        reference: Kind::Ipv6,
    },
    arriving("ingress", INGRESS, Bypass::Off),
    arriving("xdp", XDP, Bypass::Off),
    from_local("from_local, all", Bypass::All),
    arriving("ingress, all", INGRESS, Bypass::All),
    from_local("from_local, flows", Bypass::Flows),
    arriving("ingress, flows", INGRESS, Bypass::Flows),
];

const fn arriving(name: &'static str, hook: Hook, bypass: Bypass) -> Program {
    let kinds = match bypass {
        Bypass::Off => ARRIVING,
        Bypass::Flows | Bypass::All => &[Kind::Tcp, Kind::Udp],
    };
    Program { name, hook, bypass, kinds, reference: Kind::NotOurs }
}

const fn from_local(name: &'static str, bypass: Bypass) -> Program {
    let kinds = &[Kind::Tcp, Kind::Udp, Kind::NoRoute, Kind::Spoofed];
    Program { name, hook: FROM_LOCAL, bypass, kinds, reference: Kind::Ipv6 }
}

const ARRIVING: &[Kind] = &[
    Kind::Tcp,
    Kind::Udp,
    Kind::Fragment,
    Kind::PuntMerged,
    Kind::NoRoute,
    Kind::Spoofed,
    Kind::Ipv6,
    Kind::NotOurs,
];

/// The programs, loaded with `routes` routes.
pub(super) struct Subject {
    /// By bypass.
    sets: BTreeMap<u32, OverlaySet>,
    pub(super) routes: u32,
}

impl Subject {
    pub(super) fn load(routes: u32) -> Result<Self> {
        let path = std::env::var(OBJECT_VARIABLE)
            .with_context(|| format!("{OBJECT_VARIABLE} names the programs: use cargo xtask bench"))?;
        let object = std::fs::read(&path).with_context(|| format!("read {path}"))?;
        let own = Subnet::containing(Ipv4Net::new(Ipv4Addr::new(10, 255, 255, 192), LENGTH)?);
        let config = Config::new(
            packet::PUBLIC_IP.octets(),
            abi_prefix(NETWORK),
            abi_prefix(own.prefix()),
            packet::PORT,
        );
        let config = config.with_device(TEST_IFINDEX);
        let hops: Result<NextHops> =
            (0..routes).map(|number| Ok((subnet(number)?, next_hop(number)))).collect();
        let hops = hops?;
        let mut sets = BTreeMap::new();
        for bypass in [Bypass::Off, Bypass::All, Bypass::Flows] {
            let mut set = OverlaySet::load_for(&object, LoadOptions { bypass, log: false }, &config, None)?;
            for program in PROGRAMS.iter().filter(|program| program.bypass == bypass) {
                set.programs.load_program(program.hook)?;
            }
            if bypass == Bypass::Flows {
                for exit in [EGRESS_ETHERNET, TO_LOCAL] {
                    set.programs.load_program(exit)?;
                }
            }
            set.set_config(&config)?;
            set.set_underlays(&[(TEST_IFINDEX, UnderlayValue::new([0; 6], true))].into())?;
            set.set_endpoints(&[(packet::OWN, packet::endpoint(TEST_IFINDEX))].into())?;
            set.set_routes(&hops)?;
            sets.insert(bypass as u32, set);
        }
        Ok(Self { sets, routes })
    }

    /// The set that a program belongs to.
    pub(super) fn set(&mut self, program: &Program) -> Result<&mut OverlaySet> {
        self.sets.get_mut(&(program.bypass as u32)).context("the programs of each bypass are loaded")
    }

    /// Makes the flows of `frames` skip the stack, if that is what the program is loaded for: for less than a second.
    pub(super) fn confirm(&mut self, program: &Program, frames: &[Vec<u8>]) -> Result<()> {
        if program.bypass != Bypass::Flows {
            return Ok(());
        }
        let set = self.set(program)?;
        for frame in frames {
            set.programs.time_run(program.hook, frame, 1)?;
            let (exit, forwarded) = match program.hook.kind {
                HookKind::TcIngress if program.hook == INGRESS => {
                    let inner = frame.get(Ethernet::LEN + OVERHEAD..).unwrap_or_default();
                    (TO_LOCAL, [frame.get(..Ethernet::LEN).unwrap_or_default(), inner].concat())
                }
                HookKind::TcIngress | HookKind::TcEgress | HookKind::Xdp => (EGRESS_ETHERNET, frame.clone()),
            };
            let metadata = Metadata { gso_size: 0, ingress_ifindex: TEST_IFINDEX };
            set.programs.test_run_with(exit, &forwarded, metadata)?;
        }
        Ok(())
    }

    /// The frames of one kind, with up to `most` destinations spread over all routes.
    pub(super) fn frames(&self, program: &Program, kind: Kind, most: u32) -> Result<Vec<Vec<u8>>> {
        let count = self.routes.min(most);
        let numbers =
            (0..count).map(|index| (u64::from(index) * u64::from(self.routes) / u64::from(count)) as u32);
        numbers
            .map(|number| {
                let other = Ipv4Addr::from(u32::from(subnet(number)?.base()) + 2);
                Ok(match program.hook.kind {
                    HookKind::TcIngress if program.hook == FROM_LOCAL => kind.leaving(other),
                    HookKind::TcEgress => kind.leaving(other),
                    HookKind::TcIngress | HookKind::Xdp => kind.arriving(public_ip(number), other),
                })
            })
            .collect()
    }

    /// Nanoseconds per run of a kind that the program leaves unchanged, in the kernel's loop.
    pub(super) fn time_in_loop(&mut self, program: &Program, kind: Kind) -> Result<f64> {
        let frames = self.frames(program, kind, LOOP_DESTINATIONS)?;
        // One destination is run as often as several together.
        let repeat = LOOP / frames.len() as u32;
        let mut sum = Duration::ZERO;
        for frame in &frames {
            let (action, mean) = self.set(program)?.programs.time_run(program.hook, frame, repeat)?;
            check(program, kind, action)?;
            sum += mean;
        }
        Ok(sum.as_nanos() as f64 / frames.len() as f64)
    }

    /// Instructions that the verifier walked through, 0 before kernel 5.16.
    pub(super) fn verified_instructions(&mut self, program: &Program) -> Result<u32> {
        let hook = program.hook;
        Ok(self.set(program)?.programs.info(hook)?.verified_instruction_count().unwrap_or_default())
    }
}

/// Fails when a program did something else than what is measured.
pub(super) fn check(program: &Program, kind: Kind, action: u32) -> Result<()> {
    let is_carried = match program.hook.kind {
        HookKind::TcEgress | HookKind::TcIngress => action == TC_ACT_REDIRECT,
        // Also what it leaves to the tc program.
        HookKind::Xdp => action == XDP_PASS,
    };
    let is_right = is_carried == kind.is_carried()
        || (program.hook.kind == HookKind::Xdp && matches!(kind, Kind::NotOurs | Kind::PuntMerged));
    ensure!(is_right, "{} returned {action} for the packet \"{}\"", program.name, kind.name());
    Ok(())
}

/// The subnet of the peer with this number. Neighbouring numbers lie far apart.
fn subnet(number: u32) -> Result<Subnet> {
    // A prime that does not divide the number of subnets visits each once. Our own is the last one of the network.
    let index = number.wrapping_mul(7919) % (MOST_ROUTES as u32);
    let base = u32::from(NETWORK.network()) + (index << (32 - u32::from(LENGTH)));
    Ok(Subnet::containing(Ipv4Net::new(base.into(), LENGTH)?))
}

fn public_ip(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 1)) + number)
}

fn next_hop(number: u32) -> NextHop {
    let peer = public_ip(number).octets();
    NextHop { peer, ifindex: TEST_IFINDEX, mtu: packet::PATH_MTU, ..NextHop::default() }
}
