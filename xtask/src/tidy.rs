//! `cargo xtask tidy`: rules of this repository that the compiler does not check.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::scan::code_only;
use crate::workspace;

/// The only files that may contain `unsafe`. ARCHITECTURE.md, "Invariants", says why each does.
const UNSAFE_ALLOWED: [&str; 6] = [
    "overlay-ebpf/src/programs/egress.rs",
    "overlay-ebpf/src/programs/ingress.rs",
    "overlay-ebpf/src/programs/maps.rs",
    "overlay-ebpf/src/programs/memory.rs",
    "overlay-ebpf/src/programs/mod.rs",
    "overlay-ebpf/src/programs/xdp.rs",
];

/// A file longer than this asks to be split by concept.
const MAX_LINES: usize = 600;

/// Code that is not finished, or not run.
const UNFINISHED: [&str; 3] = ["todo!(", "unimplemented!(", "#[ignore"];

/// A mark in a comment that says the same. In two pieces, because this file is checked too.
const MARK: &str = concat!("FIX", "ME");

/// The documents whose paths are checked, and the directories by which a path is recognised as one of this repository.
const DOCUMENTS: [&str; 3] = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"];
const DIRECTORIES: [&str; 7] = ["overlay-ebpf", "overlay-agent", "xtask", "tests", "docs", ".ci", ".cargo"];

/// Runs the command.
pub(crate) fn run() -> Result<ExitCode> {
    check()?;
    println!("tidy: nothing found");
    Ok(ExitCode::SUCCESS)
}

/// Prints every finding, and fails if there is one.
pub(crate) fn check() -> Result<()> {
    let root = workspace::root()?;
    let mut files = Vec::new();
    rust_files(&root, &mut files)?;
    files.sort();

    let mut findings = Vec::new();
    for file in &files {
        let path = file.strip_prefix(&root).unwrap_or(file).to_string_lossy().into_owned();
        let source = read(file)?;
        findings.extend(check_source(&path, &source, UNSAFE_ALLOWED.contains(&path.as_str())));
    }
    for path in UNSAFE_ALLOWED.into_iter().filter(|path| !root.join(path).exists()) {
        findings.push(format!(
            "xtask/src/tidy.rs:1: {path} may contain unsafe, but does not exist: take it off the list"
        ));
    }
    for name in DOCUMENTS {
        let path = root.join(name);
        if !path.exists() {
            findings.push(format!("{name}:1: the document does not exist"));
            continue;
        }
        let text = read(&path)?;
        findings.extend(check_document(name, &text, &|path| root.join(path).exists()));
    }

    for finding in &findings {
        println!("{finding}");
    }
    match findings.len() {
        0 => Ok(()),
        1 => bail!("tidy found 1 thing to put right"),
        count => bail!("tidy found {count} things to put right"),
    }
}

/// All findings in one Rust file, each as `path:line: what`.
fn check_source(path: &str, source: &str, unsafe_allowed: bool) -> Vec<String> {
    let mut findings = Vec::new();
    let mut find = |line: usize, what: &str| findings.push(format!("{path}:{line}: {what}"));
    if !source.starts_with("//!") {
        find(1, "the file does not open with a `//!` comment that names its one job");
    }
    let length = source.lines().count();
    if length > MAX_LINES {
        find(
            MAX_LINES + 1,
            &format!("the file has {length} lines, more than {MAX_LINES}: split it by concept"),
        );
    }
    let mut has_unsafe = false;
    for (number, (code, line)) in (1..).zip(code_only(source).lines().zip(source.lines())) {
        if is_word_in("unsafe", code) {
            has_unsafe = true;
            if !unsafe_allowed {
                find(
                    number,
                    "unsafe outside of the files that may contain it (the list is in xtask/src/tidy.rs)",
                );
            }
        }
        for unfinished in UNFINISHED.into_iter().filter(|unfinished| code.contains(unfinished)) {
            find(number, &format!("`{unfinished}`: finish it, or leave it out"));
        }
        if line.contains(MARK) {
            find(number, &format!("`{MARK}`: do it, or write down why not"));
        }
    }
    if unsafe_allowed && !has_unsafe {
        find(1, "the file may contain unsafe and does not: take it off the list in xtask/src/tidy.rs");
    }
    findings
}

/// All paths of this repository that a document names in backticks and that do not exist.
fn check_document(name: &str, text: &str, exists: &dyn Fn(&str) -> bool) -> Vec<String> {
    let mut findings = Vec::new();
    let mut in_block = false;
    let mut sections = 0;
    for (number, line) in (1..).zip(text.lines()) {
        in_block ^= line.trim_start().starts_with("```");
        if line.starts_with("## ") {
            sections += 1;
        }
        // Past releases name the files of their time: of a changelog only the first section is about this tree.
        if in_block || (name == "CHANGELOG.md" && sections > 1) {
            continue;
        }
        let spans = line.split('`').skip(1).step_by(2);
        let missing = spans.filter_map(repository_path).filter(|path| !exists(path));
        findings.extend(missing.map(|path| format!("{name}:{number}: `{path}` does not exist")));
    }
    findings
}

