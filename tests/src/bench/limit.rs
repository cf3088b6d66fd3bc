//! Results of a benchmark and their limits.

use std::process::ExitCode;

use crate::table::{self, Row};

/// One number and its limit.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub(super) what: String,
    pub(super) value: f64,
    pub(super) unit: &'static str,
    /// Upper limit, if there is one.
    pub(super) below: Option<f64>,
}

impl Measured {
    pub(super) fn new(what: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { what: what.into(), value, unit, below: None }
    }

    pub(super) fn below(self, limit: f64) -> Self {
        Self { below: Some(limit), ..self }
    }

    fn is_missed(&self) -> bool {
        self.below.is_some_and(|limit| self.value >= limit)
    }

    fn row(&self) -> Row {
        let number = |value: f64| format!("{} {}", short(value), self.unit).trim_end().to_owned();
        let verdict = match self.below {
            None => "",
            Some(_) if self.is_missed() => "MISSED",
            Some(_) => "met",
        };
        let limit = self.below.map_or_else(String::new, |limit| format!("< {}", number(limit)));
        Row { cells: vec![self.what.clone(), number(self.value), limit, verdict.to_owned()] }
    }
}

/// Three significant digits.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// The table of all numbers.
pub(super) fn table(measured: &[Measured]) -> String {
    let rows: Vec<_> = measured.iter().map(Measured::row).collect();
    table::render(&["what", "measured", "limit", ""], &rows)
}

/// Prints which limits are missed; with `check`, a missed limit is a failure.
pub(super) fn exit_code(measured: &[Measured], check: bool) -> ExitCode {
    let missed: Vec<_> = measured.iter().filter(|one| one.is_missed()).map(|one| one.what.as_str()).collect();
    if missed.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("missed: {}", missed.join(", "));
    if check { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_missed_from_the_limit_on() {
        let measured = |value| Measured::new("memory", value, "MB").below(60.0);
        assert!(measured(60.0).is_missed() && !measured(59.9).is_missed());
        assert!(!Measured::new("memory", 1e9, "MB").is_missed());
        assert!(table(&[measured(61.0)]).contains("MISSED"));
        assert!(table(&[measured(1.0)]).contains("met"));
    }

    #[test]
    fn numbers_are_as_long_as_they_need_to_be() {
        assert_eq!([123.4, 12.34, 1.234, 0.01234, 0.0].map(short), ["123", "12.3", "1.23", "0.0123", "0.00"]);
    }
}
