//! Containers are created and removed at random while others have traffic.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use overlay_tests::sandbox::Sandbox;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{
    changes::with_streams,
    place::{Container, Kind, Place},
};

/// How long containers come and go.
const DURATION: Duration = Duration::from_secs(7);
/// Most containers at a time.
const MOST: u8 = 24;

pub(super) fn churn(sandbox: &Arc<Sandbox>, kind: Kind, bypass: &str) -> Result<()> {
    let seed = rand::random();
    let mut random = SmallRng::seed_from_u64(seed);
    let place = Place::start(sandbox, kind, bypass)?;
    let first = place.first();
    let living = with_streams(&place, &first, || {
        let mut living = BTreeMap::new();
        let deadline = Instant::now() + DURATION;
        while Instant::now() < deadline {
            step(&place, &mut living, &mut random)?;
        }
        Ok(living)
    })
    .with_context(|| format!("with the seed {seed}"))?;
    place.settles(1 + living.len()).with_context(|| format!("{:?} live", living.keys()))?;
    for container in living.values() {
        place.skips(container)?;
    }
    place.no_strays(living.values().chain([&first]))?;
    place.runs()
}

/// Creates or removes one container.
fn step(place: &Place, living: &mut BTreeMap<u8, Container>, random: &mut SmallRng) -> Result<()> {
    let last = random.random_range(10..10 + MOST);
    match living.remove(&last) {
        // The kernel removes the veth of a namespace that is gone some time later.
        Some(container) if random.random_bool(0.3) => drop(container),
        Some(container) => place.remove(&container)?,
        None => {
            let container = place.add(last)?;
            container.announce()?;
            // For a moment, the bypass may know a predecessor.
            place.answers(&container, 1, "a new container is reached")?;
            living.insert(last, container);
        }
    }
    Ok(())
}
