//! A set of eBPF programs that share maps: loaded as one object, each program when it is first needed. Nothing here knows
//! what a particular set does.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapError},
    programs::{
        Program, ProgramError, ProgramInfo, SchedClassifier, TestRun as _, TestRunAttrs, TestRunOptions,
        TestRunResult, Xdp,
    },
};
use aya_log::EbpfLogger;
use tokio::task::JoinHandle;

use super::{
    generation::{self, Generation},
    pins::Pins,
};

/// How often to look for lines of the programs, which are rate-limited and few.
const LOG_INTERVAL: Duration = Duration::from_millis(100);

/// A program and the kind of its hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    /// The program's name in the object and in what the kernel lists.
    pub program: &'static str,
    /// The kind of hook.
    pub kind: HookKind,
    /// Its place among other tcx programs of the hook.
    pub place: Place,
}

/// A place among other tcx programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before all others: they would see packets that are for this program alone.
    First,
    /// Behind all others: what they drop or change, it does not see, or sees changed.
    Last,
}

/// Where the kernel runs a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HookKind {
    /// Native XDP of a device.
    Xdp,
    /// tcx or clsact ingress of a device.
    TcIngress,
    /// tcx or clsact egress of a device.
    TcEgress,
}

/// What a program did with a test packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its return value: a tc or XDP action.
    pub action: u32,
    /// The packet as the program left it; XDP metadata, if any, is in front.
    pub packet: Vec<u8>,
}

/// What the kernel knows about a test packet for a tc program beside its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Metadata {
    /// Payload in bytes of each of the packets that this one stands for; 0 when it is one packet.
    pub gso_size: u32,
    /// The device on which it arrived at this host; 0 for none.
    pub ingress_ifindex: u32,
}

/// A loaded object.
pub struct ProgramSet {
    name: &'static str,
    ebpf: Ebpf,
    /// Forwards what the programs log. Holds the map, so it ends with the set.
    log: Option<JoinHandle<()>>,
    /// Where links and maps are pinned.
    pinned: Option<(Pins, Generation)>,
}

/// What is pinned of a set.
#[derive(Clone, Copy, Debug)]
pub struct Pinned<'a> {
    /// Where.
    pub pins: &'a Pins,
    /// The maps: those of an earlier agent are taken over if all of them have the same shape.
    pub maps: &'a [&'static str],
}

impl ProgramSet {
    /// Loads the maps of `object`, with `constants` in its variables of these names, and with room for so many entries in the maps of
    /// `sizes`. With `log`, the programs log failures, and a task of the current tokio runtime forwards the
    /// lines; it panics outside of one. With `pinned`, maps and links outlive this process. Fails when the kernel refuses a map, or
    /// `object` cannot log.
    pub fn load(
        name: &'static str,
        object: &[u8],
        constants: &[(&str, u32)],
        sizes: &[(&str, u32)],
        log: bool,
        pinned: Option<Pinned<'_>>,
    ) -> Result<Self> {
        let log_failures = u32::from(log);
        let mut loader = EbpfLoader::new();
        for (variable, value) in constants {
            loader.override_global(variable, value, true);
        }
        for (map, entries) in sizes {
            loader.map_max_entries(map, *entries);
        }
        loader.override_global("LOG_FAILURES", &log_failures, log);
        let context = || format!("load the eBPF maps of {name}: kernel 5.10 or later is needed, with eBPF");
        let pinned = match pinned {
            Some(Pinned { pins, maps }) => {
                let generation = Generation::find(pins, maps, || loader.load(object).with_context(context))?;
                for map in maps {
                    loader.map_pin_path(map, generation.directory().join(map));
                }
                Some((pins.clone(), generation))
            }
            None => None,
        };
        let mut ebpf = loader.load(object).with_context(context)?;
        let log = if log { Some(forward_log(&mut ebpf)?) } else { None };
        Ok(Self { name, ebpf, log, pinned })
    }

    /// Where links are pinned.
    pub(super) fn pins(&self) -> Option<&Pins> {
        self.pinned.as_ref().map(|(pins, _)| pins)
    }

    /// Whether the maps stay when this value is dropped: those of a set that was loaded before, or after [`Self::keep_maps`].
    pub(super) fn keeps_maps(&self) -> bool {
        self.pinned.as_ref().is_some_and(|(_, generation)| generation.is_kept())
    }

    /// Lets pinned maps stay when this value is dropped: to be called before a program is attached.
    pub(crate) fn keep_maps(&mut self) {
        if let Some((_, generation)) = &mut self.pinned {
            generation.keep();
        }
    }

    /// Removes the pins of this set's maps. Programs that are attached keep them. Fails when they cannot be removed.
    pub(super) fn remove_maps(&self) -> Result<()> {
        self.pinned.as_ref().map_or(Ok(()), |(_, own)| generation::remove(own.directory()))
    }

    /// The directories of pinned maps that are not this set's. Fails when they cannot be listed.
    pub(super) fn other_generations(&self) -> Result<Vec<PathBuf>> {
        let Some((pins, own)) = &self.pinned else { return Ok(Vec::new()) };
        let mut others = pins.generations()?;
        others.retain(|directory| directory != own.directory());
        Ok(others)
    }

    /// Removes pinned maps that are not this set's: to be called when no other set's program is attached.
    pub(crate) fn remove_other_generations(&mut self) -> Result<()> {
        for directory in self.other_generations()? {
            generation::remove(&directory)?;
        }
        match &mut self.pinned {
            Some((pins, own)) => own.become_first(pins),
            None => Ok(()),
        }
    }

