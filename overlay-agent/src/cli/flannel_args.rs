//! Translates flanneld's command line and environment into arguments for this program's parser.
//!
//! flanneld uses Go's flags: one dash or two, `-x=value` or `-x value`, and `-x` or `-x=false` for switches. Every flag is also
//! an environment variable, `FLANNELD_` and its name; the command line takes precedence. Flags for Kubernetes and IPv6 are
//! rejected by name: ignoring them would set up another network than the one that the operator configured.

use std::{
    ffi::{OsStr, OsString},
    path::Path,
};

use thiserror::Error;

/// An error in flanneld's flags or variables.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum FlagError {
    /// This program does not support the flag.
    #[error("{flag} is not supported: {reason}")]
    Unsupported {
        /// The flag or variable.
        flag: String,
        /// Why, and an alternative.
        reason: &'static str,
    },
    /// Go does not parse the value as a boolean.
    #[error("{flag} is a boolean: set it to true or false, not to {value:?}")]
    NotBoolean {
        /// The flag or variable.
        flag: String,
        /// The value.
        value: String,
    },
    /// The last flag of the command line has no value.
    #[error("{flag} needs a value: write {flag}=VALUE")]
    NoValue {
        /// The flag.
        flag: String,
    },
}

/// The kind of a flag's value, and its treatment.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A value. As for flanneld, an empty one selects the default.
    Value,
    /// A value for the connection to etcd.
    Etcd,
    /// A value for leases in etcd.
    Lease,
    /// A boolean.
    Switch,
    /// Prints the version; flanneld does not read it from the environment.
    Version,
    /// A value of an unsupported flag.
    UnsupportedValue(&'static str),
    /// A boolean that may only be false.
    UnsupportedSwitch(&'static str),
}

const KUBERNETES: &str =
    "only flannel's Kubernetes subnet manager uses it; keep leases in etcd or in a directory";
const IPV4_ONLY: &str = "the overlay carries IPv4 over IPv4 only; remove it";
const GO_FILES: &str = "it filters by Go source files; set RUST_LOG instead";

/// All of flanneld's flags.
const FLAGS: [(&str, Kind); 33] = [
    ("etcd-endpoints", Kind::Etcd),
    ("etcd-prefix", Kind::Etcd),
    ("etcd-keyfile", Kind::Etcd),
    ("etcd-certfile", Kind::Etcd),
    ("etcd-cafile", Kind::Etcd),
    ("etcd-username", Kind::Etcd),
    ("etcd-password", Kind::Etcd),
    ("subnet-lease-renew-margin", Kind::Lease),
    ("iface", Kind::Value),
    ("iface-regex", Kind::Value),
    ("iface-can-reach", Kind::Value),
    ("public-ip", Kind::Value),
    ("subnet-file", Kind::Value),
    ("iptables-resync", Kind::Value),
    ("healthz-ip", Kind::Value),
    ("healthz-port", Kind::Value),
    ("v", Kind::Value),
    ("ip-masq", Kind::Switch),
    ("ip-masq-fully-random-disable", Kind::Switch),
    ("iptables-forward-rules", Kind::Switch),
    ("ip-blackhole-route", Kind::Switch),
    ("version", Kind::Version),
    ("kube-subnet-mgr", Kind::UnsupportedSwitch(KUBERNETES)),
    ("kube-api-url", Kind::UnsupportedValue(KUBERNETES)),
    ("kube-annotation-prefix", Kind::UnsupportedValue(KUBERNETES)),
    ("kubeconfig-file", Kind::UnsupportedValue(KUBERNETES)),
    ("net-config-path", Kind::UnsupportedValue(KUBERNETES)),
    ("set-node-network-unavailable", Kind::UnsupportedSwitch(KUBERNETES)),
    ("use-multi-cluster-cidr", Kind::UnsupportedSwitch(KUBERNETES)),
    ("public-ipv6", Kind::UnsupportedValue(IPV4_ONLY)),
    ("persistent-mac", Kind::UnsupportedSwitch("the overlay device has no hardware address; remove it")),
    ("vmodule", Kind::UnsupportedValue(GO_FILES)),
    ("log_backtrace_at", Kind::UnsupportedValue(GO_FILES)),
];

/// Commands other than `run` that access the store, and so take flanneld's flags for etcd.
const STORE_COMMANDS: [&str; 3] = ["leases", "lease", "config"];

/// The arguments for this program's parser. Only the arguments of `run`, of a program invoked as `flanneld` and of commands
/// that access the store are translated.
pub(super) fn command_line(
    arguments: impl IntoIterator<Item = OsString>,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<Vec<OsString>, FlagError> {
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
    while let Some(argument) = arguments.next() {
        let text = argument.to_str().unwrap_or_default();
        if text == "--" {
            line.environment(&environment)?;
            line.words.push(argument);
            line.words.extend(arguments);
            return Ok(line.words);
        }
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(OsString::from(value))),
            None => (text, None),
        };
        let name = name.strip_prefix("--").or_else(|| name.strip_prefix('-'));
        match name.and_then(find).filter(|(_, kind)| line.knows(*kind)) {
            Some((name, Kind::Value | Kind::Etcd | Kind::Lease | Kind::UnsupportedValue(_)))
                if value.is_none() =>
            {
                let flag = format!("--{name}");
                let value = arguments.next().ok_or(FlagError::NoValue { flag })?;
                line.flag(name, value)?;
            }
            Some((name, _)) => line.flag(name, value.unwrap_or_else(|| "true".into()))?,
            None => line.native(argument),
        }
    }
    line.environment(&environment)?;
    Ok(line.words)
}

