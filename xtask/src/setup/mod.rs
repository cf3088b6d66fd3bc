//! `cargo xtask setup`: installs missing tools and packages for the build and the tests.

mod apt;
mod compiler;
mod linker;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;

use crate::step::{self, elapsed};
use crate::workspace::has_program;
pub(crate) use compiler::Compiler;

/// Install the tools for the build and the tests: a BPF compiler, bpf-linker and Debian packages
///
/// Installs only what is missing. Does not change the rustup default, another bpf-linker, or running services.
#[derive(Args)]
pub(crate) struct Options {
    /// Report only; the exit code is 1 if something is missing
    #[arg(long)]
    check: bool,
}

/// Extent of the set-up.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Scope {
    /// Tools for `build`.
    Build,
    /// Also tools for the demo and the tests.
    Everything,
}

/// Tools that build the eBPF programs.
pub(crate) struct Toolchain {
    /// A rustc for BPF, with the sources of `core`.
    pub(crate) compiler: Compiler,
    /// The path of a bpf-linker for the same LLVM.
    pub(crate) linker: PathBuf,
}

/// Runs the command.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let start = Instant::now();
    if options.check {
        return check(start);
    }
    ensure(Scope::Everything, true)?;
    Ok(ExitCode::SUCCESS)
}

/// Installs missing tools for `scope`. With `verbose`, also lists installed ones.
pub(crate) fn ensure(scope: Scope, verbose: bool) -> Result<Toolchain> {
    let start = Instant::now();
    let mut did = 0;
    let mut apt = apt::Apt::default();
    // The compiler determines the LLVM version: on a fresh machine, packages are installed in two rounds.
    let mut facts = Facts::gather(scope)?;
    while let missing = missing_packages(&facts)
        && !missing.is_empty()
    {
        let before = missing.clone();
        if !apt::is_here() {
            bail!("this is not a Debian system, install manually: {}", manual(&missing));
        }
        apt.install(&missing)?;
        did += 1;
        facts = Facts::gather(scope)?;
        if missing_packages(&facts) == before {
            bail!("{}", still_missing(&before));
        }
    }
    let Some(compiler) = facts.compiler.clone() else { bail!("{}", compiler::REMEDY) };
    let linker = match facts.linker.clone() {
        Some(linker) => linker,
        None => {
            did += 1;
            linker::install(compiler.llvm())?
        }
    };
    if verbose {
        facts.linker = Some(linker.clone());
        facts.print();
    }
    let state = match (scope, did) {
        (_, 1..) => "complete, installed the missing tools",
        (Scope::Build, _) => "complete for the build",
        (Scope::Everything, _) => "complete",
    };
    println!("setup: {state} ({})", elapsed(start));
    step::flush();
    Ok(Toolchain { compiler, linker })
}

fn check(start: Instant) -> Result<ExitCode> {
    let facts = Facts::gather(Scope::Everything)?;
    facts.print();
    let missing = missing_packages(&facts);
    if !missing.is_empty() {
        println!("missing  install manually: {}", manual(&missing));
    }
    if facts.compiler.is_none() || facts.linker.is_none() || !missing.is_empty() {
        let remedy = if apt::is_here() { "; run `cargo xtask setup`" } else { "" };
        println!("setup: incomplete{remedy} ({})", elapsed(start));
        return Ok(ExitCode::FAILURE);
    }
    println!("setup: complete ({})", elapsed(start));
    Ok(ExitCode::SUCCESS)
}

/// A Debian package, and a program in it that proves its presence on machines without dpkg.
struct Package {
    name: &'static str,
    program: &'static str,
}

/// Tools of the demo and the tests.
const TOOLS: [Package; 10] = [
    Package { name: "etcd-server", program: "etcd" },
    Package { name: "iperf3", program: "iperf3" },
    Package { name: "ethtool", program: "ethtool" },
    Package { name: "iproute2", program: "ip" },
    Package { name: "tcpdump", program: "tcpdump" },
    Package { name: "iputils-ping", program: "ping" },
    Package { name: "procps", program: "pgrep" },
    Package { name: "nftables", program: "nft" },
    Package { name: "curl", program: "curl" },
    // The program alone: the package dnsmasq would start it as a service.
    Package { name: "dnsmasq-base", program: "dnsmasq" },
];

