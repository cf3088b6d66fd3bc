//! Tells other nodes through the store which endpoints of this node are down.
//!
//! Endpoints of this node's files are left to `files`, which writes them under this node's lifetime. Others belong to their
//! writers: only the state changes, by compare-and-swap, and the lifetime stays.

use std::{collections::BTreeSet, future::pending, sync::Arc, time::Duration};

use tokio::{
    sync::watch::{self, error::RecvError},
    task::AbortHandle,
    time::sleep,
};
use tracing::debug;

use super::{VerdictReceiver, Verdicts};
use crate::{
    service::{
        Catalog, EndpointName,
        files::NamedEndpoints,
        record::{Endpoint, EndpointState, Endpoints},
    },
    store::{Store, StoreError},
};

/// Endpoints that others write.
type Kept = watch::Receiver<Arc<NamedEndpoints>>;

/// Pause after a failure.
const RETRY: Duration = Duration::from_secs(2);

/// A task that writes states. Dropped, it ends.
#[derive(Debug)]
pub struct Publishing(AbortHandle);

impl Drop for Publishing {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Writes the states of endpoints in a task: those with a verdict, in the followed catalog, and not among `kept`, which others write.
pub fn publish(
    store: &Store,
    verdicts: VerdictReceiver,
    catalog: watch::Receiver<Arc<Catalog>>,
    kept: Option<Kept>,
) -> Publishing {
    let publisher = Publisher { store: store.clone(), verdicts, catalog, kept, marked: BTreeSet::new() };
    Publishing(tokio::spawn(publisher.run()).abort_handle())
}

struct Publisher {
    store: Store,
    verdicts: VerdictReceiver,
    catalog: watch::Receiver<Arc<Catalog>>,
    kept: Option<Kept>,
    /// Endpoints whose records say because of this task that they are down. When they are not checked any more, they are ready.
    marked: BTreeSet<EndpointName>,
}

impl Publisher {
    async fn run(mut self) {
        loop {
            let is_done = self.write_all().await.unwrap_or_else(|error| {
                debug!("the states of endpoints cannot be written: {error}");
                false
            });
            // The senders are gone when services end.
            let changed = tokio::select! {
                changed = self.verdicts.changed() => changed,
                changed = self.catalog.changed() => changed,
                changed = changed(&mut self.kept) => changed,
                () = sleep(RETRY), if !is_done => Ok(()),
            };
            if changed.is_err() {
                return;
            }
        }
    }

    /// Returns whether nothing is left to be written.
    async fn write_all(&mut self) -> Result<bool, StoreError> {
        let verdicts = self.verdicts.borrow_and_update().clone().unwrap_or_default();
        let kept = self.kept.as_mut().map(|kept| Arc::clone(&kept.borrow_and_update())).unwrap_or_default();
        let catalog = Arc::clone(&self.catalog.borrow_and_update());
        self.marked.retain(|name| !kept.contains_key(name) && recorded(&catalog, name).is_some());
        let due = due(&verdicts, &catalog, &kept, &self.marked);
        let mut is_done = true;
        for (name, state) in due {
            is_done &= write(&self.store, &name, state).await?;
            match state == EndpointState::Down {
                true => self.marked.insert(name),
                false => self.marked.remove(&name),
            };
        }
        Ok(is_done)
    }
}

/// Never, when no others write any.
async fn changed(kept: &mut Option<Kept>) -> Result<(), RecvError> {
    match kept {
        Some(kept) => kept.changed().await,
        None => pending().await,
    }
}

/// The endpoints whose records should have another state.
fn due(
    verdicts: &Verdicts,
    catalog: &Catalog,
    kept: &NamedEndpoints,
    marked: &BTreeSet<EndpointName>,
) -> Vec<(EndpointName, EndpointState)> {
    let checked =
        verdicts.iter().filter(|(name, _)| !kept.contains_key(*name)).filter_map(|(name, verdict)| {
            let recorded = recorded(catalog, name)?;
            let state = verdict.state(recorded);
            (state != recorded).then(|| (name.clone(), state))
        });
    let unchecked = marked
        .iter()
        .filter(|name| !verdicts.contains_key(*name) && recorded(catalog, name) == Some(EndpointState::Down));
    checked.chain(unchecked.map(|name| (name.clone(), EndpointState::Ready))).collect()
}

fn recorded(catalog: &Catalog, name: &EndpointName) -> Option<EndpointState> {
    Some(catalog.services.get(&name.service)?.endpoint(name)?.spec.state)
}

/// Writes a state, and returns whether the record has it, or is draining. It has not when another client writes at the same time, or
/// the store has no such record, as a directory that is away.
async fn write(store: &Store, name: &EndpointName, state: EndpointState) -> Result<bool, StoreError> {
    let Some(record) = store.get::<Endpoints>(name).await? else { return Ok(false) };
    let Ok(endpoint) = &record.value else { return Ok(false) };
    if endpoint.state == state || endpoint.state == EndpointState::Draining {
        return Ok(true);
    }
    let endpoint = Endpoint { state, ..endpoint.clone() };
    let lifetime = record.version.lifetime.id();
    let written = store.replace_record::<Endpoints>(name, record.version, &endpoint, lifetime, &[]).await?;
    Ok(written.is_some())
}

#[cfg(test)]
mod tests;
