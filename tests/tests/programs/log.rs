//! Lines of the programs about their failures: there when asked for, and without cost when not.

use std::{
    sync::{Mutex, OnceLock},
    time::Duration,
};

use aya::maps::{MapData, RingBuf};
use overlay_agent::datapath::ebpf::{
    Hook, LoadOptions, OverlaySet,
    overlay_set::{EGRESS, EGRESS_ETHERNET, FROM_LOCAL, INGRESS, TO_LOCAL, XDP},
};
use overlay_ebpf::{bypass::Bypass, reason::DropReason};

use crate::{rungs::object, vectors::File};

/// What the `log` crate's logger received, as in an agent whose subscriber bridges it to tracing.
struct Lines(Mutex<Vec<String>>);

impl log::Log for Lines {
    fn enabled(&self, _metadata: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

fn lines() -> &'static Lines {
    static LINES: OnceLock<Lines> = OnceLock::new();
    LINES.get_or_init(|| Lines(Mutex::new(Vec::new())))
}

/// Runs the program of the overlay device on a packet that the kernel takes for a frame whose EtherType is a part of the inner
/// source address: it refuses to add headers to such a one.
fn fail_to_encapsulate(log: bool) -> OverlaySet {
    let file = File::read("egress.json");
    let mut set = OverlaySet::load(&object(), LoadOptions { log, ..LoadOptions::default() }).unwrap();
    set.programs.load_program(EGRESS).unwrap();
    set.set_config(&file.config()).unwrap();
    set.set_routes(&file.routes()).unwrap();
    let mut packet = vec![0x45, 0, 0, 84, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 244, 1, 2, 10, 244, 2, 2];
    packet.resize(84, 0);
    for _ in 0..3 {
        set.programs.test_run(EGRESS, &packet, 0).unwrap();
    }
    assert_eq!(set.counters().unwrap().drops[DropReason::EncapFailed.index()], 3);
    set
}

#[test]
fn failures_are_logged_on_request_and_rate_limited() {
    let _ = log::set_logger(lines());
    log::set_max_level(log::LevelFilter::Trace);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut silent = fail_to_encapsulate(false);
        let mut ring: RingBuf<MapData> = silent.programs.take_map("AYA_LOGS").unwrap();
        assert!(ring.next().is_none(), "logged although it is off");
        let _set = fail_to_encapsulate(true);
        tokio::time::sleep(Duration::from_millis(300)).await;
    });
    let lines = lines().0.lock().unwrap();
    let lines: Vec<_> = lines.iter().filter(|line| line.starts_with("egress: ")).collect();
    // Three failures within 100 ms on one CPU, or on a few.
    assert!((1..3).contains(&lines.len()), "{lines:?}");
    assert_eq!(lines[0], "egress: adjust_room refused to add headers: error -524");
}

/// Instructions that the kernel keeps of a program, and those that its verifier walked through on all paths.
fn size(hook: Hook, options: LoadOptions) -> (u32, u32) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut set = OverlaySet::load(&object(), options).unwrap();
        set.programs.load_program(hook).unwrap();
        let info = set.programs.info(hook).unwrap();
        (info.size_translated().unwrap() / 8, info.verified_instruction_count().unwrap_or_default())
    })
}

#[test]
fn programs_stay_small_and_logging_costs_nothing_when_off() {
    // A little above what kernel 6.18 counts.
    let limits =
        [(EGRESS, 1200, 2140), (EGRESS_ETHERNET, 1185, 2220), (INGRESS, 1125, 2025), (XDP, 1030, 1760)];
    for (hook, kept, verified) in limits {
        let [off, on] = [false, true].map(|log| size(hook, LoadOptions { log, bypass: Bypass::Off }));
        println!("{}: {off:?} instructions, with logging {on:?}", hook.program);
        assert!(off.0 <= kept && off.1 <= verified, "{}: {off:?} instructions", hook.program);
        assert!(on.0 > off.0 && on.1 > off.1, "{}: logging is not in the program", hook.program);
    }
}

#[test]
fn programs_of_the_bypass_stay_small() {
    let limits = [
        (Bypass::All, FROM_LOCAL, 1030, 1530),
        (Bypass::All, INGRESS, 1775, 3310),
        (Bypass::Flows, FROM_LOCAL, 1220, 2660),
        (Bypass::Flows, TO_LOCAL, 360, 680),
        (Bypass::Flows, EGRESS, 1515, 2800),
        (Bypass::Flows, INGRESS, 2065, 4610),
        (Bypass::Flows, XDP, 1030, 1720),
    ];
    let sizes = limits.map(|(bypass, hook, ..)| size(hook, LoadOptions { bypass, log: false }));
    for ((bypass, hook, ..), size) in limits.iter().zip(&sizes) {
        println!("{} with {bypass:?}: {size:?} instructions", hook.program);
    }
    for ((bypass, hook, kept, verified), size) in limits.into_iter().zip(sizes) {
        assert!(
            size.0 <= kept && size.1 <= verified,
            "{} with {bypass:?}: {size:?} instructions",
            hook.program
        );
    }
}
