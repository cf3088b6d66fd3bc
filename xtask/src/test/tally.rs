//! Counts tests by libtest's result lines.

/// Results of a test run.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
    /// Number of result lines: one per test program.
    results: usize,
    /// The names of the failed tests.
    pub(crate) failures: Vec<String>,
}

impl Tally {
    /// A tally of one failure.
    pub(super) fn of_failure(name: &str) -> Self {
        Self { failed: 1, failures: vec![name.to_owned()], ..Self::default() }
    }

    /// Counts the standard output of test programs.
    pub(crate) fn parse(output: &Lines) -> Self {
        let mut tally = Self::default();
        // Of two `failures:` lines before the result line, the second precedes the names, the first the tests' output.
        let mut names: Option<Vec<String>> = None;
        for line in output.iter() {
            if let Some(result) = parse_result(&line) {
                tally.passed += result.passed;
                tally.failed += result.failed;
                tally.skipped += result.ignored;
                tally.results += 1;
                tally.failures.extend(names.take().into_iter().flatten());
            } else if line.trim_end() == "failures:" {
                names = Some(Vec::new());
            } else if let Some(listed) = &mut names {
                match line.strip_prefix("    ") {
                    Some(name) => listed.push(name.trim().to_owned()),
                    None if line.trim().is_empty() => {}
                    None => names = None,
                }
            }
        }
        tally
    }

    /// Adds one failure for each program that died without a result, or one if cargo failed otherwise, for example because of a
    /// compile error.
    pub(super) fn complete(&mut self, call: &str, started: usize, success: bool) {
        if success {
            return;
        }
        let silent = u64::try_from(started.saturating_sub(self.results)).unwrap_or(u64::MAX);
        if silent > 0 {
            self.failed += silent;
            self.failures.push(format!("{silent} test program(s) of `{call}` ended without a result"));
        } else if self.failed == 0 {
            self.failed += 1;
            let outcome = if started == 0 { "did not build" } else { "failed" };
            self.failures.push(format!("`{call}` {outcome}"));
        }
    }

    /// Adds another tally of the same part.
    pub(super) fn merge(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.results += other.results;
        self.failures.extend(other.failures.iter().cloned());
    }

    /// Adds the tally of the part `name`.
    pub(super) fn add(&mut self, name: &str, part: &Self) {
        let failures = part.failures.iter().map(|failure| format!("{name}: {failure}")).collect();
        let named = Self {
            passed: part.passed,
            failed: part.failed,
            skipped: part.skipped,
            results: part.results,
            failures,
        };
        self.merge(&named);
    }

    /// `N passed, N failed, N skipped`
    pub(super) fn counts(&self) -> String {
        format!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }

    /// Whether no test was selected.
    pub(super) fn is_empty(&self) -> bool {
        self.passed + self.failed + self.skipped == 0
    }

    /// Whether tests ran and none failed.
    pub(crate) fn is_success(&self) -> bool {
        self.failed == 0 && self.passed > 0
    }
}

/// Number of test programs that cargo started. (A documentation test may print several results for one.)
pub(super) fn started_programs(errors: &Lines) -> usize {
    let heads = |line: &str| line.starts_with("Running ") || line.starts_with("Doc-tests ");
    errors.iter().filter(|line| line.starts_with(' ') && heads(line.trim_start())).count()
}

/// Collected output, read by line.
#[derive(Default)]
pub(crate) struct Lines {
    bytes: Vec<u8>,
}

impl Lines {
    /// Adds output.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn iter(&self) -> impl Iterator<Item = std::borrow::Cow<'_, str>> {
        self.bytes.split(|&byte| byte == b'\n').map(String::from_utf8_lossy)
    }
}

struct ResultLine {
    passed: u64,
    failed: u64,
    ignored: u64,
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s`.
fn parse_result(line: &str) -> Option<ResultLine> {
    let (_verdict, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |name: &str| {
        counts.split(';').find_map(|part| part.trim().strip_suffix(name)?.trim_end().parse().ok())
    };
    Some(ResultLine { passed: count("passed")?, failed: count("failed")?, ignored: count("ignored")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Lines {
        let mut lines = Lines::default();
        lines.push(text.as_bytes());
        lines
    }

    const PASSED: &str = "\nrunning 3 tests\ntest a ... ok\ntest b ... ignored\ntest c ... ok\n\n\
        test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.01s\n\n";

    const FAILED: &str = "\nrunning 2 tests\ntest x::y ... FAILED\ntest x::z ... ok\n\nfailures:\n\n\
        ---- x::y stdout ----\n\nthread 'x::y' panicked at src/lib.rs:3:5:\n    not a name\n\n\n\
        failures:\n    x::y\n\n\
        test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\n";

    #[test]
    fn results_of_all_programs_are_summed() {
        let tally = Tally::parse(&lines(&format!("{PASSED}{FAILED}{PASSED}")));
        assert_eq!(tally.counts(), "5 passed, 1 failed, 2 skipped");
        assert_eq!(tally.results, 3);
    }

    #[test]
    fn failed_tests_are_named_without_their_output() {
        assert_eq!(Tally::parse(&lines(FAILED)).failures, ["x::y"]);
    }

    #[test]
    fn only_whole_result_lines_count() {
        let text =
            "test result: ok. 2 passed\n  test result: ok. 1 passed; 0 failed; 0 ignored;\ntest result: \n";
        assert_eq!(Tally::parse(&lines(text)), Tally::default());
    }

    #[test]
    fn output_that_comes_in_pieces_counts_once() {
        let mut pieces = Lines::default();
        PASSED.as_bytes().chunks(7).for_each(|piece| pieces.push(piece));
        assert_eq!(Tally::parse(&pieces).counts(), "2 passed, 0 failed, 1 skipped");
    }

    #[test]
    fn a_program_that_died_counts_as_one_failure() {
        let mut tally = Tally::parse(&lines(PASSED));
        tally.complete("cargo test --lib", 2, false);
        assert_eq!(tally.counts(), "2 passed, 1 failed, 1 skipped");
        assert!(tally.failures[0].contains("without a result"));
    }

    #[test]
    fn a_build_that_fails_counts_as_one_failure() {
        let mut tally = Tally::default();
        tally.complete("cargo test --lib", 0, false);
        assert_eq!(tally.counts(), "0 passed, 1 failed, 0 skipped");
        assert_eq!(tally.failures, ["`cargo test --lib` did not build"]);
    }

    #[test]
    fn a_failed_test_is_not_counted_twice() {
        let mut tally = Tally::parse(&lines(FAILED));
        tally.complete("cargo test --lib", 1, false);
        assert_eq!(tally.counts(), "1 passed, 1 failed, 0 skipped");
    }

    #[test]
    fn failures_of_parts_carry_the_name_of_the_part() {
        let mut total = Tally::default();
        total.add("e2e", &Tally::parse(&lines(FAILED)));
        assert_eq!(total.failures, ["e2e: x::y"]);
    }

    #[test]
    fn a_run_without_tests_is_a_failure() {
        assert!(!Tally::default().is_success());
        assert!(Tally::default().is_empty());
        assert!(Tally::parse(&lines(PASSED)).is_success());
        assert!(!Tally::parse(&lines(FAILED)).is_success());
    }

    #[test]
    fn started_programs_are_counted() {
        let errors = "   Compiling a v0.1.0\n    Finished `test` profile\n     Running unittests src/lib.rs (target/a)\n\
            Running is not at the start\n   Doc-tests a\n";
        assert_eq!(started_programs(&lines(errors)), 2);
    }
}