/// The protobuf compiler with its .proto files, which the build of etcd's client needs.
const PROTOC: [&str; 2] = ["protobuf-compiler", "libprotobuf-dev"];

/// The state of this machine.
struct Facts {
    scope: Scope,
    /// The installed ones of all packages that may be needed.
    installed: BTreeSet<String>,
    /// A C compiler with the headers of the C library, which links Rust programs.
    cc: bool,
    /// A C++ compiler, which builds libFuzzer for `cargo xtask fuzz`.
    cxx: bool,
    /// Whether the contents of [`PROTOC`] are installed.
    protoc: bool,
    compiler: Option<Compiler>,
    linker: Option<PathBuf>,
}

impl Facts {
    fn gather(scope: Scope) -> Result<Self> {
        let mut names: BTreeSet<String> = TOOLS.iter().map(|tool| tool.name.to_owned()).collect();
        for llvm in linker::SUPPORTED_LLVM {
            names.extend(linker::packages(llvm));
        }
        let installed = match apt::installed(&names)? {
            Some(installed) => installed,
            None => {
                let there = TOOLS.iter().filter(|tool| has_program(tool.program));
                there.map(|tool| tool.name.to_owned()).collect()
            }
        };
        let linkable = |llvm| {
            let packages = linker::packages(llvm);
            linker::find(llvm).is_some()
                || linker::custom_llvm()
                // Other systems must provide LLVM already.
                || !apt::is_here()
                || packages.iter().all(|name| installed.contains(name) || apt::is_known(name))
        };
        let compiler = compiler::choose(compiler::nightly(), compiler::debian(), linkable);
        let linker = compiler.as_ref().and_then(|compiler| linker::find(compiler.llvm()));
        let cc = has_program("cc") && std::path::Path::new("/usr/include/stdio.h").exists();
        let cxx = has_program("c++");
        // On other systems than Debian, the .proto files are part of the compiler's package.
        let descriptions = std::path::Path::new("/usr/include/google/protobuf/descriptor.proto");
        let protoc = has_program("protoc") && (descriptions.exists() || !apt::is_here());
        Ok(Self { scope, installed, cc, cxx, protoc, compiler, linker })
    }

    fn print(&self) {
        let line = |there: bool, name: &str, what: &str| {
            println!("{}  {name:<14} {what}", if there { "ok     " } else { "missing" });
        };
        line(self.cc, "C compiler", "links Rust programs");
        line(self.cxx, "C++ compiler", "builds the fuzzer");
        line(self.protoc, "protoc", "compiles etcd's protocol for its client");
        match &self.compiler {
            Some(compiler) => line(true, "BPF compiler", &compiler.to_string()),
            None => line(false, "BPF compiler", "a rustc with the sources of core"),
        }
        match &self.linker {
            Some(linker) => line(true, "bpf-linker", &linker.display().to_string()),
            None => line(false, "bpf-linker", "links the eBPF programs, for the LLVM of the BPF compiler"),
        }
        for tool in &TOOLS {
            let what = format!("provides `{}` for the demo and the tests", tool.program);
            line(self.installed.contains(tool.name), tool.name, &what);
        }
    }
}

/// The Debian packages that have to be installed, given what the machine has.
fn missing_packages(facts: &Facts) -> Vec<String> {
    let mut wanted: Vec<String> = Vec::new();
    if !facts.cc || (facts.scope == Scope::Everything && !facts.cxx) {
        wanted.push("build-essential".to_owned());
    }
    if !facts.protoc {
        wanted.extend(PROTOC.map(str::to_owned));
    }
    match &facts.compiler {
        None => wanted.extend(compiler::PACKAGES.map(str::to_owned)),
        Some(compiler) if facts.linker.is_none() && !linker::custom_llvm() => {
            let packages = linker::packages(compiler.llvm());
            wanted.extend(packages.into_iter().filter(|name| !facts.installed.contains(name)));
        }
        Some(_) => {}
    }
    if facts.scope == Scope::Everything {
        let tools = TOOLS.iter().map(|tool| tool.name);
        wanted.extend(tools.filter(|name| !facts.installed.contains(*name)).map(str::to_owned));
    }
    wanted
}

