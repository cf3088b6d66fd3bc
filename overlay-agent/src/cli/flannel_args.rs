//! flanneld's command line and environment, brought into the form that this program's own parser reads.
//!
//! flanneld is written in Go, whose flags take one dash or two, `-x=value` or `-x value`, and `-x` or `-x=false` for
//! switches. Every flag is also an environment variable, `FLANNELD_` and its name; the command line goes first. What only
//! makes sense in another flannel (Kubernetes, IPv6) is refused by name: silence would leave an operator with a network that
//! is not the one they asked for.

use std::{
    ffi::{OsStr, OsString},
    path::Path,
};

use thiserror::Error;

/// Why a flag of flanneld's is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The flag has no meaning for this program.
    #[error("{flag} cannot apply here: {why}")]
    NotHere {
        /// The flag or variable.
        flag: String,
        /// What to do instead.
        why: &'static str,
    },
    /// A switch has a value that Go does not read as a boolean.
    #[error("{flag} is a switch: set it to true or false, not to {value:?}")]
    NotBoolean {
        /// The flag or variable.
        flag: String,
        /// What was given.
        value: String,
    },
    /// A flag at the end of the command line has no value.
    #[error("{flag} needs a value: write {flag}=VALUE")]
    NoValue {
        /// The flag.
        flag: String,
    },
}

/// What a flag takes, and what becomes of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A value. An empty one is as good as none, as for flanneld.
    Value,
    /// A value that says how to reach etcd.
    Etcd,
    /// A value that says how to keep a lease in etcd.
    Lease,
    /// A boolean.
    Switch,
    /// Prints the version; flanneld looks at it before the environment.
    Version,
    /// A value that has no meaning here.
    NoSuchValue(&'static str),
    /// A boolean that has no meaning here, unless it is false.
    NoSuchSwitch(&'static str),
}

const KUBERNETES: &str =
    "it is for flannel's Kubernetes subnet manager; leases live in etcd or in a directory here";
const IPV4_ONLY: &str = "the overlay carries IPv4 over IPv4 only; leave it out";
const GO_FILES: &str = "it names Go source files; RUST_LOG filters this program's log";

/// Every flag of flanneld's.
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
    ("kube-subnet-mgr", Kind::NoSuchSwitch(KUBERNETES)),
    ("kube-api-url", Kind::NoSuchValue(KUBERNETES)),
    ("kube-annotation-prefix", Kind::NoSuchValue(KUBERNETES)),
    ("kubeconfig-file", Kind::NoSuchValue(KUBERNETES)),
    ("net-config-path", Kind::NoSuchValue(KUBERNETES)),
    ("set-node-network-unavailable", Kind::NoSuchSwitch(KUBERNETES)),
    ("use-multi-cluster-cidr", Kind::NoSuchSwitch(KUBERNETES)),
    ("public-ipv6", Kind::NoSuchValue(IPV4_ONLY)),
    ("persistent-mac", Kind::NoSuchSwitch("the overlay device has no hardware address; leave it out")),
    ("vmodule", Kind::NoSuchValue(GO_FILES)),
    ("log_backtrace_at", Kind::NoSuchValue(GO_FILES)),
];

/// Commands beside `run` that read or write what is in etcd, and so take flanneld's flags for it.
const STORE_COMMANDS: [&str; 3] = ["leases", "lease", "config"];

/// The command line that this program's parser reads: unchanged unless it starts an agent, by `run` or by the name
/// `flanneld`, or asks for what is in etcd.
pub(super) fn command_line(
    arguments: impl IntoIterator<Item = OsString>,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<Vec<OsString>, Refusal> {
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
            Some((name, Kind::Value | Kind::Etcd | Kind::Lease | Kind::NoSuchValue(_)))
                if value.is_none() =>
            {
                let flag = format!("--{name}");
                let value = arguments.next().ok_or(Refusal::NoValue { flag })?;
                line.flag(name, value)?;
            }
            Some((name, _)) => line.flag(name, value.unwrap_or_else(|| "true".into()))?,
            None => line.own(argument),
        }
    }
    line.environment(&environment)?;
    Ok(line.words)
}

fn find(name: &str) -> Option<(&'static str, Kind)> {
    FLAGS.into_iter().find(|(known, _)| *known == name)
}

/// The command line as it grows.
struct Line {
    words: Vec<OsString>,
    /// Flags of flanneld's that the command line names.
    seen: Vec<&'static str>,
    /// The command is `run`; others know only the flags for etcd.
    runs: bool,
}

impl Line {
    fn knows(&self, kind: Kind) -> bool {
        self.runs || kind == Kind::Etcd
    }

    /// Whether leases live elsewhere than in etcd.
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

    /// Adds a flag of flanneld's from the command line.
    fn flag(&mut self, name: &'static str, value: OsString) -> Result<(), Refusal> {
        self.seen.push(name);
        self.add(name, &format!("--{name}"), value)
    }

    /// Adds an argument that flanneld does not know. None of ours has a one-letter name of its own, so one dash before a
    /// longer name means two there, too.
    fn own(&mut self, argument: OsString) {
        let text = argument.to_str().unwrap_or_default();
        // `-ojson` is a way to write `-o json`.
        let single = text.strip_prefix('-').filter(|rest| rest.len() > 1 && !rest.starts_with('-'));
        match single.filter(|_| self.runs || !text.starts_with("-o")) {
            Some(rest) => self.words.push(format!("--{rest}").into()),
            None => self.words.push(argument),
        }
    }