fn find(name: &str) -> Option<(&'static str, Kind)> {
    FLAGS.into_iter().find(|(known, _)| *known == name)
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

    /// Adds one of flanneld's flags from the command line.
    fn flag(&mut self, name: &'static str, value: OsString) -> Result<(), FlagError> {
        self.seen.push(name);
        self.add(name, &format!("--{name}"), value)
    }

    /// Adds an argument that flanneld does not know. `run` has no one-letter options, so one dash before a longer name means
    /// two, as for Go.
    fn native(&mut self, argument: OsString) {
        let text = argument.to_str().unwrap_or_default();
        // Except `-ojson`, which means `-o json`.
        let single = text.strip_prefix('-').filter(|rest| rest.len() > 1 && !rest.starts_with('-'));
        match single.filter(|_| self.runs || !text.starts_with("-o")) {
            Some(rest) => self.words.push(format!("--{rest}").into()),
            None => self.words.push(argument),
        }
    }

    /// Adds flags that only `FLANNELD_*` variables set.
    fn environment(&mut self, environment: &impl Fn(&str) -> Option<OsString>) -> Result<(), FlagError> {
        let other_store = self.has_other_store(environment);
        let set = |name: &str| environment(name).filter(|value| !value.is_empty());
        for (name, kind) in FLAGS {
            let upper = name.to_uppercase().replace('-', "_");
            let variable = format!("FLANNELD_{upper}");
            // OVERLAY_AGENT_* variables take precedence.
            let skip = kind == Kind::Version
                || !self.knows(kind)
                || (matches!(kind, Kind::Etcd | Kind::Lease) && other_store)
                || self.seen.contains(&name)
                || set(&format!("OVERLAY_AGENT_{upper}")).is_some();
            if let (false, Some(value)) = (skip, set(&variable)) {
                self.add(name, &variable, value)?;
            }
        }
        Ok(())
    }

    /// Adds one of flanneld's flags; `spelled` is its name in errors.
    fn add(&mut self, name: &str, spelled: &str, value: OsString) -> Result<(), FlagError> {
        let unsupported = |reason| Err(FlagError::Unsupported { flag: spelled.to_owned(), reason });
        let Some((_, kind)) = find(name) else { return Ok(()) };
        match kind {
            Kind::Value | Kind::Etcd | Kind::Lease if value.is_empty() => {}
            Kind::Value | Kind::Etcd | Kind::Lease => self.push(name, &value),
            Kind::Switch => self.push(name, boolean(spelled, &value)?.to_string().as_ref()),
            Kind::Version if boolean(spelled, &value)? => self.words.push("--version".into()),
            Kind::UnsupportedValue(reason) if !value.is_empty() => return unsupported(reason),
            Kind::UnsupportedSwitch(reason) if boolean(spelled, &value)? => return unsupported(reason),
            Kind::Version | Kind::UnsupportedValue(_) | Kind::UnsupportedSwitch(_) => {}
        }
        Ok(())
    }

    fn push(&mut self, name: &str, value: &OsStr) {
        let mut word = OsString::from(format!("--{name}="));
        word.push(value);
        self.words.push(word);
    }
}

