//! The changes that tests must notice, by the part of the code that they are made in.

mod agent;
mod bypass;
mod containers;
mod decisions;
mod fields;
mod neighbours;
mod services;
mod shells;

use super::change::Change;

/// Every change.
pub(super) fn all() -> impl Iterator<Item = &'static Change> {
    [
        shells::CHANGES,
        decisions::CHANGES,
        fields::CHANGES,
        agent::CHANGES,
        containers::CHANGES,
        bypass::CHANGES,
        neighbours::CHANGES,
        services::CHANGES,
    ]
    .into_iter()
    .flatten()
}
