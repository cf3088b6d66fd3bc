//! The differential test: generated packets through the core, the kernel's programs and the tun shell. Whatever comes out, the
//! core must decide without panicking, and all must decide the same: verdict, bytes and counters.

use std::{io::Write as _, thread};

use overlay_agent::datapath::{
    ebpf::overlay_set::{EGRESS_ETHERNET, INGRESS, XDP},
    tun::Lookup,
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use crate::{
    generator,
    rungs::{self, Kernel},
    vectors::{File, Verdict},
};

/// Packets of each direction. The seed is fixed, and a mismatch prints its packet.
const PACKETS: usize = 500_000;
const SEED: u64 = 0x6f76_6c30;
/// Mismatches that are printed.
const PRINTED: usize = 5;

/// What the implementations made of the packets of one direction.
#[derive(Default)]
struct Comparison {
    packets: usize,
    /// Packets that the core carries.
    carried: usize,
    /// Verdicts that were compared with the core's.
    compared: usize,
    mismatches: Vec<String>,
}

impl Comparison {
    fn compare(&mut self, who: &str, packet: &[u8], decided: &Verdict, core: &Verdict) {
        self.compared += 1;
        if !rungs::is_same(decided, core) {
            self.mismatches
                .push(format!("{who} decides {decided:?}, the core {core:?}, about {packet:02x?}"));
        }
    }

    fn check(&self, direction: &str) {
        let Self { packets, carried, compared, mismatches } = self;
        assert!(mismatches.is_empty(), "{direction}: {} mismatches", mismatches.len());
        assert!(*packets == PACKETS && *compared > PACKETS, "{direction}: {compared} verdicts were compared");
        // Neither all valid nor all broken.
        let some = packets / 20..packets * 4 / 5;
        assert!(some.contains(carried), "{direction}: {carried} of {packets} packets were carried");
    }
}

/// XDP does not count what it leaves to the tc program behind it, so a punt looks like a pass.
fn as_xdp_shows_it(verdict: &Verdict) -> &Verdict {
    match verdict {
        Verdict::Punt { .. } => &Verdict::Pass,
        Verdict::Pass
        | Verdict::Encap { .. }
        | Verdict::Decap { .. }
        | Verdict::Fragment
        | Verdict::Drop { .. } => verdict,
    }
}

#[test]
fn core_kernel_and_shell_decide_the_same_about_generated_packets() {
    let (egress, ingress) = (thread::spawn(egress), thread::spawn(ingress));
    let (egress, ingress) = (egress.join().unwrap(), ingress.join().unwrap());
    let all = [("egress", &egress), ("ingress", &ingress)];
    let packets: usize = all.iter().map(|(_, comparison)| comparison.packets).sum();
    let mismatches = all.iter().flat_map(|(_, comparison)| &comparison.mismatches);
    // Not `println`, which a test that passes does not show.
    let mut out = std::io::stdout().lock();
    for mismatch in mismatches.clone().take(PRINTED) {
        writeln!(out, "{mismatch}").unwrap();
    }
    writeln!(out, "differential: {packets} packets, {} mismatches", mismatches.count()).unwrap();
    drop(out);
    all.iter().for_each(|(direction, comparison)| comparison.check(direction));
}

fn egress() -> Comparison {
    let file = File::read("egress.json");
    let (config, routes) = (file.config(), Lookup::new(&file.routes()));
    let mut kernel = Kernel::load(EGRESS_ETHERNET, &config, &file.routes());
    let mut rng = StdRng::seed_from_u64(SEED);
    let mut comparison = Comparison::default();
    for _ in 0..PACKETS {
        let is_mutated = rng.random_bool(0.3);
        let packet =
            if is_mutated { generator::mutated(&mut rng, &file, 24) } else { generator::egress(&mut rng) };
        let gso_size = generator::gso_size(&mut rng);
        let core = rungs::core_egress(&packet, gso_size, &config, &routes);
        comparison.packets += 1;
        comparison.carried += usize::from(matches!(core, Verdict::Encap { .. }));
        if let Some(decided) = kernel.verdict(&packet, gso_size) {
            comparison.compare("the tc program", &packet, &decided, &core);
        }
        // The device hands super-packets over in segments.
        let core = rungs::core_egress_slow(&packet, &config, &routes);
        let decided = rungs::tun_egress(&packet, &config, &routes, &core);
        comparison.compare("the tun shell", &packet, &decided, &core);
    }
    comparison
}

fn ingress() -> Comparison {
    let file = File::read("ingress.json");
    let (config, routes) = (file.config(), Lookup::new(&file.routes()));
    let mut tc = Kernel::load(INGRESS, &config, &file.routes());
    let mut xdp = Kernel::load(XDP, &config, &file.routes());
    let mut rng = StdRng::seed_from_u64(SEED);
    let mut comparison = Comparison::default();
    for _ in 0..PACKETS {
        let is_mutated = rng.random_bool(0.3);
        let frame =
            if is_mutated { generator::mutated(&mut rng, &file, 66) } else { generator::ingress(&mut rng) };
        let core = rungs::core_ingress(&frame, &config, &routes);
        comparison.packets += 1;
        comparison.carried += usize::from(matches!(core, Verdict::Decap { .. }));
        if let Some(decided) = tc.verdict(&frame, 0) {
            comparison.compare("the tc program", &frame, &decided, &core);
        }
        if let Some(decided) = xdp.verdict(&frame, 0) {
            comparison.compare("the XDP program", &frame, &decided, as_xdp_shows_it(&core));
        }
        // What reaches the socket of the tun rung as a whole datagram.
        let reaches_socket = match &core {
            Verdict::Decap { .. } | Verdict::Drop { .. } => true,
            Verdict::Punt { reason } => ["rejected", "slow_peer"].contains(&reason.as_str()),
            Verdict::Pass | Verdict::Encap { .. } | Verdict::Fragment => false,
        };
        if reaches_socket {
            let core = rungs::core_ingress_slow(&frame, &config, &routes);
            let decided = rungs::tun_ingress(&frame, &config, &routes);
            comparison.compare("the tun shell", &frame, &decided, &core);
        }
    }
    comparison
}