/// Go's strconv.ParseBool.
fn boolean(flag: &str, value: &OsStr) -> Result<bool, FlagError> {
    match value.to_str() {
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        _ => {
            Err(FlagError::NotBoolean { flag: flag.to_owned(), value: value.to_string_lossy().into_owned() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Translates `line`, split at spaces, with these variables set.
    fn read(line: &str, variables: &[(&str, &str)]) -> Result<Vec<String>, FlagError> {
        let environment = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| OsString::from(value))
        };
        let words = command_line(line.split(' ').map(OsString::from), environment)?;
        Ok(words.into_iter().map(|word| word.into_string().unwrap()).collect())
    }

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn every_spelling_of_go_flags_is_read() {
        let expected = Ok(words("overlay-agent run --iface=eth1 --etcd-prefix=/a --ip-masq=true"));
        for line in [
            "overlay-agent run -iface eth1 -etcd-prefix=/a -ip-masq",
            "overlay-agent run --iface eth1 --etcd-prefix=/a --ip-masq=true",
            "overlay-agent run --iface=eth1 -etcd-prefix /a -ip-masq=1",
        ] {
            assert_eq!(read(line, &[]), expected, "{line}");
        }
        assert_eq!(read("x run -ip-masq=F", &[]), Ok(words("x run --ip-masq=false")));
        // As in Go, a switch does not take the next argument as its value.
        assert_eq!(read("x run -ip-masq false", &[]), Ok(words("x run --ip-masq=true false")));
        assert_eq!(read("x run -iface -odd", &[]), Ok(words("x run --iface=-odd")));
        assert_eq!(read("x run -v 2 -iface a -iface b", &[]), Ok(words("x run --v=2 --iface=a --iface=b")));
    }

    #[test]
    fn invoked_as_flanneld_it_runs() {
        assert_eq!(
            read("/opt/bin/flanneld -healthz-port 9 -version", &[]),
            Ok(words("/opt/bin/flanneld run --healthz-port=9 --version"))
        );
        assert_eq!(read("flanneld --version=false", &[]), Ok(words("flanneld run")));
    }

    #[test]
    fn other_commands_and_native_flags_are_unchanged() {
        let variables = [("FLANNELD_IFACE", "eth9")];
        assert_eq!(
            read("overlay-agent status -o json", &variables),
            Ok(words("overlay-agent status -o json"))
        );
        assert_eq!(read("overlay-agent", &variables), Ok(words("overlay-agent")));
        assert_eq!(
            read("x run -h --datapath tun -device ovl1 -- -iface", &[]),
            Ok(words("x run -h --datapath tun --device ovl1 -- -iface"))
        );
    }

    #[test]
    fn commands_that_access_the_store_take_the_flags_for_etcd() {
        let variables = [("FLANNELD_IFACE", "eth9"), ("FLANNELD_ETCD_PREFIX", "/env")];
        assert_eq!(
            read("x lease release -etcd-endpoints=a:1 10.5.1.0/24 -ojson", &variables),
            Ok(words("x lease release --etcd-endpoints=a:1 10.5.1.0/24 -ojson --etcd-prefix=/env"))
        );
        assert_eq!(read("x config show -- -iface", &[]), Ok(words("x config show -- -iface")));
        assert_eq!(read("x leases -iface", &[]), Ok(words("x leases --iface")));
    }

    #[test]
    fn the_command_line_takes_precedence_over_variables() {
        let variables = [
            ("FLANNELD_ETCD_ENDPOINTS", "http://a:1"),
            ("FLANNELD_ETCD_PREFIX", "/env"),
            ("FLANNELD_IP_MASQ", "true"),
            ("FLANNELD_ETCD_CAFILE", ""),
            ("FLANNELD_SUBNET_FILE", "/theirs"),
            ("OVERLAY_AGENT_SUBNET_FILE", "/ours"),
            ("FLANNELD_VERSION", "true"),
        ];
        assert_eq!(
            read("flanneld -etcd-prefix=/line", &variables),
            Ok(words("flanneld run --etcd-prefix=/line --etcd-endpoints=http://a:1 --ip-masq=true"))
        );
        // An empty value on the command line selects the default and overrides the variable.
        assert_eq!(
            read("flanneld -etcd-prefix= -etcd-endpoints= -ip-masq=0", &variables),
            Ok(words("flanneld run --ip-masq=false"))
        );
    }

    #[test]
    fn variables_for_etcd_are_ignored_with_another_store() {
        let variables = [("FLANNELD_ETCD_PREFIX", "/env"), ("FLANNELD_IFACE", "eth1")];
        for line in ["x run --store dir:/a", "x run -peer=10.1.2.0/24=1.2.3.4"] {
            let read = read(line, &variables).unwrap().join(" ");
            assert!(!read.contains("etcd") && read.ends_with("--iface=eth1"), "{read}");
        }
        for line in ["x run --store etcd --peer=10.1.2.0/24=1.2.3.4", "x run -store=etcd"] {
            assert!(read(line, &variables).unwrap().contains(&"--etcd-prefix=/env".to_owned()), "{line}");
        }
        let ours = [("OVERLAY_AGENT_STORE", "dir:/a"), variables[0]];
        assert_eq!(read("x run", &ours), Ok(words("x run")));
    }

    #[test]
    fn unsupported_flags_are_rejected_by_name() {
        let error = |line: &str, variables: &[_]| read(line, variables).unwrap_err().to_string();
        for flag in ["kube-subnet-mgr", "kube-api-url=http://x", "kubeconfig-file x", "net-config-path=/x"] {
            let error = error(&format!("flanneld -{flag}"), &[]);
            let name = flag.split(['=', ' ']).next().unwrap();
            assert!(error.starts_with(&format!("--{name} ")) && error.contains("Kubernetes"), "{error}");
        }
        assert!(error("x run --public-ipv6 fd00::1", &[]).contains("IPv4 only"));
        assert!(error("x run", &[("FLANNELD_PUBLIC_IPV6", "fd00::1")]).starts_with("FLANNELD_PUBLIC_IPV6 "));
        assert!(error("x run -vmodule=a=2", &[]).contains("RUST_LOG"));
        assert!(error("x run -ip-masq=yes", &[]).contains("\"yes\""));
        assert!(error("x run -iface", &[]).contains("--iface=VALUE"));
        // Values that request nothing are accepted.
        assert_eq!(read("x run -kube-subnet-mgr=false -public-ipv6=", &[]), Ok(words("x run")));
    }

    #[test]
    fn flags_are_listed_once() {
        for (position, (name, _)) in FLAGS.iter().enumerate() {
            assert!(FLAGS.iter().skip(position + 1).all(|(other, _)| other != name), "{name}");
        }
    }
}