    /// Takes a map out of the set; it must live as long as the set loads programs.
    pub fn take_map<M: TryFrom<Map, Error = MapError>>(&mut self, map: &str) -> Result<M> {
        let found = self.ebpf.take_map(map).with_context(|| format!("{} has no map {map}", self.name))?;
        M::try_from(found).with_context(|| format!("the map {map} of {}", self.name))
    }

    /// Loads a program, unless it is loaded. An error ends with the last lines of the verifier's log.
    pub fn load_program(&mut self, hook: Hook) -> Result<()> {
        let loaded = match hook.kind {
            HookKind::TcIngress | HookKind::TcEgress => self.tc(hook)?.load(),
            HookKind::Xdp => self.xdp(hook)?.load(),
        };
        match loaded {
            Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
            Err(error) => Err(verifier_error(hook.program, error)),
        }
    }

    /// The kernel's description of a loaded program.
    pub fn info(&self, hook: Hook) -> Result<ProgramInfo> {
        let program = self.ebpf.program(hook.program).with_context(|| self.lacks(hook))?;
        program.info().with_context(|| format!("look up the program {}", hook.program))
    }

    /// Runs a loaded program on a packet without sending anything (`BPF_PROG_TEST_RUN`). The kernel takes the first 14 bytes
    /// for an Ethernet header. For a tc program, `gso_size` is the payload in bytes of each of the packets that this one stands
    /// for; 0 when it is one packet.
    pub fn test_run(&mut self, hook: Hook, packet: &[u8], gso_size: u32) -> Result<Outcome> {
        self.test_run_with(hook, packet, Metadata { gso_size, ingress_ifindex: 0 })
    }

    /// As [`ProgramSet::test_run`], with more about the packet.
    pub fn test_run_with(&mut self, hook: Hook, packet: &[u8], metadata: Metadata) -> Result<Outcome> {
        // Room for headers that the program adds.
        let mut out = vec![0; packet.len() + 64];
        let context = skb_context(metadata);
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: context.iter().any(|byte| *byte != 0).then_some(&context[..]),
            ctx_out: None,
            repeat: 1,
            attrs: TestRunAttrs::default(),
        };
        let result = self.run_with(hook, options)?;
        out.truncate(result.data_size_out as usize);
        Ok(Outcome { action: result.return_value, packet: out })
    }

    /// Runs a loaded program `repeat` times on one packet, and returns its last return value and the mean time of a run, which the
    /// kernel rounds down to nanoseconds. Every run sees the packet as the run before left it.
    pub fn time_run(&mut self, hook: Hook, packet: &[u8], repeat: u32) -> Result<(u32, Duration)> {
        let options = TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::default() };
        let result = self.run_with(hook, options)?;
        Ok((result.return_value, result.duration))
    }

    fn run_with(&mut self, hook: Hook, options: TestRunOptions<'_>) -> Result<TestRunResult> {
        let result = match hook.kind {
            HookKind::TcIngress | HookKind::TcEgress => SchedClassifier::test_run(self.tc(hook)?, options),
            HookKind::Xdp => Xdp::test_run(self.xdp(hook)?, options),
        };
        result.with_context(|| format!("run {} on a test packet", hook.program))
    }

    pub(super) fn program(&mut self, name: &str) -> Result<&mut Program> {
        let lacks = format!("{} has no program {name}", self.name);
        self.ebpf.program_mut(name).context(lacks)
    }

    pub(super) fn tc(&mut self, hook: Hook) -> Result<&mut SchedClassifier> {
        let lacks = self.lacks(hook);
        Ok(self.ebpf.program_mut(hook.program).context(lacks)?.try_into()?)
    }

    pub(super) fn xdp(&mut self, hook: Hook) -> Result<&mut Xdp> {
        let lacks = self.lacks(hook);
        Ok(self.ebpf.program_mut(hook.program).context(lacks)?.try_into()?)
    }

    fn lacks(&self, hook: Hook) -> String {
        format!("{} has no program {}", self.name, hook.program)
    }
}

impl Drop for ProgramSet {
    fn drop(&mut self) {
        if let Some(task) = &self.log {
            task.abort();
        }
    }
}

/// `struct __sk_buff` (linux/bpf.h) with nothing but this.
fn skb_context(metadata: Metadata) -> [u8; 192] {
    const INGRESS_IFINDEX: usize = 36;
    const GSO_SIZE: usize = 176;
    let mut context = [0; 192];
    for (at, value) in [(INGRESS_IFINDEX, metadata.ingress_ifindex), (GSO_SIZE, metadata.gso_size)] {
        if let Some(field) = context.get_mut(at..at + 4) {
            field.copy_from_slice(&value.to_ne_bytes());
        }
    }
    context
}

/// Forwards the programs' lines to the `log` crate's logger, which tracing-subscriber bridges to tracing.
fn forward_log(ebpf: &mut Ebpf) -> Result<JoinHandle<()>> {
    let mut logger = EbpfLogger::init(ebpf).context("open the log of the eBPF programs")?;
    let mut pause = tokio::time::interval(LOG_INTERVAL);
    Ok(tokio::spawn(async move {
        loop {
            pause.tick().await;
            logger.flush();
        }
    }))
}

/// The verifier's log is long; its reason stands at the end.
pub(super) fn verifier_error(program: &str, error: ProgramError) -> anyhow::Error {
    let ProgramError::LoadError { io_error, verifier_log } = &error else {
        return anyhow::Error::new(error).context(format!("load the program {program}"));
    };
    let log = verifier_log.to_string();
    let statistics = ["processed ", "verification time", "stack depth"];
    let is_reason =
        |line: &&str| !line.trim().is_empty() && !statistics.iter().any(|start| line.starts_with(start));
    let mut tail: Vec<&str> = log.lines().rev().filter(is_reason).take(3).collect();
    tail.reverse();
    anyhow!("load the program {program}: {io_error}: {}", tail.join(" | "))
}
