//! Generated packets: the golden ones with bytes changed, cut and appended. Whatever comes out, the core must decide
//! without panicking, and the kernel's programs and the tun shell must decide the same.

use overlay_agent::datapath::{
    ebpf::overlay_set::{EGRESS_ETHERNET, INGRESS, XDP},
    tun::Lookup,
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

use crate::{
    rungs::{self, Kernel},
    vectors::{File, Verdict},
};

/// Packets per test; a failure prints the packet, and the seed is fixed.
const ROUNDS: usize = 20_000;

/// Changes one to four things about a packet, most of them in the headers.
fn mutate(packet: &mut Vec<u8>, headers: usize, rng: &mut StdRng) {
    for _ in 0..rng.random_range(1..=4) {
        let len = packet.len();
        match rng.random_range(0..10) {
            0 => packet.truncate(rng.random_range(0..=len)),
            1 => packet.extend(std::iter::repeat_with(|| 0xa5).take(rng.random_range(1..40))),
            _ if len == 0 => {}
            2..=5 => {
                let at = rng.random_range(0..len.min(headers));
                packet[at] ^= 1 << rng.random_range(0..8);
            }
            6 => {
                let at = rng.random_range(0..len);
                packet[at] = rng.random();
            }
            _ => {
                let at = rng.random_range(0..len.min(headers));
                packet[at] = *[0, 1, 5, 6, 0x0f, 0x45, 0x46, 0x4f, 0x60, 0x7f, 0x80, 0xfe, 0xff]
                    .choose(rng)
                    .unwrap_or(&0);
            }
        }
    }
}

fn generate(file: &File, headers: usize, mut check: impl FnMut(&[u8])) {
    let mut rng = StdRng::seed_from_u64(0x6f76_6c30);
    let small: Vec<_> = file.vectors.iter().filter(|vector| vector.packet.len() < 2000).collect();
    for _ in 0..ROUNDS {
        let mut packet = small.choose(&mut rng).expect("there are vectors").packet.clone();
        mutate(&mut packet, headers, &mut rng);
        check(&packet);
    }
}

#[test]
fn kernel_egress_program_agrees_with_the_core_on_generated_packets() {
    let file = File::read("egress.json");
    let (config, routes) = (file.config(), Lookup::new(&file.routes()));
    let mut kernel = Kernel::load(EGRESS_ETHERNET, &config, &file.routes());
    let mut carried = 0;
    generate(&file, 24, |packet| {
        let core = rungs::core_egress(packet, &config, &routes);
        carried += usize::from(matches!(core, Verdict::Encap { .. }));
        if let Some(decided) = kernel.verdict(packet) {
            assert_eq!(decided, core, "packet {packet:02x?}");
        }
    });
    assert!(carried > ROUNDS / 20, "only {carried} packets were carried: the generator has lost its point");
}

#[test]
fn kernel_ingress_programs_agree_with_the_core_on_generated_packets() {
    let file = File::read("ingress.json");
    let (config, routes) = (file.config(), Lookup::new(&file.routes()));
    let mut tc = Kernel::load(INGRESS, &config, &file.routes());
    let mut xdp = Kernel::load(XDP, &config, &file.routes());
    let mut carried = 0;
    generate(&file, 66, |frame| {
        let core = rungs::core_ingress(frame, &config, &routes);
        carried += usize::from(matches!(core, Verdict::Decap { .. }));
        if let Some(decided) = tc.verdict(frame) {
            assert_eq!(decided, core, "tc, frame {frame:02x?}");
        }
        if let Some(decided) = xdp.verdict(frame) {
            let expected = match &core {
                Verdict::Punt { .. } => &Verdict::Pass,
                Verdict::Pass | Verdict::Encap { .. } | Verdict::Decap { .. } | Verdict::Drop { .. } => &core,
            };
            assert_eq!(decided, *expected, "xdp, frame {frame:02x?}");
        }
    });
    assert!(carried > ROUNDS / 20, "only {carried} frames were carried: the generator has lost its point");
}

#[test]
fn tun_shell_agrees_with_the_core_on_generated_packets() {
    let file = File::read("egress.json");
    let (config, routes) = (file.config(), Lookup::new(&file.routes()));
    generate(&file, 24, |packet| {
        let core = rungs::core_egress(packet, &config, &routes);
        assert_eq!(rungs::tun_egress(packet, &config, &routes, &core), core, "packet {packet:02x?}");
    });
}