/// The path of this repository that a span of code names, up to its first wildcard, if it looks like one.
fn repository_path(span: &str) -> Option<&str> {
    let is_path_char = |c: char| c.is_ascii_alphanumeric() || "/._-*{},".contains(c);
    if !span.chars().all(is_path_char) {
        return None;
    }
    let (first, rest) = span.split_once('/')?;
    if !DIRECTORIES.contains(&first) {
        return None;
    }
    let Some(wildcard) = rest.find(['*', '{']) else { return Some(span.trim_end_matches('/')) };
    let fixed = span.get(..first.len() + 1 + wildcard)?;
    fixed.rsplit_once('/').map(|(directory, _)| directory)
}

fn is_word_in(word: &str, code: &str) -> bool {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|found| found == word)
}

/// Collects the Rust files below `directory`, without build output and hidden directories.
fn rust_files(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let context = || format!("cannot list {}", directory.display());
    for entry in fs::read_dir(directory).with_context(context)? {
        let entry = entry.with_context(context)?;
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().with_context(context)?.is_dir() {
            if name != "target" && !name.starts_with('.') {
                rust_files(&path, files)?;
            }
        } else if name.ends_with(".rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(source: &str) -> Vec<String> {
        check_source("a.rs", source, false)
    }

    #[test]
    fn a_tidy_file_has_no_findings() {
        assert_eq!(
            found("//! Does one thing.\n\n// unsafe, todo!( and such in comments\nfn f() {}\n"),
            [""; 0]
        );
    }

    #[test]
    fn every_file_names_its_job() {
        assert!(found("fn f() {}\n")[0].starts_with("a.rs:1: the file does not open"));
        assert!(found("")[0].starts_with("a.rs:1: the file does not open"));
    }

    #[test]
    fn long_files_are_found() {
        assert!(
            found(&format!("//! x\n{}", "\n".repeat(MAX_LINES)))[0].starts_with("a.rs:601: the file has 601")
        );
        assert_eq!(found(&format!("//! x\n{}", "\n".repeat(MAX_LINES - 1))), [""; 0]);
    }

    #[test]
    fn unsafe_is_found_where_it_is_not_allowed() {
        let source = "//! x\n#![allow(unsafe_code)]\nfn f() {\n    unsafe { g() }\n}\n";
        assert!(found(source)[0].starts_with("a.rs:4: unsafe outside"));
        assert_eq!(check_source("a.rs", source, true), [""; 0]);
        assert!(check_source("a.rs", "//! x\n", true)[0].contains("take it off the list"));
    }

    #[test]
    fn unfinished_code_is_found() {
        let source = format!("//! x\nfn f() {{ todo!() }}\n#[ignore]\n// {MARK}: later\n");
        let lines: Vec<String> = found(&source).iter().map(|finding| finding[..7].to_owned()).collect();
        assert_eq!(lines, ["a.rs:2:", "a.rs:3:", "a.rs:4:"]);
    }

    #[test]
    fn paths_in_documents_must_exist() {
        let text = "See `xtask/src/main.rs` and `xtask/src/gone.rs`.\n```\n`tests/gone`\n```\n`cargo xtask/x y` `/etc/x`\n";
        let findings = check_document("README.md", text, &|path| path == "xtask/src/main.rs");
        assert_eq!(findings, ["README.md:1: `xtask/src/gone.rs` does not exist"]);
    }

    #[test]
    fn only_the_first_section_of_a_changelog_is_about_this_tree() {
        let text = "# Changelog\n## Unreleased\n`docs/a.md`\n## 0.1.0\n`docs/b.md`\n";
        assert_eq!(
            check_document("CHANGELOG.md", text, &|_| false),
            ["CHANGELOG.md:3: `docs/a.md` does not exist"]
        );
    }

    #[test]
    fn a_path_is_checked_up_to_its_first_wildcard() {
        assert_eq!(repository_path("overlay-ebpf/src/wire/*.rs"), Some("overlay-ebpf/src/wire"));
        assert_eq!(repository_path("overlay-agent/src/store/{etcd,dir}"), Some("overlay-agent/src/store"));
        assert_eq!(repository_path("docs/*"), Some("docs"));
        assert_eq!(repository_path("tests/"), Some("tests"));
        assert_eq!(repository_path("target/release/overlay-agent"), None);
        assert_eq!(repository_path("overlay-agent"), None);
    }
}
