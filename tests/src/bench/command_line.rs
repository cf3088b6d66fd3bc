//! Parses command lines of benchmarks for their tests.

use clap::{Args, CommandFactory as _, Parser};

#[derive(Debug, Parser)]
struct Cli<T: Args> {
    #[command(flatten)]
    options: T,
}

/// Checks that the options do not contradict each other.
pub(super) fn check<T: Args>() {
    Cli::<T>::command().debug_assert();
}

/// The options of a command line, which begins with the name of the program.
pub(super) fn parse<T: Args>(line: &str) -> Result<T, clap::Error> {
    Cli::try_parse_from(line.split_whitespace()).map(|cli| cli.options)
}
