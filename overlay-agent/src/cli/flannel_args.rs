//! Translates flanneld's command line and environment into arguments for this program's parser.
//!
//! flanneld uses Go's flags: one dash or two, `-x=value` or `-x value`, and `-x` or `-x=false` for switches. Every flag is also
//! an environment variable, `FLANNELD_` and its name; the command line takes precedence. Flags for Kubernetes and IPv6 are
//! rejected by name: ignoring them would set up another network than the one that the operator configured.

use std::{
    ffi::{OsStr, OsString},
    path::Path,
};

/// The kind of a flag's value, and its treatment.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A value. As for flanneld, an empty one selects the default.
    Value,
    /// A value; an empty one switches the feature off.
    Emptiable,
    /// A value for the connection to etcd.
    Etcd,
    /// A value for leases in etcd.
    Lease,
    Switch,
    /// Prints the version; flanneld does not read it from the environment.
    Version,
    /// A value of an unsupported flag, with the reason and an alternative.
    UnsupportedValue(&'static str),
    /// A boolean that may only be false.
    UnsupportedSwitch(&'static str),
}

const KUBERNETES: &str =
    "only flannel's Kubernetes subnet manager uses it; keep leases in etcd or in a directory";
const IPV4_ONLY: &str = "the overlay carries IPv4 over IPv4 only; remove it";
const NO_MAC: &str = "the overlay device has no hardware address; remove it";
const GO_FILES: &str = "it filters by Go source files; set RUST_LOG instead";

#[rustfmt::skip]
const FLAGS: [(Kind, &[&str]); 11] = [
    (Kind::Etcd, &[
        "etcd-endpoints", "etcd-prefix", "etcd-keyfile", "etcd-certfile", "etcd-cafile", "etcd-username", "etcd-password",
    ]),
    (Kind::Lease, &["subnet-lease-renew-margin"]),
    (Kind::Value, &[
        "iface", "iface-regex", "iface-can-reach", "public-ip", "iptables-resync", "healthz-ip",
        "healthz-port", "v",
    ]),
    (Kind::Emptiable, &["subnet-file"]),
    (Kind::Switch, &["ip-masq", "ip-masq-fully-random-disable", "iptables-forward-rules", "ip-blackhole-route"]),
    (Kind::Version, &["version"]),
    (Kind::UnsupportedSwitch(KUBERNETES), &["kube-subnet-mgr", "set-node-network-unavailable", "use-multi-cluster-cidr"]),
    (Kind::UnsupportedValue(KUBERNETES), &["kube-api-url", "kube-annotation-prefix", "kubeconfig-file", "net-config-path"]),
    (Kind::UnsupportedValue(IPV4_ONLY), &["public-ipv6"]),
    (Kind::UnsupportedSwitch(NO_MAC), &["persistent-mac"]),
    (Kind::UnsupportedValue(GO_FILES), &["vmodule", "log_backtrace_at"]),
];

fn flags() -> impl Iterator<Item = (&'static str, Kind)> {
    FLAGS.into_iter().flat_map(|(kind, names)| names.iter().map(move |name| (*name, kind)))
}

/// Commands other than `run` that access the store, and so take flanneld's flags for etcd.
const STORE_COMMANDS: [&str; 5] = ["leases", "lease", "config", "service", "endpoint"];

/// The arguments for this program's parser. Only the arguments of `run`, of a program invoked as `flanneld` and of commands
/// that access the store are translated.
pub(super) fn command_line(
    arguments: impl IntoIterator<Item = OsString>,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<Vec<OsString>, String> {
    let mut arguments = arguments.into_iter().peekable();
    let Some(program) = arguments.next() else { return Ok(Vec::new()) };
    let is_flanneld = Path::new(&program).file_name() == Some(OsStr::new("flanneld"));
    let runs = is_flanneld || arguments.next_if(|argument| argument == "run").is_some();
    let mut line = Line { words: vec![program], seen: Vec::new(), runs };
    if runs {
        line.words.push("run".into());
    } else if !arguments.peek().is_some_and(|command| STORE_COMMANDS.iter().any(|known| command == known)) {
        line.words.extend(arguments);
        return Ok(line.words);
    }
    let mut rest = Vec::new();
    while let Some(argument) = arguments.next() {
        let text = argument.to_str().unwrap_or_default();
        if text == "--" {
            rest.push(argument);
            rest.extend(arguments);
            break;
        }
        let (name, value) =
            text.split_once('=').map_or((text, None), |(name, value)| (name, Some(OsString::from(value))));
        let name = name.strip_prefix("--").or_else(|| name.strip_prefix('-'));
        let known = name.and_then(|name| flags().find(|(flag, kind)| *flag == name && line.knows(*kind)));
        let Some((name, kind)) = known else {
            line.native(argument);
            continue;
        };
        let value = match value {
            Some(value) => value,
            None if matches!(kind, Kind::Switch | Kind::Version | Kind::UnsupportedSwitch(_)) => {
                "true".into()
            }
            None => {
                arguments.next().ok_or_else(|| format!("--{name} needs a value: write --{name}=VALUE"))?
            }
        };
        if kind == Kind::Version {
            // As with flanneld, nothing else happens. Behind `run`, the parser would print the name of the command with it.
            if boolean("--version", &value)? {
                line.words.truncate(1);
                line.words.push("--version".into());
                return Ok(line.words);
            }
            continue;
        }
        line.seen.push(name);
        line.add(name, kind, &format!("--{name}"), &value)?;
    }
    line.environment(&environment)?;
    line.words.append(&mut rest);
    Ok(line.words)
}

/// The translated arguments.
struct Line {
    words: Vec<OsString>,
    /// flanneld's flags on the command line.
    seen: Vec<&'static str>,
    /// Whether the command is `run`; others know only the flags for etcd.
    runs: bool,
}

impl Line {
    fn knows(&self, kind: Kind) -> bool {
        self.runs || kind == Kind::Etcd
    }

    /// Whether the store is not etcd.
    fn has_other_store(&self, environment: &impl Fn(&str) -> Option<OsString>) -> bool {
        let value_of = |flag: &str| {
            self.words.iter().enumerate().rev().find_map(|(position, word)| {
                let rest = word.to_str()?.strip_prefix("--")?.strip_prefix(flag)?;
                match rest.strip_prefix('=') {
                    Some(value) => Some(OsString::from(value)),
                    None if rest.is_empty() => Some(self.words.get(position + 1)?.clone()),
                    None => None,
                }
            })
        };
        let variable = || environment("OVERLAY_AGENT_STORE").filter(|value| !value.is_empty());
        match value_of("store").or_else(variable) {
            Some(store) => store != "etcd",
            None => value_of("peer").is_some(),
        }
    }

    /// Adds an argument that flanneld does not know. `run` has no one-letter options, so one dash before a longer name means
    /// two, as for Go.
    fn native(&mut self, argument: OsString) {
        let text = argument.to_str().unwrap_or_default();
        // Except `-ojson`, which means `-o json`.
        let single = text.strip_prefix('-').filter(|rest| rest.len() > 1 && !rest.starts_with('-'));
        let long =
            single.filter(|_| self.runs || !text.starts_with("-o")).map(|rest| format!("--{rest}").into());
        self.words.push(long.unwrap_or(argument));
    }

    /// Adds flags that only `FLANNELD_*` variables set.
    fn environment(&mut self, environment: &impl Fn(&str) -> Option<OsString>) -> Result<(), String> {
        let other_store = self.has_other_store(environment);
        for (name, kind) in flags() {
            // flanneld takes an empty variable for one that is not set.
            let set = |name: &str| environment(name).filter(|value| !value.is_empty());
            let own =
                |name: &str| environment(name).filter(|value| kind == Kind::Emptiable || !value.is_empty());
            let upper = name.to_uppercase().replace('-', "_");
            let variable = format!("FLANNELD_{upper}");
            // OVERLAY_AGENT_* variables take precedence.
            let skip = kind == Kind::Version
                || !self.knows(kind)
                || (matches!(kind, Kind::Etcd | Kind::Lease) && other_store)
                || self.seen.contains(&name)
                || own(&format!("OVERLAY_AGENT_{upper}")).is_some();
            if let (false, Some(value)) = (skip, set(&variable)) {
                self.add(name, kind, &variable, &value)?;
            }
        }
        Ok(())
    }

    /// Adds one of flanneld's flags; `spelled` is its name in errors.
    fn add(&mut self, name: &str, kind: Kind, spelled: &str, value: &OsStr) -> Result<(), String> {
        let unsupported = |reason| Err(format!("{spelled} is not supported: {reason}"));
        match kind {
            Kind::Value | Kind::Etcd | Kind::Lease | Kind::UnsupportedValue(_) if value.is_empty() => {}
            Kind::Value | Kind::Emptiable | Kind::Etcd | Kind::Lease => {
                let mut word = OsString::from(format!("--{name}="));
                word.push(value);
                self.words.push(word);
            }
            Kind::Switch => self.words.push(format!("--{name}={}", boolean(spelled, value)?).into()),
            Kind::UnsupportedValue(reason) => return unsupported(reason),
            Kind::UnsupportedSwitch(reason) if boolean(spelled, value)? => return unsupported(reason),
            // The version is no part of the translation.
            Kind::Version | Kind::UnsupportedSwitch(_) => {}
        }
        Ok(())
    }
}

/// Go's strconv.ParseBool.
fn boolean(flag: &str, value: &OsStr) -> Result<bool, String> {
    match value.to_str() {
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        _ => {
            Err(format!("{flag} is a boolean: set it to true or false, not to {:?}", value.to_string_lossy()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Translates `line`, split at spaces, with these variables set.
    fn read(line: &str, variables: &[(&str, &str)]) -> Result<String, String> {
        let environment = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| OsString::from(value))
        };
        let words = command_line(line.split(' ').map(OsString::from), environment)?;
        Ok(words.join(OsStr::new(" ")).into_string().unwrap())
    }

    #[track_caller]
    fn check(variables: &[(&str, &str)], lines: &[(&str, &str)]) {
        for (line, expected) in lines {
            assert_eq!(read(line, variables).as_deref(), Ok(*expected), "{line}");
        }
    }

    #[test]
    fn every_spelling_of_go_flags_is_read() {
        let same = "x run --iface=eth1 --etcd-prefix=/a --ip-masq=true";
        check(
            &[],
            &[
                ("x run -iface eth1 -etcd-prefix=/a -ip-masq", same),
                ("x run --iface eth1 --etcd-prefix=/a --ip-masq=true", same),
                ("x run --iface=eth1 -etcd-prefix /a -ip-masq=1", same),
                ("x run -ip-masq=F", "x run --ip-masq=false"),
                // As in Go, a switch does not take the next argument as its value.
                ("x run -ip-masq false", "x run --ip-masq=true false"),
                ("x run -iface -odd", "x run --iface=-odd"),
                ("x run -v 2 -iface a -iface b", "x run --v=2 --iface=a --iface=b"),
                // Invoked as flanneld, it runs.
                ("/bin/flanneld -healthz-port 9 -version -kube-subnet-mgr", "/bin/flanneld --version"),
                ("x run --version", "x --version"),
                ("flanneld --version=false", "flanneld run"),
                // Values that request nothing are accepted even for unsupported flags.
                ("x run -kube-subnet-mgr=false -public-ipv6=", "x run"),
                // Native flags, and all that follows `--`, are unchanged but for the second dash.
                (
                    "x run -h --datapath tun -device ovl1 -- -iface",
                    "x run -h --datapath tun --device ovl1 -- -iface",
                ),
            ],
        );
    }

    #[test]
    fn other_commands_are_unchanged() {
        let unchanged = ["x status -o json", "x"].map(|line| (line, line));
        check(&[("FLANNELD_IFACE", "eth9")], &unchanged);
    }

    #[test]
    fn commands_that_access_the_store_take_the_flags_for_etcd() {
        check(
            &[("FLANNELD_IFACE", "eth9"), ("FLANNELD_ETCD_PREFIX", "/env")],
            &[(
                "x lease release -etcd-endpoints=a:1 10.5.1.0/24 -ojson",
                "x lease release --etcd-endpoints=a:1 10.5.1.0/24 -ojson --etcd-prefix=/env",
            )],
        );
        let lines =
            [("x config show -- -iface", "x config show -- -iface"), ("x leases -iface", "x leases --iface")];
        check(&[], &lines);
    }

    #[test]
    fn the_command_line_takes_precedence_over_variables() {
        check(
            &[
                ("FLANNELD_ETCD_ENDPOINTS", "http://a:1"),
                ("FLANNELD_ETCD_PREFIX", "/env"),
                ("FLANNELD_IP_MASQ", "true"),
                ("FLANNELD_ETCD_CAFILE", ""),
                ("FLANNELD_SUBNET_FILE", "/theirs"),
                ("OVERLAY_AGENT_SUBNET_FILE", "/ours"),
                ("FLANNELD_VERSION", "true"),
            ],
            &[
                (
                    "flanneld -etcd-prefix=/line",
                    "flanneld run --etcd-prefix=/line --etcd-endpoints=http://a:1 --ip-masq=true",
                ),
                // An empty value on the command line selects the default and overrides the variable.
                ("flanneld -etcd-prefix= -etcd-endpoints= -ip-masq=0", "flanneld run --ip-masq=false"),
            ],
        );
    }

    #[test]
    fn an_empty_subnet_file_is_a_setting() {
        let empty = "flanneld run --subnet-file=";
        let unset = [("flanneld", "flanneld run"), ("flanneld -subnet-file=", empty)];
        check(&[("FLANNELD_SUBNET_FILE", "")], &unset);
        let ours = [("FLANNELD_SUBNET_FILE", "/theirs"), ("OVERLAY_AGENT_SUBNET_FILE", "")];
        check(&ours, &[("flanneld", "flanneld run")]);
    }

    #[test]
    fn variables_for_etcd_are_ignored_with_another_store() {
        let variables = [("FLANNELD_ETCD_PREFIX", "/env"), ("FLANNELD_IFACE", "eth1")];
        for line in ["x run --store dir:/a", "x run -peer=10.1.2.0/24=1.2.3.4"] {
            let read = read(line, &variables).unwrap();
            assert!(!read.contains("etcd") && read.ends_with("--iface=eth1"), "{read}");
        }
        for line in ["x run --store etcd --peer=10.1.2.0/24=1.2.3.4", "x run -store=etcd"] {
            let read = read(line, &variables).unwrap();
            assert!(read.split(' ').any(|word| word == "--etcd-prefix=/env"), "{read}");
        }
        check(&[("OVERLAY_AGENT_STORE", "dir:/a"), variables[0]], &[("x run", "x run")]);
    }

    #[test]
    fn unsupported_flags_are_rejected_by_name() {
        for (line, words) in [
            ("flanneld -kube-subnet-mgr", "--kube-subnet-mgr is not supported: only flannel's Kubernetes"),
            ("flanneld -kube-api-url=x", "--kube-api-url is not supported: only flannel's Kubernetes"),
            ("flanneld -kubeconfig-file x", "--kubeconfig-file is not supported: only flannel's Kubernetes"),
            ("flanneld -net-config-path=/x", "--net-config-path is not supported: only flannel's Kubernetes"),
            ("x run --public-ipv6 fd00::1", "IPv4 only"),
            ("x run -vmodule=a=2", "RUST_LOG"),
            ("x run -ip-masq=yes", "\"yes\""),
            ("x run -iface", "--iface=VALUE"),
        ] {
            let error = read(line, &[]).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        let error = read("x run", &[("FLANNELD_PUBLIC_IPV6", "fd00::1")]).unwrap_err();
        assert!(error.starts_with("FLANNELD_PUBLIC_IPV6 "), "{error}");
    }

    #[test]
    fn flags_are_listed_once() {
        let names: std::collections::BTreeSet<_> = flags().map(|(name, _)| name).collect();
        assert_eq!((names.len(), flags().count()), (33, 33));
    }
}
