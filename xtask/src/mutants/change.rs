//! One wrong line, and the tests that should notice it.

use std::fmt::{self, Display, Formatter};

/// A change that makes the code wrong.
#[derive(Debug)]
pub(super) struct Change {
    /// Its name in options and output.
    pub(super) name: &'static str,
    /// The file, from the repository root.
    pub(super) file: &'static str,
    /// Text that occurs once in the file.
    pub(super) from: &'static str,
    /// What stands there instead.
    pub(super) to: &'static str,
    /// What goes wrong then.
    pub(super) wrong: &'static str,
    /// The tests that should notice, run in this order until one does.
    pub(super) tests: &'static [Tests],
    /// Why no test can notice: the changed code does the same, or what differs cannot be seen.
    pub(super) reason: Option<&'static str>,
}

/// Tests to run, the cheap ones first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tests {
    /// Unit tests of the packet core.
    Core,
    /// Unit tests of the agent whose names contain this.
    Agent(&'static str),
    /// Golden vectors through the packet core and the tun shell.
    Vectors,
    /// Tests of the loaded programs whose names contain this.
    Programs(&'static str),
    /// End-to-end tests whose names contain this.
    EndToEnd(&'static str),
}

impl Display for Change {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { name, file, wrong, tests, reason, .. } = self;
        let tests: Vec<_> = tests.iter().map(Tests::to_string).collect();
        write!(f, "{name}: {file}\n    {wrong}\n    {}", tests.join(", "))?;
        reason.map_or(Ok(()), |reason| write!(f, "\n    survives: {reason}"))
    }
}

impl Display for Tests {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Core => write!(f, "unit tests of the packet core"),
            Self::Agent(filter) => write!(f, "unit tests of the agent, {filter}"),
            Self::Vectors => write!(f, "golden vectors through core and tun shell"),
            Self::Programs(filter) => write!(f, "loaded programs, {filter}"),
            Self::EndToEnd(filter) => write!(f, "end to end, {filter}"),
        }
    }
}
