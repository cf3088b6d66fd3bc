//! Queries dpkg for installed packages and installs others with apt-get, without starting services.

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::step::{self, elapsed};
use crate::workspace::{has_program, is_root};

/// Installs packages, and refreshes apt's lists before the first time.
#[derive(Default)]
pub(super) struct Apt {
    updated: bool,
}

impl Apt {
    /// Installs `packages` with one apt-get call.
    pub(super) fn install(&mut self, packages: &[String]) -> Result<()> {
        if !is_root() {
            bail!(
                "packages are missing and only root can install them: run this command as root, or `sudo {}`",
                manual(packages)
            );
        }
        let start = Instant::now();
        if !self.updated {
            self.updated = true;
            // An unreachable third-party source is not fatal: the old lists may suffice for the installation.
            if let Err(error) =
                step::condense("apt-get update: refreshing package lists", apt_get().arg("update"))
            {
                crate::interrupt::check()?;
                eprintln!("warning: {error:#}; continuing with the old package lists");
            }
        }
        let policy = NoServices::start()?;
        let label = format!("apt-get install: {}", packages.join(" "));
        // Do not remove installed packages: rustc-web, for example, conflicts with Debian's rustc and rustup.
        let mut install = apt_get();
        install.args(["install", "--yes", "--no-install-recommends", "--no-remove"]).args(packages);
        let result = step::condense(&label, &mut install);
        drop(policy);
        result.with_context(|| {
            format!(
                "cannot install packages (is there a network?); install them manually: `{}`",
                manual(packages)
            )
        })?;
        if packages.iter().any(|name| name == "etcd-server") {
            disable_etcd();
        }
        println!("done     {label} ({})", elapsed(start));
        Ok(())
    }
}

/// Whether this system has apt-get.
pub(super) fn is_here() -> bool {
    has_program("apt-get")
}

/// The command that installs `packages`, for a reader.
pub(super) fn manual(packages: &[String]) -> String {
    format!("apt-get install --no-install-recommends {}", packages.join(" "))
}

/// Those of `names` that are installed, or nothing on a system without dpkg.
pub(super) fn installed(names: &BTreeSet<String>) -> Result<Option<BTreeSet<String>>> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"]).args(names);
    // It fails when one of the names is unknown, but lists the others.
    let output = match query.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("cannot start `dpkg-query`"),
    };
    crate::interrupt::check()?;
    Ok(Some(parse_installed(&String::from_utf8_lossy(&output.stdout))))
}

/// Whether apt's lists offer a package.
pub(super) fn is_known(name: &str) -> bool {
    let policy = step::output(Command::new("apt-cache").args(["policy", name]));
    policy.is_ok_and(|policy| has_candidate(&policy))
}

fn has_candidate(policy: &str) -> bool {
    let candidate = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate:"));
    candidate.is_some_and(|version| version.trim() != "(none)")
}

fn parse_installed(listing: &str) -> BTreeSet<String> {
    let names = listing.lines().filter_map(|line| line.strip_suffix(" installed"));
    names.map(str::to_owned).collect()
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    // Wait for other package managers.
    command.args(["--option", "DPkg::Lock::Timeout=300"]);
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8");
    command
}

/// On a systemd machine the package enables its service for the next boot; the tests start an etcd of their own.
fn disable_etcd() {
    if Path::new("/run/systemd/system").exists() {
        let disabled = step::output(Command::new("systemctl").args(["disable", "--now", "etcd.service"]));
        if let Err(error) = disabled {
            eprintln!("warning: the service etcd may be enabled: {error:#}");
        }
    }
}

/// Prevents the start of the packages' services until it is dropped, with Debian's policy-rc.d.
struct NoServices {
    ours: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";
const POLICY_TEXT: &str = "#!/bin/sh\n# Temporary, by the set-up of overlay-agent: do not start services for test tools.\n\
    case \"$1\" in etcd*|iperf3*) exit 101;; esac\nexit 0\n";

impl NoServices {
    fn start() -> Result<Self> {
        let created = fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(POLICY);
        match created {
            Ok(mut file) => {
                // From here on, the file is removed on every exit.
                let policy = Self { ours: true };
                file.write_all(POLICY_TEXT.as_bytes()).with_context(|| format!("cannot write {POLICY}"))?;
                Ok(policy)
            }
            // A foreign policy is unchanged; one that a killed run left is removed.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let text = fs::read_to_string(POLICY).unwrap_or_default();
                Ok(Self { ours: text == POLICY_TEXT })
            }
            Err(error) => Err(error).with_context(|| format!("cannot create {POLICY}")),
        }
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(POLICY)
        {
            eprintln!("warning: cannot remove {POLICY}: {error}; remove it manually");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_packages_do_not_count_as_installed() {
        let listing = "iperf3 installed\ntcpdump config-files\nethtool not-installed\nprocps installed\n";
        let expected = ["iperf3", "procps"].map(str::to_owned);
        assert_eq!(parse_installed(listing), BTreeSet::from(expected));
    }

    #[test]
    fn a_package_without_candidate_is_unknown() {
        assert!(has_candidate("llvm-22-dev:\n  Installed: (none)\n  Candidate: 1:22.1.8-1\n"));
        assert!(!has_candidate("llvm-23-dev:\n  Installed: (none)\n  Candidate: (none)\n"));
        assert!(!has_candidate(""));
    }

    #[test]
    fn the_policy_refuses_only_the_test_tools() {
        let decide = |service: &str| {
            Command::new("sh")
                .args(["-c", POLICY_TEXT, "policy-rc.d", service, "start"])
                .status()
                .unwrap()
                .code()
        };
        assert_eq!(decide("etcd.service"), Some(101));
        assert_eq!(decide("iperf3"), Some(101));
        assert_eq!(decide("ssh"), Some(0));
    }
}
