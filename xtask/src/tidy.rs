//! `cargo xtask tidy`: checks conventions of this repository that the compiler does not check.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::scan::code_only;
use crate::workspace;

/// The only files that may contain `unsafe`; see "Invariants" in ARCHITECTURE.md.
const UNSAFE_ALLOWED: [&str; 18] = [
    "overlay-agent/src/datapath/ebpf/cgroup_link.rs",
    "overlay-agent/src/main.rs",
    "overlay-ebpf/src/programs/egress.rs",
    "overlay-ebpf/src/programs/flows.rs",
    "overlay-ebpf/src/programs/heartbeat.rs",
    "overlay-ebpf/src/programs/from_local.rs",
    "overlay-ebpf/src/programs/ingress.rs",
    "overlay-ebpf/src/programs/maps.rs",
    "overlay-ebpf/src/programs/memory.rs",
    "overlay-ebpf/src/programs/mod.rs",
    "overlay-ebpf/src/programs/service/maps.rs",
    "overlay-ebpf/src/programs/service/mod.rs",
    "overlay-ebpf/src/programs/service/outcomes.rs",
    "overlay-ebpf/src/programs/service/place.rs",
    "overlay-ebpf/src/programs/service/sockets.rs",
    "overlay-ebpf/src/programs/service/translate.rs",
    "overlay-ebpf/src/programs/to_local.rs",
    "overlay-ebpf/src/programs/xdp.rs",
];

/// A longer file has to be split by concept.
const MAX_LINES: usize = 600;

/// Code that is unfinished or does not run.
const UNFINISHED: [&str; 3] = ["todo!(", "unimplemented!(", "#[ignore"];

/// Marks unfinished code in a comment. In two pieces, because this file is checked, too.
const MARK: &str = concat!("FIX", "ME");

/// Phrases that are not plain technical English, in lower case.
const BANNED: [&str; 8] =
    ["fares", "anew", "whoever", "whom", "nobody", "in one breath", "put right", "a word to"];
/// The only file that may contain them.
const BANNED_ALLOWED: &str = "xtask/src/tidy.rs";

/// The documents whose paths are checked, and the top-level directories of such paths.
const DOCUMENTS: [&str; 3] = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"];
const DIRECTORIES: [&str; 7] = ["overlay-ebpf", "overlay-agent", "xtask", "tests", "docs", ".ci", ".cargo"];

/// Runs the command.
pub(crate) fn run() -> Result<ExitCode> {
    check()?;
    println!("tidy: no findings");
    Ok(ExitCode::SUCCESS)
}

/// Prints every finding, and fails if there is one.
pub(crate) fn check() -> Result<()> {
    let root = workspace::root()?;
    let mut files = Vec::new();
    source_files(&root, &mut files)?;
    files.sort();

    let mut findings = Vec::new();
    for file in &files {
        let path = file.strip_prefix(&root).unwrap_or(file).to_string_lossy().into_owned();
        let text = read(file)?;
        if path.ends_with(".rs") {
            findings.extend(check_source(&path, &text, UNSAFE_ALLOWED.contains(&path.as_str())));
            if file.with_extension("").is_dir() {
                let directory = path.trim_end_matches(".rs");
                findings.push(format!("{path}:1: the module has a directory: move it to {directory}/mod.rs"));
            }
        }
        if path != BANNED_ALLOWED {
            findings.extend(check_language(&path, &text));
        }
    }
    for path in UNSAFE_ALLOWED.into_iter().filter(|path| !root.join(path).exists()) {
        findings.push(format!("xtask/src/tidy.rs:1: {path} does not exist: remove it from UNSAFE_ALLOWED"));
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
        1 => bail!("1 finding"),
        count => bail!("{count} findings"),
    }
}

/// All findings in one Rust file, each as `path:line: finding`.
fn check_source(path: &str, source: &str, unsafe_allowed: bool) -> Vec<String> {
    let mut findings = Vec::new();
    let mut find = |line: usize, finding: &str| findings.push(format!("{path}:{line}: {finding}"));
    if !source.starts_with("//!") {
        find(1, "the file does not start with a `//!` comment that describes its purpose");
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
                    "unsafe outside of the files that may contain it (UNSAFE_ALLOWED in xtask/src/tidy.rs)",
                );
            }
        }
        for unfinished in UNFINISHED.into_iter().filter(|unfinished| code.contains(unfinished)) {
            find(number, &format!("`{unfinished}`: finish or remove it"));
        }
        if line.contains(MARK) {
            find(number, &format!("`{MARK}`: finish or remove it"));
        }
    }
    if unsafe_allowed && !has_unsafe {
        find(1, "the file has no unsafe: remove it from UNSAFE_ALLOWED in xtask/src/tidy.rs");
    }
    findings
}

