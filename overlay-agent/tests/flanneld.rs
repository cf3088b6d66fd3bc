//! The binary invoked as `flanneld`, as by a unit file written for flannel.

use std::{
    io,
    os::unix::fs::symlink,
    process::{Command, Output},
};

/// Runs the program as `flanneld` with these arguments and variables.
fn flanneld(arguments: &[&str], variables: &[(&str, &str)]) -> io::Result<Output> {
    let directory = tempfile::tempdir()?;
    let link = directory.path().join("flanneld");
    symlink(env!("CARGO_BIN_EXE_overlay-agent"), &link)?;
    Command::new(link).args(arguments).env_clear().envs(variables.iter().copied()).output()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn version_is_printed_and_no_agent_is_started() {
    let ours = |flag| Command::new(env!("CARGO_BIN_EXE_overlay-agent")).args(["run", flag]).output();
    for output in [
        flanneld(&["-version", "-etcd-prefix", "/x"], &[("FLANNELD_ETCD_USERNAME", "")]),
        flanneld(&["--version"], &[]),
        ours("-version"),
        ours("--version"),
    ] {
        let output = output.unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let version = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(version.starts_with(concat!("overlay-agent ", env!("CARGO_PKG_VERSION"), " ")), "{version}");
    }
}

#[test]
fn unsupported_flags_are_wrong_usage() {
    for (arguments, variables, named) in [
        (&["-kube-subnet-mgr"][..], &[][..], "--kube-subnet-mgr"),
        (&[], &[("FLANNELD_PUBLIC_IPV6", "fd00::1")], "FLANNELD_PUBLIC_IPV6"),
        (&["-iface", "fd00::1"], &[], "--iface"),
        (&["-subnet-lease-renew-margin=1440"], &[], "--subnet-lease-renew-margin"),
        (&["-no-such-flag"], &[], "--no-such-flag"),
    ] {
        let output = flanneld(arguments, variables).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(named), "{named}: {}", stderr(&output));
    }
}

#[test]
fn the_password_is_never_shown() {
    let password = "correct-horse";
    let variables = [("FLANNELD_ETCD_PASSWORD", password), ("FLANNELD_ETCD_USERNAME", "u")];
    for (arguments, variables, code, words) in [
        // The flag itself is refused, another flag is, and the help is printed.
        (&["-etcd-password", password][..], &[][..], 2, "--help"),
        (&["-etcd-password", password, "-etcd-username=u", "-healthz-port=many"], &[], 2, "--help"),
        (&["-etcd-password", password, "-etcd-username=u", "-help"], &[], 0, "--etcd-password"),
        (&["-help"], &variables, 0, "--etcd-password"),
    ] {
        let output = flanneld(arguments, variables).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        let all = format!("{}{}", stderr(&output), String::from_utf8_lossy(&output.stdout));
        assert!(!all.contains(password) && all.contains(words), "{all}");
    }
}
