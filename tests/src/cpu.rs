//! CPUs of threads and processes. Measurements that compare programs give each the same ones.

use std::fs;

use anyhow::{Context, Result};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// The first CPU on which this thread may run.
pub(crate) fn first() -> Result<CpuSet> {
    one(|allowed| allowed.next())
}

/// The last one; on a machine with one CPU, the first.
pub(crate) fn last() -> Result<CpuSet> {
    one(|allowed| allowed.last())
}

fn one(choose: impl FnOnce(&mut dyn Iterator<Item = usize>) -> Option<usize>) -> Result<CpuSet> {
    let all = sched_getaffinity(Pid::from_raw(0)).context("read the CPUs of this thread")?;
    let mut one = CpuSet::new();
    let chosen = choose(&mut (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu).unwrap_or(false)));
    one.set(chosen.context("this thread may run on no CPU")?).context("choose a CPU")?;
    Ok(one)
}

/// Keeps the current thread on these CPUs.
pub(crate) fn stay_on(cpus: &CpuSet) -> Result<()> {
    sched_setaffinity(Pid::from_raw(0), cpus).context("keep a thread on one CPU")
}

/// Keeps this thread, and the threads and processes that it starts from now on, on one CPU, until dropped. The kernel queues packets per
/// CPU: those of one flow that are sent or received by two CPUs overtake each other, with any overlay and without one.
#[derive(Debug)]
pub struct OneCpu(CpuSet);

impl OneCpu {
    /// Takes the first CPU that this thread may use.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn enter() -> Result<Self> {
        Self::on(&first()?)
    }

    /// Takes the last one, which on a machine with several is another.
    pub(crate) fn last() -> Result<Self> {
        Self::on(&last()?)
    }

    fn on(cpus: &CpuSet) -> Result<Self> {
        let all = sched_getaffinity(Pid::from_raw(0)).context("read the CPUs of this thread")?;
        stay_on(cpus)?;
        Ok(Self(all))
    }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        if let Err(error) = stay_on(&self.0) {
            eprintln!("error: this thread stays on one CPU: {error:#}");
        }
    }
}

/// Keeps all threads of a process on some CPUs until it is dropped.
pub(crate) struct Pinned {
    process: u32,
    before: CpuSet,
}

impl Pinned {
    /// Moves the threads that there are now.
    pub(crate) fn new(process: u32, cpus: &CpuSet) -> Result<Self> {
        let before = sched_getaffinity(Pid::from_raw(process.cast_signed()))
            .with_context(|| format!("read the CPUs of process {process}"))?;
        move_all(process, cpus)?;
        Ok(Self { process, before })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // The process may have ended.
        let _ = move_all(self.process, &self.before);
    }
}

fn move_all(process: u32, cpus: &CpuSet) -> Result<()> {
    let directory = format!("/proc/{process}/task");
    for thread in fs::read_dir(&directory).with_context(|| format!("read {directory}"))?.flatten() {
        let id = thread.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(id) = id else { continue };
        sched_setaffinity(Pid::from_raw(id), cpus).with_context(|| format!("keep thread {id} on one CPU"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_stays_on_the_cpu_that_was_chosen() {
        let chosen = last().unwrap();
        std::thread::spawn(move || {
            stay_on(&chosen).unwrap();
            assert_eq!(sched_getaffinity(Pid::from_raw(0)).unwrap(), chosen);
            assert_eq!((first().unwrap(), last().unwrap()), (chosen, chosen));
        })
        .join()
        .unwrap();
    }
}