    /// Adds what the command line does not say and `FLANNELD_*` does.
    fn environment(&mut self, environment: &impl Fn(&str) -> Option<OsString>) -> Result<(), Refusal> {
        let other_store = self.has_other_store(environment);
        let set = |name: &str| environment(name).filter(|value| !value.is_empty());
        for (name, kind) in FLAGS {
            let upper = name.to_uppercase().replace('-', "_");
            let variable = format!("FLANNELD_{upper}");
            // Our own variable is the more deliberate word.
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

    /// Adds a flag of flanneld's; `spelled` is what an error calls it.
    fn add(&mut self, name: &str, spelled: &str, value: OsString) -> Result<(), Refusal> {
        let refusal = |why| Err(Refusal::NotHere { flag: spelled.to_owned(), why });
        let Some((_, kind)) = find(name) else { return Ok(()) };
        match kind {
            Kind::Value | Kind::Etcd | Kind::Lease if value.is_empty() => {}
            Kind::Value | Kind::Etcd | Kind::Lease => self.push(name, &value),
            Kind::Switch => self.push(name, boolean(spelled, &value)?.to_string().as_ref()),
            Kind::Version if boolean(spelled, &value)? => self.words.push("--version".into()),
            Kind::NoSuchValue(why) if !value.is_empty() => return refusal(why),
            Kind::NoSuchSwitch(why) if boolean(spelled, &value)? => return refusal(why),
            Kind::Version | Kind::NoSuchValue(_) | Kind::NoSuchSwitch(_) => {}
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
fn boolean(flag: &str, value: &OsStr) -> Result<bool, Refusal> {
    match value.to_str() {
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        _ => Err(Refusal::NotBoolean { flag: flag.to_owned(), value: value.to_string_lossy().into_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The command line that `line`, split at spaces, becomes with these variables set.
    fn read(line: &str, variables: &[(&str, &str)]) -> Result<Vec<String>, Refusal> {
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
    fn every_spelling_of_gos_flags_is_read() {
        let expected = Ok(words("overlay-agent run --iface=eth1 --etcd-prefix=/a --ip-masq=true"));
        for line in [
            "overlay-agent run -iface eth1 -etcd-prefix=/a -ip-masq",
            "overlay-agent run --iface eth1 --etcd-prefix=/a --ip-masq=true",
            "overlay-agent run --iface=eth1 -etcd-prefix /a -ip-masq=1",
        ] {
            assert_eq!(read(line, &[]), expected, "{line}");
        }
        assert_eq!(read("x run -ip-masq=F", &[]), Ok(words("x run --ip-masq=false")));
        // A switch takes no word of its own: Go does not read `false` here either.
        assert_eq!(read("x run -ip-masq false", &[]), Ok(words("x run --ip-masq=true false")));
        assert_eq!(read("x run -iface -odd", &[]), Ok(words("x run --iface=-odd")));
        assert_eq!(read("x run -v 2 -iface a -iface b", &[]), Ok(words("x run --v=2 --iface=a --iface=b")));
    }

    #[test]
    fn under_the_name_flanneld_it_runs() {
        assert_eq!(
            read("/opt/bin/flanneld -healthz-port 9 -version", &[]),
            Ok(words("/opt/bin/flanneld run --healthz-port=9 --version"))
        );
        assert_eq!(read("flanneld --version=false", &[]), Ok(words("flanneld run")));
    }

    #[test]
    fn other_commands_and_our_own_flags_are_left_alone() {
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
    fn commands_about_the_store_take_the_flags_for_etcd() {
        let variables = [("FLANNELD_IFACE", "eth9"), ("FLANNELD_ETCD_PREFIX", "/env")];
        assert_eq!(
            read("x lease release -etcd-endpoints=a:1 10.5.1.0/24 -ojson", &variables),
            Ok(words("x lease release --etcd-endpoints=a:1 10.5.1.0/24 -ojson --etcd-prefix=/env"))
        );
        assert_eq!(read("x config show -- -iface", &[]), Ok(words("x config show -- -iface")));
        assert_eq!(read("x leases -iface", &[]), Ok(words("x leases --iface")));
    }

    #[test]
    fn variables_count_where_the_command_line_is_silent() {
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
        // An empty value on the command line means the default, whatever the environment says.
        assert_eq!(
            read("flanneld -etcd-prefix= -etcd-endpoints= -ip-masq=0", &variables),
            Ok(words("flanneld run --ip-masq=false"))
        );
    }

    #[test]
    fn variables_about_etcd_mean_nothing_to_another_store() {
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
    fn what_cannot_apply_is_refused_by_name() {
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
        // What asks for nothing is granted.
        assert_eq!(read("x run -kube-subnet-mgr=false -public-ipv6=", &[]), Ok(words("x run")));
    }

    #[test]
    fn flags_are_listed_once() {
        for (position, (name, _)) in FLAGS.iter().enumerate() {
            assert!(FLAGS.iter().skip(position + 1).all(|(other, _)| other != name), "{name}");
        }
    }
}
