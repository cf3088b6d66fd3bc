//! Finds a rustc that can build for BPF: one that accepts unstable flags and has the sources of `core` beside it.

use std::env::consts::ARCH;
use std::fmt::{self, Display, Formatter};
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::linker::SUPPORTED_LLVM;
use crate::{step, workspace};

/// The Debian packages of a rustc and its sources.
pub(super) const PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];

/// The remedy when there is no compiler and none can be installed.
pub(super) const REMEDY: &str = "no rustc 1.95 or newer with its sources and an LLVM that bpf-linker supports (21 to 23) \
     was found: install Debian's packages rustc-web and rust-web-src (Debian 12 has them among its security updates; \
     they conflict with Debian's rustc and rustup packages), or with rustup: `rustup toolchain install nightly \
     --profile minimal --component rust-src`";

/// The alternative on systems without these packages.
pub(super) const NIGHTLY: &str = "a nightly rustc with its sources (`rustup toolchain install nightly --profile minimal --component rust-src`)";

/// The oldest release that builds this workspace.
const OLDEST: (u32, u32) = (1, 95);

/// Debian's rustc.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// The sources of `core` in its packages.
const DEBIAN_SOURCES: &str = "/usr/lib/rustlib/src/rust/library/core";

/// A rustc that can build for BPF.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Compiler {
    /// rustup's toolchain `nightly`, with its component rust-src.
    Nightly {
        /// Release, as printed by rustc.
        release: String,
        /// The major version of its LLVM.
        llvm: u32,
    },
    /// Debian's stable rustc with the package of its sources; `RUSTC_BOOTSTRAP` makes it accept unstable flags.
    Debian {
        /// Release, as printed by rustc.
        release: String,
        /// The major version of its LLVM.
        llvm: u32,
    },
}

impl Compiler {
    /// The major version of its LLVM.
    pub(crate) fn llvm(&self) -> u32 {
        match self {
            Self::Nightly { llvm, .. } | Self::Debian { llvm, .. } => *llvm,
        }
    }

    /// A cargo that builds for BPF with this compiler and `linker`, to be run in the repository root.
    pub(crate) fn cargo(&self, linker: &Path) -> Result<Command> {
        let mut command = match self {
            Self::Nightly { .. } => {
                let mut command = rustup_nightly("cargo");
                command.env_remove("RUSTC").env_remove("CARGO").current_dir(workspace::root()?);
                command
            }
            Self::Debian { .. } => {
                let mut command = workspace::cargo()?;
                command.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
                command
            }
        };
        // The encoded form takes precedence over every other source of flags, and allows spaces in the path.
        let flags = [
            "--cfg".to_owned(),
            format!("bpf_target_arch=\"{ARCH}\""),
            "-C".to_owned(),
            format!("linker={}", linker.display()),
            "-Cdebuginfo=2".to_owned(),
            "-Clink-arg=--btf".to_owned(),
        ];
        command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
        for variable in ["RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET"] {
            command.env_remove(variable);
        }
        Ok(command)
    }
}

impl Display for Compiler {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nightly { release, llvm } => write!(f, "rustup's nightly, rustc {release}, LLVM {llvm}"),
            Self::Debian { release, llvm } => write!(f, "{DEBIAN_RUSTC}, rustc {release}, LLVM {llvm}"),
        }
    }
}

/// rustup's nightly, if installed with its sources.
pub(super) fn nightly() -> Option<Compiler> {
    let sysroot = step::output(rustup_nightly("rustc").args(["--print", "sysroot"])).ok()?;
    if !Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core").exists() {
        return None;
    }
    let (release, llvm) = parse_version(&step::output(rustup_nightly("rustc").arg("-vV")).ok()?)?;
    Some(Compiler::Nightly { release, llvm })
}