/// How to install `packages`, or their contents, manually.
fn manual(packages: &[String]) -> String {
    if apt::is_here() {
        return apt::manual(packages);
    }
    let contents = packages.iter().map(|name| match TOOLS.iter().find(|tool| tool.name == name) {
        Some(tool) => format!("the program `{}`", tool.program),
        None if name == "build-essential" => {
            "compilers for C and C++ with the headers of the C library".to_owned()
        }
        None if PROTOC.contains(&name.as_str()) => {
            "the program `protoc` with its own .proto files".to_owned()
        }
        None if compiler::PACKAGES.contains(&name.as_str()) => compiler::NIGHTLY.to_owned(),
        None => format!("what Debian has as {name} (LLVM_PREFIX names the directory of an LLVM elsewhere)"),
    });
    let mut contents: Vec<_> = contents.collect();
    contents.dedup();
    contents.join(", ")
}

/// The error when packages are missing after their installation.
fn still_missing(packages: &[String]) -> String {
    let mut text = format!("apt-get installed {}, but they cannot be used", packages.join(" "));
    if packages.iter().any(|name| compiler::PACKAGES.contains(&name.as_str())) {
        text = format!("{text}; {}", compiler::REMEDY);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(scope: Scope, installed: &[&str]) -> Facts {
        Facts {
            scope,
            installed: installed.iter().map(|&name| name.to_owned()).collect(),
            cc: true,
            cxx: true,
            protoc: true,
            compiler: Some(Compiler::Debian { release: "1.96.0".to_owned(), llvm: 22 }),
            linker: Some(PathBuf::from("/tools/bpf-linker")),
        }
    }

    fn all_tools() -> Vec<&'static str> {
        TOOLS.iter().map(|tool| tool.name).collect()
    }

    #[test]
    fn a_complete_machine_needs_nothing() {
        assert_eq!(missing_packages(&machine(Scope::Everything, &all_tools())), [""; 0]);
    }

    #[test]
    fn the_build_needs_no_test_tools() {
        assert_eq!(missing_packages(&machine(Scope::Build, &[])), [""; 0]);
    }

    #[test]
    fn the_build_needs_protoc_and_its_files() {
        let mut facts = machine(Scope::Build, &[]);
        facts.protoc = false;
        assert_eq!(missing_packages(&facts), ["protobuf-compiler", "libprotobuf-dev"]);
        assert!(still_missing(&missing_packages(&facts)).contains("protobuf-compiler"));
    }

    #[test]
    fn the_fuzzer_needs_a_c_plus_plus_compiler_and_the_build_none() {
        let mut facts = machine(Scope::Everything, &all_tools());
        facts.cxx = false;
        assert_eq!(missing_packages(&facts), ["build-essential"]);
        facts.scope = Scope::Build;
        assert_eq!(missing_packages(&facts), [""; 0]);
    }

    #[test]
    fn only_the_absent_tools_are_installed() {
        let mut there = all_tools();
        there.retain(|&name| name != "iperf3" && name != "tcpdump");
        assert_eq!(missing_packages(&machine(Scope::Everything, &there)), ["iperf3", "tcpdump"]);
    }

    #[test]
    fn llvm_is_needed_only_to_build_the_linker() {
        let mut facts = machine(Scope::Build, &["llvm-22-dev"]);
        facts.linker = None;
        assert_eq!(missing_packages(&facts), ["libpolly-22-dev"]);
    }

    #[test]
    fn a_machine_without_a_compiler_gets_debians_before_any_llvm() {
        let mut facts = machine(Scope::Build, &[]);
        (facts.cc, facts.compiler, facts.linker) = (false, None, None);
        assert_eq!(missing_packages(&facts), ["build-essential", "rustc-web", "rust-web-src"]);
    }
}
