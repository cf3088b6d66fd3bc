//! Every golden vector through every implementation.

use overlay_agent::datapath::{
    ebpf::{
        Hook,
        overlay_set::{EGRESS_ETHERNET, INGRESS, XDP},
    },
    tun::Lookup,
};

use crate::{
    rungs::{self, Kernel},
    vectors::{Disposer, File, Vector, Verdict},
};

/// Runs all vectors of a file and reports every wrong one. `judge` returns what was expected and what was
/// decided, or `None` for a vector that does not concern it; of those there may be `apart`.
fn check(file: &File, apart: usize, mut judge: impl FnMut(&Vector) -> Option<(Verdict, Verdict)>) {
    let mut wrong = Vec::new();
    let mut judged = 0;
    for vector in &file.vectors {
        if let Some((expected, decided)) = judge(vector) {
            judged += 1;
            if expected != decided {
                wrong.push(format!("{}: expected {expected:?}, got {decided:?}", vector.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {judged} vectors are wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(file.vectors.len() - judged, apart, "vectors that this implementation does not see");
}

/// How many vectors the kernel does not take for a test run: packets of 64 KiB, and those shorter than a header.
fn not_taken(file: &File, hook: Hook) -> usize {
    let count =
        file.vectors.iter().filter(|vector| rungs::test_frame(hook, &vector.packet).is_none()).count();
    assert!(count <= 8, "{count} vectors never reach {hook:?}");
    count
}

/// XDP does not count what it leaves to the tc program behind it, so a punt looks like a pass.
fn as_xdp_shows_it(verdict: &Verdict) -> Verdict {
    match verdict {
        Verdict::Punt { .. } => Verdict::Pass,
        Verdict::Pass
        | Verdict::Encap { .. }
        | Verdict::Decap { .. }
        | Verdict::Fragment
        | Verdict::Drop { .. } => verdict.clone(),
    }
}

#[test]
fn core_decides_every_egress_vector() {
    let file = File::read("egress.json");
    let (config, routes) = (file.config(), Lookup::new(&file.routes()));
    check(&file, 0, |vector| {
        Some((vector.fast.clone(), rungs::core_egress(&vector.packet, vector.gso_size, &config, &routes)))
    });
}

#[test]
fn core_decides_every_ingress_vector() {
    let file = File::read("ingress.json");
    let (config, routes) = (file.config(), Lookup::new(&file.routes()));
    check(&file, 0, |vector| {
        Some((vector.fast.clone(), rungs::core_ingress(&vector.packet, &config, &routes)))
    });
}

#[test]
fn tun_shell_decides_every_egress_vector() {
    let file = File::read("egress.json");
    let (config, routes) = (file.config(), Lookup::new(&file.routes()));
    // The device hands super-packets over in segments.
    let super_packets = file.vectors.iter().filter(|vector| vector.gso_size != 0).count();
    check(&file, super_packets, |vector| {
        let decided = || rungs::tun_egress(&vector.packet, &config, &routes, &vector.slow);
        (vector.gso_size == 0).then(|| (vector.slow.clone(), decided()))
    });
}

#[test]
fn tun_shell_decides_every_ingress_vector_that_reaches_a_socket() {
    let file = File::read("ingress.json");
    let (config, routes) = (file.config(), Lookup::new(&file.routes()));
    let kernels = file.vectors.iter().filter(|vector| vector.tun == Disposer::Kernel).count();
    check(&file, kernels, |vector| {
        (vector.tun == Disposer::Shell)
            .then(|| (vector.slow.clone(), rungs::tun_ingress(&vector.packet, &config, &routes)))
    });
    assert!(kernels * 2 < file.vectors.len(), "most vectors reach the shell");
}

#[test]
fn kernel_egress_program_decides_every_egress_vector() {
    let file = File::read("egress.json");
    let mut kernel = Kernel::load(EGRESS_ETHERNET, &file.config(), &file.routes());
    let is_carried = |vector: &&Vector| vector.gso_size != 0 && matches!(vector.fast, Verdict::Encap { .. });
    let super_packets = file.vectors.iter().filter(is_carried).count();
    check(&file, not_taken(&file, EGRESS_ETHERNET) + super_packets, |vector| {
        Some((vector.fast.clone(), kernel.verdict(&vector.packet, vector.gso_size)?))
    });
}

#[test]
fn kernel_ingress_program_decides_every_ingress_vector() {
    let file = File::read("ingress.json");
    let mut kernel = Kernel::load(INGRESS, &file.config(), &file.routes());
    check(&file, not_taken(&file, INGRESS), |vector| {
        Some((vector.fast.clone(), kernel.verdict(&vector.packet, vector.gso_size)?))
    });
}

#[test]
fn kernel_xdp_program_decides_every_ingress_vector() {
    let file = File::read("ingress.json");
    let mut kernel = Kernel::load(XDP, &file.config(), &file.routes());
    check(&file, not_taken(&file, XDP), |vector| {
        Some((as_xdp_shows_it(&vector.fast), kernel.verdict(&vector.packet, vector.gso_size)?))
    });
}