/// Debian's rustc, if installed with its sources.
pub(super) fn debian() -> Option<Compiler> {
    if !Path::new(DEBIAN_RUSTC).exists() || !Path::new(DEBIAN_SOURCES).exists() {
        return None;
    }
    let (release, llvm) = parse_version(&step::output(Command::new(DEBIAN_RUSTC).arg("-vV")).ok()?)?;
    Some(Compiler::Debian { release, llvm })
}

/// Selects one of the compilers, preferably the nightly. `linkable` tests whether a bpf-linker for an LLVM exists or can be built
/// on this machine.
pub(super) fn choose(
    nightly: Option<Compiler>,
    debian: Option<Compiler>,
    linkable: impl Fn(u32) -> bool,
) -> Option<Compiler> {
    let recent = |release: &str| parse_release(release).is_some_and(|release| release >= OLDEST);
    [nightly, debian].into_iter().flatten().find(|compiler| {
        let (Compiler::Nightly { release, llvm } | Compiler::Debian { release, llvm }) = compiler;
        recent(release) && SUPPORTED_LLVM.contains(llvm) && linkable(*llvm)
    })
}

/// `rustup run nightly PROGRAM`, which must not install anything.
fn rustup_nightly(program: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", program]);
    command.env("RUSTUP_AUTO_INSTALL", "0").env_remove("RUSTUP_TOOLCHAIN");
    command
}

/// The release and the LLVM major version that `rustc -vV` prints.
fn parse_version(text: &str) -> Option<(String, u32)> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let release = field("release: ")?.trim().to_owned();
    let llvm = field("LLVM version: ")?.trim().split('.').next()?.parse().ok()?;
    Some((release, llvm))
}

/// Major and minor of a release such as `1.97.0-nightly`.
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\nbinary: rustc\n\
        commit-hash: ac68faa20c58cbccd01ee7208bf3b6e93a7d7f96\ncommit-date: 2026-05-25\n\
        host: x86_64-unknown-linux-gnu\nrelease: 1.96.0\nLLVM version: 22.1.8\n";

    fn nightly_of(release: &str, llvm: u32) -> Option<Compiler> {
        Some(Compiler::Nightly { release: release.to_owned(), llvm })
    }

    fn debian_of(release: &str, llvm: u32) -> Option<Compiler> {
        Some(Compiler::Debian { release: release.to_owned(), llvm })
    }

    #[test]
    fn rustc_version_names_release_and_llvm() {
        assert_eq!(parse_version(DEBIAN), Some(("1.96.0".to_owned(), 22)));
    }

    #[test]
    fn a_rustc_without_llvm_is_not_taken() {
        assert_eq!(parse_version("rustc 1.96.0\nrelease: 1.96.0\n"), None);
        assert_eq!(parse_version(""), None);
    }

    #[test]
    fn releases_compare_by_number() {
        assert_eq!(parse_release("1.97.0-nightly"), Some((1, 97)));
        assert!(parse_release("1.100.0") > parse_release("1.95.0"));
        assert_eq!(parse_release("nightly"), None);
    }

    #[test]
    fn the_nightly_is_preferred() {
        let nightly = nightly_of("1.97.0-nightly", 22);
        assert_eq!(choose(nightly.clone(), debian_of("1.96.0", 22), |_| true), nightly);
    }

    #[test]
    fn an_old_nightly_gives_way_to_debian() {
        let debian = debian_of("1.96.0", 22);
        assert_eq!(choose(nightly_of("1.94.0-nightly", 22), debian.clone(), |_| true), debian);
    }

    #[test]
    fn a_nightly_whose_llvm_cannot_be_had_gives_way_to_debian() {
        let debian = debian_of("1.96.0", 22);
        assert_eq!(choose(nightly_of("1.99.0-nightly", 23), debian.clone(), |llvm| llvm == 22), debian);
        assert_eq!(choose(nightly_of("1.99.0-nightly", 24), debian.clone(), |_| true), debian);
    }

    #[test]
    fn an_old_debian_is_no_compiler() {
        assert_eq!(choose(None, debian_of("1.85.0", 19), |_| true), None);
    }
}
