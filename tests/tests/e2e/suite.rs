//! Registers tests with their requirements: a test that cannot run on this machine is ignored with the reason.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::Result;
use libtest_mimic::{Completion, Failed, Trial};
use overlay_tests::sandbox::{Kind, Sandbox};

use crate::machine::Need;

/// Every test of this binary.
pub(crate) struct Suite {
    trials: Vec<Trial>,
    sandbox: Arc<CurrentSandbox>,
}

impl Suite {
    pub(crate) fn new() -> Self {
        Self { trials: Vec::new(), sandbox: Arc::default() }
    }

    /// Adds a test. Root and the tools are always needed.
    pub(crate) fn add(
        &mut self,
        name: impl Into<String>,
        needs: &'static [Need],
        test: impl Fn(&Arc<Sandbox>) -> Result<()> + Send + 'static,
    ) {
        let current = Arc::clone(&self.sandbox);
        self.trials.push(Trial::ignorable_test(name, move || {
            if let Some(reason) = Need::missing(needs) {
                return Ok(Completion::ignored_with(reason));
            }
            let failed = |error: anyhow::Error| Failed::from(format!("{error:#}"));
            let sandbox = current.get().map_err(failed)?;
            test(&sandbox).map(|()| Completion::Completed).map_err(failed)
        }));
    }

    pub(crate) fn into_trials(self) -> Vec<Trial> {
        self.trials
    }
}

/// The sandbox of the test that runs; it ends with the test, and with it every file of the test.
#[derive(Default)]
struct CurrentSandbox(Mutex<Weak<Sandbox>>);

impl CurrentSandbox {
    fn get(&self) -> Result<Arc<Sandbox>> {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sandbox) = current.upgrade() {
            return Ok(sandbox);
        }
        let sandbox = Sandbox::start(Kind::Test)?;
        *current = Arc::downgrade(&sandbox);
        Ok(sandbox)
    }
}