/// All banned phrases in a file, also in identifiers.
fn check_language(path: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    for (number, line) in current_lines(path, text) {
        let words: Vec<_> =
            line.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
        let words = format!(" {} ", words.join(" ").to_lowercase());
        let found = BANNED.into_iter().filter(|phrase| words.contains(&format!(" {phrase} ")));
        findings
            .extend(found.map(|phrase| format!("{path}:{number}: `{phrase}`: use plain technical terms")));
    }
    findings
}

/// The numbered lines of a file; of a changelog only those up to the first release, because later sections describe old trees.
fn current_lines<'a>(path: &str, text: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
    let limit = if path == "CHANGELOG.md" { 1 } else { usize::MAX };
    let mut sections = 0;
    (1..).zip(text.lines()).take_while(move |(_, line)| {
        sections += usize::from(line.starts_with("## "));
        sections <= limit
    })
}

/// All paths of this repository that a document names in backticks and that do not exist.
fn check_document(name: &str, text: &str, exists: &dyn Fn(&str) -> bool) -> Vec<String> {
    let mut findings = Vec::new();
    let mut in_block = false;
    for (number, line) in current_lines(name, text) {
        in_block ^= line.trim_start().starts_with("```");
        if in_block {
            continue;
        }
        let spans = line.split('`').skip(1).step_by(2);
        let missing = spans.filter_map(repository_path).filter(|path| !exists(path));
        findings.extend(missing.map(|path| format!("{name}:{number}: `{path}` does not exist")));
    }
    findings
}

/// The path up to its first wildcard, if a span of code is a path of this repository.
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

/// Collects the Rust files and documents below `directory`, except in build output and hidden directories.
fn source_files(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let context = || format!("cannot list {}", directory.display());
    for entry in fs::read_dir(directory).with_context(context)? {
        let entry = entry.with_context(context)?;
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().with_context(context)?.is_dir() {
            if name != "target" && !name.starts_with('.') {
                source_files(&path, files)?;
            }
        } else if name.ends_with(".rs") || name.ends_with(".md") {
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
    fn every_file_describes_its_purpose() {
        assert!(found("fn f() {}\n")[0].starts_with("a.rs:1: the file does not start"));
        assert!(found("")[0].starts_with("a.rs:1: the file does not start"));
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
        assert!(check_source("a.rs", "//! x\n", true)[0].contains("remove it from"));
    }

    #[test]
    fn unfinished_code_is_found() {
        let source = format!("//! x\nfn f() {{ todo!() }}\n#[ignore]\n// {MARK}: later\n");
        let lines: Vec<String> = found(&source).iter().map(|finding| finding[..7].to_owned()).collect();
        assert_eq!(lines, ["a.rs:2:", "a.rs:3:", "a.rs:4:"]);
    }

    #[test]
    fn banned_phrases_are_found_in_text_and_identifiers() {
        let text = "Nobody.\nlet keeps_nobody_out = \"put  right\";\nfaresome, a word, renewed\n";
        let findings = check_language("a.rs", text);
        let starts: Vec<_> =
            findings.iter().filter_map(|finding| finding.split_once("`: ")).map(|(start, _)| start).collect();
        assert_eq!(starts, ["a.rs:1: `nobody", "a.rs:2: `nobody", "a.rs:2: `put right"]);
    }

    #[test]
    fn paths_in_documents_must_exist() {
        let text = "See `xtask/src/main.rs` and `xtask/src/gone.rs`.\n```\n`tests/gone`\n```\n`cargo xtask/x y` `/etc/x`\n";
        let findings = check_document("README.md", text, &|path| path == "xtask/src/main.rs");
        assert_eq!(findings, ["README.md:1: `xtask/src/gone.rs` does not exist"]);
    }

    #[test]
    fn only_the_first_section_of_a_changelog_is_checked() {
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
